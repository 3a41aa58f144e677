"""What Trainer is told: transformers' Seq2SeqTrainingArguments with our flags and checks, and one run's arguments."""

from dataclasses import dataclass, field
from typing import Any, cast

import torch
from transformers import Seq2SeqTrainingArguments
from transformers.integrations import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames, trainer_log_levels

from ..data.words import nearest_match
from .arguments import MULTI_STEP, MUON, LoraArguments, ModelArguments, TrainingFlags

# What pip installs for a word of --report_to; transformers itself looks after the words that aren't here.
TRACKERS = {"tensorboard": '"deepseek-hf[tensorboard]"', "trackio": '"deepseek-hf[trackio]"', "comet_ml": "comet-ml"}
OWN_NAMES = ("wandb", "mlflow", "neptune", "codecarbon", "clearml", "dagshub", "dvclive", "swanlab")
TRACKERS |= dict(zip(OWN_NAMES, OWN_NAMES, strict=True))


@dataclass
class TrainingArguments(TrainingFlags, Seq2SeqTrainingArguments):  # type: ignore[misc]  # narrower types
    """transformers' arguments with defaults for this package's runs, and a few of ours."""

    # It warns without a GPU.
    dataloader_pin_memory: bool = field(default_factory=torch.cuda.is_available)

    def __post_init__(self) -> None:
        TrainingFlags.__post_init__(self)
        self._check_choices()
        if not torch.accelerator.is_available():
            self.use_cpu = True  # else transformers refuses bf16, which recent CPUs compute several times faster
        schedule = self.lr_scheduler_type
        if schedule == MULTI_STEP:
            self.lr_scheduler_type = "constant_with_warmup"  # transformers accepts names of its own only
        optim = self.optim
        if optim == MUON:
            self.optim = "adamw_torch"
        Seq2SeqTrainingArguments.__post_init__(self)
        self.optim = optim if optim == MUON else self.optim
        if schedule == MULTI_STEP:
            self.lr_scheduler_type = schedule
        if self.lr_scheduler_type in (SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY):
            # Theirs is "min" whatever the score: the rate would fall as BLEU rises.
            mode = {"mode": "max" if self.greater_is_better else "min"}
            self.lr_scheduler_kwargs = mode | cast(dict, self.lr_scheduler_kwargs or {})

    def _check_choices(self) -> None:
        """Refuse what can't work before transformers, which doesn't name the flag, or takes it without a word."""
        schedules = [*(known.value for known in SchedulerType), MULTI_STEP]
        optimizers = [*(known.value for known in OptimizerNames), MUON]
        levels = [*trainer_log_levels]
        for flag, known in (
            *(("lr_scheduler_type", schedules), ("optim", optimizers)),
            *(("log_level", levels), ("log_level_replica", levels)),
        ):
            value = str(getattr(getattr(self, flag), "value", getattr(self, flag)))
            if value not in known:
                raise ValueError(
                    f"--{flag} {value}: no such choice{nearest_match(value, known)}; there is {', '.join(known)}."
                )
        self._check_trackers()

    def _check_trackers(self) -> None:
        """Refuse --report_to for a package that isn't here, which else shows when all data have been read."""
        asked = [self.report_to] if isinstance(self.report_to, str) else self.report_to or []
        for name in set(asked) - {"all", "none"}:
            if name not in INTEGRATION_TO_CALLBACK:
                known = ("none", "all", *INTEGRATION_TO_CALLBACK)
                near = nearest_match(name, known)
                raise ValueError(f"--report_to {name}: no such choice{near}; there is {', '.join(known)}.")
            if name in TRACKERS and name not in get_available_reporting_integrations():
                raise ValueError(f"--report_to {name}: it is not installed: pip install {TRACKERS[name]}")


@dataclass
class Stage:
    """One run. `given` holds the names that were set by the YAML file or the command line."""

    name: str | None
    model: ModelArguments
    lora: LoraArguments
    data: Any
    training: TrainingArguments
    given: set[str]
