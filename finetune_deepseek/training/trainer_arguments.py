"""What Trainer is told: transformers' Seq2SeqTrainingArguments with our flags and checks, and one run's arguments."""

from dataclasses import dataclass, field
from typing import Any, cast

import torch
from transformers import Seq2SeqTrainingArguments
from transformers.integrations import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from ..data.ranges import check_ranges
from ..data.words import nearest_match
from .arguments import MULTI_STEP, MUON, LoraArguments, ModelArguments, TrainingFlags, is_more_better

STEPS_WITHOUT_END = 1_000_000  # what Trainer is told where time says when to stop
# What pip installs for a word of --report_to; transformers itself looks after the words that aren't here.
TRACKERS = {"tensorboard": '"deepseek-hf[tensorboard]"', "trackio": '"deepseek-hf[trackio]"', "comet_ml": "comet-ml"}
OWN_NAMES = ("wandb", "mlflow", "neptune", "codecarbon", "clearml", "dagshub", "dvclive", "swanlab")
TRACKERS |= dict(zip(OWN_NAMES, OWN_NAMES, strict=True))


@dataclass
class TrainingArguments(TrainingFlags, Seq2SeqTrainingArguments):
    """transformers' arguments with defaults for this package's runs, and a few of ours."""

    # Pinning only helps copies to a GPU, and warns without one.
    dataloader_pin_memory: bool = field(default_factory=torch.cuda.is_available)

    def __post_init__(self) -> None:
        if not self.output_dir:
            raise ValueError("--output_dir is missing: name the folder for the model and its results.")
        is_timed = self.max_steps > 0 or self.train_minutes is not None
        check_ranges(self, but=("num_train_epochs",) if is_timed else ())
        if self.early_stopping_patience is not None:
            self.load_best_model_at_end = True
        self._choose_direction()
        if self.load_best_model_at_end and self.eval_strategy == "no":
            raise ValueError(
                "Keeping the best model and early stopping need evaluations: "
                "add --eval_strategy epoch --save_strategy epoch (or steps)."
            )
        self._check_choices()
        if self.train_minutes is not None:
            if self.max_steps > 0:
                raise ValueError("--train_minutes and --max_steps both say when to stop; keep one of them.")
            self.max_steps = STEPS_WITHOUT_END
        if self.average_checkpoints:
            if self.load_best_model_at_end:
                raise ValueError("--average_checkpoints takes the last ones, not the best; drop one of the two.")
            self.save_total_limit = max(self.save_total_limit or 0, self.average_checkpoints)
        if self.freeze is not None:
            self.freeze = [word for words in self.freeze for word in words.split(",") if word]
        if not torch.accelerator.is_available():
            self.use_cpu = True  # else transformers refuses bf16, which recent CPUs compute several times faster
        schedule = self.lr_scheduler_type
        if schedule == MULTI_STEP:
            self.lr_scheduler_type = "constant_with_warmup"  # transformers accepts names of its own only
        optim = self.optim
        if optim == MUON:
            self.optim = "adamw_torch"
        super().__post_init__()
        self.optim = optim if optim == MUON else self.optim
        if schedule == MULTI_STEP:
            self.lr_scheduler_type = schedule
        if self.lr_scheduler_type in (SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY):
            # Theirs is "min" whatever the score: the rate would fall as BLEU rises.
            mode = {"mode": "max" if self.greater_is_better else "min"}
            self.lr_scheduler_kwargs = mode | cast(dict, self.lr_scheduler_kwargs or {})

    def _choose_direction(self) -> None:
        """What is better follows from the score's name: transformers takes all but losses for better when higher."""
        score = self.metric_for_best_model or "loss"
        if self.greater_is_better is None and self.metric_for_best_model:
            self.greater_is_better = is_more_better(score)
        elif self.greater_is_better and not is_more_better(score):
            raise ValueError(f"--greater_is_better true: of {score} less is better; leave the flag out.")

    def _check_choices(self) -> None:
        """Refuse what can't work before transformers, which doesn't name the flag, or takes it without a word."""
        schedules = [*(known.value for known in SchedulerType), MULTI_STEP]
        optimizers = [*(known.value for known in OptimizerNames), MUON]
        for flag, known in (("lr_scheduler_type", schedules), ("optim", optimizers)):
            value = str(getattr(getattr(self, flag), "value", getattr(self, flag)))
            if value not in known:
                raise ValueError(
                    f"--{flag} {value}: no such choice{nearest_match(value, known)}; there is {', '.join(known)}."
                )
        self._check_trackers()
        if self.generation_length_penalty != 1 and (self.generation_num_beams or 1) == 1:
            raise ValueError("--generation_length_penalty has no effect without beams; add --generation_num_beams 5.")

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
