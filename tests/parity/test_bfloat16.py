"""bfloat16: every tiny preset runs, trains and generates, near the float32 result."""

import pytest
import torch

from configuration_deepseek import PRESETS, preset
from modeling_deepseek import DeepSeekForCausalLM

TINY = [name for name in PRESETS if name.startswith("tiny_")]
ALL_ENTRIES = {"tiny_v4.1": {"index_topk": 13, "candidate_source_layer_id": None}}  # nor a choice of entries


def learning(model: DeepSeekForCausalLM) -> list[torch.nn.Parameter]:
    """Parameters that the language model's loss reaches: all but those of indexers and prediction layers."""
    apart = (".indexer.", *(f".layers.{i}." for i in range(model.config.num_hidden_layers, len(model.model.layers))))
    return [parameter for name, parameter in model.named_parameters() if not any(part in name for part in apart)]


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", TINY)
def test_bfloat16(name: str, implementation: str, tmp_path):
    torch.manual_seed(1)
    # dense layers: rounding may flip a choice of experts, and then nothing is near
    exact = DeepSeekForCausalLM(preset(name, first_k_dense_replace=9, **ALL_ENTRIES.get(name, {}))).eval()
    exact.save_pretrained(tmp_path)
    model = DeepSeekForCausalLM.from_pretrained(
        tmp_path, dtype=torch.bfloat16, attn_implementation=implementation
    ).eval()
    ids = torch.randint(3, 97, (2, 13))
    with torch.no_grad():
        ours, expected = model(ids).logits, exact(ids).logits
    assert ours.dtype == torch.bfloat16
    assert (ours - expected).abs().max() < 0.05 * expected.abs().max()


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", TINY)
def test_bfloat16_with_experts_trains_and_generates(name: str, implementation: str):
    torch.manual_seed(1)
    model = DeepSeekForCausalLM(preset(name, eos_token_id=None)).to(torch.bfloat16)
    model.set_attn_implementation(implementation)
    ids = torch.randint(3, 97, (2, 13))
    loss = model(ids, labels=ids).loss
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in learning(model))
    assert all(p.dtype == p.grad.dtype == torch.bfloat16 for p in learning(model))
    assert model.eval().generate(ids, do_sample=False, max_new_tokens=5).shape == (2, 18)


@pytest.mark.parametrize("name", TINY)
def test_autocast(name: str):
    torch.manual_seed(1)
    model = DeepSeekForCausalLM(preset(name, eos_token_id=None)).eval()
    ids = torch.randint(3, 97, (2, 13))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(ids, labels=ids).loss
        generated = model.generate(ids, do_sample=False, max_new_tokens=5)
    loss.backward()
    assert loss.isfinite()
    assert generated.shape == (2, 18)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in learning(model))
