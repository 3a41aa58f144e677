"""`generate` in all its modes: each agrees with greedy decoding by whole forward passes, or refuses in one line."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.utils.hotswap import prepare_model_for_compiled_hotswap
from torch._dynamo.testing import CompileCounter
from transformers import CompileConfig, DynamicCache, StaticCache
from transformers.cache_utils import StaticLayer

from modeling_deepseek import DeepSeekForCausalLM
from modeling_deepseek.transformers_names import CACHE_WORD
from tests.modeling.conftest import TINY, outputs, tiny, token_ids
from tests.reference.compare import assert_close

NEW = 8
GREEDY = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 2}


def by_whole_passes(model, ids, steps=NEW):
    """Greedy continuation without any cache: the yardstick."""
    for _ in range(steps):
        ids = torch.cat((ids, outputs(model, ids, use_cache=False)[:, -1:].argmax(-1)), dim=1)
    return ids


def left_padded(rows, pad=2):
    """Rows of different lengths as one batch, and its mask."""
    longest = max(len(row) for row in rows)
    ids = torch.tensor([[pad] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


@pytest.mark.parametrize("arguments", [{}, {"use_cache": False}, {"cache_implementation": "dynamic"}], ids=str)
def test_greedy(causal, arguments):
    ids = token_ids(2, 6)
    assert torch.equal(causal.generate(ids, **GREEDY, **arguments), by_whole_passes(causal, ids))


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_greedy_by_each_attention(name, implementation):
    model, ids = tiny(name), token_ids(2, 6)
    expected = by_whole_passes(model, ids)
    model.set_attn_implementation(implementation)
    assert torch.equal(model.generate(ids, **GREEDY), expected)


def test_rows_of_a_left_padded_batch_equal_single_rows(causal):
    rows = [token_ids(length, seed=length).tolist() for length in (2, 9, 5)]
    ids, mask = left_padded(rows)
    for beams in (1, 3):
        batch = causal.generate(ids, attention_mask=mask, num_beams=beams, **GREEDY)
        for row, got in zip(rows, batch, strict=True):
            alone = causal.generate(torch.tensor([row]), num_beams=beams, **GREEDY)[0]
            assert got[9:].tolist() == alone[len(row) :].tolist()


def test_beam_search_with_and_without_a_cache(causal):
    ids = token_ids(2, 6)
    beams = {"num_beams": 4, "num_return_sequences": 3, "return_dict_in_generate": True, "output_scores": True}
    cached = causal.generate(ids, **GREEDY, **beams)
    plain = causal.generate(ids, use_cache=False, **GREEDY, **beams)
    assert torch.equal(cached.sequences, plain.sequences)
    assert_close(cached.sequences_scores, plain.sequences_scores)
    log_probabilities = outputs(causal, cached.sequences).log_softmax(-1)[:, 5:-1]
    chosen = log_probabilities.gather(-1, cached.sequences[:, 6:, None]).sum((1, 2)) / NEW
    assert_close(cached.sequences_scores, chosen, tolerance=1e-4)


def test_sampling_with_a_seed_is_the_same_with_and_without_a_cache(causal):
    def sample(**kwargs):
        torch.manual_seed(3)
        return causal.generate(token_ids(2, 6), max_new_tokens=NEW, do_sample=True, top_k=20, top_p=0.9, **kwargs)

    assert torch.equal(sample(), sample(use_cache=False))


def test_assisted_generation_equals_greedy(causal, name):
    assistant = tiny(name, num_hidden_layers=2)
    assistant.generation_config.num_assistant_tokens = 3
    ids = token_ids(1, 6)
    expected = by_whole_passes(causal, ids, 14)
    arguments = GREEDY | {"max_new_tokens": 14}
    assert torch.equal(causal.generate(ids, assistant_model=assistant, **arguments), expected)
    twin = copy.deepcopy(causal)  # proposes what is accepted, where the other proposes what is rejected
    assert torch.equal(causal.generate(ids, assistant_model=twin, **arguments), expected)


@pytest.mark.parametrize("arguments", [{"prompt_lookup_num_tokens": 3}, {"assistant_early_exit": 1}], ids=str)
def test_speculation_without_an_assistant_equals_greedy(causal, arguments):
    ids = token_ids(1, 4).repeat(1, 4)
    assert torch.equal(causal.generate(ids, **GREEDY, **arguments), by_whole_passes(causal, ids))


@pytest.mark.parametrize("arguments", [{"prompt_lookup_num_tokens": 3}, {"assistant_early_exit": 1}], ids=str)
def test_speculation_goes_on_from_a_cache(causal, arguments):
    """transformers' own classes read the cached tokens once more, and answer something else."""
    ids = token_ids(1, 4).repeat(1, 4)
    with torch.no_grad():
        cache = causal(ids[:, :7], use_cache=True).cache
    assert torch.equal(causal.generate(ids, cache=cache, **GREEDY, **arguments), by_whole_passes(causal, ids))


