"""Tokenizer and model, pretrained or with random weights, as the flags name them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import PeftConfig, PeftModel
from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from configuration_deepseek import DeepSeekConfig
from configuration_deepseek.official import SOURCES
from configuration_deepseek.presets import preset
from modeling_deepseek.register import MODELS_BY_AUTO_CLASS
from modeling_deepseek.whole_folders import current
from tokenization_deepseek import DeepSeekTokenizer

from ..data.hub import check_named, check_source
from ..data.sources import Rows
from .arguments import ModelArguments
from .task import Task


def parse_overrides(text: str | None) -> dict[str, Any]:
    """`hidden_size=64,hidden_act=silu` or a JSON object as a dict with YAML's types."""
    if not text:
        return {}
    if text.lstrip().startswith("{"):
        return yaml.safe_load(text)
    pairs = [pair.partition("=") for pair in text.split(",")]
    for name, equals, _ in pairs:
        if not equals:
            raise ValueError(f"--config_overrides {text}: {name!r} has no value; write name=value,name=value.")
    return {name.strip(): yaml.safe_load(value) for name, _, value in pairs}


@contextmanager
def named_source(flag: str, name: str) -> Iterator[None]:
    """Loading what a flag names: errors say which flag and name, in one line.

    Raises:
        ValueError: for a model that isn't there, and for whatever the loading raises for missing or broken files, or
            for packages that a model's own code needs.
    """
    check_named(flag, name)
    try:
        yield
    except (ValueError, OSError, ImportError, SafetensorError) as error:
        raise ValueError(f"--{flag} {name}: {' '.join(str(error).split())}") from error


def saved_config(source: str, revision: str) -> dict[str, Any]:
    """The config.json of a folder or a model on the Hub; empty if it has none.

    Raises:
        ValueError: if there is no such model.
    """
    check_source(source)
    try:
        return PreTrainedConfig.get_config_dict(source, revision=revision)[0]
    except OSError:  # a tokenizer's folder or an adapter
        return {}


def is_deepseek(source: str, revision: str) -> bool:
    """Whether `source` is a DeepSeek checkpoint in our form or a published one, not of a type that others share.

    Those get this package's tokenizer even where transformers has one of its own, which loses the
    beginning-of-sentence token.
    """
    model_type = saved_config(source, revision).get("model_type")
    return model_type in SOURCES and model_type.startswith("deepseek")


def is_ours(source: str, arguments: ModelArguments) -> bool:
    """Whether the checkpoint gets this package's model class: if it can be read, unless --native asks for another.

    Also where transformers has a class of its own: PEFT rewrites LoRA targets of the native models.
    """
    return not arguments.native and saved_config(source, arguments.model_revision).get("model_type") in SOURCES


def pretrained_tokenizer(
    arguments: ModelArguments, tokenizer_class: Any = None, checkpoint: str | None = None
) -> PreTrainedTokenizerBase:
    """The named tokenizer, or that of the checkpoint or model.

    Args:
        tokenizer_class: None for the class that the model's own files ask for.

    Raises:
        ValueError: if it can't be read, or has no end-of-text token.
    """
    source = arguments.tokenizer_name or checkpoint or arguments.model_name_or_path
    assert source is not None
    flag = "tokenizer_name" if arguments.tokenizer_name else "model_name_or_path"
    with named_source("resume_from_checkpoint" if source == checkpoint else flag, source):
        loader = tokenizer_class or (
            DeepSeekTokenizer if is_deepseek(source, arguments.model_revision) else AutoTokenizer
        )
        tokenizer = loader.from_pretrained(
            source, revision=arguments.model_revision, trust_remote_code=arguments.trust_remote_code
        )
    if tokenizer.eos_token_id is None and tokenizer_class is None:
        raise ValueError(f"{source}: this tokenizer has no eos_token, so a model couldn't learn where to end.")
    return with_padding(tokenizer)


