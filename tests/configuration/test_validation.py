"""Every combination of fields that cannot work is refused with one line: the values that clash, and the mend."""

import pytest
from huggingface_hub.errors import StrictDataclassFieldValidationError

from configuration_deepseek import DeepSeekConfig, LayerSpec, preset

YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
PAIR = ["mla", "moe"]

# preset, fields, what the line must say
REFUSED = [
    # sizes
    ("tiny_llm", {"vocab_size": 0}, "vocab_size=0 must be positive"),
    ("tiny_llm", {"hidden_size": -32}, "hidden_size=-32 must be positive"),
    ("tiny_llm", {"num_hidden_layers": 0}, "num_hidden_layers=0 must be positive"),
    ("tiny_llm", {"num_attention_heads": 0}, "num_attention_heads=0 must be positive"),
    ("tiny_llm", {"intermediate_size": 0}, "intermediate_size=0 must be positive"),
    ("tiny_llm", {"attention_dropout": 1.0}, "attention_dropout=1.0 must be at least 0 and below 1"),
    ("tiny_llm", {"hidden_dropout": -0.1}, "hidden_dropout=-0.1 must be at least 0 and below 1"),
    # multi-head and grouped-query attention
    (
        "tiny_llm",
        {"num_key_value_heads": 3},
        "num_attention_heads=4 is no multiple of num_key_value_heads=3; change one of them",
    ),
    ("tiny_llm", {"num_key_value_heads": 0}, "num_attention_heads=4 is no multiple of num_key_value_heads=0"),
    (
        "tiny_llm",
        {"hidden_size": 36},
        "head_dim=9 (hidden_size=36, num_attention_heads=4) is odd, but rotary pairs need an even width; make it even",
    ),
    ("tiny_llm", {"head_dim": 7}, "head_dim=7 (hidden_size=32, num_attention_heads=4) is odd"),
    # images
    ("tiny_llm", {"image_stem": "convs"}, "image_stem has the unknown word 'convs'; did you mean 'conv'?"),
    ("tiny_v4", {"image_stem": "conv"}, "image_stem='conv' clashes with compress_ratios"),
    ("tiny_llm", {"image_stem": "conv", "num_channels": 0}, "num_channels=0 must be positive"),
    ("tiny_llm", {"image_stem": "patch", "patch_size": 0}, "patch_size=0 must be positive"),
    (
        "tiny_llm",
        {"image_stem": "conv", "conv_channels": [4]},
        "conv_channels=[4] and conv_pooling=[1, 2] must be lists of equal length",
    ),
    ("tiny_llm", {"image_stem": "conv", "conv_pooling": [1, 0]}, "conv_pooling=[1, 0] must be positive numbers"),
    (
        "tiny_llm",
        {"image_stem": "conv_lstm", "hidden_size": 33, "head_dim": 8},
        "hidden_size=33 is odd, but the LSTM of image_stem='conv_lstm' gives half of it in each direction",
    ),
    # latent attention
    ("tiny_v3", {"kv_lora_rank": 0}, "kv_lora_rank=0 must be positive"),
    ("tiny_v3", {"q_lora_rank": 0}, "q_lora_rank=0 must be positive, or None for no latent"),
    ("tiny_v3", {"qk_nope_head_dim": 0}, "qk_nope_head_dim=0 must be positive"),
    ("tiny_v3", {"v_head_dim": 0}, "v_head_dim=0 must be positive"),
    (
        "tiny_v3",
        {"qk_rope_head_dim": 7},
        "qk_rope_head_dim=7 is odd, but rotary pairs need an even width; make it even",
    ),
    (
        "tiny_v3",
        {"num_key_value_heads": 2},
        "num_key_value_heads=2 clashes with num_attention_heads=4: latent attention has no grouped heads; "
        "make them equal",
    ),
    # sparse attention
    ("tiny_v32", {"index_topk": 0}, "index_topk=0 must be positive for sparse attention"),
    ("tiny_v32", {"index_n_heads": None}, "index_n_heads=None must be positive for sparse attention"),
    (
        "tiny_v32",
        {"index_head_dim": 7},
        "index_head_dim=7 has no room for qk_rope_head_dim=8; make it at least as wide",
    ),
    (
        "tiny_v32",
        {"q_lora_rank": None},
        "q_lora_rank is None, but the indexer of sparse attention reads the query latent; set q_lora_rank, or "
        "index_topk=None",
    ),
    (
        "tiny_moe",
        {"index_topk": 5},
        "index_topk=5 asks for sparse attention, but kv_lora_rank is None; set kv_lora_rank, or index_topk=None",
    ),
    (
        "tiny_v3",
        {"layer_specs": [["dsa", "dense"], PAIR, PAIR]},
        "layer_specs[0] says 'dsa' but index_topk is None; set index_topk, or say 'mla'",
    ),
    # experts
    (
        "tiny_moe",
        {"num_experts_per_tok": 9},
        "num_experts_per_tok=9 exceeds n_routed_experts=8; choose at most 8 experts",
    ),
    ("tiny_moe", {"num_experts_per_tok": None}, "num_experts_per_tok=None must be positive where there are experts"),
    (
        "tiny_moe",
        {"moe_intermediate_size": None},
        "moe_intermediate_size=None must be positive where there are experts",
    ),
    ("tiny_moe", {"n_routed_experts": 0}, "n_routed_experts=0 must be positive where there are experts"),
    ("tiny_moe", {"moe_layer_freq": 0}, "moe_layer_freq=0 must be at least 1"),
    ("tiny_moe", {"scoring_func": "softmx"}, "scoring_func has the unknown word 'softmx'; did you mean 'softmax'?"),
    ("tiny_moe", {"topk_method": "noaux_tk"}, "topk_method has the unknown word 'noaux_tk'; did you mean 'noaux_tc'?"),
    (
        "tiny_moe",
        {"scoring_func": "relu6"},
        "scoring_func has the unknown word 'relu6'; use one of 'softmax', 'sigmoid', 'sqrtsoftplus'",
    ),
    (
        "tiny_moe",
        {"scoring_func": "sigmoid"},
        "scoring_func='sigmoid' clashes with topk_method='greedy'; use 'sigmoid' with 'noaux_tc'",
    ),
    ("tiny_v3", {"scoring_func": "softmax"}, "scoring_func='softmax' clashes with topk_method='noaux_tc'"),
    ("tiny_v3", {"n_group": 3}, "n_routed_experts=8 is no multiple of n_group=3; change one of them"),
    ("tiny_v3", {"topk_group": 5}, "topk_group=5 exceeds n_group=4; choose at most 4 groups"),
    (
        "tiny_v2",
        {"topk_group": 1},
        "num_experts_per_tok=3 exceeds the 2 experts in topk_group=1 of n_group=4 groups; "
        "raise topk_group or lower num_experts_per_tok",
    ),
    (
        "tiny_v3",
        {"n_group": 8, "topk_group": 8},
        "n_group=8 leaves one of n_routed_experts=8 per group, but noaux_tc ranks groups by their two best; "
        "lower n_group",
    ),
    # rotary
    (
        "tiny_v3",
        {"rope_parameters": {**YARN, "rope_type": "yarm"}},
        "has the unknown word 'yarm'; did you mean 'yarn'?",
    ),
    ("tiny_v3", {"rope_parameters": {**YARN, "rope_theta": 0.0}}, "rope_theta=0.0 must be positive"),
    (
        "tiny_v3",
        {"rope_parameters": {**YARN, "factor": 0.5}},
        "rope_parameters['factor']=0.5 must be a number of at least 1 for rope_type='yarn'",
    ),
    (
        "tiny_llm",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0}},
        "rope_parameters['factor']=None must be a number of at least 1 for rope_type='linear'",
    ),
    # layer_specs
    (
        "tiny_v3",
        {"layer_specs": [PAIR, PAIR]},
        "layer_specs has 2 entries but num_hidden_layers=3; give one pair of words per layer",
    ),
    (
        "tiny_v3",
        {"layer_specs": [PAIR, ["mla"], PAIR]},
        "layer_specs[1]=['mla'] must be a pair (attention, feed_forward)",
    ),
    (
        "tiny_v3",
        {"layer_specs": [PAIR, PAIR, ["mlaa", "moe"]]},
        "layer_specs[2] has the unknown word 'mlaa'; did you mean 'mla'?",
    ),
    (
        "tiny_v3",
        {"layer_specs": [["mla", "sparse"], PAIR, PAIR]},
        "layer_specs[0] has the unknown word 'sparse'; use one of 'dense', 'moe', 'hash_moe'",
    ),
    (
        "tiny_moe",
        {"layer_specs": [["mha", "dense"], PAIR, ["mha", "moe"]]},
        "layer_specs[1] says 'mla' but kv_lora_rank is None; set kv_lora_rank, or say 'mha'",
    ),
    (
        "tiny_llm",
        {"layer_specs": [["mha", "dense"], ["mha", "dense"], ["mha", "moe"]]},
        "layer_specs[2] says 'moe' but n_routed_experts is None; set n_routed_experts, or say 'dense'",
    ),
]


