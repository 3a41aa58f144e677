"""Compressed attention against its formulas and transformers' own; where that is wrong, against no padding at all."""

import inspect

import pytest
import torch
from torch import nn
from transformers import DynamicCache, StaticCache
from transformers.masking_utils import create_sliding_window_causal_mask
from transformers.models.deepseek_v4 import modeling_deepseek_v4 as native
from transformers.models.deepseek_v4.configuration_deepseek_v4 import DeepseekV4Config

from configuration_deepseek import DeepSeekConfig
from modeling_deepseek import attention_compressed
from modeling_deepseek.cache_compressed import layer_of
from modeling_deepseek.modeling_deepseek import ATTENTIONS
from modeling_deepseek.rope import DeepSeekRotaryEmbedding, without_entries
from modeling_deepseek.row_tokens import row_tokens
from tests.reference.compare import assert_close, assert_same_gradients, twin
from tests.reference.compressed_attention import compressed_attention

WORDS = {"swa": 0, "hca": 8, "csa": 4}
SIZES = {
    **{"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "head_dim": 16},
    **{"q_lora_rank": 24, "o_groups": 2, "o_lora_rank": 12, "sliding_window": 6, "max_position_embeddings": 128},
    # so many index heads that scores which tie at zero are rare
    **{"index_n_heads": 30, "index_head_dim": 12, "index_topk": 3},
    **{"n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 3, "moe_intermediate_size": 20},
}
YARN = {
    "rope_type": "yarn",
    "factor": 16.0,
    "original_max_position_embeddings": 8,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
}
CACHE_WORD = {"cache", "past_key_values"} & set(inspect.signature(native.DeepseekV4Attention.forward).parameters)


def config_of(implementation: str = "eager", **changes) -> DeepSeekConfig:
    fields = {
        **SIZES,
        **{"compress_ratios": list(WORDS.values()), "compress_rope_theta": 160000.0, "qk_rope_head_dim": 8},
        **{"rope_parameters": {**YARN, "rope_theta": 10000.0}},
        **{"scoring_func": "sqrtsoftplus", "topk_method": "noaux_tc", "norm_topk_prob": True},
    }
    config = DeepSeekConfig(**{**fields, **changes})
    config._attn_implementation = implementation
    return config


def randomised(module: nn.Module) -> nn.Module:
    """Weights at which each of them shows in the output."""
    torch.manual_seed(3)
    for name, parameter in module.named_parameters():
        nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.3)
    return module.eval()


def attention(word: str, implementation: str = "eager", **changes) -> nn.Module:
    return randomised(ATTENTIONS[word](config_of(implementation, **changes), list(WORDS).index(word)))


def states(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, 32, generator=torch.Generator().manual_seed(seed))


def run(module, x, mask=None, positions=None, cache=None, **kwargs):
    """One call, as the model makes it."""
    layer = None if cache is None else layer_of(cache, module.layer_idx)
    tokens = row_tokens(mask, positions, x.shape[:2], x.device, layer)
    if positions is None:
        positions = torch.arange(tokens.seen, tokens.seen + x.shape[1])[None]
    main = DeepSeekRotaryEmbedding(without_entries(module.config))(x, positions)
    return module(x, main, tokens, positions, cache=cache, **kwargs)[0]


def in_pieces(module, x, lengths, mask=None, positions=None, cache=None):
    """Calls on consecutive pieces, with one cache."""
    cache, outputs, end = DynamicCache() if cache is None else cache, [], 0
    for piece in x.split(lengths, dim=1):
        end += piece.shape[1]
        seen = None if mask is None else mask[:, :end]
        at = None if positions is None else positions[:, end - piece.shape[1] : end]
        outputs.append(run(module, piece, seen, at, cache))
    return torch.cat(outputs, dim=1)


every_word = pytest.mark.parametrize("word", WORDS)
every_implementation = pytest.mark.parametrize("implementation", ["eager", "sdpa"])


@pytest.fixture(autouse=True)
def chunks_of_eight(monkeypatch):
    monkeypatch.setattr(attention_compressed, "CHUNK", 8)


# The formulas --------------------------------------------------------------------------------------------------------

VARIANTS = {
    "plain": {},
    "default rope": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    "odd": {"num_attention_heads": 3, "o_groups": 3, "head_dim": 10, "qk_rope_head_dim": 6},
    "one group": {"o_groups": 1, "index_topk": 1, "sliding_window": 1, "rms_norm_eps": 0.1},
    "whole heads rotate": {"qk_rope_head_dim": 12, "head_dim": 12, "sliding_window": 40},
    "other ratios": {"compress_ratios": [0, 5, 3], "layer_specs": [["swa", "moe"], ["hca", "moe"], ["csa", "moe"]]},
}


@pytest.mark.parametrize("name", VARIANTS)
@every_word
def test_outputs_and_gradients_are_those_of_the_formulas(word, name):
    module = attention(word, **{"index_n_heads": 5, **VARIANTS[name]})
    ratio = module.config.compress_ratios[module.layer_idx]
    x = states(1, 19).requires_grad_()
    # the indexer chooses, and a choice has no gradient
    named = {key: p for key, p in module.named_parameters() if not key.startswith("indexer.")}
    twins = {key: twin(p) for key, p in module.named_parameters()} | {"x": twin(x[0])}
    expected = compressed_attention(twins["x"], twins, module.config.to_dict(), word, ratio)
    leaves = {key: (p, twins[key]) for key, p in named.items()}
    assert_same_gradients(run(module, x)[0], expected, leaves)


# transformers' own ---------------------------------------------------------------------------------------------------

RENAMES = (
    *(
        ("compressor.indexer.scorer.weights_proj", "indexer.weights_proj"),
        ("compressor.indexer.q_b_proj", "indexer.wq_b"),
    ),
    *(
        ("compressor.indexer.", "indexer.compressor."),
        ("q_a_proj", "wq_a"),
        ("q_a_norm", "q_norm"),
        ("q_b_proj", "wq_b"),
    ),
    *(("compressor.kv_norm", "compressor.norm"), ("kv_proj", "wkv"), ("gate_proj", "wgate"), ("position_bias", "ape")),
    *(("o_a_proj", "wo_a"), ("o_b_proj", "wo_b"), ("sinks", "attn_sink")),
)


def native_attention(word: str) -> nn.Module:
    kinds = ["sliding_attention", "heavily_compressed_attention", "compressed_sparse_attention"]
    rates = {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8}
    fields = {**SIZES, "layer_types": kinds, "compress_rates": rates, "mlp_layer_types": ["moe"] * 3}
    config = DeepseekV4Config(**fields, partial_rotary_factor=0.5, rope_parameters=dict(YARN))
    config._attn_implementation = "eager"
    return randomised(native.DeepseekV4Attention(config, list(WORDS).index(word)).float())


@every_implementation
@every_word
@torch.no_grad()
def test_equal_to_transformers_in_one_call_and_in_pieces(word, implementation):
    theirs, ours = native_attention(word), attention(word, implementation)
    weights = {}
    for key, weight in theirs.state_dict().items():
        for old, new in RENAMES:
            key = key.replace(old, new)
        weights[key] = weight
    ours.load_state_dict(weights)
    x = states(2, 41)
    rotary, positions = native.DeepseekV4RotaryEmbedding(theirs.config), torch.arange(41)[None]
    rotations = {kind: rotary(x, position_ids=positions, layer_type=kind) for kind in ("main", "compress")}
    asked = {"config": theirs.config, "inputs_embeds": x, "attention_mask": None, "position_ids": positions}
    none = dict.fromkeys(CACHE_WORD)
    mask = create_sliding_window_causal_mask(**asked, **none)
    expected, weights = theirs(x, position_embeddings=rotations, position_ids=positions, attention_mask=mask, **none)
    assert_close(run(ours, x), expected)
    for lengths in ([13, 1, 1, 1, 1, 1, 1, 7, 15], [1] * 41, [5, 36]):
        assert_close(in_pieces(ours, x, lengths), expected, f"in pieces of {lengths}")
    if implementation == "eager":
        tokens = row_tokens(None, None, (2, 41), x.device, None)
        assert_close(ours(x, rotations["main"], tokens, positions)[1], weights, "attention weights")


# What is wrong there -------------------------------------------------------------------------------------------------


def scattered(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The tokens of x [B, S, D] at the ones of a mask [B, T], large numbers elsewhere."""
    spread = torch.full((*mask.shape, x.shape[-1]), 9.0)
    for row, own, tokens in zip(spread, mask, x, strict=True):
        row[own.bool()] = tokens[: own.sum()]
    return spread


@every_implementation
@every_word
@pytest.mark.parametrize("pads", [(0, 1), (3, 0), (4, 5), (8, 13)], ids=str)
@torch.no_grad()
def test_left_padding_of_any_width_changes_nothing(word, implementation, pads):
    module, x, length = attention(word, implementation), states(2, 33), 33 + max(pads)
    mask = torch.ones(2, length, dtype=torch.long)
    for row, pad in zip(mask, pads, strict=True):
        row[:pad] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    lengths = [length - 24, 1, 1, 1, 13, *[1] * 8]
    x = states(2, length)
    padded = scattered(x, mask)
    for got in (run(module, padded, mask, positions), in_pieces(module, padded, lengths, mask, positions)):
        for row, own, tokens in zip(got, mask.bool(), x, strict=True):
            assert_close(row[own], run(module, tokens[None, : own.sum()])[0])


@every_word
@torch.no_grad()
def test_padding_between_calls_and_on_the_right_changes_nothing(word):
    """As when turns of a chat, of different lengths, are appended to a batch."""
    module, x = attention(word), states(2, 50)
    mask = torch.ones(2, 50, dtype=torch.long)
    mask[0, 20:27] = mask[0, 40:42] = mask[1, 10:13] = mask[1, 33:42] = mask[1, 49:] = 0
    positions = mask.cumsum(-1) - 1
    got = in_pieces(module, scattered(x, mask), [22, 3, 12, 13], mask, positions)
    for row, own, tokens in zip(got, mask.bool(), x, strict=True):
        assert_close(row[own], run(module, tokens[None, : own.sum()])[0])


@every_implementation
@every_word
@torch.no_grad()
def test_packed_documents_equal_separate_ones_and_the_last_goes_on(word, implementation):
    module, x, lengths = attention(word, implementation), states(2, 41), (17, 3, 21)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    separate = torch.cat([run(module, part) for part in x.split(lengths, dim=1)], dim=1)
    assert_close(run(module, x, positions=positions), separate)
    assert_close(run(module, x, torch.ones(2, 41, dtype=torch.long), positions), separate)
    assert_close(in_pieces(module, x, [30, 1, 1, 9], positions=positions), separate)


@every_word
def test_gradients_under_padding_are_those_without(word):
    module, x = attention(word), states(1, 21)
    mask = torch.cat((torch.zeros(1, 5), torch.ones(1, 21)), dim=1).long()
    gradients = []
    for got in (run(module, x), run(module, scattered(x, mask), mask, (mask.cumsum(-1) - 1).clamp(min=0))[:, 5:]):
        module.zero_grad()
        (got * states(1, 21, seed=5)).sum().backward()
        gradients.append({key: p.grad.clone() for key, p in module.named_parameters() if p.grad is not None})
    for key, gradient in gradients[0].items():
        assert_close(gradients[1][key], gradient, key)


@torch.no_grad()
def test_a_row_that_is_all_padding_is_finite():
    for word in WORDS:
        mask = torch.tensor([[0] * 9, [1] * 9])
        assert run(attention(word), states(2, 9), mask, (mask.cumsum(-1) - 1).clamp(min=0)).isfinite().all()


# The cache -----------------------------------------------------------------------------------------------------------


@every_word
@torch.no_grad()
def test_tokens_are_taken_back_where_the_past_is_recorded(word):
    module, x = attention(word), states(2, 40)
    expected, cache = run(module, x), DynamicCache()
    run(module, x[:, :20], cache=cache)
    cache.activate_past_recording()
    for start in range(20, 40, 4):
        guesses = torch.cat((x[:, start : start + 2], states(2, 5, seed=start)), dim=1)
        run(module, guesses, cache=cache)
        cache.crop(-5)
        got = run(module, x[:, start + 2 : start + 4], cache=cache)
        cache.crop(0)
        assert_close(got, expected[:, start + 2 : start + 4])
    assert cache.layers[module.layer_idx].rolls["keys"].shape[1] == 13  # the window less one, and the spare ones
    with pytest.raises(ValueError, match="30 tokens cannot be taken back from a cache of compressed attention"):
        cache.crop(-30)


@every_word
@torch.no_grad()
def test_rows_of_a_cache_are_repeated_chosen_and_reordered(word):
    module, x = attention(word), states(3, 24)
    mask = torch.ones(3, 24, dtype=torch.long)
    mask[0, :5] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    for own, at in ((None, None), (mask, positions)):
        first = None if own is None else own[:, :20]
        cache = DynamicCache()
        whole = run(module, x, own, at)[:, 20:]
        run(module, x[:, :20], first, None if at is None else at[:, :20], cache)
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([0, 3, 4, 5]))
        cache.reorder_cache(torch.tensor([3, 0, 1]))
        order = [2, 0, 1]
        got = run(
            module,
            x[order, 20:],
            None if own is None else own[order],
            None if at is None else at[order, 20:],
            cache,
        )
        assert_close(got, whole[order])


@torch.no_grad()
def test_what_is_cached_is_a_window_pending_rows_and_entries():
    for word, ratio in WORDS.items():
        module, cache = attention(word), DynamicCache()
        for piece in states(2, 100).split([90, *[1] * 10], dim=1):
            run(module, piece, cache=cache)
        layer = cache.layers[module.layer_idx]
        shapes = {name: tuple(roll.shape) for name, roll in layer.rolls.items()}
        entries = {name: tuple(entry.data[:, : 100 // ratio].shape) for name, entry in layer.entries.items()}
        assert shapes["keys"] == (2, 13, 16) and cache.get_seq_length(module.layer_idx) == 100
        assert shapes.get("compressor") == {"swa": None, "hca": (2, 15, 32), "csa": (2, 15, 64)}[word]
        assert entries.get("compressor") == {"swa": None, "hca": (2, 12, 16), "csa": (2, 25, 16)}[word]
        assert (shapes.get("indexer"), entries.get("indexer")) == (
            ((2, 15, 48), (2, 25, 12)) if word == "csa" else (None, None)
        )
        cache.reset()
        assert cache.get_seq_length(module.layer_idx) == 0
        assert_close(run(module, states(2, 9), cache=cache), run(module, states(2, 9)))


def test_what_cannot_be_is_refused_in_one_line():
    module, x = attention("csa"), states(1, 5)
    with pytest.raises(ValueError, match="attention_mask has 4 dimensions, but compressed attention counts"):
        run(module, x, torch.ones(1, 1, 5, 5))
    with pytest.raises(ValueError, match="compressed attention has no static cache"):
        StaticCache(config=config_of(), max_cache_len=9)
    filled = DynamicCache()
    filled.update(torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 2, 4), 2)
    with pytest.raises(ValueError, match="layer 2 of the cache is a DynamicLayer, which cannot hold the entries"):
        run(module, x, cache=filled)
    with pytest.raises(ValueError, match="attn_implementation='flex_attention' has no form for keys and entries"):
        run(attention("csa", "flex_attention"), x)


# The indexer's scores ------------------------------------------------------------------------------------------------


def test_index_scores_teach_the_indexer_alone():
    module, x = attention("csa"), states(2, 21)
    scores: list[torch.Tensor] = []
    module.indexer.register_forward_hook(lambda module, args, output: scores.append(output))
    run(module, x.requires_grad_(), output_index_scores=True)
    assert scores[0].shape == (2, 21, 5)
    scores[0].sum().backward()
    learns = {key for key, p in module.named_parameters() if p.grad is not None and p.grad.any()}
    assert learns == {key for key, _ in module.named_parameters() if key.startswith("indexer.")} and x.grad is None
