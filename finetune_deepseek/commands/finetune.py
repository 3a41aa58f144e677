"""`deepseek-hf finetune`, `evaluate` and `predict`: the runs of a task, whole or only its scores."""

import argparse
import importlib
from collections.abc import Sequence
from typing import Any

from .. import TASKS
from ..data.words import nearest_match


def task_class(name: str) -> Any:
    """The class of the task of that name.

    Raises:
        ValueError: if there is none.
    """
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}{nearest_match(name, TASKS)}; there is {', '.join(TASKS)}.")
    module, _, class_name = TASKS[name].partition(":")
    return getattr(importlib.import_module(module), class_name)


def finetune(argv: Sequence[str]) -> None:
    """Run the task that `argv` begins with.

    Raises:
        ValueError: with one line, for bad input.
    """
    task = task_class(argv[0])
    # Imported here, since torch and transformers take seconds and a wrong name needs neither.
    from ..training.parsing import parse_command
    from ..training.run import run_stages

    run_stages(task, parse_command(task.name, task.arguments_class, argv[1:], task.recipe, task.examples))


def score(verb: str, flag: str, argv: Sequence[str]) -> None:
    """`finetune` without training, on the saved model that follows the task in `argv`.

    Args:
        verb: names the default of --output_dir.
        flag: do_eval or do_predict.

    Raises:
        ValueError: with one line, for bad input.
    """
    if set(argv) & {"-h", "--help", "--help_all"}:
        return finetune(argv)
    task = task_class(argv[0])
    from ..training.model_card import run_settings
    from ..training.parsing import parse_command
    from ..training.run import run_stages
    from ..training.stages.folders import scored_folder

    if len(argv) < 2 or argv[1].startswith("-"):
        raise ValueError(f"{verb} {task.name}: name the model next: a folder or a Hub id.")
    model, rest = argv[1], list(argv[2:])
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--model_revision", default="main")
    revision = parser.parse_known_args(rest)[0].model_revision
    defaults = {"output_dir": scored_folder(verb, model, revision)} | run_settings(model, revision, task.name)
    rest += [f"--model_name_or_path={model}", "--do_train=False", f"--{flag}=True"]
    run_stages(task, parse_command(task.name, task.arguments_class, rest, defaults=defaults))
