"""What the command says of itself: its verbs, its version, and `deepseek-hf help`."""

import importlib
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

from .. import TASKS
from ..data.words import nearest_match

USAGE = f"""usage: deepseek-hf finetune TASK [config.yaml] [--flag value ...]
       deepseek-hf pretrain [config.yaml] [--flag value ...]
       deepseek-hf evaluate TASK MODEL [config.yaml] [--flag value ...]
       deepseek-hf predict TASK MODEL [config.yaml] [--flag value ...]
       deepseek-hf chat MODEL [--flag value ...]
       deepseek-hf generate MODEL ["PROMPT" ...] [--input FILE] [--output FILE] [--flag value ...]
       deepseek-hf draw MODEL "CAPTION" ... --output FILE [--flag value ...]
       deepseek-hf translate MODEL [--input FILE] [--output FILE] [--flag value ...]
       deepseek-hf answer [MODEL] --knowledge PATH [--flag value ...] "QUESTION" ...
       deepseek-hf recommend MODEL --history FILE [--output FILE] [--flag value ...]
       deepseek-hf export SRC DST --to native|bundle|gguf [--merge-adapter DIR] [--flag value ...]
       deepseek-hf compress SRC DST --prune-experts SHARE|--prune-layers N|--sparsity 2:4|--int8|--int4 [...]
       deepseek-hf inspect SRC
       deepseek-hf presets
       deepseek-hf help TASK|VERB
       deepseek-hf --version

tasks: {", ".join(TASKS)}

  finetune    train a model or an adapter, then evaluate and predict
  pretrain    finetune language_modeling: train a language model on texts
  evaluate    score a saved model on the validation split; with the settings of its training
  predict     the same on the test split, and write every prediction
  chat        talk with a language model in the terminal
  generate    go on with the prompts of a file, of standard input or of the command line
  draw        draw images of captions
  translate   translate the lines of a file or of standard input
  answer      answer questions from a folder or file of texts
  recommend   the best next items for the histories in a file
  export      write a checkpoint in the form that others read; deepseek-hf export --help
  compress    make a model smaller, scored before and after; deepseek-hf compress --help
  inspect     say what a checkpoint is, from its headers alone
  presets     the named sizes that --preset takes
  help        the flags that people use first of a task, or those of a verb

  deepseek-hf finetune translation                                 the quickstart, into runs/translation
  deepseek-hf help translation                                     its flags; those of evaluate and predict too
  deepseek-hf predict translation runs/translation                 writes to runs/predict-translation
  echo "2 May 1987" | deepseek-hf translate runs/translation       deepseek-hf translate --help shows its flags
"""

RUNS = ("finetune", "evaluate", "predict")  # verbs of a task
# They say themselves what they take.
OWN_HELP = (
    *("pretrain", "chat", "generate", "draw", "translate", "answer", "recommend"),
    *("export", "compress", "inspect", "presets"),
)
HOMES = {"predict": "evaluate"}  # verbs that share the file of another
VERBS = (*RUNS, *OWN_HELP, "help")


def versions() -> str:
    """This package's version, and those that a report of a fault should name."""
    try:
        own = version("deepseek-hf")
    except PackageNotFoundError:
        own = "(not installed)"
    others = ", ".join(f"{name} {version(name)}" for name in ("transformers", "torch", "peft"))
    return f"deepseek-hf {own} ({others}, Python {platform.python_version()})"


def help(argv: Sequence[str]) -> None:
    """Show the help of the task or verb that `argv` names.

    Raises:
        ValueError: for a name of neither.
    """
    name = argv[0]
    if name in RUNS:
        print(USAGE, end="")
    elif name in TASKS:
        importlib.import_module(f"{__package__}.finetune").finetune([name, "--help", *argv[1:]])
    elif name in OWN_HELP:
        getattr(importlib.import_module(f"{__package__}.{name}"), name)(["--help"])
    else:
        known = (*TASKS, *RUNS, *OWN_HELP)
        raise ValueError(
            f"help {name}: no such task or verb{nearest_match(name, known)}; there is {', '.join(known)}."
        )
