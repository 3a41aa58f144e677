"""Boxes: overlaps by hand and by transformers' own, suppression and assignment against plain loops."""

import itertools

import pytest
import torch
from torch.nn import functional as F
from transformers.loss.loss_for_object_detection import generalized_box_iou

from modeling_deepseek import grid_boxes
from modeling_deepseek.boxes import corners_of, generalized_overlap, overlap, pairwise, suppressed
from modeling_deepseek.grid_boxes import assigned, grid_losses, objects_of, total


def random_boxes(*shape, seed=0, side=8.0):
    draws = torch.Generator().manual_seed(seed)
    centre = torch.rand(*shape, 2, generator=draws) * side
    return torch.cat((centre, torch.rand(*shape, 2, generator=draws) * side / 3 + 0.3), dim=-1)


def one_overlap(one, other):
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    both = max(width, 0) * max(height, 0)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)]
    return both / (sum(areas) - both)


def test_overlaps_by_hand():
    one, other = torch.tensor([0.0, 0, 2, 2]), torch.tensor([1.0, 1, 4, 3])
    assert overlap(one, other)[0].item() == pytest.approx(1 / 9)
    assert generalized_overlap(one, other).item() == pytest.approx(1 / 9 - 3 / 12)
    assert generalized_overlap(one, one + 10).item() == pytest.approx(-(144 - 8) / 144)
    assert generalized_overlap(one, one).item() == 1
    assert corners_of(torch.tensor([2.0, 3, 2, 4])).tolist() == [1, 1, 3, 5]
    nothing = torch.zeros(4)
    assert overlap(nothing, nothing)[0] == 0 and generalized_overlap(nothing, nothing).isfinite()


def test_generalized_overlaps_are_those_of_transformers():
    one, other = corners_of(random_boxes(7)), corners_of(random_boxes(5, seed=1))
    torch.testing.assert_close(generalized_overlap(*pairwise(one, other)), generalized_box_iou(one, other))


@pytest.mark.parametrize("threshold", [0.2, 0.5])
def test_suppression_is_that_of_going_through_the_boxes_one_by_one(threshold):
    corners = corners_of(random_boxes(3, 60, side=5.0))
    scores = torch.rand(3, 60, generator=torch.Generator().manual_seed(3))
    scores[:, 10:30] = 0.5  # ties: the first is the better one
    labels = torch.arange(180).view(3, 60) % 2
    found = suppressed(corners, scores, labels, threshold)
    for image in range(3):
        kept: list[int] = []
        for box in sorted(range(60), key=lambda box: -scores[image, box].item()):
            near = (one_overlap(corners[image, box].tolist(), corners[image, other].tolist()) for other in kept
                    if labels[image, box] == labels[image, other])  # fmt: skip
            if all(value <= threshold for value in near):
                kept.append(box)
        assert (~found[image]).nonzero()[:, 0].tolist() == sorted(kept)
        assert 5 < len(kept) < 60


def test_objects_of_images_are_padded_to_the_most():
    labels = [
        {"class_labels": torch.tensor([2]), "boxes": torch.tensor([[0.5, 0.5, 0.5, 0.25]])},
        {"class_labels": torch.zeros(0, dtype=torch.long), "boxes": torch.zeros(0, 4)},
    ]
    objects = objects_of(labels, torch.tensor([[8.0, 4.0], [8.0, 8.0]]))
    assert objects.corners[0].tolist() == [[2, 1.5, 6, 2.5]]
    assert objects.labels.tolist() == [[2], [0]] and objects.is_there.tolist() == [[True], [False]]


def test_cells_learn_the_nearest_of_the_objects_about_them():
    side, draws = 6, torch.Generator().manual_seed(5)
    rows, columns = torch.arange(side).repeat_interleave(side), torch.arange(side).repeat(side)
    centres = torch.stack((columns, rows), dim=-1).float()[None] + 0.5
    sizes = torch.rand(2, side**2, 2, generator=draws) * 2 + 0.5
    corners = corners_of(torch.cat((centres.expand(2, -1, -1), sizes), dim=-1))
    is_cell = torch.ones(2, side**2, dtype=torch.bool)
    is_cell[1, 24:] = False
    wanted = random_boxes(2, 5, seed=2, side=6.0)
    wanted[..., 2:] += 1
    wanted[0, 0] = torch.tensor([3.05, 2.95, 0.1, 0.1])  # between cells: its nearest one takes it
    objects = grid_boxes.Objects(
        corners_of(wanted), torch.arange(10).view(2, 5) % 3, torch.tensor([[True] * 5, [True] * 2 + [False] * 3])
    )
    found = assigned(corners, centres, is_cell, objects)
    is_contested = False
    for image in range(2):
        claims: dict[int, dict[int, float]] = {}
        for number in range(5 if image == 0 else 2):
            box, middle = objects.corners[image, number].tolist(), wanted[image, number, :2].tolist()
            away = {
                cell: [abs(a - b) for a, b in zip(centres[0, cell].tolist(), middle, strict=True)]
                for cell in range(side**2)
                if is_cell[image, cell]
            }
            nearest = min(away, key=lambda cell: sum(side**2 for side in away[cell]))
            half = [(box[2] - box[0]) / 2, (box[3] - box[1]) / 2]
            for cell, (x, y) in away.items():
                if cell == nearest or max(x, y) <= 1 and x < half[0] and y < half[1]:
                    claims.setdefault(cell, {})[number] = x**2 + y**2
        assert found.has_object[image].nonzero()[:, 0].tolist() == sorted(claims)
        for cell, distances in claims.items():
            number = min(distances, key=distances.__getitem__)
            assert found.labels[image, cell] == objects.labels[image, number]
            assert torch.equal(found.corners[image, cell], objects.corners[image, number])
            expected = one_overlap(objects.corners[image, number].tolist(), corners[image, cell].tolist())
            assert found.overlaps[image, cell].item() == pytest.approx(expected, abs=1e-6)
        assert (found.overlaps[image][~found.has_object[image]] == 0).all()
        is_contested |= any(len(one) > 1 for one in claims.values())
    assert found.has_object[0].sum() > 8 and is_contested


def test_the_losses_are_those_written_here():
    draws = torch.Generator().manual_seed(0)
    objectness, classes = torch.randn(1, 3, generator=draws), torch.randn(1, 3, 2, generator=draws)
    corners, is_cell = corners_of(random_boxes(1, 3)), torch.tensor([[True, True, False]])
    targets = grid_boxes.Targets(
        corners_of(random_boxes(1, 3, seed=4)),
        torch.tensor([[1, 0, 0]]),
        torch.tensor([[True, False, False]]),
        torch.tensor([[0.7, 0.0, 0.0]]),
    )
    losses = grid_losses(objectness, classes, corners, is_cell, targets, torch.tensor(2))
    chance = objectness.sigmoid()[0]
    expected = -((chance[0] - 0.7) ** 2) * (0.7 * chance[0].log() + 0.3 * (1 - chance[0]).log())
    expected -= chance[1] ** 2 * (1 - chance[1]).log()
    torch.testing.assert_close(losses["loss_object"], expected / 2)
    torch.testing.assert_close(losses["loss_class"], -F.log_softmax(classes[0, 0], dim=-1)[1] / 2)
    fit = generalized_box_iou(corners[0, :1], targets.corners[0, :1])[0, 0]
    torch.testing.assert_close(losses["loss_giou"], (1 - fit) / 2)
    parts = (losses[name] * grid_boxes.LOSS_WEIGHTS[name] for name in losses)
    torch.testing.assert_close(total(losses), sum(itertools.islice(parts, 3)))
