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

from .commands.help import HOMES, OWN_HELP, USAGE, VERBS, versions
from .data.hub import home_advice
from .data.words import nearest_match


def guarded(argv: Sequence[str], verb: str = "finetune") -> int:
    """A verb with bad input turned into one line; returns the exit code."""
    if reconfigure := getattr(sys.stdout, "reconfigure", None):
        reconfigure(errors="backslashreplace")  # a pipe's encoding on Windows lacks most characters
    if verb not in OWN_HELP and (not argv or argv[0] in ("-h", "--help")):
        print(USAGE, end="")
        return 0
    # PEFT still asks for it by the old name.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    try:
        # Imported by name, since torch and transformers take seconds and --help of the command needs neither.
        home = importlib.import_module(f"{__package__}.commands.{HOMES.get(verb, verb)}")
        getattr(home, verb)(argv)
        leave_processes()
    except BrokenPipeError:  # who reads standard output, as `head` does, has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError, FloatingPointError, SafetensorError, StrictDataclassError) as error:
        if os.environ.get("DEEPSEEK_HF_TRACEBACK"):
            raise
        line = " ".join(str(error).split())
        advice = home_advice(error)
        print(f"deepseek-hf: error: {line.rstrip('.') if advice else line}{advice}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        advice = "; go on with --resume_from_checkpoint true" if verb in ("finetune", "pretrain") else ""
        print(f"deepseek-hf: interrupted{advice}.", file=sys.stderr)
        return 130
    return 0


def leave_processes() -> None:
    """Leave what several processes share, or one's end can abort another's (torch's threads are still at work)."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def main() -> int:
    """The console script `deepseek-hf`."""
    verb, argv = (sys.argv[1] if len(sys.argv) > 1 else "--help"), sys.argv[2:]
    if verb in VERBS:
        return guarded(argv, verb)
    if verb in ("-h", "--help"):
        return guarded([])
    if verb == "--version":
        print(versions())
        return 0
    near = nearest_match(verb, VERBS)
    print(f"deepseek-hf: error: unknown verb {verb!r}{near}; there is {', '.join(VERBS)}.", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main() if sys.argv[1:2] and sys.argv[1] in (*VERBS, "--version") else guarded(sys.argv[1:]))
