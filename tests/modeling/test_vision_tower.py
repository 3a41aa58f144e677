"""V4.1's vision tower and aligner beside their formulas, outputs and gradients; what a config must say of them."""

import pytest
import torch
from torch import nn

from configuration_deepseek import preset
from modeling_deepseek.vision_tower import DeepSeekAligner, DeepSeekVisionTower
from tests.reference.compare import assert_same_gradients, twin
from tests.reference.v41_names import RELEASE, vision_names
from tests.reference.vision_tower import aligner, tower

VISION = {
    **{"num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 10},
    **{"patch_size": 2, "downsample_ratio": 3, "rope_theta": 10000},
}


def parts(**changes) -> nn.ModuleDict:
    config = preset("tiny_v4.1", vision_config=VISION | changes)
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    both = nn.ModuleDict({"vision": DeepSeekVisionTower(config), "aligner": DeepSeekAligner(config)})
    for name, parameter in both.named_parameters():
        nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.3)
    return both


def read(both: nn.ModuleDict, patches: torch.Tensor, grids: list) -> torch.Tensor:
    return both["aligner"](both["vision"](patches, grids), grids)


@pytest.mark.parametrize("grids", [[(4, 5)], [(1, 2), (3, 3), (4, 2)]], ids=str)
def test_equals_its_formulas(grids):
    both, sizes = parts(), [height * width for height, width in grids]
    patches = torch.randn(sum(sizes), 12)
    twins = {name: twin(parameter) for name, parameter in both.named_parameters()}
    weights = {prefix: {n.removeprefix(f"{prefix}."): w for n, w in twins.items()} for prefix in both}
    tokens = []
    for (height, width), image in zip(grids, patches.double().split(sizes), strict=True):
        found = tower(image, weights["vision"], VISION, width)
        tokens.append(aligner(found, weights["aligner"], height, width, 3))
    named = {name: (p, twins[name]) for name, p in both.named_parameters()}
    assert_same_gradients(read(both, patches, grids), torch.cat(tokens), named)


def test_parameters_are_the_release_s():
    with torch.device("meta"):
        config = preset("v4.1_flash")
        both = nn.ModuleDict({"vision": DeepSeekVisionTower(config), "aligner": DeepSeekAligner(config)})
    assert {*both.state_dict(), "image_start", "image_end", "image_newline"} == set(vision_names(RELEASE))
    shapes = {name: tuple(weight.shape) for name, weight in both.state_dict().items()}
    assert shapes["aligner.w1.weight"] == (5120, 9216) and shapes["vision.patch_embed.proj.weight"] == (1024, 588)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"patch_size": None}, "vision_config has patch_size=None, which must be a positive number"),
        (
            {"hidden_size": 12},
            "vision_config has hidden_size=12, which must be a multiple of 4 * num_attention_heads=8",
        ),
    ],
    ids=str,
)
def test_towers_that_cannot_be(changes, says):
    with pytest.raises(ValueError) as refused:
        parts(**changes)
    assert says in str(refused.value) and "\n" not in str(refused.value)
