"""Reading images: folders, tables and numbers; what can't be read is counted and named, or refused in one line."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from finetune_deepseek.images.arguments import ImageArguments
from finetune_deepseek.images.checks import check_images, hashes, near_ones
from finetune_deepseek.images.reading import NoImage, array_of, held_out, opened, read_images


def picture(seed=0, size=(6, 5), mode="RGB"):
    numbers = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(numbers).convert(mode)


def bytes_of(image, kind="PNG"):
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def save(folder, files):
    """Write images by their paths; what is no image goes in as it is."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else bytes_of(content))
    return folder


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_sixteen_bits_are_levels_and_real_numbers_are_refused():
    """Pillow makes white of what is above 255."""
    levels = np.array([[0, 0x80FF], [0x0100, 0xFFFF]], dtype=np.uint16)
    image, mode = opened(bytes_of(Image.fromarray(levels)))
    assert np.asarray(image)[..., 0].tolist() == [[0, 128], [1, 255]] and mode.startswith("I")
    with io.BytesIO() as file:
        Image.fromarray(np.ones((2, 2), np.float32)).save(file, "TIFF")
        with pytest.raises(NoImage, match="real numbers"):
            opened(file.getvalue())


def test_folders_of_labels_are_read_and_what_is_no_image_is_named(tmp_path):
    whole = bytes_of(picture(1))
    folder = save(
        tmp_path,
        {
            "train/cat/a.png": picture(0),
            "train/cat/half.png": whole[: len(whole) // 2],
            "train/cat/notes.txt": b"mice",
            "train/dog/empty.png": b"",
            "train/dog/dot.png": picture(2, (1, 1)),
            "train/dog/b.png": picture(3),
            "train/loose.png": picture(4),
            "train/dog/see-through.png": picture(5, mode="RGBA"),
            "val/cat/c.png": picture(6),
        },
    )
    (folder / "train" / "bird").mkdir()
    found = read_images(ImageArguments(data_dir=str(folder)))
    rows, pictures = found["train"]
    assert found.keys() == {"train", "validation"}
    assert [(row["source"], row["target"]) for row in rows] == [
        ("train/cat/a.png", "cat"),
        ("train/dog/b.png", "dog"),
        ("train/dog/see-through.png", "dog"),
    ]
    assert pictures[1].tobytes() == picture(3).tobytes()
    broken = [name.partition(":")[0] for name in pictures.faults["broken_images"]]
    assert broken == ["train/cat/half.png", "train/cat/notes.txt", "train/dog/empty.png"]
    assert pictures.faults["one_pixel_images"] == ["train/dog/dot.png"]
    assert pictures.faults["without_label"] == ["train/loose.png"]
    assert pictures.faults["converted_images"] == ["train/dog/see-through.png: RGBA"]
    assert pictures.empty == ["bird"]
    report = check_images({split: rows for split, (rows, _) in found.items()}, {s: p for s, (_, p) in found.items()})
    assert report["train"]["broken_images"]["count"] == 3 and report["train"]["empty_classes"]["examples"] == ["bird"]


def test_tables_hold_packed_images_paths_or_numbers(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    save(tmp_path, {"a.png": picture(0), "b.jpg": bytes_of(picture(1), "JPEG")})
    packed = [{"bytes": bytes_of(picture(seed)), "path": None} for seed in (0, 1)]
    pq.write_table(pa.table({"image": packed, "label": [0, 1]}), tmp_path / "packed.parquet")
    paths = write_rows(tmp_path / "paths.jsonl", [{"image": "a.png", "label": "x"}, {"image": None, "label": "y"}])
    numbers = [[0, 1, 2, 16], [[0, 16], [4, 8]], [[[0, 8, 16]]], [1, 2], [[1], [2, 3]], [[0, 17]], "x.png"]
    cells = write_rows(tmp_path / "cells.jsonl", [{"image": cell, "label": "z"} for cell in numbers])
    rows, pictures = read_images(ImageArguments(train_file=str(tmp_path / "packed.parquet")))["train"]
    assert rows["target"] == ["0", "1"] and pictures[1].tobytes() == picture(1).tobytes()
    rows, pictures = read_images(ImageArguments(train_file=paths))["train"]
    assert rows["source"] == ["paths.jsonl, row 1"] and pictures.faults["broken_images"] == [
        "paths.jsonl, row 2: no image"
    ]
    rows, pictures = read_images(ImageArguments(train_file=cells, pixel_max=16))["train"]
    assert list(rows["source"]) == ["cells.jsonl, row 1", "cells.jsonl, row 2"]
    assert np.array(pictures[0])[..., 0].tolist() == [[0, 16], [32, 255]]
    reasons = [name.partition(": ")[2] for name in pictures.faults["broken_images"]]
    assert pictures.faults["one_pixel_images"] == ["cells.jsonl, row 3"]
    assert reasons[:3] == [
        "2 numbers in a row are no square; give rows of them",
        "its numbers are no rows of equal length",
        "a number isn't from 0 to --pixel_max 16",
    ]
    assert "No such file" in reasons[3]


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ([], "no grey or colour image"),
        ([[1, 2, 3, 4]] * 2 + [[1]], "no rows of equal length"),
        ([[[1, 2]]], "1 x 1 x 2 are no grey or colour image"),
        ([[float("nan")]], "from 0 to"),
        ([["a"]], "no rows of equal length"),
    ],
)
def test_numbers_that_are_no_image(cell, message):
    with pytest.raises(NoImage, match=message):
        array_of(cell, 255)


