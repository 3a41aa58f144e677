"""Published config.json files of every generation, as their releases wrote them, read into the same fields."""

import json

import pytest
from transformers import AutoConfig, DeepseekV2Config, DeepseekV3Config, LlamaConfig

import modeling_deepseek  # noqa: F401  registers the config with AutoConfig
from configuration_deepseek import PRESETS, DeepSeekConfig, preset
from configuration_deepseek.official import SOURCES, from_official

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
PUBLISHED = {
    "llm_7b": LLM_7B,
    "moe_16b": MOE_16B,
    "v2_lite": V2_LITE,
    "v2": V2,
    "v2.5": V2 | {"rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}},
    "v3": V3,
}


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
        assert config.auto_map == preset(name).auto_map, "the release's remote code is not run"
        assert not hasattr(config, "aux_loss_alpha") and not hasattr(config, "num_nextn_predict_layers")


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


def test_v3_keeps_how_its_weights_are_stored():
    assert DeepSeekConfig.from_dict(V3).quantization_config["weight_block_size"] == [128, 128]


@pytest.mark.parametrize("model_type", ["deepseek_v32", "deepseek_v4", "bert", "DeepSeek"])
def test_other_model_types_are_refused(model_type, tmp_path):
    says = f"config.json has model_type '{model_type}', which DeepSeekConfig cannot read; it reads 'llama', 'deepseek'"
    for mark in ({}, {"deepseek_format": 1}):
        file = V3 | {"model_type": model_type} | mark
        with pytest.raises(ValueError, match=says):
            DeepSeekConfig.from_dict(file)
        (tmp_path / "config.json").write_text(json.dumps(file))
        with pytest.raises(ValueError, match=f"{tmp_path}: {says}"):
            DeepSeekConfig.from_pretrained(tmp_path)


NATIVE = {
    "llama": (LlamaConfig, preset("tiny_llm")),
    "deepseek_v2": (DeepseekV2Config, preset("tiny_v2")),
    "deepseek_v3": (DeepseekV3Config, preset("tiny_v3")),
}


@pytest.mark.parametrize("model_type", NATIVE)
def test_configs_that_transformers_writes(model_type, tmp_path, caplog):
    native_class, ours = NATIVE[model_type]
    shared = [field for field in ours.field_names() if field in native_class.__dataclass_fields__]
    native = native_class(**{field: getattr(ours, field) for field in shared if field != "head_dim"})
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
