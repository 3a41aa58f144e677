"""The command line of a fine-tuning run: a YAML file beneath the flags, and a short --help.

A YAML file holds the same names as the flags; it is put in front of the command line, so flags win. It may describe
several runs, one after the other:

    source_lang: en                           # for every stage
    stages:
      - preset: tiny_v3                       # the first stage without a name writes to --output_dir itself
        target_lang: zh
      - name: adapter                         # a named stage writes to its own folder inside it
        model_name_or_path: "{output_dir}"    # the --output_dir of the whole command
        use_peft: true
        target_lang: de
"""

import argparse
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from transformers import HfArgumentParser

from ...data.arguments import TaskFlags
from ...data.words import nearest_match
from ...training.arguments import MULTI_STEP, LoraArguments, ModelArguments
from .transformers_flags import training_flags

if TYPE_CHECKING:
    from ...training.trainer_arguments import Stage

# What --help shows beside the task's own first flags; --help_all shows every one.
FIRST = (
    *("model_name_or_path", "preset", "config_overrides", "use_peft", "lora_target"),
    *("output_dir", "num_train_epochs", "learning_rate", "per_device_train_batch_size", "bf16", "eval_strategy"),
    *("do_train", "do_eval", "do_predict", "resume_from_checkpoint", "overwrite_output_dir", "push_to_hub"),
)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """One spelling and one value name per flag, and no default where there is none."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings:
            return super()._format_action_invocation(action)
        value = (
            "" if action.nargs in (0, "?") else " " + self._format_args(action, action.dest.rsplit("_")[-1].upper())
        )
        return action.option_strings[0] + value

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.option_strings[:1] == [f"--no_{action.dest}"]:
            return f"Switch --{action.dest} off."  # HfArgumentParser repeats that flag's text
        if action.default in (None, False, "", argparse.SUPPRESS):
            return action.help
        values = action.default if isinstance(action.default, list) else [action.default]
        shown = " ".join(str(value) for value in values).replace("\n", "\\n").replace("%", "%%")
        return f"{action.help or ''} (default: {shown})".lstrip()

    def _format_usage(self, usage: Any, actions: Any, groups: Any, prefix: Any) -> str:
        return f"usage: {usage or f'{self._prog} [config.yaml] [--flag value ...]'}\n\n"


class ArgumentParser(HfArgumentParser):
    """HfArgumentParser that raises ValueError, names the nearest flag, and shows the first flags only in --help."""

    def __init__(self, task: str, data_arguments: type[TaskFlags], show_all: bool = False) -> None:
        self.classes = (ModelArguments, LoraArguments, data_arguments, training_flags())
        first, *others = examples(data_arguments)
        more = "\n".join(["more examples:", *others]) if others else ""
        super().__init__(
            self.classes,  # type: ignore[arg-type]
            prog=f"deepseek-hf finetune {task}",
            description=f"example:\n{first}\n\n"
            "The YAML file holds flags by name, without the dashes; the command line wins over it.\n"
            "Without --do_train, --do_eval and --do_predict, everything is done that the data has a split for.",
            epilog=more if show_all else "--help_all lists every flag and more examples.",
            formatter_class=HelpFormatter,
            allow_abbrev=False,
        )
        self.add_argument("--help_all", action="help", help="Show every flag, those of transformers' Trainer too.")
        shown = {"help", "help_all", *FIRST, *data_arguments.FIRST}
        for action in self._actions:
            is_complement = action.option_strings[0].startswith("--no_")
            if not show_all and (action.dest not in shown or is_complement):
                action.help = argparse.SUPPRESS

    def error(self, message: str) -> None:  # type: ignore[override]
        raise ValueError(message)

    def names(self) -> list[str]:
        """What may stand in a YAML file."""
        return [f.name for cls in self.classes for f in fields(cls) if f.init]

    def given_names(self, argv: Sequence[str]) -> set[str]:
        """The names of the flags in `argv`; an unknown flag is an error."""
        given = set()
        for token in argv:
            if not token.startswith("--"):
                continue
            flag = token.partition("=")[0]
            action = self._option_string_actions.get(flag)
            if action is None:
                known = self._option_string_actions
                raise ValueError(f"unknown flag {flag}{nearest_match(flag, known)}; --help lists them.")
            given.add(action.dest)
        return given

    def parse_draft(self, name: str | None, argv: Sequence[str]) -> "Draft":
        """Parse one run's flags."""
        given = self.given_names(argv)
        namespace, rest = self.parse_known_args(list(argv))
        if rest:
            raise ValueError(f"unexpected argument {rest[0]!r}; a YAML file comes first, everything else is a --flag.")
        values = vars(namespace)
        made: list[Any] = [
            kind(**{field.name: values[field.name] for field in fields(kind) if field.init})  # type: ignore[arg-type]
            for kind in self.classes[:3]
        ]
        model, lora, data = made
        check_together(given, lora, values)
        known = {field.name: values[field.name] for field in fields(self.classes[3])}
        self.classes[3](**known)  # refuses what doesn't fit
        training = {name: value for name, value in known.items() if name in given}
        if not values["learning_rate"]:
            pretrained = 2e-5 if model.model_name_or_path else 1e-3
            training["learning_rate"] = 2e-4 if lora.use_peft else pretrained
        return Draft(name, model, lora, data, training, given)


