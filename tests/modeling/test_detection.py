"""The detection head: boxes by the tokens of an image, whatever its stem, its size and its batch."""

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForObjectDetection, DetrImageProcessorPil
from transformers.loss.loss_for_object_detection import ForObjectDetectionLoss

from configuration_deepseek import preset
from modeling_deepseek import DeepSeekForCausalLM, DeepSeekForObjectDetection, detection_head
from modeling_deepseek.boxes import corners_of, overlap, pairwise
from modeling_deepseek.detection_head import BOXES
from modeling_deepseek.image_stem import STEMS

IMAGES = {
    "num_channels": 2,
    "patch_size": 3,
    "num_labels": 3,
    "conv_channels": [6, 8],
    "conv_pooling": [2, 2],
    "attention_direction": "bidirectional",
    "initializer_range": 0.2,
    "num_detection_tokens": 5,
}


def detector(stem="conv", boxes="grid", name="tiny_llm", **fields):
    torch.manual_seed(0)
    fields = IMAGES | {"image_stem": stem, "box_prediction": boxes} | fields
    return DeepSeekForObjectDetection(preset(name, **fields)).eval()


def images(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def some_labels():
    return [
        {"class_labels": torch.tensor([0, 2]), "boxes": torch.tensor([[0.5, 0.5, 0.4, 0.5], [0.2, 0.2, 0.1, 0.1]])},
        {"class_labels": torch.zeros(0, dtype=torch.long), "boxes": torch.zeros(0, 4)},
    ]


@pytest.fixture(params=STEMS)
def stem(request):
    return request.param


@pytest.fixture(params=BOXES)
def boxes(request):
    return request.param


PYRAMIDS = [("conv", {"box_stride": 4}), ("conv_lstm", {"box_stride": 2}), ("conv", {"box_stride": 1})]
PYRAMIDS = [(stem, fields | {"conv_channels": [6, 8, 4], "conv_pooling": [2, 2, 3]}) for stem, fields in PYRAMIDS]


@pytest.mark.parametrize(
    ("stem", "boxes", "fields"),
    [(stem, boxes, {}) for stem in STEMS for boxes in BOXES] + [(stem, "grid", fields) for stem, fields in PYRAMIDS],
)
def test_images_of_unequal_size_are_read_as_if_alone(stem, boxes, fields):
    model = detector(stem, boxes, "tiny_v3", **fields)
    wide, high = images(1, 2, 7, 9), images(1, 2, 10, 5)
    padded, mask = images(2, 2, 11, 9) * 9, torch.zeros(2, 11, 9)
    for row, image in enumerate((wide, high)):
        height, width = image.shape[-2:]
        padded[row, :, :height, :width], mask[row, :height, :width] = image[0], 1
    both = model(padded, mask, some_labels())
    losses = []
    for row, image in enumerate((wide, high)):
        alone = model(image, labels=some_labels()[row : row + 1])
        count = alone.logits.shape[1]
        own = slice(-count, None) if boxes == "set" else slice(count)
        torch.testing.assert_close(both.logits[row, own], alone.logits[0], atol=5e-5, rtol=1e-4)
        torch.testing.assert_close(both.pred_boxes[row, own], alone.pred_boxes[0], atol=5e-5, rtol=1e-4)
        assert both.logits[row, count:].softmax(-1)[:, :-1].sum() < 1e-4 or boxes == "set"
        losses.append(alone.loss)
    if boxes == "grid":  # a sum over the objects, of which the first image has two; that of none counts as one
        torch.testing.assert_close(both.loss, losses[0] + losses[1] / 2, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_weight_that_an_image_reaches_is_trained(stem, boxes, checkpointing):
    model = detector(stem, boxes, "tiny_v2").train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    one = {"class_labels": torch.tensor([0, 2]), "boxes": torch.tensor([[0.5, 0.5, 0.5, 0.5], [0.2, 0.2, 0.3, 0.3]])}
    model(images(8, 2, 16, 16), labels=[one] * 8).loss.backward()
    without = {name for name, weight in model.named_parameters() if weight.grad is None or not weight.grad.any()}
    assert without == {"model.embed_tokens.weight"}


def test_a_saved_model_is_opened_by_its_auto_class(stem, boxes, tmp_path):
    model = detector(stem, boxes)
    model.save_pretrained(tmp_path)
    again = AutoModelForObjectDetection.from_pretrained(tmp_path)
    assert type(again) is DeepSeekForObjectDetection
    pixels = images(2, 2, 8, 8)
    assert torch.equal(again(pixels).logits, model(pixels).logits)
    half = AutoModelForObjectDetection.from_pretrained(tmp_path, dtype=torch.bfloat16)
    found = half(pixels, labels=some_labels())
    assert found.loss.isfinite() and found.pred_boxes.isfinite().all() and found.logits.isfinite().all()
    torch.testing.assert_close(found.pred_boxes, model(pixels).pred_boxes, atol=0.2, rtol=0.2)


def test_a_grid_gives_chances_that_add_up_to_one_and_boxes_about_its_cells():
    model = detector(nms_threshold=1.0)
    found = model(images(1, 2, 12, 20))
    assert found.logits.shape == (1, 15, 4)
    torch.testing.assert_close(found.logits.exp().sum(-1), torch.ones(1, 15))
    with torch.no_grad():
        model.boxes.box[-1].weight.zero_()
        model.boxes.box[-1].bias.zero_()
    centre = model(images(1, 2, 12, 20)).pred_boxes[0, 7]  # second row, third column, of cells of four pixels
    torch.testing.assert_close(centre, torch.tensor([2.5 / 5, 1.5 / 3, 1 / 5, 1 / 3]))


@pytest.mark.parametrize(("stem", "fields"), PYRAMIDS)
def test_a_pyramid_adds_to_each_place_what_the_trunk_made_of_the_token_that_it_lies_in(stem, fields):
    """Against loops over places; 13 x 10 pixels pool to 7 x 5, 4 x 3 and 2 x 1 places."""
    model = detector(stem, **fields).double()
    pixels, stride = images(1, 2, 13, 10).double(), fields["box_stride"]
    cells = []
    model.boxes.score.register_forward_hook(lambda module, inputs, output: cells.append(inputs[0]))
    found = model(pixels, output_hidden_states=True)
    trunk = found.hidden_states[-1][0].view(2, 1, -1)

    levels, features, strides = [], pixels, [1, 2, 4]
    for block in model.stem.blocks:
        whole = F.conv2d(features, block.conv.weight, padding=1)
        whole = F.gelu(whole / (whole.square().mean() + 1e-6).sqrt() * block.norm.weight[:, None, None])
        levels.append(whole[0])
        features = F.max_pool2d(whole, block.pooling, ceil_mode=True)
    _, height, width = levels[strides.index(stride)].shape
    assert cells[0].shape == (1, height * width, 32) and found.pred_boxes.shape == (1, height * width, 4)
    laterals = dict(zip([one for one in strides if one >= stride], model.boxes.pyramid.lateral, strict=True))
    for row in range(height):
        for column in range(width):
            expected = trunk[row * stride // 12, column * stride // 12]
            for one, lateral in laterals.items():
                place = levels[strides.index(one)][:, row * stride // one, column * stride // one]
                expected = expected + lateral.weight[:, :, 0, 0] @ place + lateral.bias
            torch.testing.assert_close(cells[0][0, row * width + column], expected)
    model.boxes.box[-1].weight.data.zero_()
    model.boxes.box[-1].bias.data.zero_()
    found = model(pixels).pred_boxes[0, width + 2]  # second row, third column
    expected = torch.tensor([2.5 * stride / 10, 1.5 * stride / 13, stride / 10, stride / 13])
    torch.testing.assert_close(found, expected)


def test_every_weight_of_a_pyramid_is_trained_saved_and_opened(tmp_path):
    model = detector(**PYRAMIDS[1][1]).train()
    one = {"class_labels": torch.tensor([0, 2]), "boxes": torch.tensor([[0.5, 0.5, 0.5, 0.5], [0.2, 0.2, 0.3, 0.3]])}
    model(images(8, 2, 16, 16), labels=[one] * 8).loss.backward()
    assert all(weight.grad.any() for name, weight in model.named_parameters() if "embed_tokens" not in name)
    model.eval().save_pretrained(tmp_path)
    again = AutoModelForObjectDetection.from_pretrained(tmp_path)
    pixels = images(2, 2, 8, 8)
    assert torch.equal(again(pixels).logits, model(pixels).logits)


def test_overlapping_boxes_are_suppressed_in_evaluation_alone():
    model = detector(nms_threshold=0.3)
    with torch.no_grad():
        model.boxes.box[-1].bias[2:] = 1.5  # larger boxes, which overlap
    pixels = images(2, 2, 16, 16)
    found, raw = model(pixels), model.train()(pixels)
    kept = found.logits[..., :-1].exp().sum(-1) > 1e-6
    torch.testing.assert_close(found.logits[kept], raw.logits[kept])
    assert 0 < kept.sum() < kept.numel() / 2
    for image in range(2):
        corners = corners_of(found.pred_boxes[image, kept[image]])
        labels = found.logits[image, kept[image], :-1].argmax(-1)
        near = overlap(*pairwise(corners, corners))[0] * (labels[:, None] == labels[None])
        assert near.fill_diagonal_(0).max() <= 0.3
    shown = DetrImageProcessorPil().post_process_object_detection(found, 0.0, [(16, 16)] * 2)
    assert [len(one["scores"]) for one in shown] == kept.sum(1).tolist()


def test_of_very_many_boxes_the_best_are_kept(monkeypatch):
    model = detector(box_stride=1, nms_threshold=0.9)
    pixels = images(2, 2, 9, 8)
    every = model(pixels).logits[..., :-1].max(-1).values
    monkeypatch.setattr(detection_head, "MOST_BOXES", 20)
    few = model(pixels).logits[..., :-1].max(-1).values
    raw = model.train()(pixels).logits[..., :-1].max(-1).values
    for one, other, scores in zip(every, few, raw, strict=True):
        kept = one.argsort(descending=True)[: int((other > -1e4).sum())]
        assert 0 < len(kept) <= 20 and (scores >= scores.sort().values[-20]).sum() == 20
        assert torch.equal(one[kept].sort().values, other[other > -1e4].sort().values)


def test_an_image_that_is_all_padding_has_no_boxes_and_spoils_no_loss(stem, boxes):
    model = detector(stem, boxes)
    mask = torch.ones(2, 9, 9)
    mask[1] = 0
    found = model(images(2, 2, 9, 9), mask, some_labels())
    assert found.loss.isfinite() and found.pred_boxes.isfinite().all()
    found.loss.backward()
    assert all(weight.grad is None or weight.grad.isfinite().all() for weight in model.parameters())


def test_a_set_learns_by_the_loss_of_transformers():
    model = detector(boxes="set")
    found = model(images(2, 2, 8, 8), labels=some_labels())
    config = type("Config", (), {"num_labels": 3, "class_cost": 1, "bbox_cost": 5, "giou_cost": 2,
                                 "eos_coefficient": 0.1, "bbox_loss_coefficient": 5, "giou_loss_coefficient": 2,
                                 "auxiliary_loss": False})  # fmt: skip
    expected, parts, _ = ForObjectDetectionLoss(found.logits, some_labels(), "cpu", found.pred_boxes, config)
    torch.testing.assert_close(found.loss, expected)
    assert found.loss_dict.keys() == parts.keys() and found.logits.shape == (2, 5, 4)


def test_a_language_model_lends_its_trunk(tmp_path):
    language = DeepSeekForCausalLM(preset("tiny_llm"))
    language.save_pretrained(tmp_path)
    fields = {name: IMAGES[name] for name in IMAGES if name != "initializer_range"}
    model, info = DeepSeekForObjectDetection.from_pretrained(
        tmp_path, image_stem="conv", **fields, output_loading_info=True
    )
    assert {name.partition(".")[0] for name in info["missing_keys"]} == {"stem", "boxes"}
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, language.model.layers[0].mlp.up_proj.weight)


def test_it_works_without_decoder_layers(tmp_path):
    model = detector(num_hidden_layers=0)
    model.save_pretrained(tmp_path)
    again = AutoModelForObjectDetection.from_pretrained(tmp_path)
    found = again(images(2, 2, 8, 8), labels=some_labels())
    assert found.loss.isfinite() and not len(again.model.layers)
    with pytest.raises(ValueError, match=r"num_hidden_layers=0 must be positive"):
        preset("tiny_llm", num_hidden_layers=0)


@pytest.mark.parametrize(
    "labels",
    [
        some_labels()[:1],
        torch.zeros(2, 3),
        [{"class_labels": torch.zeros(1), "boxes": torch.zeros(1, 5)}] * 2,
        [{"labels": torch.zeros(1), "boxes": torch.zeros(1, 4)}] * 2,
    ],
)
def test_other_labels_are_refused(labels):
    with pytest.raises(ValueError, match="labels must be a list of 2 dictionaries"):
        detector()(images(2, 2, 8, 8), labels=labels)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"box_prediction": "grit"}, "did you mean 'grid'"),
        ({"num_detection_tokens": 0}, "num_detection_tokens=0 must be positive"),
        ({"box_stride": 3}, r"box_stride=3 is no stride of conv_pooling=\[2, 2\]; those are 1, 2, 4"),
        ({"box_stride": 2, "boxes": "set"}, "box_stride=2 needs box_prediction='grid' and a stem with convolutions"),
        ({"box_stride": 3, "stem": "patch"}, "box_stride=3 needs box_prediction='grid' and a stem with convolutions"),
        ({"nms_threshold": 0.0}, "nms_threshold=0.0 must be above 0 and at most 1"),
    ],
)
def test_configs_that_cannot_be_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        detector(**fields)


def test_an_image_of_one_pixel_is_read(stem, boxes):
    assert detector(stem, boxes)(images(2, 2, 1, 1)).logits.isfinite().all()
