"""Sparse attention: the indexer against its formula, the three forms of attention against each other and the formula,
the choice among equal scores, what is gathered and what is never made, and scores that a loss can use."""

import contextlib
from collections.abc import Iterator
from unittest import mock

import pytest
import torch
from torch import nn
from transformers.cache_utils import DynamicCache, StaticCache

from configuration_deepseek import preset
from modeling_deepseek import DeepSeekForCausalLM, attention_dsa
from modeling_deepseek.attention_dsa import DeepSeekSparseAttention
from modeling_deepseek.indexer import DeepSeekIndexer, select_keys
from modeling_deepseek.rope import DeepSeekRotaryEmbedding
from tests.modeling.conftest import outputs, tiny, token_ids
from tests.modeling.test_attention import DECODES, REPLACEMENTS, YARN, NewTensors, causal_mask, decode, lora
from tests.reference.attention import dsa
from tests.reference.compare import assert_close, assert_same_gradients, relative_error, twin
from tests.reference.indexer import chosen_keys, index_scores

IMPLEMENTATIONS = ["eager", "sdpa"]
ODD = {
    "num_attention_heads": 3,
    "q_lora_rank": 13,
    "kv_lora_rank": 11,
    "qk_nope_head_dim": 7,
    "qk_rope_head_dim": 6,
    "v_head_dim": 5,
    "index_n_heads": 5,
    "index_head_dim": 9,
    "index_topk": 3,
}
VARIANTS = {
    "plain": {},
    "odd": ODD,
    "yarn": YARN,
    "bias": {"attention_bias": True},
    "rotary part only": {"index_head_dim": 8},
    "two keys": {"index_topk": 2},
    "all keys but one": {"index_topk": 8},
    "every key": {"index_topk": 9},
}


def randomised(module: nn.Module) -> nn.Module:
    """Weights at which every one of them shows in the output."""
    for key, parameter in module.named_parameters():
        nn.init.normal_(parameter, mean=float("norm.weight" in key), std=0.3)
    return module


def indexer_inputs(config, length: int = 9) -> tuple:
    """A layer's input, query latents, and positions."""
    x = torch.randn(2, length, config.hidden_size, requires_grad=True)
    latent = torch.randn(2, length, config.q_lora_rank, requires_grad=True)
    return x, latent, DeepSeekRotaryEmbedding(config)(x, torch.arange(length)[None])


# Scores and choice ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["plain", "odd", "yarn", "rotary part only"])
def test_scores_against_the_formula(name: str):
    torch.manual_seed(1)
    config = preset("tiny_v32", **VARIANTS[name])
    indexer = randomised(DeepSeekIndexer(config))
    weights = {key: twin(parameter) for key, parameter in indexer.named_parameters()}
    x, latent, positions = indexer_inputs(config)
    ours = indexer(x, latent, positions, indexer.keys(x, positions))
    rows = zip(x.detach().double(), latent.detach().double(), strict=True)
    expected = torch.stack([index_scores(*row, weights, config.to_dict()) for row in rows])
    leaves = {key: (indexer.get_parameter(key), weights[key]) for key in weights}
    assert_same_gradients(ours, expected, leaves)
    assert torch.autograd.grad(ours.sum(), (x, latent), allow_unused=True) == (None, None), "inputs are detached"


def test_the_hadamard_rotation_of_the_released_code_changes_no_score():
    torch.manual_seed(1)
    config = preset("tiny_v32", index_head_dim=16)
    weights = {key: twin(parameter) for key, parameter in randomised(DeepSeekIndexer(config)).named_parameters()}
    x, latent, _ = indexer_inputs(config)
    row = x[0].detach().double(), latent[0].detach().double(), weights, config.to_dict()
    assert_close(index_scores(*row, rotated=True), index_scores(*row), "rotated scores", tolerance=1e-12)


