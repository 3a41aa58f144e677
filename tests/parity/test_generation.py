"""Greedy and beam search against transformers: the same tokens, the same scores."""

import torch

from tests.parity.pairs import Pair, padding, token_ids
from tests.reference.compare import assert_close


def generate(model, pair: Pair, **arguments):
    mask = padding("left", (7, 5, 4))
    ids = token_ids(pair, length=7).masked_fill(mask == 0, pair.native.config.pad_token_id)
    return model.generate(
        ids,
        attention_mask=mask,
        do_sample=False,
        max_new_tokens=6,
        return_dict_in_generate=True,
        output_logits=True,
        **arguments,
    )


def test_greedy(pair: Pair):
    native = generate(pair.native, pair)
    for implementation in ("eager", "sdpa"):
        pair.ours.set_attn_implementation(implementation)
        ours = generate(pair.ours, pair)
        pair.ours.set_attn_implementation("eager")
        assert ours.sequences.tolist() == native.sequences.tolist()
        assert_close(torch.stack(ours.logits), torch.stack(native.logits), f"logits of the steps, {implementation}")


def test_beam_search(pair: Pair):
    arguments = {"num_beams": 3, "num_return_sequences": 2, "output_scores": True}
    ours, native = (generate(model, pair, **arguments) for model in (pair.ours, pair.native))
    assert ours.sequences.tolist() == native.sequences.tolist()
    assert_close(ours.sequences_scores, native.sequences_scores, "scores of the beams")