def test_early_exit_leaves_the_number_of_layers(causal):
    layers = causal.config.num_hidden_layers
    causal.generate(token_ids(1, 6), assistant_early_exit=1, **GREEDY)
    assert causal.config.num_hidden_layers == layers


@pytest.mark.parametrize("beams", [1, 3])
def test_static_cache_equals_dynamic(causal, beams):
    rows = [token_ids(length, seed=length).tolist() for length in (4, 7)]
    ids, mask = left_padded(rows)
    arguments = {"attention_mask": mask, "num_beams": beams, "disable_compile": True, **GREEDY}
    expected = causal.generate(ids, **arguments)
    if causal.config.compress_ratios is None:
        assert torch.equal(causal.generate(ids, cache_implementation="static", **arguments), expected)
    else:
        with pytest.raises(ValueError, match="compressed attention has no static cache"):
            causal.generate(ids, cache_implementation="static", **arguments)
    chunked = causal.generate(ids, prefill_chunk_size=3, **arguments)
    assert torch.equal(chunked, expected)


needs_cropping = pytest.mark.skipif(
    not StaticLayer.is_croppable, reason="static layers of this transformers can't be cropped (5.24 can)"
)


with_static_cache = pytest.mark.parametrize(
    "name", [name for name in TINY if name not in ("tiny_v4", "tiny_v4.1")], indirect=True
)


@needs_cropping
@with_static_cache
def test_a_cropped_static_cache_goes_on_as_if_the_tokens_had_not_been(causal):
    ids = token_ids(1, 12)
    cache = StaticCache(causal.config, max_cache_len=16)
    with torch.no_grad():
        causal(torch.cat((ids[:, :8], ids[:, :3]), dim=1), cache=cache)
        cache.crop(-3)
        assert int(cache.get_seq_length()) == 8
        assert_close(causal(ids[:, 8:], cache=cache).logits, causal(ids, use_cache=False).logits[:, 8:])


@needs_cropping
@with_static_cache
@pytest.mark.parametrize("arguments", [{"prompt_lookup_num_tokens": 2}, {"assistant_early_exit": 1}], ids=str)
def test_speculation_on_a_static_cache_equals_greedy(causal, arguments):
    ids = token_ids(1, 6).repeat(1, 2)
    got = causal.generate(ids, cache_implementation="static", disable_compile=True, **GREEDY, **arguments)
    assert torch.equal(got, by_whole_passes(causal, ids))


def test_a_static_cache_of_ones_own(causal):
    ids = token_ids(2, 6)
    if causal.config.compress_ratios is not None:
        with pytest.raises(ValueError, match="compressed attention has no static cache"):
            StaticCache(causal.config, max_cache_len=32)
        return
    cache = StaticCache(causal.config, max_cache_len=32)
    got = causal.generate(ids, cache=cache, disable_compile=True, **GREEDY)
    assert torch.equal(got, by_whole_passes(causal, ids))
    cache.reset()
    again = causal.generate(ids, cache=cache, disable_compile=True, **GREEDY)
    assert torch.equal(again, got)


def test_embeddings_as_the_prompt(causal):
    ids = token_ids(2, 6)
    got = causal.generate(inputs_embeds=causal.get_input_embeddings()(ids), **GREEDY)
    assert torch.equal(got, by_whole_passes(causal, ids)[:, 6:])


