"""The command line: `deepseek-hf VERB ...`, or `python -m finetune_deepseek [VERB] ...` (without a verb, finetune).

Bad input ends with one line on stderr and exit code 2. Set DEEPSEEK_HF_TRACEBACK=1 for the stack trace.
"""

import argparse
import importlib
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from . import TASKS

USAGE = f"""usage: deepseek-hf finetune TASK [config.yaml] [--flag value ...]
       deepseek-hf evaluate TASK MODEL [config.yaml] [--flag value ...]
       deepseek-hf predict TASK MODEL [config.yaml] [--flag value ...]
       deepseek-hf translate MODEL [--input FILE] [--output FILE] [--flag value ...]
       deepseek-hf answer [MODEL] --knowledge PATH [--flag value ...] "QUESTION" ...
       deepseek-hf recommend MODEL --history FILE [--output FILE] [--flag value ...]
       deepseek-hf export SRC DST --to native|bundle|gguf [--merge-adapter DIR] [--flag value ...]
       deepseek-hf inspect SRC

tasks: {", ".join(TASKS)}

  finetune    train a model or an adapter, then evaluate and predict
  evaluate    score a saved model on the validation split; its languages and prompt come from its card
  predict     the same on the test split, and write every prediction
  translate   translate the lines of a file or of standard input
  answer      answer questions from a folder or file of texts
  recommend   the best next items for the histories in a file
  export      write a checkpoint in the form that others read; deepseek-hf export --help
  inspect     say what a checkpoint is, from its headers alone

  deepseek-hf finetune translation                                 the quickstart, into runs/translation
  deepseek-hf finetune translation --help                          flags, with examples; those of evaluate and predict
  deepseek-hf predict translation runs/translation                 writes to runs/predict-translation
  echo "2 May 1987" | deepseek-hf translate runs/translation       deepseek-hf translate --help shows its flags
"""


def task_class(name: str) -> Any:
    """The class of the task of that name.

    Raises:
        ValueError: if there is none.
    """
    from .data.words import nearest_match

    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}{nearest_match(name, TASKS)}; there is {', '.join(TASKS)}.")
    module, _, class_name = TASKS[name].partition(":")
    return getattr(importlib.import_module(module), class_name)


def finetune(argv: Sequence[str]) -> None:
    """Run the task that `argv` begins with.

    Raises:
        ValueError: with one line, for bad input.
    """
    # Imported here, since torch and transformers take seconds and --help of the command needs neither.
    from .training.parsing import parse_command
    from .training.run import run_stages

    task = task_class(argv[0])
    run_stages(task, parse_command(task.name, task.arguments_class, argv[1:], task.recipe, task.examples))


def score(verb: str, flag: str, argv: Sequence[str]) -> None:
    """`finetune` without training, on the saved model that follows the task in `argv`.

    Args:
        verb: names the default of --output_dir.
        flag: do_eval or do_predict.

    Raises:
        ValueError: with one line, for bad input.
    """
    from .training.model_card import run_settings
    from .training.parsing import parse_command
    from .training.run import run_stages

    if set(argv) & {"-h", "--help", "--help_all"}:
        return finetune(argv)
    task = task_class(argv[0])
    if len(argv) < 2 or argv[1].startswith("-"):
        raise ValueError(f"{verb} {task.name}: name the model next: a folder or a Hub id.")
    model, rest = argv[1], list(argv[2:])
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--model_revision", default="main")
    revision = parser.parse_known_args(rest)[0].model_revision
    defaults = {"output_dir": f"runs/{verb}-{Path(model).name}"} | run_settings(model, revision, task.name)
    rest += [f"--model_name_or_path={model}", "--do_train=False", f"--{flag}=True"]
    run_stages(task, parse_command(task.name, task.arguments_class, rest, defaults=defaults))


def evaluate(argv: Sequence[str]) -> None:
    """Score a saved model on the validation split."""
    score("evaluate", "do_eval", argv)


def predict(argv: Sequence[str]) -> None:
    """Score a saved model on the test split, and write its predictions."""
    score("predict", "do_predict", argv)


def translate(argv: Sequence[str]) -> None:
    """Translate lines of text."""
    from .commands.translate import translate

    translate(argv)


def answer(argv: Sequence[str]) -> None:
    """Answer questions from a knowledge base."""
    from .question_answering.answering import answer

    answer(argv)


def recommend(argv: Sequence[str]) -> None:
    """Recommend items."""
    from .commands.recommend import recommend

    recommend(argv)


def export(argv: Sequence[str]) -> None:
    """Write a checkpoint in the form that others read."""
    from .commands.export import export

    export(argv)


def inspect(argv: Sequence[str]) -> None:
    """Say what a checkpoint is."""
    from .commands.inspect import inspect

    inspect(argv)


VERBS = {
    "finetune": finetune,
    "evaluate": evaluate,
    "predict": predict,
    "translate": translate,
    "answer": answer,
    "recommend": recommend,
    "export": export,
    "inspect": inspect,
}
OWN_HELP = ("translate", "answer", "recommend", "export", "inspect")  # verbs that say themselves what they take


def guarded(argv: Sequence[str], verb: str = "finetune") -> int:
    """A verb with bad input turned into one line; returns the exit code."""
    if verb not in OWN_HELP and (not argv or argv[0] in ("-h", "--help")):
        print(USAGE, end="")
        return 0
    # PEFT still asks for it by the old name.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    try:
        VERBS[verb](argv)
    except (ValueError, OSError, SafetensorError, StrictDataclassError) as error:
        if os.environ.get("DEEPSEEK_HF_TRACEBACK"):
            raise
        print(f"deepseek-hf: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        advice = "; go on with --resume_from_checkpoint true" if verb == "finetune" else ""
        print(f"deepseek-hf: interrupted{advice}.", file=sys.stderr)
        return 130
    return 0


def main() -> int:
    """The console script `deepseek-hf`."""
    verb, argv = (sys.argv[1] if len(sys.argv) > 1 else "--help"), sys.argv[2:]
    if verb in VERBS:
        return guarded(argv, verb)
    if verb in ("-h", "--help"):
        return guarded([])
    print(f"deepseek-hf: error: unknown verb {verb!r}; there is {', '.join(VERBS)}.", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main() if sys.argv[1:2] and sys.argv[1] in VERBS else guarded(sys.argv[1:]))
