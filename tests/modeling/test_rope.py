"""Rotary positions: frequencies of every scaling, both pair layouts, and YaRN's softmax factor."""

import math

import pytest
import torch

from configuration_deepseek import DeepSeekConfig, preset
from modeling_deepseek.rope import DeepSeekRotaryEmbedding, apply_rotary, yarn_softmax_factor
from tests.reference import rope as reference
from tests.reference.compare import assert_close, assert_same_gradients, twin

TRAINED = 16
YARN = {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096}
ROPES = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": YARN,
    "yarn, betas": {**YARN, "beta_fast": 16.0, "beta_slow": 2.0},
    "yarn, V2": {**YARN, "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 0.707, "mscale_all_dim": 0.707},
    "yarn, two mscales": {**YARN, "mscale": 0.707, "mscale_all_dim": 1.0},
    "yarn, short": {**YARN, "original_max_position_embeddings": 8},
}


def config_of(rope: dict, width: int, latent: bool) -> DeepSeekConfig:
    """A config whose rotary width is `width`, in latent or in multi-head attention."""
    fields = {"rope_parameters": {"rope_theta": 10000.0, **rope}, "max_position_embeddings": TRAINED}
    return (
        preset("tiny_v3", qk_rope_head_dim=width, **fields) if latent else preset("tiny_llm", head_dim=width, **fields)
    )


@pytest.mark.parametrize("latent", [False, True], ids=["mha", "mla"])
@pytest.mark.parametrize("width", [6, 14, 64])
@pytest.mark.parametrize("name", ROPES)
def test_cos_and_sin(name: str, width: int, latent: bool):
    config = config_of(ROPES[name], width, latent)
    positions = torch.tensor([[0, 1, 2, 7, 13, 63], [5, 4, 3, 2, 1, 0]])
    cos, sin = DeepSeekRotaryEmbedding(config)(torch.zeros(1), positions)
    frequencies, factor = reference.frequencies_of(config.rope_parameters, width, TRAINED, 64)
    angles = positions[..., None] * torch.tensor(frequencies, dtype=torch.float64)
    assert_close(cos, factor * angles.cos(), "cos")
    assert_close(sin, factor * angles.sin(), "sin")


def test_tables_are_computed_in_float32_and_handed_over_in_the_models_type():
    rotary = DeepSeekRotaryEmbedding(config_of(ROPES["default"], 64, latent=True))
    positions = torch.tensor([[4095]])
    exact, _ = rotary(torch.zeros(1), positions)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded, _ = rotary(torch.zeros(1, dtype=torch.bfloat16), positions)
    assert rounded.dtype == torch.bfloat16
    assert torch.equal(rounded, exact.bfloat16())  # position 4095 itself is 4096 in bfloat16


def test_frequencies_stay_float32_in_a_cast_model():
    rotary = DeepSeekRotaryEmbedding(config_of(ROPES["yarn"], 64, latent=True))
    exact = rotary.inv_freq.clone()
    rotary.to(torch.bfloat16)
    assert torch.equal(rotary.inv_freq, exact)


def test_dynamic_scaling_starts_beyond_the_trained_length():
    config = config_of(ROPES["dynamic"], 14, latent=False)
    rotary = DeepSeekRotaryEmbedding(config)
    for length in (TRAINED, TRAINED + 1, 63, 3):  # the last: back to the trained frequencies
        cos, _ = rotary(torch.zeros(1), torch.arange(length)[None])
        frequencies = reference.dynamic_frequencies(14, 10000.0, 4.0, TRAINED, length)
        angles = torch.arange(length)[:, None] * torch.tensor(frequencies, dtype=torch.float64)
        assert_close(cos[0], angles.cos(), f"cos at length {length}")


@pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
@pytest.mark.parametrize("width", [2, 6, 64])
def test_rotation(width: int, interleaved: bool):
    torch.manual_seed(1)
    batch, heads, length = 2, 3, 7
    x = torch.randn(batch, heads, length, width, requires_grad=True)
    positions = torch.randint(0, 63, (batch, length))
    frequencies = reference.default_frequencies(width, 100.0)
    angles = positions[..., None].float() * torch.tensor(frequencies)
    ours = apply_rotary(x, angles.cos(), angles.sin(), interleaved)

    copy = twin(x)
    turned = torch.stack(
        [
            reference.rotate(copy[b, h, s], int(positions[b, s]), frequencies, interleaved)
            for b in range(batch)
            for h in range(heads)
            for s in range(length)
        ]
    ).view(batch, heads, length, width)
    if interleaved:  # ours returns first members, then second members
        turned = torch.cat((turned[..., 0::2], turned[..., 1::2]), dim=-1)
    assert_same_gradients(ours, turned, {"x": (x, copy)})


@pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
def test_scores_depend_on_the_distance_only(interleaved: bool):
    torch.manual_seed(1)
    query, key = torch.randn(2, 1, 1, 1, 14)
    rotary = DeepSeekRotaryEmbedding(config_of(ROPES["default"], 14, latent=True))

    def score(query_position: int, key_position: int) -> torch.Tensor:
        turned = [
            apply_rotary(x, *rotary(x, torch.tensor([[position]])), interleaved)
            for x, position in ((query, query_position), (key, key_position))
        ]
        return (turned[0] * turned[1]).sum()

    assert_close(score(20, 13), score(7, 0), "score at distance 7")
    assert (score(20, 13) - score(20, 14)).abs() > 1e-3


def test_softmax_factor_of_the_releases():
    """The scales 192^-0.5 m^2 of V2 (mscale 0.707) and V3 (1.0), to the digits of the published code."""
    for name, scale in (("v2", 0.1147214), ("v2_lite", 0.1147214), ("v2.5", 0.1352338), ("v3", 0.1352338)):
        rope = preset(name).rope_parameters
        assert yarn_softmax_factor(rope) == pytest.approx(reference.yarn_magnitude(40.0, rope["mscale_all_dim"]) ** 2)
        assert 192**-0.5 * yarn_softmax_factor(rope) == pytest.approx(scale, abs=1e-7)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default"},
        {"rope_type": "linear", "factor": 4.0, "mscale_all_dim": 1.0},
        {"rope_type": "yarn", "factor": 40.0},
        {"rope_type": "yarn", "factor": 1.0, "mscale_all_dim": 1.0},
    ],
)
def test_no_softmax_factor(rope: dict):
    assert yarn_softmax_factor(rope) == 1.0


def test_yarn_softmax_factor_grows_with_the_logarithm():
    rope = {"rope_type": "yarn", "factor": math.e, "mscale_all_dim": 1.0}
    assert yarn_softmax_factor(rope) == pytest.approx(1.1**2)
