"""The fields read without transformers are those of `DeepSeekConfig`, or aren't read."""

import json

import pytest

from configuration_deepseek import PRESETS, DeepSeekConfig
from configuration_deepseek.fields import FIELD_NAMES
from configuration_deepseek.official import from_official, to_official
from configuration_deepseek.plain import Unread, plain_config

YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 64}


def written(config: DeepSeekConfig) -> dict:
    return json.loads(config.to_json_string())


def assert_same(config_dict: dict) -> None:
    plain, whole = plain_config(from_official(dict(config_dict))), DeepSeekConfig.from_dict(dict(config_dict))
    for name in (*FIELD_NAMES, "architectures", "num_labels", "specs"):
        assert getattr(plain, name) == getattr(whole, name), name
    assert plain.whole().to_dict() == whole.to_dict() | {"dtype": None, "label2id": plain.whole().label2id}


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_as_ours_and_as_published(name):
    config = DeepSeekConfig(**PRESETS[name], architectures=["DeepSeekForCausalLM"])
    assert_same(written(config))
    assert_same(to_official(config.to_dict()))


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_parameters": YARN},
        {"rope_parameters": None, "rope_scaling": {**YARN, "type": "yarn"}, "rope_theta": 5e5},
        {"rope_parameters": None, "rope_theta": 5e5},
        {"id2label": {"0": "a", "1": "b", "2": "c"}, "label2id": {"a": 0, "b": 1, "c": 2}},
        {"attention_direction": "bidirectional"},
        {"layer_specs": [["mha", "dense"]] * 3},
        {"eos_token_id": [1, 2], "pad_token_id": None},
    ],
)
def test_other_fields(changes):
    assert_same(written(DeepSeekConfig(**PRESETS["tiny_llm"])) | changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_experts": 4},  # an alias
        {"num_labels": 3},
        {"problem_type": "regression"},
        {"pad_token_id": 97},
        {"hidden_size": "32"},
        {"hidden_size": -1},
        {"hiden_size": 32},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "factor": 2.0}},
        {"rope_parameters": YARN | {"factor": 3.0}},  # not the ratio of the lengths, which transformers warns of
        {"rope_parameters": YARN | {"attention_factor": "much"}},
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 0}},
    ],
)
def test_what_transformers_would_change_warn_of_or_refuse_is_left_to_it(changes):
    with pytest.raises(Unread):
        plain_config(written(DeepSeekConfig(**PRESETS["tiny_llm"])) | changes)
