"""Published config.json files of every generation, as their releases wrote them, read into the same fields."""

import json
import re

import pytest
from transformers import (
    AutoConfig,
    DeepseekV2Config,
    DeepseekV3Config,
    DeepseekV32Config,
    LlamaConfig,
    Qwen2Config,
    Qwen3Config,
)

import modeling_deepseek  # noqa: F401  registers the config with AutoConfig
from configuration_deepseek import PRESETS, DeepSeekConfig, preset
from configuration_deepseek.official import (
    ARCHITECTURES,
    FIXED,
    OTHERS,
    PUBLISHED_FIELDS,
    SOURCE_BY_MECHANISM,
    SOURCES,
    from_official,
    to_official,
)

YARN = {
    "beta_fast": 32,
    "beta_slow": 1,
    "factor": 40,
    "mscale": 0.707,
    "mscale_all_dim": 0.707,
    "original_max_position_embeddings": 4096,
    "type": "yarn",
}
COMMON = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 100000,
    "eos_token_id": 100001,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 10000,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.33.1",
    "use_cache": True,
    "vocab_size": 102400,
}
EXPERTS = {
    "aux_loss_alpha": 0.001,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_experts_per_tok": 6,
    "scoring_func": "softmax",
    "seq_aux": True,
}


def remote_code(suffix):
    """The auto_map of a release that brings its own code."""
    return {
        "AutoConfig": f"configuration_deepseek.{suffix}Config",
        "AutoModel": f"modeling_deepseek.{suffix}Model",
        "AutoModelForCausalLM": f"modeling_deepseek.{suffix}ForCausalLM",
    }


