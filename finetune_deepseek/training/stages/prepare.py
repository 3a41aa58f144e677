"""First stage: what was asked for, checked as far as that goes without a model."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from transformers import set_seed

from ...data.hub import check_named
from ...data.sources import Rows
from ...data.table import read_columns
from ..loading import parse_overrides, preset_config
from ..saved import Saved, check_place
from ..task import Task, prefixed
from ..trainer_arguments import Stage, TrainingArguments
from .folders import check_output_dir, check_scored, make_folder
from .resume import find_checkpoint


@dataclass(frozen=True)
class Prepared:
    """What all later stages go by.

    Attributes:
        splits: the text rows of each split that there is.
        saved: the model or adapter that the run begins with, if one is named.
        checkpoint: the folder that training resumes from.
        off_rows: rows with `prompt` and `prediction` of the base model, for --adapter_off_check.
        started: seconds of `time.monotonic`.
    """

    stage: Stage
    task: Task
    splits: dict[str, Rows]
    saved: Saved | None
    checkpoint: str | None
    off_rows: list[dict[str, Any]]
    started: float

    @property
    def args(self) -> TrainingArguments:
        return self.stage.training

    @property
    def folder(self) -> Path:
        return Path(self.args.output_dir or "")

    def count(self, split: str, prefix: str | None = None) -> dict[str, int]:
        """The number of a split's rows as a result, and what else the task counts; no number for a stream."""
        rows, prefix = self.splits[split], prefix or split
        size = {f"{prefix}_samples": len(rows)} if isinstance(rows, Dataset) else {}
        return size | prefixed(prefix, dict(self.task.counts.get(split, {})))


def prepare(task_class: type[Task], stage: Stage) -> Prepared:
    """Read the data, and refuse whatever can't work before anything is built.

    Raises:
        ValueError: with one line, for what is wrong in the arguments or the data.
    """
    started, args = time.monotonic(), stage.training
    check_model_named(stage)
    set_seed(args.seed)
    if args.cpu_threads:
        torch.set_num_threads(args.cpu_threads)
    off_rows = read_off_rows(Path(stage.lora.adapter_off_check)) if stage.lora.adapter_off_check else []
    task = task_class(stage.data, args.seed)
    splits = task.load_splits()
    choose_work(stage, splits)
    saved = check_saved(stage, task)
    check_output_dir(args)  # again, now that what is to be done is known
    check_scored(stage)
    make_folder(Path(args.output_dir or ""))
    checkpoint = find_checkpoint(args.resume_from_checkpoint if args.do_train else None, Path(args.output_dir or ""))
    return Prepared(stage, task, splits, saved, checkpoint, off_rows, started)


def check_saved(stage: Stage, task: Task) -> Saved | None:
    """The model or adapter that is named, if it is for this task, and what is trained has a folder of its own.

    Raises:
        ValueError: for one that isn't.
    """
    saved = stage.model.saved.require_model() if stage.model.model_name_or_path else None
    if saved:
        task.check_saved(saved, stage.training.do_train)
    if stage.training.do_train:
        is_adapter = stage.lora.use_peft or (saved is not None and saved.is_adapter)
        check_place(Path(stage.training.output_dir or ""), is_adapter)
    return saved


def check_model_named(stage: Stage) -> None:
    """A wrong name of a model, or a wrong field of a preset, should not wait for the data."""
    if stage.model.preset:
        preset_config(stage.model.preset, stage.data.config_defaults, parse_overrides(stage.model.config_overrides))
    for flag in ("model_name_or_path", "config_name", "tokenizer_name"):
        if name := getattr(stage.model, flag):
            check_named(flag, name)


def choose_work(stage: Stage, splits: dict[str, Rows]) -> None:
    """Set do_train, do_eval, do_predict: as given, or everything that there is data for.

    Raises:
        ValueError: if data is missing for what was asked.
    """
    args = stage.training
    needs = {"do_train": "train", "do_eval": "validation", "do_predict": "test"}
    if not stage.given & set(needs):
        for flag, split in needs.items():
            setattr(args, flag, split in splits)
    for flag, split in needs.items():
        if getattr(args, flag) and split not in splits:
            raise ValueError(f"--{flag}: there is no {split} data, only {', '.join(splits)}; add --{split}_file.")
    budget = " or --tokens_budget" if hasattr(stage.data, "tokens_budget") else ""
    has_end = args.max_steps > 0 or getattr(stage.data, "tokens_budget", None)
    if args.do_train and isinstance(splits["train"], IterableDataset) and not has_end:
        raise ValueError(f"--streaming: the length of a stream is unknown, so give --max_steps{budget}.")
    if isinstance(splits.get("train"), IterableDataset):
        args.train_sampling_strategy = "random"  # a stream is read in its own, buffered order


def read_off_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of --adapter_off_check.

    Raises:
        ValueError: if the file can't be read, or a row lacks prompt or prediction.
    """
    try:
        columns = read_columns(str(path))
        cells = zip(columns["prompt"], columns["prediction"], *columns.values(), strict=True)
        return [dict(zip(("prompt", "prediction", *columns), row, strict=True)) for row in cells]
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"--adapter_off_check {path}: expected lines with `prompt` and `prediction` ({error!r})."
        ) from error
