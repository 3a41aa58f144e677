"""A model of another config, made of weights of a model that is there."""

import re
from typing import Any

import torch

from modeling_deepseek.checkpoint_keys import fuse_expert_keys

Weights = dict[str, torch.Tensor]


def prefix_of(model: Any) -> str:
    """What the names of the trunk's weights begin with."""
    return "" if model.base_model is model else f"{model.base_model_prefix}."


def rebuilt(model: Any, changes: dict[str, Any], weights: Weights) -> Any:
    """A model of the same class in evaluation mode, with some fields of the config changed.

    Args:
        weights: all that it has, under its own names; their types and memory are taken over.

    Raises:
        ValueError: for fields that can't work together.
        RuntimeError: if the weights are others than the config says.
    """
    config = type(model.config).from_dict(model.config.to_dict() | changes)
    attention = model.config._attn_implementation
    made = type(model)._from_config(config, attn_implementation=attention).to(model.device)
    made.load_state_dict(weights, assign=True)
    made.tie_weights()
    made.generation_config = getattr(model, "generation_config", None)
    return made.eval()


def with_experts_apart(model: Any) -> Any:
    """The model with a linear layer for each projection of each routed expert; itself if it has none fused."""
    return _with_experts(model, False)


def with_experts_fused(model: Any) -> Any:
    """The other way."""
    return _with_experts(model, True)


def _with_experts(model: Any, are_fused: bool) -> Any:
    if model.config.n_routed_experts is None or model.config.fused_experts == are_fused:
        return model
    change = fused if are_fused else experts_apart
    return rebuilt(model, {"fused_experts": are_fused}, change(model.state_dict()))


def experts_apart(weights: Weights) -> Weights:
    """The weights with fused experts [E, 2 I, D] and [E, D, I] under names of linear layers."""
    found = {}
    for name, weight in weights.items():
        place, _, projection = name.rpartition(".")
        if not place.endswith(".experts") or projection not in ("gate_up_proj", "down_proj"):
            found[name] = weight
            continue
        names = projection.replace("gate_up_proj", "gate_proj,up_proj").split(",")
        for expert, own in enumerate(weight):
            parts = zip(names, own.chunk(len(names)), strict=True)
            found |= {f"{place}.{expert}.{part}.weight": part_weight for part, part_weight in parts}
    return {name: weight.contiguous() for name, weight in found.items()}


def fused(weights: Weights) -> Weights:
    """The other way."""
    firsts = [match[1] for name in weights if (match := re.fullmatch(r"(.*\.experts\.)0\.down_proj\.weight", name))]
    found = dict(weights)
    for prefix in firsts:
        count = sum(re.fullmatch(rf"{re.escape(prefix)}\d+\.down_proj\.weight", name) is not None for name in weights)
        fuse_expert_keys(found, prefix, count)
    return found


def renamed(weights: Weights, pattern: str, places: list[int]) -> Weights:
    """The weights whose number, the first group of the pattern, is among `places`, numbered by their place there;
    and all others."""
    found = {}
    for name, weight in weights.items():
        match = re.match(pattern, name)
        if match is None:
            found[name] = weight
        elif int(match[1]) in places:
            found[name[: match.start(1)] + str(places.index(int(match[1]))) + name[match.end(1) :]] = weight
    return found
