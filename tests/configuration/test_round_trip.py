"""A config survives every way of being written and read, and carries where its classes are."""

import copy
import json
import pickle

import pytest

from configuration_deepseek import PRESETS, DeepSeekConfig, preset

HEADS = ["CausalLM", "SequenceClassification", "TokenClassification", "QuestionAnswering"]
AUTO_MAP = {
    "AutoConfig": "configuration_deepseek.DeepSeekConfig",
    "AutoModel": "modeling_deepseek.DeepSeekModel",
    **{f"AutoModelFor{head}": f"language_heads.DeepSeekFor{head}" for head in HEADS},
}


@pytest.mark.parametrize("name", PRESETS)
def test_every_way_of_writing_and_reading(name, tmp_path):
    config = preset(name, num_labels=3, task_note="kept")
    config.save_pretrained(tmp_path)
    file = json.loads((tmp_path / "config.json").read_text())
    twins = [
        DeepSeekConfig.from_dict(config.to_dict()),
        DeepSeekConfig.from_dict(json.loads(config.to_json_string(use_diff=False))),
        DeepSeekConfig.from_dict(config.to_diff_dict()),
        DeepSeekConfig.from_pretrained(tmp_path),
        DeepSeekConfig.from_dict(file),
        copy.deepcopy(config),
        pickle.loads(pickle.dumps(config)),
    ]
    for twin in twins:
        assert twin.to_dict() | {"transformers_version": None} == config.to_dict() | {"transformers_version": None}
    assert file["model_type"] == "deepseek" and file["deepseek_format"] == 1 and file["auto_map"] == AUTO_MAP


def test_overrides_on_reading(tmp_path):
    preset("tiny_v3").save_pretrained(tmp_path)
    config = DeepSeekConfig.from_pretrained(tmp_path, num_hidden_layers=5, num_labels=4)
    assert config.num_hidden_layers == 5 and config.num_labels == 4 and len(config.specs) == 5
    config, unused = DeepSeekConfig.from_pretrained(tmp_path, return_unused_kwargs=True, speed="high")
    assert unused == {"speed": "high"} and not hasattr(config, "speed")


def test_auto_map_is_always_whole():
    config = preset("tiny_v3")
    assert config.auto_map == config.to_dict()["auto_map"] == AUTO_MAP
    config.auto_map = {"AutoModel": "elsewhere.Model"}  # as transformers does when it saves a head
    assert config.auto_map == AUTO_MAP
    assert (
        DeepSeekConfig.from_dict(config.to_dict() | {"auto_map": {"AutoModel": "elsewhere.Model"}}).auto_map
        == AUTO_MAP
    )


@pytest.mark.parametrize(
    ("saved", "trunk"),
    [
        ("DeepSeekModel", "modeling_deepseek.DeepSeekModel"),
        ("DeepSeekForEmbedding", "embedding_head.DeepSeekForEmbedding"),
        ("DeepSeekForRecommendation", "recommendation_head.DeepSeekForRecommendation"),
    ],
)
def test_auto_map_names_no_class_whose_file_is_not_saved(saved, trunk):
    config = preset("tiny_v3", architectures=[saved])
    assert config.auto_map == {"AutoConfig": AUTO_MAP["AutoConfig"], "AutoModel": trunk}
    config.architectures = ["DeepSeekForTokenClassification"]  # whose file has all heads for text
    assert config.auto_map == AUTO_MAP


def test_derived_values_are_not_frozen_in_the_file():
    config = DeepSeekConfig.from_dict(preset("tiny_v3").to_dict() | {"num_hidden_layers": 4})
    assert len(config.layer_types) == 4


def test_equality_and_text():
    assert preset("tiny_v3") == preset("tiny_v3")
    assert preset("tiny_v3") != preset("tiny_v2")
    assert '"kv_lora_rank": 16' in repr(preset("tiny_v3"))
