"""A checkpoint on disk, described by its headers: what it is, its weights under official names, in a type.

Whether the weights are those that the config describes is told without building the model, where weight_names.py
knows its head; see opening.py for merging and for what else needs torch.
"""

import os
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configuration_deepseek.fields import FIELD_NAMES, DeepSeekFields
from configuration_deepseek.heads import FILES_BY_CLASS
from configuration_deepseek.official import from_official
from configuration_deepseek.plain import PlainConfig, Unread, plain_config
from configuration_deepseek.weight_names import (
    ENGRAM_IDS,
    LAYER,
    CheckpointError,
    Shapes,
    are_other_predictions,
    is_quantized_in_releases,
    shared_mtp_keys,
    take_mtp_keys,
)

from ..training.saved import Saved, known_fields, named_errors
from .tensors import LazyTensor, Tensors, cast, dequantize, quantize, split_experts, unread, word_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from configuration_deepseek import DeepSeekConfig

    from .merging import Adapter

HEADS = tuple(name.removeprefix("DeepSeek") for name in FILES_BY_CLASS)
WRITING = ("ForCausalLM", "ForImageTextToText")  # have a language model's head, and layers that predict ahead
DTYPES = {"bf16": "BF16", "fp32": "F32", "fp8": "BF16"}  # fp8: of what isn't quantized
FP8_BLOCKS = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}
SMALL_NUMBER = "._weight_"  # in the names of what torchao writes for a weight of fewer bits
MADE_SMALL = (
    "of fewer bits (compress --int8 or --int4), as from_pretrained and the verbs open it; for this, name the model "
    "that it was made from"
)
# whatever the type of the rest
STREAM_WEIGHTS = tuple(f"{part}.{name}" for part in ("_hc", "hc_head") for name in ("fn", "base", "scale"))
FLOAT32_WEIGHTS = ("e_score_correction_bias", "correction_bias_vl", "attn_sink", ".ape", *STREAM_WEIGHTS)


@dataclass(frozen=True)
class Checkpoint:
    """A model on disk: its config, the class that it is of, and its weights under official names."""

    folder: Path
    config: "DeepSeekConfig"  # or a PlainConfig, where all that is done with it is to look at it
    head: str  # of HEADS
    tensors: Tensors
    source: Tensors = field(default_factory=dict)  # the weights before an adapter or a type changes them
    adapter: "Adapter | None" = None
    saved: Saved | None = None  # what knows its task: the adapter, if there is one

    def skeleton(self) -> "PreTrainedModel":
        """The model without storage."""
        import torch  # its package and the model's take seconds

        from modeling_deepseek.register import MODELS_BY_AUTO_CLASS

        classes = {model_class.__name__: model_class for model_class in MODELS_BY_AUTO_CLASS.values()}
        with torch.device("meta"):
            config: Any = self.config.whole() if isinstance(self.config, PlainConfig) else self.config
            return classes[f"DeepSeek{self.head}"](config)

    def expected(self) -> Shapes:
        """Names and shapes of what the config describes."""
        known = self.config.weight_shapes(self.head)
        if known is not None:
            return known
        return {name: tensor.shape for name, tensor in official_weights(self.skeleton()).items()}


def config_of(base: Saved, saved: Saved) -> "DeepSeekConfig":
    """The config of a model, with what the training of an adapter has changed there if `saved` is one.

    Raises:
        ValueError: for a config of another family, or changes of what is no field of it.
    """
    from configuration_deepseek import DeepSeekConfig

    changes = saved.changes_to(base.config) if saved.is_adapter else {}
    with named_errors(base.where):
        fields = from_official(dict(base.config)) | known_fields(changes, FIELD_NAMES)
        return DeepSeekConfig.from_dict(fields)


def plain_config_of(saved: Saved) -> "DeepSeekConfig":
    """The config of a model to be looked at: a PlainConfig, if there is no more to it.

    Raises:
        ValueError: as `config_of`.
    """
    with named_errors(saved.where):
        fields = from_official(dict(saved.config))
    try:
        return plain_config(fields)  # type: ignore[return-value]
    except Unread:
        return config_of(saved, saved)


def dequantize_at(folder: Path, tensors: Tensors, config: DeepSeekFields) -> Tensors:
    """`dequantize`, with errors that name the folder, and the ids of n-grams that releases leave to the tokenizer."""
    try:
        return with_engram_ids(folder, dequantize(tensors, config), config)
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from None


def with_engram_ids(folder: Path, tensors: Tensors, config: DeepSeekFields) -> Tensors:
    """The weights, and beside them the ids of tokens for tables of n-grams if they have none; made when read."""
    embedding = next((name for name in tensors if name.endswith("embed_tokens.weight")), "")
    name = embedding.removesuffix("embed_tokens.weight") + ENGRAM_IDS
    if name in tensors or not any(map(config.engram_rows, range(config.num_hidden_layers))):
        return tensors

    def read() -> Any:
        from modeling_deepseek.engram import ids_beside  # its package takes seconds

        return ids_beside(str(folder), config)

    return {**tensors, name: LazyTensor((config.vocab_size,), "I64", read)}