def test_continuing_from_a_returned_cache(causal):
    ids = token_ids(1, 6)
    first = causal.generate(ids, return_dict_in_generate=True, **GREEDY)
    cache = first[CACHE_WORD]
    assert cache.get_seq_length() == 6 + NEW - 1  # the last token has not been read yet
    turn = torch.cat((first.sequences, token_ids(1, 5, seed=1)), dim=1)
    expected = by_whole_passes(causal, turn)
    kept = copy.deepcopy(cache)
    assert torch.equal(causal.generate(turn, cache=cache, **GREEDY), expected)
    kept.crop(-3)
    assert torch.equal(causal.generate(turn, cache=kept, **GREEDY), expected)


def test_one_prompt_cache_serves_several_continuations(causal):
    prompt = token_ids(1, 9)
    with torch.no_grad():
        cache = causal(prompt, cache=DynamicCache(config=causal.config), use_cache=True).cache
    for seed in (1, 2):
        ids = torch.cat((prompt, token_ids(1, 3, seed=seed)), dim=1)
        got = causal.generate(ids, cache=copy.deepcopy(cache), **GREEDY)
        assert torch.equal(got, by_whole_passes(causal, ids))


def test_rows_of_a_cache_are_repeated_and_chosen(causal):
    ids = token_ids(2, 12)
    with torch.no_grad():
        cache = causal(ids[:, :9], use_cache=True).cache
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([3, 0]))
        assert_close(causal(ids[[1, 0], 9:], cache=cache).logits, outputs(causal, ids[[1, 0]], use_cache=False)[:, 9:])


def test_more_tokens_than_a_window_holds_are_taken_back(causal):
    ids, others = token_ids(1, 14), token_ids(1, 30, seed=4)
    with torch.no_grad():
        cache = causal(ids[:, :11], use_cache=True).cache
        cache.activate_past_recording()
        causal(others, cache=cache)
        cache.crop(-30)
        assert cache.get_seq_length() == 11
        assert_close(causal(ids[:, 11:], cache=cache).logits, outputs(causal, ids, use_cache=False)[:, 11:])


def test_a_cache_without_a_config_works_too(causal):
    ids = token_ids(2, 6)
    got = causal.generate(ids, cache=DynamicCache(), **GREEDY)
    assert torch.equal(got, by_whole_passes(causal, ids))


def test_stops_at_the_end_token_and_pads(causal):
    ids = token_ids(2, 6)
    expected = by_whole_passes(causal, ids)
    end = expected[0, 8].item()
    got = causal.generate(ids, eos_token_id=end, **GREEDY)
    for row, whole in zip(got.tolist(), expected.tolist(), strict=True):
        stop = next((i for i in range(6, len(whole)) if whole[i] == end), len(whole))
        assert row == (whole[: stop + 1] + [2] * len(row))[: len(row)]


def test_records_hidden_states_and_attentions_of_each_step(causal):
    model = copy.deepcopy(causal)
    model.set_attn_implementation("eager")
    recorded = {"output_hidden_states": True, "output_attentions": True, "return_dict_in_generate": True}
    result = model.generate(token_ids(2, 6), **recorded, **GREEDY)
    lengths = [6] + [1] * (NEW - 1)
    streams = () if causal.config.hc_mult is None else (causal.config.hc_mult,)
    assert [h[0].shape for h in result.hidden_states] == [(2, length, *streams, 32) for length in lengths]
    widths = [a[0].shape for a in result.attentions]
    kept = (causal.config.sliding_window or 99) - 1
    assert widths == [(2, 4, length, min(6 + i - length, kept) + length) for i, length in enumerate(lengths)]


REFUSED = ["quantized", "sliding_window", "paged", "offloaded_hybrid"]


@pytest.mark.parametrize("word", REFUSED)
def test_unsupported_caches_are_refused_with_what_is_supported(causal, word):
    with pytest.raises(ValueError) as refusal:
        causal.generate(token_ids(1, 6), cache_implementation=word, **GREEDY)
    assert str(refusal.value) == (
        f"cache_implementation {word!r} is not supported by DeepSeek models; "
        "use one of 'dynamic', 'static', 'offloaded', 'offloaded_static'"
    )


