"""Trainer callbacks of this package."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.utils import logging

from .batches import ResumableStream

BAR = "{desc} {percentage:3.0f}% |{bar:30}| {n_fmt} of {total_fmt} {unit} [{elapsed}<{remaining}{postfix}]"


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


class Progress(TrainerCallback):
    """One bar for training, by steps or by time, and one for each split that is scored; in lines, up to ten losses and
    every evaluation. All losses are in trainer_state.json and in the plot."""

    def __init__(self, minutes: float | None) -> None:
        self.seconds = None if minutes is None else 60 * minutes
        self.training: Any = None
        self.scoring: Any = None
        self.begun = 0.0
        self.next_line = 0.0  # of 1

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.begun, total = time.monotonic(), self.seconds or state.max_steps
        unit = "steps" if self.seconds is None else "seconds"
        self.training = self._bar(args, state, total=round(total) or 1, desc="training", unit=unit)

    def _bar(self, args: Any, state: TrainerState, **settings: Any) -> Any:
        is_hidden = args.disable_tqdm or not state.is_world_process_zero
        return tqdm(disable=is_hidden, dynamic_ncols=True, bar_format=BAR, **settings)

    def _share(self, state: TrainerState) -> float:
        """Of training, how much is done: from 0 to 1."""
        if self.seconds is None:
            return state.global_step / state.max_steps
        return min(1.0, (time.monotonic() - self.begun) / self.seconds)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not self.training.disable:
            self.training.update(round(self._share(state) * self.training.total) - self.training.n)

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.training.close()
        self.training = None

    def on_prediction_step(
        self, args: Any, state: TrainerState, control: TrainerControl, eval_dataloader: Any = None, **kwargs: Any
    ) -> None:
        if self.scoring is None:
            is_last = self.training is None
            self.scoring = self._bar(
                args, state, total=len(eval_dataloader), desc="scoring", unit="batches", leave=is_last
            )
        self.scoring.update()

    def on_evaluate(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.scoring is not None:
            self.scoring.close()
        self.scoring = None

    def on_predict(self, args: Any, state: TrainerState, control: TrainerControl, *rest: Any, **kwargs: Any) -> None:
        self.on_evaluate(args, state, control)

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or self.training is None or "train_runtime" in logs:
            return
        if "loss" in logs:
            self.training.set_postfix_str(f"loss {logs['loss']:.4g}", refresh=False)
            if self._share(state) < self.next_line:
                return
            self.next_line = self._share(state) + 0.1
        tqdm.write(f"step {state.global_step:,}: {in_words(logs)}")


def in_words(logs: dict[str, Any]) -> str:
    """The numbers of a log entry but those on its speed."""
    shown = {name: value for name, value in logs.items() if isinstance(value, (int, float))}
    hidden = ("epoch", "_runtime", "_per_second", "_preparation_time", "total_flos")
    return ", ".join(
        f"{name.replace('_', ' ')} {value:.4g}" for name, value in shown.items() if not name.endswith(hidden)
    )


def kept_state(callback: TrainerCallback, state: TrainerState) -> dict[str, Any]:
    """What a callback's `state` was when the checkpoint was saved that a run goes on from; else nothing.

    transformers gives it back only if asked to, and to a new object, which nobody else knows.
    """
    found: Any = state.stateful_callbacks or {}
    kept = found.get(type(callback).__name__, {}) if state.global_step else {}
    return kept.get("attributes", {})


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
        self.elapsed = kept_state(self, state).get("elapsed", self.elapsed)
        self.last = time.monotonic()

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._count()
        if args.world_size > 1:
            elapsed = torch.tensor(self.elapsed, device=args.device)
            torch.distributed.broadcast(elapsed, src=0)
            self.elapsed = elapsed.item()
        if self.share >= 1:
            control.should_training_stop = True


class StreamPosition(TrainerCallback, ExportableState):
    """Keeps in each checkpoint where the training stream is, and lets a resumed run go on there."""

    def __init__(self, stream: ResumableStream | None = None, rows_per_step: int = 0) -> None:
        self.stream, self.rows_per_step, self.rows = stream, rows_per_step, 0

    def state(self) -> dict[str, Any]:
        position = self.stream.position(self.rows) if self.stream else {}
        return {"args": {}, "attributes": {"rows": self.rows, "position": position}}

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        kept = kept_state(self, state)
        if self.stream and kept:
            self.rows = kept["rows"]  # whatever a step had then
            self.stream.go_on(kept["position"])

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.rows += self.rows_per_step


@contextmanager
def without_bars() -> Iterator[None]:
    """transformers' bars switched off: each save would draw one."""
    were_shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if were_shown:
            logging.enable_progress_bar()


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
