"""The processor of images and text: sizes and pixels by hand, places in prompts and chats, saved and opened again."""

import json
import re
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, AutoTokenizer

from configuration_deepseek import preset
from modeling_deepseek import DeepSeekForCausalLM, DeepSeekForImageTextToText, register
from tokenization_deepseek import DeepSeekProcessor, DeepSeekTokenizer, train_tokenizer

DOCS = Path(__file__).resolve().parents[2] / "docs"
IMAGE = "<｜deepseek_image｜>"
RELEASE = {"patch_size": 14, "downsample_ratio": 3, "max_image_tokens": 1024, "min_pixels": 295936}
SMALL = {"patch_size": 2, "downsample_ratio": 3, "max_image_tokens": 30, "min_pixels": 4}
VISION = {
    "num_hidden_layers": 1,
    "hidden_size": 8,
    "num_attention_heads": 2,
    "intermediate_size": 4,
    "rope_theta": 10000,
}


@pytest.fixture(scope="module")
def tokenizer(corpus):
    return train_tokenizer(corpus, 320, chat_template="v4.1", add_bos_token=False)


@pytest.fixture(scope="module")
def processor(tokenizer):
    return DeepSeekProcessor(tokenizer, tokenizer.convert_tokens_to_ids(IMAGE), **SMALL)


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(numpy.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=numpy.uint8))


# Sizes and pixels ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("width", "height", "patches", "places"),
    [
        (640, 480, (35, 46), 12 * 17 + 2),  # enough pixels, few enough places: whole patches
        (100, 100, (39, 39), 13 * 14 + 2),  # 544 x 544 pixels, the fewest
        (10, 10000, (1229, 2), 410 * 2 + 2),  # 17 x 17202, rounded down before patches are rounded up
        (2000, 2000, (93, 93), 31 * 32 + 2),  # 31.5 tokens wide would be too many
        (100000, 10, (3, 1021 * 3), 1024),  # one row
        (10, 100000, (511 * 3, 3), 1024),  # one column
    ],
)
def test_sizes_by_hand(tokenizer, width, height, patches, places):
    processor = DeepSeekProcessor(tokenizer, 5, **RELEASE)
    found = processor.size_of(width, height)
    assert found == patches and processor.places_of(*found) == places


def test_no_image_takes_more_places_than_allowed(tokenizer):
    processor = DeepSeekProcessor(tokenizer, 5, **RELEASE)
    sides = sorted({int(1.37**i) + 1 for i in range(32)})
    taken = [processor.places_of(*processor.size_of(width, height)) for width in sides for height in sides]
    assert max(taken) == 1024 and min(taken) > 150


def test_a_bound_on_the_width_presses_wide_images(tokenizer):
    processor = DeepSeekProcessor(tokenizer, 5, **RELEASE, max_wh_ratio=8)
    assert processor.size_of(16000, 800) == DeepSeekProcessor(tokenizer, 5, **RELEASE).size_of(6400, 800)
    wide = DeepSeekProcessor(tokenizer, 5, **SMALL, max_wh_ratio=2)
    patches, grid = wide.patches_of(Image.new("RGB", (12, 2), (255, 255, 255)))
    assert grid == (1, 2) and (patches == 1.0).all()  # nothing grey


def test_pixels_of_a_patch_stand_channel_by_channel_row_by_row(processor):
    pixels = numpy.arange(4 * 6 * 3, dtype=numpy.uint8).reshape(4, 6, 3)
    patches, grid = processor.patches_of(pixels)
    assert grid == (2, 3) and patches.dtype == numpy.float32
    by_hand = [[[pixels[y + i, x + j, c] for c in range(3) for i in (0, 1) for j in (0, 1)] for x in (0, 2, 4)]
               for y in (0, 2)]  # fmt: skip
    numpy.testing.assert_allclose(patches, numpy.array(by_hand).reshape(6, 12) / 127.5 - 1, atol=1e-6)