def test_scores_stay_float32_in_a_bfloat16_model():
    config = preset("tiny_v32")
    indexer = randomised(DeepSeekIndexer(config)).bfloat16()
    x, latent, (cos, sin) = indexer_inputs(config)
    half = x.bfloat16(), latent.bfloat16(), (cos.bfloat16(), sin.bfloat16())
    scores = indexer(*half, indexer.keys(half[0], half[2]))
    assert scores.dtype == indexer.weights_proj(half[0]).dtype == torch.float32


@pytest.mark.parametrize("length", [1, 7, 63])
def test_the_choice_among_equal_scores_is_the_later(length: int):
    values = torch.tensor([0.0, -0.0, 1.5, -1.5, 3e-45, -3e-45, 1e38, -1e38, float("-inf")])
    picks = torch.randint(0, len(values), (50, length), generator=torch.Generator().manual_seed(1))
    scores = values[picks]
    for count in {1, length // 2 or 1, length}:
        ours = select_keys(scores, count).sort(-1).values
        assert ours.tolist() == [chosen_keys(row, count) for row in scores.tolist()]


def test_the_choice_among_random_scores_is_topk():
    scores = torch.randn(20, 301, generator=torch.Generator().manual_seed(1))
    assert torch.equal(select_keys(scores, 17).sort(-1).values, scores.topk(17).indices.sort(-1).values)


# Forms ---------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def form(word: str, chunk_elements: int | None = None) -> Iterator[mock.Mock]:
    """Makes layers with something to select gather or mask, whatever is cheaper; yields the calls of gathering."""
    gathered = DeepSeekSparseAttention.attend_gathered
    chunks = chunk_elements or attention_dsa.CHUNK_ELEMENTS
    decides = mock.patch.object(DeepSeekSparseAttention, "gathering_is_cheaper", return_value=word == "gathered")
    counts = mock.patch.object(DeepSeekSparseAttention, "attend_gathered", autospec=True, side_effect=gathered)
    with decides, counts as calls, mock.patch.object(attention_dsa, "CHUNK_ELEMENTS", chunks):
        yield calls


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", VARIANTS)
def test_against_the_formulas(name: str, implementation: str):
    torch.manual_seed(1)
    config = preset("tiny_v32", **VARIANTS[name])
    config._attn_implementation = implementation
    attention = randomised(DeepSeekSparseAttention(config, layer_idx=0))
    weights = {key: twin(parameter) for key, parameter in attention.named_parameters()}
    x = torch.randn(1, 9, config.hidden_size, requires_grad=True)
    copy = twin(x)
    positions, mask = DeepSeekRotaryEmbedding(config)(x, torch.arange(9)[None]), causal_mask(9)
    expected = dsa(copy[0], weights, config.to_dict())[None]
    leaves = {key: (attention.get_parameter(key), weights[key]) for key in weights if "indexer" not in key}
    assert_same_gradients(attention(x, positions, mask)[0], expected, {"x": (x, copy), **leaves})
    for given in (mask, None)[: 1 if implementation == "eager" else 2]:
        assert_close(attention(x, positions, given)[0], expected, "masked")
        with torch.no_grad(), form("gathered") as calls:
            assert_close(attention(x, positions, given)[0], expected, "gathered")
        assert calls.call_count == (name != "every key")


def left_padded(length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Three rows of ids, of which the later begin with padding, and their mask."""
    ids, mask = token_ids(3, length), torch.ones(3, length, dtype=torch.long)
    mask[1, :4], mask[2, :9] = 0, 0
    return ids.masked_fill(mask == 0, 2), mask


@pytest.mark.parametrize("chunk_elements", [None, 1, 20_000], ids=["whole", "query by query", "some queries"])
@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@torch.no_grad()
def test_gathered_equals_masked(implementation: str, side: str, chunk_elements: int | None):
    model = tiny("tiny_v32")
    model.set_attn_implementation(implementation)
    ids, mask = left_padded(31)
    arguments = {"none": {}, "left": {"attention_mask": mask}, "right": {"attention_mask": mask.flip(1)}}[side]
    seen = torch.ones_like(mask) if side == "none" else arguments["attention_mask"]
    with form("masked") as calls:
        expected = outputs(model, ids, **arguments)
    assert calls.call_count == 0
    with form("gathered", chunk_elements) as calls:
        assert_close(outputs(model, ids, **arguments)[seen.bool()], expected[seen.bool()], "prompt")
        assert calls.call_count == 3
        cache, pieces, end = DynamicCache(config=model.config), [], 0
        for piece in ids.split([3, 14, 1, 1, 3, 9], dim=1):
            end += piece.shape[1]
            given = {key: value[:, :end] for key, value in arguments.items()}
            pieces.append(outputs(model, piece, cache=cache, **given))
        assert calls.call_count == 3 + 5 * 3
    assert_close(torch.cat(pieces, dim=1)[seen.bool()], expected[seen.bool()], "in pieces")


@torch.no_grad()
def test_attention_weights_of_gathered_attention():
    model = tiny("tiny_v32")
    model.set_attn_implementation("eager")
    ids = token_ids(2, 13)
    with form("masked"):
        expected = model(ids, output_attentions=True).attentions
    with form("gathered", 3_000):
        ours = model(ids, output_attentions=True).attentions
    for layer, (a, b) in enumerate(zip(ours, expected, strict=True)):
        assert_close(a, b, f"attention weights of layer {layer}")
        assert (a > 0).sum(-1).max() == 5


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
@torch.no_grad()
def test_masks_of_single_heads_are_honoured(dtype: torch.dtype):
    """A ready mask [B, H, S, T] that hides other keys from each head, and adds to scores if it is no boolean one."""
    torch.manual_seed(1)
    config = preset("tiny_v32")
    config._attn_implementation = "sdpa" if dtype == torch.bool else "eager"
    attention = randomised(DeepSeekSparseAttention(config, layer_idx=0)).eval()
    x = torch.randn(2, 13, config.hidden_size)
    positions = DeepSeekRotaryEmbedding(config)(x, torch.arange(13)[None])
    mask = torch.rand(2, 4, 13, 13) < 0.7
    mask = (mask | torch.eye(13, dtype=torch.bool)) & torch.ones(13, 13, dtype=torch.bool).tril()
    if dtype != torch.bool:
        mask = torch.randn(mask.shape).masked_fill(~mask, torch.finfo(dtype).min)
    with form("masked"):
        expected, _ = attention(x, positions, mask)
    with form("gathered", 4_000):
        assert_close(attention(x, positions, mask)[0], expected, "gathered with a mask per head")


@torch.no_grad()
def test_the_cheaper_form_is_taken():
    torch.manual_seed(1)
    model = tiny("tiny_v32", num_hidden_layers=1)
    with mock.patch.object(DeepSeekSparseAttention, "attend_gathered", autospec=True) as gathered:
        gathered.side_effect = lambda self, query, *args, **kwargs: (query.new_zeros(1, query.shape[2], 4, 10), None)
        for length, gathers in ((5, False), (6, False), (31, True)):
            outputs(model, token_ids(1, length))
            assert gathered.called == gathers, length
            gathered.reset_mock()
        cache = DynamicCache(config=model.config)
        for position in range(9):  # a decoded token gathers as soon as there is something to leave out
            outputs(model, token_ids(1, 1), cache=cache)
            assert gathered.call_count == max(0, position - 4)
        with torch.enable_grad():
            model(token_ids(1, 31))
        assert gathered.call_count == 4, "with gradients, keys are masked"


def without_indexer(model: DeepSeekForCausalLM, **overrides) -> DeepSeekForCausalLM:
    """The V3 model of the same weights."""
    dense = DeepSeekForCausalLM(preset("tiny_v3", eos_token_id=None, **overrides)).eval()
    missing, unexpected = dense.load_state_dict(model.state_dict(), strict=False)
    assert not missing and all(".indexer." in key for key in unexpected)
    return dense


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_v3_where_every_key_is_selected(implementation: str):
    model = tiny("tiny_v32", index_topk=31)
    dense = without_indexer(model)
    for either in (model, dense):
        either.set_attn_implementation(implementation)
    ids, mask = left_padded(31)
    lengths = [17, 1, 1, 3, 9]
    assert torch.equal(outputs(model, ids, attention_mask=mask), outputs(dense, ids, attention_mask=mask))
    assert torch.equal(decode(model, ids, lengths), decode(dense, ids, lengths))
    assert torch.equal(model(ids, labels=ids).loss, dense(ids, labels=ids).loss)
    ids = token_ids(1, 32)  # one key too many: the last query leaves one out
    assert relative_error(outputs(model, ids)[:, -1], outputs(dense, ids)[:, -1]) > 1e-3
    assert_close(outputs(model, ids)[:, :-1], outputs(dense, ids)[:, :-1], "queries with 31 keys or fewer")


class TestWithoutPreference:
    """An indexer whose scores are all equal selects the latest keys: V3 with a sliding window of index_topk."""

    @pytest.fixture(params=IMPLEMENTATIONS)
    def models(self, request) -> tuple[DeepSeekForCausalLM, DeepSeekForCausalLM]:
        model = tiny("tiny_v32")
        for layer in model.model.layers:
            nn.init.zeros_(layer.self_attn.indexer.weights_proj.weight)
        dense = without_indexer(model)
        for either in (model, dense):
            either.set_attn_implementation(request.param)
        return model, dense

    def window(self, dense: DeepSeekForCausalLM, ids: torch.Tensor) -> torch.Tensor:
        """V3's logits of rows without padding, each query seeing the five latest keys."""
        distance = torch.arange(ids.shape[1])[:, None] - torch.arange(ids.shape[1])
        hidden = torch.zeros(distance.shape).masked_fill((distance < 0) | (distance >= 5), torch.finfo().min)
        return outputs(dense, ids, attention_mask=hidden[None, None])

    @pytest.mark.parametrize("word", ["masked", "gathered"])
    def test_prompt_and_pieces(self, models, word: str):
        model, dense = models
        ids = token_ids(2, 21)
        with form(word):
            assert_close(outputs(model, ids), self.window(dense, ids), "prompt")
            assert_close(decode(model, ids, [13, 1, 1, 5, 1]), self.window(dense, ids), "pieces")

    @pytest.mark.parametrize("word", ["masked", "gathered"])
    @pytest.mark.parametrize("side", ["left", "right"])
    def test_padding(self, models, word: str, side: str):
        model, dense = models
        ids = token_ids(2, 21)
        pad = torch.full((2, 6), 2)
        padded = torch.cat((pad, ids) if side == "left" else (ids, pad), dim=1)
        rows = slice(6, None) if side == "left" else slice(None, 21)
        with form(word):
            ours = outputs(model, padded, attention_mask=(padded != 2).long())[:, rows]
        assert_close(ours, self.window(dense, ids), f"padded on the {side}", tolerance=5e-5)

    @pytest.mark.parametrize("word", ["masked", "gathered"])
    def test_packing(self, models, word: str):
        model, dense = models
        ids, lengths = token_ids(1, 21), [9, 12]
        positions = torch.cat([torch.arange(length) for length in lengths])[None]
        with form(word):
            ours = outputs(model, ids, position_ids=positions)
        expected = [self.window(dense, part) for part in ids.split(lengths, dim=1)]
        assert_close(ours, torch.cat(expected, dim=1), "packed")

    def test_static_cache(self, models):
        model, dense = models
        ids, cache = token_ids(2, 21), StaticCache(config=model.config, max_cache_len=40)
        with torch.no_grad():
            pieces = [model(piece, cache=cache).logits for piece in ids.split([13, 1, 1, 5, 1], dim=1)]
        assert_close(torch.cat(pieces, dim=1), self.window(dense, ids), "static cache")


# What is made and what is not ----------------------------------------------------------------------------------------

KEYS = 499  # a prime that is no other size of the model, which has more heads than its indexer
INDEX_HEADS = 2
SIZES = {"kv_lora_rank": 40, "index_n_heads": INDEX_HEADS, "index_head_dim": 11, "index_topk": 7}


def most_rows_over_all_keys(made: list[tuple[str, tuple[int, ...]]]) -> tuple[int, tuple[int, ...]]:
    """The largest number of rows that a new tensor whose last axis runs over all keys has, and its shape."""
    return max((torch.Size(shape[:-1]).numel(), shape) for _, shape in made if shape[-1:] == (KEYS,))


@pytest.mark.parametrize("batch", [1, 3])
@torch.no_grad()
def test_a_decode_step_reads_the_selected_rows_only(batch: int):
    model, ids = tiny("tiny_v32", **SIZES), token_ids(batch, KEYS)
    cache = DynamicCache(config=model.config)
    for piece in ids[:, :-1].split([KEYS - 2, 1], dim=1):  # the buffer doubles after the prompt, and then has room
        model(piece, cache=cache)
    with NewTensors() as decoding:
        model(ids[:, -1:], cache=cache)
    rows, shape = most_rows_over_all_keys(decoding.made)
    assert rows == batch * INDEX_HEADS, f"more than the indexer's scores runs over all keys: {shape}"
    large = [shape for _, shape in decoding.made if KEYS in shape[:-1] and len(shape) > 1]
    assert not large, f"the cache is copied or expanded: {large}"
    assert (batch, 7, 48) in {shape for _, shape in decoding.made}, "the selected rows are gathered"

    cache.crop(-1)
    with form("masked"), NewTensors() as masking:  # the recorder does see dense attention
        model(ids[:, -1:], cache=cache)
    assert any(KEYS in shape[:-1] and len(shape) > 1 for _, shape in masking.made)


@torch.no_grad()
def test_a_long_prompt_is_worked_off_in_chunks_of_queries():
    model, ids = tiny("tiny_v32", **SIZES), token_ids(1, KEYS)
    limit = 8 * (INDEX_HEADS * KEYS + 7 * 48)  # room for eight queries
    with mock.patch.object(attention_dsa, "CHUNK_ELEMENTS", limit), NewTensors() as prompting:
        gathered = outputs(model, ids, use_cache=False)
    rows, shape = most_rows_over_all_keys(prompting.made)
    assert rows == 8 * INDEX_HEADS, f"more than the scores of a chunk's queries runs over all keys: {shape}"
    largest = max((torch.Size(shape).numel(), name, shape) for name, shape in prompting.made)
    assert largest[0] == 97 * KEYS, f"something is larger than the logits: {largest}"

    with form("masked"), NewTensors() as masking:  # the recorder does see dense attention
        assert_close(gathered, outputs(model, ids, use_cache=False), "gathered against masked")
    assert most_rows_over_all_keys(masking.made)[0] >= KEYS


# Learning ------------------------------------------------------------------------------------------------------------


def imitation_loss(index_scores: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """KL of the attention summed over heads from the softmax of the index scores, over what is before a query."""
    visible = torch.ones(weights.shape[-2:], dtype=torch.bool).tril(weights.shape[-1] - weights.shape[-2])
    target = weights.detach().sum(1)
    target = target / target.sum(-1, keepdim=True)
    logits = index_scores.masked_fill(~visible, float("-inf")).log_softmax(-1).masked_fill(~visible, 0)
    return (torch.xlogy(target, target) - target * logits).sum(-1).mean()


@pytest.mark.parametrize("length", [4, 13], ids=["every key", "some keys"])
@pytest.mark.parametrize("recompute", [False, True], ids=["", "recomputed"])
def test_a_loss_on_the_scores_teaches_the_indexers_and_nothing_else(length: int, recompute: bool):
    model = tiny("tiny_v32").train()
    model.set_attn_implementation("eager")
    if recompute:
        model.activation_checkpointing_enable({"use_reentrant": False})
    ids = token_ids(3, length)

    def loss() -> torch.Tensor:
        result = model.model(ids, output_index_scores=True, output_attentions=True)
        pairs = zip(result.index_scores, result.attentions, strict=True)
        assert [tuple(scores.shape) for scores in result.index_scores] == [(3, length, length)] * 3
        return sum(imitation_loss(*pair) for pair in pairs)

    before = loss()
    before.backward()
    learning = {key for key, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert learning == {key for key, _ in model.named_parameters() if ".indexer." in key}
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 3e-4 * parameter.grad
        if length <= model.config.index_topk:  # else other keys are selected, and what is imitated changes too
            assert loss() < before


def test_asking_for_scores_changes_nothing_else():
    model, ids = tiny("tiny_v32"), token_ids(2, 13)
    asked = model.model(ids, output_index_scores=True)
    assert torch.equal(asked.last_hidden_state, model.model(ids).last_hidden_state)
    assert "index_scores" not in model.model(ids)
    loss = model(ids, labels=ids).loss
    for layer in model.model.layers:
        gradients = torch.autograd.grad(
            loss, list(layer.self_attn.indexer.parameters()), allow_unused=True, retain_graph=True
        )
        assert set(gradients) == {None}


@torch.no_grad()
def test_scores_of_decoded_tokens():
    model, ids = tiny("tiny_v32"), token_ids(2, 13)
    whole = model.model(ids, output_index_scores=True).index_scores
    cache = model.model(ids[:, :9]).cache
    with form("gathered"):
        ours = model.model(ids[:, 9:], cache=cache, output_index_scores=True).index_scores
    for a, b in zip(ours, whole, strict=True):
        assert_close(a, b[:, 9:], "scores of the last four")


# What stands around --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", DECODES)
@pytest.mark.parametrize("name", ["rounded", "biased", "hooked", "hooked before", "offloaded model"])
def test_decode_honours_what_stands_for_kv_b_proj(name: str, way: str):
    """By hand, rows gather only if they are more than the latent is wide (16), as the last piece's."""
    change, absorbs, tolerance = REPLACEMENTS[name]
    model, lengths = tiny("tiny_v32"), [13, 1, 1, 3]
    ids = token_ids(2, sum(lengths))
    before = outputs(model, ids)
    change(model)
    with mock.patch.object(
        DeepSeekSparseAttention, "attend_gathered", autospec=True, side_effect=DeepSeekSparseAttention.attend_gathered
    ) as gathered:
        ours = DECODES[way](model, ids, lengths)
    assert gathered.call_count == (0 if not absorbs else 12 if way == "in generate" else 3)
    with form("masked"):
        expected = outputs(model, ids)
    if name != "offloaded model":
        assert relative_error(before, expected) > 1e-3, "the change changes nothing"
    assert_close(ours, expected, "decode against masked attention", tolerance)


def test_decode_honours_adapters_on_attention_and_indexer():
    from peft import get_peft_model

    config = lora()
    config.target_modules |= {"wq_b", "wk", "weights_proj"}
    model, lengths = get_peft_model(tiny("tiny_v32"), config).eval(), [13, 1, 1, 3]
    ids = token_ids(2, sum(lengths))
    with form("masked"), torch.no_grad():
        expected = model(ids).logits
    assert relative_error(outputs(tiny("tiny_v32"), ids), expected) > 1e-2
    assert_close(decode(model, ids, lengths), expected, "decode against masked attention")
    merged = model.merge_and_unload()
    assert_close(decode(merged, ids, lengths), expected, "merged")


@pytest.mark.parametrize("word", ["flash_attention_2", "flex_attention"])
def test_kernels_without_a_mask_are_refused(word: str):
    config = preset("tiny_v32")
    attention = DeepSeekSparseAttention(config, layer_idx=0)
    config._attn_implementation = word
    x = torch.randn(1, 13, config.hidden_size)
    positions = DeepSeekRotaryEmbedding(config)(x, torch.arange(13)[None])
    for mask in (torch.ones(1, 13), object()):
        with pytest.raises(ValueError, match=f"attn_implementation='{word}' takes no mask .* use 'sdpa' or 'eager'"):
            attention(x, positions, mask)
