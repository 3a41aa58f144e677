"""Attention and experts implementations: chosen in every way that transformers offers, and really run."""

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from configuration_deepseek import preset
from modeling_deepseek import DeepSeekForCausalLM, attention_core
from modeling_deepseek.attention_compressed import SINK_WIDTH
from modeling_deepseek.moe import DeepSeekExperts
from tests.modeling.conftest import TINY, outputs, tiny, token_ids
from tests.reference.compare import assert_close

MOE = [name for name in TINY if name != "tiny_llm"]
EVEN = {"moe_intermediate_size": 16}  # widths that grouped_mm takes


@pytest.fixture
def calls(monkeypatch):
    """Words of the attention and experts functions that ran, in order."""
    ran = []

    def spy(word, function):
        def wrapper(*args, **kwargs):
            ran.append(word)
            return function(*args, **kwargs)

        return wrapper

    monkeypatch.setattr(attention_core, "eager_attention", spy("eager", attention_core.eager_attention))
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", spy("sdpa", ALL_ATTENTION_FUNCTIONS["sdpa"]))
    for word in ("batched_mm", "grouped_mm"):
        monkeypatch.setitem(ALL_EXPERTS_FUNCTIONS._global_mapping, word, spy(word, ALL_EXPERTS_FUNCTIONS[word]))
    monkeypatch.setattr(DeepSeekExperts, "one_expert", spy("eager experts", DeepSeekExperts.one_expert))
    return ran


def ran_attention(calls):
    return set(calls) & {"eager", "sdpa"}


def ran_experts(calls):
    return set(calls) & {"eager experts", "batched_mm", "grouped_mm"}


@pytest.mark.parametrize("word", ["eager", "sdpa"])
@pytest.mark.parametrize("way", ["set", "load", "auto", "config"])
def test_attention_implementation(name, word, way, calls, tmp_path):
    model = tiny(name)
    if way == "set":
        model.set_attn_implementation(word)
    elif way == "config":
        model = DeepSeekForCausalLM(preset(name, attn_implementation=word))
    else:
        model.save_pretrained(tmp_path)
        loader = DeepSeekForCausalLM if way == "load" else AutoModelForCausalLM
        model = loader.from_pretrained(tmp_path, attn_implementation=word)
    outputs(model.eval(), token_ids(2, 5))  # training may go by hand-written passes
    assert ran_attention(calls) == {word} and model.config._attn_implementation == word