@dataclass
class Draft:
    """One run as it was asked for, before torch and transformers are imported to make a `Stage` of it."""

    name: str | None
    model: ModelArguments
    lora: LoraArguments
    data: Any
    training: dict[str, Any]  # those of TrainingArguments that were given, and the learning rate
    given: set[str]  # names that were set by the YAML file or the command line

    def stage(self) -> "Stage":
        """The run's arguments, all of them checked.

        Raises:
            ValueError: with one line, for what doesn't fit.
        """
        from ...training.trainer_arguments import Stage, TrainingArguments

        return Stage(self.name, self.model, self.lora, self.data, TrainingArguments(**self.training), self.given)


def examples(data_arguments: type[TaskFlags]) -> list[str]:
    """The example commands of a task, each with the line that says what it does."""
    return re.split(r"\n(?=  deepseek-hf )", data_arguments.EXAMPLES)[1:] or [""]


def check_together(given: set[str], lora: LoraArguments, values: dict[str, Any]) -> None:
    """Refuse flags that have no effect beside others.

    Raises:
        ValueError: for the first of them.
    """
    for flag in ("lr_milestones", "lr_factor"):
        if flag in given and values["lr_scheduler_type"] != MULTI_STEP:
            raise ValueError(f"--{flag} has no effect without --lr_scheduler_type {MULTI_STEP}; add it.")
    if "lr_decay_share" in given and values["lr_scheduler_type"] != "warmup_stable_decay":
        raise ValueError("--lr_decay_share has no effect without --lr_scheduler_type warmup_stable_decay; add it.")
    if values.get("tokens_budget") and (others := given & {"max_steps", "train_minutes"}):
        raise ValueError(f"--tokens_budget and --{min(others)} both say when to stop; keep one of them.")
    if values.get("tokens_budget") and values["tokens_per_batch"]:
        raise ValueError("--tokens_budget counts blocks, of which --tokens_per_batch leaves the number open; drop it.")
    if values["train_sampling_strategy"] == "sequential":
        drawing = {"tokens_per_batch": values["tokens_per_batch"], "balance": values.get("balance") == "sampler"}
        for flag in (flag for flag, is_asked in drawing.items() if is_asked):
            raise ValueError(
                f"--{flag} {values[flag]} has no effect with --train_sampling_strategy sequential, which takes the "
                "rows as they are; drop one of the two."
            )
    if not lora.use_peft:
        return
    if values["average_checkpoints"]:
        raise ValueError("--average_checkpoints can't be used with --use_peft: the mean of two products of "
                         "matrices isn't the product of the means.")  # fmt: skip
    if values["router_bias_update"]:
        raise ValueError("--router_bias_update can't be used with --use_peft: an adapter doesn't hold the biases.")
    for flag in ("freeze", "train_last_n_layers"):
        if values[flag] is not None:
            raise ValueError(
                f"--{flag} can't be used with --use_peft: LoRA trains its adapters only; drop one of the two, or "
                "choose groups by --lora_target."
            )


def as_flags(settings: dict[str, Any], known: Sequence[str], where: str) -> list[str]:
    """The settings of a YAML file as command-line flags. A null leaves the default.

    Raises:
        ValueError: for a name that isn't a flag.
    """
    flags: list[str] = []
    for name, value in settings.items():
        if name not in known:
            raise ValueError(f"{where}: unknown key {name!r}{nearest_match(str(name), known)}.")
        if isinstance(value, list):
            flags += [f"--{name}", *map(str, value)]
        elif value is not None:
            flags.append(f"--{name}={json.dumps(value) if isinstance(value, dict) else value}")
    return flags


