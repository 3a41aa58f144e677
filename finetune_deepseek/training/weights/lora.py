"""LoRA on named groups of weights, and the census that says how many parameters each group has.

A group is found by the names that the official checkpoints use. Linear layers go to PEFT as one regular expression
(`target_modules`), fused experts and the router as bare parameters (`target_parameters`). What PEFT attached is then
counted and compared: it skips names that match nothing, and for transformers' own `deepseek_v2` and `deepseek_v3`
models it rewrites targets such as `gate_proj` to the routed experts.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer, ParamWrapper
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn
from transformers import PreTrainedModel

from ...data.words import nearest_match
from ..arguments import LoraArguments
from .groups import GROUPS, OTHER, group_of, is_bare, plain_name

# Letters: E experts, K experts used per token.

DEFAULT_GROUPS = ("attention", "output", "dense", "shared", "experts")  # used where the model has them
OWN_TARGETS = "peft"  # in place of groups: what PEFT's table has for a native model_type


def prediction_layers(model: nn.Module) -> tuple[str, ...]:
    """Where the prediction layers of a model are, wrapped or not: the beginnings of plain names, `model.layers.61.`"""
    return tuple(
        f"{plain_name(name)}." for name, module in model.named_modules() if getattr(module, "predicts_ahead", False)
    )


def find_targets(model: nn.Module) -> dict[str, list[str]]:
    """Names of the linear layers, embeddings and bare parameters of an unwrapped model, by group."""
    targets: dict[str, list[str]] = {word: [] for word in GROUPS}
    ahead = prediction_layers(model)
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Embedding)) and (word := group_of(name, ahead)) != OTHER:
            targets[word].append(name)
    for name, _ in model.named_parameters():
        if is_bare(name):
            targets[group_of(name, ahead)].append(name)
    return targets


def choose_groups(words: Iterable[str] | None, targets: dict[str, list[str]], tied: bool) -> list[str]:
    """The groups to adapt, from the words after `--lora_target`.

    `all` means every group that the model has, None means the present ones of `DEFAULT_GROUPS`.

    Raises:
        ValueError: for an unknown word, a group that the model lacks, and embeddings that are tied to the head.
    """
    # Tied: one weight would have to take up two different changes, and merging gives wrong numbers (seen up to 2.4).
    present = [word for word, names in targets.items() if names and not (tied and word in ("embeddings", "head"))]
    if words is None:
        return [word for word in DEFAULT_GROUPS if word in present]
    words = list(words)
    if OWN_TARGETS in words:
        if words != [OWN_TARGETS]:
            raise ValueError(
                f"--lora_target {' '.join(words)}: {OWN_TARGETS} leaves the choice to PEFT; use it alone."
            )
        return words
    for word in words:
        if word not in (*GROUPS, "all"):
            raise ValueError(
                f"--lora_target {word}: no such group{nearest_match(word, [*GROUPS, 'all'])}; "
                f"choose from {', '.join(GROUPS)}, all."
            )
        if tied and word in ("embeddings", "head"):
            raise ValueError(
                f"--lora_target {word}: this model ties its head to its embeddings (tie_word_embeddings), and an "
                "adapter on one of them can't be merged exactly; leave the group out."
            )
        if word != "all" and word not in present:
            raise ValueError(
                f"--lora_target {word}: the model has no such weights; it has {', '.join(present) or 'none'}."
            )
    return present if "all" in words else [word for word in GROUPS if word in words]


def lora_config(
    arguments: LoraArguments,
    groups: list[str],
    task_type: str | None,
    targets: dict[str, list[str]],
    ahead: tuple[str, ...],
) -> LoraConfig:
    """PEFT's configuration for the given groups.

    Args:
        targets: as `find_targets` gives them; ahead: as `prediction_layers`.

    Raises:
        ValueError: for dropout, DoRA or bias together with experts or router, which PEFT adapts as bare parameters.
    """
    groups = [word for word in groups if word != OWN_TARGETS]
    bare = [word for word in groups if any(map(is_bare, targets[word]))]
    for flag, is_set, reason in (
        ("lora_dropout", arguments.lora_dropout, "the adapter is added to the weight, so there is no input to drop"),
        ("use_dora", arguments.use_dora, "it has no DoRA for bare parameters"),
        ("lora_bias", arguments.lora_bias, "a bare parameter has no bias"),
    ):
        if bare and is_set:
            raise ValueError(
                f"--{flag} can't be used with {' and '.join(bare)}: PEFT wraps them as bare parameters, and {reason}; "
                f"unset it, or name other groups after --lora_target."
            )
    patterns = [GROUPS[word].modules for word in groups if GROUPS[word].modules and word != "mtp"]
    parameters = [ending for word in bare for ending in GROUPS[word].parameters]
    if ahead:  # groups are patterns, short to read in adapter_config.json; these cut the prediction layers out
        layers = "|".join(re.escape(prefix) for prefix in ahead)
        patterns = [rf"(?!{layers}){pattern}" for pattern in patterns]
        if "mtp" in groups:
            patterns.append(rf"(?:{layers}).*(?:_proj\w*|\.proj|\.wq_[ab]|\.wkv?|\.wo_b|\.markov_w[12])")
        parameters = [name for word in bare for name in targets[word] if is_bare(name)]
    return LoraConfig(
        task_type=task_type,
        r=arguments.lora_r,
        lora_alpha=arguments.lora_alpha,
        lora_dropout=arguments.lora_dropout,
        use_rslora=arguments.use_rslora,
        use_dora=arguments.use_dora,
        lora_bias=arguments.lora_bias,
        target_modules="|".join(f"(?:{pattern})" for pattern in patterns) if patterns else [],
        target_parameters=parameters or None,
    )


def attached_layers(model: nn.Module) -> dict[str, list[Any]]:
    """The LoRA layers in a wrapped model, by group."""
    layers: dict[str, list[Any]] = {word: [] for word in (*GROUPS, OTHER)}
    ahead = prediction_layers(model)
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            target = plain_name(name)
            if isinstance(module, ParamWrapper):
                target += f".{module.parameter_name}"
            layers[group_of(target, ahead)].append(module)
    return layers


def apply_lora(model: PreTrainedModel, arguments: LoraArguments, task_type: str | None = "CAUSAL_LM") -> PeftModel:
    """Wrap the model with LoRA on the groups that `arguments.lora_target` names, and check what was attached.

    Raises:
        ValueError: see `choose_groups` and `lora_config`; for a model_type that PEFT's own table lacks; and if PEFT
            attached fewer or other weights than the groups have.
    """
    targets = find_targets(model)
    tied = bool(getattr(model.config.get_text_config(), "tie_word_embeddings", False))
    groups = choose_groups(arguments.lora_target, targets, tied)
    if not groups:
        raise ValueError(
            f"{type(model).__name__} has none of the weights that LoRA targets by default "
            f"({', '.join(DEFAULT_GROUPS)}); name groups after --lora_target."
        )
    config = lora_config(arguments, groups, task_type, targets, prediction_layers(model))
    small = ("stem", "pooling", "side_features", "token_type_embeddings")
    whole = [name for name in small if isinstance(getattr(model, name, None), nn.Module)]
    if task_type is None:  # by the others' PEFT knows what their heads are called
        whole += [name for name in ("score",) if hasattr(model, name)]
    if whole:
        config.modules_to_save = whole  # learned like a head: in full beside the adapters, and saved with them
    if groups == [OWN_TARGETS]:
        known = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(model.config.model_type)
        if not known:
            raise ValueError(
                f"--lora_target {OWN_TARGETS}: PEFT has no targets for model_type {model.config.model_type!r}; name "
                f"groups: {', '.join(word for word, names in targets.items() if names)}."
            )
        config.target_modules, config.target_parameters = list(known), None
        return get_peft_model(model, config)
    wrapped = get_peft_model(model, config)
    attached = {word: len(layers) for word, layers in attached_layers(wrapped).items()}
    for word, count in attached.items():
        expected = len(targets[word]) if word in groups else 0
        if count != expected:
            raise ValueError(
                f"LoRA on {', '.join(groups)}: PEFT attached {count} adapters to the group {word}, not {expected}. "
                f"It rewrites targets for model_type {model.config.model_type!r}; load the checkpoint as a DeepSeek "
                "model of this package instead."
            )
    return wrapped


@dataclass
class GroupCensus:
    """Parameters of one group. `active` is what one token uses: K of E routed experts, all of everything else."""

    adapters: int = 0
    total: int = 0
    active: int = 0
    trainable: int = 0

    def __add__(self, other: "GroupCensus") -> "GroupCensus":
        return GroupCensus(*(getattr(self, field) + getattr(other, field) for field in self.__dataclass_fields__))


def census(model: nn.Module) -> dict[str, GroupCensus]:
    """Count the parameters by group, and the adapters; LoRA's own parameters count as `trainable` only."""
    config: Any = getattr(model, "config", None)
    stages = config.experts_at(config.num_hidden_layers) if hasattr(config, "experts_at") else config
    groups, ahead = {word: GroupCensus() for word in (*GROUPS, OTHER)}, prediction_layers(model)
    for name, parameter in model.named_parameters():
        if ".lora_" in name or ".original_module." in name:  # PEFT keeps the untrained copy of a head beside it
            continue
        word = group_of(plain_name(name), ahead)
        group, sizes = groups[word], stages if word == "mtp" else config
        group.total += parameter.numel()
        top_k = getattr(sizes, "num_experts_per_tok", None)
        experts = parameter.shape[0] if parameter.ndim == 3 else getattr(sizes, "n_routed_experts", None)
        share = top_k / experts if top_k and experts and ".experts." in name else 1
        group.active += round(parameter.numel() * share)
        group.trainable += parameter.numel() if parameter.requires_grad else 0
    for word, layers in attached_layers(model).items():
        groups[word].adapters = len(layers)
        groups[word].trainable += sum(
            parameter.numel()
            for layer in layers
            for name, parameter in layer.named_parameters()
            if name.startswith("lora_") and parameter.requires_grad
        )
    return groups


def census_table(groups: dict[str, GroupCensus]) -> str:
    """The census as text, one line per group that has weights, and the total."""
    rows = [(word, group) for word, group in groups.items() if group.total or group.adapters]
    rows.append(("total", sum((group for _, group in rows), GroupCensus())))
    lines = [f"{'group':<14}{'parameters':>16}{'active/token':>16}{'trainable':>16}{'LoRA adapters':>16}"]
    lines += [
        f"{word:<14}{group.total:>16,}{group.active:>16,}{group.trainable:>16,}{group.adapters:>16,}"
        for word, group in rows
    ]
    return "\n".join(lines)
