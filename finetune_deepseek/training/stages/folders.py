"""Where a run writes: a folder that it may use, and whose results are in it."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...data.files import read_json

if TYPE_CHECKING:  # it brings torch, which takes seconds; a verb asks here before all paths are known to be there
    from ..trainer_arguments import Stage, TrainingArguments

RESULTS_FILE = "all_results.json"
SCORED = "scored_model"  # in the results of a run without training: which model they are of
WEIGHTS = "scored_weights"  # and which state of it, for a model is trained again in its folder


def check_output_dir(training: "TrainingArguments") -> None:
    """Say in one line why the output folder can't be used; makes nothing.

    Raises:
        ValueError: if the path is a file or can't be written, or if it holds checkpoints of an earlier run that is
            neither resumed nor overwritten (Trainer would mix up the two runs' checkpoints).
    """
    folder = Path(training.output_dir or "")
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise ValueError(f"--output_dir {folder}: can't make this folder ({there} is a file); name another.")
    if not os.access(there, os.W_OK):
        raise ValueError(f"--output_dir {folder}: no right to write there; name another.")
    is_new = training.do_train and not training.resume_from_checkpoint and not training.overwrite_output_dir
    if is_new and any(folder.glob("checkpoint-*")):
        raise ValueError(
            f"--output_dir {folder} holds checkpoints of an earlier run: add --resume_from_checkpoint true, or "
            "--overwrite_output_dir to remove them, or name another folder."
        )


def make_folder(folder: Path) -> None:
    """Make the output folder.

    Raises:
        ValueError: with the reason, if that fails.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--output_dir {folder}: can't make this folder ({error.strerror}); name another.") from error


def check_all_output_dirs(stages: "Sequence[Stage]") -> None:
    """The folders of all runs of a command, before the first of them begins: see `check_output_dir`."""
    for stage in stages:
        check_output_dir(stage.training)


def read_results(folder: Path) -> dict[str, Any]:
    """The results of a run in its folder; empty if there are none."""
    return read_json(folder / RESULTS_FILE, missing={})


def model_mark(model: str, revision: str = "main") -> str:
    """12 digits that tell a folder, wherever it is named from, or a Hub id with its revision from others."""
    name = str(Path(model).resolve()) if Path(model).is_dir() else f"{model}@{revision}"
    return hashlib.sha256(name.encode()).hexdigest()[:12]


def kept_results(folder: Path, numbers: dict[str, Any]) -> dict[str, Any]:
    """The results in the folder of a run without training, which new ones join; none if they are of earlier weights.

    Args:
        numbers: the first of the new results: `SCORED` and `WEIGHTS`, except in the model's own folder.
    """
    old = read_results(folder)
    if WEIGHTS in numbers and old.get(WEIGHTS, numbers[WEIGHTS]) != numbers[WEIGHTS]:
        print(f"{folder / RESULTS_FILE}: its scores are of the model before it was trained again, and are dropped")
        return {}
    return old


def scored_folder(verb: str, model: str, revision: str = "main") -> str:
    """Where `evaluate` and `predict` write by themselves: `runs/VERB-MODEL`, if that isn't of another model."""
    path = Path(model)
    is_checkpoint = path.name.startswith("checkpoint-") and path.parent.name
    folder = f"runs/{verb}-{f'{path.parent.name}-' if is_checkpoint else ''}{path.resolve().name}"
    mark = model_mark(model, revision)
    is_free = read_results(Path(folder)).get(SCORED, mark) == mark
    return folder if is_free else f"{folder}-{mark[:6]}"


def is_in_place(stage: "Stage") -> bool:
    """Whether the results go into the folder of the model itself."""
    return Path(stage.training.output_dir or "").resolve() == Path(stage.model.model_name_or_path or "-").resolve()


def check_scored(stage: "Stage") -> None:
    """Let no scores of one model stand among those of another.

    Raises:
        ValueError: if the output folder of a run without training holds results of another model.
    """
    model, folder = stage.model.model_name_or_path, Path(stage.training.output_dir or "")
    if stage.training.do_train or model is None or is_in_place(stage):
        return
    old = read_results(folder)
    owner = old.get(SCORED, "a trained one" if "train_loss" in old else None)
    if owner not in (None, model_mark(model, stage.model.model_revision)):
        raise ValueError(f"--output_dir {folder} holds the results of another model; name another folder.")
