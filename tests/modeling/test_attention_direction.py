"""Attention in one direction, in both within a prompt, and in both: against masks written out, cached and uncached."""

import pytest
import torch

from configuration_deepseek import preset
from modeling_deepseek import DeepSeekForCausalLM, DeepSeekForQuestionAnswering, DeepSeekModel
from tests.modeling.conftest import SEEING_AHEAD, outputs, tiny, token_ids
from tests.modeling.test_generation import GREEDY, NEW, left_padded
from tests.reference.compare import assert_close


def written_out(blocks: list[list[int]], mask: list[list[int]]) -> torch.Tensor:
    """[B, 1, S, S]: what sees what, by the plain rule."""
    rows = []
    for block, visible in zip(blocks, mask, strict=True):
        size = range(len(block))
        rows.append([[bool(visible[k]) and (k <= q or block[q] == block[k] >= 0) for k in size] for q in size])
    return torch.tensor(rows).unsqueeze(1)


def labels_of(blocks: list[list[int]], ids: torch.Tensor) -> torch.Tensor:
    """Labels for which the model is to find these blocks."""
    return torch.where(torch.tensor(blocks) >= 0, -100, ids)


BLOCKS = {
    "one prompt": ([[0] * 5 + [-1] * 4, [0] * 2 + [-1] * 7], [[1] * 9] * 2),
    "padded left": ([[0] * 7 + [-1] * 2, [0] * 4 + [-1] * 5], [[0] * 3 + [1] * 6, [1] * 9]),
    "padded right": ([[0] * 3 + [-1] * 3 + [1] * 3, [0] * 4 + [-1] * 5], [[1] * 6 + [0] * 3, [1] * 9]),
    "two turns": ([[0] * 3 + [-1] * 2 + [1] * 2 + [-1] * 2], [[1] * 9]),
}


@pytest.fixture(params=SEEING_AHEAD, scope="session")
def name(request):
    """Each tiny preset that can see ahead."""
    return request.param


@pytest.mark.parametrize("case", BLOCKS)
def test_prefix_attention_is_that_of_the_mask(name, case):
    blocks, mask = BLOCKS[case]
    ids, mask_2d = token_ids(len(mask), 9), torch.tensor(mask)
    expected = outputs(tiny(name), ids, attention_mask=written_out(blocks, mask))
    model = tiny(name, attention_direction="prefix")
    assert_close(
        outputs(model, ids, attention_mask=mask_2d, labels=labels_of(blocks, ids))[mask_2d.bool()],
        expected[mask_2d.bool()],
    )


def test_bidirectional_attention_is_that_of_the_mask(name):
    mask = [[0] * 2 + [1] * 7, [1] * 9]
    ids, visible = token_ids(2, 9), torch.tensor(mask).bool()
    full = written_out([[0] * 9] * 2, mask)
    for head in (DeepSeekModel, DeepSeekForQuestionAnswering):
        expected = outputs(tiny(name, head), ids, attention_mask=full)
        found = outputs(tiny(name, head, attention_direction="bidirectional"), ids, attention_mask=torch.tensor(mask))
        assert_close(found[visible], expected[visible])


@pytest.mark.parametrize("arguments", [{}, {"num_beams": 3}, {"cache_implementation": "static"}], ids=str)
def test_generation_from_a_prefix(name, arguments):
    model = tiny(name, attention_direction="prefix")
    rows = [token_ids(length, seed=length).tolist() for length in (2, 9, 5)]
    ids, mask = left_padded(rows)
    batch = model.generate(ids, attention_mask=mask, **GREEDY, **arguments)
    for row, got in zip(rows, batch, strict=True):
        alone = torch.tensor([row])
        if "num_beams" in arguments:
            expected = model.generate(alone, **GREEDY, **arguments)
        else:
            expected = alone
            for _ in range(NEW):
                blocks = torch.tensor([[0] * len(row) + [-1] * (expected.shape[1] - len(row))])
                logits = outputs(model, expected, use_cache=False, block_sequence_ids=blocks)
                expected = torch.cat((expected, logits[:, -1:].argmax(-1)), dim=1)
        assert got[9:].tolist() == expected[0, len(row) :].tolist()