@pytest.mark.parametrize(("name", "fields", "says"), REFUSED, ids=[f"{n} {list(f)[0]}" for n, f, _ in REFUSED])
def test_refused_in_one_line(name, fields, says):
    with pytest.raises(ValueError) as refusal:
        preset(name, **fields)
    line = str(refusal.value)
    assert line.startswith("DeepSeekConfig: ") and says in line and "\n" not in line


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("num_hiden_layers", "num_hidden_layers"),
        ("kv_lora_ranks", "kv_lora_rank"),
        ("n_routed_expert", "n_routed_experts"),
        ("rope_paramaters", "rope_parameters"),
        ("rope_scalling", "rope_scaling"),
        ("num_expert", "num_experts"),
        ("layer_spec", "layer_specs"),
    ],
)
def test_misspelled_fields_are_refused(wrong, meant):
    with pytest.raises(ValueError, match=f"unknown field '{wrong}'; did you mean '{meant}'"):
        preset("tiny_v3", **{wrong: 3})


def test_fields_of_ones_own_are_kept():
    config = preset("tiny_v3", task_note="translation", id2label={0: "a", 1: "b"})
    assert config.task_note == "translation" and config.num_labels == 2


@pytest.mark.parametrize(
    "fields",
    [
        *({"hidden_size": "32"}, {"attention_bias": 3}, {"num_hidden_layers": 2.5}, {"rope_parameters": [1]}),
        *({"compress_ratios": "0,4,3"}, {"compress_ratios": [0, 4.0, 3]}, {"compress_ratios": [0, [4], 3]}),
        *({"compress_ratios": 4}, {"compress_ratios": [0, None, 3]}, {"engram_layer_ids": "1"}),
    ],
    ids=str,
)
def test_values_of_a_wrong_type_are_refused_in_one_line(fields):
    (name, value), config = *fields.items(), preset("tiny_v4")
    for make in (preset, lambda _, **changes: DeepSeekConfig.from_dict({**config.to_dict(), **changes})):
        with pytest.raises(StrictDataclassFieldValidationError) as refused:
            make("tiny_v4", **fields)
        assert str(refused.value).startswith(f"DeepSeekConfig: {name}={value!r} is a {type(value).__name__} that does")
        assert "\n" not in str(refused.value) and isinstance(refused.value, ValueError)


