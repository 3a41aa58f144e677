"""A checkpoint on disk, opened by its headers: what it is, its weights under official names, merged, in a type."""

import os
import re
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from transformers import PreTrainedModel

from configuration_deepseek import DeepSeekConfig
from configuration_deepseek.official import from_official
from modeling_deepseek.checkpoint_files import CheckpointError
from modeling_deepseek.checkpoint_keys import LAYER, shared_mtp_keys, take_mtp_keys
from modeling_deepseek.quantization import QUANTIZED
from modeling_deepseek.register import MODELS_BY_AUTO_CLASS

from ..training.loading import named_errors
from ..training.saved import Saved, known_fields
from .merging import Adapter, merge, open_adapter, resized_vocabulary
from .shards import (
    LazyTensor,
    Tensors,
    cast,
    dequantize,
    open_checkpoint,
    quantize,
    split_experts,
    unread,
    with_weights,
)

HEADS = {model_class.__name__.removeprefix("DeepSeek"): model_class for model_class in MODELS_BY_AUTO_CLASS.values()}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp8": torch.bfloat16}  # fp8: of what isn't quantized
FP8_BLOCKS = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}
FLOAT32_WEIGHTS = ("e_score_correction_bias",)  # whatever the type of the rest


@dataclass(frozen=True)
class Checkpoint:
    """A model on disk: its config, the class that it is of, and its weights under official names."""

    folder: Path
    config: DeepSeekConfig
    head: str  # a key of HEADS
    tensors: Tensors
    source: Tensors = field(default_factory=dict)  # the weights before an adapter or a type changes them
    adapter: Adapter | None = None
    saved: Saved | None = None  # what knows its task: the adapter, if there is one

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
    base = Saved.open(None, str(source)).require_model()
    if base.is_adapter:
        raise ValueError(
            f"{source} is an adapter: name its base model, and the adapter after --merge-adapter; or rewrite it alone "
            "with --adapter-format per-expert"
        )
    saved = base if adapter is None else Saved.open("merge-adapter", str(adapter))
    folder, config = with_weights(base), config_of(base, saved)
    head = f"For{saved.head}" if adapter is not None and saved.head else head_of(source, config)
    if adapter is not None:
        config.vocab_size = resized_vocabulary(saved, config, has_head=head == "ForCausalLM")
    stored = split_experts(open_checkpoint(folder))
    checkpoint = Checkpoint(folder, config, head, dequantize_at(folder, stored, config), saved=saved)
    loaded = None
    if adapter is not None:
        drop_absent_predictions(checkpoint)
        loaded = open_adapter(saved, checkpoint.skeleton())
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


def config_of(base: Saved, saved: Saved) -> DeepSeekConfig:
    """The config of a model, with what the training of an adapter has changed there if `saved` is one.

    Raises:
        ValueError: for a config of another family, or changes of what is no field of it.
    """
    changes = saved.changes_to(base.config) if saved.is_adapter else {}
    with named_errors(base.where):
        fields = from_official(dict(base.config)) | known_fields(changes, DeepSeekConfig.__annotations__)
        return DeepSeekConfig.from_dict(fields)


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
        if name in trained and (name not in found or found[name].shape != tensor.shape):
            found[name] = trained[name]
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


def with_copies(tensors: Tensors, config: DeepSeekConfig) -> Tensors:
    """The weights with the copies of embedding and head that releases store in their prediction layers."""
    shared = shared_mtp_keys(config)
    tied = "model.embed_tokens.weight"
    return tensors | {name: tensors[key if key in tensors else tied].map(torch.clone) for name, key in shared.items()}
