"""Pixels as a model reads them: scaled to one size, varied in training, normalised as the saved processor does it.

Letters: B images, H x W pixels, N labels.
"""

import math
import random
from collections import Counter
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import AutoImageProcessor, ViTImageProcessorPil

from ..training.batches import RowDraws
from .reading import NoImage, Pictures

KEPT_BYTES = 512 * 2**20  # of scaled images that stay in memory; more are opened at each use
LARGEST_SIDE = 224  # of images whose size nobody asked for
LEAST_DEVIATION = 1 / 255


class ImageProcessor:
    """transformers' image processor of a saved model, with Pillow at work, whatever else is installed."""

    @staticmethod
    def from_pretrained(name: str, **kwargs: Any) -> Any:
        return AutoImageProcessor.from_pretrained(name, backend="pil", **kwargs)


def most_frequent_size(sizes: list[tuple[int, int]]) -> tuple[int, int]:
    """Height and width that most images have, or where sizes vary the medians; a side of at most `LARGEST_SIDE`."""
    (height, width), count = Counter(sizes).most_common(1)[0]
    if count < len(sizes) / 10:
        height, width = (round(float(side)) for side in np.median(np.array(sizes), axis=0))
    scale = min(1.0, LARGEST_SIDE / max(height, width))
    return max(round(height * scale), 1), max(round(width * scale), 1)


class Pixels:
    """The images of all splits as [3, H, W] bytes, by number; `begins` says where those of a split begin."""

    def __init__(self, pictures: dict[str, Pictures], height: int, width: int) -> None:
        self.cells = [(one, number) for one in pictures.values() for number in range(len(one.cells))]
        counts = [len(one.cells) for one in pictures.values()]
        self.begins = dict(zip(pictures, np.cumsum([0, *counts]).tolist(), strict=False))
        self.size = (width, height)
        self.known: dict[int, torch.Tensor] = {}
        self.is_kept = 3 * height * width * len(self.cells) <= KEPT_BYTES

    def __getitem__(self, number: int) -> torch.Tensor:
        if number in self.known:
            return self.known[number]
        split, place = self.cells[number]
        try:
            image = split[place]
        except NoImage as error:  # it could be opened when the data were read
            raise ValueError(f"{split.cells[place]}: can't be read any more: {error}.") from error
        scaled = image if image.size == self.size else image.resize(self.size, Image.Resampling.BILINEAR)
        pixels = torch.from_numpy(np.array(scaled)).permute(2, 0, 1).contiguous()
        if self.is_kept:
            self.known[number] = pixels
        return pixels


def new_processor(pixels: Pixels, numbers: list[int]) -> Any:
    """An image processor with the mean and the deviation of each channel over some images."""
    count, total, squares = 0, torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    for number in numbers:
        values = pixels[number].double().flatten(1) / 255
        count += values.shape[1]
        total += values.sum(1)
        squares += values.square().sum(1)
    mean = total / count
    deviation = (squares / count - mean.square()).clamp(min=0).sqrt().clamp(min=LEAST_DEVIATION)
    width, height = pixels.size
    return ViTImageProcessorPil(
        size={"height": height, "width": width},
        image_mean=mean.tolist(),
        image_std=deviation.tolist(),
        do_convert_rgb=True,
    )


