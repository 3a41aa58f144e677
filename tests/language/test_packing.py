"""Packed documents are as they would be alone: loss, gradients, labels, and every token predicted once."""

import random
from collections import Counter

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from finetune_deepseek.language.packing import PackedCollator, Piece, pack, packed_rows
from tests.modeling.conftest import TINY, tiny, token_ids
from tests.reference.compare import assert_close

LENGTHS = (9, 5, 2, 13, 4)
PAD = 2


def batch_of(documents, size, method, width=None):
    rows = packed_rows(documents, pack([*map(len, documents)], size, method))
    features = [dict(zip(rows, row, strict=True)) for row in zip(*rows.values(), strict=True)]
    return PackedCollator(PAD)(features, width)


def test_three_documents_by_hand():
    assert pack([3, 7], 4).blocks == [[Piece(0, 0, 3)], [Piece(1, 0, 4)], [Piece(1, 3, 7)]]
    assert pack([3, 4, 2], 5).blocks == [[Piece(0, 0, 3), Piece(1, 0, 2)], [Piece(1, 1, 4), Piece(2, 0, 2)]]
    found = pack([3, 4, 2], 5, "best_fit")
    assert found.blocks == [[Piece(1, 0, 4)], [Piece(0, 0, 3), Piece(2, 0, 2)]]
    assert (found.pieces, found.tokens, found.padding, found.split, found.left_out) == (3, 9, 1, 0, 0)
    found = pack([1, 0, 6], 4)
    assert found.blocks == [[Piece(2, 0, 4)], [Piece(2, 3, 6)]]
    assert (found.pieces, found.tokens, found.padding, found.split, found.left_out) == (2, 7, 1, 1, 2)
    assert pack([], 4).blocks == []


def test_a_batch_by_hand():
    batch = batch_of([[0, 10, 11], [0, 20, 21, 1], [0, 1]], 5, "sequential", width=6)
    assert batch["input_ids"].tolist() == [[0, 10, 11, 0, 20, PAD], [20, 21, 1, 0, 1, PAD]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0], [0, 1, 2, 0, 1, 0]]
    assert batch["labels"].tolist() == [[-100, 10, 11, -100, 20, -100], [-100, 21, 1, -100, 1, -100]]
    assert set(batch) == {"input_ids", "position_ids", "labels"}


def test_labels_of_ones_own_stay_but_for_first_tokens():
    documents, labels = [[0, 5, 6, 1], [0, 7, 1]], [[9, -100, 6, 1], [9, 7, -100]]
    rows = packed_rows(documents, pack([4, 3], 7), labels)
    feature = {name: cells[0] for name, cells in rows.items()}
    assert PackedCollator(PAD)([feature])["labels"].tolist() == [[-100, -100, 6, 1, -100, 7, -100]]


@pytest.mark.parametrize("method", ["sequential", "best_fit"])
@pytest.mark.parametrize("size", [2, 3, 7, 16])
def test_every_token_is_predicted_once(method, size):
    draw = random.Random(size)
    lengths = [draw.choice((1, 2, 3, 5, size, size + 1, 2 * size - 1, 40)) for _ in range(60)]
    found = pack(lengths, size, method)
    predicted = Counter(
        (piece.document, place)
        for block in found.blocks
        for piece in block
        for place in range(piece.start + 1, piece.end)
    )
    expected = {(number, place) for number, length in enumerate(lengths) for place in range(1, length)}
    assert set(predicted) == expected and set(predicted.values()) == {1}
    filled = [sum(map(len, block)) for block in found.blocks]
    assert all(len(piece) >= 2 for block in found.blocks for piece in block) and max(filled) <= size
    assert found.tokens == sum(filled) and found.padding == sum(size - tokens for tokens in filled)
    assert found.left_out == lengths.count(1)
    counts = Counter(piece.document for block in found.blocks for piece in block)
    assert found.split == sum(count > 1 for count in counts.values())
    if method == "best_fit":
        assert all(counts[number] == 1 for number, length in enumerate(lengths) if 2 <= length <= size)
    else:
        assert found.padding <= len(found.blocks) + size  # one place of a block at most, but for the last


def test_what_cannot_be_packed_is_refused():
    with pytest.raises(ValueError, match="blocks of 1 tokens"):
        pack([3], 1)
    with pytest.raises(ValueError, match="no packing 'random'; there is sequential, best_fit"):
        pack([3], 4, "random")


def losses(model, batch, count):
    result = model(**batch, num_items_in_batch=count)
    return result.loss


def check_exact(model, documents):
    """Loss and gradients of packed documents against the sum over documents, each alone in its row."""
    model.train()
    count = sum(length - 1 for length in LENGTHS)
    expected = sum(losses(model, {"input_ids": ids[None], "labels": ids[None]}, count) for ids in documents)
    expected.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    for size, method, width in ((16, "best_fit", None), (sum(LENGTHS), "sequential", sum(LENGTHS) + 3)):
        model.zero_grad()
        batch = batch_of([ids.tolist() for ids in documents], size, method, width)
        loss = losses(model, batch, count)
        loss.backward()
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        assert set(found) == set(gradients)
        for name, gradient in gradients.items():
            assert_close(found[name], gradient, f"gradient of {name}", tolerance=1e-5)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("preset", TINY)
def test_loss_and_gradients_are_those_of_documents_alone(preset, attention):
    model = tiny(preset, initializer_range=0.1, **({"index_topk": 3} if "v3.2" in preset else {}))
    if model.config.num_nextn_predict_layers:
        model.config.mtp_loss_weight = 0.3
    model.set_attn_implementation(attention)
    check_exact(model, [token_ids(length, seed=length) for length in LENGTHS])


def test_sparse_attention_with_prediction_layers():
    model = tiny("tiny_v3.2", initializer_range=0.1, index_topk=3, num_nextn_predict_layers=2, mtp_loss_weight=0.3)
    check_exact(model, [token_ids(length, seed=length) for length in LENGTHS])


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_class_of_transformers_reads_the_same_batches(attention):
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, attn_implementation=attention))
    model.config.use_cache = False  # as Trainer has it; beside a cache transformers doesn't look for documents
    check_exact(model, [token_ids(length, seed=length) for length in LENGTHS])
