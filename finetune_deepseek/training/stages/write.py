"""Fifth stage: what was measured goes into the run's folder at once, before anything more is measured or shown."""

import time
from pathlib import Path
from typing import Any

from ...data.fault_report import report_markdown
from ...data.files import finite, json_line, write_bytes, write_json, write_text
from .. import model_card
from ..identity import identity
from ..task import Scores
from .build import Built
from .folders import RESULTS_FILE, SCORED, WEIGHTS, is_in_place, kept_results, model_mark, read_results
from .prepare import Prepared

PARTS = ("train", "eval", "test")
PREDICTIONS_FILE = "generated_predictions.jsonl"


class Results:
    """All that a run has measured so far; `add` writes it: files, predictions, NAME_results.json, all, the card."""

    def __init__(self, prepared: Prepared, built: Built) -> None:
        self.prepared, self.built, self.folder = prepared, built, prepared.folder
        self.is_writer = built.trainer.is_world_process_zero()
        self.numbers: dict[str, Any] = dict(built.sizes)
        if prepared.saved and not prepared.args.do_train and not is_in_place(prepared.stage):
            self.numbers[SCORED] = model_mark(prepared.saved.name, prepared.stage.model.model_revision)
            self.numbers[WEIGHTS] = identity(prepared.saved)[:12]
        self.old = {} if prepared.args.do_train else kept_results(self.folder, self.numbers)
        self.is_anew = not self.old and bool(read_results(self.folder))
        self.parts: dict[str, dict[str, Any]] = {}
        self.lines: list[dict[str, Any]] = []
        self.texts: list[str] = []
        self.faults: list[str] = []

    def add(self, part: str | None, scores: Scores) -> None:
        """Take a part of what was measured; those of one name share a file, those of none are in all results only."""
        self.lines += scores.lines
        self.texts += filter(None, [scores.text])
        self.faults += filter(None, [scores.fault])
        found = finite(scores.numbers)
        self.numbers |= found
        self.numbers["wall_time_seconds"] = round(time.monotonic() - self.prepared.started, 1)
        if part:
            self.parts.setdefault(part, {}).update(found)
        if self.is_writer:
            self._write(part, scores)

    def _write(self, part: str | None, scores: Scores) -> None:
        if self.is_anew:
            self._remove_others()
        if part:
            write_json(self.folder / f"{part}_results.json", self.parts[part])
        write_json(self.folder / RESULTS_FILE, self.old | self.numbers)
        if scores.lines:
            write_text(self.folder / PREDICTIONS_FILE, "".join(map(json_line, scores.lines)))
        for name, content in scores.files.items():
            write_bytes(self.folder / name, content if isinstance(content, bytes) else content.encode("utf-8"))
        self.write_card(self.folder)

    def _remove_others(self) -> None:
        """Scores and predictions of the weights that were there before."""
        others = {f"{part}_results.json" for part in PARTS if part not in self.parts}
        for name in others | (set() if self.lines else {PREDICTIONS_FILE}):
            (self.folder / name).unlink(missing_ok=True)

    def write_card(self, folder: Path) -> None:
        """README.md, from what is known so far."""
        task = self.prepared.task
        card = task.card_data() | {"data_checks": report_markdown(self.built.data_report, task.fault_names)}
        stage, splits = self.prepared.stage, self.prepared.splits
        model_card.write(card, stage, self.built.model, self.numbers, splits, folder, write_text)
