"""Published config.json files, of whatever model_type, as fields of `DeepSeekConfig`, and back.

A source is a row of each table below, under its published model_type. Fields keep their published names; those few
that are called otherwise here stand in `RENAMES`, what the model has no use for in `UNUSED_FIELDS`. The same rows say
what `to_official` writes. The file travels to the Hub with configuration_deepseek.py.
"""

import re
from typing import Any

V4_TOKENS = {"vocab_size": 129280, "bos_token_id": 0, "eos_token_id": 1}
SOFTMAX_ROUTER = {"scoring_func": "softmax", "topk_method": "greedy", "norm_topk_prob": False}
SIGMOID_ROUTER = {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "norm_topk_prob": True}
V1_TOKENS = {"bos_token_id": 100000, "eos_token_id": 100001}

# model_type -> defaults of that source's own config class (transformers' and the remote code's agree on these)
SOURCES: dict[str, dict[str, Any]] = {
    "llama": {"vocab_size": 32000, "bos_token_id": 1, "eos_token_id": 2},  # LLM, Coder 1, Math, R1-Distill-Llama
    "qwen2": {"vocab_size": 151936},  # R1-Distill-Qwen
    "qwen3": {"vocab_size": 151936, "head_dim": 128},  # R1-0528-Qwen3
    "deepseek": {**SOFTMAX_ROUTER, **V1_TOKENS},  # MoE-16B; first upload of V2
    "deepseek_v2": {**SOFTMAX_ROUTER, **V1_TOKENS},  # V2, V2-Lite, V2.5, Coder-V2
    "deepseek_v3": {**SIGMOID_ROUTER, "vocab_size": 129280, "bos_token_id": 0, "eos_token_id": 1},  # V3, R1, V3.1
    "deepseek_v32": {  # V3.2-Exp, V3.2
        **SIGMOID_ROUTER,
        **{"vocab_size": 129280, "bos_token_id": 0, "eos_token_id": 1},
        **{"index_n_heads": 64, "index_head_dim": 128, "index_topk": 2048},
    },
    "deepseek_v4": {  # V4 Flash, Pro, Base, and their releases of July and August
        **{"scoring_func": "sqrtsoftplus", "topk_method": "noaux_tc", "norm_topk_prob": True},
        **{"num_key_value_heads": 1, "routed_scaling_factor": 1.5, "swiglu_limit": 10.0, "num_hash_layers": 3},
        **{"sliding_window": 128, "compress_rope_theta": 160000.0, "hc_mult": 4},
        **V4_TOKENS,
    },
    "deepseek_v41": {  # V4.1-Flash; its text_config
        **{"scoring_func": "sqrtsoftplus", "topk_method": "noaux_tc", "norm_topk_prob": True},
        **{"num_key_value_heads": 1, "routed_scaling_factor": 1.5, "swiglu_limit": 10.0, "rms_norm_eps": 1e-20},
        **{"sliding_window": 128, "compress_rope_theta": 160000.0, "hc_mult": 4},
        **V4_TOKENS,
    },
}
# model_type -> what the source does without a field saying so
FIXED: dict[str, dict[str, Any]] = {
    "qwen2": {"attention_bias": True, "attention_out_bias": False},
    "qwen3": {"use_qk_norm": True},
}
ARCHITECTURES = {
    "llama": "Llama",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "deepseek": "Deepseek",
    "deepseek_v2": "DeepseekV2",
    "deepseek_v3": "DeepseekV3",
    "deepseek_v32": "DeepseekV32",
    "deepseek_v4": "DeepseekV4",
    "deepseek_v41": "DeepseekV41",
}