def with_padding(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # padding is masked by length, never by id
    return tokenizer


def load_tokenizer(
    arguments: ModelArguments, task: Task, splits: dict[str, Rows], checkpoint: str | None
) -> PreTrainedTokenizerBase:
    """The named tokenizer, the model's, or a new one trained on the data.

    Raises:
        ValueError: if it has no end-of-text token, or there is nothing to train it on.
    """
    if arguments.tokenizer_name or checkpoint or arguments.model_name_or_path:
        return pretrained_tokenizer(arguments, task.tokenizer_class, checkpoint)
    if "train" not in splits:
        raise ValueError("A model with random weights needs a training split or --tokenizer_name.")
    return with_padding(task.new_tokenizer(arguments, splits))


def pretrained_model(
    arguments: ModelArguments,
    auto_class: Any,
    fields: dict[str, Any] | None = None,
    is_trained: bool = False,
    check_native: Callable[[dict[str, Any]], None] = lambda fields: None,
) -> Any:
    """The model that --model_name_or_path names, with its adapter if that is a LoRA folder.

    Args:
        fields: are set in its config.
        check_native: is shown `fields` before a model is made of transformers' own class.
    """
    path, fields = str(current(str(arguments.model_name_or_path), "adapter_config.json")), fields or {}
    with named_source("model_name_or_path", path):
        if not (Path(path) / "adapter_config.json").is_file():
            return _open_pretrained(path, arguments, auto_class, fields, check_native)
        base = str(PeftConfig.from_pretrained(path).base_model_name_or_path)
        model = _open_pretrained(base, arguments, auto_class, fields, check_native)
        return PeftModel.from_pretrained(model, path, is_trainable=is_trained)


def _open_pretrained(
    source: str,
    arguments: ModelArguments,
    auto_class: Any,
    fields: dict[str, Any],
    check_native: Callable[[dict[str, Any]], None],
) -> Any:
    loading: dict[str, Any] = {
        "revision": arguments.model_revision,
        "trust_remote_code": arguments.trust_remote_code,
        "dtype": arguments.dtype,
        "attn_implementation": arguments.attn_implementation,
    }
    ours = is_ours(source, arguments)
    if not ours:
        check_native(fields)
    model_class = MODELS_BY_AUTO_CLASS[auto_class] if ours else auto_class
    if not arguments.dropouts:
        return model_class.from_pretrained(source, **loading, **fields)
    config_class: Any = DeepSeekConfig if ours else AutoConfig
    config = config_class.from_pretrained(
        source, revision=arguments.model_revision, trust_remote_code=arguments.trust_remote_code, **fields
    )
    return model_class.from_pretrained(source, **loading, config=with_dropout(config, arguments))


def load_model(
    arguments: ModelArguments,
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    fields: dict[str, Any],
    is_trained: bool,
) -> Any:
    """The pretrained model (with its adapter, if a LoRA folder is named), or one with random weights.

    `fields` are set in its config.

    Raises:
        ValueError: if no model is named, or the tokenizer has more tokens than the model.
    """
    if arguments.model_name_or_path:
        model = pretrained_model(arguments, task.auto_class, fields, is_trained, task.check_native)
    elif arguments.preset or arguments.config_name:
        model = _random_model(arguments, task, tokenizer, fields)
    else:
        raise ValueError("No model is named: give --model_name_or_path, --preset or --config_name.")
    return fitted(model, tokenizer)


def fitted(model: Any, tokenizer: PreTrainedTokenizerBase) -> Any:
    """The model, which now knows the tokenizer's padding.

    Raises:
        ValueError: if the tokenizer has more tokens than the model.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise ValueError(f"The tokenizer has {len(tokenizer):,} tokens, the model {rows:,}; name the model's own.")
    model.config.pad_token_id = tokenizer.pad_token_id  # a classifier looks for the last token that is no padding
    return model


def _random_model(
    arguments: ModelArguments, task: Task, tokenizer: PreTrainedTokenizerBase, fields: dict[str, Any]
) -> Any:
    config = task.model_config(make_config(arguments, tokenizer, fields))
    dtype = torch.float32 if arguments.dtype == "auto" else getattr(torch, arguments.dtype)
    kwargs = {"attn_implementation": arguments.attn_implementation} if arguments.attn_implementation else {}
    model = task.auto_class.from_config(config, dtype=dtype, trust_remote_code=arguments.trust_remote_code, **kwargs)
    if arguments.head_from_embeddings:
        if model.get_output_embeddings() is None:
            raise ValueError(f"--head_from_embeddings: {task.name} models have no head over the vocabulary.")
        # Copying a token is then one map that holds for all of them, as with tied weights, rare ones included.
        model.get_output_embeddings().load_state_dict(model.get_input_embeddings().state_dict())
    return model


def make_config(arguments: ModelArguments, tokenizer: PreTrainedTokenizerBase, fields: dict[str, Any]) -> Any:
    """The config for random weights: preset or file, overrides, `fields`, and the tokenizer's size and tokens."""
    overrides = parse_overrides(arguments.config_overrides) | {
        **fields,
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if arguments.preset:
        return with_dropout(preset(arguments.preset, **overrides), arguments)
    assert arguments.config_name is not None
    with named_source("config_name", arguments.config_name):
        config = AutoConfig.from_pretrained(
            arguments.config_name, trust_remote_code=arguments.trust_remote_code, **overrides
        )
    return with_dropout(config, arguments)


def with_dropout(config: Any, arguments: ModelArguments) -> Any:
    """The config with the dropout rates that were asked for.

    Raises:
        ValueError: if this kind of model has no such dropout.
    """
    for name, rate in arguments.dropouts.items():
        if not hasattr(config, name):
            raise ValueError(f"--{name}: a model of model_type {config.model_type!r} has none; leave the flag out.")
        setattr(config, name, rate)
    return config