def border_colour(pixels: Pixels, numbers: list[int]) -> torch.Tensor:
    """[3] medians, 0 to 1, of the pixels at the edges of up to 1,000 images: what lies beyond them, most likely."""
    edges = [
        torch.cat((one[:, 0], one[:, -1], one[:, :, 0], one[:, :, -1]), dim=1)
        for one in (pixels[number] for number in numbers[:: max(len(numbers) // 1000, 1)])
    ]
    return torch.cat(edges, dim=1).float().median(1).values / 255


def placed(pixels: torch.Tensor, places: list[tuple[float, float, float, float]], fill: torch.Tensor) -> torch.Tensor:
    """[B, 3, H, W] images, each turned by degrees to the left, enlarged by a factor and moved by pixels to the right
    and down; in between, pixels are interpolated, and beyond the edges there is `fill` [3]."""
    height, width = pixels.shape[-2:]
    matrices = []
    for angle, factor, right, down in places:
        cosine, sine = math.cos(math.radians(angle)) / factor, math.sin(math.radians(angle)) / factor
        # From a place in the result to the one in the image, both in halves of its sides from its middle.
        across = (cosine, -sine * height / width, -2 * (cosine * right - sine * down) / width)
        along = (sine * width / height, cosine, -2 * (sine * right + cosine * down) / height)
        matrices.append((across, along))
    grid = F.affine_grid(torch.tensor(matrices), [*pixels.shape], align_corners=False)
    fill = fill[:, None, None]
    return F.grid_sample(pixels - fill, grid, align_corners=False) + fill


class ImageCollator:
    """Batches of images; those of training, which have no `row`, are varied.

    Args:
        amounts: what they are varied by, of the flags' names; see arguments.py.
        fill: [3], see `placed`.
        num_labels: N, for the blended labels of mixup.
    """

    def __init__(
        self, pixels: Pixels, processor: Any, amounts: dict[str, float], fill: torch.Tensor, num_labels: int, seed: int
    ) -> None:
        self.pixels, self.amounts, self.fill, self.num_labels = pixels, amounts, fill, num_labels
        self.mean, self.deviation = (
            torch.tensor(numbers, dtype=torch.float32)[:, None, None]
            for numbers in (processor.image_mean, processor.image_std)
        )
        self.draws = RowDraws(seed)

    def set_epoch(self, epoch: int) -> None:
        self.draws.set_epoch(epoch)

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        pixels = torch.stack([self.pixels[feature["image"]] for feature in features]).float() / 255
        labels = torch.tensor([feature["labels"] for feature in features])
        is_scored = "row" in features[0]
        if self.amounts and not is_scored:
            pixels, labels = self._varied(pixels, labels, [self.draws.of(feature["number"]) for feature in features])
        batch = {"pixel_values": (pixels - self.mean) / self.deviation, "labels": labels}
        if is_scored:
            batch["row"] = torch.tensor([feature["row"] for feature in features])
        return batch

    def _varied(
        self, pixels: torch.Tensor, labels: torch.Tensor, draws: list[random.Random]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        amounts = {
            name: self.amounts.get(name, 0.0) for name in ("shift", "rotation", "zoom", "flip", "noise", "mixup")
        }
        places = [self._place(draw, amounts) for draw in draws]
        if any(amounts[name] for name in ("shift", "rotation", "zoom")):
            pixels = placed(pixels, places, self.fill)
        if amounts["flip"]:
            mirrored = torch.tensor([draw.random() < 0.5 for draw in draws])[:, None, None, None]
            pixels = torch.where(mirrored, pixels.flip(-1), pixels)
        if amounts["noise"]:
            generators = [torch.Generator().manual_seed(draw.getrandbits(63)) for draw in draws]
            noise = torch.stack([torch.randn(pixels.shape[1:], generator=generator) for generator in generators])
            pixels = (pixels + amounts["noise"] * noise).clamp(0, 1)
        if amounts["mixup"]:
            return self._blended(pixels, labels, draws, amounts["mixup"])
        return pixels, labels

    def _place(self, draw: random.Random, amounts: dict[str, float]) -> tuple[float, float, float, float]:
        angle, zoom, right, down = (draw.uniform(-1, 1) for _ in range(4))
        factor = (1 + amounts["zoom"]) ** zoom
        return angle * amounts["rotation"], factor, right * amounts["shift"], down * amounts["shift"]

    def _blended(
        self, pixels: torch.Tensor, labels: torch.Tensor, draws: list[random.Random], alpha: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Each image with the one before it in the batch, and [B, N] shares of labels (mixup, arXiv 1710.09412)."""
        shares = torch.tensor([draw.betavariate(alpha, alpha) for draw in draws])
        own = F.one_hot(labels, self.num_labels).float()
        images, weights = shares[:, None, None, None], shares[:, None]
        return images * pixels + (1 - images) * pixels.roll(1, 0), weights * own + (1 - weights) * own.roll(1, 0)