class UniqueKeys(yaml.SafeLoader):
    """Reads YAML, refusing a key that a mapping has twice, of which YAML would keep the last without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A mapping whose keys differ."""
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen and key.tag != "tag:yaml.org,2002:merge":
                raise yaml.MarkedYAMLError(None, None, f"{key.value} is there twice", key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML mapping.

    Raises:
        ValueError: if the file isn't there, isn't YAML (with the line), or is no mapping.
    """
    try:
        settings = yaml.load(Path(path).read_text(encoding="utf-8"), UniqueKeys)
    except OSError as error:
        raise ValueError(f"{path}: can't be read ({error.strerror}); the first argument names a YAML file.") from error
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        raise ValueError(f"{path}, line {line}: not valid YAML: {error.problem}.") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path}: expected flags as `name: value` lines, found {type(settings).__name__}.")
    return settings


def stage_settings(settings: dict[str, Any], path: str | Path) -> list[tuple[str | None, dict[str, Any]]]:
    """Split a YAML file into (name, settings) per stage; the keys outside of `stages` go to each."""
    common = {name: value for name, value in settings.items() if name != "stages"}
    stages = settings.get("stages", [{}])
    if not isinstance(stages, list) or not stages or not all(isinstance(stage, dict) for stage in stages):
        raise ValueError(f"{path}: `stages` must be a list of mappings, one per run.")
    names = [stage.get("name") for stage in stages]
    if len(set(names)) < len(names):
        raise ValueError(f"{path}: every stage but one needs a `name` of its own; it becomes the stage's folder.")
    return [
        (name, common | {key: value for key, value in stage.items() if key != "name"})
        for name, stage in zip(names, stages, strict=True)
    ]


def _fill_output_dir(value: Any, output_dir: str) -> Any:
    return value.replace("{output_dir}", output_dir) if isinstance(value, str) else value


def draft_command(
    task: str,
    data_arguments: type[TaskFlags],
    argv: Sequence[str],
    recipe: Path | None = None,
    defaults: dict[str, Any] | None = None,
) -> list[Draft]:
    """Parse what follows `deepseek-hf finetune TASK` into the runs that it asks for, without torch or transformers.

    Args:
        task: the task's name, for --help.
        data_arguments: the task's dataclass.
        argv: an optional YAML file, then flags.
        recipe: the YAML file to take when neither a YAML file nor a model nor data is named.
        defaults: values by flag name, as they are, that the YAML file and the flags win over.

    Raises:
        ValueError: with one line, for everything that doesn't fit.
    """
    parser = ArgumentParser(task, data_arguments, show_all="--help_all" in argv)
    parser.set_defaults(**(defaults or {}))
    path: str | Path | None = None
    if argv and not argv[0].startswith("-"):
        path, argv = argv[0], argv[1:]
    given = parser.given_names(argv)
    if given & {"help", "help_all"}:
        parser.print_help()
        raise SystemExit(0)
    if path is None and not given & {"model_name_or_path", "preset", "config_name", *data_arguments.SOURCES}:
        path = recipe

    drafts = []
    for name, settings in stage_settings(read_yaml(path) if path else {}, path or ""):
        flags = as_flags(settings, parser.names(), str(path))
        output_dir = parser.parse_known_args([*flags, *argv])[0].output_dir
        if not output_dir:
            raise ValueError("--output_dir is missing: name the folder for the model and its results.")
        flags = [_fill_output_dir(flag, output_dir) for flag in flags]
        draft = parser.parse_draft(name, [*flags, *argv])
        draft.training["output_dir"] = output_dir
        if name is not None:
            draft.training["output_dir"] = os.path.join(output_dir, name)
            if draft.training.get("hub_model_id"):
                draft.training["hub_model_id"] += f"-{name}"
        drafts.append(draft)
    return drafts


def parse_command(
    task: str,
    data_arguments: type[TaskFlags],
    argv: Sequence[str],
    recipe: Path | None = None,
    defaults: dict[str, Any] | None = None,
) -> list["Stage"]:
    """The runs of `draft_command`, ready to run.

    Raises:
        ValueError: with one line, for everything that doesn't fit.
    """
    return [draft.stage() for draft in draft_command(task, data_arguments, argv, recipe, defaults)]
