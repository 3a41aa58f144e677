"""Named groups of weights: which one a module or parameter belongs to, by the names of official checkpoints."""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Group:
    """Where a group's weights are: a pattern for whole names of modules, and endings of names of bare parameters."""

    modules: str = ""
    parameters: tuple[str, ...] = ()

    def owns_bare(self, name: str) -> bool:
        """Whether `name` is of a parameter of a module that PEFT cannot wrap."""
        return any(name.endswith(f".{ending}") for ending in self.parameters)

    def owns(self, name: str) -> bool:
        """Whether `name`, of a module or of one of its parameters, belongs to the group."""
        return self.owns_bare(name) or re.fullmatch(rf"(?:{self.modules})(?:\.(?:weight|bias))?", name) is not None


# Prediction layers (modeling_deepseek/mtp.py) have weights of all kinds, and are a group by themselves.
GROUPS = {
    "attention": Group(r".*\.self_attn\.(?:\w*proj\w*|wq_[ab]|wkv|wo_b|compressor\.(?:wkv|wgate))"),
    "output": Group(parameters=("self_attn.wo_a.weight",)),  # V4's heads in groups: each has a delta of its own
    "dense": Group(r".*\.mlp\.(?:gate|up|down)_proj"),
    "shared": Group(r".*\.shared_experts\.(?:gate|up|down)_proj"),
    "experts": Group(r".*\.experts\.\d+\.(?:gate|up|down)_proj", ("experts.gate_up_proj", "experts.down_proj")),
    "router": Group(parameters=("mlp.gate.weight",)),
    "indexer": Group(r".*\.indexer\.(?:wq_b|wk|weights_proj|compressor\.(?:wkv|wgate))"),
    "engram": Group(r".*\.engram\.(?:embed|wkv)"),
    "mtp": Group(r".*\.(?:eh|e|h|main)_proj|.*\.(?:markov_w[12]|confidence_head\.proj)"),
    "vision": Group(r"vision\.(?:patch_embed\.proj|blocks\.\d+\.(?:attn\.(?:wqkv|wo)|mlp\.w[12]))"),
    "aligner": Group(r"aligner\.w[12]"),
    "stem": Group(r"(?:.*\.)?stem\..*"),
    "embeddings": Group(r"(?:.*\.)?embed_tokens"),
    "head": Group(r"lm_head"),
}
OTHER = "norms, other"


def plain_name(name: str) -> str:
    """The name that a module or parameter had before PEFT wrapped the model."""
    return name.removeprefix("base_model.model.").replace(".base_layer", "").replace(".token_adapter", "")


def group_of(name: str, ahead: tuple[str, ...] = ()) -> str:
    """The group of a module or parameter of an unwrapped model, `OTHER` if none; `ahead`: its `prediction_layers`."""
    if name.startswith(ahead or "\0"):
        return "mtp"
    return next((word for word, group in GROUPS.items() if group.owns(name)), OTHER)


def is_bare(name: str) -> bool:
    """Whether a target is a parameter of a module that PEFT cannot wrap."""
    return any(group.owns_bare(name) for group in GROUPS.values())
