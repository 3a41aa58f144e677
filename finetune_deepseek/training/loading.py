"""Tokenizer and model, pretrained or with random weights, as the flags name them."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
import yaml
from peft import PeftModel
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import is_torchao_available

from configuration_deepseek import DeepSeekConfig
from configuration_deepseek.fields import FIELD_NAMES
from configuration_deepseek.presets import PRESETS, preset
from modeling_deepseek.register import MODELS_BY_AUTO_CLASS
from modeling_deepseek.whole_folders import current
from tokenization_deepseek import DeepSeekTokenizer

from ..data.sources import Rows
from .arguments import ModelArguments
from .saved import Saved, known_fields, named_errors, note
from .task import Task

# Without effect in a generation config that doesn't sample, or has one beam.
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
BEAMS = ("early_stopping", "length_penalty")
# Several tokens at once, code of others, another prompt, and an end by the clock.
OTHER_WAYS = ("prompt_lookup_num_tokens", "penalty_alpha", "dola_layers", "token_healing", "max_time")
POWER = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")  # which YAML takes for text


def parse_overrides(text: str | None) -> dict[str, Any]:
    """`hidden_size=64,hidden_act=silu` or a JSON object as a dict with YAML's types, and 1e-3 as a number.

    Raises:
        ValueError: for what is neither, and for a name without a value or with two.
    """
    if not text:
        return {}
    try:
        if text.lstrip().startswith("{"):
            found = yaml.safe_load(text)
        else:
            found = dict[str, Any]()
            for name, equals, value in (pair.partition("=") for pair in text.split(",")):
                if not equals:
                    raise ValueError(f"{name!r} has no value; write name=value,name=value")
                if name.strip() in found:
                    raise ValueError(f"{name.strip()} is there twice; keep one")
                found[name.strip()] = yaml.safe_load(value)
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"--config_overrides {text}: {' '.join(str(error).split())}.") from error
    is_power = {name: isinstance(value, str) and POWER.fullmatch(value) for name, value in found.items()}
    return {name: float(value) if is_power[name] else value for name, value in found.items()}


def pretrained_tokenizer(
    arguments: ModelArguments, tokenizer_class: Any = None, checkpoint: str | None = None
) -> PreTrainedTokenizerBase:
    """The named tokenizer, or that of the checkpoint or model.

    Args:
        tokenizer_class: None for the class that the model's own files ask for.

    Raises:
        ValueError: if it can't be read, or has no end-of-text token.
    """
    if arguments.tokenizer_name:
        saved = Saved.open("tokenizer_name", arguments.tokenizer_name, arguments.model_revision)
    else:
        saved = Saved.open("resume_from_checkpoint", checkpoint) if checkpoint else arguments.saved
    tokenizer = saved_tokenizer(saved, tokenizer_class, arguments.trust_remote_code)
    if tokenizer_class is None and tokenizer.eos_token_id is None:
        raise ValueError(f"{saved.name}: this tokenizer has no eos_token, so a model couldn't learn where to end.")
    return with_padding(tokenizer)


def saved_tokenizer(
    saved: Saved, tokenizer_class: Any = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer beside a model or adapter, or else of an adapter's base.

    Raises:
        ValueError: if it can't be read.
    """
    with named_errors(saved.where):
        loader = tokenizer_class or (DeepSeekTokenizer if saved.is_deepseek else AutoTokenizer)
        source = saved.with_tokenizer
        folder = current(source.name, "tokenizer_config.json")
        return loader.from_pretrained(folder, **source.at, trust_remote_code=trust_remote_code)


