"""V4.1's config: its published file, there and back; every tensor of the release; sources that break an invariant."""

import json
import math

import pytest

from configuration_deepseek import DeepSeekConfig, preset
from configuration_deepseek.official import from_official, to_official, with_quantization
from configuration_deepseek.weight_names import LAYER, with_our_names, with_release_names
from tests.reference.shared_model import ENGRAM
from tests.reference.v41_names import RELEASE, draft_names, v41_names, vision_names

PUBLISHED = {
    **{"architectures": ["DeepseekV41ForCausalLM"], "model_type": "deepseek_v41", "dtype": "bfloat16"},
    **{"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "image_token_id": 129264},
    "quantization_config": {
        **{"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [32, 32]},
        **{"scale_fmt": "ue8m0", "expert_dtype": "fp4"},
    },
    "text_config": {
        **{"model_type": "deepseek_v41_text", "vocab_size": 129280, "hidden_size": 5120, "num_hidden_layers": 40},
        **{"moe_intermediate_size": 2304, "num_attention_heads": 64, "num_key_value_heads": 1, "head_dim": 512},
        **{"qk_rope_head_dim": 64, "q_lora_rank": 1280, "o_lora_rank": 1024, "o_groups": 8, "hidden_act": "silu"},
        **{"swiglu_limit": 10.0, "rms_norm_eps": 1e-20, "attention_bias": False, "rope_theta": 10000},
        "max_position_embeddings": 1048576,
        "rope_scaling": {
            **{"rope_type": "yarn", "factor": 16, "beta_fast": 32, "beta_slow": 1},
            "original_max_position_embeddings": 65536,
        },
        **{"n_routed_experts": 384, "n_shared_experts": 1, "num_experts_per_tok": 6, "scoring_func": "sqrtsoftplus"},
        **{"topk_method": "noaux_tc", "norm_topk_prob": True, "routed_scaling_factor": 1.5, "sliding_window": 128},
        **{"compress_ratios": [0, 0] + [2] * 18 + [1] * 20 + [0] * 3, "compress_rope_theta": 160000},
        **{"kv_source_layer_ids": [2, 8, 14, 20], "index_source_layer_ids": [2, 8, 14, 20, 24, 28, 32, 36]},
        **{"index_n_heads": 32, "index_head_dim": 128, "index_topk": 512, "candidate_source_layer_id": 20},
        **{"candidate_topk_blocks": 2048, "candidate_block_size": 8, "hc_mult": 4, "hc_sinkhorn_iters": 20},
        **{"hc_eps": 1e-06, "engram_layer_ids": [1, 14], "engram_num_embeddings": [384006168, 384016682]},
        **{"engram_max_ngram_size": 4, "engram_vocab_size": 16000000, "engram_n_heads": 8, "engram_head_dim": 256},
        **{"engram_pad_token_id": 2, "engram_compressed_vocab_size": 99092, "num_nextn_predict_layers": 3},
        **{"dspark_block_size": 5, "dspark_noise_token_id": 128799, "dspark_target_layer_ids": [37, 38, 39]},
        **{"dspark_markov_rank": 256, "dspark_n_routed_experts": 128, "dspark_num_experts_per_tok": 3},
    },
    "vision_config": {
        **{"model_type": "deepseek_v41_vision", "num_hidden_layers": 32, "hidden_size": 1024},
        **{"num_attention_heads": 16, "intermediate_size": 2816, "patch_size": 14, "rope_theta": 10000},
        **{"downsample_ratio": 3, "max_image_tokens": 1024, "min_pixels": 295936, "max_wh_ratio": None},
    },
}
TINY = {
    **{"num_hidden_layers": 5, "compress_ratios": [0, 2, 1, 1, 1], "kv_source_layer_ids": [1, 2]},
    **{"index_source_layer_ids": [1, 2, 4], "candidate_source_layer_id": 2},
}
DRAFTS = {
    **{"num_nextn_predict_layers": 2, "dspark_block_size": 3, "dspark_noise_token_id": 7, "dspark_markov_rank": 5},
    **{"dspark_target_layer_ids": [1, 4], "dspark_n_routed_experts": 3},
}


def test_the_published_file_is_the_preset():
    file = json.loads(json.dumps(PUBLISHED))
    config, expected = DeepSeekConfig.from_dict(file), preset("v4.1_flash")
    assert file == PUBLISHED and from_official(from_official(file)) == from_official(file)
    ours, theirs = config.to_dict(), expected.to_dict()
    apart = {"architectures", "source_model_type", "source_quantization_config", "dtype"}
    assert {name for name in {*ours, *theirs} if ours.get(name) != theirs.get(name)} == apart
    assert config.source_quantization_config == PUBLISHED["quantization_config"]


def test_the_published_file_is_written_again():
    config = DeepSeekConfig.from_dict(PUBLISHED)
    back = with_quantization(to_official(config.to_dict()), config.source_quantization_config)
    assert {name: back["text_config"].get(name) for name in PUBLISHED["text_config"]} == PUBLISHED["text_config"]
    assert {name: back[name] for name in PUBLISHED if name != "text_config"} == {
        name: value for name, value in PUBLISHED.items() if name != "text_config"
    }
    with pytest.raises(ValueError, match="config.json of V4.1 has no text_config; copy it from the release"):
        DeepSeekConfig.from_dict({**PUBLISHED, "text_config": None})


def test_every_tensor_of_the_release_is_counted():
    config = preset("v4.1_flash")
    shapes = config.weight_shapes("ForCausalLM")
    bare = [*v41_names(RELEASE, scales=False), *draft_names(RELEASE, scales=False)]
    assert set(with_release_names(dict.fromkeys(shapes), config)) == set(bare)
    names = [*v41_names(RELEASE), *draft_names(RELEASE)]
    assert len(names) + len(vision_names(RELEASE)) == 96_085
    assert list(with_release_names(with_our_names(dict.fromkeys(names), config), config)) == names
    tables = {name: math.prod(shape) for name, shape in shapes.items() if name.endswith("engram.embed.weight")}
    trunk = [shape for name, shape in shapes.items() if not LAYER.match(name) or int(LAYER.match(name)[1]) < 40]
    total = sum(map(math.prod, trunk))
    assert [round(n / 1e9) for n in (total - sum(tables.values()), sum(tables.values()))] == [552, 197]  # 196.6


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"kv_source_layer_ids": [2]}, "compress_ratios[1]=2 reads entries, but none before it is in kv_source_layer"),
        (
            {"kv_source_layer_ids": [1, 2, 3]},
            "layer 3 of kv_source_layer_ids is not in index_source_layer_ids=[1, 2, 4]",
        ),
        ({"kv_source_layer_ids": [2, 1]}, "kv_source_layer_ids=[2, 1] must be layers in ascending order, each once"),
        ({"index_source_layer_ids": None}, "index_source_layer_ids=None must be layers in ascending order"),
        (
            {"index_source_layer_ids": [0, 1, 2]},
            "layer 0 is a source (kv_source_layer_ids, index_source_layer_ids), but",
        ),
        ({"compress_ratios": [0, 2, 1, 2, 1]}, "compress_ratios[3]=2 but the layer whose entries it reads, 2, has 1"),
        (
            {"compress_ratios": [0, 2, 1, -1, 1]},
            "compress_ratios[3]=-1 is no ratio; 0 is a sliding window alone, else it",
        ),
        ({"candidate_source_layer_id": 4}, "candidate_source_layer_id=4 is not in kv_source_layer_ids=[1, 2]"),
        ({"candidate_source_layer_id": 1}, "candidate_source_layer_id=1 comes before [2] of kv_source_layer_ids"),
        ({"candidate_block_size": 0}, "candidate_block_size=0 must be positive with candidate_source_layer_id"),
        (
            {"kv_source_layer_ids": None, "compress_ratios": [2] * 5},
            "choose of shared entries, but kv_source_layer_ids is None",
        ),
        (
            {"hc_mult": None},
            "hc_mult is None, but layers that share entries (kv_source_layer_ids) have residual streams",
        ),
        ({"num_nextn_predict_layers": 1, "mtp_loss_weight": 0.3}, "mtp_loss_weight=0.3 clashes with kv_source_layer"),
        ({"num_hash_layers": 1}, "num_hash_layers=1 clashes with kv_source_layer_ids"),
        ({"layer_specs": [["swa", "moe"]] * 5}, "layer_specs[1] says 'swa', but by kv_source_layer_ids=[1, 2] and"),
        (
            {**DRAFTS, "dspark_num_experts_per_tok": 4},
            "draft stages choose 4 of 3 experts (dspark_num_experts_per_tok",
        ),
        ({**DRAFTS, "dspark_n_routed_experts": 0}, "dspark_n_routed_experts=0 must be positive, or None for as many"),
        ({**DRAFTS, "n_group": 2, "topk_group": 2}, "dspark_n_routed_experts=3 does not make n_group=2 groups of two"),
        (
            {**ENGRAM, **DRAFTS, "dspark_target_layer_ids": [3, 4]},
            "dspark_target_layer_ids=[3, 4] has [3] of engram_layer_ids, whose streams change before the layer reads",
        ),
        ({"engram_layer_ids": [1]}, "engram_num_embeddings=None must have a positive number of rows for each of"),
        ({"engram_layer_ids": [1], "engram_num_embeddings": [9]}, "engram_max_ngram_size=None must be positive with"),
    ],
    ids=str,
)
def test_sources_that_break_an_invariant(changes, says):
    with pytest.raises(ValueError) as refused:
        preset("tiny_v4.1", **{**TINY, **changes})
    assert says in str(refused.value) and "\n" not in str(refused.value)


def test_words_of_shared_entries_go_with_sources_alone():
    with pytest.raises(ValueError, match=r"layer_specs\[1\] says 'csa2_full', but by kv_source_layer_ids=None"):
        preset("tiny_v4", layer_specs=[["swa", "moe"], ["csa2_full", "moe"], ["hca", "moe"]])
    with pytest.raises(ValueError, match="residual 'mhc_shifted', which clashes with kv_source_layer_ids=None"):
        preset("tiny_v4", layer_specs=[[w, "moe", "mhc_shifted"] for w in ("swa", "csa", "hca")])
    fewer = preset("v4.1_flash", num_hidden_layers=9, dspark_block_size=None)
    assert [spec.attention for spec in fewer.specs][7:] == ["csa2_reuse", "csa2_full"]
