"""V4.1's text model against its formulas, whole: outputs and gradients; and its parts against what they promise."""

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import DynamicCache
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING, STATIC_LAYER_TYPE_MAPPING

from configuration_deepseek import preset
from modeling_deepseek import DeepSeekForCausalLM, attention_shared, cache_compressed
from modeling_deepseek.row_tokens import row_tokens
from tests.modeling.conftest import token_ids
from tests.reference.compare import TOLERANCE, assert_close, twin
from tests.reference.shared_model import ENGRAM, shared_model

YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 16.0, "original_max_position_embeddings": 8}
IDS = torch.tensor([[5, 40, 7, 96, 96, 40, 7, 5, 90]])
SLOW = {
    "as the preset": {},
    "no blocks, no source of its own for ratio 1": {
        **{"candidate_source_layer_id": -1, "compress_ratios": [0, 3, 3, 3, 3], "kv_source_layer_ids": [1]},
        **{"index_source_layer_ids": [1, 3], "rope_parameters": {**YARN, "beta_fast": 32.0, "beta_slow": 1.0}},
    },
    "a window of one, one block": {"sliding_window": 1, "index_topk": 1, "candidate_topk_blocks": 1},
}
VARIANTS = {"n-grams": ENGRAM, **SLOW}
EACH = [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in VARIANTS]


def model_of(head: type = DeepSeekForCausalLM, **changes) -> DeepSeekForCausalLM:
    """A model in which every weight shows; so many index heads that scores which tie at zero are rare."""
    torch.manual_seed(1)
    model = head(preset("tiny_v4.1", **{"index_n_heads": 20, "hc_sinkhorn_iters": 2, **changes})).eval()
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, mean=1.0 if "norm" in name or name.endswith("_weight") else 0.0, std=0.25)
    for name, buffer in model.named_buffers():
        if "e_score_correction_bias" in name:
            buffer.uniform_(-0.4, 0.4)
    return model


@pytest.fixture(autouse=True)
def chunks_of_four(monkeypatch):
    monkeypatch.setattr(attention_shared, "CHUNK", 4)


def official_twins(model: nn.Module) -> tuple[dict, dict]:
    """Twins of the weights by official names, experts one by one, and of fused ones by their own."""
    twins = {name: twin(parameter) for name, parameter in model.named_parameters()}
    weights = dict(twins)
    for name in list(twins):
        if name.endswith("experts.gate_up_proj"):
            prefix = name.removesuffix("gate_up_proj")
            for e, (pair, down) in enumerate(zip(twins[name], twins[f"{prefix}down_proj"], strict=True)):
                weights[f"{prefix}{e}.gate_proj.weight"], weights[f"{prefix}{e}.up_proj.weight"] = pair.chunk(2)
                weights[f"{prefix}{e}.down_proj.weight"] = down
    buffers = {name: buffer.double() for name, buffer in model.named_buffers() if "bias" in name}
    return twins, weights | buffers


@pytest.mark.parametrize("name", EACH)
def test_outputs_and_gradients_are_those_of_the_formulas(name):
    model = model_of(**VARIANTS[name])
    twins, weights = official_twins(model)
    expected = shared_model(IDS[0].tolist(), weights, model.config.to_dict())
    ours = model(IDS, use_cache=False).logits[0]
    assert_close(ours, expected, "logits")
    direction = torch.randn(expected.shape, generator=torch.Generator().manual_seed(7))
    (ours * direction).sum().backward()
    (expected * direction).sum().backward()
    for key, parameter in model.named_parameters():
        if ".indexer." in key:  # it chooses, and a choice has no gradient
            assert parameter.grad is None and twins[key].grad is None, key
        else:
            assert_close(parameter.grad, twins[key].grad, key, tolerance=2 * TOLERANCE)


# What must not change the outcome ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    """Few blocks and few entries of many, so that most of what a query could see is left out."""
    return model_of(**ENGRAM)


@torch.no_grad()
def logits(model, ids, **kwargs):
    return model(ids, **kwargs).logits


def test_queries_a_few_at_a_time_equal_all_at_once(model, monkeypatch):
    ids = token_ids(2, 23)
    few = logits(model, ids)
    monkeypatch.setattr(attention_shared, "CHUNK", 256)
    assert_close(few, logits(model, ids))


@pytest.mark.parametrize("chunks", [(20, 1, 1, 1), (1,) * 23, (7, 9, 7)], ids=str)
def test_cached_calls_equal_one(model, chunks):
    ids, cache = token_ids(2, 23), DynamicCache()
    got = torch.cat([logits(model, part, cache=cache) for part in ids.split(chunks, dim=1)], dim=1)
    assert_close(got, logits(model, ids))