def test_continuous_batching_is_refused(causal):
    with pytest.raises(ValueError, match="'paged' is not supported by DeepSeek models; use one of 'dynamic'"):
        causal.generate_batch([[5, 6, 7]], max_new_tokens=3)
    with pytest.raises(ValueError, match="'paged' is not supported"):
        causal.init_continuous_batching()


@pytest.mark.parametrize("word", ["offloaded", "offloaded_static"])
def test_offloaded_caches(causal, word):
    ids = token_ids(2, 6)
    if not torch.accelerator.is_available():
        with pytest.raises(ValueError, match=f"'{word}' needs an accelerator, and there is none; use 'dynamic'"):
            causal.generate(ids, cache_implementation=word, **GREEDY)
        return
    model = copy.deepcopy(causal).to(torch.accelerator.current_accelerator())
    got = model.generate(ids.to(model.device), cache_implementation=word, **GREEDY)
    assert torch.equal(got.cpu(), by_whole_passes(causal, ids))


def test_generation_config_is_saved_and_read(tmp_path, name):
    model = tiny(name)
    model.generation_config.max_new_tokens = 3
    model.save_pretrained(tmp_path)
    loaded = DeepSeekForCausalLM.from_pretrained(tmp_path)
    assert loaded.generate(token_ids(1, 4)).shape == (1, 7)


@pytest.mark.slow
@pytest.mark.parametrize("compiled", ["tiny_llm", "tiny_v3", "tiny_v32"])
def test_static_cache_compiles_decoding(compiled):
    model, ids = tiny(compiled, **({} if compiled == "tiny_llm" else {"moe_intermediate_size": 16})), token_ids(2, 6)
    expected = by_whole_passes(model, ids)
    model.forward = torch.compile(model.forward, backend="eager", fullgraph=True)
    got = model.generate(ids, cache_implementation="static", **GREEDY)
    assert torch.equal(got, expected)


@needs_cropping
@pytest.mark.slow
@pytest.mark.parametrize("compiled", ["tiny_llm", "tiny_v3", "tiny_v32"])
def test_speculation_on_a_static_cache_compiles_its_steps(compiled):
    model, ids = tiny(compiled, **({} if compiled == "tiny_llm" else {"moe_intermediate_size": 16})), token_ids(1, 6)
    ids = ids.repeat(1, 2)
    config = CompileConfig(backend="eager", fullgraph=True)
    config._compile_all_devices = True  # transformers compiles on accelerators only unless told so
    arguments = {"cache_implementation": "static", "prompt_lookup_num_tokens": 2, "compile_config": config}
    assert torch.equal(model.generate(ids, **arguments, **GREEDY), by_whole_passes(model, ids))
    assert model._compiled_call is not None


# Rows of a static cache: fewer than the latent is wide (32) are expanded.
@pytest.mark.usefixtures("native_compiles")
@pytest.mark.parametrize(("compiled", "length"), [("tiny_v2_lite", 16), ("tiny_v3", 48), ("tiny_v32", 48)])
def test_decoding_with_an_adapter_compiles_whole_and_once(compiled, length):
    """Also when another adapter is written into the first one's memory, as servers swap them."""
    torch._dynamo.reset()
    counter, ids = CompileCounter(), token_ids(2, 9)

    @torch.no_grad()
    def decoded(compiles):
        lora = LoraConfig(r=2, target_modules=["kv_b_proj", "o_proj"], init_lora_weights=False)
        torch.manual_seed(1)
        adapted = get_peft_model(tiny(compiled, moe_intermediate_size=16, kv_lora_rank=32), lora).eval()
        prepare_model_for_compiled_hotswap(adapted)
        model = adapted.base_model.model
        step = torch.compile(model.forward, backend=counter, fullgraph=True) if compiles else model
        cache = StaticCache(model.config, length) if compiles else DynamicCache(config=model.config)
        logits = [model(ids[:, :6], cache=cache).logits]
        for place in (6, 7, 8):
            if place == 8:
                for name, weight in adapted.named_parameters():
                    weight.data.mul_(-2 if "lora_B" in name else 1)
            logits.append(step(ids[:, place : place + 1], cache=cache).logits)
        return torch.cat(logits, dim=1)

    assert_close(decoded(compiles=True), decoded(compiles=False), tolerance=5e-5)
    assert counter.frame_count == 1