def test_a_split_without_an_image_is_refused(tmp_path):
    folder = save(tmp_path, {"train/cat/a.png": b"no"})
    with pytest.raises(ValueError, match=r"train: no row has an image and a label \(train/cat/a.png: cannot identify"):
        read_images(ImageArguments(data_dir=str(folder)))
    (tmp_path / "flat" / "cat").mkdir(parents=True)
    with pytest.raises(
        ValueError, match="no file named train, .*; images themselves lie in train/LABEL/ and the like"
    ):
        read_images(ImageArguments(data_dir=str(tmp_path / "flat")))
    rows = write_rows(tmp_path / "r.jsonl", [{"picture": "a", "label": "x"}])
    with pytest.raises(ValueError, match=r"no column 'image'; it has picture, label. Set --image_column"):
        read_images(ImageArguments(train_file=rows))


def test_copies_and_near_copies_of_training_images_are_counted(tmp_path):
    big = picture(0, (40, 36)).resize((80, 72), Image.Resampling.BICUBIC)
    near = Image.fromarray((np.array(big) * 0.9).astype(np.uint8))
    folder = save(
        tmp_path,
        {
            "train/a/1.png": big,
            "train/a/2.png": big,
            "train/b/3.png": big,
            "train/b/4.png": picture(1, (64, 64)),
            "test/a/5.png": big,
            "test/a/6.png": near,
            "test/b/7.png": picture(2, (64, 64)),
        },
    )
    found = read_images(ImageArguments(data_dir=str(folder)))
    splits = {split: rows for split, (rows, _) in found.items()}
    report = check_images(splits, {split: pictures for split, (_, pictures) in found.items()})
    assert report["train"]["duplicate_images"] == {"count": 1, "examples": ["train/a/1.png => train/a/2.png"]}
    assert report["train"]["contradicting_labels"]["examples"] == ["train/a/1.png => train/b/3.png"]
    assert report["test"]["images_in_train"]["examples"] == ["test/a/5.png"]
    pytest.importorskip("imagehash")
    assert report["test"]["near_images_in_train"] == {"count": 1, "examples": ["test/a/6.png"]}


def test_distances_of_hashes_are_those_counted_bit_by_bit():
    draws = np.random.default_rng(0)
    known, own = draws.random((7, 64)) < 0.5, draws.random((5, 64)) < 0.5
    own[2], own[3] = known[4], known[1]
    own[2, :4] ^= True
    own[3, :5] ^= True
    assert near_ones(own, known) == [2]


def test_small_images_are_not_hashed(tmp_path):
    folder = save(tmp_path, {"train/a/1.png": picture(0), "train/b/2.png": picture(1)})
    rows, pictures = read_images(ImageArguments(data_dir=str(folder)))["train"]
    assert hashes(rows, pictures) is None


def test_validation_takes_its_share_of_each_label(tmp_path):
    rows = [{"image": [[n % 256, 0]], "label": label} for n, label in enumerate("a" * 20 + "b" * 5 + "c")]
    found, _ = read_images(ImageArguments(train_file=write_rows(tmp_path / "r.jsonl", rows)))["train"]
    train, validation = held_out(found, found["target"], 0.2, seed=0)
    assert sorted(validation["target"]) == [*"aaaab"] and len(train) == 21
    assert not set(train["source"]) & set(validation["source"])
    few = found.select([0, 20, 25])
    with pytest.raises(ValueError, match="no class has two images"):
        held_out(few, few["target"], 0.2, seed=0)
