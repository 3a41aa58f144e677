"""Named sizes as data: tiny ones for tests, and those of the published checkpoints.

Every row is a set of `DeepSeekConfig` fields; `preset(name)` makes a fresh config of it. A name is `tiny_` or nothing,
the generation as it was published, and what tells its models apart: `tiny_v3.2`, `v2_lite`.
"""

import difflib
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from .configuration_deepseek import DeepSeekConfig

_SOFTMAX_GREEDY = {"scoring_func": "softmax", "topk_method": "greedy"}
_SOFTMAX_GROUPS = {"scoring_func": "softmax", "topk_method": "group_limited_greedy"}
_SIGMOID_GROUPS = {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "norm_topk_prob": True}
_V1_TOKENS = {"vocab_size": 102400, "bos_token_id": 100000, "eos_token_id": 100001}
_V3_TOKENS = {"vocab_size": 129280, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}


def _yarn(mscale: float) -> dict[str, Any]:
    """YaRN from 4096 to 163840 positions, as in V2 and V3."""
    return {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 40.0,
        "original_max_position_embeddings": 4096,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": mscale,
        "mscale_all_dim": mscale,
    }


_TINY: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
_TINY_MLA: dict[str, Any] = {"kv_lora_rank": 16, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 10}
_TINY_MOE: dict[str, Any] = {
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 20,
    "first_k_dense_replace": 1,
}
_MLA = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
_V2: dict[str, Any] = {
    **_V1_TOKENS,
    **_MLA,
    **_SOFTMAX_GROUPS,
    "hidden_size": 5120,
    "intermediate_size": 12288,
    "num_hidden_layers": 60,
    "num_attention_heads": 128,
    "q_lora_rank": 1536,
    "n_routed_experts": 160,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "moe_intermediate_size": 1536,
    "first_k_dense_replace": 1,
    "n_group": 8,
    "topk_group": 3,
    "routed_scaling_factor": 16.0,
    "max_position_embeddings": 163840,
}

