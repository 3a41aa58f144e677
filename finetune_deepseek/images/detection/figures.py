"""Predictions drawn onto their images, with the objects that there are."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.patches import Rectangle

from ...training.callbacks import new_figure
from ..figures import png

SHOWN = 12
COLUMNS = 3
LEAST_SCORE = 0.4  # of a prediction that is drawn


def drawn(
    images: Mapping[int, Any], predictions: Sequence[Any], targets: Sequence[Any], labels: Sequence[str]
) -> bytes:
    """Some images: predicted boxes in a colour for each label with their scores, the objects dashed."""
    numbers = list(images)[:SHOWN]
    lines = -(-len(numbers) // COLUMNS)
    figure = new_figure(height=1.9 * lines)
    colours = {label: f"C{number % 10}" for number, label in enumerate(labels)}
    for axes, number in zip(figure.subplots(lines, COLUMNS, squeeze=False).flat, numbers, strict=False):
        axes.imshow(np.array(images[number]))
        for one in targets[number]:
            _draw(axes, one["bbox"], "black", linestyle=":", linewidth=0.8)
        for one in (one for one in predictions[number] if one["score"] >= LEAST_SCORE):
            _draw(axes, one["bbox"], colours[one["category"]], linewidth=1.0)
            x, y = one["bbox"][:2]
            axes.text(x, y, f"{one['category']} {one['score']:.2f}", fontsize=3.5, color=colours[one["category"]])
    for axes in figure.axes:
        axes.set_axis_off()
    return png(figure)


def _draw(axes: Any, bbox: Sequence[float], colour: str, **style: Any) -> None:
    axes.add_patch(Rectangle((bbox[0], bbox[1]), bbox[2], bbox[3], fill=False, edgecolor=colour, **style))