def head_of(source: str | os.PathLike, config: "DeepSeekConfig") -> str:
    """The head that config.json names, of `HEADS`.

    Raises:
        ValueError: if there is no such head here.
    """
    name = (config.architectures or ["ForCausalLM"])[0]
    match = re.search(r"(For[A-Z]\w*|Model)$", name)
    if match is None or match[1] not in HEADS:
        raise ValueError(f"{source}: config.json names the architecture {name}, and there is no such head here")
    return match[1]


def official_weights(model: "PreTrainedModel") -> Tensors:
    """What a checkpoint of this model holds: official names, shapes and types; not to be read."""
    state = model.state_dict()
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    fused = {name: LazyTensor(tuple(value.shape), word_of(value.dtype), unread) for name, value in state.items()}
    return split_experts(fused)


def drop_absent_predictions(checkpoint: Checkpoint) -> None:
    """Set the number of prediction layers to 0 if none are stored, as where transformers wrote the checkpoint, or if
    others are than the config says."""
    config = checkpoint.config
    ahead = take_mtp_keys(checkpoint.tensors, config)[1]
    if checkpoint.head not in WRITING or not ahead or are_other_predictions(ahead, config):
        config.without_predictions()


def is_of_vision(name: str, config: DeepSeekFields) -> bool:
    """Whether a weight is of V4.1's vision tower, which a language model without it hands on as it is."""
    return config.vision_config is not None and name.startswith(("vision.", "aligner.", "image_"))


def check_weights(checkpoint: Checkpoint, trained: Tensors) -> Tensors:
    """The checkpoint's weights that are the model's; `trained` are those that an adapter brings.

    Left out is what the model derives, repeats or doesn't have: rotary frequencies (old files of the LLM line), a
    head that is tied or replaced, prediction layers' copies of embedding and head, and spare prediction layers.

    Raises:
        CheckpointError: naming the first weight that is missing, misshapen or of another architecture.
    """
    drop_absent_predictions(checkpoint)
    where, config = checkpoint.folder, checkpoint.config
    expected = checkpoint.expected()
    found: Tensors = {}
    for name, tensor in checkpoint.tensors.items():
        layer = LAYER.match(name)
        is_ahead = layer is not None and int(layer[1]) >= config.num_hidden_layers
        is_unused_head = name == "lm_head.weight" and (config.tie_word_embeddings or checkpoint.head not in WRITING)
        if name in expected or is_of_vision(name, config):
            found[name] = tensor
        elif not (is_ahead or is_unused_head or name.endswith("rotary_emb.inv_freq")):
            kind = f"of another architecture than config.json says ({config.source_model_type or 'deepseek'}, "
            kind += f"{checkpoint.head})"
            is_small = SMALL_NUMBER in name
            raise CheckpointError(f"{where}: weight {name} is {MADE_SMALL if is_small else kind}")
    for name, shape in expected.items():
        if name in trained and (name not in found or found[name].shape != shape):
            found[name] = trained[name]
        if name not in found:
            raise CheckpointError(f"{where}: weight {name} is missing, or config.json describes another model")
        if found[name].shape != shape:
            raise CheckpointError(
                f"{where}: weight {name} has shape {found[name].shape}, but config.json asks for {shape}"
            )
    return found


def in_type(checkpoint: Checkpoint, dtype: str | None) -> Checkpoint:
    """The checkpoint in the type "bf16", "fp32" or "fp8", or as it is stored (None).

    With "fp8" the weights that releases leave unquantized become bf16, as theirs are.
    """
    tensors, config = checkpoint.tensors, checkpoint.config
    if dtype is not None:
        tensors = cast(tensors, DTYPES[dtype], keep=FLOAT32_WEIGHTS)
        release, config.source_quantization_config = config.source_quantization_config or {}, None
    if dtype == "fp8":
        one_byte_scales = {"scale_fmt": "ue8m0"} if config.expert_dtype == "fp4" else {}
        small = {} if config.kv_source_layer_ids is None else {"weight_block_size": [32, 32]}
        config.source_quantization_config = {**FP8_BLOCKS, **small, **release, **one_byte_scales}
        exact = cast(checkpoint.tensors, "F32")
        tensors = quantize(
            {name: exact[name] if is_quantized_in_releases(name, config) else tensors[name] for name in tensors},
            config,
        )
    tensors = {
        name: tensor.to("F32") if name.endswith(FLOAT32_WEIGHTS) and tensor.word != "F32" else tensor
        for name, tensor in tensors.items()
    }
    return replace(checkpoint, tensors=tensors)


def with_copies(tensors: Tensors, config: DeepSeekFields) -> Tensors:
    """The weights with the copies of embedding and head that releases store in their prediction layers."""
    shared = shared_mtp_keys(config)
    tied = "model.embed_tokens.weight"
    originals = {name: tensors[key if key in tensors else tied] for name, key in shared.items()}
    return tensors | {name: tensor.map(lambda value: value.clone()) for name, tensor in originals.items()}