LLM_7B = {
    **COMMON,
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "num_attention_heads": 32,
    "num_hidden_layers": 30,
    "num_key_value_heads": 32,
}
MOE_16B = {
    **COMMON,
    **EXPERTS,
    "architectures": ["DeepseekForCausalLM"],
    "auto_map": remote_code("Deepseek"),
    "model_type": "deepseek",
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "max_position_embeddings": 4096,
    "moe_intermediate_size": 1408,
    "n_routed_experts": 64,
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 16,
}
V2_LITE = {
    **MOE_16B,
    "architectures": ["DeepseekV2ForCausalLM"],
    "auto_map": remote_code("DeepseekV2"),
    "model_type": "deepseek_v2",
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "n_group": 1,
    "num_hidden_layers": 27,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rope_scaling": YARN,
    "routed_scaling_factor": 1.0,
    "topk_group": 1,
    "topk_method": "greedy",
    "v_head_dim": 128,
}
V2 = {
    **V2_LITE,
    "hidden_size": 5120,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "n_group": 8,
    "n_routed_experts": 160,
    "num_attention_heads": 128,
    "num_hidden_layers": 60,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "routed_scaling_factor": 16.0,
    "topk_group": 3,
    "topk_method": "group_limited_greedy",
}
V3 = {
    **V2,
    "architectures": ["DeepseekV3ForCausalLM"],
    "auto_map": remote_code("DeepseekV3"),
    "model_type": "deepseek_v3",
    "bos_token_id": 0,
    "eos_token_id": 1,
    "ep_size": 1,
    "first_k_dense_replace": 3,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_nextn_predict_layers": 1,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    },
    "rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0},
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "vocab_size": 129280,
}
V32 = {
    **V3,
    "architectures": ["DeepseekV32ForCausalLM"],
    "model_type": "deepseek_v32",
    "index_head_dim": 128,
    "index_n_heads": 64,
    "index_topk": 2048,
}
LLM_67B = LLM_7B | {
    "hidden_size": 8192,
    "intermediate_size": 22016,
    "num_attention_heads": 64,
    "num_hidden_layers": 95,
    "num_key_value_heads": 8,
}
CODER = LLM_7B | {
    "bos_token_id": 32013,
    "eos_token_id": 32014,
    "max_position_embeddings": 16384,
    "num_hidden_layers": 32,
    "rope_scaling": {"factor": 4.0, "type": "linear"},
    "rope_theta": 100000,
    "vocab_size": 32256,
}
V2_5 = V2 | {"rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}}
V3_1 = V3 | {"quantization_config": V3["quantization_config"] | {"scale_fmt": "ue8m0"}}
R1_DISTILL_QWEN_7B = {
    **{key: value for key, value in COMMON.items() if key not in ("attention_bias", "rope_scaling", "pretraining_tp")},
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "max_position_embeddings": 131072,
    "max_window_layers": 28,
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "sliding_window": 4096,
    "use_mrope": False,
    "use_sliding_window": False,
    "vocab_size": 152064,
}
R1_0528_QWEN3_8B = {
    **COMMON,
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "max_position_embeddings": 131072,
    "max_window_layers": 36,
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"},
    "rope_theta": 1000000,
    "sliding_window": None,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
R1_DISTILL_LLAMA_8B = LLM_7B | {
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "head_dim": 128,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "vocab_size": 128256,
}
PUBLISHED = {  # those that are presets
    "llm_7b": LLM_7B,
    "moe_16b": MOE_16B,
    "v2_lite": V2_LITE,
    "v2": V2,
    "v2.5": V2_5,
    "v3": V3,
    "v3.2_exp": V32,
    "v3.2": V32,
}
RELEASES = {
    **{"LLM-7B": LLM_7B, "LLM-67B": LLM_67B, "Coder-6.7B": CODER, "Math-7B": LLM_7B, "MoE-16B": MOE_16B},
    "Coder-5.7bmqa": CODER | {"num_key_value_heads": 1},
    **{"V2": V2, "V2, first upload": V2 | {"model_type": "deepseek"}, "V2-Lite": V2_LITE, "V2.5": V2_5},
    **{"Coder-V2": V2, "Coder-V2-Lite": V2_LITE},
    **{"V3": V3, "V3-Base": V3, "R1": V3, "R1-0528": V3, "Prover-V2": V3, "V3.1": V3_1, "V3.1-Terminus": V3_1},
    **{"V3.2-Exp": V32, "V3.2": V32},
    **{"R1-Distill-Qwen-7B": R1_DISTILL_QWEN_7B, "R1-Distill-Llama-8B": R1_DISTILL_LLAMA_8B},
    "R1-0528-Qwen3-8B": R1_0528_QWEN3_8B,
}
LATENT = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "head_dim": 64}
FAMILY_V1 = {
    **{"hidden_size": 4096, "num_hidden_layers": 30, "num_attention_heads": 32, "num_key_value_heads": 32},
    **{"vocab_size": 102400, "intermediate_size": 11008, "n_routed_experts": None, "kv_lora_rank": None},
    **{"head_dim": 128, "rms_norm_eps": 1e-6, "rope_interleave": False, "max_position_embeddings": 4096},
    **{"bos_token_id": 100000, "eos_token_id": 100001, "num_nextn_predict_layers": 0},
}
FAMILY_16B = FAMILY_V1 | {
    **{"hidden_size": 2048, "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 16},
    **{"intermediate_size": 10944, "first_k_dense_replace": 1, "n_routed_experts": 64, "n_shared_experts": 2},
    **{"num_experts_per_tok": 6, "moe_intermediate_size": 1408, "scoring_func": "softmax", "topk_method": "greedy"},
    **{"norm_topk_prob": False, "routed_scaling_factor": 1.0},
}
FAMILY_V2_LITE = FAMILY_16B | {
    **LATENT,
    **{"num_hidden_layers": 27, "q_lora_rank": None, "n_group": 1, "topk_group": 1, "rope_interleave": True},
    "max_position_embeddings": 163840,
}
FAMILY_V2 = FAMILY_V2_LITE | {
    **{"hidden_size": 5120, "num_hidden_layers": 60, "num_attention_heads": 128, "num_key_value_heads": 128},
    **{"intermediate_size": 12288, "n_routed_experts": 160, "moe_intermediate_size": 1536, "q_lora_rank": 1536},
    **{"n_group": 8, "topk_group": 3, "routed_scaling_factor": 16.0, "topk_method": "group_limited_greedy"},
}
FAMILY_V3 = FAMILY_V2 | {
    **{"hidden_size": 7168, "num_hidden_layers": 61, "vocab_size": 129280, "intermediate_size": 18432},
    **{"first_k_dense_replace": 3, "n_routed_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 8},
    **{"moe_intermediate_size": 2048, "topk_group": 4, "norm_topk_prob": True, "routed_scaling_factor": 2.5},
    **{"scoring_func": "sigmoid", "topk_method": "noaux_tc", "bos_token_id": 0, "eos_token_id": 1},
    "num_nextn_predict_layers": 1,
}
# release -> what the reference of the family says of it: our fields, (YaRN factor, original length, mscale)
FAMILY = {
    "LLM-7B": (FAMILY_V1, None),
    "MoE-16B": (FAMILY_16B, None),
    "V2-Lite": (FAMILY_V2_LITE, (40, 4096, 0.707)),
    "V2": (FAMILY_V2, (40, 4096, 0.707)),
    "V2, first upload": (FAMILY_V2, (40, 4096, 0.707)),
    "V2.5": (FAMILY_V2, (40, 4096, 1.0)),
    "V3": (FAMILY_V3, (40, 4096, 1.0)),
    "V3.1": (FAMILY_V3, (40, 4096, 1.0)),
    "V3.2": (FAMILY_V3 | {"index_n_heads": 64, "index_head_dim": 128, "index_topk": 2048}, (40, 4096, 1.0)),
}


@pytest.mark.parametrize("name", FAMILY)
def test_every_field_of_the_family(name):
    config, (fields, yarn) = DeepSeekConfig.from_dict(RELEASES[name]), FAMILY[name]
    assert {field: getattr(config, field) for field in fields} == fields
    rope = config.rope_parameters
    assert rope["rope_theta"] == 10000
    if yarn is None:
        assert rope["rope_type"] == "default"
    else:
        assert (rope["rope_type"], rope["factor"], rope["original_max_position_embeddings"]) == ("yarn", *yarn[:2])
        assert rope["mscale"] == rope["mscale_all_dim"] == yarn[2]
        assert (rope["beta_fast"], rope["beta_slow"]) == (32, 1)
    experts, dense = fields["n_routed_experts"], fields.get("first_k_dense_replace")
    words = ["dense" if experts is None or i < dense else "moe" for i in range(fields["num_hidden_layers"])]
    assert [spec.feed_forward for spec in config.specs] == words
    latent = "dsa" if "index_topk" in fields else "mla"
    assert {spec.attention for spec in config.specs} == {"mha" if fields["kv_lora_rank"] is None else latent}


# Fields of published files that say nothing of the model: remote code, training and inference of the release.
SAYS_NOTHING = {
    *("auto_map", "aux_loss_alpha", "seq_aux", "ep_size", "pretraining_tp", "transformers_version"),
    *("quantization_config", "max_window_layers", "sliding_window", "use_mrope", "use_sliding_window"),
}


@pytest.mark.parametrize("name", RELEASES)
def test_there_and_back(name):
    """What `to_official` writes is the published file, or what the published class takes for granted."""
    file = RELEASES[name]
    config = DeepSeekConfig.from_dict(json.loads(json.dumps(file)))
    back = to_official(config.to_dict())
    told = {key: value for key, value in file.items() if key not in SAYS_NOTHING}
    if name == "V2, first upload":
        told |= {"model_type": "deepseek_v2", "architectures": ["DeepseekV2ForCausalLM"]}
    if name.startswith("MoE"):
        back.pop("topk_method", None)
    assert {key: back.get(key) for key in told} == told
    again = DeepSeekConfig.from_dict(back)
    ours, theirs = config.to_dict(), again.to_dict()
    for key in ("source_quantization_config", "source_model_type", "architectures", "transformers_version"):
        ours.pop(key, None), theirs.pop(key, None)
    ours.pop("use_mrope", None)
    assert ours == theirs


def test_the_tables_have_the_same_rows():
    assert set(ARCHITECTURES) == set(PUBLISHED_FIELDS) == set(SOURCES) == set(SOURCE_BY_MECHANISM.values())
    assert set(FIXED) < set(SOURCES) and not set(OTHERS) & set(SOURCES)
    for names in PUBLISHED_FIELDS.values():
        assert set(names) <= {*DeepSeekConfig.field_names(), "dtype"}


@pytest.mark.parametrize("name", [name for name in PRESETS if name.startswith("tiny_")])
def test_presets_go_out_and_come_back(name):
    config = preset(name)
    back = DeepSeekConfig.from_dict(to_official(config.to_dict()))
    ours, theirs = config.to_dict(), back.to_dict()
    for key in ("source_model_type", "architectures"):
        ours.pop(key), theirs.pop(key)
    assert ours == theirs


def test_models_that_no_release_combines_have_no_published_form():
    mixed = preset("tiny_v3", layer_specs=[["mla", "dense"], ["mha", "dense"], ["mla", "moe"]])
    for config in (mixed, preset("tiny_v3", rope_interleave=False), preset("tiny_moe", use_qk_norm=True)):
        with pytest.raises(ValueError, match="no published config.json can describe this model"):
            to_official(config.to_dict())


def reading(file, folder):
    """The file read by each of the ways that lead to a DeepSeekConfig."""
    (folder / "config.json").write_text(json.dumps(file))
    ways = {
        "dictionary": DeepSeekConfig.from_dict(dict(file)),
        "folder": DeepSeekConfig.from_pretrained(folder),
    }
    if file["model_type"] == "deepseek":
        ways["auto"] = AutoConfig.from_pretrained(folder)
    return ways


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_files_equal_the_presets(name, tmp_path):
    file = PUBLISHED[name]
    for way, config in reading(file, tmp_path).items():
        assert config.model_type == "deepseek" and config.source_model_type == file["model_type"], way
        for field, expected in PRESETS[name].items():
            if field != "pad_token_id":  # told by the tokenizer of the releases
                assert getattr(config, field) == expected, (way, field)
        assert config.specs == preset(name).specs
        assert config.rope_interleave == (config.kv_lora_rank is not None)
        assert config.architectures == ["DeepSeekForCausalLM"]
        assert config.auto_map == preset(name).auto_map, "the release's remote code is not run"
        assert not hasattr(config, "aux_loss_alpha") and not hasattr(config, "quantization_config")


@pytest.mark.parametrize("name", PUBLISHED)
def test_twice_applied_is_once_applied(name):
    once = from_official(PUBLISHED[name])
    assert from_official(once) == once
    config = DeepSeekConfig.from_dict(once)
    assert from_official(config.to_dict()) == config.to_dict()
    assert DeepSeekConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()


@pytest.mark.parametrize("name", PUBLISHED)
def test_reading_leaves_the_dictionary_as_it_was(name):
    file = json.loads(json.dumps(PUBLISHED[name]))
    DeepSeekConfig.from_dict(file)
    assert file == PUBLISHED[name]


def test_the_first_upload_of_v2_said_deepseek(tmp_path):
    for config in reading(V2 | {"model_type": "deepseek"}, tmp_path).values():
        assert config.kv_lora_rank == 512 and config.source_model_type == "deepseek"
        assert config.specs == preset("v2").specs


def test_gready_means_greedy():
    config = DeepSeekConfig.from_dict(V2_LITE | {"topk_method": "gready"})
    assert config.topk_method == "greedy"


def test_what_a_silent_file_took_for_granted():
    v3 = {key: value for key, value in V3.items() if key not in ("scoring_func", "topk_method", "norm_topk_prob")}
    config = DeepSeekConfig.from_dict(v3)
    assert (config.scoring_func, config.topk_method, config.norm_topk_prob) == ("sigmoid", "noaux_tc", True)
    v2 = {key: value for key, value in V2_LITE.items() if key not in ("scoring_func", "topk_method", "norm_topk_prob")}
    config = DeepSeekConfig.from_dict(v2)
    assert (config.scoring_func, config.topk_method, config.norm_topk_prob) == ("softmax", "greedy", False)


def test_grouped_queries_of_llm_67b():
    config = DeepSeekConfig.from_dict(
        LLM_7B | {"num_key_value_heads": 8, "num_attention_heads": 64, "hidden_size": 8192}
    )
    assert (config.num_key_value_heads, config.head_dim) == (8, 128)


def test_coder_1_stretches_positions():
    config = DeepSeekConfig.from_dict(
        LLM_7B | {"rope_scaling": {"type": "linear", "factor": 4.0}, "rope_theta": 100000, "vocab_size": 32256}
    )
    assert config.rope_parameters == {"rope_type": "linear", "factor": 4.0, "rope_theta": 100000}
    assert config.vocab_size == 32256


def test_v3_keeps_how_its_weights_were_stored():
    config = DeepSeekConfig.from_dict(V3_1)
    assert config.source_quantization_config == V3_1["quantization_config"]
    assert DeepSeekConfig.from_dict(config.to_dict()).source_quantization_config["scale_fmt"] == "ue8m0"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"use_sliding_window": True}, "use_sliding_window=true, .* open it with transformers' Qwen2ForCausalLM"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config with quant_method='awq'"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quant_method='fp8', weight_block_size=None; of quantized"),
    ],
    ids=str,
)
def test_what_no_release_has_is_refused(change, says, tmp_path):
    with pytest.raises(ValueError, match=says) as refused:
        DeepSeekConfig.from_dict(R1_DISTILL_QWEN_7B | change)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("model_type", "is_named"),
    [
        ("kimi_k2", " (Kimi K2)"),
        ("glm4_moe", " (GLM-4.5)"),
        ("bert", ""),
        ("DeepSeek", ""),
    ],
)
def test_other_model_types_are_refused(model_type, is_named, tmp_path):
    says = re.escape(
        f"config.json has model_type '{model_type}'{is_named}, which DeepSeekConfig cannot read; it reads 'llama', "
    )
    for mark in ({}, {"deepseek_format": 1}):
        file = V3 | {"model_type": model_type} | mark
        with pytest.raises(ValueError, match=says):
            DeepSeekConfig.from_dict(file)
        (tmp_path / "config.json").write_text(json.dumps(file))
        with pytest.raises(ValueError, match=f"{tmp_path}: {says}"):
            DeepSeekConfig.from_pretrained(tmp_path)


