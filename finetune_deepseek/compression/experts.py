"""Routed experts left out: in each layer, and each group of its experts, those that are used least.

The use of an expert is the sum of the weights with which calibration tokens choose it: how often, times its mean
weight. Hash layers (V4) have a table of experts by token, in which none can be missing. Letters: E experts, G groups.
"""

import re
from functools import partial
from typing import Any

import torch
from torch import nn

from modeling_deepseek.moe import DeepSeekMoE

from .calibration import Calibration, Tokens
from .rebuilding import Weights, rebuilt, with_experts_fused

# The parts of a layer that have a row or matrix for each expert; the second bias is V4.1's, for tokens of images.
BIASES = ("gate.e_score_correction_bias", "gate.e_score_correction_bias_vl")
PARTS = ("gate.weight", *BIASES, "experts.gate_up_proj", "experts.down_proj")


def mixture_layers(model: Any) -> dict[str, DeepSeekMoE]:
    """The layers with routed experts, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, DeepSeekMoE)}


def number_dropped(config: Any, share: float) -> int:
    """How many experts of each group go.

    Raises:
        ValueError: for a model without experts, with hash layers, or a share of which nothing comes.
    """
    if config.n_routed_experts is None:
        raise ValueError("--prune-experts: this model has no routed experts (n_routed_experts); leave the flag out.")
    if any(spec.feed_forward == "hash_moe" for spec in config.specs):
        raise ValueError("--prune-experts: hash layers choose experts by a table of all of them, so none can go.")
    size = config.n_routed_experts // groups_of(config)
    dropped = int(share * size + 1e-6)
    if dropped == 0:
        raise ValueError(
            f"--prune-experts {share:g}: of {size} experts{' of a group' * (groups_of(config) > 1)} this is none; "
            f"the least share is {1 / size:.3g}."
        )
    return dropped


def groups_of(config: Any) -> int:
    """Groups that the router looks at; a greedy one looks at none."""
    return 1 if config.topk_method == "greedy" else config.n_group


def expert_use(model: Any, calibration: Calibration) -> dict[str, torch.Tensor]:
    """The use of each expert [E], float64, by the name of the layer."""
    layers = mixture_layers(model)
    use = {name: torch.zeros(layer.gate.weight.shape[0], dtype=torch.float64) for name, layer in layers.items()}
    with Tokens(model) as tokens:

        def add(name: str, module: nn.Module, args: Any, output: Any) -> None:
            _, weights, indices = (tokens.of(part).cpu() for part in output)
            use[name].index_add_(0, indices.flatten(), weights.flatten().double())

        calibration.watch(model, {layer.gate: partial(add, name) for name, layer in layers.items()})
    for name, found in use.items():
        if not found.sum() > 0:  # not a number, too
            raise ValueError(f"--prune-experts: the training rows say nothing of the experts in {name}; give others.")
    return use


def kept_experts(use: torch.Tensor, groups: int, dropped: int) -> torch.Tensor:
    """[E] -> the experts that stay, in their order: of each group those of most use, of equal ones the first."""
    grouped = use.unflatten(0, (groups, -1))
    best = grouped.argsort(dim=-1, descending=True, stable=True)[:, : grouped.shape[1] - dropped]
    first = torch.arange(groups).unsqueeze(-1) * grouped.shape[1]
    return (best + first).flatten().sort().values


def prune_experts(model: Any, share: float, calibration: Calibration) -> tuple[Any, dict[str, list[int]]]:
    """The model with that share of its routed experts left out, and the numbers of those that stay, by layer.

    Raises:
        ValueError: as `number_dropped`; and if the rest are fewer than a token chooses.
    """
    number_dropped(model.config, share)
    model = with_experts_fused(model)
    use, groups = expert_use(model, calibration), groups_of(model.config)
    layers = {name: int(re.findall(r"layers\.(\d+)\.", name)[-1]) for name in use}
    dropped = {name: number_dropped(model.config.experts_at(layer), share) for name, layer in layers.items()}
    kept = {name: kept_experts(found, groups, dropped[name]) for name, found in use.items()}
    try:
        made = without_experts(model, kept)
    except ValueError as error:
        raise ValueError(f"--prune-experts {share:g} leaves too few: {error}") from error
    return made, {name: found.tolist() for name, found in kept.items()}


def without_experts(model: Any, kept: dict[str, torch.Tensor]) -> Any:
    """The model with these experts of each layer alone; equally many in each of the trunk's, and of the others."""
    weights: Weights = model.state_dict()
    for name, experts in kept.items():
        for part in (f"{name}.{part}" for part in PARTS if f"{name}.{part}" in weights):
            weights[part] = weights[part][experts.to(weights[part].device)].clone()
    changes = {"n_routed_experts": len(next(iter(kept.values())))}
    if model.config.dspark_n_routed_experts is not None:  # of draft stages, which are the last layers
        changes["dspark_n_routed_experts"] = len(list(kept.values())[-1])
    return rebuilt(model, changes, weights)
