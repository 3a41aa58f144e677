"""Names of weights in released checkpoints, and how they become the model's.

Module names are those of the official V3 checkpoints, so almost every key loads as it is. The exception are routed
experts, stored one by one (`mlp.experts.3.gate_proj.weight`) and held fused (`mlp.experts.gate_up_proj`).
"""

import torch
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter


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
