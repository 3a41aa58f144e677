"""Named sizes: the published ones have the published numbers of parameters, and each call gives a fresh config."""

import re

import pytest
import torch

from configuration_deepseek import PRESETS, DeepSeekConfig, preset
from configuration_deepseek.presets import ABOUT, OLD_NAMES
from modeling_deepseek import DeepSeekForCausalLM

# In billions, as the papers and model cards give them (V3 and R1 without the prediction layer).
PUBLISHED = {
    "llm_7b": 6.9,
    "moe_16b": 16.4,
    "v2_lite": 15.7,
    "v2": 235.7,
    "v2.5": 235.7,
    "v3": 671.0,
    "r1": 671.0,
    "v3.2_exp": 671.9,  # V3 and 61 indexers
    "v3.2": 671.9,
    "v4_flash": 284.3,  # 284 and 1.6 thousand on their model cards
    "v4_flash_0731": 284.3,
    "v4_pro": 1573.0,
    "v4.1_flash": 748.5,  # 552 and the tables of n-grams, 196
}
# Parameters that one token uses, rounded as in arXiv 2401.06066, 2405.04434 and 2412.19437.
ACTIVE = {"moe_16b": 2.8, "v2": 21, "v3": 37}


def meta_model(name):
    """The preset's language model, without memory."""
    with torch.device("meta"):
        return DeepSeekForCausalLM(preset(name))


def test_every_published_preset_has_its_number():
    assert set(PUBLISHED) == {name for name in PRESETS if not name.startswith("tiny_")}


@pytest.mark.parametrize("name", PUBLISHED)
def test_number_of_parameters(name):
    config = preset(name)
    first = config.num_hidden_layers
    ahead = tuple(f"model.layers.{first + i}." for i in range(config.num_nextn_predict_layers))
    total = sum(p.numel() for key, p in meta_model(name).named_parameters() if not key.startswith(ahead))
    assert round(total / 1e9, 1) == PUBLISHED[name]


def test_number_of_parameters_of_the_prediction_layer():
    """11.5 billion in the release's description of its weights, which leaves eh_proj out."""
    layer = meta_model("v3").model.layers[61]
    total = sum(parameter.numel() for parameter in layer.parameters())
    assert round((total - layer.eh_proj.weight.numel()) / 1e9, 1) == 11.5


@pytest.mark.parametrize("name", ACTIVE)
def test_number_of_parameters_that_one_token_uses(name):
    active, config = 0, preset(name)
    for key, parameter in meta_model(name).named_parameters():
        share = config.num_experts_per_tok / config.n_routed_experts if ".mlp.experts." in key else 1
        if ".layers.61." in key:  # the prediction layer, which decoding does without
            continue
        active += parameter.numel() * share
    assert active / 1e9 == pytest.approx(ACTIVE[name], rel=0.02)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_fresh_and_valid(name):
    first, second = preset(name), preset(name)
    assert type(first) is DeepSeekConfig and first.to_dict() == second.to_dict()
    first.rope_parameters["rope_theta"] = 1.0
    assert second.rope_parameters["rope_theta"] == 10000.0
    assert preset(name).rope_parameters == second.rope_parameters


def test_overrides_replace_fields():
    assert preset("tiny_v3", num_hidden_layers=5).num_hidden_layers == 5
    assert preset("tiny_v3").num_hidden_layers == 3


def test_unknown_presets_are_refused_with_the_nearest():
    with pytest.raises(ValueError, match="unknown preset 'tiny_v33'; did you mean 'tiny_v3'"):
        preset("tiny_v33")
    with pytest.raises(ValueError, match="unknown preset 'gpt'; known: tiny_llm, tiny_moe"):
        preset("gpt")


@pytest.mark.parametrize(
    ("name", "attention", "feed_forward"),
    [
        ("llm_7b", {"mha": 30}, {"dense": 30}),
        ("moe_16b", {"mha": 28}, {"dense": 1, "moe": 27}),
        ("v2_lite", {"mla": 27}, {"dense": 1, "moe": 26}),
        ("v2", {"mla": 60}, {"dense": 1, "moe": 59}),
        ("v3", {"mla": 61}, {"dense": 3, "moe": 58}),
        ("v3.2", {"dsa": 61}, {"dense": 3, "moe": 58}),
        ("v4_flash", {"swa": 2, "csa": 21, "hca": 20}, {"hash_moe": 3, "moe": 40}),
        ("v4_pro", {"hca": 31, "csa": 30}, {"hash_moe": 3, "moe": 58}),
        ("v4.1_flash", {"swa": 2, "csa2_full": 4, "csa2_reindex": 4, "csa2_reuse": 30}, {"moe": 40}),
    ],
)
def test_layers_of_the_releases(name, attention, feed_forward):
    specs = preset(name).specs
    for words, expected in (
        ([s.attention for s in specs], attention),
        ([s.feed_forward for s in specs], feed_forward),
    ):
        assert {word: words.count(word) for word in set(words)} == expected
    assert specs[0].feed_forward != "moe" or name == "v4.1_flash"


def in_words(count):
    """29472 -> 29.5 k."""
    return f"{count / 1e9:.1f} B" if count >= 1e9 else f"{count / 1e3:.1f} k"


@pytest.mark.parametrize("name", PRESETS)
def test_the_table_of_presets_has_their_parameters(name):
    config, total, active = preset(name), 0, 0
    for key, parameter in meta_model(name).named_parameters():
        layer = re.search(r"\.layers\.(\d+)\.", key)
        if layer is None or int(layer[1]) < config.num_hidden_layers:
            total += parameter.numel()
            share = config.num_experts_per_tok / config.n_routed_experts if ".mlp.experts." in key else 1
            if ".engram.embed." in key:
                share = config.engram_columns / len(parameter)
            active += parameter.numel() * share
    assert ABOUT[name][1:3] == (in_words(total), in_words(active))


def test_names_follow_one_pattern_and_old_ones_still_work():
    assert set(ABOUT) == set(PRESETS)
    generations = {about.generation.lower().replace("-", "_") for about in ABOUT.values()}
    for name, about in ABOUT.items():
        begins = name.removeprefix("tiny_")
        assert re.fullmatch(r"(tiny_)?(v\d(\.\d)?|llm|moe|r1)(_\w+)?", name)
        assert any(begins.startswith(word) or word.startswith(begins) for word in generations) or begins == "r1", about
    assert OLD_NAMES == {"tiny_v32": "tiny_v3.2", "tiny_v41": "tiny_v4.1", "v41_flash": "v4.1_flash"}
    assert preset("tiny_v32", vocab_size=99).to_dict() == preset("tiny_v3.2", vocab_size=99).to_dict()
