"""Configs of compressed attention and residual streams (V4): what follows from the fields, and what is refused."""

import pytest

from configuration_deepseek import DeepSeekConfig, LayerSpec
from configuration_deepseek.official import to_official

V4 = {
    **{"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "head_dim": 16},
    **{"q_lora_rank": 24, "qk_rope_head_dim": 8, "o_groups": 2, "o_lora_rank": 12, "sliding_window": 6},
    **{"compress_ratios": [0, 4, 8, 4, 0], "compress_rope_theta": 160000.0},
    **{"index_n_heads": 6, "index_head_dim": 14, "index_topk": 3},
    **{"n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 3, "moe_intermediate_size": 20},
    **{"scoring_func": "sqrtsoftplus", "topk_method": "noaux_tc", "norm_topk_prob": True, "num_hash_layers": 2},
    **{"hc_mult": 4, "swiglu_limit": 10.0, "bos_token_id": 0, "eos_token_id": 1},
}


def test_layers_follow_from_ratios():
    config = DeepSeekConfig(**V4)
    assert config.specs == [
        LayerSpec("swa", "hash_moe", "mhc"),
        LayerSpec("csa", "hash_moe", "mhc"),
        LayerSpec("hca", "moe", "mhc"),
        LayerSpec("csa", "moe", "mhc"),
    ]
    assert config.prediction_spec == LayerSpec("swa", "moe", "mhc")
    assert config.layer_types == [
        "deepseek_window",
        "deepseek_compressed_indexed",
        "deepseek_compressed",
        "deepseek_compressed_indexed",
    ]
    assert (config.num_key_value_heads, config.head_dim, config.rope_interleave) == (1, 16, True)
    again = DeepSeekConfig.from_dict(config.to_dict())
    assert again.specs == config.specs and again.compress_ratios == V4["compress_ratios"]


def test_words_may_say_otherwise_than_the_ratios():
    words = [["swa", "moe"], ["hca", "hash_moe", "mhc"], ["csa", "moe"], ["csa", "moe"]]
    config = DeepSeekConfig(**V4, layer_specs=words)
    assert [spec.attention for spec in config.specs] == ["swa", "hca", "csa", "csa"]
    assert [spec.residual for spec in config.specs] == ["mhc"] * 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"compress_ratios": [0, 4, 8]}, "compress_ratios has 3 entries but num_hidden_layers=4; give one per layer"),
        ({"compress_ratios": [0, 4, 1, 4]}, "compress_ratios[2]=1 is no ratio"),
        ({"compress_ratios": [0, -4, 8, 4]}, "compress_ratios[1]=-4 is no ratio"),
        ({"kv_lora_rank": 16}, "kv_lora_rank=16 clashes with compress_ratios; unset one of them"),
        ({"attention_bias": True}, "attention_bias=True clashes with compress_ratios"),
        ({"sliding_window": None}, "sliding_window=None must be positive where there are compress_ratios"),
        ({"compress_rope_theta": None}, "compress_rope_theta=None must be positive"),
        ({"q_lora_rank": None}, "q_lora_rank=None must be positive"),
        ({"o_groups": 3}, "num_attention_heads=4 is no multiple of o_groups=3; change one of them"),
        ({"num_key_value_heads": 4}, "num_key_value_heads=4 clashes with compress_ratios: all heads share one key"),
        ({"qk_rope_head_dim": 18, "index_head_dim": 20}, "qk_rope_head_dim=18 must be even and at most head_dim=16"),
        ({"index_topk": None}, "index_topk=None must be positive for sparse attention"),
        ({"attention_direction": "bidirectional"}, "attention_direction='bidirectional' clashes with compress_ratios"),
        ({"hc_mult": 0}, "hc_mult=0 must be positive for residual streams"),
        ({"swiglu_limit": 0.0}, "swiglu_limit=0.0 must be positive, or None for no limit"),
        ({"num_hash_layers": -1}, "num_hash_layers=-1 must be at least 0"),
        ({"topk_method": "greedy"}, "scoring_func='sqrtsoftplus' clashes with topk_method='greedy'"),
        ({"layer_specs": [["mha", "moe"]] * 4}, "layer_specs[0] says 'mha', which clashes with compress_ratios"),
        ({"layer_specs": [["csa", "moe"]] * 4}, "layer_specs[0] says 'csa' but compress_ratios[0] does not"),
        ({"layer_specs": [["swa", "moe", "mhhc"]] * 4}, "unknown word 'mhhc'; did you mean 'mhc'?"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(changes, message):
    with pytest.raises(ValueError) as refusal:
        DeepSeekConfig(**{**V4, **changes})
    assert message in str(refusal.value) and "\n" not in str(refusal.value)


DRAFTS = {
    **{
        "dspark_block_size": 5,
        "dspark_noise_token_id": 60,
        "dspark_target_layer_ids": [1, 3],
        "dspark_markov_rank": 4,
    },
    "num_nextn_predict_layers": 2,
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dspark_block_size": 0}, "dspark_block_size=0 must be positive where there are draft stages"),
        ({"dspark_markov_rank": None}, "dspark_markov_rank=None must be positive where there are draft stages"),
        ({"num_nextn_predict_layers": 0}, "num_nextn_predict_layers=0 must be positive where there are draft stages"),
        ({"dspark_noise_token_id": 61}, "dspark_noise_token_id=61 must be a token of vocab_size=61"),
        ({"dspark_target_layer_ids": [1, 4]}, "dspark_target_layer_ids=[1, 4] must be ascending, below num_hidden_l"),
        ({"dspark_target_layer_ids": [3, 1]}, "dspark_target_layer_ids=[3, 1] must be ascending"),
        ({"dspark_target_layer_ids": None}, "dspark_target_layer_ids=[] must be ascending"),
        ({"hc_mult": None}, "dspark_block_size=5 clashes with hc_mult=None, for V4 alone drafts so"),
    ],
)
def test_draft_stages_that_cannot_be_are_refused_in_one_line(changes, message):
    with pytest.raises(ValueError) as refusal:
        DeepSeekConfig(**{**V4, **DRAFTS, **changes})
    assert message in str(refusal.value) and "\n" not in str(refusal.value)


def test_the_number_of_draft_stages_is_that_of_the_ratios():
    """Releases say num_nextn_predict_layers=1 for their three stages."""
    config = DeepSeekConfig(**{**V4, **DRAFTS, "compress_ratios": V4["compress_ratios"][:4]})
    assert config.compress_ratios == [0, 4, 8, 4, 0, 0] and config.spec_at(5) == LayerSpec("dspark", "moe", "mhc")
    official = to_official(config.to_dict())
    assert official["num_nextn_predict_layers"] == 1 and len(official["compress_ratios"]) == 6
    assert {name: official[name] for name in DRAFTS if name.startswith("dspark")} == {
        name: value for name, value in DRAFTS.items() if name.startswith("dspark")
    }
    again = DeepSeekConfig.from_dict(official)
    assert again.num_nextn_predict_layers == 2 and again.compress_ratios == config.compress_ratios
    again.without_predictions()
    assert DeepSeekConfig.from_dict(again.to_dict()).num_nextn_predict_layers == 0


def test_compressed_words_need_ratios():
    with pytest.raises(ValueError, match="says 'swa', which clashes with compress_ratios=None"):
        DeepSeekConfig(num_hidden_layers=1, layer_specs=[["swa", "dense"]])
