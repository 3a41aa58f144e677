"""Whole models against the slow reference, through the checkpoint that they save.

DeepSeekMoE-16B and V2 with norm_topk_prob or moe_layer_freq have no native class in transformers to compare with.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from configuration_deepseek import DeepSeekConfig, preset
from modeling_deepseek import DeepSeekForCausalLM
from tests.parity.pairs import randomise
from tests.reference.compare import assert_close
from tests.reference.model import causal_lm

SMALL = {"vocab_size": 31, "num_hidden_layers": 2, "initializer_range": 0.2}
MODELS = {
    "llm": ("tiny_llm", {}),
    "moe_16b": ("tiny_moe", {}),
    "moe_16b, normalised": ("tiny_moe", {"norm_topk_prob": True}),
    "moe_16b, every second layer": ("tiny_moe", {"moe_layer_freq": 2, "num_hidden_layers": 4}),
    "moe_16b, groups": ("tiny_moe", {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2}),
    "v2_lite": ("tiny_v2_lite", {}),
    "v2": ("tiny_v2", {}),
    "v2, normalised and not scaled": ("tiny_v2", {"norm_topk_prob": True}),
    "v3": ("tiny_v3", {}),
    "v3, no shared experts": ("tiny_v3", {"n_shared_experts": None}),
    "v3, tied": ("tiny_v3", {"tie_word_embeddings": True}),
    "v3.2": ("tiny_v32", {}),
}
# fields of DeepSeekMoE-16B's config.json, whose model_type is also ours
MOE_16B = {
    "model_type": "deepseek",
    "architectures": ["DeepseekForCausalLM"],
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekConfig"},
    "scoring_func": "softmax",
    "seq_aux": True,
    "aux_loss_alpha": 0.001,
    "pretraining_tp": 1,
    "rope_theta": 10000.0,
    "rope_scaling": None,
}


@pytest.fixture(params=MODELS, scope="module")
def saved(request, tmp_path_factory) -> tuple[DeepSeekForCausalLM, Path]:
    base, fields = MODELS[request.param]
    torch.manual_seed(1)
    model = DeepSeekForCausalLM(preset(base, **{**SMALL, **fields})).eval()
    randomise(model, seed=1)
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    return model, folder


def test_logits_and_gradients(saved):
    model, folder = saved
    weights = {
        name: tensor.double().requires_grad_() for name, tensor in load_file(folder / "model.safetensors").items()
    }
    fields = DeepSeekConfig.from_pretrained(folder).to_dict()
    ids = [3, 14, 15, 9, 26, 5, 3]
    logits, expected = model(torch.tensor([ids])).logits[0], causal_lm(ids, weights, fields)
    assert_close(logits, expected, "logits")

    parameters = {name: parameter for name, parameter in model.named_parameters() if ".indexer." not in name}
    ours = dict(zip(parameters, torch.autograd.grad(logits.pow(2).mean(), parameters.values()), strict=True))
    learnt = {name: tensor for name, tensor in weights.items() if not name.endswith("e_score_correction_bias")}
    gradients = torch.autograd.grad(expected.pow(2).mean(), learnt.values(), allow_unused=True, materialize_grads=True)
    reference = dict(zip(learnt, gradients, strict=True))
    for name, gradient in ours.items():
        assert_close(gradient, fused(name, reference), f"gradient of {name}")


def fused(name: str, weights: dict[str, torch.Tensor]) -> torch.Tensor:
    """The tensor of a parameter of ours from official names, where experts are one by one."""
    if name in weights:
        return weights[name]
    prefix, _, kind = name.rpartition(".")

    def stacked(part: str) -> torch.Tensor:
        experts = sum(key.startswith(f"{prefix}.") and key.endswith(f".{part}.weight") for key in weights)
        return torch.stack([weights[f"{prefix}.{expert}.{part}.weight"] for expert in range(experts)])

    if kind == "gate_up_proj":
        return torch.cat((stacked("gate_proj"), stacked("up_proj")), dim=1)
    return stacked(kind)


def test_published_moe_16b_config(tmp_path):
    """A folder as DeepSeekMoE-16B's: its own config.json, per-expert tensors."""
    torch.manual_seed(1)
    config = preset("tiny_moe", **SMALL)
    model = DeepSeekForCausalLM(config).eval()
    model.save_pretrained(tmp_path)
    kept = (
        "hidden_size hidden_act intermediate_size max_position_embeddings moe_intermediate_size n_routed_experts "
        "n_shared_experts norm_topk_prob num_attention_heads num_experts_per_tok num_hidden_layers vocab_size "
        "num_key_value_heads rms_norm_eps first_k_dense_replace moe_layer_freq bos_token_id eos_token_id"
    )
    fields = {name: getattr(config, name) for name in kept.split()}
    (tmp_path / "config.json").write_text(json.dumps({**fields, **MOE_16B}))
    loaded, info = DeepSeekForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert loaded.config.source_model_type == "deepseek"
    ids = torch.randint(3, 31, (2, 7))
    with torch.no_grad():
        assert_close(loaded.eval()(ids).logits, model(ids).logits, "logits", tolerance=1e-6)
