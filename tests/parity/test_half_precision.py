"""Loaded in bfloat16, the gate stays in float32, as transformers keeps it since 5.24.

A router's scores decide by which experts a token is transformed; rounded weights flip choices near a tie, and then
nothing downstream is near. With all experts chosen, routing is equal by force and what is left is rounding.
"""

import pytest
import torch
from transformers import AutoModelForCausalLM

from modeling_deepseek import DeepSeekForCausalLM
from tests.parity.pairs import EAGER, native_config, randomise

GENERATIONS = ("v2_greedy", "v3", "v32_every_key")
EVERY_EXPERT = {"n_routed_experts": 4, "num_experts_per_tok": 4, "n_group": 1, "topk_group": 1}


def in_bfloat16(name, folder, **overrides):
    """The native model and ours out of one float32 checkpoint, both read as bfloat16, and the exact native one."""
    torch.manual_seed(3)
    exact = AutoModelForCausalLM.from_config(native_config(name, **overrides), **EAGER).eval()
    randomise(exact, 3)
    exact.save_pretrained(folder)
    native = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **EAGER).eval()
    ours = DeepSeekForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **EAGER).eval()
    return native, ours, exact


@torch.no_grad()
def distance(model, other, ids):
    """The largest difference of logits, over the largest logit."""
    expected = other(ids).logits.float()
    return ((model(ids).logits.float() - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("name", GENERATIONS)
def test_the_gate_alone_stays_in_float32(name, tmp_path):
    _, ours, exact = in_bfloat16(name, tmp_path)
    for key, parameter in ours.named_parameters():
        is_gate = key.endswith("mlp.gate.weight")
        assert parameter.dtype == (torch.float32 if is_gate else torch.bfloat16), key
        if is_gate:
            assert torch.equal(parameter, exact.get_parameter(key)), key


@pytest.mark.parametrize("name", GENERATIONS)
def test_logits_are_as_near_as_native_ones_where_routing_is_equal(name, tmp_path):
    native, ours, exact = in_bfloat16(name, tmp_path, **EVERY_EXPERT)
    ids = torch.randint(3, 61, (4, 13))
    assert distance(ours, native, ids) < 0.02
    assert distance(ours, exact, ids) < max(0.02, 1.5 * distance(native, exact, ids))


@pytest.mark.parametrize("name", GENERATIONS)
def test_choices_flip_no_more_often_than_native_ones_where_routing_is_free(name, tmp_path):
    native, ours, exact = in_bfloat16(name, tmp_path)
    ids = torch.randint(3, 61, (16, 13))

    def choices(model):
        """[tokens, E] booleans of the last layer: which experts the gate takes."""
        taken = []
        gate = model.model.layers[-1].mlp.gate
        hook = model.model.layers[-1].mlp.experts.register_forward_pre_hook(lambda _, inputs: taken.append(inputs[1]))
        with torch.no_grad():
            model(ids)
        hook.remove()
        return torch.zeros(taken[0].shape[0], gate.weight.shape[0], dtype=torch.bool).scatter(1, taken[0], True)

    wanted = choices(exact)
    flips = [(choices(model) != wanted).any(1).float().mean().item() for model in (ours, native)]
    assert flips[0] <= flips[1] + 0.03, flips