TRUNK_FIELDS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "max_position_embeddings"),
    *("num_attention_heads", "num_key_value_heads", "attention_bias", "attention_dropout", "hidden_act"),
    *("initializer_range", "rms_norm_eps", "tie_word_embeddings", "use_cache"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "dtype"),
)
HEAD_FIELDS = ("head_dim",)
EXPERT_FIELDS = (
    *("n_routed_experts", "n_shared_experts", "num_experts_per_tok", "moe_intermediate_size"),
    *("first_k_dense_replace", "moe_layer_freq", "scoring_func", "norm_topk_prob"),
)
GROUP_FIELDS = ("topk_method", "n_group", "topk_group", "routed_scaling_factor")
COMPRESSED_FIELDS = (
    *("q_lora_rank", "qk_rope_head_dim", "o_groups", "o_lora_rank", "sliding_window"),
    *("compress_ratios", "compress_rope_theta", "index_n_heads", "index_head_dim", "index_topk"),
)
V4_FIELDS = (
    *("num_hash_layers", "swiglu_limit", "expert_dtype", "hc_mult", "hc_sinkhorn_iters", "hc_eps"),
    *("topk_method", "routed_scaling_factor", "num_nextn_predict_layers"),
    *("dspark_block_size", "dspark_noise_token_id", "dspark_target_layer_ids", "dspark_markov_rank"),
    *("dspark_n_routed_experts", "dspark_num_experts_per_tok"),
)
V41_FIELDS = (
    *("kv_source_layer_ids", "index_source_layer_ids"),
    *("candidate_source_layer_id", "candidate_topk_blocks", "candidate_block_size"),
    *("engram_layer_ids", "engram_num_embeddings", "engram_max_ngram_size", "engram_vocab_size", "engram_n_heads"),
    *("engram_head_dim", "engram_compressed_vocab_size", "engram_pad_token_id"),
    *("image_token_id", "vision_config"),
)
LATENT_FIELDS = ("kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
# model_type -> the fields that its published config.json has, by our names
PUBLISHED_FIELDS: dict[str, tuple[str, ...]] = {
    "llama": (*TRUNK_FIELDS, *HEAD_FIELDS, "mlp_bias"),
    "qwen2": TRUNK_FIELDS,
    "qwen3": (*TRUNK_FIELDS, *HEAD_FIELDS),
    "deepseek": (*TRUNK_FIELDS, *EXPERT_FIELDS),
    "deepseek_v2": (*TRUNK_FIELDS, *EXPERT_FIELDS, *GROUP_FIELDS, *LATENT_FIELDS),
    "deepseek_v3": (*TRUNK_FIELDS, *EXPERT_FIELDS, *GROUP_FIELDS, *LATENT_FIELDS, "num_nextn_predict_layers"),
    "deepseek_v32": (
        *(*TRUNK_FIELDS, *EXPERT_FIELDS, *GROUP_FIELDS, *LATENT_FIELDS, "num_nextn_predict_layers"),
        *("index_n_heads", "index_head_dim", "index_topk"),
    ),
    "deepseek_v4": (
        *(name for name in TRUNK_FIELDS if name != "intermediate_size"),
        *(name for name in EXPERT_FIELDS if name not in ("first_k_dense_replace", "moe_layer_freq")),
        *(*HEAD_FIELDS, *COMPRESSED_FIELDS, *V4_FIELDS),
    ),
    "deepseek_v41": (
        *(name for name in TRUNK_FIELDS if name != "intermediate_size"),
        *(name for name in EXPERT_FIELDS if name not in ("first_k_dense_replace", "moe_layer_freq")),
        *(*HEAD_FIELDS, *COMPRESSED_FIELDS, *(name for name in V4_FIELDS if name != "num_hash_layers"), *V41_FIELDS),
    ),
}
# model_type -> which of them stand beside text_config
BESIDE_TEXT = {
    "deepseek_v41": (
        *("bos_token_id", "eos_token_id", "pad_token_id", "image_token_id", "dtype", "vision_config"),
        "expert_dtype",  # as long as nothing is quantized; then it stands in quantization_config
    ),
}
# (attention of the layers, scores of the router) -> model_type
SOURCE_BY_MECHANISM = {
    ("mha", None): "llama",
    ("mha with bias", None): "qwen2",
    ("mha with norms", None): "qwen3",
    ("mha", "softmax"): "deepseek",
    ("mla", "softmax"): "deepseek_v2",
    ("mla", "sigmoid"): "deepseek_v3",
    ("dsa", "sigmoid"): "deepseek_v32",
    ("compressed", "sqrtsoftplus"): "deepseek_v4",
    ("compressed and shared", "sqrtsoftplus"): "deepseek_v41",
}

# Published name -> ours. Under its own name transformers would take the entry for a wish to run quantized.
RENAMES = {"quantization_config": "source_quantization_config", "num_mtp_layers": "num_nextn_predict_layers"}
UNUSED_FIELDS = {
    "auto_map",  # names the repository's remote code, which is not run
    "aux_loss_alpha",  # training hyper-parameters of the release
    "seq_aux",
    "router_aux_loss_coef",
    "router_jitter_noise",
    "ep_size",  # parallel layout of the release's own inference code
    "pretraining_tp",
    "qk_head_dim",  # derived
    "mlp_layer_types",  # says what first_k_dense_replace says
    "layer_types",  # all "full_attention" where sliding windows are refused
    "sliding_window",  # without effect unless use_sliding_window
    "max_window_layers",
    "use_sliding_window",
    "use_mrope",
    "transformers_version",
}
# model_type -> those of them that it does use
USED_AFTER_ALL = {"deepseek_v4": {"sliding_window"}, "deepseek_v41": {"sliding_window"}}
# Numbers that a release may write without a point (V4.1: "compress_rope_theta": 160000).
REAL_FIELDS = (
    *("compress_rope_theta", "swiglu_limit", "routed_scaling_factor", "rms_norm_eps", "hc_eps"),
    *("attention_dropout", "initializer_range"),
)
# Where a release misspelled a word.
SPELLINGS = {"topk_method": {"gready": "greedy"}}

# Models that look alike and are none of ours.
OTHERS = {
    "deepseek_vl": "DeepSeek-VL",
    "deepseek_vl_hybrid": "DeepSeek-VL",
    "deepseek_vl_v2": "DeepSeek-VL2",
    "deepseek_ocr2": "DeepSeek-OCR 2",
    "multi_modality": "Janus",
    "kimi_k2": "Kimi K2",
    "kimi_k25": "Kimi K2.5",
    "kimi_linear": "Kimi Linear",
    "glm4_moe": "GLM-4.5",
    "glm4_moe_lite": "GLM-4.7-Flash",
    "glm_moe_dsa": "GLM-5",
    "qwen3_moe": "Qwen3-MoE",
}
SUPPORTED = "DeepSeek-LLM, Coder, Math, MoE-16B, V2, V2.5, V3, V3.1, V3.2, V4, V4.1, R1 and R1-Distill"


CSA_RATIO = 4
TRANSFORMERS_RATES = {"compressed_sparse_attention": CSA_RATIO, "heavily_compressed_attention": 128}
TRANSFORMERS_KINDS = {
    "sliding_attention": "swa",
    "compressed_sparse_attention": "csa",
    "heavily_compressed_attention": "hca",
}
NOT_SCALING = ("rope_theta", "partial_rotary_factor", "attention_factor")


def from_official(config_dict: dict[str, Any]) -> dict[str, Any]:
    """Translate a published config.json; a dictionary in our own form comes back as it is.

    Args:
        config_dict: the parsed file. Its `model_type` may be any of `SOURCES`.

    Returns:
        Keyword arguments of `DeepSeekConfig`, with `source_model_type` saying where they came from.

    Raises:
        ValueError: for a model_type that is no DeepSeek text model known here, for sliding windows, and for quantized
            weights of another kind than the releases' FP8 blocks.
    """
    model_type = config_dict.get("model_type")
    if model_type is None or (model_type == "deepseek" and "deepseek_format" in config_dict):
        return config_dict
    if model_type not in SOURCES:
        known = f" ({OTHERS[model_type]})" if model_type in OTHERS else ""
        raise ValueError(
            f"config.json has model_type {model_type!r}{known}, which DeepSeekConfig cannot read; it reads "
            f"{', '.join(map(repr, SOURCES))}: {SUPPORTED}"
        )
    _refuse_unsupported(config_dict, model_type)
    config_dict = IN_PUBLISHED_FORM.get(model_type, dict)(config_dict)
    fields = {
        RENAMES.get(key, key): dict(value) if isinstance(value, dict) else value  # configs complete theirs in place
        for key, value in config_dict.items()
        if key not in UNUSED_FIELDS - USED_AFTER_ALL.get(model_type, set()) and not (key in RENAMES and value is None)
    }
    fields |= {key: float(fields[key]) for key in REAL_FIELDS if type(fields.get(key)) is int}
    for key, spellings in SPELLINGS.items():
        if fields.get(key) in spellings:
            fields[key] = spellings[fields[key]]
    if fields.get("architectures"):  # by which some scripts choose a class of transformers, past the Auto classes
        published = re.compile("|".join(sorted(ARCHITECTURES.values(), reverse=True)))
        fields["architectures"] = [published.sub("DeepSeek", name, count=1) for name in fields["architectures"]]
    defaults = {key: value for key, value in SOURCES[model_type].items() if fields.get(key) is None}
    source = {"model_type": "deepseek", "source_model_type": model_type, "deepseek_format": 1}
    return {**fields, **defaults, **FIXED.get(model_type, {}), **source}


def attention_of_ratio(ratio: int) -> str:
    """The attention of a V4 layer: the release's own code gives overlapping blocks and an indexer to ratio 4 alone."""
    return {0: "swa", CSA_RATIO: "csa"}.get(ratio, "hca")


def _v4_as_published(config_dict: dict[str, Any]) -> dict[str, Any]:
    """A V4 config as transformers writes it, with words for layers and two rotary dictionaries, as it was published.

    Raises:
        ValueError: for a word of a layer that is none of V4's.
    """
    fields = dict(config_dict)
    rates = {"sliding_attention": 0, **TRANSFORMERS_RATES, **(fields.pop("compress_rates", None) or {})}
    words, experts = fields.get("layer_types") or [], fields.get("mlp_layer_types")
    if experts is not None:
        fields["num_hash_layers"] = experts.count("hash_moe")
    if fields.get("compress_ratios") is None:
        if unknown := [word for word in words if word not in rates]:
            raise ValueError(f"config.json has layer_types with {unknown[0]!r}; V4's are {', '.join(rates)}")
        if not words:
            raise ValueError("config.json has neither compress_ratios nor layer_types; copy it from the release")
        fields["compress_ratios"] = [rates[word] for word in words]
        kinds = [TRANSFORMERS_KINDS[word] for word in words]
        if kinds != [attention_of_ratio(ratio) for ratio in fields["compress_ratios"]]:
            fields["layer_specs"] = [list(pair) for pair in zip(kinds, experts or ["moe"] * len(kinds), strict=True)]
    if fields.get("dspark_block_size") is not None:  # num_nextn_predict_layers says 1, whatever their number
        stages = len(fields["compress_ratios"]) - fields["num_hidden_layers"]
        fields["num_nextn_predict_layers"] = stages or fields.get("num_nextn_predict_layers")
    rope = fields.get("rope_parameters") or {}
    if "main" in rope and "compress" in rope:
        fields["compress_rope_theta"] = rope["compress"].get("rope_theta", fields.get("compress_rope_theta"))
        scaling = {name: value for name, value in rope["compress"].items() if name not in NOT_SCALING}
        fields["rope_parameters"] = {**scaling, "rope_theta": rope["main"].get("rope_theta", 10000.0)}
    factor = fields.pop("partial_rotary_factor", None)
    if fields.get("qk_rope_head_dim") is None and factor is not None:
        fields["qk_rope_head_dim"] = int(fields["head_dim"] * factor)
    return fields


def _v41_in_one(config_dict: dict[str, Any]) -> dict[str, Any]:
    """A V4.1 config with the fields of its text_config beside the others.

    Raises:
        ValueError: without one.
    """
    text = config_dict.get("text_config")
    if not isinstance(text, dict):
        raise ValueError("config.json of V4.1 has no text_config; copy it from the release")
    fields = {name: value for name, value in text.items() if name != "model_type" and value is not None}
    fields |= {name: value for name, value in config_dict.items() if name != "text_config"}
    experts = (fields.get("quantization_config") or {}).get("expert_dtype")
    return fields if experts is None else {**fields, "expert_dtype": experts}


def _v41_nested(official: dict[str, Any]) -> dict[str, Any]:
    """The other way."""
    if "torch_dtype" in official:
        official["dtype"] = official.pop("torch_dtype")
    beside = BESIDE_TEXT["deepseek_v41"]
    outer = {name: value for name, value in official.items() if name in beside}
    text = {name: value for name, value in official.items() if name not in beside}
    return {**outer, "text_config": {"model_type": "deepseek_v41_text", **text}}


IN_PUBLISHED_FORM = {"deepseek_v4": _v4_as_published, "deepseek_v41": _v41_in_one}
TO_PUBLISHED_FORM = {"deepseek_v41": _v41_nested}


def _refuse_unsupported(config_dict: dict[str, Any], model_type: str) -> None:
    if config_dict.get("use_sliding_window"):
        raise ValueError(
            f"config.json has use_sliding_window=true, and {model_type!r} models with sliding windows are not read; "
            f"open it with transformers' {ARCHITECTURES[model_type]}ForCausalLM"
        )
    quantization = config_dict.get("quantization_config") or {}
    method, block = quantization.get("quant_method"), quantization.get("weight_block_size")
    if quantization and (method != "fp8" or not block):
        raise ValueError(
            f"config.json has quantization_config with quant_method={method!r}, weight_block_size={block}; of "
            "quantized releases only FP8 blocks ('fp8' with a block size) are read"
        )


def with_quantization(official: dict[str, Any], quantization: dict[str, Any]) -> dict[str, Any]:
    """What `to_official` wrote, of a checkpoint whose weights are quantized so."""
    if "text_config" not in official or "expert_dtype" not in official:
        return {**official, "quantization_config": quantization}
    rest = {name: value for name, value in official.items() if name != "expert_dtype"}
    return {**rest, "quantization_config": {**quantization, "expert_dtype": official["expert_dtype"]}}


def official_model_type(fields: dict[str, Any]) -> str:
    """The published model_type of the generation that has these mechanisms.

    Args:
        fields: `DeepSeekConfig(...).to_dict()`.

    Raises:
        ValueError: if no release has them together, so that no published form can say it.
    """
    latent = "mla" if fields.get("index_topk") is None else "dsa"
    attention = "mha" if fields.get("kv_lora_rank") is None else latent
    if fields.get("compress_ratios") is not None:
        attention = "compressed" if fields.get("hc_mult") is not None else "compressed without streams"
        attention += " and shared" if fields.get("kv_source_layer_ids") is not None else ""
    if fields.get("use_qk_norm"):
        attention += " with norms"
    elif fields.get("attention_bias") and fields.get("attention_out_bias") is False:
        attention += " with bias"
    is_latent = fields.get("kv_lora_rank") is not None or fields.get("compress_ratios") is not None
    if fields.get("rope_interleave") not in (None, is_latent):
        attention += " with the other rotary pairs"
    router = fields["scoring_func"] if fields.get("n_routed_experts") is not None else None
    if fields.get("layer_specs") is None and (attention, router) in SOURCE_BY_MECHANISM:
        return SOURCE_BY_MECHANISM[attention, router]
    what = "layer_specs" if fields.get("layer_specs") is not None else f"{attention} and {router or 'no'} router"
    raise ValueError(f"no published config.json can describe this model: no release combines its layers ({what})")


def to_official(fields: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `from_official`: what the release's own config.json would say.

    Args:
        fields: `DeepSeekConfig(...).to_dict()`.

    Returns:
        The file's content, with the published model_type and `architectures` of the language model. Positions are
        said by `rope_theta` and `rope_scaling`, which every reader of these files understands. `quantization_config`
        is left to whoever writes quantized weights.

    Raises:
        ValueError: as `official_model_type`.
    """
    model_type = official_model_type(fields)
    official = {name: fields[name] for name in PUBLISHED_FIELDS[model_type] if fields.get(name) is not None}
    if "dtype" in official:
        official["torch_dtype"] = str(official.pop("dtype")).removeprefix("torch.")
    if "q_lora_rank" in PUBLISHED_FIELDS[model_type]:
        official.setdefault("q_lora_rank", None)  # the source's own default is a number
    if model_type in FIXED:
        official = {name: value for name, value in official.items() if name not in FIXED[model_type]}
    if model_type == "deepseek_v4" and "dspark_block_size" in official:
        official["num_nextn_predict_layers"] = 1  # as released; compress_ratios tell their number
    rope = dict(fields["rope_parameters"])
    word, official["rope_theta"] = rope.pop("rope_type"), rope.pop("rope_theta")
    # as each was published, before and after the renaming
    spelling = "rope_type" if word == "llama3" or model_type in TO_PUBLISHED_FORM else "type"
    official["rope_scaling"] = None if word == "default" else {spelling: word, **rope}
    official = TO_PUBLISHED_FORM.get(model_type, dict)(official)
    return {"architectures": [f"{ARCHITECTURES[model_type]}ForCausalLM"], "model_type": model_type, **official}
