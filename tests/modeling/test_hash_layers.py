"""Hash layers and limited SwiGLU (V4): against the reference and transformers, and what is refused."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import DeepseekV4Config
from transformers.models.deepseek_v4 import modeling_deepseek_v4 as native

from configuration_deepseek import DeepSeekConfig, preset
from modeling_deepseek import DeepSeekForCausalLM
from modeling_deepseek.layers import DeepSeekMLP
from modeling_deepseek.moe import DeepSeekHashMoE, DeepSeekMoE
from tests.modeling.conftest import outputs, tiny, token_ids
from tests.modeling.test_moe import official_weights
from tests.reference.compare import assert_close, assert_same_gradients, twin
from tests.reference.layers import swiglu
from tests.reference.moe import moe

V4 = {"scoring_func": "sqrtsoftplus", "n_group": 1, "topk_group": 1, "swiglu_limit": 0.8, "num_hash_layers": 2}


def config_of(**fields) -> DeepSeekConfig:
    return preset("tiny_v3", **{**V4, **fields})


def filled(layer: torch.nn.Module) -> torch.nn.Module:
    torch.manual_seed(3)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return layer


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_hash_layer(implementation):
    config = config_of()
    config._experts_implementation = implementation
    layer = filled(DeepSeekHashMoE(config))
    layer.gate.tid2eid.copy_(torch.rand(config.vocab_size, 8).topk(config.num_experts_per_tok).indices)
    ids = token_ids(3, 7)
    x = torch.randn(3, 7, config.hidden_size, requires_grad=True)
    weights, leaves = official_weights(layer)
    copy = twin(x)
    expected = moe(copy.flatten(0, 1), weights, config.to_dict(), ids=ids.flatten().tolist()).view_as(x)
    assert_same_gradients(layer(x, ids), expected, {"x": (x, copy), **leaves})


@pytest.mark.parametrize("limit", [0.5, 3.0])
def test_limited_swiglu(limit):
    mlp = filled(DeepSeekMLP(config_of(swiglu_limit=limit), 24))
    x = torch.randn(5, 32, requires_grad=True)
    twins = {name: twin(parameter) for name, parameter in mlp.named_parameters()}
    copy = twin(x)
    gate, up = mlp.gate_proj(x), mlp.up_proj(x)
    assert (gate > limit).any() and (gate < -limit).any() and (up.abs() > limit).any()
    leaves = {"x": (x, copy), **{name: (mlp.get_parameter(name), twins[name]) for name in twins}}
    assert_same_gradients(mlp(x), swiglu(copy, twins, limit=limit), leaves)


@pytest.mark.parametrize("kind", ["hash_moe", "moe"])
def test_as_in_transformers(kind):
    config = config_of(n_shared_experts=1)
    ours = filled({"hash_moe": DeepSeekHashMoE, "moe": DeepSeekMoE}[kind](config))
    sizes = ("vocab_size", "hidden_size", "moe_intermediate_size", "n_routed_experts", "num_experts_per_tok")
    fields = {name: getattr(config, name) for name in (*sizes, "routed_scaling_factor", "swiglu_limit")}
    their_config = DeepseekV4Config(
        **fields, num_hidden_layers=1, mlp_layer_types=[kind], layer_types=["sliding_attention"]
    )
    config._experts_implementation = their_config._experts_implementation = "eager"
    theirs = native.DeepseekV4SparseMoeBlock(their_config, 0)
    for name, buffer in ours.gate.named_buffers():
        buffer.copy_(buffer.roll(1, 0) if name == "tid2eid" else torch.randn(buffer.shape))
    theirs.load_state_dict(ours.state_dict())
    ids, x = token_ids(3, 7), torch.randn(3, 7, config.hidden_size, requires_grad=True)
    pairs = zip(ours.named_parameters(), theirs.named_parameters(), strict=True)
    leaves = {name: (one, other) for (name, one), (_, other) in pairs}
    assert_same_gradients(ours(x, ids), theirs(x, ids), {"x": (x, x), **leaves})


def test_a_new_table_gives_every_token_different_experts_and_all_experts_tokens():
    table = DeepSeekHashMoE(config_of()).gate.tid2eid
    assert table.shape == (97, 3) and all(len(set(row)) == 3 for row in table.tolist())
    counts = torch.bincount(table.flatten(), minlength=8)
    assert counts.max() - counts.min() <= 3


def test_a_model_hands_its_hash_layers_the_ids():
    model, ids = tiny("tiny_v3", **V4), token_ids(2, 7)
    assert [spec.feed_forward for spec in model.config.specs] == ["dense", "hash_moe", "moe"]
    assert not hasattr(model.model.layers[1].mlp.gate, "e_score_correction_bias")
    before = outputs(model, ids)
    model.model.layers[1].mlp.gate.tid2eid[ids[0, 3]] = torch.tensor([7, 6, 5])
    assert (outputs(model, ids) - before)[0, 3].abs().max() > 1e-3
    assert torch.equal(outputs(model, ids)[0, :3], before[0, :3])
    with torch.no_grad():
        generated = model.generate(ids, max_new_tokens=3, do_sample=False)
        uncached = model.generate(ids, max_new_tokens=3, do_sample=False, use_cache=False)
    assert torch.equal(generated, uncached)


def test_what_has_no_experts_is_refused():
    model = tiny("tiny_v3", **V4)
    with pytest.raises(ValueError, match="hash layers choose experts by the token's id: give input_ids, not inputs_e"):
        model(inputs_embeds=torch.randn(1, 3, 32))
    model.resize_token_embeddings(100)
    with pytest.raises(ValueError, match="token id 98 has no row in tid2eid, whose ids are 0 to 96; add its row"):
        model(torch.tensor([[4, 98]]))
    with pytest.raises(ValueError, match="token id -1 has no row in tid2eid"):
        model.model.layers[1].mlp(torch.randn(1, 1, 32), torch.tensor([[-1]]))


def test_a_table_that_is_missing_or_names_no_expert_is_refused(tmp_path):
    tiny("tiny_v3", **V4).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    key = "model.layers.1.mlp.gate.tid2eid"
    table = weights.pop(key)
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=f"1 weights of the model are not in the checkpoint, the first is {key}"):
        DeepSeekForCausalLM.from_pretrained(tmp_path)
    save_file(weights | {key: table + 1}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=f"{key} names expert 8, but n_routed_experts=8; copy the checkpoint again"):
        DeepSeekForCausalLM.from_pretrained(tmp_path)
    save_file(weights | {key: table.int()}, tmp_path / "model.safetensors", {"format": "pt"})
    loaded = DeepSeekForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert torch.equal(loaded.model.layers[1].mlp.gate.tid2eid.long(), table)
    assert_close(outputs(loaded, token_ids(1, 7)).float(), outputs(tiny("tiny_v3", **V4), token_ids(1, 7)), "", 0.1)
