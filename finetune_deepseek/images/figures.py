"""Pictures of how an image classifier errs: the confusion matrix, and the images that it got most wrong."""

import io
from collections.abc import Mapping
from typing import Any

import numpy as np
from sklearn.metrics import ConfusionMatrixDisplay

from ..training.callbacks import new_figure

SHOWN = 24
COLUMNS = 6
MOST_CLASSES = 40  # that a matrix shows with numbers and names


def png(figure: Any) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    file = io.BytesIO()
    FigureCanvasAgg(figure).print_png(file)
    return file.getvalue()


def confusion_matrix(targets: list[str], predictions: list[str], labels: list[str]) -> bytes:
    """Rows are the labels, columns what was predicted."""
    is_small = len(labels) <= MOST_CLASSES
    figure = new_figure(height=6.5)
    axes = figure.add_subplot()
    ConfusionMatrixDisplay.from_predictions(
        targets,
        predictions,
        labels=labels,
        ax=axes,
        include_values=is_small,
        colorbar=False,
        xticks_rotation="vertical",
    )
    if not is_small:
        axes.set_xticks([])
        axes.set_yticks([])
    return png(figure)


def worst_images(order: list[int], images: Mapping[int, Any], titles: list[str]) -> bytes:
    """The images of those numbers, the worst first, each below its title."""
    shown = order[:SHOWN]
    lines = -(-len(shown) // COLUMNS)
    figure = new_figure(height=1.4 * lines)
    for axes, number in zip(figure.subplots(lines, COLUMNS, squeeze=False).flat, shown, strict=False):
        axes.imshow(np.array(images[number]))
        axes.set_title(titles[number], fontsize=7)
    for axes in figure.axes:
        axes.set_axis_off()
    return png(figure)