def test_groups_do_not_matter_to_a_greedy_router():
    assert preset("tiny_moe", n_group=3).n_group == 3


def test_experts_are_checked_only_where_there_are_some():
    dense = [["mla", "dense"]] * 3
    assert preset("tiny_v3", layer_specs=dense, num_experts_per_tok=99).specs == [LayerSpec("mla", "dense")] * 3
    assert preset("tiny_llm", scoring_func="sigmoid").specs == [LayerSpec("mha", "dense")] * 3


def test_a_config_is_checked_again_before_it_is_saved(tmp_path):
    config = preset("tiny_v3")
    config.num_experts_per_tok = 9
    with pytest.raises(Exception, match="num_experts_per_tok=9 exceeds n_routed_experts=8"):
        config.save_pretrained(tmp_path)


# What follows from the fields ---------------------------------------------------------------------------------------


def test_layers_follow_from_the_fields():
    config = preset("tiny_moe", num_hidden_layers=7, first_k_dense_replace=2, moe_layer_freq=2)
    assert [spec.feed_forward for spec in config.specs] == ["dense", "dense", "moe", "dense", "moe", "dense", "moe"]
    assert {spec.attention for spec in config.specs} == {"mha"}
    assert config.layer_types == ["deepseek_kv"] * 7
    assert preset("tiny_v3").layer_types == ["deepseek_latent"] * 3
    assert preset("tiny_v32").layer_types == ["deepseek_latent_indexed"] * 3
    assert preset("tiny_v32", index_topk=None).specs == preset("tiny_v3").specs


