"""Names of weights in released checkpoints, and how they become the model's.

Module names are those of the official V3 checkpoints, so almost every key loads as it is. The exceptions are routed
experts, stored one by one (`mlp.experts.3.gate_proj.weight`) and held fused (`mlp.experts.gate_up_proj`), and the
copies of embedding and head that prediction layers are stored with.
"""

from typing import Any

import torch
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter

from .weight_names import shared_mtp_keys


def expert_converters() -> list[WeightConverter]:
    """Per-expert weights to fused ones; transformers reverses it on save, so that official names are written."""
    return [
        WeightConverter(
            source_patterns=["mlp.experts.*.gate_proj.weight", "mlp.experts.*.up_proj.weight"],
            target_patterns="mlp.experts.gate_up_proj",
            operations=[MergeModulelist(dim=0), Concatenate(dim=1)],
        ),
        WeightConverter(
            source_patterns="mlp.experts.*.down_proj.weight",
            target_patterns="mlp.experts.down_proj",
            operations=[MergeModulelist(dim=0)],
        ),
    ]


def register_conversions() -> None:
    """Make transformers' loader and saver use `expert_converters` for models of type "deepseek"."""
    register_checkpoint_conversion_mapping("deepseek", expert_converters(), overwrite=True)


def without_fusing(conversions: list[Any]) -> list[Any]:
    """The conversions of a load that don't fuse routed experts."""
    fused = {target for converter in expert_converters() for target in converter.target_patterns}
    return [conversion for conversion in conversions if not fused & {*conversion.target_patterns}]


def reversible(conversions: list[Any] | None) -> list[Any] | None:
    """The conversions of a load that a save can reverse: all but the reading of torchao's parts, which transformers
    writes as they are."""

    def can_be_reversed(conversion: Any) -> bool:
        try:
            conversion.reverse_transform()
        except NotImplementedError:
            return False
        return True

    return conversions and list(filter(can_be_reversed, conversions))


def differing_copies(weights: dict[str, Any], config: Any, rows: int = 4096) -> list[str]:
    """Keys of prediction layers that are stored as copies of a shared weight, but with other values.

    Args:
        weights: key -> slice of safetensors.
        rows: so many are compared at a time, to hold little in memory.
    """
    differing = []
    for key, shared in shared_mtp_keys(config).items():
        if shared == "lm_head.weight" and shared not in weights:
            shared = "model.embed_tokens.weight"  # tied
        if key not in weights or shared not in weights:
            continue
        copy, original = weights[key], weights[shared]
        length = copy.get_shape()[0]
        same = list(copy.get_shape()) == list(original.get_shape()) and all(
            torch.equal(copy[start : min(start + rows, length)], original[start : min(start + rows, length)])
            for start in range(0, length, rows)
        )
        if not same:
            differing.append(key)
    return differing


def fuse_expert_keys(state_dict: dict[str, torch.Tensor], prefix: str, num_experts: int) -> None:
    """Replace in place the per-expert keys under `prefix` by the fused ones, if they are there.

    Args:
        state_dict: holds `{prefix}{e}.gate_proj.weight`, `up_proj`, `down_proj` for e < num_experts, or fused keys.
        prefix: of the experts module, with the dot at the end.
    """
    if f"{prefix}0.down_proj.weight" not in state_dict:
        return

    def take(name: str) -> list[torch.Tensor]:
        return [state_dict.pop(f"{prefix}{expert}.{name}.weight") for expert in range(num_experts)]

    gates, ups, downs = take("gate_proj"), take("up_proj"), take("down_proj")
    state_dict[f"{prefix}gate_up_proj"] = torch.stack([torch.cat(pair) for pair in zip(gates, ups, strict=True)])
    state_dict[f"{prefix}down_proj"] = torch.stack(downs)
