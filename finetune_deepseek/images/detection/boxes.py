"""Boxes that go where their varied image goes, and batches of both."""

import math
import random
from collections.abc import Sequence
from typing import Any

import torch

from ..pixels import ImageCollator, Place

LEAST_SHARE = 0.25  # of a box's area that has to be left in the image


def placed_boxes(corners: torch.Tensor, place: Place, height: int, width: int) -> torch.Tensor:
    """[G, 4] corners in pixels -> those of the boxes around them after what `Place` does, beyond the edges too."""
    middle = torch.tensor([width / 2, height / 2])
    points = corners[:, [0, 1, 2, 1, 2, 3, 0, 3]].view(-1, 4, 2) - middle  # [G, 4 corners, x and y]
    cosine, sine = math.cos(math.radians(place.angle)), math.sin(math.radians(place.angle))
    turned = points @ torch.tensor([[cosine, -sine], [sine, cosine]])  # to the left, where y goes down
    moved = turned * place.factor + torch.tensor([place.right, place.down])
    signs = torch.tensor([-1.0 if place.is_mirrored else 1.0, -1.0 if place.is_upside_down else 1.0])
    points = moved * signs + middle
    return torch.cat((points.amin(1), points.amax(1)), dim=-1)


def within(corners: torch.Tensor, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """[G, 4] corners cut to the image, and [G] which of them are to be kept."""
    sides = torch.tensor([width, height, width, height], dtype=corners.dtype)
    cut = corners.clamp(min=0).minimum(sides)
    before = (corners[:, 2:] - corners[:, :2]).prod(-1)
    left = (cut[:, 2:] - cut[:, :2]).clamp(min=0).prod(-1)
    return cut, left > LEAST_SHARE * before


def as_labels(corners: torch.Tensor, classes: torch.Tensor, height: int, width: int) -> dict[str, torch.Tensor]:
    """Labels as transformers' detectors take them: `class_labels` [G], and `boxes` [G, 4], centre and size in shares
    of the image."""
    sides = torch.tensor([width, height, width, height], dtype=torch.float32)
    boxes = torch.cat(((corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]), dim=-1)
    return {"class_labels": classes, "boxes": boxes / sides}


class BoxCollator(ImageCollator):
    """Images with `labels`, a list of what `as_labels` gives; those that are scored with `size` [B, 2] too, height and
    width of the image before it was scaled, and `is_annotated` [B]."""

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super().__call__(features)
        width, height = self.pixels.size
        batch["labels"] = [as_labels(corners, classes, height, width) for corners, classes in batch["labels"]]
        if "row" in batch:
            batch |= {name: torch.tensor([feature[name] for feature in features]) for name in ("size", "is_annotated")}
        return batch

    def labels(self, features: list[dict[str, Any]]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Corners in pixels of the scaled image [G, 4], and classes [G]."""
        width, height = self.pixels.size
        sides = torch.tensor([width, height, width, height], dtype=torch.float32)
        return [
            (
                torch.tensor(feature["corners"], dtype=torch.float32).view(-1, 4) * sides,
                torch.tensor(feature["classes"], dtype=torch.long),
            )
            for feature in features
        ]

    def varied(
        self, pixels: torch.Tensor, labels: Any, places: list[Place], draws: Sequence[random.Random]
    ) -> tuple[torch.Tensor, Any]:
        width, height = self.pixels.size
        found = []
        for (corners, classes), place in zip(labels, places, strict=True):
            cut, is_kept = within(placed_boxes(corners, place, height, width), height, width)
            found.append((cut[is_kept], classes[is_kept]))
        return pixels, found
