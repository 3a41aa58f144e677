"""Faults in images and their labels, for the data report."""

from collections import Counter
from typing import Any

import numpy as np

from ..data.fault_report import Report, finding
from ..data.sources import Rows
from .reading import Pictures, report

FAULTS = {
    "broken_images": "can't be opened (left out)",
    "one_pixel_images": "of one pixel (left out)",
    "without_label": "no label (left out)",
    "empty_classes": "label without an image",
    "converted_images": "channels that RGB doesn't hold",
    "duplicate_images": "same pixels as an earlier image",
    "contradicting_labels": "same pixels as an earlier image, another label",
    "images_in_train": "same pixels as a training image",
    "near_images_in_train": "nearly a training image (perceptual hash)",
}
HASHED_SIDE = 32  # pixels that the hash looks at; smaller images would nearly all be alike
NEAR_BITS = 4  # of 64 that may differ
BLOCK = 1_000  # hashes that are compared with all at once


def check_images(splits: dict[str, Rows], pictures: dict[str, Pictures]) -> Report:
    """Faults by split, under the names of `FAULTS`."""
    found: Report = {}
    known = hashes(splits["train"], pictures["train"]) if "train" in splits else None
    in_train = set(splits["train"]["pixels"]) if "train" in splits else set()
    for split, rows in splits.items():
        found[split] = {"rows": len(rows), **report(pictures[split]), **_repeated(rows)}
        if split == "train" or "train" not in splits:
            continue
        copies = [row["source"] for row in rows if row["pixels"] in in_train]
        found[split]["images_in_train"] = finding(copies)
        own = hashes(rows, pictures[split])
        if known is not None and own is not None:
            near = [rows[number]["source"] for number in near_ones(own, known)]
            found[split]["near_images_in_train"] = finding([name for name in near if name not in set(copies)])
    return found


def _repeated(rows: Rows) -> dict[str, Any]:
    first: dict[str, dict[str, Any]] = {}
    same: list[tuple[str, str]] = []
    other: list[tuple[str, str]] = []
    for row in rows:
        earlier = first.setdefault(row["pixels"], row)
        if earlier is not row:
            (same if earlier["target"] == row["target"] else other).append((earlier["source"], row["source"]))
    return {"duplicate_images": finding(same), "contradicting_labels": finding(other)}


def hashes(rows: Rows, pictures: Pictures) -> np.ndarray | None:
    """[images, 64] bits of the perceptual hash; None if the images are too small for it, or without `imagehash`."""
    if max((min(pictures.sizes[number]) for number in rows["image"]), default=0) < HASHED_SIDE:
        return None
    try:
        from imagehash import phash
    except ImportError:
        print('near-duplicates are not looked for: pip install "deepseek-hf[images]"')
        return None
    return np.stack([phash(pictures[number]).hash.reshape(-1) for number in rows["image"]])


def near_ones(own: np.ndarray, known: np.ndarray) -> list[int]:
    """Those of the hashes [A, 64] that differ from one of [K, 64] in at most `NEAR_BITS`."""
    near: list[int] = []
    for begin in range(0, len(own), BLOCK):
        block = own[begin : begin + BLOCK].astype(np.float32)
        differing = block.sum(1)[:, None] + known.sum(1)[None] - 2 * block @ known.T.astype(np.float32)
        near += (begin + np.flatnonzero(differing.min(1) <= NEAR_BITS)).tolist()
    return near


def class_balance(targets: list[str], labels: list[str]) -> str:
    """The number of images of each label in words, the most frequent first."""
    counts = Counter(targets)
    order = sorted(labels, key=lambda label: (-counts[label], label))
    shown = ", ".join(f"{label} {counts[label]:,}" for label in order[:8])
    rest = f", ... {order[-1]} {counts[order[-1]]:,}" if len(order) > 8 else ""
    return f"{len(labels)} labels: {shown}{rest}"