@pytest.mark.parametrize("name", MOE, indirect=True)
@pytest.mark.parametrize("word", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("way", ["set", "load", "auto"])
def test_experts_implementation(name, word, way, calls, tmp_path):
    model = tiny(name, **EVEN)
    if way == "set":
        model.set_experts_implementation(word)
    else:
        model.save_pretrained(tmp_path)
        loader = DeepSeekForCausalLM if way == "load" else AutoModelForCausalLM
        model = loader.from_pretrained(tmp_path, experts_implementation=word)
    outputs(model, token_ids(2, 5))
    assert ran_experts(calls) == {"eager experts" if word == "eager" else word}


@pytest.mark.parametrize(("width", "expected"), [(16, "grouped_mm"), (20, "eager experts"), (24, "grouped_mm")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, "bfloat16"], ids=str)
def test_default_experts_implementation_fits_the_widths(width, expected, dtype, calls):
    model = DeepSeekForCausalLM._from_config(preset("tiny_v3", moe_intermediate_size=width, dtype=dtype))
    outputs(model.eval().to(torch.bfloat16), token_ids(2, 5))
    assert ran_experts(calls) == {expected}


def test_implementations_agree(name, head):
    model, ids = tiny(name, head, **({} if name == "tiny_llm" else EVEN)), token_ids(2, 9)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    model.set_attn_implementation("eager")
    expected = outputs(model, ids, attention_mask=mask)
    rows = slice(None) if expected.ndim == 2 else (mask.bool())
    for attention in ("eager", "sdpa"):
        model.set_attn_implementation(attention)
        for experts in ("eager", "batched_mm", "grouped_mm"):
            model.set_experts_implementation(experts)
            got = outputs(model, ids, attention_mask=mask)
            assert_close(got[rows], expected[rows], f"{attention}, {experts}")


@pytest.mark.parametrize("word", ["sdap", "flash_attention_9"])
def test_unknown_attention_implementation_is_refused(word):
    with pytest.raises(ValueError, match=word):
        tiny("tiny_v3").set_attn_implementation(word)


def test_unknown_experts_implementation_is_refused():
    with pytest.raises(ValueError, match="nonsense"):
        tiny("tiny_v3").set_experts_implementation("nonsense")


@pytest.fixture
def foreign(monkeypatch):
    """An attention kernel as flash and flex kernels are called: keys as wide as queries, one width for the values.

    Yields the shapes of (query, key, value) of its calls.
    """
    shapes = []

    def kernel(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
        shapes.append((tuple(query.shape), tuple(key.shape), tuple(value.shape)))
        assert module.is_causal and isinstance(module.num_key_value_groups, int)
        return ALL_ATTENTION_FUNCTIONS["sdpa"](
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "foreign", kernel)
    monkeypatch.setitem(ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, "foreign", sdpa_mask)
    return shapes


def test_foreign_kernels_get_expanded_heads_of_one_width(name, foreign):
    model, ids = tiny(name), token_ids(2, 7)
    expected = model.generate(ids, max_new_tokens=4, do_sample=False)
    model.set_attn_implementation("foreign")
    assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), expected)
    layers = model.config.num_hidden_layers
    assert len(foreign) == 4 * layers
    heads, kv_heads = model.config.num_attention_heads, model.config.num_key_value_heads
    width = model.config.qk_head_dim if model.config.kv_lora_rank else model.config.head_dim
    if model.config.compress_ratios is not None:  # a sink beside the keys makes rows wider
        assert {row[-1] for shapes in foreign for row in shapes} == {width + SINK_WIDTH}
        assert [shapes[0][2] for shapes in foreign] == [7] * layers + [1] * 3 * layers
        return
    for call, (query, key, value) in enumerate(foreign):
        step = call // layers
        assert query == (2, heads, 7 if step == 0 else 1, width)
        assert key == (2, kv_heads, 7 + step, width)
        assert value == key, "kernels of one width only must be able to decode"


@pytest.mark.parametrize("word", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["tiny_v2_lite", "tiny_v3"], indirect=True)
def test_absorbed_decode_hands_over_the_cached_rows_themselves(name, word, monkeypatch):
    model = tiny(name)
    model.set_attn_implementation(word)
    handed = []

    def spy(module, query, key, value, *args, **kwargs):
        handed.append((key.data_ptr(), value.data_ptr()))
        return original(module, query, key, value, *args, **kwargs)

    original = attention_core.eager_attention if word == "eager" else ALL_ATTENTION_FUNCTIONS["sdpa"]
    monkeypatch.setattr(attention_core, "eager_attention", spy)
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", spy)
    with torch.no_grad():
        cache = model(token_ids(2, 9), use_cache=True).cache
        handed.clear()
        model(token_ids(2, 1), cache=cache)
    assert handed == [(layer.keys.data_ptr(),) * 2 for layer in cache.layers]


def test_transformers_still_has_the_private_names_that_we_override():
    overridden = {
        PreTrainedModel: [
            "_can_set_attn_implementation",
            "_can_set_experts_implementation",
            "_finalize_model_loading",
            "_init_weights",
        ],
        GenerationMixin: ["_prepare_cache_for_generation"],
    }
    for owner, names in overridden.items():
        for private in names:
            assert private in vars(owner) and getattr(DeepSeekForCausalLM, private) is not getattr(owner, private)