def test_layers_may_be_given():
    specs = [LayerSpec("mla", "moe"), LayerSpec("mla", "dense"), LayerSpec("mla", "moe")]
    config = preset("tiny_v3", layer_specs=specs)
    assert config.specs == specs
    assert DeepSeekConfig.from_dict(config.to_dict()).specs == specs


def test_derived_fields():
    config = DeepSeekConfig()
    assert (config.num_key_value_heads, config.head_dim, config.rope_interleave) == (32, 128, False)
    config = preset("tiny_v3")
    assert (config.head_dim, config.qk_head_dim, config.rope_interleave) == (8, 20, True)
    assert (config.n_group, preset("tiny_moe").n_group, preset("tiny_llm").n_group) == (4, 1, None)
    assert config.num_experts == config.num_local_experts == config.n_routed_experts == 8


def test_changing_a_config_needs_no_second_construction():
    config = preset("tiny_v3")
    config.num_hidden_layers = 5
    assert len(config.specs) == len(config.layer_types) == 5


@pytest.mark.parametrize("spelling", ["rope_type", "type"])
def test_the_published_rope_fields_are_understood(spelling):
    scaling = {spelling: "linear", "factor": 4.0}
    config = preset("tiny_llm", rope_scaling=scaling, rope_theta=100000.0)
    assert config.rope_parameters == {"rope_type": "linear", "factor": 4.0, "rope_theta": 100000.0}
    assert preset("tiny_llm").rope_parameters == {"rope_type": "default", "rope_theta": 10000.0}


def test_derived_fields_take_what_agrees_and_refuse_the_rest():
    """PEFT copies a config, lowers its num_hidden_layers and cuts its layer_types to it."""
    config = preset("tiny_v32", layer_specs=[["mha", "dense"], ["dsa", "moe"], ["mla", "moe"]])
    types = config.layer_types
    config.num_hidden_layers = 2
    config.layer_types = types[:2]
    assert config.layer_types == types[:2] and len(config.specs) == 2
    config.specs, config.qk_head_dim = [["mha", "dense"], ["dsa", "moe"]], config.qk_head_dim
    assert DeepSeekConfig(layer_types=["deepseek_kv"] * 30).num_hidden_layers == 30
    for name, wrong in {"layer_types": ["full_attention"] * 2, "specs": [["mha", "dense"]], "qk_head_dim": 7}.items():
        with pytest.raises(ValueError, match=f"DeepSeekConfig: {name}=.* contradicts .*; set these") as error:
            setattr(config, name, wrong)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="layer_types=.'full_attention'. contradicts"):
        preset("tiny_llm", num_hidden_layers=1, layer_types=["full_attention"])