PRESETS: dict[str, dict[str, Any]] = {
    "tiny_llm": {**_TINY, "num_key_value_heads": 2},
    "tiny_moe": {**_TINY, **_TINY_MOE, **_SOFTMAX_GREEDY},
    "tiny_v2_lite": {**_TINY, **_TINY_MLA, **_TINY_MOE, **_SOFTMAX_GREEDY},
    "tiny_v2": {
        **_TINY,
        **_TINY_MLA,
        **_TINY_MOE,
        **_SOFTMAX_GROUPS,
        "q_lora_rank": 24,
        "n_group": 4,
        "topk_group": 2,
        "routed_scaling_factor": 16.0,
    },
    "tiny_v3": {
        **_TINY,
        **_TINY_MLA,
        **_TINY_MOE,
        **_SIGMOID_GROUPS,
        "q_lora_rank": 24,
        "n_shared_experts": 1,
        "n_group": 4,
        "topk_group": 2,
        "routed_scaling_factor": 2.5,
    },
    "tiny_v3_mtp": {
        **_TINY,
        **_TINY_MLA,
        **_TINY_MOE,
        **_SIGMOID_GROUPS,
        "q_lora_rank": 24,
        "n_shared_experts": 1,
        "num_nextn_predict_layers": 2,
    },
    "llm_7b": {**_V1_TOKENS, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 30},
    "moe_16b": {
        **_V1_TOKENS,
        **_SOFTMAX_GREEDY,
        "hidden_size": 2048,
        "intermediate_size": 10944,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "num_experts_per_tok": 6,
        "moe_intermediate_size": 1408,
        "first_k_dense_replace": 1,
    },
    "v2_lite": {
        **_V1_TOKENS,
        **_MLA,
        **_SOFTMAX_GREEDY,
        "hidden_size": 2048,
        "intermediate_size": 10944,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "num_experts_per_tok": 6,
        "moe_intermediate_size": 1408,
        "first_k_dense_replace": 1,
        "max_position_embeddings": 163840,
        "rope_parameters": _yarn(0.707),
    },
    "v2": {**_V2, "rope_parameters": _yarn(0.707)},
    "v2.5": {**_V2, "rope_parameters": _yarn(1.0)},
    "v3": {
        **_V3_TOKENS,
        **_MLA,
        **_SIGMOID_GROUPS,
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "num_hidden_layers": 61,
        "num_attention_heads": 128,
        "q_lora_rank": 1536,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 2048,
        "first_k_dense_replace": 3,
        "n_group": 8,
        "topk_group": 4,
        "routed_scaling_factor": 2.5,
        "max_position_embeddings": 163840,
        "rope_parameters": _yarn(1.0),
        "num_nextn_predict_layers": 1,
    },
}
PRESETS["r1"] = PRESETS["v3"]
PRESETS["tiny_v3.2"] = {**PRESETS["tiny_v3"], "index_n_heads": 6, "index_head_dim": 14, "index_topk": 5}
PRESETS["v3.2_exp"] = {**PRESETS["v3"], "index_n_heads": 64, "index_head_dim": 128, "index_topk": 2048}
PRESETS["v3.2"] = PRESETS["v3.2_exp"]
_ROOT_SOFTPLUS = {"scoring_func": "sqrtsoftplus", "topk_method": "noaux_tc", "norm_topk_prob": True}
PRESETS["tiny_v4"] = {
    **{name: value for name, value in _TINY.items() if name != "intermediate_size"},  # V4 has no dense layers
    **_ROOT_SOFTPLUS,
    "head_dim": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "o_groups": 2,
    "o_lora_rank": 12,
    "sliding_window": 5,
    "compress_ratios": [0, 4, 3],
    "compress_rope_theta": 160000.0,
    "index_n_heads": 6,
    "index_head_dim": 14,
    "index_topk": 1,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 20,
    "routed_scaling_factor": 1.5,
    "swiglu_limit": 10.0,
    "hc_mult": 3,
    "hc_sinkhorn_iters": 4,
}
_V4: dict[str, Any] = {
    **_ROOT_SOFTPLUS,
    **{"vocab_size": 129280, "bos_token_id": 0, "eos_token_id": 1, "max_position_embeddings": 1048576},
    **{"head_dim": 512, "qk_rope_head_dim": 64, "o_lora_rank": 1024, "sliding_window": 128},
    **{"compress_rope_theta": 160000.0, "index_n_heads": 64, "index_head_dim": 128},
    **{"n_shared_experts": 1, "num_experts_per_tok": 6, "num_hash_layers": 3, "swiglu_limit": 10.0, "hc_mult": 4},
    "num_nextn_predict_layers": 1,
    "rope_parameters": {
        **{"rope_type": "yarn", "rope_theta": 10000.0, "factor": 16.0, "beta_fast": 32.0, "beta_slow": 1.0},
        "original_max_position_embeddings": 65536,
    },
}
PRESETS["v4_flash"] = {
    **_V4,
    **{"hidden_size": 4096, "num_hidden_layers": 43, "num_attention_heads": 64, "q_lora_rank": 1024, "o_groups": 8},
    **{"compress_ratios": [0, 0, *[4, 128] * 20, 4, 0], "index_topk": 512, "routed_scaling_factor": 1.5},
    **{"n_routed_experts": 256, "moe_intermediate_size": 2048},
}
PRESETS["v4_pro"] = {
    **_V4,
    **{"hidden_size": 7168, "num_hidden_layers": 61, "num_attention_heads": 128, "q_lora_rank": 1536, "o_groups": 16},
    **{"compress_ratios": [128, 128, *[4, 128] * 29, 4, 0], "index_topk": 1024, "routed_scaling_factor": 2.5},
    **{"n_routed_experts": 384, "moe_intermediate_size": 3072},
}
PRESETS["tiny_v4.1"] = {
    **{name: value for name, value in PRESETS["tiny_v4"].items() if name not in ("compress_ratios", "index_topk")},
    **{"num_hidden_layers": 5, "compress_ratios": [0, 2, 1, 1, 1], "index_topk": 2, "rms_norm_eps": 1e-20},
    **{"kv_source_layer_ids": [1, 2], "index_source_layer_ids": [1, 2, 4]},
    **{"candidate_source_layer_id": 2, "candidate_topk_blocks": 2, "candidate_block_size": 2},
    "image_token_id": 96,
}
PRESETS["v4.1_flash"] = {
    **{name: value for name, value in _V4.items() if name != "num_hash_layers"},
    **{"hidden_size": 5120, "num_hidden_layers": 40, "num_attention_heads": 64, "q_lora_rank": 1280, "o_groups": 8},
    **{"pad_token_id": 2, "image_token_id": 129264, "rms_norm_eps": 1e-20, "expert_dtype": "fp4"},
    **{"compress_ratios": [0, 0, *[2] * 18, *[1] * 20, 0, 0, 0], "index_n_heads": 32, "index_topk": 512},
    **{"kv_source_layer_ids": [2, 8, 14, 20], "index_source_layer_ids": [2, 8, 14, 20, 24, 28, 32, 36]},
    **{"candidate_source_layer_id": 20, "candidate_topk_blocks": 2048, "candidate_block_size": 8},
    **{"engram_layer_ids": [1, 14], "engram_num_embeddings": [384006168, 384016682], "engram_max_ngram_size": 4},
    **{"engram_vocab_size": 16000000, "engram_n_heads": 8, "engram_head_dim": 256, "engram_pad_token_id": 2},
    **{"engram_compressed_vocab_size": 99092, "n_routed_experts": 384, "moe_intermediate_size": 2304},
    "routed_scaling_factor": 1.5,
    **{"num_nextn_predict_layers": 3, "dspark_block_size": 5, "dspark_noise_token_id": 128799},
    **{"dspark_target_layer_ids": [37, 38, 39], "dspark_markov_rank": 256},
    **{"dspark_n_routed_experts": 128, "dspark_num_experts_per_tok": 3},
    "vision_config": {
        **{"model_type": "deepseek_v41_vision", "num_hidden_layers": 32, "hidden_size": 1024},
        **{"num_attention_heads": 16, "intermediate_size": 2816, "patch_size": 14, "rope_theta": 10000},
        **{"downsample_ratio": 3, "max_image_tokens": 1024, "min_pixels": 295936, "max_wh_ratio": None},
    },
}
PRESETS["v4_flash_0731"] = {
    **PRESETS["v4_flash"],
    **{"compress_ratios": [0, 0, *[4, 128] * 20, 4, 0, 0, 0], "num_nextn_predict_layers": 3},
    **{"dspark_block_size": 5, "dspark_noise_token_id": 128799, "dspark_target_layer_ids": [40, 41, 42]},
    "dspark_markov_rank": 256,
}
OLD_NAMES = {"tiny_v32": "tiny_v3.2", "tiny_v41": "tiny_v4.1", "v41_flash": "v4.1_flash"}  # and short ones


