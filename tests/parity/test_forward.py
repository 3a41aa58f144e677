"""Logits, hidden states and router logits of whole models against transformers, padded, cached and not.

Each of our attention implementations is compared with the native model's eager one.
"""

from collections.abc import Callable

import pytest
import torch

from tests.parity.pairs import Pair, padding, token_ids
from tests.reference.compare import assert_close


@torch.no_grad()
def compare(pair: Pair, logits_of: Callable[[torch.nn.Module], torch.Tensor], what: str) -> torch.Tensor:
    """Compare `logits_of(model)` for both of our implementations with the native model's, which is returned."""
    native = logits_of(pair.native)
    for implementation in ("eager", "sdpa"):
        pair.ours.set_attn_implementation(implementation)
        ours = logits_of(pair.ours)
        pair.ours.set_attn_implementation("eager")
        assert_close(ours, native, f"{what}, {implementation}")
    return native


@torch.no_grad()
def in_pieces(model, ids: torch.Tensor, lengths: list[int], mask: torch.Tensor | None = None) -> torch.Tensor:
    """Logits [B, S, V] of calls on consecutive pieces of the ids, with one cache."""
    cache, logits, end = None, [], 0
    for piece in ids.split(lengths, dim=1):
        end += piece.shape[1]
        seen = None if mask is None else mask[:, :end]
        output = model(piece, attention_mask=seen, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        logits.append(output.logits)
    return torch.cat(logits, dim=1)


def padded(pair: Pair, side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask of a padded batch."""
    mask = padding(side)
    return token_ids(pair).masked_fill(mask == 0, pair.native.config.pad_token_id), mask


def test_logits(pair: Pair):
    compare(pair, lambda model: model(token_ids(pair)).logits, "logits")


@torch.no_grad()
def test_states_and_attention_weights_of_every_layer(pair: Pair):
    ids = token_ids(pair, batch=2, length=7)
    ours, native = (
        model(ids, output_hidden_states=True, output_attentions=True) for model in (pair.ours, pair.native)
    )
    for kind in ("hidden_states", "attentions"):
        for i, (a, b) in enumerate(zip(ours[kind], native[kind], strict=True)):
            assert_close(a, b, f"{kind} {i}")


@torch.no_grad()
def test_router_logits(pair: Pair):
    ids = token_ids(pair)
    ours = pair.ours(ids, output_router_logits=True).router_logits or ()
    native: list[torch.Tensor] = []
    gates = [module for name, module in pair.native.named_modules() if name.endswith("mlp.gate")]
    hooks = [gate.register_forward_hook(lambda module, args, output: native.append(output[0])) for gate in gates]
    pair.native(ids)
    for hook in hooks:
        hook.remove()
    for i, (a, b) in enumerate(zip(ours, native, strict=True)):
        assert_close(a, b, f"router logits {i}")


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batch(pair: Pair, side: str):
    ids, mask = padded(pair, side)
    compare(pair, lambda model: model(ids, attention_mask=mask).logits[mask.bool()], f"padded on the {side}")


def test_left_padded_batch_with_positions_from_its_first_token(pair: Pair):
    ids, mask = padded(pair, "left")
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    compare(
        pair,
        lambda model: model(ids, attention_mask=mask, position_ids=positions).logits[mask.bool()],
        "padded on the left",
    )


@pytest.mark.parametrize("lengths", [[1] * 7, [7, 1, 1, 1, 3]], ids=["token by token", "prompt and pieces"])
def test_decode(pair: Pair, lengths: list[int]):
    ids = token_ids(pair, length=sum(lengths))
    native = compare(pair, lambda model: in_pieces(model, ids, lengths), "with a cache")
    if pair.native.config.rope_parameters["rope_type"] != "dynamic":  # there frequencies depend on what has come
        with torch.no_grad():
            assert_close(pair.ours(ids).logits, native, "without a cache against with one")


def test_padded_decode(pair: Pair):
    ids, mask = padded(pair, "left")
    compare(pair, lambda model: in_pieces(model, ids, [9, 1, 3], mask)[mask.bool()], "with a cache, padded")
