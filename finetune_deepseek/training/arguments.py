"""What a run is told: which model, which adapter, how to train.

With the task's own data arguments these are the four dataclasses of a run, declared where nothing heavy is imported;
trainer_arguments.py has the `TrainingFlags` among those of transformers.
"""

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from ..data.ranges import check_ranges

if TYPE_CHECKING:
    from .saved import Saved

STEPS_WITHOUT_END = 1_000_000  # what Trainer is told where time says when to stop
MUON = "muon"  # our optimizer beside those of transformers; see weights/muon.py
MULTI_STEP = "multi_step"  # our schedule beside those of transformers; see optimization.py
# The last words of the scores of which less is better; of all others more is.
LESS_IS_BETTER = frozenset({"loss", "perplexity", "byte", "token", "mse", "mae", "runtime"})


def is_more_better(score: str) -> bool:
    """Whether the higher value of a score, named as evaluation names it, is the better one."""
    return score.rpartition("_")[2] not in LESS_IS_BETTER


@dataclass
class ModelArguments:
    """Which model and which tokenizer."""

    _argument_group_name = "model"

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Pretrained model, or LoRA adapter: a folder or a Hub id."}
    )
    preset: str | None = field(
        default=None, metadata={"help": "Random weights in a named size of this package, such as tiny_v3."}
    )
    config_name: str | None = field(
        default=None, metadata={"help": "Random weights by any config.json: a folder or a Hub id."}
    )
    native: bool = field(
        default=False,
        metadata={"help": "Open a Llama, Qwen or DeepSeek checkpoint with transformers' class in place of ours."},
    )
    config_overrides: str | None = field(
        default=None,
        metadata={"help": "Changes to --preset or --config_name: hidden_size=256,num_hidden_layers=4 (or JSON)."},
    )
    head_from_embeddings: bool = field(
        default=False,
        metadata={"help": "Random weights: let the head begin as a copy of the embeddings, to which it isn't tied."},
    )
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of a model on the Hub."})
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = field(
        default="float32", metadata={"help": "Type of the weights; auto takes the checkpoint's."}
    )
    attn_implementation: str | None = field(default=None, metadata={"help": "eager, sdpa, flash_attention_2, ..."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run the code that comes with a Hub model."})
    attention_dropout: float | None = field(
        default=None, metadata={"help": "Dropout of attention weights in training; without it the config's."}
    )
    hidden_dropout: float | None = field(
        default=None, metadata={"help": "Dropout of embeddings and sub-layer outputs; without it the config's."}
    )
    tokenizer_name: str | None = field(
        default=None,
        metadata={"help": "Tokenizer of a model with random weights; without it one is trained on the data."},
    )
    vocab_size: int = field(default=8192, metadata={"help": "Size of a tokenizer to be trained, in tokens."})
    tokenizer_generation: str = field(
        default="v3", metadata={"help": "Pre-tokenization and special tokens of a tokenizer to be trained."}
    )

    def __post_init__(self) -> None:
        named = [name for name in ("model_name_or_path", "preset", "config_name") if getattr(self, name)]
        if len(named) > 1:
            raise ValueError(f"--{named[0]} and --{named[1]} both name a model; keep one of them.")
        if self.head_from_embeddings and self.model_name_or_path:
            raise ValueError("--head_from_embeddings needs --preset or --config_name; a pretrained model has one.")
        if self.config_overrides and self.model_name_or_path:
            raise ValueError("--config_overrides needs --preset or --config_name; a pretrained model has its shape.")
        if self.native and not self.model_name_or_path:
            raise ValueError("--native needs --model_name_or_path: which class opens that checkpoint.")
        check_ranges(self)

    @cached_property
    def saved(self) -> "Saved":
        """What --model_name_or_path names, read once.

        Raises:
            ValueError: if it isn't there.
        """
        from .saved import Saved  # which needs transformers, and this file is for --help too

        return Saved.open("model_name_or_path", str(self.model_name_or_path), self.model_revision)

    @property
    def dropouts(self) -> dict[str, float]:
        """The dropout rates that were asked for, by the config's field."""
        rates = {"attention_dropout": self.attention_dropout, "hidden_dropout": self.hidden_dropout}
        return {name: rate for name, rate in rates.items() if rate is not None}


@dataclass
class LoraArguments:
    """Low-rank adapters in place of training every weight."""

    _argument_group_name = "LoRA"

    use_peft: bool = field(default=False, metadata={"help": "Train LoRA adapters and leave the model as it is."})
    lora_target: list[str] | None = field(
        default=None,
        metadata={
            "help": "Groups of weights: attention output dense shared experts router indexer engram mtp embeddings "
            "head all. Without it the first five, where the model has them; peft alone is PEFT's own choice for a "
            "native model.",
            "metavar": "GROUP",
        },
    )
    lora_r: int = field(default=16, metadata={"help": "Rank; for routed experts it is the rank of each expert."})
    lora_alpha: int = field(default=32, metadata={"help": "The update is scaled by lora_alpha / lora_r."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Not possible for the groups experts and router."})
    use_rslora: bool = field(default=False, metadata={"help": "Scale by lora_alpha / sqrt(lora_r)."})
    use_dora: bool = field(default=False, metadata={"help": "DoRA; not possible for the groups experts and router."})
    lora_bias: bool = field(default=False, metadata={"help": "A bias on the adapter; not for experts and router."})
    adapter_off_check: str | None = field(
        default=None,
        metadata={
            "help": "A generated_predictions.jsonl of the base model: after training its prompts are generated again "
            "with the adapter switched off, and the run fails unless every output is equal.",
            "metavar": "FILE",
        },
    )

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.lora_target is not None:
            # YAML and habit also write "attention,dense".
            self.lora_target = [word for words in self.lora_target for word in words.split(",") if word]
        if not self.use_peft and (self.lora_target or self.adapter_off_check):
            flag = "lora_target" if self.lora_target else "adapter_off_check"
            raise ValueError(f"--{flag} has no effect without --use_peft; add it.")


@dataclass
class TrainingFlags:
    """Our defaults for flags of transformers' Seq2SeqTrainingArguments, and flags of ours beside them."""

    _argument_group_name = "training and output"

    output_dir: str | None = field(default=None, metadata={"help": "Folder for the model and its results."})
    do_train: bool = field(default=False, metadata={"help": "Train."})
    do_eval: bool = field(default=False, metadata={"help": "Score the validation split."})
    do_predict: bool = field(default=False, metadata={"help": "Score the test split, and write every prediction."})
    bf16: bool = field(default=False, metadata={"help": "Compute in bfloat16 and keep the weights in float32."})
    push_to_hub: bool = field(default=False, metadata={"help": "Send the result to the Hub; see --hub_model_id."})
    # Both are shown to the model at evaluation: the text that it generates and its loss on the reference.
    predict_with_generate: bool = field(default=True, metadata={"help": "Evaluate by generation, not by loss alone."})
    # The lengths and row numbers beside the model's inputs are ours to use; the collator leaves them out.
    remove_unused_columns: bool = False
    # Rows of like length in one batch: padding costs as much time as text does.
    train_sampling_strategy: Literal["random", "sequential", "group_by_length"] = field(
        default="group_by_length", metadata={"help": "Order of the training rows."}
    )
    # Pinning only helps copies to a GPU: trainer_arguments.py has it true where there is one.
    dataloader_pin_memory: bool = False
    learning_rate: float = field(
        default=0.0,
        metadata={"help": "Peak learning rate; 0 takes 2e-4 for LoRA, 2e-5 for a pretrained model, else 1e-3."},
    )
    optim: str = field(default="adamw_torch_fused", metadata={"help": "adamw_torch_fused, muon, sgd, adafactor, ..."})
    lr_scheduler_type: str = field(
        default="cosine",
        metadata={"help": "cosine, linear, constant_with_warmup, warmup_stable_decay, multi_step, ..."},
    )
    lr_decay_share: float = field(
        default=0.2, metadata={"help": "Share of all steps, at the end, in which warmup_stable_decay lowers the rate."}
    )
    lr_milestones: list[float] = field(
        default_factory=lambda: [0.8, 0.9],
        metadata={"help": "Where multi_step lowers the rate: steps, or below 1 shares of all.", "metavar": "STEP"},
    )
    lr_factor: float = field(default=0.316, metadata={"help": "What multi_step multiplies by at each milestone."})
    router_bias_update: float = field(
        default=0.0,
        metadata={"help": "How far a step moves V3's router biases towards an equal load of the experts; V3: 0.001."},
    )
    l1: float = field(default=0.0, metadata={"help": "L1 penalty on the trained weights without norms and biases."})
    freeze: list[str] | None = field(
        default=None,
        metadata={
            "help": "Groups of weights (see --lora_target) that stay as they are.",
            "metavar": "GROUP",
        },
    )
    train_last_n_layers: int | None = field(
        default=None, metadata={"help": "Train only the last N decoder layers, the final norm and the head."}
    )
    tokens_per_batch: int | None = field(
        default=None,
        metadata={
            "help": "Batches of rows of like length with up to so many tokens on each device, in place of "
            "--per_device_train_batch_size."
        },
    )
    train_minutes: float | None = field(
        default=None,
        metadata={"help": "Train for so many minutes, in place of epochs or steps; schedules run by the time."},
    )
    average_checkpoints: int | None = field(
        default=None, metadata={"help": "At the end, take the mean of the last N checkpoints' weights."}
    )
    generation_num_beams: int | None = field(
        default=None, metadata={"help": "Beams of evaluation and prediction; evaluations during training are greedy."}
    )
    generation_length_penalty: float = field(
        default=1.0, metadata={"help": "Above 1 beam search prefers longer texts, below 1 shorter ones."}
    )
    warmup_steps: float = field(default=0.05, metadata={"help": "Steps, or below 1 the share of all steps."})
    logging_steps: float = field(
        default=50, metadata={"help": "Steps between two losses of the log; the screen shows ten of them."}
    )
    examples_shown: int = field(default=3, metadata={"help": "Predictions that are shown; a file has them all."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints that are kept."})
    early_stopping_patience: int | None = field(
        default=None,
        metadata={"help": "Stop after this many evaluations without a better --metric_for_best_model."},
    )
    cpu_threads: int | None = field(
        default=None,
        metadata={"help": "Threads of torch on a CPU. Tiny models are as fast on one, also on a busy machine."},
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Remove the checkpoints of an earlier run in --output_dir."}
    )
    data_checks: Literal["report", "refuse", "off"] = field(
        default="report", metadata={"help": "Look for faults in the data: count them, or also refuse to run."}
    )
    hub_private_repo: bool = field(default=False, metadata={"help": "Make a new repository on the Hub private."})
    resume_from_checkpoint: str | None = field(
        default=None, metadata={"help": "A checkpoint folder; true takes the last one in --output_dir, if any."}
    )

    def __post_init__(self: Any) -> None:  # it reads flags of transformers too
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
        if self.generation_length_penalty != 1 and (self.generation_num_beams or 1) == 1:
            raise ValueError("--generation_length_penalty has no effect without beams; add --generation_num_beams 5.")

    def _choose_direction(self: Any) -> None:
        """What is better follows from the score's name: transformers takes all but losses for better when higher."""
        score = self.metric_for_best_model or "loss"
        if self.greater_is_better is None and self.metric_for_best_model:
            self.greater_is_better = is_more_better(score)
        elif self.greater_is_better not in (None, is_more_better(score)):
            which, asked = ("more", "false") if is_more_better(score) else ("less", "true")
            raise ValueError(f"--greater_is_better {asked}: of {score} {which} is better; leave the flag out.")
