"""Pixels as a model reads them: scaled to one size, varied in training, normalised as the saved processor does it.

Letters: B images, H x W pixels, N labels.
"""

import math
import random
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import AutoImageProcessor, ViTImageProcessorPil

from ..training.batches import RowDraws
from .arguments import VARIATIONS
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


def new_processor(pixels: Pixels, numbers: list[int], processor_class: Any = ViTImageProcessorPil) -> Any:
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
    return processor_class(
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


def placed(pixels: torch.Tensor, places: Sequence[tuple[float, ...]], fill: torch.Tensor) -> torch.Tensor:
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


class Place(NamedTuple):
    """Where an image goes: turned by degrees to the left, enlarged by a factor and moved by pixels to the right and
    down, all about its middle; then mirrored."""

    angle: float = 0.0
    factor: float = 1.0
    right: float = 0.0
    down: float = 0.0
    is_mirrored: bool = False
    is_upside_down: bool = False


class Variation:
    """How images of training are varied, each by random numbers of its own.

    Args:
        amounts: of the flags' names, without what is off; see arguments.py.
        fill: [3], see `placed`.
    """

    def __init__(self, amounts: dict[str, float], fill: torch.Tensor) -> None:
        self.amounts = dict.fromkeys(VARIATIONS, 0.0) | amounts
        self.fill = fill

    def places(self, draws: list[random.Random]) -> list[Place]:
        return [self._place(draw) for draw in draws]

    def _place(self, draw: random.Random) -> Place:
        amounts = self.amounts
        angle, zoom, right, down = (draw.uniform(-1, 1) for _ in range(4))
        mirrored = [bool(amounts[name]) and draw.random() < 0.5 for name in ("flip", "flip_vertical")]
        factor = (1 + amounts["zoom"]) ** zoom
        return Place(angle * amounts["rotation"], factor, right * amounts["shift"], down * amounts["shift"], *mirrored)

    def of(self, pixels: torch.Tensor, places: list[Place], draws: list[random.Random]) -> torch.Tensor:
        """[B, 3, H, W], from 0 to 1, varied."""
        amounts = self.amounts
        if any(amounts[name] for name in ("shift", "rotation", "zoom")):
            pixels = placed(pixels, [place[:4] for place in places], self.fill)
        for axis, name in ((-1, "is_mirrored"), (-2, "is_upside_down")):
            is_flipped = torch.tensor([getattr(place, name) for place in places])[:, None, None, None]
            pixels = torch.where(is_flipped, pixels.flip(axis), pixels) if is_flipped.any() else pixels
        if amounts["colour"]:
            drawn = torch.tensor([[draw.gauss(0, amounts["colour"]) for _ in range(4)] for draw in draws])
            factors, light = drawn[:, :3, None, None] + 1, drawn[:, 3:, None, None]
            pixels = (pixels * factors + light).clamp(0, 1)
        if amounts["noise"]:
            generators = [torch.Generator().manual_seed(draw.getrandbits(63)) for draw in draws]
            noise = torch.stack([torch.randn(pixels.shape[1:], generator=generator) for generator in generators])
            pixels = (pixels + amounts["noise"] * noise).clamp(0, 1)
        return pixels


class ImageCollator:
    """Batches of images; those of training, which have no `row`, are varied.

    Args:
        amounts, fill: see `Variation`.
    """

    def __init__(
        self, pixels: Pixels, processor: Any, amounts: dict[str, float], fill: torch.Tensor, seed: int
    ) -> None:
        self.pixels, self.amounts, self.variation = pixels, amounts, Variation(amounts, fill)
        self.mean, self.deviation = (
            torch.tensor(numbers, dtype=torch.float32)[:, None, None]
            for numbers in (processor.image_mean, processor.image_std)
        )
        self.draws = RowDraws(seed)

    def set_epoch(self, epoch: int) -> None:
        self.draws.set_epoch(epoch)

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        pixels = torch.stack([self.pixels[feature["image"]] for feature in features]).float() / 255
        labels = self.labels(features)
        is_scored = "row" in features[0]
        if self.amounts and not is_scored:
            draws = [self.draws.of(feature["number"]) for feature in features]
            places = self.variation.places(draws)
            pixels = self.variation.of(pixels, places, draws)
            pixels, labels = self.varied(pixels, labels, places, draws)
        batch = {"pixel_values": (pixels - self.mean) / self.deviation, "labels": labels}
        return batch | ({"row": torch.tensor([feature["row"] for feature in features])} if is_scored else {})

    def labels(self, features: list[dict[str, Any]]) -> Any:
        """What is to be predicted for some images."""
        raise NotImplementedError

    def varied(
        self, pixels: torch.Tensor, labels: Any, places: list[Place], draws: list[random.Random]
    ) -> tuple[torch.Tensor, Any]:
        """Varied images with the labels that they have then."""
        return pixels, labels


class ClassCollator(ImageCollator):
    """Images with a class each, or with mixup [B, N] shares of classes."""

    def __init__(self, *args: Any, num_labels: int) -> None:
        super().__init__(*args)
        self.num_labels = num_labels

    def labels(self, features: list[dict[str, Any]]) -> torch.Tensor:
        return torch.tensor([feature["labels"] for feature in features])

    def varied(
        self, pixels: torch.Tensor, labels: Any, places: list[Place], draws: list[random.Random]
    ) -> tuple[torch.Tensor, Any]:
        """Each image blended with the one before it in the batch, and their labels (mixup, arXiv 1710.09412)."""
        alpha = self.amounts.get("mixup")
        if not alpha:
            return pixels, labels
        shares = torch.tensor([draw.betavariate(alpha, alpha) for draw in draws])
        own = F.one_hot(labels, self.num_labels).float()
        images, weights = shares[:, None, None, None], shares[:, None]
        return images * pixels + (1 - images) * pixels.roll(1, 0), weights * own + (1 - weights) * own.roll(1, 0)
