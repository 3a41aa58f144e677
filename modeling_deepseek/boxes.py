"""Boxes of objects: how much two overlap, and which of several on one object is kept.

Boxes are centre x, centre y, width, height, or their corners left, top, right, bottom, in any unit. Letters: B images,
S boxes of an image, N labels.
"""

import torch


def corners_of(boxes: torch.Tensor) -> torch.Tensor:
    """[..., 4], (cx, cy, w, h) -> (x0, y0, x1, y1)."""
    centre, size = boxes[..., :2], boxes[..., 2:]
    return torch.cat((centre - size / 2, centre + size / 2), dim=-1)


def area_of(corners: torch.Tensor) -> torch.Tensor:
    """[..., 4] -> [...]."""
    return (corners[..., 2:] - corners[..., :2]).clamp(min=0).prod(-1)


def overlap(one: torch.Tensor, other: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Intersection over union, and the union, of corners whose leading axes broadcast: [..., 4] -> [...] twice."""
    shared = torch.cat((torch.maximum(one, other)[..., :2], torch.minimum(one, other)[..., 2:]), dim=-1)
    both = area_of(shared)
    union = area_of(one) + area_of(other) - both
    return both / union.clamp(min=torch.finfo(union.dtype).tiny), union


def generalized_overlap(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """GIoU (arXiv 1902.09630): the overlap less the share of the smallest box around both that neither covers; from -1
    to 1, and with a slope where boxes don't touch. [..., 4] corners -> [...]."""
    found, union = overlap(one, other)
    around = torch.cat((torch.minimum(one, other)[..., :2], torch.maximum(one, other)[..., 2:]), dim=-1)
    area = area_of(around)
    return found - (area - union) / area.clamp(min=torch.finfo(area.dtype).tiny)


def pairwise(one: torch.Tensor, other: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of [..., S, 4] and [..., T, 4] that broadcast to [..., S, T, 4]."""
    return one.unsqueeze(-2), other.unsqueeze(-3)


def suppressed(corners: torch.Tensor, scores: torch.Tensor, labels: torch.Tensor, threshold: float) -> torch.Tensor:
    """Non-maximum suppression: which boxes overlap a better one of their label, that is itself kept, by more than a
    threshold. The first of equal scores is the better one.

    Each round decides at least the best box that isn't decided yet, so that the result is that of going through the
    boxes one by one (Cluster-NMS, arXiv 2005.03572).

    Args:
        corners: [B, S, 4]; scores, labels: [B, S].

    Returns:
        [B, S] booleans.
    """
    order = scores.argsort(dim=-1, descending=True, stable=True)  # [B, S]
    sorted_corners = corners.gather(1, order[..., None].expand_as(corners)).float()
    sorted_labels = labels.gather(1, order)
    is_near = overlap(*pairwise(sorted_corners, sorted_corners))[0] > threshold
    is_near &= sorted_labels[:, :, None] == sorted_labels[:, None, :]
    is_near = is_near.triu(diagonal=1)  # [B, better, worse]
    dropped = torch.zeros_like(sorted_labels, dtype=torch.bool)
    for _ in range(scores.shape[1]):
        again = (is_near & ~dropped[:, :, None]).any(1)
        if torch.equal(again, dropped):
            break
        dropped = again
    return torch.zeros_like(dropped).scatter(1, order, dropped)
