"""The mixture-of-experts layer against a loop over tokens, in every experts implementation."""

import pytest
import torch

from configuration_deepseek import preset
from modeling_deepseek.moe import DeepSeekExperts, DeepSeekMoE
from tests.reference.compare import assert_close, assert_same_gradients, twin
from tests.reference.moe import moe

LAYERS = {
    "V1": ("tiny_moe", {}),
    "V2": ("tiny_v2", {}),
    "V3": ("tiny_v3", {}),
    "odd": ("tiny_v3", {"n_routed_experts": 7, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 13}),
    "three shared": ("tiny_v2", {"n_shared_experts": 3}),
    "no shared": ("tiny_moe", {"n_shared_experts": None}),
    "one expert": ("tiny_moe", {"num_experts_per_tok": 1, "routed_scaling_factor": 3.0}),
    "all experts": ("tiny_moe", {"num_experts_per_tok": 8}),
    "V4": ("tiny_v3", {"scoring_func": "sqrtsoftplus", "n_group": 1, "topk_group": 1, "swiglu_limit": 0.8}),
}


def layer_of(name: str, implementation: str = "eager") -> tuple[DeepSeekMoE, dict]:
    """A layer with weights large enough to matter, and the config's fields."""
    torch.manual_seed(3)
    base, fields = LAYERS[name]
    config = preset(base, **fields)
    config._experts_implementation = implementation
    layer = DeepSeekMoE(config)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    if config.topk_method == "noaux_tc":
        torch.nn.init.normal_(layer.gate.e_score_correction_bias, std=0.3)
    return layer, config.to_dict()


def official_weights(layer: DeepSeekMoE) -> tuple[dict[str, torch.Tensor], dict]:
    """Experts one by one under their official names, and the leaves that gradients are taken of."""
    twins = {name: twin(parameter) for name, parameter in layer.named_parameters()}
    weights = dict(twins) | dict(layer.named_buffers())
    for expert in range(layer.experts.num_experts):
        gate, up = weights["experts.gate_up_proj"][expert].chunk(2)
        down = weights["experts.down_proj"][expert]
        for name, tensor in (("gate", gate), ("up", up), ("down", down)):
            weights[f"experts.{expert}.{name}_proj.weight"] = tensor
    return weights, {name: (layer.get_parameter(name), twins[name]) for name in twins}


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("name", LAYERS)
def test_moe(name: str, implementation: str):
    if implementation == "grouped_mm" and name == "odd":
        pytest.skip("grouped_mm refuses widths that are no multiple of 16 bytes")
    layer, fields = layer_of(name, implementation)
    x = torch.randn(3, 7, fields["hidden_size"], requires_grad=True)
    weights, leaves = official_weights(layer)
    copy = twin(x)
    expected = moe(copy.flatten(0, 1), weights, fields).view_as(x)
    assert_same_gradients(layer(x), expected, {"x": (x, copy), **leaves})


def test_one_token():
    layer, fields = layer_of("V3")
    x = torch.randn(1, 1, fields["hidden_size"])
    weights, _ = official_weights(layer)
    assert_close(layer(x), moe(x[0].double(), weights, fields)[None])


def test_experts_elsewhere_are_skipped():
    """Expert parallelism marks experts of other ranks by the index E."""
    layer, fields = layer_of("V2")
    x, weights = torch.randn(7, fields["hidden_size"]), torch.rand(7, 3)
    indices = torch.randint(0, 8, (7, 3))
    kept = torch.rand(7, 3) < 0.5
    ours = layer.experts(x, indices.masked_fill(~kept, 8), weights)
    assert_close(ours, layer.experts(x, indices, weights * kept))


def unfused(layer: DeepSeekMoE) -> dict[str, torch.Tensor]:
    """The layer's weights under official names only."""
    weights, _ = official_weights(layer)
    return {key: weights[key] for key in weights if key not in ("experts.gate_up_proj", "experts.down_proj")}


def test_experts_take_unfused_weights_by_load_state_dict():
    """The way Trainer goes when it resumes: a checkpoint's per-expert tensors, past transformers' conversion."""
    layer, _ = layer_of("V3")
    other = DeepSeekMoE(preset("tiny_v3"))
    weights, _ = official_weights(layer)
    unfused = {
        key: tensor for key, tensor in weights.items() if not key.endswith(("gate_up_proj", "experts.down_proj"))
    }
    other.load_state_dict(unfused, strict=True)
    assert all(torch.equal(other.state_dict()[key], tensor) for key, tensor in layer.state_dict().items())


def test_experts_without_one_expert_are_refused():
    layer, _ = layer_of("V3")
    weights = {key: tensor for key, tensor in unfused(layer).items() if not key.startswith("experts.3.")}
    with pytest.raises((KeyError, RuntimeError, ValueError), match="experts.3"):
        layer.load_state_dict(weights)


def test_experts_are_fused_parameters():
    experts = DeepSeekExperts(preset("tiny_v3"))
    assert {name: tuple(p.shape) for name, p in experts.named_parameters()} == {
        "gate_up_proj": (8, 40, 32),
        "down_proj": (8, 32, 20),
    }
