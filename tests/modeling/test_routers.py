"""The routers against their formulas: which experts, what weights, which gradients."""

import pytest
import torch

from configuration_deepseek import preset
from modeling_deepseek import DeepSeekForCausalLM
from modeling_deepseek.routers import DeepSeekTopKRouter, sqrt_softplus
from tests.reference.compare import assert_close, assert_same_gradients, twin
from tests.reference.routers import route

GREEDY = {"scoring_func": "softmax", "topk_method": "greedy"}
GROUP_MAX = {"scoring_func": "softmax", "topk_method": "group_limited_greedy"}
SIGMOID = {"scoring_func": "sigmoid", "topk_method": "noaux_tc"}
SQRT_SOFTPLUS = {"scoring_func": "sqrtsoftplus", "topk_method": "noaux_tc", "n_group": 1, "topk_group": 1}
EXPERTS = {"n_routed_experts": 12, "num_experts_per_tok": 5, "n_group": 4, "topk_group": 2}
ROUTERS = {
    "greedy": GREEDY,
    "greedy, scaled": {**GREEDY, "routed_scaling_factor": 16.0},
    "greedy, normalised and therefore not scaled": {**GREEDY, "norm_topk_prob": True, "routed_scaling_factor": 16.0},
    "greedy, one expert is not normalised": {
        **GREEDY,
        "num_experts_per_tok": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 16.0,
    },
    "greedy, odd": {**GREEDY, "n_routed_experts": 7, "num_experts_per_tok": 3},
    "greedy, all": {**GREEDY, "n_routed_experts": 7, "num_experts_per_tok": 7},
    "group max": {**GROUP_MAX, "routed_scaling_factor": 16.0},
    "group max, normalised": {**GROUP_MAX, "norm_topk_prob": True, "routed_scaling_factor": 16.0},
    "group max, one group": {**GROUP_MAX, "n_group": 3, "topk_group": 1, "num_experts_per_tok": 4},
    "sigmoid": {**SIGMOID, "norm_topk_prob": True, "routed_scaling_factor": 2.5},
    "sigmoid, not normalised": {**SIGMOID, "norm_topk_prob": False, "routed_scaling_factor": 2.5},
    "sigmoid, no groups": {**SIGMOID, "n_group": 1, "topk_group": 1, "n_routed_experts": 13, "norm_topk_prob": True},
    "sqrt softplus": {**SQRT_SOFTPLUS, "norm_topk_prob": True, "routed_scaling_factor": 1.5},
    "sqrt softplus, not normalised": {**SQRT_SOFTPLUS, "norm_topk_prob": False, "routed_scaling_factor": 1.5},
}


def router_of(name: str) -> tuple[DeepSeekTopKRouter, dict]:
    """A router with a weight and a bias that spread the scores, and the config's fields."""
    torch.manual_seed(5)
    config = preset("tiny_v3", **{**EXPERTS, **ROUTERS[name], **{"hidden_size": 13}})
    router = DeepSeekTopKRouter(config)
    torch.nn.init.normal_(router.weight, std=0.5)
    if config.topk_method == "noaux_tc":
        torch.nn.init.normal_(router.e_score_correction_bias, std=0.3)
    return router, config.to_dict()


def dense(weights: torch.Tensor, indices: torch.Tensor, experts: int) -> torch.Tensor:
    """[N, K] weights and indices -> [N, E], zero where an expert was not chosen."""
    return torch.zeros(len(weights), experts, dtype=weights.dtype).scatter(1, indices, weights)


@pytest.mark.parametrize("tokens", [1, 63])
@pytest.mark.parametrize("name", ROUTERS)
def test_router(name: str, tokens: int):
    router, fields = router_of(name)
    x = torch.randn(tokens, 13, requires_grad=True)
    logits, weights, indices = router(x)
    assert weights.dtype == logits.dtype == torch.float32
    assert weights.shape == indices.shape == (tokens, fields["num_experts_per_tok"])

    x_copy, weight_copy = twin(x), twin(router.weight)
    expected_logits = x_copy @ weight_copy.T
    assert_close(logits, expected_logits, "logits")
    bias = getattr(router, "e_score_correction_bias", None)
    rows = []
    for row in expected_logits:
        chosen = route(row, fields, bias)
        expected = torch.zeros_like(row)
        for expert, weight in chosen.items():
            expected = expected + weight * torch.nn.functional.one_hot(torch.tensor(expert), len(row))
        rows.append(expected)
    ours, expected = dense(weights, indices, len(rows[0])), torch.stack(rows)
    assert torch.equal(ours != 0, expected != 0), "other experts were chosen"
    leaves = {"x": (x, x_copy), "weight": (router.weight, weight_copy)}
    assert_same_gradients(ours, expected, leaves)