def test_a_second_prompt_follows_the_cache(name):
    """A block after cached tokens sees these, and itself in both directions."""
    ids = token_ids(1, 9)
    model = tiny(name, attention_direction="prefix")
    labels = labels_of([[0] * 3 + [-1] * 2 + [1] * 4], ids)
    whole = outputs(model, ids, labels=labels)
    cached = model(ids[:, :5], labels=labels[:, :5], use_cache=True)
    rest = model(ids[:, 5:], cache=cached.cache, block_sequence_ids=torch.zeros(1, 4).long())
    assert_close(rest.logits, whole[:, 5:])


@pytest.mark.parametrize("arguments", [{"use_cache": False}, {"prefill_chunk_size": 2}], ids=str)
def test_generation_that_would_lose_the_prompt_is_refused(arguments):
    model = tiny("tiny_v3", attention_direction="prefix")
    with pytest.raises(ValueError, match="prefix attention"):
        model.generate(token_ids(1, 6), **GREEDY, **arguments)


def test_assisted_generation_from_a_prefix_is_refused():
    model = tiny("tiny_v3", attention_direction="prefix")
    ids = token_ids(1, 6)
    with pytest.raises(ValueError, match="prefix attention"):
        model.generate(ids, **GREEDY, assistant_model=tiny("tiny_llm", attention_direction="prefix"))
    with pytest.raises(ValueError, match="prefix attention"):
        model.generate(ids, **GREEDY, prompt_lookup_num_tokens=2)


def test_bidirectional_attention_refuses_a_cache():
    model = tiny("tiny_v3", attention_direction="bidirectional")
    assert model.config.use_cache is False
    with pytest.raises(ValueError, match="has no cache"):
        model(token_ids(1, 4), use_cache=True)


def test_flash_attention_is_refused():
    model = tiny("tiny_v3", attention_direction="bidirectional")
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="no mask for attention in both directions"):
        model(token_ids(1, 4))


def test_the_direction_is_saved(tmp_path):
    tiny("tiny_llm", attention_direction="prefix").save_pretrained(tmp_path)
    assert DeepSeekForCausalLM.from_pretrained(tmp_path).config.attention_direction == "prefix"
    with pytest.raises(ValueError, match="did you mean 'bidirectional'"):
        preset("tiny_llm", attention_direction="bidirektional")


@pytest.mark.parametrize("direction", ["causal", "prefix"])
def test_the_head_on_labelled_positions_only(name, direction):
    """Same loss and gradients; the logits are those of the labelled positions."""
    ids = token_ids(3, 8)
    labels = ids.clone()
    labels[0, :3] = labels[1, :6] = labels[2] = -100
    model = tiny(name, attention_direction=direction)
    found = {}
    for kept in (0, "labelled"):
        model.zero_grad()
        result = model(ids, labels=labels, logits_to_keep=kept)
        result.loss.backward()
        found[kept] = result, [p.grad.clone() for p in model.parameters() if p.grad is not None]
    (whole, gradients), (some, some_gradients) = found.values()
    assert_close(some.loss, whole.loss)
    assert_close(some.logits[0], whole.logits[:, :-1][labels[:, 1:] != -100])
    for one, other in zip(some_gradients, gradients, strict=True):
        assert_close(one, other)
    with pytest.raises(ValueError, match="needs labels"):
        model(ids, logits_to_keep="labelled")


def test_training_without_labels_says_that_prompts_are_read_causally(caplog):
    model = tiny("tiny_v3_mtp", attention_direction="prefix", mtp_loss_weight=0.1).train()
    model._tell_what_needs_labels.__globals__["logger"].warning_once.cache_clear()
    ids = token_ids(1, 5)
    with caplog.at_level("WARNING"):
        model(ids, labels=ids)
        assert not caplog.records
        model(ids)
    assert ["prompts causally" in caplog.text, "learn nothing" in caplog.text] == [True, True]
