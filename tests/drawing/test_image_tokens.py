"""Pixels to tokens and back: exact colours, k-means, codes; saved, opened, and refused when damaged."""

import numpy as np
import pytest
import torch

from finetune_deepseek.drawing import codes as codes_file
from finetune_deepseek.drawing import image_tokens
from finetune_deepseek.drawing.codes import Codes, trained_codes
from finetune_deepseek.drawing.palette import Palette, nearest, trained_palette
from tokenization_deepseek import encode_text, train_tokenizer


def images(count=6, height=4, width=6, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def test_few_colours_are_kept_exactly_the_darkest_first():
    pixels = np.array([[0, 0, 0], [255, 255, 255], [200, 0, 0], [0, 0, 200]], dtype=np.uint8)
    found = pixels[np.random.default_rng(0).integers(0, 4, (5, 3, 2))]
    palette = trained_palette(found, 64, 0)
    assert palette.colours.tolist() == [[0, 0, 0], [0, 0, 200], [200, 0, 0], [255, 255, 255]]  # by lightness
    numbers = palette.encode(found)
    assert numbers.shape == (5, 6) and (palette.decode(numbers) == found).all()
    assert numbers[2, 3] == palette.colours.tolist().index(found[2, 1, 1].tolist())  # row by row


def test_many_colours_become_the_nearest_of_as_many_as_asked_for():
    found = images()
    palette = trained_palette(found, 5, 0)
    assert palette.number == 5
    apart = np.square(found.reshape(-1, 1, 3).astype(int) - palette.colours.astype(int)).sum(-1)
    assert (palette.encode(found).reshape(-1) == apart.argmin(1)).all()
    assert nearest(np.array([[5, 5, 5]]), np.array([[0, 0, 0], [10, 10, 10]])).tolist() == [0]  # of equal ones


@pytest.fixture(scope="module")
def learned():
    """Codes for squares of one colour out of eight: as many vectors as colours."""
    draws = np.random.default_rng(0)
    colours = draws.integers(0, 256, (8, 3), dtype=np.uint8)
    found = colours[draws.integers(0, 8, (64, 4, 4))].repeat(2, 1).repeat(2, 2)
    return found, trained_codes(found, 2, 8, 100, 0, lambda line: None)


def test_codes_learn_squares_of_few_colours(learned):
    found, codes = learned
    numbers = codes.encode(found)
    assert numbers.shape == (64, 16) and numbers.max() < 8 and len(np.unique(numbers)) >= 6
    error = np.square(codes.decode(numbers).astype(float) - found).mean()
    blurred = np.square(found.mean((1, 2), keepdims=True) - found.astype(float)).mean()
    assert error < 0.2 * blurred


def test_the_nearest_vector_is_chosen_and_the_codebook_follows_its_means():
    torch.manual_seed(0)
    codes = Codes((4, 4), 2, 3)
    vectors = torch.randn(5, codes_file.VECTOR, 2, 2)
    flat = vectors.permute(0, 2, 3, 1).reshape(-1, codes_file.VECTOR)
    expected = torch.cdist(flat, codes.codebook).argmin(1)
    assert (codes.nearest(vectors).flatten() == expected).all()
    codes.counts.fill_(10.0)
    codes.sums.copy_(codes.codebook * 10)
    before = codes.codebook.clone()
    codes.follow(flat, expected)
    counts = torch.bincount(expected, minlength=3).float()
    sums = torch.stack([flat[expected == number].sum(0) for number in range(3)])
    keep = codes_file.FORGETTING
    mean = (keep * 10 * before + (1 - keep) * sums) / (keep * 10 + (1 - keep) * counts)[:, None]
    torch.testing.assert_close(codes.codebook, mean)


def test_gradients_pass_the_codebook_to_the_encoder():
    codes = Codes((4, 4), 2, 3)
    codes.loss(torch.rand(2, 3, 4, 4) - 0.5, has_codebook=True).backward()
    assert all(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in codes.parameters())


@pytest.mark.parametrize("kind", ["palette", "codes"])
def test_what_is_saved_draws_the_same(kind, learned, tmp_path):
    found, codes = learned
    tokens = codes if kind == "codes" else trained_palette(found, 64, 0)
    image_tokens.save(tokens, tmp_path)
    opened = image_tokens.load(tmp_path)
    numbers = tokens.encode(found)
    assert (opened.kind, opened.size, opened.grid, opened.number) == (kind, (8, 8), tokens.grid, tokens.number)
    assert (opened.encode(found) == numbers).all() and (opened.decode(numbers) == tokens.decode(numbers)).all()


@pytest.mark.parametrize(
    "content",
    ['{"kind": "palette"}', '{"kind": "palette", "size": [2, 2], "colours": [[1, 2]]}', "[", '{"kind": "codes", '
     '"size": [4, 4], "patch": 2, "number": 3}'],
)  # fmt: skip
def test_damaged_descriptions_are_refused_in_one_line(content, tmp_path):
    (tmp_path / "image_tokens").mkdir()
    (tmp_path / "image_tokens/image_tokens.json").write_text(content)
    with pytest.raises(ValueError, match=r"^[^\n]*image_tokens.json[^\n]*$"):
        image_tokens.load(tmp_path)


def test_no_text_becomes_an_image_token():
    tokenizer = train_tokenizer(["a red heart"], 300)
    before = len(tokenizer)
    image_tokens.add_image_tokens(tokenizer, 3)
    first = image_tokens.first_id(tokenizer, 3)
    assert (first, len(tokenizer)) == (before + 1, before + 4)
    ids = encode_text(tokenizer, "<｜image｜> <｜image▁2｜>")["input_ids"]
    assert max(ids) < before and tokenizer.decode(ids, skip_special_tokens=True).endswith("<｜image｜> <｜image▁2｜>")
    with pytest.raises(ValueError, match="hasn't the 5 image tokens"):
        image_tokens.first_id(tokenizer, 4)


def test_sizes_that_squares_do_not_fill_are_refused():
    with pytest.raises(ValueError, match="--patch_pixels 4: images of 6 x 8"):
        Codes((6, 8), 4, 3)
    with pytest.raises(ValueError, match="fewer squares"):
        trained_codes(images(2, 4, 4), 4, 3, 1, 0)


def test_pixels_and_squares_agree_on_which_square_is_which():
    """The number at row 1, column 0 changes the pixels of that square first."""
    codes = Codes((4, 6), 2, 3)
    with torch.no_grad():
        for weight in codes.decoder.parameters():
            weight.zero_()
        codes.decoder[0].weight[0, 0, 1, 1] = 1.0  # the vector's first number at its own place
        codes.decoder[-1].weight[:, 0] = 1.0
        codes.codebook.zero_()
        codes.codebook[2, 0] = 0.25
    drawn = codes.decode(np.array([[0, 0, 0, 2, 0, 0]]))[0]
    changed = drawn != drawn[0, 0]
    assert changed[2:, :2].all() and changed.sum() == 2 * 2 * 3
    assert isinstance(Palette((1, 1), np.zeros((1, 3))).decode(np.array([[0]])), np.ndarray)
