"""Heads for images: stems, places of tokens, padding, and what of them is learned, saved and refused."""

import math

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForImageClassification

from configuration_deepseek import preset
from modeling_deepseek import DeepSeekForCausalLM, DeepSeekForImageClassification
from modeling_deepseek.image_stem import STEMS
from modeling_deepseek.rope import DeepSeekRotaryEmbedding, apply_rotary

IMAGES = {
    "num_channels": 2,
    "patch_size": 3,
    "num_labels": 3,
    "conv_channels": [6, 8],
    "conv_pooling": [2, 1],
    "attention_direction": "bidirectional",
    "initializer_range": 0.2,
}


def image_model(stem, name="tiny_llm", **fields):
    torch.manual_seed(0)
    return DeepSeekForImageClassification(preset(name, image_stem=stem, **IMAGES | fields)).eval()


def images(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=STEMS)
def stem(request):
    return request.param


@pytest.mark.parametrize("name", ["tiny_llm", "tiny_v3", "tiny_v32"])
@pytest.mark.parametrize("pooling", ["mean", "latent"])
def test_images_of_unequal_size_are_read_as_if_alone(stem, name, pooling):
    model = image_model(stem, name, pooling=pooling, num_pooling_heads=2, num_pooling_latents=5)
    wide, high = images(1, 2, 7, 9), images(1, 2, 10, 5)
    padded, mask = images(2, 2, 11, 9) * 9, torch.zeros(2, 11, 9)
    for row, image in enumerate((wide, high)):
        height, width = image.shape[-2:]
        padded[row, :, :height, :width], mask[row, :height, :width] = image[0], 1
    alone = torch.cat([model(image).logits for image in (wide, high)])
    torch.testing.assert_close(model(padded, mask).logits, alone, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(model(wide.expand(3, -1, -1, -1)).logits, alone[:1].expand(3, -1), atol=2e-5, rtol=1e-5)


def test_a_patch_is_a_linear_map_of_its_pixels():
    model = image_model("patch")
    pixels = images(1, 2, 7, 8)
    tokens = model.stem(pixels)
    weight, bias = model.stem.projection.weight, model.stem.projection.bias
    whole = torch.zeros(2, 9, 9)
    whole[:, :7, :8] = pixels[0]
    expected = [
        (weight * whole[:, row : row + 3, column : column + 3]).sum((1, 2, 3)) + bias
        for row in (0, 3, 6)
        for column in (0, 3, 6)
    ]
    torch.testing.assert_close(tokens.states[0], torch.stack(expected), atol=1e-5, rtol=1e-5)
    assert tokens.positions[0].tolist() == [[row, column] for row in range(3) for column in range(3)]


def test_convolutions_are_normed_over_an_images_own_places():
    norm = image_model("conv").stem.blocks[0].norm
    norm.weight.data.uniform_(0.5, 2)
    features, mask = images(2, 6, 4, 5), torch.zeros(2, 1, 4, 5)
    mask[0], mask[1, :, :3, :2] = 1, 1
    for row, own in enumerate((features[0], features[1, :, :3, :2])):
        expected = own / own.square().mean().sqrt() * norm.weight[:, None, None]
        found = norm(features, mask)[row, :, : own.shape[1], : own.shape[2]]
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(norm(features[:1], None)[0], norm(features, mask)[0])


def test_the_lstm_reads_an_image_row_by_row_in_both_directions():
    model = image_model("conv_lstm")
    lstm, width = model.stem.lstm, 16
    states = images(1, 5, 32)
    found = lstm(states)[0][0]

    def one_direction(steps, suffix):
        hidden, cell, outputs = torch.zeros(width), torch.zeros(width), {}
        weights = [getattr(lstm, f"{name}_l0{suffix}") for name in ("weight_ih", "bias_ih", "weight_hh", "bias_hh")]
        for step in steps:
            gates = F.linear(states[0, step], *weights[:2]) + F.linear(hidden, *weights[2:])
            enter, forget, new, out = gates.chunk(4)
            cell = forget.sigmoid() * cell + enter.sigmoid() * new.tanh()
            hidden = out.sigmoid() * cell.tanh()
            outputs[step] = hidden
        return torch.stack([outputs[step] for step in range(5)])

    expected = torch.cat((one_direction(range(5), ""), one_direction(range(4, -1, -1), "_reverse")), dim=-1)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_pairs_turn_by_row_and_column_alternately():
    config = preset("tiny_llm")  # heads of 8: four pairs
    rotary = DeepSeekRotaryEmbedding(config)
    places = torch.tensor([[[2, 5], [0, 1]]])
    cos, sin = rotary(torch.zeros(1), places)
    for token, place in enumerate(places[0].tolist()):
        for pair in range(4):
            angle = place[pair % 2] * config.rope_parameters["rope_theta"] ** (-2 * pair / 8)
            assert cos[0, token, pair].item() == pytest.approx(math.cos(angle), abs=1e-6)
            assert sin[0, token, pair].item() == pytest.approx(math.sin(angle), abs=1e-6)
    in_a_row = rotary(torch.zeros(1), torch.tensor([[3, 7]]))
    on_the_diagonal = rotary(torch.zeros(1), torch.tensor([[[3, 3], [7, 7]]]))
    torch.testing.assert_close(in_a_row, on_the_diagonal)
    query, key = images(1, 1, 2, 8).unbind(2)
    products = []
    for row, column in ((0, 0), (3, 4)):  # only the distance counts
        cos, sin = rotary(query, torch.tensor([[[row + 1, column + 2], [row, column]]]))
        query_at = apply_rotary(query[:, :, None], cos[:, :1], sin[:, :1], interleaved=False)
        key_at = apply_rotary(key[:, :, None], cos[:, 1:], sin[:, 1:], interleaved=False)
        products.append((query_at * key_at).sum())
    torch.testing.assert_close(*products)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_weight_that_an_image_reaches_is_trained(stem, checkpointing):
    model = image_model(stem, "tiny_v2").train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    labels = torch.arange(8) % 3
    loss = model(images(8, 2, 9, 9), labels=labels).loss
    loss.backward()
    without = {name for name, weight in model.named_parameters() if weight.grad is None or not weight.grad.any()}
    assert without == {"model.embed_tokens.weight"}
    model.eval()
    logits = model(images(8, 2, 9, 9)).logits
    torch.testing.assert_close(loss, F.cross_entropy(logits, labels))


def test_attention_implementations_agree(stem):
    model = image_model(stem)
    mask = torch.ones(2, 9, 9)
    mask[1, 6:] = 0
    found = []
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        found.append(model(images(2, 2, 9, 9), mask).logits)
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-5)


