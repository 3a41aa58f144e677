"""The command line: `deepseek-hf VERB ...`, or `python -m finetune_deepseek [VERB] ...` (without a verb, finetune).

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
from .data.hub import home_advice

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


VERBS = ("finetune", "evaluate", "predict", "translate", "answer", "recommend", "export", "inspect")
OWN_HELP = ("translate", "answer", "recommend", "export", "inspect")  # verbs that say themselves what they take


def guarded(argv: Sequence[str], verb: str = "finetune") -> int:
    """A verb with bad input turned into one line; returns the exit code."""
    if verb not in OWN_HELP and (not argv or argv[0] in ("-h", "--help")):
        print(USAGE, end="")
        return 0
    # PEFT still asks for it by the old name.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    try:
        # Imported by name, since torch and transformers take seconds and --help of the command needs neither.
        getattr(importlib.import_module(f"{__package__}.commands.{verb}"), verb)(argv)
    except (ValueError, OSError, FloatingPointError, SafetensorError, StrictDataclassError) as error:
        if os.environ.get("DEEPSEEK_HF_TRACEBACK"):
            raise
        line = " ".join(str(error).split())
        advice = home_advice(error)
        print(f"deepseek-hf: error: {line.rstrip('.') if advice else line}{advice}", file=sys.stderr)
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
