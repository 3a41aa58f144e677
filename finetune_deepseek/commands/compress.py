"""`deepseek-hf compress`: a smaller model, with its scores before and after."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import TASKS
from ..data.hub import check_source
from ..data.words import nearest_match
from .finetune import task_class, task_flags
from .parsing.verbs import Parser

EXAMPLES = """examples:
  deepseek-hf compress runs/translation small --prune-experts 0.25              the embedded data that trained it
  deepseek-hf compress runs/digits small --int8 --data_dir digits               weights of one byte each
  deepseek-hf compress runs/digits small --prune-layers 1 --recover-steps 200 --learning_rate 1e-3 --data_dir digits
  deepseek-hf compress runs/authors small --sparsity 2:4 --int8 --train_file a.csv --validation_file b.csv

What --prune-experts, --prune-layers and --sparsity leave out, --calibration-rows of the training rows decide. The
validation rows give the scores before and after, by the code of `deepseek-hf evaluate`; without such rows the test
rows do. All flags of `deepseek-hf help TASK` may follow: the data, batch sizes, and what trains in --recover-steps.
DST opens like every model: from_pretrained, AutoModel, evaluate, predict, chat, translate. What pruning has left can
also be trained on: deepseek-hf finetune TASK --model_name_or_path DST (--sparsity's zeros would then fill again)."""


# Flags of the task whose value the words above decide.
DECIDED = (
    *("model_name_or_path", "output_dir", "overwrite_output_dir", "preset", "config_name", "do_train", "max_steps"),
    *("num_train_epochs", "save_strategy", "load_best_model_at_end", "resume_from_checkpoint", "use_peft"),
    "push_to_hub",
)


def parser() -> Parser:
    """The flags of `deepseek-hf compress`."""
    flags = Parser(
        prog="deepseek-hf compress",
        usage="deepseek-hf compress SRC DST WAY ... [--flag of the task ...]\n",
        description="Make a model smaller: fewer experts, fewer layers, zeros, or numbers of fewer bits. Ways can be\n"
        "joined; they are done in the order below. Nothing that exists is overwritten.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    flags.add_argument("source", metavar="SRC", help="folder or Hub id of a model that a run of ours has made")
    flags.add_argument("destination", metavar="DST", help="folder that doesn't exist yet")
    flags.add_argument(
        "--prune-layers", "--prune_layers", type=int, metavar="N", help="leave out the N layers that change least"
    )
    flags.add_argument(
        *("--prune-experts", "--prune_experts"),
        type=float,
        metavar="SHARE",
        help="leave out this share of the routed experts of each layer (and group): those that are used least",
    )
    flags.add_argument(
        "--sparsity", choices=["2:4"], help="two of four neighbouring weights become 0, for GPUs that use it"
    )
    flags.add_argument(
        *("--recover-steps", "--recover_steps"),
        type=int,
        default=0,
        metavar="N",
        help="train what is left for N steps; --learning_rate and so on as in finetune",
    )
    flags.add_argument(
        "--int8",
        nargs="?",
        const="weights",
        choices=["weights", "dynamic"],
        help="weights of one byte; `dynamic` also multiplies in bytes, which is faster on CPUs where layers are wide",
    )
    flags.add_argument("--int4", action="store_true", help="weights of half a byte, each 32 with a scale")
    flags.add_argument(
        *("--calibration-rows", "--calibration_rows"),
        type=int,
        default=256,
        metavar="N",
        help="training rows, at most, that decide what is left out; 256 without it",
    )
    flags.add_argument("--task", choices=list(TASKS), help="what SRC does, if no run of ours has written it down")
    flags.add_argument("--model_revision", default="main", help="branch, tag or commit of SRC on the Hub")
    return flags


def compress(argv: Sequence[str]) -> None:
    """Do what `deepseek-hf compress` is followed by.

    Raises:
        ValueError: with one line, for bad input.
    """
    own = parser()
    arguments, rest = own.parse_known_args(list(argv) or ["--help"])
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("compress runs in one process: start it without torchrun or accelerate launch.")
    if arguments.int8 and arguments.int4:
        raise ValueError("--int8 and --int4 both say how many bits a weight has; keep one of them.")
    check_source(arguments.source)
    from ..training.saved import Saved  # it brings huggingface_hub

    saved = Saved.open(None, arguments.source, arguments.model_revision)
    name = arguments.task or saved.task
    if name is None:
        raise ValueError(f"{arguments.source}: nothing says what it does; add --task, one of {', '.join(TASKS)}.")
    flags = task_flags(name)
    check_rest(own, name, flags, rest)
    # Imported here, since torch and transformers take seconds and bad input needs neither.
    from ..compression.run import compress as run
    from ..compression.ways import Ways

    numbers = {None: None, "weights": "int8", "dynamic": "int8-dynamic"}[arguments.int8]
    ways = Ways(
        prune_experts=arguments.prune_experts,
        prune_layers=arguments.prune_layers,
        sparsity=arguments.sparsity,
        numbers="int4" if arguments.int4 else numbers,
        recover_steps=arguments.recover_steps,
        calibration_rows=arguments.calibration_rows,
    )
    run(task_class(name), stage_maker(name, flags, rest, saved), ways, saved, arguments.destination)


def check_rest(own: Parser, name: str, flags: Any, rest: Sequence[str]) -> None:
    """Refuse a flag that is neither ours nor the task's, and one whose value ours decide.

    Raises:
        ValueError: naming the nearest.
    """
    from .parsing.runs import ArgumentParser

    known = [*ArgumentParser(name, flags)._option_string_actions, *own._option_string_actions]
    for word in (word.partition("=")[0] for word in rest if word.startswith("--")):
        if word not in known:
            raise ValueError(f"unexpected argument {word!r}{nearest_match(word, known)}; see {own.prog} --help.")
        if word[2:].replace("-", "_") in DECIDED:
            raise ValueError(f"{word}: SRC, DST and --recover-steps decide this in compress; leave it out.")


def stage_maker(name: str, flags: Any, rest: Sequence[str], saved: Any) -> Any:
    """What makes the arguments of a run of the task: of a model, a folder to write to, and flags of training."""
    from .parsing.runs import draft_command

    defaults = saved.settings_for(name, flags)
    revision = [] if saved.commit is None else [f"--model_revision={saved.commit}"]

    def make(model: str | Path, folder: str | Path, **training: Any) -> Any:
        given = [*rest, f"--model_name_or_path={model}", f"--output_dir={folder}", "--push_to_hub=false"]
        given += revision if model == saved.name else []
        words = [f"--{flag}={value}" for flag, value in training.items()]
        drafts = draft_command(name, flags, [*given, *words], defaults=defaults)
        if len(drafts) > 1:
            raise ValueError("compress does one run; name a YAML file without stages.")
        drafts[0].data.check_paths()
        return drafts[0].stage()

    return make
