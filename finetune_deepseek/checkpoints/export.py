"""`deepseek-hf export`: a checkpoint in the form that others read, written one shard at a time.

    native   config.json and weight names of the release, for transformers, vLLM, SGLang and converters
    bundle   this package's config and its code beside the weights: trust_remote_code, every head
    gguf     one file for llama.cpp and Ollama, see export_gguf.py

What is written is read again and compared before it takes its place: names, types, shapes, some values of each weight,
and (native, bundle) the logits of a few tokens, see spot_logits.py. A LoRA adapter can be merged on the way, see
merging.py; peak memory stays near one shard, whatever the model's size.
"""

import argparse
import os
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers.dynamic_module_utils import custom_object_save

from configuration_deepseek import DeepSeekConfig
from configuration_deepseek.official import ARCHITECTURES, official_model_type, to_official
from modeling_deepseek.checkpoint_files import CheckpointError, writing_beside
from modeling_deepseek.checkpoint_keys import LAYER, shared_mtp_keys, take_mtp_keys
from modeling_deepseek.quantization import QUANTIZED
from modeling_deepseek.register import MODELS_BY_AUTO_CLASS

from ..commands.flags import Parser
from .gguf import export_gguf
from .merging import Adapter, merge, open_adapter, write_per_expert
from .shards import (
    ADAPTER_FILE,
    WEIGHTS_FILE,
    LazyTensor,
    Tensors,
    cast,
    dequantize,
    local_folder,
    new_destination,
    open_checkpoint,
    quantize,
    read_json,
    split_experts,
    unread,
    write_json,
    write_shards,
)
from .spot_logits import difference, spot_logits

HEADS = {model_class.__name__.removeprefix("DeepSeek"): model_class for model_class in MODELS_BY_AUTO_CLASS.values()}
# The heads that transformers has for a published model_type, beside ForCausalLM.
NATIVE_HEADS = {
    "llama": ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering"),
    "qwen2": ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering"),
    "qwen3": ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering"),
    "deepseek_v2": ("ForSequenceClassification",),
    "deepseek_v3": ("ForSequenceClassification", "ForTokenClassification"),
}
HEADS_BY_TASK = {
    "CAUSAL_LM": "ForCausalLM",
    "SEQ_CLS": "ForSequenceClassification",
    "TOKEN_CLS": "ForTokenClassification",
    "QUESTION_ANS": "ForQuestionAnswering",
}
# Fields that releases don't have, and that change nothing in evaluation.
NOT_IN_RELEASES = {"source_model_type", "source_quantization_config", "hidden_dropout", "output_router_logits"}
NOT_IN_RELEASES |= {"mtp_loss_weight", "mtp_after_norm", "deepseek_format"}
LABEL_FIELDS = ("id2label", "label2id", "problem_type")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp8": torch.bfloat16}  # fp8: of what isn't quantized
FP8_BLOCKS = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}
# How far logits may be from the source's, against their size, by the type of the weights.
TOLERANCES = {torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.2, torch.float8_e4m3fn: 0.7}
FLOAT32_WEIGHTS = ("e_score_correction_bias",)  # whatever the type of the rest
COPIED = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "chat_template*"),
    *("additional_chat_templates", "generation_config.json", "LICENSE*", "catalogue"),
)
Report: TypeAlias = Callable[[int, int], Any]

EXAMPLES = """examples:
  deepseek-hf export runs/translation exported --to native                 for transformers, vLLM, SGLang
  deepseek-hf export runs/translation exported --to bundle                 for trust_remote_code
  deepseek-hf export runs/translation model.gguf --to gguf --dtype bf16    for llama.cpp, Ollama
  deepseek-hf export deepseek-ai/DeepSeek-V2-Lite merged --to native --merge-adapter runs/adapter
  deepseek-hf export runs/adapter adapter-2d --adapter-format per-expert   for servers that read no fused experts"""


@dataclass(frozen=True)
class Checkpoint:
    """A model on disk: its config, the class that it is of, and its weights under official names."""

    folder: Path
    config: DeepSeekConfig
    head: str  # a key of HEADS
    tensors: Tensors
    source: Tensors = field(default_factory=dict)  # the weights before an adapter or a type changes them
    adapter: Adapter | None = None

    def skeleton(self) -> PreTrainedModel:
        """The model without storage."""
        with torch.device("meta"):
            return HEADS[self.head](self.config)


