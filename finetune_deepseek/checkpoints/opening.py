"""A checkpoint opened for its weights: checked, an adapter merged, in the type that is asked for."""

import os
from dataclasses import replace

from ..training.saved import Saved
from .checkpoint import (
    WRITING,
    Checkpoint,
    check_weights,
    config_of,
    dequantize_at,
    drop_absent_predictions,
    head_of,
    in_type,
)
from .merging import merge, open_adapter, resized_vocabulary
from .shards import with_weights
from .tensors import is_packed, open_model_weights


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
        config.vocab_size = resized_vocabulary(saved, config, has_head=head in WRITING)
    stored = open_model_weights(folder, config)
    checkpoint = Checkpoint(folder, config, head, dequantize_at(folder, stored, config), saved=saved)
    loaded = None
    if adapter is not None:
        drop_absent_predictions(checkpoint)
        loaded = open_adapter(saved, checkpoint.skeleton())
    tensors = check_weights(checkpoint, {} if loaded is None else loaded.replaced)
    checkpoint = replace(checkpoint, source=tensors, adapter=loaded)
    is_quantized = any(is_packed(name, tensor) for name, tensor in stored.items())
    if is_quantized and loaded is None and dtype in (None, "fp8"):
        scales = {f"{name}_scale_inv" for name in tensors}
        tensors = {name: tensor for name, tensor in stored.items() if name in tensors or name in scales}
        return typed(replace(checkpoint, tensors=tensors), None)
    if loaded is not None:
        tensors = merge(tensors, loaded)
    return typed(replace(checkpoint, tensors=tensors), "bf16" if is_quantized and dtype is None else dtype)


def typed(checkpoint: Checkpoint, dtype: str | None) -> Checkpoint:
    """`in_type`, and the config saying so."""
    made = in_type(checkpoint, dtype)
    embeddings = next(tensor for name, tensor in made.tensors.items() if name.endswith("embed_tokens.weight"))
    made.config.dtype = embeddings.dtype
    return made