def with_padding(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    if has_tokens(tokenizer) and tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # padding is masked by length, never by id
    return tokenizer


def has_tokens(tokenizer: Any) -> bool:
    """Whether it is a tokenizer; where images are read, an image processor stands in its place."""
    return isinstance(tokenizer, PreTrainedTokenizerBase)


def load_tokenizer(
    arguments: ModelArguments, task: Task, splits: dict[str, Rows], checkpoint: str | None
) -> PreTrainedTokenizerBase:
    """The named tokenizer, the model's, or a new one trained on the data.

    Raises:
        ValueError: if it has no end-of-text token, or there is nothing to train it on.
    """
    is_saved = arguments.model_name_or_path and not task.needs_new_tokenizer(arguments.saved)
    if arguments.tokenizer_name or checkpoint or is_saved:
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
    """The model that --model_name_or_path names, or its base with the adapter that it names.

    Args:
        fields: are set in its config, after what an adapter's training has changed there.
        check_native: is shown `fields` before a model is made of transformers' own class.
    """
    saved = arguments.saved.require_model()
    base = saved.base or saved
    with named_errors(saved.where):
        ours = base.is_ours and not arguments.native
        fields = saved.changes | (fields or {})
        if not ours:
            check_native(fields)
        config = _config(base, ours, fields, arguments.trust_remote_code)
        model = (MODELS_BY_AUTO_CLASS[auto_class] if ours else auto_class).from_pretrained(
            base.name,
            **base.at,
            config=with_dropout(config, arguments),
            trust_remote_code=arguments.trust_remote_code,
            dtype=dtype_of(base, arguments.dtype),
            attn_implementation=arguments.attn_implementation,
        )
        if saved.is_adapter:
            model = PeftModel.from_pretrained(model, str(saved.folder), is_trainable=is_trained)
    take_plain_generation(model, saved.where)
    if is_trained:
        mend_generation_config(model, saved.where)
    return model


def dtype_of(saved: Saved, asked: str) -> str:
    """The type that a model is opened in: the one that is asked for; that of the file for numbers of fewer bits, whose
    scales have it and no other."""
    return "auto" if has_small_numbers(saved) else asked


def has_small_numbers(saved: Saved) -> bool:
    """Whether `compress` has made numbers of fewer bits of its weights."""
    return (saved.config.get("quantization_config") or {}).get("quant_method") == "torchao"


def served_model(saved: Saved, auto_class: Any) -> Any:
    """A model for use: in evaluation mode, an adapter merged into its base, with the config that it was trained with.

    Raises:
        ValueError: if it can't be read.
    """
    saved.require_model()
    base = saved.base or saved
    with named_errors(saved.where):
        model_class = MODELS_BY_AUTO_CLASS[auto_class] if base.is_ours else auto_class
        config = _config(base, base.is_ours, saved.changes)
        model = model_class.from_pretrained(base.name, **base.at, config=config)
        if saved.is_adapter:
            model = PeftModel.from_pretrained(model, str(saved.folder)).merge_and_unload()
    return model.eval()


def _config(saved: Saved, is_ours: bool, fields: dict[str, Any], trust_remote_code: bool = False) -> Any:
    """The config of a model with some fields changed; other names than fields are refused, see `known_fields`."""
    if has_small_numbers(saved) and not is_torchao_available():
        raise ValueError('its numbers of fewer bits need torchao: pip install "deepseek-hf[compress]"')
    if is_ours:
        known: dict[str, Any] = known_fields(fields, FIELD_NAMES)
        return DeepSeekConfig.from_pretrained(saved.name, **saved.at | known)
    config = AutoConfig.from_pretrained(saved.name, **saved.at, trust_remote_code=trust_remote_code)
    for name, value in known_fields(fields, config.to_dict()).items():
        setattr(config, name, value)
    return config


def take_plain_generation(model: Any, where: str) -> None:
    """Leave out of a model's generation config, aloud, what would make `generate` do otherwise than any call of ours
    expects: it fills what a call leaves open.

    Raises:
        ValueError: for ends of texts that are none.
    """
    config = getattr(model, "generation_config", None)
    if config is None:
        return
    found = {name: value for name in OTHER_WAYS if (value := getattr(config, name, None)) not in (None, False)}
    for name in found:
        setattr(config, name, None)
    if found:
        asked = ", ".join(f"{name} {value}" for name, value in found.items())
        note(f"{where}: its generation_config.json asks for {asked}, which is not followed.")
    for name, kind in (("stop_strings", str), ("eos_token_id", int)):
        value = getattr(config, name, None)
        if not all(isinstance(one, kind) for one in (value if isinstance(value, list) else [value] if value else [])):
            raise ValueError(
                f"{where}: {name} {value!r} in its generation_config.json is no {kind.__name__}; mend it."
            )


def mend_generation_config(model: Any, where: str) -> None:
    """Drop from a model's generation config what has no effect there and couldn't be saved again: a temperature where
    nothing is sampled, a penalty on lengths without beams.

    Raises:
        ValueError: for what else can't be saved, which would show at the first save only.
    """
    config = getattr(model, "generation_config", None)
    if config is None or _fault(config) is None:
        return
    idle = (() if config.do_sample else SAMPLING) + (() if (config.num_beams or 1) > 1 else BEAMS)
    idle += () if config.return_dict_in_generate else config.extra_output_flags
    dropped = {name: value for name in idle if (value := getattr(config, name, None)) not in (None, False)}
    if (config.pad_token_id or 0) < 0:
        dropped["pad_token_id"] = config.pad_token_id
    for name in dropped:
        setattr(config, name, None)
    if reason := _fault(config):
        raise ValueError(f"{where}: its generation_config.json can't be saved again; mend it: {reason}")
    print(f"generation config: dropped {', '.join(f'{n} {v}' for n, v in dropped.items())}, without effect there")


def _fault(config: Any) -> str | None:
    """Why it can't be saved; None if it can."""
    try:
        config.validate(strict=True)
    except ValueError as error:
        return " ".join(str(error).split())
    return None


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
    return fitted(model, tokenizer, may_grow=task.grows_vocabulary and not isinstance(model, PeftModel))


def fitted(model: Any, tokenizer: PreTrainedTokenizerBase, may_grow: bool = False) -> Any:
    """The model, which now knows the tokenizer's padding.

    Args:
        may_grow: give the model the tokens that it lacks.

    Raises:
        ValueError: if the tokenizer has more tokens than the model, which may not grow.
    """
    if not has_tokens(tokenizer):
        return model
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows and may_grow:
        print(f"the model gets {len(tokenizer) - rows:,} new tokens")
        model.resize_token_embeddings(len(tokenizer))
    elif len(tokenizer) > rows:
        raise ValueError(f"The tokenizer has {len(tokenizer):,} tokens, the model {rows:,}; name the model's own.")
    model.config.pad_token_id = tokenizer.pad_token_id  # a classifier looks for the last token that is no padding
    return model


def _random_model(
    arguments: ModelArguments, task: Task, tokenizer: PreTrainedTokenizerBase, fields: dict[str, Any]
) -> Any:
    config = task.model_config(make_config(arguments, tokenizer, fields, task.arguments.config_defaults))
    dtype = torch.float32 if arguments.dtype == "auto" else getattr(torch, arguments.dtype)
    kwargs = {"attn_implementation": arguments.attn_implementation} if arguments.attn_implementation else {}
    model = task.auto_class.from_config(config, dtype=dtype, trust_remote_code=arguments.trust_remote_code, **kwargs)
    if arguments.head_from_embeddings:
        if model.get_output_embeddings() is None:
            raise ValueError(f"--head_from_embeddings: {task.name} models have no head over the vocabulary.")
        # Copying a token is then one map that holds for all of them, as with tied weights, rare ones included.
        model.get_output_embeddings().load_state_dict(model.get_input_embeddings().state_dict())
    return model


def make_config(
    arguments: ModelArguments, tokenizer: PreTrainedTokenizerBase, fields: dict[str, Any], defaults: dict[str, Any]
) -> Any:
    """The config for random weights: preset or file, overrides, `fields`, and the tokenizer's size and tokens.

    Args:
        defaults: what holds where none of them says it; other model types than ours pass over it.

    Raises:
        ValueError: for an override of what the task or the tokenizer sets to something else.
    """
    asked, decided = parse_overrides(arguments.config_overrides), fields | token_fields(tokenizer)
    for name, value in (decided | arguments.dropouts).items():
        if asked.get(name, value) != value:
            raise ValueError(
                f"--config_overrides {name}={asked[name]}: other flags, the data or the tokenizer make it {value}; "
                "leave it out there, and set what decides it."
            )
    overrides = asked | decided
    if arguments.preset:
        return with_dropout(preset_config(arguments.preset, defaults, overrides), arguments)
    assert arguments.config_name is not None
    saved = Saved.open("config_name", arguments.config_name)
    overrides = left_open(defaults, saved.config) | overrides
    with named_errors(saved.where):
        config = AutoConfig.from_pretrained(
            saved.name, **saved.at, trust_remote_code=arguments.trust_remote_code, **overrides
        )
    return with_dropout(config, arguments)


def preset_config(name: str, defaults: dict[str, Any], overrides: dict[str, Any]) -> DeepSeekConfig:
    """A preset with overrides, and with defaults for what neither says."""
    return preset(name, **left_open(defaults, PRESETS.get(name, {})) | overrides)


def left_open(defaults: dict[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the defaults that a config doesn't say."""
    return {name: value for name, value in defaults.items() if config.get(name) is None}


def token_fields(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The size and the special tokens of a tokenizer's vocabulary, as a config has them."""
    if not has_tokens(tokenizer):
        return {}
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {"vocab_size": len(tokenizer)} | {name: getattr(tokenizer, name) for name in names}


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