def test_blocks_are_counted_from_the_begin_of_a_document(model):
    """Documents of odd lengths: in the row, a block of entries would hold those of two."""
    lengths, ids = (9, 2, 12), token_ids(2, 23, seed=3)
    positions = torch.cat([torch.arange(n) for n in lengths]).expand(2, -1)
    separate = torch.cat([logits(model, part) for part in ids.split(lengths, dim=1)], dim=1)
    assert_close(logits(model, ids, position_ids=positions), separate)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_choice(model, side):
    ids = token_ids(2, 17)
    pad = torch.full((2, 3), 2)
    tokens = torch.cat((pad, ids) if side == "left" else (ids, pad), dim=1)
    mask = (tokens != 2).long()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    got = logits(model, tokens, attention_mask=mask, position_ids=positions)
    assert_close(got[:, 3:] if side == "left" else got[:, :17], logits(model, ids))


def test_later_tokens_change_nothing_before_them(model):
    ids = token_ids(2, 23)
    other = torch.cat((ids[:, :15], token_ids(2, 8, seed=5)), dim=1)
    assert_close(logits(model, other)[:, :15], logits(model, ids)[:, :15])


def test_experts_may_stand_in_any_order():
    model, ids = model_of(), torch.cat((token_ids(2, 9), torch.full((2, 3), 96)), dim=1)
    expected, order = logits(model, ids), torch.randperm(8, generator=torch.Generator().manual_seed(1))
    for layer in model.model.layers:
        experts, gate = layer.mlp.experts, layer.mlp.gate
        for tensor in (experts.gate_up_proj, experts.down_proj, gate.weight, *gate.buffers()):
            tensor.data = tensor.data[order]
    assert_close(logits(model, ids), expected)


def test_guesses_that_are_taken_back_change_no_token(model):
    prompt = torch.tensor([[5, 6, 7, 8, 5, 6, 7, 8, 5, 6]])
    arguments = {"max_new_tokens": 12, "do_sample": False}
    expected = model.generate(prompt, **arguments)
    assert torch.equal(model.generate(prompt, prompt_lookup_num_tokens=3, **arguments), expected)
    beams = model.generate(prompt.repeat(2, 1), num_beams=3, **arguments)
    assert torch.equal(beams[0], beams[1])


def test_a_copy_of_the_files_that_came_later_makes_no_cache_of_this_one(model, monkeypatch):
    """As where folders of two models are opened with trust_remote_code."""
    expected = model.generate(token_ids(1, 9), max_new_tokens=3, do_sample=False)
    words = [word for word in DYNAMIC_LAYER_TYPE_MAPPING if word.startswith("deepseek_")]
    for mapping in (DYNAMIC_LAYER_TYPE_MAPPING, STATIC_LAYER_TYPE_MAPPING):
        for word in words:
            monkeypatch.setitem(mapping, word, mapping[word])  # put back afterwards
    source = Path(cache_compressed.__file__).read_text("utf-8").replace("from .", "from modeling_deepseek.")
    exec(compile(source, "copy", "exec"), {"__name__": "copy"})
    assert DYNAMIC_LAYER_TYPE_MAPPING["deepseek_window"] is not cache_compressed.WindowLayer
    assert torch.equal(model.generate(token_ids(1, 9), max_new_tokens=3, do_sample=False), expected)


def test_scores_of_indexers_can_be_learnt_from(model):
    scores = model.model(token_ids(1, 9), output_index_scores=True, use_cache=False).index_scores
    assert [tuple(of_layer.shape) for of_layer in scores] == [(1, 9, 4), (1, 9, 9), (1, 9, 9)]
    sum(of_layer.square().sum() for of_layer in scores).backward()
    reached = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert reached == {name for name, _ in model.named_parameters() if ".indexer." in name}
    model.zero_grad()


def test_layers_that_read_before_any_was_made_are_refused(model):
    states = model.model.hc_head.enter(torch.randn(1, 4, 32))
    tokens, positions = row_tokens(None, None, (1, 4), torch.device("cpu"), None), torch.arange(4)[None]
    rotation = model.model.rotary_emb(states[0], positions)
    given = {"attention_mask": tokens, "position_ids": positions, "position_embeddings": rotation}
    with pytest.raises(ValueError, match="layer 4 reads entries that no layer made; run the layers in order"):
        model.model.layers[4](states, input_ids=torch.arange(4)[None], **given)
