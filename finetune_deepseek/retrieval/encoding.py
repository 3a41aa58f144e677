"""Texts to the vectors of an embedding model: the one way, for training, scores, indexes and sentence-transformers."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from modeling_deepseek.contrastive import truncated
from tokenization_deepseek import Control, encode_parts


def token_ids(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], prefix: str, max_length: int
) -> tuple[list[list[int]], int]:
    """Prefix, text and the end-of-text token of each text, at most `max_length` in all; and how many texts were cut.

    The end is there for cut texts too: with last-token pooling it is where a text is summed up.
    """
    eos = tokenizer.eos_token_id
    parts = [[Control(prefix), text] for text in texts]
    rows = encode_parts(tokenizer, parts, return_attention_mask=False)["input_ids"] if parts else []
    rows = [row[:-1] if row and row[-1] == eos else row for row in rows]
    return [[*row[: max_length - 1], eos] for row in rows], sum(len(row) >= max_length for row in rows)


def encode_ids(model: Any, rows: Sequence[list[int]], pad_token_id: int, batch_size: int = 32) -> torch.Tensor:
    """Embeddings [N, D] in float32 on the CPU, in the rows' order; batches are of texts of like lengths."""
    order = sorted(range(len(rows)), key=lambda number: -len(rows[number]))
    found = torch.zeros(len(rows), model.config.hidden_size)
    was_training = model.training
    model.eval()
    try:
        for start in range(0, len(rows), batch_size):
            chosen = order[start : start + batch_size]
            texts = [torch.tensor(rows[number]) for number in chosen]
            ids = pad_sequence(texts, batch_first=True, padding_value=pad_token_id)
            mask = pad_sequence([torch.ones_like(text) for text in texts], batch_first=True)
            with torch.no_grad():
                output = model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device))
            found[chosen] = output.embeddings.float().cpu()
    finally:
        model.train(was_training)
    return found


def encode(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str] | str,
    prefix: str,
    max_length: int | None = None,
    size: int | None = None,
) -> torch.Tensor:
    """Embeddings of texts, [N, D], or [N, size] for a Matryoshka model; of one text, given as such, [D] or [size].

    Args:
        prefix: `model.config.query_prefix` or `passage_prefix`.
        max_length: in tokens; None for as many as the model takes.
    """
    if isinstance(texts, str):  # else its characters would be the texts
        return encode(model, tokenizer, [texts], prefix, max_length, size)[0]
    limit = max_length or model.config.max_position_embeddings
    rows, _ = token_ids(tokenizer, texts, prefix, limit)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return truncated(encode_ids(model, rows, pad), size)