def open_model(
    source: str | os.PathLike, adapter: str | os.PathLike | None = None, dtype: str | None = None
) -> Checkpoint:
    """Read the headers of a checkpoint, check that they are the model's, merge an adapter, choose the type.

    Args:
        source: a folder or a Hub id, of any form that `DeepSeekConfig` reads.
        adapter: the folder or Hub id of a LoRA adapter.
        dtype: "bf16", "fp32", "fp8", or None for the types that the weights are stored in; FP8 with an adapter
            becomes bf16, since rounding again would lose what the adapter learned.

    Raises:
        ValueError: for a config of another family; for a file that is missing or damaged; for weights that are
            missing, misshapen, or of another architecture; for an adapter that doesn't fit.
    """
    folder = local_folder(source)
    if (folder / ADAPTER_FILE).is_file() and not (folder / WEIGHTS_FILE).is_file():
        raise ValueError(
            f"{source} is an adapter: name its base model, and the adapter after --merge-adapter; or rewrite it alone "
            "with --adapter-format per-expert"
        )
    config = DeepSeekConfig.from_pretrained(folder)
    head = head_of(source, config)
    adapter_folder = None if adapter is None else local_folder(adapter)
    if adapter_folder is not None and (adapter_folder / ADAPTER_FILE).is_file():
        head = HEADS_BY_TASK.get(read_json(adapter_folder / ADAPTER_FILE).get("task_type") or "", head)
        if (adapter_folder / "config.json").is_file():  # it has the labels
            saved = DeepSeekConfig.from_pretrained(adapter_folder)
            config.id2label, config.problem_type = saved.id2label, saved.problem_type
    stored = split_experts(open_checkpoint(folder))
    checkpoint = Checkpoint(folder, config, head, dequantize_at(folder, stored, config))
    loaded = None
    if adapter_folder is not None:
        drop_absent_predictions(checkpoint)
        loaded = open_adapter(adapter_folder, checkpoint.skeleton())
    tensors = check_weights(checkpoint, {} if loaded is None else loaded.replaced)
    checkpoint = replace(checkpoint, source=tensors, adapter=loaded)
    is_quantized = any(tensor.dtype == torch.float8_e4m3fn for tensor in stored.values())
    if is_quantized and loaded is None and dtype in (None, "fp8"):
        scales = {f"{name}_scale_inv" for name in tensors}
        tensors = {name: tensor for name, tensor in stored.items() if name in tensors or name in scales}
        return in_type(replace(checkpoint, tensors=tensors), None)
    if loaded is not None:
        tensors = merge(tensors, loaded)
    return in_type(replace(checkpoint, tensors=tensors), "bf16" if is_quantized and dtype is None else dtype)


def dequantize_at(folder: Path, tensors: Tensors, config: DeepSeekConfig) -> Tensors:
    """`dequantize`, with errors that name the folder."""
    try:
        return dequantize(tensors, config)
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from None


def head_of(source: str | os.PathLike, config: DeepSeekConfig) -> str:
    """The head that config.json names, as a key of `HEADS`.

    Raises:
        ValueError: if there is no such head here.
    """
    name = (config.architectures or ["ForCausalLM"])[0]
    match = re.search(r"(For[A-Z]\w*|Model)$", name)
    if match is None or match[1] not in HEADS:
        raise ValueError(f"{source}: config.json names the architecture {name}, and there is no such head here")
    return match[1]


def official_weights(model: PreTrainedModel) -> Tensors:
    """What a checkpoint of this model holds: official names, shapes and types; not to be read."""
    state = model.state_dict()
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    fused = {name: LazyTensor(tuple(value.shape), value.dtype, unread) for name, value in state.items()}
    return split_experts(fused)


def drop_absent_predictions(checkpoint: Checkpoint) -> None:
    """Set the number of prediction layers to 0 if none are stored, as where transformers wrote the checkpoint."""
    config = checkpoint.config
    ahead = take_mtp_keys(checkpoint.tensors, config)[1]
    if checkpoint.head != "ForCausalLM" or not ahead:
        config.num_nextn_predict_layers = 0


