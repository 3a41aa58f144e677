"""Decoder layers left out: one after another the one that changes the hidden state least.

The change is 1 - cosine between a token's state before and after the layer, as mean over the calibration tokens (block
influence, arXiv 2403.03853); it is measured anew when a layer has gone.
"""

import re
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from configuration_deepseek import DeepSeekConfig

from .calibration import Calibration, Tokens
from .rebuilding import prefix_of, rebuilt, renamed


def changes_by_layer(model: Any, calibration: Calibration) -> list[float]:
    """The change that each layer of the trunk makes."""
    layers = model.base_model.layers[: model.config.num_hidden_layers]
    sums, counts = [0.0] * len(layers), [0] * len(layers)
    with Tokens(model) as tokens:

        def add(place: int, module: nn.Module, args: Any, output: torch.Tensor) -> None:
            before, after = (tokens.of(states.flatten(2).flatten(0, 1)).float() for states in (args[0], output))
            sums[place] += float((1 - F.cosine_similarity(before, after, dim=-1)).sum())
            counts[place] += len(before)

        calibration.watch(model, {layer: partial(add, place) for place, layer in enumerate(layers)})
    return [total / max(count, 1) for total, count in zip(sums, counts, strict=True)]


def prune_layers(model: Any, number: int, calibration: Calibration) -> tuple[Any, list[int]]:
    """The model with so many layers left out, and the numbers that these had in it.

    Raises:
        ValueError: if no layer would be left, or layers share what they make; for changes that are not a number.
    """
    if any(spec.attention.startswith("csa2") for spec in model.config.specs):
        raise ValueError(
            "--prune-layers: layers of this model (V4.1) read what others have made, so none can go alone."
        )
    there = list(range(model.config.num_hidden_layers))
    stays = max(len(layers_needed(model.config)), int(model.config.image_stem is None))  # images may do without any
    can_go = max(len(there) - stays, 0)
    if number > can_go:
        raise ValueError(f"--prune-layers {number}: the model has {len(there)} layers, of which {can_go} can go.")
    dropped = []
    for _ in range(number):
        changes = changes_by_layer(model, calibration)
        candidates = set(range(len(changes))) - layers_needed(model.config)
        if not all(change == change for change in changes):
            raise ValueError("--prune-layers: the model's states are not numbers; it can't be calibrated.")
        least = min(sorted(candidates), key=changes.__getitem__)
        model = without_layer(model, least)
        dropped.append(there.pop(least))
    return model, sorted(dropped)


def layers_needed(config: DeepSeekConfig) -> set[int]:
    """Layers that can't go: prediction layers are made as the last one is, and read what it gives; draft stages read
    what their target layers give."""
    last = {config.num_hidden_layers - 1} if config.num_nextn_predict_layers else set()
    return last | set(config.dspark_target_layer_ids or ())


def without_layer(model: Any, place: int) -> Any:
    """The model without one layer of its trunk."""
    behind = model.config.num_hidden_layers + model.config.num_nextn_predict_layers
    kept = [layer for layer in range(behind) if layer != place]
    pattern = re.escape(f"{prefix_of(model)}layers.") + r"(\d+)\."
    return rebuilt(model, fields_without(model.config, place), renamed(model.state_dict(), pattern, kept))


def fields_without(config: DeepSeekConfig, place: int) -> dict[str, Any]:
    """What the config says otherwise without this layer: numbers of layers, and what it lists by layer."""
    kept = [list(spec) for number, spec in enumerate(config.specs) if number != place]
    ratios, targets = config.compress_ratios, config.dspark_target_layer_ids
    fields: dict[str, Any] = {
        "num_hidden_layers": len(kept),
        "compress_ratios": ratios and [ratio for number, ratio in enumerate(ratios) if number != place],
        "dspark_target_layer_ids": targets and [target - (place < target) for target in targets],
        "num_hash_layers": sum(spec[1] == "hash_moe" for spec in kept),
        "first_k_dense_replace": next((number for number, spec in enumerate(kept) if spec[1] != "dense"), len(kept)),
        "layer_specs": None,
    }
    derived = DeepSeekConfig.from_dict(config.to_dict() | fields).specs
    return fields if [list(spec) for spec in derived] == kept else fields | {"layer_specs": kept}
