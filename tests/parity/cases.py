"""The configurations in which our model is compared with transformers' own classes.

A row is a name, the native model_type and the config fields that differ from the tiny base of that type. Adding a row
is enough for every test of this folder to run it.
"""

from typing import Any

TRUNK = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
LATENT = {"q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 10}
EXPERTS = {"n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 20, "first_k_dense_replace": 1}
# so many heads that keys which all of them ignore, whose scores tie at zero, are rare
INDEXER = {"index_n_heads": 30, "index_head_dim": 12, "index_topk": 5}
GROUPS = {"n_group": 4, "topk_group": 2}
BASES: dict[str, dict[str, Any]] = {
    "llama": TRUNK,
    "qwen2": TRUNK,
    "qwen3": {**TRUNK, "head_dim": 10},
    "deepseek_v2": {**TRUNK, **LATENT, **EXPERTS, "n_shared_experts": 2},
    "deepseek_v3": {**TRUNK, **LATENT, **EXPERTS, **GROUPS, "n_shared_experts": 1, "num_nextn_predict_layers": 0},
    "deepseek_v32": {**TRUNK, **LATENT, **EXPERTS, **GROUPS, **INDEXER, "n_shared_experts": 1},
}
ODD_LATENT = {
    "hidden_size": 33,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "q_lora_rank": 13,
    "kv_lora_rank": 11,
    "qk_nope_head_dim": 7,
    "qk_rope_head_dim": 6,
    "v_head_dim": 5,
    "moe_intermediate_size": 9,
}


def rope(rope_type: str, **fields: Any) -> dict[str, Any]:
    """`rope_parameters` with a theta at which tiny heads still turn at different speeds."""
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": 10000.0, **fields}}


def yarn(**mscales: float) -> dict[str, Any]:
    """YaRN by 40, as in the releases, from a length that tiny inputs exceed."""
    betas = {"beta_fast": 32.0, "beta_slow": 1.0}
    return rope("yarn", factor=40.0, original_max_position_embeddings=8, **betas, **mscales)


LLAMA3 = rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16)

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    # V1: DeepSeek-LLM, Coder 1.x
    "llm": ("llama", {}),
    "llm_gqa": ("llama", {"num_key_value_heads": 2}),
    "llm_mqa": ("llama", {"num_key_value_heads": 1}),
    "llm_bias": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llm_tied": ("llama", {"tie_word_embeddings": True}),
    "llm_odd": ("llama", {"hidden_size": 33, "num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 14}),
    "llm_eps": ("llama", {"rms_norm_eps": 0.1}),
    "llm_linear": ("llama", rope("linear", factor=4.0)),
    "llm_llama3": ("llama", {**LLAMA3, "num_key_value_heads": 2}),
    "llm_yarn": ("llama", yarn()),
    "llm_dynamic": ("llama", {**rope("dynamic", factor=4.0), "max_position_embeddings": 8}),
    # R1-Distill
    "distill_qwen2": ("qwen2", {"num_key_value_heads": 2}),
    "distill_qwen3": ("qwen3", {"num_key_value_heads": 2, "rms_norm_eps": 1e-3}),
    # V2, V2-Lite, V2.5
    "v2_lite": ("deepseek_v2", {"q_lora_rank": None}),
    "v2_greedy": ("deepseek_v2", {}),
    "v2_groups": ("deepseek_v2", {**GROUPS, "topk_method": "group_limited_greedy", "routed_scaling_factor": 16.0}),
    "v2_one_kept_group": (
        "deepseek_v2",
        {"n_group": 2, "topk_group": 1, "topk_method": "group_limited_greedy"},
    ),
    "v2_yarn_0.707": ("deepseek_v2", {**yarn(mscale=0.707, mscale_all_dim=0.707), "q_lora_rank": None}),
    "v2_yarn_1.0": ("deepseek_v2", yarn(mscale=1.0, mscale_all_dim=1.0)),
    "v2_bias": ("deepseek_v2", {"attention_bias": True, "mlp_bias": True}),
    "v2_five_experts": ("deepseek_v2", {"n_routed_experts": 5, "num_experts_per_tok": 2, "n_shared_experts": 1}),
    "v2_top_one": ("deepseek_v2", {"num_experts_per_tok": 1, "routed_scaling_factor": 2.0}),
    "v2_dense": ("deepseek_v2", {"first_k_dense_replace": 2}),
    "v2_tied": ("deepseek_v2", {"tie_word_embeddings": True, "first_k_dense_replace": 0}),
    # transformers' V2 rotates by viewing pairs as complex numbers, which needs even offsets
    "v2_odd": ("deepseek_v2", {**ODD_LATENT, "kv_lora_rank": 14, "qk_nope_head_dim": 10}),
    # V3, R1, V3.1
    "v3": ("deepseek_v3", {}),
    "v3_unnormalised": ("deepseek_v3", {"norm_topk_prob": False}),
    "v3_half_rope": ("deepseek_v3", {"rope_interleave": False}),
    "v3_direct_query": ("deepseek_v3", {"q_lora_rank": None}),
    "v3_experts_everywhere": ("deepseek_v3", {"first_k_dense_replace": 0}),
    "v3_dense": ("deepseek_v3", {"first_k_dense_replace": 2}),
    "v3_seven_experts": ("deepseek_v3", {"n_routed_experts": 7, "n_group": 1, "topk_group": 1}),
    "v3_nine_in_three": (
        "deepseek_v3",
        {"n_routed_experts": 9, "n_group": 3, "topk_group": 2, "num_experts_per_tok": 5, "n_shared_experts": 2},
    ),
    "v3_top_one": ("deepseek_v3", {"num_experts_per_tok": 1, "norm_topk_prob": False}),
    "v3_yarn_1.0": ("deepseek_v3", yarn(mscale=1.0, mscale_all_dim=1.0)),
    "v3_yarn_two_mscales": ("deepseek_v3", yarn(mscale=0.707, mscale_all_dim=1.0)),
    "v3_linear": ("deepseek_v3", rope("linear", factor=4.0)),
    "v3_bias": ("deepseek_v3", {"attention_bias": True}),
    "v3_tied": ("deepseek_v3", {"tie_word_embeddings": True}),
    "v3_odd": ("deepseek_v3", ODD_LATENT),
    # V3.2
    "v32": ("deepseek_v32", {}),
    "v32_every_key": ("deepseek_v32", {"index_topk": 64}),
    "v32_two_keys": ("deepseek_v32", {"index_topk": 2}),
    "v32_yarn_1.0": ("deepseek_v32", yarn(mscale=1.0, mscale_all_dim=1.0)),
    "v32_bias": ("deepseek_v32", {"attention_bias": True, "tie_word_embeddings": True}),
    "v32_odd": ("deepseek_v32", {**ODD_LATENT, "index_n_heads": 31, "index_head_dim": 7, "index_topk": 6}),
}