def check_weights(checkpoint: Checkpoint, trained: Tensors) -> Tensors:
    """The checkpoint's weights that are the model's; `trained` are those that an adapter brings.

    Left out is what the model derives, repeats or doesn't have: rotary frequencies (old files of the LLM line), a
    head that is tied or replaced, prediction layers' copies of embedding and head, and spare prediction layers.

    Raises:
        CheckpointError: naming the first weight that is missing, misshapen or of another architecture.
    """
    drop_absent_predictions(checkpoint)
    where, config = checkpoint.folder, checkpoint.config
    expected = official_weights(checkpoint.skeleton())
    found: Tensors = {}
    for name, tensor in checkpoint.tensors.items():
        layer = LAYER.match(name)
        is_ahead = layer is not None and int(layer[1]) >= config.num_hidden_layers
        is_unused_head = name == "lm_head.weight" and (config.tie_word_embeddings or checkpoint.head != "ForCausalLM")
        if name in expected:
            found[name] = tensor
        elif not (is_ahead or is_unused_head or name.endswith("rotary_emb.inv_freq")):
            raise CheckpointError(
                f"{where}: weight {name} is of another architecture than config.json says "
                f"({config.source_model_type or 'deepseek'}, {checkpoint.head})"
            )
    for name, tensor in expected.items():
        if name in trained:
            found.setdefault(name, trained[name])
        if name not in found:
            raise CheckpointError(f"{where}: weight {name} is missing, or config.json describes another model")
        if found[name].shape != tensor.shape:
            raise CheckpointError(
                f"{where}: weight {name} has shape {found[name].shape}, but config.json asks for {tensor.shape}"
            )
    return found


def in_type(checkpoint: Checkpoint, dtype: str | None) -> Checkpoint:
    """The checkpoint in the type "bf16", "fp32" or "fp8", or as it is stored (None), and its config saying so.

    With "fp8" the weights that releases leave unquantized become bf16, as theirs are.
    """
    tensors, config = checkpoint.tensors, checkpoint.config
    if dtype is not None:
        tensors = cast(tensors, DTYPES[dtype], keep=FLOAT32_WEIGHTS)
        release, config.source_quantization_config = config.source_quantization_config or {}, None
    if dtype == "fp8":
        config.source_quantization_config = {**FP8_BLOCKS, **release}
        block, scale_fmt = config.source_quantization_config["weight_block_size"], release.get("scale_fmt")
        exact = cast(checkpoint.tensors, torch.float32)
        tensors = quantize(
            {name: exact[name] if QUANTIZED.fullmatch(name) else tensors[name] for name in tensors}, block, scale_fmt
        )
    tensors = {
        name: tensor.map(torch.Tensor.float, dtype=torch.float32)
        if name.endswith(FLOAT32_WEIGHTS) and tensor.dtype != torch.float32
        else tensor
        for name, tensor in tensors.items()
    }
    config.dtype = next(tensor.dtype for name, tensor in tensors.items() if name.endswith("embed_tokens.weight"))
    return replace(checkpoint, tensors=tensors)


# Forms --------------------------------------------------------------------------------------------------------------


def native_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """The release's own config.json.

    Raises:
        ValueError: if no published form can say what this model is, or transformers has no such head for it.
    """
    config, head = checkpoint.config, checkpoint.head
    fields = config.to_dict()
    model_type = official_model_type(fields)
    if head not in ("ForCausalLM", *NATIVE_HEADS.get(model_type, ())):
        raise ValueError(f"transformers has no {ARCHITECTURES[model_type]}{head}; use --to bundle")
    official = to_official(fields)
    understood = DeepSeekConfig.from_dict(official)
    for name in DeepSeekConfig.__annotations__.keys() - NOT_IN_RELEASES:
        if getattr(understood, name) != getattr(config, name):
            raise ValueError(
                f"config.json of {model_type} has no place for {name}={getattr(config, name)}; use --to bundle"
            )
    official["architectures"] = [ARCHITECTURES[model_type] + head]
    if config.source_quantization_config is not None:
        official["quantization_config"] = config.source_quantization_config
    if head != "ForCausalLM":
        official |= {name: fields[name] for name in LABEL_FIELDS if fields.get(name) is not None}
    return official


def with_copies(tensors: Tensors, config: DeepSeekConfig) -> Tensors:
    """The weights with the copies of embedding and head that releases store in their prediction layers."""
    tied = tensors["model.embed_tokens.weight"]
    copies = {name: tensors.get(shared, tied).map(torch.clone) for name, shared in shared_mtp_keys(config).items()}
    return tensors | copies


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
            write_shards(tensors, folder, max_shard_size, report)
            write_json(folder / "config.json", official)
            copy_files(checkpoint.folder, folder)
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
        checkpoint.config.architectures = [HEADS[checkpoint.head].__name__]
        with writing_beside(destination) as beside:
            folder = Path(beside)
            write_shards(checkpoint.tensors, folder, max_shard_size, report)
            # the model's code before the config's: it brings a stand-in for the config's file, which this replaces
            custom_object_save(checkpoint.skeleton(), beside, config=checkpoint.config)  # type: ignore[arg-type]
            checkpoint.config.save_pretrained(beside)
            copy_files(checkpoint.folder, folder)
            verify_logits(checkpoint, folder)


