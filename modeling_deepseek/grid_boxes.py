"""A box for each cell of the token grid: which cells learn which object, and the losses of that.

A cell says whether it has an object, which, and the box. An object is learned by the cells about its middle (centre
sampling, FCOS, arXiv 1904.01355, section 3.2), and as the chance of an object a cell learns how much its box overlaps
it so far (quality focal loss, arXiv 2006.04388), so that of several boxes on one object the best is kept when
overlapping ones are suppressed.

Letters: B images, S cells, G objects of an image, N labels. Boxes are corners in cells, unless said otherwise.
"""

from typing import NamedTuple

import torch
from torch.nn import functional as F

from .boxes import corners_of, generalized_overlap, overlap, pairwise

REACH = 1.0  # cells across and down, from an object's middle to that of a cell that learns it
LOSS_WEIGHTS = {"loss_object": 0.25, "loss_class": 0.25, "loss_giou": 0.5}  # about four cells learn an object


class Objects(NamedTuple):
    """What there is in a batch's images.

    Attributes:
        corners: [B, G, 4].
        labels: [B, G] class numbers.
        is_there: [B, G] booleans, false where an image has less objects than others.
    """

    corners: torch.Tensor
    labels: torch.Tensor
    is_there: torch.Tensor


class Targets(NamedTuple):
    """What each cell learns.

    Attributes:
        corners: [B, S, 4] of its object, without meaning where it has none.
        labels: [B, S].
        has_object: [B, S] booleans.
        overlaps: [B, S], of its box with the object; 0 where it has none.
    """

    corners: torch.Tensor
    labels: torch.Tensor
    has_object: torch.Tensor
    overlaps: torch.Tensor


def objects_of(labels: list[dict[str, torch.Tensor]], cells: torch.Tensor) -> Objects:
    """The objects of labels as transformers' detectors take them, `class_labels` [G] and `boxes` [G, 4], centre and
    size in shares of the image.

    Args:
        cells: [B, 2], width and height of each image in cells.
    """
    device = cells.device
    counts = torch.tensor([len(one["class_labels"]) for one in labels], device=device)
    most = max(1, *(len(one["class_labels"]) for one in labels))
    boxes = torch.zeros(len(labels), most, 4, device=device)
    classes = torch.zeros(len(labels), most, dtype=torch.long, device=device)
    for row, one in enumerate(labels):
        count = len(one["class_labels"])
        boxes[row, :count], classes[row, :count] = one["boxes"].to(boxes), one["class_labels"].to(classes)
    is_there = torch.arange(most, device=device) < counts[:, None]
    return Objects(corners_of(boxes * cells.repeat(1, 2)[:, None]), classes, is_there)


@torch.no_grad()
def assigned(corners: torch.Tensor, centres: torch.Tensor, is_cell: torch.Tensor, objects: Objects) -> Targets:
    """What each cell learns: of the objects that are near enough, the one whose middle is nearest.

    Args:
        corners: [B, S, 4] that it predicts.
        centres: [1 or B, S, 2], x and y of the cells' middles; is_cell: [B, S], false at padding.
    """
    wanted, cells = pairwise(objects.corners, centres)  # [B, G, 1, 4], [B, 1, S, 2]
    inside = ((cells > wanted[..., :2]) & (cells < wanted[..., 2:])).all(-1)
    away = (cells - (wanted[..., :2] + wanted[..., 2:]) / 2).abs()  # [B, G, S, 2]
    distance = away.square().sum(-1).masked_fill(~is_cell[:, None], torch.inf)
    nearest = torch.zeros_like(inside).scatter(2, distance.argmin(-1, keepdim=True), True)  # of objects between cells
    takes = (inside & (away <= REACH).all(-1) | nearest) & is_cell[:, None] & objects.is_there[..., None]
    owner = distance.masked_fill(~takes, torch.inf).argmin(1)  # [B, S]
    found = objects.corners.gather(1, owner[..., None].expand(-1, -1, 4))
    has_object = takes.any(1)
    overlaps = overlap(corners, found)[0].masked_fill(~has_object, 0.0)
    return Targets(found, objects.labels.gather(1, owner), has_object, overlaps)


def grid_losses(
    objectness: torch.Tensor,
    classes: torch.Tensor,
    corners: torch.Tensor,
    is_cell: torch.Tensor,
    targets: Targets,
    num_objects: torch.Tensor,
) -> dict[str, torch.Tensor]:
    """Sums over the cells, divided by the number of objects.

    Args:
        objectness: [B, S] and classes: [B, S, N], logits; corners: [B, S, 4].
    """
    missed = (objectness.sigmoid() - targets.overlaps).square()
    object_loss = missed * F.binary_cross_entropy_with_logits(objectness, targets.overlaps, reduction="none")
    class_loss = F.cross_entropy(classes.transpose(1, 2), targets.labels, reduction="none")
    box_loss = 1 - generalized_overlap(corners, targets.corners)
    sums = {
        "loss_object": object_loss * is_cell,
        "loss_class": class_loss * targets.has_object,
        "loss_giou": box_loss * targets.has_object,
    }
    return {name: loss.sum() / num_objects.clamp(min=1) for name, loss in sums.items()}


def total(losses: dict[str, torch.Tensor]) -> torch.Tensor:
    """The weighted sum that is trained."""
    return torch.stack([LOSS_WEIGHTS[name] * loss for name, loss in losses.items()]).sum()