def test_beside_an_image_is_grey(processor):
    patches, grid = processor.patches_of(Image.new("RGB", (5, 4), (255, 0, 0)))  # 5 pixels to 6: a column beside it
    assert grid == (2, 3)
    grey = 127 / 127.5 - 1
    rows = patches.reshape(2, 3, 3, 2, 2)
    assert numpy.isclose(rows[:, 2, 1, :, 1], grey).all() or numpy.isclose(rows[:, 0, 1, :, 0], grey).all()
    assert rows[:, 1, 0].min() == 1.0 and rows[:, 1, 1].max() == -1.0


def test_sixteen_bits_are_scaled_and_a_path_is_a_file(processor, tmp_path):
    levels = numpy.arange(24, dtype=numpy.uint16).reshape(4, 6) * 2700
    by_hand = processor.patches_of((levels // 256).astype(numpy.uint8))[0]
    Image.fromarray(levels).save(tmp_path / "depth.png")
    for image in (Image.fromarray(levels), Image.fromarray(levels.astype(numpy.int32)), tmp_path / "depth.png",
                  str(tmp_path / "depth.png")):  # fmt: skip
        numpy.testing.assert_array_equal(processor.patches_of(image)[0], by_hand)
    few = processor.patches_of(Image.fromarray(numpy.full((4, 6), 200, numpy.int32)))[0]
    numpy.testing.assert_allclose(few, 200 / 127.5 - 1, atol=1e-6)


# Prompts -------------------------------------------------------------------------------------------------------------


def test_places_in_a_batch_of_unequal_rows(processor):
    texts = [f"a {IMAGE} b {IMAGE}", "no image at all, but many words", f"{IMAGE}c"]
    images = [picture(6, 4), picture(12, 8, 1), picture(2, 2, 2)]  # tokens: 1 x 1, 2 x 2, 1 x 1
    made = processor(images=images, text=texts, padding=True, return_tensors="pt")
    is_image = made["input_ids"] == processor.image_token_id
    assert is_image.sum(1).tolist() == [4 + 8, 0, 4]
    assert made["image_grid_thw"].tolist() == [[1, 2, 3], [1, 4, 6], [1, 1, 1]]
    assert made["pixel_values"].shape == (6 + 24 + 1, 12) and made["pixel_values"].dtype == torch.float32
    for row, text, mask in zip(made["input_ids"].tolist(), texts, made["attention_mask"].tolist(), strict=True):
        kept = [token for token, seen in zip(row, mask, strict=True) if seen]
        assert row[: len(row) - len(kept)] == [processor.tokenizer.pad_token_id] * (len(row) - len(kept))
        assert processor.decode([t for t in kept if t != processor.image_token_id]) == text.replace(IMAGE, "")
    by_text = processor(images=[images[:2], [], images[2:]], text=texts, padding=True, return_tensors="pt")
    assert all(torch.equal(by_text[name], made[name]) for name in made)
    longer = processor(text=["ab", "c"], padding="max_length", max_length=9, pad_to_multiple_of=4)
    assert [len(row) for row in longer["input_ids"]] == [12, 12] and set(longer) == {"input_ids", "attention_mask"}


def test_the_side_of_a_call_counts_more_than_the_tokenizer_s(processor):
    left, right = ([[one[0] for one in made["input_ids"]], [one[-1] for one in made["input_ids"]]]
                   for made in (processor(text=["ab", "c"], padding=True, padding_side=side)
                                for side in ("left", "right")))  # fmt: skip
    pad = processor.tokenizer.pad_token_id
    assert (pad in left[0], pad in left[1]) == (True, False) and (pad in right[0], pad in right[1]) == (False, True)


CHAT = [
    {
        "role": "user",
        "content": [{"type": "image", "image": picture(6, 4)}, {"type": "text", "text": f"what? {IMAGE}"}],
    },
    {"role": "assistant", "content": "a cat"},
    {"role": "user", "content": [{"type": "text", "text": "and"}, {"type": "image", "image": picture(2, 2)}]},
]


def test_images_in_chats(processor):
    made = processor.apply_chat_template(CHAT, tokenize=True, return_dict=True, add_generation_prompt=True)
    assert len(made["input_ids"]) == 1 and made["image_grid_thw"].tolist() == [[1, 2, 3], [1, 1, 1]]
    (ids,) = made["input_ids"]
    assert ids.count(processor.image_token_id) == 8  # letters of the same name in a user's text are letters
    text = processor.apply_chat_template(CHAT[2:], add_generation_prompt=True)
    assert text == f"<｜begin▁of▁sentence｜><｜User｜>and\n\n{IMAGE}<｜Assistant｜></think>"
    both = processor.apply_chat_template(
        [CHAT, CHAT[:1]], tokenize=True, return_dict=True, return_tensors="pt", processor_kwargs={"padding": True},
        return_assistant_tokens_mask=True,
    )  # fmt: skip
    assert both["input_ids"].shape == both["assistant_masks"].shape
    again = processor.apply_chat_template(
        [CHAT, CHAT[:1]], tokenize=True, return_dict=True, return_tensors="pt", padding=True
    )
    assert torch.equal(again["input_ids"], both["input_ids"])
    answer = both["input_ids"][0][both["assistant_masks"][0].bool()].tolist()
    assert processor.decode(answer, skip_special_tokens=True) == "a cat" and both["image_grid_thw"].shape == (3, 3)


def test_an_address_of_an_image(processor, tmp_path):
    picture(6, 4).save(tmp_path / "it.png")
    for part in ({"type": "image", "path": str(tmp_path / "it.png")},
                 {"type": "image_url", "image_url": {"url": str(tmp_path / "it.png")}}):  # fmt: skip
        chat = [{"role": "user", "content": [part]}]
        made = processor.apply_chat_template(chat, tokenize=True, return_dict=True)
        assert (made["pixel_values"] == processor.patches_of(picture(6, 4))[0]).all()


PART = {"type": "image", "image": picture(2, 2)}
WRONG = {
    "too few images": (lambda p: p(images=picture(2, 2), text=[f"{IMAGE}{IMAGE}"]), "the texts have 2 places for"),
    "none": (lambda p: p(text=IMAGE), "the texts have 1 places for images (<｜deepseek_image｜>), but 0 images"),
    "of another text": (lambda p: p(images=[[], [picture(2, 2)]], text=[IMAGE, "a"]), "have 1, 0 places for images ("),
    "no text": (lambda p: p(images=picture(2, 2)), "give a text too, with <｜deepseek_image｜> where an image stands"),
    "cut": (lambda p: p(text="a", truncation=True, max_length=2), "truncation would cut images off their places"),
    "a chat cut": (
        lambda p: p.apply_chat_template(CHAT, tokenize=True, truncation=True),
        "truncation would cut images",
    ),
    "an option of others": (lambda p: p(text="a", do_resize=False), "the processor has no option do_resize; leave it"),
    "a length alone": (lambda p: p(text="a", max_length=3), "padding=None with max_length=3: give both of them"),
    "another padding": (lambda p: p(text="a", padding="all"), "padding='all', padding_side='left': give True or"),
    "ids": (lambda p: p(text=[[1, 2]]), "text must be a text or a list of texts"),
    "an empty chat": (lambda p: p.apply_chat_template([]), "a conversation is a list of messages, of one at least"),
    "a list for some": (lambda p: p(images=[[PART["image"]], None], text=[IMAGE, "a"]), "a list for each text (empty"),
    "real numbers": (
        lambda p: p(images=numpy.ones((4, 6, 3)), text=IMAGE),
        "image 1 can't be read: an array [4, 6, 3] ",
    ),
    "channels first": (lambda p: p(images=numpy.ones((3, 4, 6), "u1"), text=IMAGE), "[3, 4, 6] of uint8 is no image"),
    "nothing to see": (lambda p: p(images=numpy.ones((0, 6, 3), "u1"), text=IMAGE), "[0, 6, 3] of uint8 is no image"),
    "a picture of reals": (
        lambda p: p(images=Image.new("F", (4, 4)), text=IMAGE),
        "image 1 can't be read: it has real",
    ),
    "no image's file": (
        lambda p: p(images=[picture(2, 2), __file__], text=IMAGE * 2),
        f"image 2 ({__file__}) can't be read: cannot identify image file",
    ),
    "nowhere": (
        lambda p: p.apply_chat_template([{"role": "user", "content": [{"type": "image"}]}], tokenize=True),
        "message 1: an image has none of image, url, path, base64, image_url",
    ),
    "a tool's": (
        lambda p: p.apply_chat_template([{"role": "tool", "content": [PART]}], tokenize=True),
        "this chat format|message 1: an image is a tool's result",
    ),
    "no such token": (
        lambda p: DeepSeekProcessor(p.tokenizer, 999, **SMALL),
        "the tokenizer has 320 tokens, none of them image_token_id=999; add <｜deepseek_image｜> to it",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_refused(processor, what):
    call, says = WRONG[what]
    with pytest.raises(ValueError) as refused:
        call(processor)
    assert any(part in str(refused.value) for part in says.split("|")) and "\n" not in str(refused.value)


# Saved ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(processor, tmp_path_factory):
    """A tiny model with its processor, and one that knows text alone."""
    folder = tmp_path_factory.mktemp("sees")
    image, size = processor.image_token_id, len(processor.tokenizer)
    config = preset("tiny_v4.1", vocab_size=size, image_token_id=image, vision_config=SMALL | VISION)
    DeepSeekForImageTextToText(config).save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    DeepSeekForCausalLM(config).save_pretrained(folder / "text")
    processor.tokenizer.save_pretrained(folder / "text")
    return folder


def settings(processor):
    return {name: value for name, value in processor.to_dict().items() if name != "auto_map"}


def test_auto_classes_open_what_was_saved(processor, folder):
    again = AutoProcessor.from_pretrained(folder / "model")
    assert type(again) is DeepSeekProcessor and type(again.tokenizer) is DeepSeekTokenizer
    assert settings(again) == settings(processor) and again.chat_template == processor.chat_template
    assert type(AutoTokenizer.from_pretrained(folder / "model")) is DeepSeekTokenizer
    assert type(AutoProcessor.from_pretrained(folder / "text")) is DeepSeekTokenizer
    with pytest.raises(ValueError, match="describes no model of images and text"):
        (folder / "empty").mkdir()
        processor.tokenizer.save_pretrained(folder / "empty")
        (folder / "empty/config.json").write_text("{}")
        DeepSeekProcessor.from_pretrained(folder / "empty")


def test_a_release_has_no_file_of_a_processor(processor, folder, tmp_path):
    config = json.loads((folder / "model/config.json").read_text())
    release = {"model_type": "deepseek_v41", "architectures": ["DeepseekV41ForCausalLM"], "text_config": {}}
    release |= {name: config[name] for name in ("image_token_id", "vision_config")}
    processor.tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(release))
    assert settings(DeepSeekProcessor.from_pretrained(tmp_path)) == settings(processor)


@pytest.mark.parametrize("page", ["images_and_text.md", "images_and_text.zh-CN.md"])
def test_the_page_s_example_runs(folder, tmp_path, capsys, page):
    picture(6, 4).save(tmp_path / "photo.jpg")
    code = re.search(r"```python\n(.*?)```", (DOCS / page).read_text("utf-8"), re.DOTALL)[1]
    code = code.replace("deepseek-ai/DeepSeek-V4.1-Flash", str(folder / "model")).replace("photo", f"{tmp_path}/photo")
    try:
        exec(code.replace("max_new_tokens=64", "max_new_tokens=2"), {})
    finally:
        register()
    assert capsys.readouterr().out


def test_a_picture_becomes_text(folder):
    processor = AutoProcessor.from_pretrained(folder / "model")
    model = DeepSeekForImageTextToText.from_pretrained(folder / "model")
    inputs = processor.apply_chat_template(
        [CHAT, CHAT[2:]], tokenize=True, return_dict=True, return_tensors="pt", processor_kwargs={"padding": True}
    )
    made = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert made.shape[1] == inputs["input_ids"].shape[1] + 3
    assert len(processor.batch_decode(made[:, -3:])) == 2
