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
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser

from ..data.words import nearest_match
from .arguments import MULTI_STEP, LoraArguments, ModelArguments
from .trainer_arguments import Stage, TrainingArguments

# What --help shows of TrainingArguments; the others stay usable, and --help_all lists them.
COMMON_TRAINING_FLAGS = (
    *("output_dir", "do_train", "do_eval", "do_predict", "num_train_epochs", "max_steps", "seed"),
    *("train_minutes", "tokens_per_batch", "average_checkpoints"),
    *("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"),
    *("optim", "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "lr_milestones", "lr_factor"),
    *("warmup_steps", "weight_decay", "l1", "label_smoothing_factor", "freeze", "train_last_n_layers", "bf16"),
    *("eval_strategy", "eval_steps", "save_strategy", "save_steps", "save_total_limit", "logging_steps", "report_to"),
    *("load_best_model_at_end", "metric_for_best_model", "early_stopping_patience"),
    *("generation_num_beams", "generation_length_penalty"),
    *(
        "data_checks",
        "resume_from_checkpoint",
        "overwrite_output_dir",
        "push_to_hub",
        "hub_model_id",
        "hub_private_repo",
    ),
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
        if action.default in (None, False, "", argparse.SUPPRESS):
            return action.help
        return super()._get_help_string(action)

    def _format_usage(self, usage: Any, actions: Any, groups: Any, prefix: Any) -> str:
        return f"usage: {usage or f'{self._prog} [config.yaml] [--flag value ...]'}\n\n"


class ArgumentParser(HfArgumentParser):
    """HfArgumentParser that raises ValueError, names the nearest flag, and hides the rare ones in --help."""

    def __init__(self, task: str, data_arguments: type, epilog: str, show_all: bool = False) -> None:
        self.classes = (ModelArguments, LoraArguments, data_arguments, TrainingArguments)
        super().__init__(
            self.classes,  # type: ignore[arg-type]
            prog=f"deepseek-hf finetune {task}",
            description="The YAML file holds flags by name, without the dashes; the command line wins over it.\n"
            "Without --do_train, --do_eval and --do_predict, everything is done that the data has a split for.",
            epilog=epilog,
            formatter_class=HelpFormatter,
            allow_abbrev=False,
        )
        self.add_argument("--help_all", action="help", help="Show every flag of transformers' TrainingArguments too.")
        training_flags = set(TrainingArguments.__dataclass_fields__) - set(COMMON_TRAINING_FLAGS)
        for action in self._actions:
            is_rare = action.dest in training_flags
            is_complement = action.option_strings[0].startswith("--no_")
            if not show_all and (is_rare or is_complement):
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

    def parse_stage(self, name: str | None, argv: Sequence[str]) -> Stage:
        """Parse one run's flags into its dataclasses."""
        given = self.given_names(argv)
        *parsed, rest = self.parse_args_into_dataclasses(
            list(argv), return_remaining_strings=True, look_for_args_file=False
        )
        if rest:
            raise ValueError(f"unexpected argument {rest[0]!r}; a YAML file comes first, everything else is a --flag.")
        model, lora, data, training = parsed
        for flag in ("lr_milestones", "lr_factor"):
            if flag in given and training.lr_scheduler_type != MULTI_STEP:
                raise ValueError(f"--{flag} has no effect without --lr_scheduler_type {MULTI_STEP}; add it.")
        if lora.use_peft and training.average_checkpoints:
            raise ValueError("--average_checkpoints can't be used with --use_peft: the mean of two products of "
                             "matrices isn't the product of the means.")  # fmt: skip
        for flag in ("freeze", "train_last_n_layers"):
            if lora.use_peft and getattr(training, flag) is not None:
                raise ValueError(
                    f"--{flag} can't be used with --use_peft: LoRA trains its adapters only; drop one of the two, or "
                    "choose groups by --lora_target."
                )
        if not training.learning_rate:
            pretrained = 2e-5 if model.model_name_or_path else 1e-3
            training.learning_rate = 2e-4 if lora.use_peft else pretrained
        return Stage(name, model, lora, data, training, given)


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


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML mapping.

    Raises:
        ValueError: if the file isn't there, isn't YAML (with the line), or is no mapping.
    """
    try:
        settings = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
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


def parse_command(
    task: str,
    data_arguments: type,
    argv: Sequence[str],
    recipe: Path | None = None,
    epilog: str = "",
    defaults: dict[str, Any] | None = None,
) -> list[Stage]:
    """Parse what follows `deepseek-hf finetune TASK` into the runs that it asks for.

    Args:
        task: the task's name, for --help.
        data_arguments: the task's dataclass. Its `SOURCES` are the names of the flags that name data.
        argv: an optional YAML file, then flags.
        recipe: the YAML file to take when neither a YAML file nor a model nor data is named.
        epilog: the end of --help.
        defaults: values by flag name that the YAML file and the flags win over.

    Raises:
        ValueError: with one line, for everything that doesn't fit.
    """
    parser = ArgumentParser(task, data_arguments, epilog, show_all="--help_all" in argv)
    path: str | Path | None = None
    if argv and not argv[0].startswith("-"):
        path, argv = argv[0], argv[1:]
    given = parser.given_names(argv)
    if given & {"help", "help_all"}:
        parser.print_help()
        raise SystemExit(0)
    sources = {"model_name_or_path", "preset", "config_name", *getattr(data_arguments, "SOURCES", ())}
    if path is None and recipe is not None and not given & sources:
        path = recipe

    stages = []
    for name, settings in stage_settings(read_yaml(path) if path else {}, path or ""):
        flags = [
            *as_flags(defaults or {}, parser.names(), "the model's card"),
            *as_flags(settings, parser.names(), str(path)),
        ]
        output_dir = parser.parse_known_args([*flags, *argv])[0].output_dir
        if not output_dir:
            raise ValueError("--output_dir is missing: name the folder for the model and its results.")
        flags = [_fill_output_dir(flag, output_dir) for flag in flags]
        stage = parser.parse_stage(name, [*flags, *argv])
        if name is not None:
            stage.training.output_dir = os.path.join(output_dir, name)
            if stage.training.hub_model_id:
                stage.training.hub_model_id += f"-{name}"
        stages.append(stage)
    return stages