def verify_logits(checkpoint: Checkpoint, folder: Path) -> None:
    """Compare what the written folder computes with what the source does, with the adapter attached, not merged.

    Raises:
        OSError: if they differ by more than the type of the weights explains.
    """
    config = DeepSeekConfig.from_pretrained(folder)
    tensors = dequantize_at(folder, split_experts(open_checkpoint(folder)), config)
    written = spot_logits(Checkpoint(folder, config, head_of(folder, config), tensors).skeleton(), tensors)
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
                shutil.copytree(path, destination / path.name)
            elif path.suffix != ".py":
                shutil.copyfile(path, destination / path.name)


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
    folder = local_folder(source)
    if not (folder / ADAPTER_FILE).is_file():
        raise ValueError(f"{source} is no adapter: it has no {ADAPTER_FILE}; --adapter-format is for adapters alone")
    settings = read_json(folder / ADAPTER_FILE)
    base = settings.get("base_model_name_or_path")
    where = folder if (folder / "config.json").is_file() else str(base)
    try:
        config = DeepSeekConfig.from_pretrained(where)
    except OSError as error:
        raise ValueError(f"{source}: the config of its base model {base} can't be read ({error})") from error
    head = HEADS_BY_TASK.get(settings.get("task_type") or "CAUSAL_LM", "ForCausalLM")
    with new_destination(destination):
        adapter = open_adapter(folder, Checkpoint(folder, config, head, {}).skeleton())
        with writing_beside(destination) as beside:
            write_per_expert(adapter, Path(beside))
            copy_files(folder, Path(beside))


FORMS: dict[str, Callable[..., None]] = {"native": export_native, "bundle": export_bundle, "gguf": export_gguf}


# The command --------------------------------------------------------------------------------------------------------


def parser() -> Parser:
    """The flags of `deepseek-hf export`."""
    flags = Parser(
        prog="deepseek-hf export",
        description="Write a checkpoint in the form that others read. It passes through memory one shard at a time,\n"
        "is read again and compared, and only then takes its place. Nothing that exists is overwritten.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    flags.add_argument("source", metavar="SRC", help="folder or Hub id of a model (or adapter, see --adapter-format)")
    flags.add_argument("destination", metavar="DST", help="folder that doesn't exist yet; for gguf a file")
    flags.add_argument(
        "--to",
        choices=FORMS,
        help="native: config and names of the release, for transformers' own classes, vLLM, SGLang. "
        "bundle: with this package's code, for trust_remote_code. gguf: for llama.cpp and Ollama.",
    )
    flags.add_argument(
        "--merge-adapter", "--merge_adapter", metavar="DIR", help="LoRA adapter to merge into the weights"
    )
    flags.add_argument(
        "--dtype",
        choices=[*DTYPES],
        help="type of the weights; without it, the one they are stored in. fp8: e4m3 in blocks of 128 x 128, as V3's",
    )
    flags.add_argument("--max-shard-size", "--max_shard_size", metavar="SIZE", help="of a weight file; 5GB without it")
    flags.add_argument(
        "--adapter-format",
        "--adapter_format",
        choices=["per-expert"],
        help="SRC is a LoRA adapter on fused experts: write it as two-dimensional adapters, one per expert and "
        "projection, under official names",
    )
    return flags


def export(argv: Sequence[str]) -> None:
    """Do what `deepseek-hf export` is followed by.

    Raises:
        ValueError: with one line, for bad input.
    """
    arguments = parser().parse(list(argv) or ["--help"])
    if arguments.adapter_format:
        if arguments.to or arguments.merge_adapter or arguments.dtype:
            raise ValueError("--adapter-format rewrites an adapter and nothing else; leave out the other flags.")
        export_adapter(arguments.source, arguments.destination)
        return
    if arguments.to is None:
        raise ValueError(f"--to is missing; choose from {', '.join(FORMS)}.")
    size = {} if arguments.max_shard_size is None else {"max_shard_size": arguments.max_shard_size}
    unit = "tensor" if arguments.to == "gguf" else "shard"
    with tqdm(desc=f"export to {arguments.to}", unit=unit, file=sys.stderr) as bar:

        def report(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        FORMS[arguments.to](
            arguments.source,
            arguments.destination,
            adapter=arguments.merge_adapter,
            dtype=arguments.dtype,
            report=report,
            **size,
        )