class About(NamedTuple):
    """What a preset is, for people; parameters as a language model, without prediction layers."""

    generation: str
    total: str
    active: str  # that one token uses
    use: str


ABOUT = {
    "tiny_llm": About("LLM", "29.5 k", "29.5 k", "small models from scratch by --config_overrides, tests"),
    "tiny_moe": About("MoE-16B", "62.2 k", "43.0 k", "the same, with experts"),
    "tiny_v2_lite": About("V2-Lite", "68.0 k", "48.8 k", "the same, with latent attention"),
    "tiny_v2": About("V2", "68.5 k", "49.3 k", "the same, with groups of experts"),
    "tiny_v3": About("V3", "64.7 k", "45.5 k", "the same, with the router of V3; what most recipes begin with"),
    "tiny_v3_mtp": About("V3", "64.7 k", "45.5 k", "the same, with two prediction layers and no groups"),
    "tiny_v3.2": About("V3.2", "72.7 k", "53.5 k", "the same, with sparse attention"),
    "tiny_v4": About("V4", "88.7 k", "59.9 k", "the same, with compressed attention and residual streams"),
    "tiny_v4.1": About("V4.1", "139.5 k", "91.5 k", "the same, with entries that layers share; no n-grams"),
    "llm_7b": About("LLM", "6.9 B", "6.9 B", "the shape of DeepSeek-LLM-7B"),
    "moe_16b": About("MoE-16B", "16.4 B", "2.8 B", "the shape of DeepSeekMoE-16B"),
    "v2_lite": About("V2-Lite", "15.7 B", "2.7 B", "the shape of DeepSeek-V2-Lite"),
    "v2": About("V2", "235.7 B", "21.4 B", "the shape of DeepSeek-V2"),
    "v2.5": About("V2", "235.7 B", "21.4 B", "the shape of DeepSeek-V2.5"),
    "v3": About("V3", "671.0 B", "37.6 B", "the shape of DeepSeek-V3 and V3.1"),
    "r1": About("V3", "671.0 B", "37.6 B", "the shape of DeepSeek-R1"),
    "v3.2_exp": About("V3.2", "671.9 B", "38.4 B", "the shape of DeepSeek-V3.2-Exp"),
    "v3.2": About("V3.2", "671.9 B", "38.4 B", "the shape of DeepSeek-V3.2"),
    "v4_flash": About("V4", "284.3 B", "13.8 B", "the shape of DeepSeek-V4-Flash"),
    "v4_flash_0731": About("V4", "284.3 B", "13.8 B", "the shape of DeepSeek-V4-Flash-0731, with draft stages"),
    "v4_pro": About("V4", "1573.0 B", "49.8 B", "the shape of DeepSeek-V4-Pro"),
    "v4.1_flash": About("V4.1", "748.5 B", "16.8 B", "the shape of DeepSeek-V4.1-Flash"),
}


def preset(name: str, **overrides: Any) -> "DeepSeekConfig":
    """Make the config of a named size.

    Args:
        name: a key of `PRESETS`, or of `OLD_NAMES`.
        overrides: fields that replace the preset's own.

    Raises:
        ValueError: for an unknown name, with the nearest known one.
    """
    from .configuration_deepseek import DeepSeekConfig  # brings torch, which the table does without

    name = OLD_NAMES.get(name, name)
    if name not in PRESETS:
        nearest = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f"did you mean {nearest[0]!r}?" if nearest else "known: " + ", ".join(PRESETS)
        raise ValueError(f"unknown preset {name!r}; {hint}")
    fields = {**PRESETS[name], **overrides}
    if isinstance(fields.get("rope_parameters"), dict):
        fields["rope_parameters"] = dict(fields["rope_parameters"])  # configs complete theirs in place
    return DeepSeekConfig(**fields)
