"""A checkpoint in the form that others read, written one shard at a time.

    native   config.json and weight names of the release, for transformers, vLLM, SGLang and converters
    bundle   this package's config and its code beside the weights: trust_remote_code, every head
    gguf     one file for llama.cpp and Ollama, see gguf.py

What is written is read again and compared before it takes its place: names, types, shapes, some values of each weight,
and (native, bundle) the logits of a few tokens, see spot_logits.py. A LoRA adapter can be merged on the way, see
merging.py; peak memory stays near one shard, whatever the model's size.
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import torch
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils import PROCESSOR_NAME

from configuration_deepseek import DeepSeekConfig
from configuration_deepseek.fields import FIELD_NAMES
from configuration_deepseek.official import ARCHITECTURES, official_model_type, to_official, with_quantization
from configuration_deepseek.weight_names import with_release_names
from modeling_deepseek.whole_folders import writing_beside
from tokenization_deepseek import DeepSeekProcessor

from ..data.files import read_json
from ..training.saved import ADAPTER_FILE, Saved
from ..training.saved import write as write_record
from .checkpoint import Checkpoint, config_of, dequantize_at, head_of, with_copies
from .gguf import export_gguf
from .merging import open_adapter, write_per_expert
from .opening import open_model
from .shards import new_destination, write_json, write_shards
from .spot_logits import difference, spot_logits
from .tensors import open_model_weights

# The heads that transformers has for a published model_type, beside ForCausalLM.
NATIVE_HEADS = {
    "llama": ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering"),
    "qwen2": ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering"),
    "qwen3": ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering"),
    "deepseek_v2": ("ForSequenceClassification",),
    "deepseek_v3": ("ForSequenceClassification", "ForTokenClassification"),
}
RELEASED_AS = {"ForImageTextToText": "ForCausalLM"}  # V4.1, whose tower is told by vision_config alone
# Fields that releases don't have, and that change nothing in evaluation.
NOT_IN_RELEASES = {"source_model_type", "source_quantization_config", "hidden_dropout", "output_router_logits"}
NOT_IN_RELEASES |= {"mtp_loss_weight", "mtp_after_norm", "deepseek_format", "fused_experts"}
LABEL_FIELDS = ("id2label", "label2id", "problem_type")
# How far logits may be from the source's, against their size, by the type of the weights.
TOLERANCES = {torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.2, torch.float8_e4m3fn: 0.7}
COPIED = (
    *(
        "preprocessor_config.json",
        "tokenizer*",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "merges.txt",
        "chat_template*",
    ),
    *("additional_chat_templates", "generation_config.json", "LICENSE*", "catalogue", "image_tokens"),
)
Report: TypeAlias = Callable[[int, int], Any]


# Forms --------------------------------------------------------------------------------------------------------------


def native_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """The release's own config.json.

    Raises:
        ValueError: if no published form can say what this model is, or transformers has no such head for it.
    """
    config, head = checkpoint.config, checkpoint.head
    fields = config.to_dict()
    model_type = official_model_type(fields)
    head = RELEASED_AS.get(head, head)
    if head not in ("ForCausalLM", *NATIVE_HEADS.get(model_type, ())):
        raise ValueError(f"transformers has no {ARCHITECTURES[model_type]}{head}; use --to bundle")
    official = to_official(fields)
    understood = DeepSeekConfig.from_dict(official)
    for name in set(FIELD_NAMES) - NOT_IN_RELEASES:
        if getattr(understood, name) != getattr(config, name):
            raise ValueError(
                f"config.json of {model_type} has no place for {name}={getattr(config, name)}; use --to bundle"
            )
    official["architectures"] = [ARCHITECTURES[model_type] + head]
    if config.source_quantization_config is not None:
        official = with_quantization(official, config.source_quantization_config)
    else:
        official.pop("expert_dtype", None)
    if head != "ForCausalLM":
        official |= {name: fields[name] for name in LABEL_FIELDS if fields.get(name) is not None}
    return official


def export_native(
    source: str | os.PathLike,
    destination: str | os.PathLike,
    *,
    adapter: str | os.PathLike | None = None,
    dtype: str | None = None,
    max_shard_size: int | str = "5GB",
    report: Report = lambda done, total: None,
) -> None:
    """Write a checkpoint as its release would be: config.json, weight names, tokenizer.

    Args:
        source: a folder or a Hub id.
        destination: a folder that doesn't exist or is empty.
        adapter: a LoRA adapter to merge.
        dtype: "bf16", "fp32", "fp8", or None, see `open_model`.
        max_shard_size: bytes, or a number with KB, MB, GB.
        report: is told the number of shards that are written, and of all.

    Raises:
        ValueError: see `open_model` and `native_config`; and for a destination that exists or can't be written.
        OSError: if writing fails, or what was written reads back otherwise; the destination is then as it was.
    """
    with new_destination(destination):
        checkpoint = open_model(source, adapter, dtype)
        official = native_config(checkpoint)
        tensors = with_copies(checkpoint.tensors, checkpoint.config)
        with writing_beside(destination) as beside:
            folder = Path(beside)
            write_shards(with_release_names(tensors, checkpoint.config), folder, max_shard_size, report)
            write_json(folder / "config.json", official)
            copy_beside(checkpoint, folder)
            _speak_of_stock_tokenizer(folder / "tokenizer_config.json")
            verify_logits(checkpoint, folder)


def export_bundle(
    source: str | os.PathLike,
    destination: str | os.PathLike,
    *,
    adapter: str | os.PathLike | None = None,
    dtype: str | None = None,
    max_shard_size: int | str = "5GB",
    report: Report = lambda done, total: None,
) -> None:
    """Write a checkpoint in this package's own form, with its code: what `save_pretrained` does, streamed.

    Arguments and errors as in `export_native`.
    """
    with new_destination(destination):
        checkpoint = open_model(source, adapter, dtype)
        checkpoint.config.architectures = [f"DeepSeek{checkpoint.head}"]
        with writing_beside(destination) as beside:
            folder = Path(beside)
            write_shards(checkpoint.tensors, folder, max_shard_size, report)
            # the model's code before the config's: it brings a stand-in for the config's file, which this replaces
            custom_object_save(checkpoint.skeleton(), beside, config=checkpoint.config)  # type: ignore[arg-type]
            checkpoint.config.save_pretrained(beside)
            copy_beside(checkpoint, folder)
            copy_processor(checkpoint.folder, folder)
            verify_logits(checkpoint, folder)


def copy_processor(source: Path, folder: Path) -> None:
    """What makes images and texts ready, with its code; a release has none, for its config.json says the same."""
    if (source / PROCESSOR_NAME).is_file():
        shutil.copyfile(source / PROCESSOR_NAME, folder / PROCESSOR_NAME)
        custom_object_save(DeepSeekProcessor, folder)


def verify_logits(checkpoint: Checkpoint, folder: Path) -> None:
    """Compare what the written folder computes with what the source does, with the adapter attached, not merged.

    Raises:
        OSError: if they differ by more than the type of the weights explains.
    """
    config = DeepSeekConfig.from_pretrained(folder)
    tensors = dequantize_at(folder, open_model_weights(folder, config), config)
    head = checkpoint.head if checkpoint.head in RELEASED_AS else head_of(folder, config)
    written = spot_logits(Checkpoint(folder, config, head, tensors).skeleton(), tensors)
    adapter = checkpoint.adapter
    source = checkpoint.skeleton() if adapter is None else adapter.model
    apart = difference(written, spot_logits(source, checkpoint.source, adapter))
    dtype: Any = checkpoint.config.dtype if config.source_quantization_config is None else torch.float8_e4m3fn
    tolerance = TOLERANCES.get(dtype, TOLERANCES[torch.float32])
    if not apart <= tolerance:
        raise OSError(
            f"logits of what was written differ from the source's by {apart:.2g} of their size, where rounding to the "
            f"type of the weights explains {tolerance}"
        )


def copy_files(source: Path, destination: Path) -> None:
    """Copy tokenizer, chat template, generation config and licence."""
    for pattern in COPIED:
        for path in sorted(source.glob(pattern)):
            if path.is_dir():
                shutil.copytree(path, destination / path.name, dirs_exist_ok=True)
            elif path.suffix != ".py":
                shutil.copyfile(path, destination / path.name)


def copy_beside(checkpoint: Checkpoint, destination: Path) -> None:
    """Copy what belongs to the weights: the base's files, the tokenizer of an adapter that has its own, and the task
    with its settings, if a run of ours has made the model or the adapter in it."""
    copy_files(checkpoint.folder, destination)
    saved = checkpoint.saved
    if saved is not None and saved.is_adapter:
        copy_files(saved.folder, destination)
    if saved is not None and saved.task is not None:
        write_record(destination, saved.task, saved.settings)


def _speak_of_stock_tokenizer(path: Path) -> None:
    """Name a class that every transformers has; tokenizer.json says all that ours knows."""
    if path.is_file():
        config = read_json(path)
        config.pop("auto_map", None)
        if config.get("tokenizer_class", "").startswith("DeepSeekTokenizer"):
            config["tokenizer_class"] = "PreTrainedTokenizerFast"
        write_json(path, config)


def export_adapter(source: str | os.PathLike, destination: str | os.PathLike) -> None:
    """Rewrite a LoRA adapter on fused experts as two-dimensional adapters on official per-expert names.

    Raises:
        ValueError: if `source` is no such adapter, or its base model's config can't be read; for a destination that
            exists or can't be written.
    """
    saved = Saved.open(None, str(source))
    if saved.base is None:
        raise ValueError(f"{source} is no adapter: it has no {ADAPTER_FILE}; --adapter-format is for adapters alone")
    config, head = config_of(saved.base, saved), f"For{saved.head or 'CausalLM'}"
    with new_destination(destination):
        adapter = open_adapter(saved, Checkpoint(saved.folder, config, head, {}).skeleton())
        with writing_beside(destination) as beside:
            write_per_expert(adapter, Path(beside))
            copy_files(saved.folder, Path(beside))
            # `beside` is one folder deeper than what it becomes, so the way to the base is counted from there
            write_record(
                Path(beside),
                saved.task,
                saved.settings,
                saved.base,
                config.to_dict(),
                saved.architecture,
                home=Path(destination),
            )


FORMS: dict[str, Callable[..., None]] = {"native": export_native, "bundle": export_bundle, "gguf": export_gguf}
