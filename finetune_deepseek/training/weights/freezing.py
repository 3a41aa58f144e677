"""Which weights are trained where there is no LoRA: `--freeze GROUP ...` and `--train_last_n_layers N`."""

import re
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel

from ...data.words import nearest_match
from ..trainer_arguments import TrainingArguments
from .groups import GROUPS, group_of, plain_name
from .lora import prediction_layers

INDEXER = re.compile(r"\.indexer\.")
LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


def is_before_layer(name: str, first: int) -> bool:
    """Whether a parameter belongs to the embeddings, a stem or a decoder layer before number `first`."""
    layer = LAYER.search(name)
    return int(layer[1]) < first if layer else group_of(name) in ("embeddings", "stem")


def freeze_weights(model: PreTrainedModel | PeftModel, args: TrainingArguments) -> None:
    """Set `requires_grad` as `args.freeze` and `args.train_last_n_layers` say; without them nothing changes.

    The last N layers are trained with all that follows them, the final norm and the head. A head that is tied to the
    embeddings is one weight with them and frozen when either is.

    Raises:
        ValueError: for an unknown group or one that the model lacks, more layers than there are, an adapter, and when
            nothing would be left to train.
    """
    words, last = args.freeze or [], args.train_last_n_layers
    if not words and last is None:
        return
    if isinstance(model, PeftModel):
        raise ValueError(
            f"--{'freeze' if words else 'train_last_n_layers'}: this is a LoRA adapter, and only its own weights are "
            "trained; leave the flag out."
        )
    # A tied head is listed under its own name too.
    parameters = list(model.named_parameters(remove_duplicate=False))
    ahead = prediction_layers(model)
    present = {group_of(name, ahead) for name, _ in parameters}
    for word in words:
        if word not in GROUPS:
            raise ValueError(
                f"--freeze {word}: no such group{nearest_match(word, GROUPS)}; choose from {', '.join(GROUPS)}."
            )
        if word not in present:
            has = ", ".join(group for group in GROUPS if group in present)
            raise ValueError(f"--freeze {word}: the model has no such weights; it has {has or 'none'}.")
    first = 0
    if last is not None:
        behind = [name for name, _ in parameters if group_of(name, ahead) != "mtp"]
        layers = len({layer[1] for name in behind if (layer := LAYER.search(name))})
        if last > layers:
            raise ValueError(f"--train_last_n_layers {last}: the model has {layers} layers; give at most that.")
        first = layers - last
    for name, parameter in parameters:
        if group_of(name, ahead) in words or (last is not None and is_before_layer(name, first)):
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for _, parameter in parameters):
        raise ValueError("--freeze and --train_last_n_layers leave no weight to train; free a group or a layer.")


def unreached_groups(model: PreTrainedModel | PeftModel) -> tuple[str, ...]:
    """The groups of weights that the model has and no loss of ours reaches.

    The indexer chooses keys, and a choice has no gradient; prediction layers take part in nothing but their own loss,
    which has a weight in the config; images are read by a stem in place of the embeddings.
    """
    names = [name for name, _ in model.named_parameters()]
    found = ["indexer"] if any(map(INDEXER.search, names)) else []
    if any(group_of(plain_name(name)) == "stem" for name in names):
        found.append("embeddings")
    if prediction_layers(model) and not getattr(model.config, "mtp_loss_weight", 0):
        found.append("mtp")
    return tuple(found)


def freeze_unreached(model: PreTrainedModel | PeftModel) -> None:
    """Freeze what would get no gradient, adapters on it too: several processes would wait for one.

    Raises:
        ValueError: if nothing would be left to train.
    """
    groups, ahead = unreached_groups(model), prediction_layers(model)
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    for name, parameter in trained:
        is_unreached = group_of(plain_name(name), ahead) in set(groups) - {"indexer"}
        if is_unreached or INDEXER.search(name):
            parameter.requires_grad_(False)
    if trained and not any(parameter.requires_grad for _, parameter in trained):
        raise ValueError(
            f"No loss reaches {' and '.join(groups)}, and nothing else would be trained; name other groups after "
            "--lora_target, or free some of --freeze."
        )


def trained_weights(model: Any, args: TrainingArguments) -> str:
    """What is trained in words, for the census and the model card."""
    if isinstance(model, PeftModel):
        lora: Any = model.peft_config[model.active_adapter]
        return f"LoRA adapters, r {lora.r}, alpha {lora.lora_alpha}"
    last = args.train_last_n_layers
    kept = "all" if last is None else f"the last {last} layers, final norm and head"
    frozen = dict.fromkeys((*(args.freeze or ()), *unreached_groups(model)))
    return f"{kept}, without {' '.join(frozen)}" if frozen else kept
