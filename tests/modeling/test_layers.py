"""RMSNorm and SwiGLU against their formulas, outputs and gradients."""

import pytest
import torch

from configuration_deepseek import preset
from modeling_deepseek.layers import DeepSeekMLP, DeepSeekRMSNorm
from tests.reference.compare import assert_close, assert_same_gradients, twin
from tests.reference.layers import rms_norm, swiglu


@pytest.mark.parametrize("shape", [(1, 1, 7), (3, 5, 13), (2, 63)])
@pytest.mark.parametrize("eps", [1e-6, 0.1])
def test_rms_norm(shape: tuple[int, ...], eps: float):
    torch.manual_seed(1)
    norm = DeepSeekRMSNorm(shape[-1], eps)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(shape, requires_grad=True)
    copies = twin(x), twin(norm.weight)
    leaves = {"x": (x, copies[0]), "weight": (norm.weight, copies[1])}
    assert_same_gradients(norm(x), rms_norm(*copies, eps), leaves)


def test_rms_norm_divides_in_float32_and_answers_in_the_inputs_type():
    torch.manual_seed(1)
    norm = DeepSeekRMSNorm(63)
    x = 300 * torch.randn(7, 63)  # squares overflow in float16
    half = norm.half()(x.half())
    assert half.dtype == torch.float16
    assert_close(half, rms_norm(x.half().double(), torch.ones(63), 1e-6), tolerance=1e-3)


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("width", [7, 63])
def test_swiglu(width: int, bias: bool):
    torch.manual_seed(1)
    mlp = DeepSeekMLP(preset("tiny_llm", hidden_size=24, mlp_bias=bias), intermediate_size=width)
    x = torch.randn(3, 13, 24, requires_grad=True)
    weights = {name: twin(parameter) for name, parameter in mlp.named_parameters()}
    assert len(weights) == (6 if bias else 3)
    copy = twin(x)
    leaves = {"x": (x, copy), **{name: (mlp.get_parameter(name), weights[name]) for name in weights}}
    assert_same_gradients(mlp(x), swiglu(copy, weights), leaves)