NATIVE = {
    "llama": (LlamaConfig, preset("tiny_llm")),
    "qwen2": (Qwen2Config, preset("tiny_llm", attention_bias=True, attention_out_bias=False)),
    "qwen3": (Qwen3Config, preset("tiny_llm", use_qk_norm=True, head_dim=8)),
    "deepseek_v2": (DeepseekV2Config, preset("tiny_v2")),
    "deepseek_v3": (DeepseekV3Config, preset("tiny_v3")),
    "deepseek_v32": (DeepseekV32Config, preset("tiny_v32")),
}


@pytest.mark.parametrize("model_type", NATIVE)
def test_configs_that_transformers_writes(model_type, tmp_path, caplog):
    native_class, ours = NATIVE[model_type]
    shared = [field for field in ours.field_names() if field in native_class.__dataclass_fields__]
    native = native_class(
        **{field: getattr(ours, field) for field in shared if field != "head_dim" or ours.use_qk_norm}
    )
    native.save_pretrained(tmp_path)
    for config in (DeepSeekConfig.from_pretrained(tmp_path), DeepSeekConfig.from_dict(native.to_dict())):
        assert (config.model_type, config.source_model_type) == ("deepseek", model_type)
        assert {field: getattr(config, field) for field in shared} == {field: getattr(ours, field) for field in shared}
        assert config.specs == ours.specs
        routing = ("scoring_func", "topk_method", "norm_topk_prob")
        if config.n_routed_experts:
            assert [getattr(config, f) for f in routing] == [getattr(ours, f) for f in routing]
    assert not caplog.records, "reading a published config warns of nothing"


@pytest.mark.parametrize("model_type", NATIVE)
def test_defaults_are_those_of_the_native_class(model_type):
    native_class, _ = NATIVE[model_type]
    native = native_class().to_dict()
    for field, value in SOURCES[model_type].items():
        if field in native and field not in ("bos_token_id", "eos_token_id"):
            assert native[field] == value, field


def test_transformers_own_types_stay_its_own():
    assert type(AutoConfig.for_model("deepseek_v3")) is DeepseekV3Config
    assert type(AutoConfig.for_model("deepseek")) is DeepSeekConfig
