"""Residual streams against their formulas and transformers' own, outputs and gradients."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers.models.deepseek_v4 import modeling_deepseek_v4 as native

from configuration_deepseek import preset
from modeling_deepseek import DeepSeekForCausalLM
from modeling_deepseek.residual import RESIDUALS, STREAMS, HyperConnection, HyperStreams, sinkhorn
from tests.reference import residual as reference
from tests.reference.compare import assert_close, assert_same_gradients, twin

NAMES = ("fn", "base", "scale")


def config_of(**fields) -> SimpleNamespace:
    sizes = {"hidden_size": 13, "hc_mult": 4, "hc_sinkhorn_iters": 20, "hc_eps": 1e-6, "rms_norm_eps": 1e-6}
    return SimpleNamespace(**{**sizes, **fields})


def filled(module: nn.Module, spread: float = 1.0) -> nn.Module:
    torch.manual_seed(3)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=spread)
    return module


def leaves_of(module: nn.Module, **others: torch.Tensor) -> tuple[dict[str, torch.Tensor], dict]:
    """Float64 twins of the module's weights and of others by name, and the pairs that gradients are taken of."""
    tensors = {**dict(module.named_parameters()), **others}
    twins = {name: twin(tensor) for name, tensor in tensors.items()}
    return twins, {name: (tensors[name], twins[name]) for name in tensors}


