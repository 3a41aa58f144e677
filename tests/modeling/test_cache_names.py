"""A cache is taken under both of transformers' words, on every version, and under no third one."""

import inspect

import pytest
import torch
import transformers
from transformers import DynamicCache, GenerationMixin, StaticCache

import modeling_deepseek
from modeling_deepseek.language_heads import tells_prompt
from modeling_deepseek.outputs import DeepSeekSequenceOutput
from modeling_deepseek.tested_versions import tell_if_untested
from modeling_deepseek.transformers_names import GradientCheckpointingLayer, in_library_words
from tests.modeling.conftest import TINY, tiny, token_ids
from tests.reference.compare import assert_close

WORDS = ("cache", "past_key_values")
HEADS = [
    "DeepSeekModel",
    "DeepSeekForCausalLM",
    "DeepSeekForQuestionAnswering",
    "DeepSeekForRecommendation",
    "DeepSeekForSequenceClassification",
    "DeepSeekForTokenClassification",
]


def first_output(output):
    return next(value for value in output.to_tuple() if torch.is_tensor(value))


@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", TINY)
def test_every_forward_goes_on_from_a_cache_under_both_words(name, head, word):
    model, ids = tiny(name, getattr(modeling_deepseek, head)), token_ids(1, 9)
    cache = DynamicCache(config=model.config)
    model(ids[:, :-1], use_cache=True, **{word: cache})
    assert cache.get_seq_length() == 8
    step = first_output(model(ids[:, -1:], **{word: cache}))
    whole = first_output(model(ids, use_cache=False))
    if step.shape != whole.shape:
        whole = whole[:, -1:]
    assert_close(step, whole)


@pytest.mark.parametrize("head", [*HEADS, "DeepSeekForEmbedding"])
@pytest.mark.parametrize("name", TINY)
def test_a_cache_under_an_unknown_word_is_refused_with_word_version_and_remedy(name, head):
    model = tiny(name, getattr(modeling_deepseek, head))
    with pytest.raises(TypeError, match=f"{head}.*{transformers.__version__}.*'memory'.*give it as cache"):
        model(token_ids(1, 3), memory=DynamicCache(config=model.config))


def test_every_attention_refuses_an_unknown_word_too():
    for name in TINY:
        model = tiny(name).model
        states = model.hc_head.enter(torch.zeros(1, 2, model.config.hidden_size))
        with pytest.raises(TypeError, match="'memory'"):
            model.layers[0](states, attention_mask=None, memory=DynamicCache(config=model.config))


def test_two_caches_or_a_tuple_are_refused():
    model, ids = tiny("tiny_v3"), token_ids(1, 3)
    one, two = DynamicCache(config=model.config), DynamicCache(config=model.config)
    with pytest.raises(TypeError, match="two words for one"):
        model(ids, cache=one, past_key_values=two)
    with pytest.raises(TypeError, match="got a tuple as cache"):
        model(ids, past_key_values=((torch.zeros(1), torch.zeros(1)),))
    assert model(ids, cache=one, past_key_values=None).cache is one


def test_the_signature_shows_both_words_to_generate():
    for head in HEADS:
        assert set(WORDS) <= set(inspect.signature(getattr(modeling_deepseek, head).forward).parameters)


@pytest.mark.parametrize("head", ["DeepSeekModel", "DeepSeekForCausalLM", "DeepSeekForSequenceClassification"])
def test_outputs_answer_to_both_words(head):
    model = tiny("tiny_v3", getattr(modeling_deepseek, head))
    output = model(token_ids(1, 3), use_cache=True)
    assert isinstance(output.cache, DynamicCache)
    for word in WORDS:
        assert getattr(output, word) is output.cache
        assert output[word] is output.cache
        assert output.get(word) is output.cache
        assert word in output
    without = model(token_ids(1, 3), use_cache=False)
    assert without.cache is None and "cache" not in without and "past_key_values" not in without


def test_outputs_are_made_under_both_words():
    cache = DynamicCache()
    for word in WORDS:
        assert DeepSeekSequenceOutput(logits=torch.zeros(1), **{word: cache}).cache is cache


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("word", WORDS)
def test_generate_takes_a_cache_under_both_words(word):
    model, ids = tiny("tiny_v3"), token_ids(2, 7)
    arguments = {"max_new_tokens": 5, "do_sample": False}
    cache = DynamicCache(config=model.config)
    assert torch.equal(model.generate(ids, **{word: cache}, **arguments), model.generate(ids, **arguments))
    assert cache.get_seq_length() == 11


@pytest.mark.usefixtures("native_compiles")
@pytest.mark.parametrize("name", ["tiny_llm", "tiny_v3", "tiny_v32"])
def test_the_words_break_no_graph_and_an_unknown_one_is_refused_when_compiled(name):
    model, ids = tiny(name), token_ids(1, 8)
    model.set_experts_implementation("batched_mm")
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        for word in WORDS:
            cache = StaticCache(config=model.config, max_cache_len=16)
            compiled = torch.compile(model, backend="eager", fullgraph=True)
            assert_close(compiled(ids, **{word: cache}).logits, expected)
            torch._dynamo.reset()
        with pytest.raises(TypeError, match="'memory'"):
            torch.compile(model, backend="eager")(ids, memory=StaticCache(config=model.config, max_cache_len=16))
    torch._dynamo.reset()


def test_generating_in_train_mode_under_gradient_checkpointing_keeps_the_cache():
    model, ids = tiny("tiny_v3"), token_ids(2, 7)
    model.generation_config.eos_token_id = None
    expected = model.generate(ids, max_new_tokens=6, do_sample=False)
    model.train().gradient_checkpointing_enable()
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        got = in_library_words(GenerationMixin.generate)(model, ids, cache=cache, max_new_tokens=6, do_sample=False)
    assert torch.equal(got, expected) and cache.get_seq_length() == 12


def test_a_checkpointed_layer_that_will_be_replayed_writes_no_cache():
    model, ids = tiny("tiny_v3"), token_ids(2, 7)
    model.train().gradient_checkpointing_enable()
    assert issubclass(type(model.model.layers[0]), GradientCheckpointingLayer)
    cache = DynamicCache(config=model.config)
    model(ids, labels=ids, cache=cache).loss.backward()
    assert cache.get_seq_length() == 0


def test_prefix_attention_needs_to_be_told_where_the_prompt_ends():
    tells_prompt(GenerationMixin.prepare_inputs_for_generation)
    with pytest.raises(TypeError, match="install the newest deepseek-hf"):
        tells_prompt(lambda input_ids, is_prompt=False: None)


def test_a_transformers_newer_than_tested_is_told_once(monkeypatch):
    from modeling_deepseek import tested_versions

    said = []
    monkeypatch.setattr(tested_versions.logger, "warning_once", said.append)
    for version in ("5.23.0", "5.24.7", transformers.__version__):
        tell_if_untested(version)
    assert not said
    tell_if_untested("5.25.0.dev0")
    assert len(said) == 1 and "5.25.0.dev0 is newer than 5.24" in said[0]
