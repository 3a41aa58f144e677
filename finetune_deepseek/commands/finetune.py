"""`deepseek-hf finetune`, `evaluate` and `predict`: the runs of a task, whole or only its scores.

Flags and paths are checked before the task is imported, since torch and transformers take seconds.
"""

import argparse
import importlib
from collections.abc import Sequence
from typing import Any

from .. import TASKS
from ..data.hub import check_named, check_source
from ..data.words import nearest_match


def task_class(name: str) -> Any:
    """The class of the task of that name.

    Raises:
        ValueError: if there is none.
    """
    return _named(name, "task")


def task_flags(name: str) -> Any:
    """The dataclass of a task's flags; it imports nothing heavy.

    Raises:
        ValueError: if there is no such task.
    """
    return _named(name, "flags")


def _named(name: str, which: str) -> Any:
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}{nearest_match(name, TASKS)}; there is {', '.join(TASKS)}.")
    module, _, class_name = getattr(TASKS[name], which).partition(":")
    return getattr(importlib.import_module(module), class_name)


def run(name: str, drafts: Sequence[Any]) -> None:
    """Do the runs that were asked for, once what they read is known to be there.

    Raises:
        ValueError: with one line, for bad input.
    """
    for draft in drafts:
        draft.data.check_paths()
    if model := drafts[0].model.model_name_or_path:  # what later runs begin with, those before may make
        check_named("model_name_or_path", model)
    from ..training.run import run_stages

    run_stages(task_class(name), [draft.stage() for draft in drafts])


def finetune(argv: Sequence[str]) -> None:
    """Run the task that `argv` begins with.

    Raises:
        ValueError: with one line, for bad input.
    """
    name, flags = argv[0], task_flags(argv[0])
    from .parsing.runs import draft_command

    run(name, draft_command(name, flags, argv[1:], flags.RECIPE))


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
    name, flags = argv[0], task_flags(argv[0])
    from .parsing.runs import ArgumentParser, draft_command

    if len(argv) < 2 or argv[1].startswith("-"):
        raise ValueError(f"{verb} {name}: name the model next: a folder or a Hub id.")
    model, rest = argv[1], list(argv[2:])
    ArgumentParser(name, flags).given_names(rest)  # refuses an unknown flag before anything is opened
    check_source(model)
    from ..training.saved import Saved
    from ..training.stages.folders import scored_folder

    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--model_revision", default="main")
    revision = parser.parse_known_args(rest)[0].model_revision
    saved = Saved.open(None, model, revision)
    defaults = {"output_dir": scored_folder(verb, model, revision)} | saved.settings_for(name, flags)
    rest += [f"--model_name_or_path={model}", "--do_train=False", f"--{flag}=True"]
    drafts = draft_command(name, flags, rest, defaults=defaults)
    for draft in drafts:
        draft.model.saved = saved
    run(name, drafts)