def test_one_normalised_sigmoid_expert_has_the_scaling_factor_for_weight():
    config = preset("tiny_v3", **SIGMOID, **EXPERTS | {"num_experts_per_tok": 1}, norm_topk_prob=True)
    router = DeepSeekTopKRouter(config)
    torch.nn.init.normal_(router.weight)
    _, weights, _ = router(torch.randn(7, 32))
    assert_close(weights, torch.full((7, 1), config.routed_scaling_factor))


def test_correction_bias_chooses_but_does_not_weigh():
    router, _ = router_of("sigmoid, no groups")
    x = torch.randn(7, 13)
    router.e_score_correction_bias.zero_()
    router.e_score_correction_bias[4] = 100.0
    logits, weights, indices = router(x)
    assert (indices == 4).any(-1).all()
    scores = logits.sigmoid().gather(1, indices)
    assert_close(weights, scores / scores.sum(-1, keepdim=True) * 2.5, "weights")


def test_sqrt_softplus_has_finite_gradients_where_it_vanishes():
    logits = torch.tensor([-1e30, -200.0, -104.0, -60.0, 0.0, 90.0, 1e30], requires_grad=True)
    scores = sqrt_softplus(logits)
    (gradient,) = torch.autograd.grad(scores.sum(), logits)
    assert scores.isfinite().all() and gradient.isfinite().all() and (gradient >= 0).all()
    exact = logits.detach().double().exp().log1p().sqrt()
    torch.testing.assert_close(scores[3:6].double(), exact[3:6], rtol=1e-6, atol=0)


def test_scores_are_float32_under_bfloat16_and_autocast():
    router, _ = router_of("sigmoid")
    x = torch.randn(7, 13).bfloat16()
    router.weight.data = router.weight.data.bfloat16()
    expected = x.float() @ router.weight.float().T
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, weights, _ = router(x)
    assert_close(logits, expected, "logits")
    assert weights.dtype == torch.float32


CASTS = {
    "to(dtype)": lambda model, folder: model.to(torch.bfloat16),
    "to(device, dtype)": lambda model, folder: model.to("cpu", torch.float16),
    "bfloat16()": lambda model, folder: model.bfloat16(),
    "half()": lambda model, folder: model.half(),
    "to(dtype).float()": lambda model, folder: model.to(torch.bfloat16).float(),
    "from_pretrained(dtype)": lambda model, folder: DeepSeekForCausalLM.from_pretrained(folder, dtype=torch.bfloat16),
    "saved and loaded after a cast": lambda model, folder: _again(model.bfloat16(), folder),
}


def _again(model: DeepSeekForCausalLM, folder) -> DeepSeekForCausalLM:
    model.save_pretrained(folder)
    return DeepSeekForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("name", CASTS)
def test_correction_bias_stays_float32(name: str, tmp_path):
    model = DeepSeekForCausalLM(preset("tiny_v3"))
    value = 0.9 + 0.001 * torch.arange(8)  # steps of 0.001 vanish in bfloat16
    for layer in model.model.layers[1:]:
        layer.mlp.gate.e_score_correction_bias.copy_(value)
    model.save_pretrained(tmp_path)
    model = CASTS[name](model, tmp_path)
    assert model.lm_head.weight.dtype == (torch.float32 if name.endswith("float()") else model.dtype)
    for layer in model.model.layers[1:]:
        bias = layer.mlp.gate.e_score_correction_bias
        assert bias.dtype == torch.float32
        assert torch.equal(bias, value)
    assert "model.layers.1.mlp.gate.e_score_correction_bias" in model.state_dict()
