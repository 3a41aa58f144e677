"""Names and shapes of weights as the config tells them are those of the model, whatever its mechanisms and head."""

import math

import pytest
import torch

from configuration_deepseek import PRESETS, DeepSeekConfig
from configuration_deepseek.vision import vision_shapes
from configuration_deepseek.weight_names import HEADS, with_release_names
from finetune_deepseek.checkpoints.checkpoint import HEADS as ALL
from finetune_deepseek.checkpoints.checkpoint import official_weights
from modeling_deepseek.register import MODELS_BY_AUTO_CLASS
from tests.reference.v41_names import RELEASE, draft_names, v41_names, vision_names

CLASSES = {model_class.__name__.removeprefix("DeepSeek"): model_class for model_class in MODELS_BY_AUTO_CLASS.values()}
OF_IMAGES = ("ForImageClassification", "ForObjectDetection", "ForImageTextToText")
TINY = [name for name in PRESETS if name.startswith("tiny_")]
OTHERS = {
    "biases": ("tiny_llm", {"attention_bias": True, "mlp_bias": True}),
    "biases but on o": ("tiny_llm", {"attention_bias": True, "attention_out_bias": False}),
    "norms of heads": ("tiny_llm", {"use_qk_norm": True, "head_dim": 10}),
    "biases of latents": ("tiny_v3", {"attention_bias": True, "mlp_bias": True}),
    "experts in every second layer": ("tiny_moe", {"moe_layer_freq": 2, "n_shared_experts": None}),
    "two predictions": ("tiny_v3", {"num_nextn_predict_layers": 2}),
    "tied": ("tiny_llm", {"tie_word_embeddings": True}),
    "untied items": ("tiny_llm", {"tie_item_embeddings": False}),
    "kinds of tokens, three labels": ("tiny_llm", {"type_vocab_size": 2, "num_labels": 3}),
    "two kinds of layers": (
        "tiny_v3.2",
        {"layer_specs": [["mha", "dense"], ["dsa", "moe"], ["mla", "dense"]]},
    ),
}


def of_model(config: DeepSeekConfig, head: str) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tensor.shape for name, tensor in official_weights(CLASSES[head](config)).items()}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", TINY)
def test_every_preset_under_every_head(name, head):
    config = DeepSeekConfig(**PRESETS[name])
    if head != "ForCausalLM":
        config.num_nextn_predict_layers = 0
    if config.weight_shapes(head) is None:  # of images: has a part that no preset names
        assert head in OF_IMAGES
        return
    assert config.weight_shapes(head) == of_model(config, head)


@pytest.mark.parametrize("name", [name for name in PRESETS if name not in TINY])
def test_releases_of_full_size(name):
    config = DeepSeekConfig(**PRESETS[name])
    assert config.weight_shapes("ForCausalLM") == of_model(config, "ForCausalLM")


def test_the_release_that_sees():
    config = DeepSeekConfig(**PRESETS["v4.1_flash"])
    shapes = config.weight_shapes("ForImageTextToText")
    assert shapes == of_model(config, "ForImageTextToText")
    assert sum(map(math.prod, vision_shapes(config).values())) == 485_268_480 and len(vision_names(RELEASE)) == 266
    names = [*v41_names(RELEASE, scales=False), *draft_names(RELEASE, scales=False), *vision_names(RELEASE)]
    assert set(with_release_names(shapes, config)) == set(names)


@pytest.mark.parametrize("what", OTHERS)
def test_other_mechanisms(what):
    preset, changes = OTHERS[what]
    for head in HEADS:
        config = DeepSeekConfig(**PRESETS[preset] | changes)
        if head not in OF_IMAGES:
            assert config.weight_shapes(head) == of_model(config, head), head


def test_the_model_is_asked_for_what_is_not_in_the_table():
    fields = PRESETS["tiny_llm"]
    assert DeepSeekConfig(**fields, pooling="latent").weight_shapes("ForEmbedding") is None
    for changes in ({"num_items": 5}, {"user_features": {"sex": ["f", "m"]}}, {"num_item_neighbors": 3}):
        assert DeepSeekConfig(**fields, **changes).weight_shapes("ForRecommendation") is None


def test_the_table_has_every_head():
    assert HEADS.keys() == CLASSES.keys() == set(ALL)
