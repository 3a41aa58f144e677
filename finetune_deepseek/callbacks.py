"""Trainer callbacks of this package."""

import os
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class LossPlotCallback(TrainerCallback):
    """Draws the training and evaluation loss over the steps into loss_plot.png at the end of training."""

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            plot_losses(state.log_history, Path(args.output_dir or "") / "loss_plot.png")


def plot_losses(log_history: list[dict[str, float]], path: Path) -> None:
    """Plot `loss` and `eval_loss` of Trainer's log history (nats per target token) as a PNG."""
    # The figure's own canvas needs no display and leaves matplotlib's global state alone.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="loss (nats per target token)")
    for key, label, marker in (("loss", "training", None), ("eval_loss", "validation", "o")):
        points = [(entry["step"], entry[key]) for entry in log_history if key in entry]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, marker=marker)
    if axes.lines:
        axes.legend()
    axes.grid(alpha=0.3)
    beside = path.with_name(f".{path.name}.saving")
    try:
        FigureCanvasAgg(figure).print_png(str(beside))
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