def test_a_saved_model_is_opened_by_its_auto_class(stem, tmp_path):
    model = image_model(stem)
    model.save_pretrained(tmp_path)
    again = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert type(again) is DeepSeekForImageClassification
    pixels = images(2, 2, 8, 8)
    assert torch.equal(again(pixels).logits, model(pixels).logits)
    half = AutoModelForImageClassification.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half(pixels).logits.dtype == torch.bfloat16


def test_a_language_model_lends_its_trunk(stem, tmp_path):
    language = DeepSeekForCausalLM(preset("tiny_llm"))
    language.save_pretrained(tmp_path)
    fields = {name: IMAGES[name] for name in IMAGES if name != "initializer_range"}
    model, info = DeepSeekForImageClassification.from_pretrained(
        tmp_path, image_stem=stem, **fields, output_loading_info=True
    )
    assert {name.partition(".")[0] for name in info["missing_keys"]} == {"stem", "score"}
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, language.model.layers[0].mlp.up_proj.weight)


@pytest.mark.parametrize(
    ("pixels", "mask", "message"),
    [
        (None, None, "they are None"),
        ((1, 3, 8, 8), None, r"2 channels \(config.num_channels\).*they are \(1, 3, 8, 8\)"),
        ((2, 8, 8), None, "they are"),
        ((1, 2, 8, 8), (1, 8, 7), "pixel_mask"),
        ((1, 2, 50, 50), None, "images of 50 x 50 pixels make 289 tokens, the model takes 128"),
    ],
)
def test_other_images_are_refused(pixels, mask, message):
    model = image_model("patch")
    with pytest.raises(ValueError, match=message):
        model(None if pixels is None else torch.zeros(pixels), None if mask is None else torch.ones(mask))


def test_a_config_without_a_stem_is_refused():
    with pytest.raises(ValueError, match="needs image_stem"):
        DeepSeekForImageClassification(preset("tiny_llm"))


def test_an_image_of_one_pixel_is_read(stem):
    assert image_model(stem)(images(2, 2, 1, 1)).logits.isfinite().all()
