"""Documents and blocks for the mask of a forward: told apart on the device, with one wait for it at most.

Letters: B batch, S tokens of this call, T tokens including cached ones.
"""

from typing import Any

import torch
from torch.nn import functional as F
from transformers.cache_utils import Cache
from transformers.masking_utils import packed_sequence_mask_function

NO_BLOCK = -1


def after_cached(block_sequence_ids: torch.Tensor, cache: Cache | None) -> torch.Tensor:
    """[B, S] numbers of blocks -> [B, T], cached tokens being in none."""
    if cache is None:
        return block_sequence_ids
    seen, (batch, length) = cache.get_seq_length(), block_sequence_ids.shape
    if isinstance(seen, int):
        return F.pad(block_sequence_ids, (seen, 0), value=NO_BLOCK)
    # A static cache counts on the device, and has its full length at once.
    blocks = block_sequence_ids.new_full((batch, cache.get_mask_sizes(length, 0)[0]), NO_BLOCK)
    places = torch.arange(length, device=blocks.device) + seen.to(blocks.device)
    return blocks.index_copy(1, places, block_sequence_ids)


def with_documents(
    attention_mask: torch.Tensor, position_ids: torch.Tensor, implementation: str
) -> tuple[torch.Tensor | None, torch.Tensor | None, dict[str, Any]]:
    """What to ask of transformers for a mask [B, S] and positions [B or 1, S], so that packed documents, whose
    positions restart, don't see each other: mask, positions, further arguments.

    One look at the numbers finds out what few masks need, and spares transformers its own; a graph takes the general
    form.
    """
    visible = attention_mask.bool()
    positions = torch.where(visible, position_ids, -2)  # each pad becomes a document of its own
    restarts = visible[:, 1:] & (positions[:, 1:] <= positions.cummax(-1).values[:, :-1])
    breaks = positions.diff() != 1  # what transformers takes for the begin of a document
    is_packed = visible.all() | restarts.any()
    if (torch.compiler.is_compiling() or torch.jit.is_tracing()) and "flash" not in implementation:
        documents = F.pad((breaks & is_packed).cumsum(-1), (1, 0))
        return attention_mask, None, {"and_mask_function": packed_sequence_mask_function(documents)}
    is_packed, has_breaks = torch.stack((is_packed, breaks.any())).tolist()
    if is_packed:
        return None, positions if has_breaks else None, {}
    return attention_mask, None, {"allow_is_causal_skip": False}
