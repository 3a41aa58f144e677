"""V4.1's text model against its formulas, whole: outputs and gradients; and its parts against what they promise."""

import pytest
import torch
from torch import nn

from configuration_deepseek import preset
from modeling_deepseek import DeepSeekForCausalLM, attention_shared
from tests.reference.compare import TOLERANCE, assert_close, twin
from tests.reference.shared_model import ENGRAM, shared_model

YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 16.0, "original_max_position_embeddings": 8}
IDS = torch.tensor([[5, 40, 7, 40, 96, 96, 61, 40, 7, 5, 90]])
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


def model_of(**changes) -> DeepSeekForCausalLM:
    """A model in which every weight shows; so many index heads that scores which tie at zero are rare."""
    torch.manual_seed(1)
    model = DeepSeekForCausalLM(preset("tiny_v4.1", **{"index_n_heads": 20, "hc_sinkhorn_iters": 2, **changes})).eval()
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
