"""What needs no network on optdigits: the nearest neighbour, and SVMs, also with copies moved by one pixel.

python benchmarks/image_floors.py ../shared/data/optdigits
"""

import gzip
import json
import sys
from pathlib import Path

import numpy as np
from sklearn.neighbors import KNeighborsClassifier
from sklearn.svm import SVC

GAMMA = 16 / 64  # of 4, 16, 32 and 64 / 64 the best by three folds of the training images


def read(path: Path) -> tuple[np.ndarray, list[str]]:
    """Images [N, 8, 8] from 0 to 1, and labels."""
    with gzip.open(path, "rt") as file:
        rows = [json.loads(line) for line in file]
    return np.array([row["pixels"] for row in rows], dtype=float).reshape(-1, 8, 8) / 16, [
        row["label"] for row in rows
    ]


def moved(images: np.ndarray, down: int, right: int) -> np.ndarray:
    """The images moved by pixels, zeros coming in."""
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1)))
    return padded[:, 1 - down : 9 - down, 1 - right : 9 - right]


def main(folder: Path) -> None:
    (train, labels), (test, expected) = read(folder / "train.jsonl.gz"), read(folder / "test.jsonl.gz")
    steps = [(0, 0), (0, 1), (0, -1), (1, 0), (-1, 0)]
    shifted = np.concatenate([moved(train, *step) for step in steps])
    for name, model, images, targets in (
        ("nearest neighbour", KNeighborsClassifier(1), train, labels),
        ("SVM", SVC(C=3, gamma=GAMMA), train, labels),
        ("SVM with shifts", SVC(C=3, gamma=GAMMA), shifted, labels * len(steps)),
    ):
        score = model.fit(images.reshape(-1, 64), targets).score(test.reshape(-1, 64), expected)
        print(f"{name}: {score:.4f}", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
