"""Names of V4's releases and ours: there and back, at published sizes, and what transformers makes of them."""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from configuration_deepseek.weight_names import (
    QUANTIZED,
    ROUTED,
    from_v4_name,
    to_v4_name,
    with_our_names,
    with_release_names,
)
from tests.reference.v4_names import v4_names

RELEASES = {
    "V4-Flash": ([0, 0] + [4, 128] * 20 + [4], 3, 256, 1),
    "V4-Flash-0731": ([0, 0] + [4, 128] * 20 + [4], 3, 256, 0, 3),
    "V4-Pro, few experts": ([128, 128] + [4, 128] * 29 + [4], 3, 12, 1),
}
BY_HAND = {
    "embed.weight": "model.embed_tokens.weight",
    "head.weight": "lm_head.weight",
    "norm.weight": "model.norm.weight",
    "hc_head_scale": "model.hc_head.scale",
    "layers.0.attn_norm.weight": "model.layers.0.input_layernorm.weight",
    "layers.7.attn.kv_norm.weight": "model.layers.7.self_attn.kv_norm.weight",
    "layers.7.attn.wo_a.scale": "model.layers.7.self_attn.wo_a.weight_scale_inv",
    "layers.7.attn.indexer.compressor.ape": "model.layers.7.self_attn.indexer.compressor.ape",
    "layers.7.hc_attn_scale": "model.layers.7.attn_hc.scale",
    "layers.7.hc_ffn_fn": "model.layers.7.ffn_hc.fn",
    "layers.2.ffn.gate.tid2eid": "model.layers.2.mlp.gate.tid2eid",
    "layers.3.ffn.gate.bias": "model.layers.3.mlp.gate.e_score_correction_bias",
    "layers.3.ffn.experts.12.w3.weight": "model.layers.3.mlp.experts.12.up_proj.weight",
    "layers.3.ffn.experts.12.w2.scale": "model.layers.3.mlp.experts.12.down_proj.weight_scale_inv",
    "layers.3.ffn.shared_experts.w1.weight": "model.layers.3.mlp.shared_experts.gate_proj.weight",
    "mtp.0.norm.weight": "model.layers.43.shared_head.norm.weight",
    "mtp.0.hc_head_base": "model.layers.43.hc_head.base",
    "mtp.0.hc_attn_base": "model.layers.43.attn_hc.base",
    "mtp.0.e_proj.scale": "model.layers.43.e_proj.weight_scale_inv",
    "mtp.1.ffn.experts.0.w1.weight": "model.layers.44.mlp.experts.0.gate_proj.weight",
    "mtp.0.main_proj.scale": "model.layers.43.main_proj.weight_scale_inv",
    "mtp.2.markov_head.markov_w1.weight": "model.layers.45.markov_head.markov_w1.weight",
}


@pytest.mark.parametrize("name", BY_HAND)
def test_by_hand(name):
    assert from_v4_name(name, 43) == BY_HAND[name]
    assert to_v4_name(BY_HAND[name], 43) == name


@pytest.mark.parametrize("release", RELEASES)
def test_all_names_of_a_release_there_and_back(release):
    ratios, hashed, experts, *ahead = RELEASES[release]
    names = v4_names(ratios, hashed, experts, *ahead)
    config = SimpleNamespace(kv_source_layer_ids=None, num_hidden_layers=len(ratios), compress_ratios=ratios)
    ours = with_our_names(dict.fromkeys(names), config)
    assert len(ours) == len(names) == len(set(names))
    assert all(name.startswith(("model.", "lm_head.")) for name in ours)
    assert list(with_release_names(ours, config)) == names
    assert with_our_names(ours, config) is ours
    weights = {name for name in ours if QUANTIZED.fullmatch(name)}
    assert {f"{name}_scale_inv" for name in weights} == {name for name in ours if name.endswith("_scale_inv")}
    routed = sum(ROUTED.fullmatch(name) is not None for name in ours)
    assert routed == (len(ratios) + sum(ahead)) * experts * 3


def test_counted_by_hand():
    """Of V4-Flash, per block: 4 norms, 6 of streams, 5 projections with scales, 1 sink, 2 of the gate, and experts."""
    block = 4 + 6 + 5 * 2 + 1 + 2 + (256 + 1) * 6
    csa, hca, predicted = 4 + 2 + 1 + 4, 4, 4 + 3 + 3
    total = 6 + 44 * block + 21 * csa + 20 * hca + predicted
    assert len(v4_names(*RELEASES["V4-Flash"])) == total == 69_187
    drafting = 2 * block + 3 + 1 + 3 + 3  # two stages more; main_proj with its scale and norm, norm, streams, heads
    assert len(v4_names(*RELEASES["V4-Flash-0731"])) == total - predicted + drafting == 72_317


def test_transformers_finds_a_place_for_each_of_these_names():
    """Its own table, applied to the names of a small release, gives exactly the weights of its model."""
    ratios = [0, 4, 128]
    config = DeepseekV4Config(
        **{"vocab_size": 8, "hidden_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2, "head_dim": 8},
        **{"moe_intermediate_size": 4, "q_lora_rank": 4, "n_routed_experts": 2, "num_experts_per_tok": 1},
        **{"o_groups": 1, "o_lora_rank": 4, "compress_ratios": ratios, "num_hash_layers": 1, "qk_rope_head_dim": 4},
    )
    with torch.device("meta"):
        state = DeepseekV4ForCausalLM(config).state_dict()
    transforms = get_checkpoint_conversion_mapping("deepseek_v4")
    renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
    names = v4_names(ratios, 1, 2, scales=False)
    found = {rename_source_key(name, renamings, converters, "model", state)[0] for name in names}
    assert found == {name for name in state if "inv_freq" not in name}


def test_names_as_transformers_saves_them(tmp_path):
    sizes = {"hidden_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2, "head_dim": 8, "vocab_size": 8}
    experts = {"moe_intermediate_size": 4, "n_routed_experts": 2, "num_experts_per_tok": 1, "num_hash_layers": 1}
    latent = {"q_lora_rank": 4, "o_groups": 1, "o_lora_rank": 4, "qk_rope_head_dim": 4, "compress_ratios": [0, 4, 128]}
    config = DeepseekV4Config(**sizes, **experts, **latent, index_n_heads=2, index_head_dim=8, sliding_window=4)
    DeepseekV4ForCausalLM(config).save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    released = v4_names([0, 4, 128], 1, 2, scales=False)
    assert set(saved) != set(released)
    wanted = SimpleNamespace(kv_source_layer_ids=None, num_hidden_layers=3, compress_ratios=[0, 4, 128])
    assert set(with_our_names(saved, wanted)) == {from_v4_name(name, 3) for name in released}
