"""The command line: `deepseek-hf finetune TASK ...`, or `python -m finetune_deepseek TASK ...`.

Bad input ends with one line on stderr and exit code 2. Set DEEPSEEK_HF_TRACEBACK=1 for the stack trace.
"""

import importlib
import os
import sys
import warnings
from collections.abc import Sequence

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from . import TASKS

# Read by OpenMP when torch is imported. Waiting threads that spin starve each other as soon as anything else runs:
# 0.14 against 4.1 steps per second of the quickstart's model on two busy cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

USAGE = f"""usage: deepseek-hf finetune TASK [config.yaml] [--flag value ...]

tasks: {", ".join(TASKS)}

  deepseek-hf finetune translation --output_dir runs/quickstart    no other flag is needed
  deepseek-hf finetune translation --help                          flags, with examples
"""


def finetune(argv: Sequence[str]) -> None:
    """Run the task that `argv` begins with.

    Raises:
        ValueError: with one line, for bad input.
    """
    # Imported here, since torch and transformers take seconds and --help of the command needs neither.
    from .arguments import nearest_match, parse_command
    from .run import run_stages

    name = argv[0]
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}{nearest_match(name, TASKS)}; there is {', '.join(TASKS)}.")
    module, _, class_name = TASKS[name].partition(":")
    task = getattr(importlib.import_module(module), class_name)
    run_stages(task, parse_command(name, task.arguments_class, argv[1:], task.recipe, task.examples))


def guarded(argv: Sequence[str]) -> int:
    """`finetune` with bad input turned into one line; returns the exit code."""
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    # PEFT still asks for it by the old name.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    try:
        finetune(argv)
    except (ValueError, OSError, SafetensorError, StrictDataclassError) as error:
        if os.environ.get("DEEPSEEK_HF_TRACEBACK"):
            raise
        print(f"deepseek-hf: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("deepseek-hf: interrupted; go on with --resume_from_checkpoint true.", file=sys.stderr)
        return 130
    return 0


def main() -> int:
    """The console script `deepseek-hf`."""
    verb, argv = (sys.argv[1] if len(sys.argv) > 1 else "--help"), sys.argv[2:]
    if verb in ("-h", "--help", "finetune"):
        return guarded(argv if verb == "finetune" else [])
    print(f"deepseek-hf: error: unknown verb {verb!r}; there is finetune.", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(guarded(sys.argv[1:]))
