"""Trainer callbacks of this package."""

import os
import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState


class PlotCallback(TrainerCallback):
    """At the end of training, draws the losses over the steps into loss_plot.png, and the scores of the evaluations
    during training, if there were any, into metric_plot.png."""

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            folder = Path(args.output_dir or "")
            plot_losses(state.log_history, folder / "loss_plot.png")
            plot_metrics(state.log_history, folder / "metric_plot.png")


class EpochCallback(TrainerCallback):
    """Says to all that draw rows which epoch begins; a resumed one too, whose loader is another by then."""

    def __init__(self, *parts: Any) -> None:
        self.parts = list(parts)

    def on_epoch_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        for part in self.parts:
            if hasattr(part, "set_epoch"):
                part.set_epoch(int(state.epoch or 0))


class TimeLimitCallback(TrainerCallback, ExportableState):
    """Ends training after so many minutes of it, evaluations and saving included; a resumed run goes on counting.

    Of several processes the first one's clock counts: they must agree on the last step, and on the learning rate.
    """

    def __init__(self, minutes: float, elapsed: float = 0.0) -> None:
        self.minutes, self.elapsed = minutes, elapsed
        self.last = time.monotonic()

    def state(self) -> dict[str, Any]:
        self._count()
        return {"args": {"minutes": self.minutes}, "attributes": {"elapsed": self.elapsed}}

    def _count(self) -> None:
        now = time.monotonic()
        self.elapsed, self.last = self.elapsed + now - self.last, now

    @property
    def share(self) -> float:
        """How much of the time had passed at the end of the latest step, from 0 to 1."""
        return min(1.0, self.elapsed / 60 / self.minutes)

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.last = time.monotonic()

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._count()
        if args.world_size > 1:
            elapsed = torch.tensor(self.elapsed, device=args.device)
            torch.distributed.broadcast(elapsed, src=0)
            self.elapsed = elapsed.item()
        if self.share >= 1:
            control.should_training_stop = True


def plot_losses(log_history: list[dict[str, float]], path: Path) -> None:
    """Plot `loss` and `eval_loss` of Trainer's log history as a PNG."""
    figure = new_figure(height=4)
    axes = figure.add_subplot(xlabel="step", ylabel="loss")
    for key, label, marker in (("loss", "training", None), ("eval_loss", "validation", "o")):
        points = [(entry["step"], entry[key]) for entry in log_history if key in entry]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, marker=marker)
    if axes.lines:
        axes.legend()
    axes.grid(alpha=0.3)
    save_figure(figure, path)


def plot_metrics(log_history: list[dict[str, float]], path: Path) -> None:
    """Plot each score of the evaluations in Trainer's log history, below each other, as a PNG; without evaluations
    there is no file."""
    no_scores = ("eval_loss", "eval_runtime", "_per_second", "_preparation_time")
    keys = dict.fromkeys(key for entry in log_history for key in entry)
    names = [key for key in keys if key.startswith("eval_") and not key.endswith(no_scores)]
    if not names:
        return
    figure = new_figure(height=2 * len(names) + 0.5)
    for axes, name in zip(figure.subplots(len(names), sharex=True, squeeze=False)[:, 0], names, strict=True):
        points = [(entry["step"], entry[name]) for entry in log_history if name in entry]
        axes.plot(*zip(*points, strict=True), marker="o")
        axes.set_ylabel(name.removeprefix("eval_"))
        axes.grid(alpha=0.3)
    axes.set_xlabel("step")
    save_figure(figure, path)


def new_figure(height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(7, height), layout="constrained")


def save_figure(figure: Any, path: Path) -> None:
    # The figure's own canvas needs no display and leaves matplotlib's global state alone.
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    beside = path.with_name(f".{path.name}.saving")
    try:
        FigureCanvasAgg(figure).print_png(str(beside))
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