CONFIGS = {
    "V4": {},
    "two streams": {"hc_mult": 2},
    "one stream": {"hc_mult": 1},
    "one iteration": {"hc_sinkhorn_iters": 1},
    "large eps": {"rms_norm_eps": 0.1},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_hyper_connection(name):
    config = config_of(**CONFIGS[name])
    module = filled(HyperConnection(config), 0.6)
    streams = torch.randn(2, 3, config.hc_mult, 13, requires_grad=True)
    weight = torch.randn(13, 13, requires_grad=True)
    twins, leaves = leaves_of(module, streams=streams, weight=weight)
    tokens = twins["streams"].flatten(0, 1)
    expected = [
        reference.hyper_connection(x, lambda y: torch.tanh(twins["weight"] @ y), twins, vars(config)) for x in tokens
    ]
    ours = module(streams, lambda x, factor: torch.tanh(factor * x @ weight.T), factor=1)
    assert_same_gradients(ours, torch.stack(expected).view_as(ours), leaves)


def test_hyper_streams():
    config = config_of()
    module = filled(HyperStreams(config))
    hidden = torch.randn(2, 3, 13)
    assert torch.equal(module.enter(hidden), torch.stack([hidden] * 4, dim=2))
    streams = torch.randn(2, 3, 4, 13, requires_grad=True)
    twins, leaves = leaves_of(module, streams=streams)
    expected = [reference.hyper_head(x, twins, vars(config)) for x in twins["streams"].flatten(0, 1)]
    assert_same_gradients(module(streams), torch.stack(expected).view(2, 3, 13), leaves)


def test_as_in_transformers():
    config = config_of()
    ours, head = filled(HyperConnection(config)), filled(HyperStreams(config))
    theirs, their_head = native.DeepseekV4HyperConnection(config), native.DeepseekV4HyperHead(config)
    theirs.load_state_dict(ours.state_dict())
    their_head.load_state_dict({f"hc_{name}": tensor for name, tensor in head.state_dict().items()})
    streams = torch.randn(2, 63, 4, 13, requires_grad=True)
    weight = torch.randn(13, 13, requires_grad=True)
    post, comb, collapsed = theirs(streams)
    mixed = post.unsqueeze(-1) * (collapsed @ weight).unsqueeze(-2) + comb.transpose(-1, -2) @ streams
    pairs = zip(ours.named_parameters(), theirs.parameters(), strict=True)
    leaves = {name: (one, other) for (name, one), other in pairs}
    both = {"streams": (streams, streams), "weight": (weight, weight)}
    assert_same_gradients(ours(streams, lambda x: x @ weight), mixed, {**leaves, **both})
    pairs = zip(head.named_parameters(), their_head.parameters(), strict=True)
    leaves = {name: (one, other) for (name, one), other in pairs}
    assert_same_gradients(head(streams), their_head(streams), {**leaves, "streams": (streams, streams)})


@pytest.mark.parametrize("spread", [0.1, 1, 10, 30])
def test_sinkhorn_far_from_balance(spread):
    """Released weights reach saturated rows, where a plain chain of divisions is left with sums near eps."""
    torch.manual_seed(1)
    logits = (torch.randn(3, 4, 4) * spread).requires_grad_()
    copy = twin(logits)
    expected = torch.stack([reference.sinkhorn(matrix, 20, 1e-6) for matrix in copy])
    assert_same_gradients(sinkhorn(logits, 20, 1e-6), expected, {"logits": (logits, copy)})


def test_sinkhorn_where_every_row_wants_one_column():
    logits = torch.tensor([[200.0, 0, 0, 0]] * 4, requires_grad=True)
    ours = sinkhorn(logits, 20, 1e-6)
    assert_close(ours, reference.sinkhorn(logits.detach().double(), 20, 1e-6))
    assert_close(ours.sum(0), torch.ones(4))
    (gradient,) = torch.autograd.grad((ours * torch.randn(4, 4)).sum(), logits)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("word", ["add", "mhc"])
def test_every_word_has_one_interface(word):
    config = config_of()
    residual, streams = RESIDUALS[word](config), STREAMS[word](config)
    for module in (residual, streams):
        if isinstance(module, nn.Module):
            filled(module)
    hidden = torch.randn(2, 3, 13)
    inner = streams.enter(hidden)
    after = residual(inner, lambda x, factor: factor * x, factor=2)
    assert after.shape == inner.shape and streams(after).shape == hidden.shape
    assert word == "mhc" or torch.equal(streams(after), 3 * hidden)


def test_coefficients_are_float32_under_autocast_and_in_a_bfloat16_model():
    config = config_of(hidden_size=64)
    module = filled(HyperConnection(config), 0.3).bfloat16()
    streams = torch.randn(2, 3, 4, 64).bfloat16()
    copy = HyperConnection(config)
    copy.load_state_dict(module.state_dict())  # float32, the same numbers
    expected = copy(streams.float(), lambda x: x.bfloat16().float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = module(streams, lambda x: x)
        pre, post, comb = module.coefficients(streams)
    assert ours.dtype == torch.bfloat16 and {x.dtype for x in (pre, post, comb)} == {torch.float32}
    assert_close(ours, expected, tolerance=2**-8)


def test_a_model_of_any_attention_takes_streams():
    """What reads the trunk's state gets one stream, and gradients reach all weights."""
    torch.manual_seed(0)
    model = DeepSeekForCausalLM(preset("tiny_v3", hc_mult=3, hidden_dropout=0.1))
    assert [spec.residual for spec in model.config.specs] == ["mhc"] * 3
    ids = torch.arange(3, 17).view(2, 7)
    result = model(ids, labels=ids, output_hidden_states=True, use_cache=False)
    assert result.hidden_states[0].shape == (2, 7, 3, 32) and result.logits.shape == (2, 7, 97)
    result.loss.backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert all("experts" in name for name in missing), missing
    own = {name for name, _ in model.named_parameters() if "hc" in name}
    expected = {f"model.layers.{i}.{part}_hc.{name}" for i in range(3) for part in ("attn", "ffn") for name in NAMES}
    assert own == expected | {f"model.hc_head.{name}" for name in NAMES}


def test_checkpointed_streams_learn_the_same():
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = DeepSeekForCausalLM(preset("tiny_moe", hc_mult=2)).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        ids = torch.arange(3, 17).view(2, 7)
        model(ids, labels=ids, use_cache=False).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)


def test_layers_of_one_model_have_one_residual():
    with pytest.raises(ValueError, match=r"residuals \['add', 'mhc'\]; layers hand on one kind of state"):
        preset("tiny_llm", hc_mult=2, num_hidden_layers=2, layer_specs=[["mha", "dense", "add"], ["mha", "dense"]])
