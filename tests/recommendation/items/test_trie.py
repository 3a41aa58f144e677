"""The trie against plain sets of prefixes, and beam search against scoring every code."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from configuration_deepseek import preset
from finetune_deepseek.recommendation.items.trie import CodeTrie, TrieLogitsProcessor, beam_items
from modeling_deepseek import DeepSeekForCausalLM

SETTINGS = settings(max_examples=25, deadline=None)


@st.composite
def catalogues(draw):
    """Codes in order, of 1 to 4 digits."""
    depth = draw(st.integers(1, 4))
    code = st.tuples(*[st.integers(0, 3)] * depth)
    return sorted(draw(st.sets(code, min_size=1, max_size=14)))


def first_tokens(trie):
    return [2 + sum(trie.sizes[:level]) for level in range(trie.depth)]


def tiny(trie, seed, name="tiny_llm"):
    torch.manual_seed(seed)
    tokens = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
    config = preset(name, vocab_size=2 + sum(trie.sizes), initializer_range=0.3, num_hidden_layers=2, **tokens)
    return DeepSeekForCausalLM(config).eval()


def random_prompts(trie, users, generator):
    """[B, S] padded on the left, of digits of any kind, and the mask."""
    ids = torch.randint(1, 2 + sum(trie.sizes), (users, 7), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(users):
        mask[row, : int(torch.randint(0, 6, (1,), generator=generator))] = 0
    return ids * mask, mask


@SETTINGS
@given(catalogues(), st.integers(0, 10**6))
def test_what_may_follow_is_what_a_set_of_prefixes_says(codes, seed):
    trie = CodeTrie(torch.tensor(codes))
    generator = torch.Generator().manual_seed(seed)
    choosable = torch.rand(3, len(codes), generator=generator) < 0.6
    counts = torch.nn.functional.pad(choosable.int().cumsum(1), (1, 0))
    for level in range(trie.depth):
        prefixes = torch.randint(-1, 5, (6, level), generator=generator)  # two per user, some of no item's digits
        known = [torch.tensor(codes[int(n)][:level]) for n in torch.randint(len(codes), (3,), generator=generator)]
        prefixes[::2] = torch.stack(known) if level else prefixes[::2]
        allowed = trie.allowed_digits(prefixes.long(), counts)
        for row, prefix in enumerate(prefixes.tolist()):
            left = [code for code, is_left in zip(codes, choosable[row // 2].tolist(), strict=True) if is_left]
            follow = {code[level] for code in left if list(code[:level]) == prefix}
            assert set(allowed[row].nonzero().flatten().tolist()) == follow
    assert trie.find(torch.tensor(codes)).tolist() == list(range(len(codes)))
    others = torch.randint(-1, 5, (9, trie.depth), generator=generator)
    expected = [codes.index(tuple(code)) if tuple(code) in codes else -1 for code in others.tolist()]
    assert trie.find(others).tolist() == expected


@SETTINGS
@given(catalogues(), st.integers(0, 10**6), st.integers(1, 9))
def test_no_invalid_and_no_excluded_item_ever(codes, seed, beams):
    """Random models, histories, exclusions and widths."""
    trie, generator = CodeTrie(torch.tensor(codes)), torch.Generator().manual_seed(seed)
    ids, mask = random_prompts(trie, 3, generator)
    choosable = torch.rand(3, len(codes), generator=generator) < 0.5
    items, scores = beam_items(tiny(trie, seed), trie, first_tokens(trie), ids, mask, choosable, beams)
    assert items.shape == scores.shape == (3, beams)
    for row in range(3):
        found = [item for item in items[row].tolist() if item >= 0]
        assert len(set(found)) == len(found) and choosable[row, found].all()
        # Each prefix that is kept has an item below it, so the beam is as wide as there are items.
        assert len(found) == min(beams, int(choosable[row].sum()))
        assert (scores[row].diff()[: len(found) - 1] <= 0).all() if len(found) > 1 else True
        assert (items[row, len(found) :] == -1).all() and scores[row, len(found) :].isneginf().all()


@pytest.mark.parametrize("beams", [1, 3])
def test_where_nothing_is_choosable_nothing_is_found(beams):
    trie, generator = CodeTrie(torch.tensor([[0, 0], [0, 1]])), torch.Generator().manual_seed(0)
    ids, mask = random_prompts(trie, 2, generator)
    nothing = torch.zeros(2, 2, dtype=torch.bool)
    items, scores = beam_items(tiny(trie, 0), trie, first_tokens(trie), ids, mask, nothing, beams)
    assert (items == -1).all() and scores.isneginf().all() and items.shape == scores.shape == (2, beams)


@pytest.mark.parametrize("name", ["tiny_llm", "tiny_v3", "tiny_v32"])
def test_a_wide_beam_ranks_like_scoring_every_code(name):
    generator = torch.Generator().manual_seed(0)
    codes = sorted({tuple(torch.randint(0, 4, (3,), generator=generator).tolist()) for _ in range(14)})
    trie = CodeTrie(torch.tensor(codes))
    model, starts = tiny(trie, 0, name), first_tokens(trie)
    ids, mask = random_prompts(trie, 2, generator)
    choosable = torch.rand(2, len(codes), generator=generator) < 0.7
    items, scores = beam_items(model, trie, starts, ids, mask, choosable, len(codes))
    for row in range(2):
        prompt, exact = ids[row][mask[row] == 1], {}
        for place in choosable[row].nonzero().flatten().tolist():
            code = torch.tensor(codes[place]) + torch.tensor(starts)
            with torch.no_grad():
                logits = model(torch.cat((prompt, code))[None]).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            exact[place] = float(logits.gather(1, code[:, None]).sum())
        ranked = sorted(exact, key=lambda place: -exact[place])
        assert items[row, : len(ranked)].tolist() == ranked
        torch.testing.assert_close(
            scores[row, : len(ranked)], torch.tensor([exact[place] for place in ranked]), rtol=1e-4, atol=1e-4
        )


def test_the_processor_lets_through_one_level_only():
    trie = CodeTrie(torch.tensor([[0, 1], [2, 0]]))
    processor = TrieLogitsProcessor(trie, 2, [2, 5], torch.tensor([[True, True]]))
    prompt = torch.tensor([[1, 4]])
    assert processor(prompt, torch.zeros(1, 7)).isfinite().nonzero()[:, 1].tolist() == [2, 4]
    assert processor(torch.tensor([[1, 4, 4]]), torch.zeros(1, 7)).isfinite().nonzero()[:, 1].tolist() == [5]
    assert not processor(torch.tensor([[1, 4, 6]]), torch.zeros(1, 7)).isfinite().any()


def test_codes_that_make_no_trie_are_refused():
    with pytest.raises(ValueError, match="in order and all different"):
        CodeTrie(torch.tensor([[1, 0], [1, 0]]))
    with pytest.raises(ValueError, match="don't fit into 63 bits"):
        CodeTrie(torch.tensor([[2**32, 2**32]]))
