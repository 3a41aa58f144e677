"""What a task is to the training path: rows, features, a collator, scores."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerBase

from tokenization_deepseek import train_tokenizer

from ..data.fault_report import CHECKS, Report
from ..data.ranges import RANGES
from ..data.sources import Rows
from .arguments import ModelArguments
from .optimization import IGNORED_LABEL, target_losses
from .saved import Saved
from .scoring.eval_loss import Predicted
from .trainer_arguments import TrainingArguments

# In the order in which a run first calls them: each may rely on what those before it have set.
HOOKS = (
    # data and tokenizer
    *("load_splits", "check_saved", "needs_new_tokenizer", "new_tokenizer", "tokenizer_texts"),
    *("config_fields", "check_native", "model_config", "prepare_model", "fit_lengths"),  # the model
    "check_splits",
    *("features", "prompts", "max_steps", "collator", "loss_function", "generation_config"),  # the trainer
    *("row_weights", "settings", "save_beside", "card_data"),  # training; the card anew whenever more is known
    *("predict_batch", "decode", "score", "split_loss", "after_evaluation"),  # the validation split
    *("baseline", "report"),  # the test split
)


@dataclass
class Scores:
    """What was measured, or a part of it.

    Attributes:
        numbers: results by name, as the JSON files have them; texts such as signatures too.
        lines: rows with their `prediction`.
        files: what else goes into the run's folder, by name: texts and pictures.
        text: lines for the screen.
        fault: why the run fails, once everything is written.
    """

    numbers: dict[str, Any]
    lines: list[dict[str, Any]] = field(default_factory=list)
    files: Mapping[str, str | bytes] = field(default_factory=dict)
    text: str = ""
    fault: str = ""


class Task(ABC):
    """What a task supplies, by the hooks in `HOOKS`. A subclass sets the class variables and is entered in `TASKS`."""

    name: ClassVar[str]
    arguments_class: ClassVar[type]  # the dataclass of its flags, a `TaskFlags`, in a file that imports nothing heavy
    next_command: ClassVar[str] = "deepseek-hf predict {task} {folder} --test_file FILE"  # said when a run has ended
    auto_class: Any = AutoModelForCausalLM
    tokenizer_class: Any = None  # that of its saved models, None for the model's own
    peft_task_type: str | None = "CAUSAL_LM"
    grows_vocabulary: ClassVar[bool] = False  # whether a saved language model gets the tokens that it lacks
    counts: Mapping[str, dict[str, int]] = MappingProxyType({})  # of a split's text and features, for the results
    fault_names: ClassVar[dict[str, str]] = CHECKS  # what is said of a fault in the data, see data/fault_report.py

    def __init__(self, arguments: Any, seed: int) -> None:
        self.arguments = arguments
        self.seed = seed

    @abstractmethod
    def load_splits(self) -> dict[str, Rows]:
        """Rows by split: some of train, validation, test. Only train may be a stream.

        A row has `source` and `target`, which are shown beside the prediction, and what else the task needs.
        """

    @abstractmethod
    def tokenizer_texts(self, splits: dict[str, Rows]) -> Iterator[str]:
        """Texts to train a tokenizer on."""

    def new_tokenizer(self, arguments: ModelArguments, splits: dict[str, Rows]) -> PreTrainedTokenizerBase:
        """The tokenizer of a model with random weights."""
        tokenizer = train_tokenizer(self.tokenizer_texts(splits), arguments.vocab_size, arguments.tokenizer_generation)
        print(f"trained a tokenizer of {len(tokenizer):,} tokens")
        return tokenizer

    def needs_new_tokenizer(self, saved: Saved) -> bool:
        """Whether a saved model has no tokenizer that this task could use, so that it gets a new one."""
        return False

    def check_saved(self, saved: Saved, is_trained: bool) -> None:
        """Look at the model that the run begins with, before it is loaded.

        Raises:
            ValueError: if it was made for another task, or has another head and isn't to be trained.
        """
        saved.check_task(self.name, self.auto_class.__name__.removeprefix("AutoModelFor"), is_trained)

    def settings(self) -> dict[str, Any]:
        """What a trained model depends on beside its config: saved with it, and read by evaluate, predict and the
        verbs that use it (see saved.py)."""
        return {name: getattr(self.arguments, name) for name in getattr(self.arguments_class, "SAVED", ())}

    def model_config(self, config: Any) -> Any:
        """The config of a model with random weights, made of what was asked for."""
        return config

    def config_fields(self, splits: dict[str, Rows], saved: dict[str, Any]) -> dict[str, Any]:
        """Fields of the model's config that the data decide, such as its labels. Called before `features`.

        `saved` is the config.json of the model or adapter that is loaded, empty for random weights.
        """
        return {}

    def check_native(self, fields: dict[str, Any]) -> None:
        """Refuse those of the `config_fields` that transformers' own class (--native) would pass over silently."""
        return

    def prepare_model(self, model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
        """Change the model as the data want it. Called before `features`, and before an adapter is attached."""
        return

    def save_beside(self, folder: Path) -> None:
        """Write what a saved model needs beside its weights and tokenizer, into its folder."""
        return

    def fit_lengths(self, positions: int, tokenizer: PreTrainedTokenizerBase) -> None:
        """Lower the length limits that a model of so many positions doesn't hold (see `lower`), before `features`."""
        return

    @abstractmethod
    def features(self, rows: Rows, tokenizer: PreTrainedTokenizerBase, is_training: bool) -> Rows:
        """Model inputs with a `length` in tokens; for evaluation one per row in the rows' order.

        Where a training row is padded in several parts, their `sizes` say how (see `TokenBatchSampler`).
        """

    def prompts(self, rows: Rows, tokenizer: PreTrainedTokenizerBase) -> Dataset | None:
        """Where the test split is scored by its loss alone, what is to be continued: `prompt_ids`, `source`, `target`.

        None where `features` has the prompts, or nothing is generated.
        """
        return None

    def max_steps(self, args: TrainingArguments) -> int | None:
        """Optimizer steps by the task's own flags, None for what `args` say."""
        return None

    @abstractmethod
    def collator(self, tokenizer: PreTrainedTokenizerBase) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        """What makes a batch of features."""

    def row_weights(self, features: Dataset) -> torch.Tensor | None:
        """How often each training feature is drawn beside the others, None for each once in an epoch."""
        return None

    def loss_function(self, label_smoothing: float) -> Callable[..., torch.Tensor] | None:
        """Trainer's `compute_loss_func`, None for the model's own loss."""
        return None

    def generation_config(self, tokenizer: PreTrainedTokenizerBase, num_beams: int) -> GenerationConfig | None:
        """How to generate at evaluation, None where `predict_batch` gives the outputs."""
        return None

    def predict_batch(self, model: Any, inputs: dict[str, Any]) -> Predicted:
        """Losses and outputs of an evaluation batch, here a language model's losses on its labels (if there are any);
        where there are no outputs, they are generated."""
        if "labels" not in inputs:
            return Predicted()
        outputs = model(**{name: value for name, value in inputs.items() if name != "labels"})
        return Predicted(*target_losses(outputs["logits"], inputs["labels"]), is_text=True)

    def split_loss(self, outputs: np.ndarray) -> float | None:
        """The loss of a whole split's outputs, where it isn't a sum over rows: a contrastive one, for example."""
        return None

    def decode(self, outputs: np.ndarray, tokenizer: PreTrainedTokenizerBase) -> list[Any]:
        """One prediction per row, as `score` and JSON take it, from generated tokens [B, T] or from logits."""
        return generated_texts(outputs, tokenizer)

    @abstractmethod
    def score(self, predictions: list[Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Scores (numbers) and their signatures (texts) of one prediction per row."""

    def after_evaluation(self) -> Scores:
        """What is chosen by the validation split once it is scored (--do_eval), before the card is written; its files
        are what the model in the folder needs of it."""
        return Scores({})

    def check_splits(self, splits: dict[str, Rows], tokenizer: PreTrainedTokenizerBase) -> Report:
        """Faults in the data by split, under names of `fault_names`."""
        return {}

    def baseline(self, train: Rows | None, rows: list[dict[str, Any]]) -> list[Any] | None:
        """Predictions of a trivial method to compare with, None for no comparison."""
        return None

    def report(self, predictions: list[Any], rows: list[dict[str, Any]], train: Rows | None) -> Scores:
        """Further results of the test split, with files and lines of its own; asked of the first process alone."""
        return Scores({})

    @abstractmethod
    def card_data(self) -> dict[str, Any]:
        """What the model card says about the task and its data; see model_card.py."""


def generated_texts(outputs: np.ndarray, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The texts of generated tokens [B, T]."""
    ids = np.where(outputs == IGNORED_LABEL, tokenizer.pad_token_id, outputs)
    return [text.strip() for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]


# Of a model's generation config, which fills what isn't said: other returns than one row of ids for each prompt.
ONLY_IDS = {"return_dict_in_generate": False, "num_return_sequences": 1}
ONLY_IDS |= dict.fromkeys(GenerationConfig.extra_output_flags, False)


def beam_search(
    tokenizer: PreTrainedTokenizerBase, max_new_tokens: int, num_beams: int, stop_text: str | None = None
) -> GenerationConfig:
    """Greedy generation, or by beams, until the end of text or `stop_text`."""
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        num_beams=num_beams,
        do_sample=False,
        use_cache=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        stop_strings=stop_text,
        **ONLY_IDS,
    )


class CausalCollator:
    """Pads a batch for a causal model: full rows on the right, generation prompts (if any) on the left."""

    def __init__(self, pad_token_id: int) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = {}
        if "input_ids" in features[0]:
            batch["input_ids"], batch["attention_mask"] = self._pad([f["input_ids"] for f in features])
            labels, _ = self._pad([f["labels"] for f in features])
            batch["labels"] = labels.masked_fill(batch["attention_mask"] == 0, IGNORED_LABEL)
        if "prompt_ids" in features[0]:
            prompts = [f["prompt_ids"] for f in features]
            batch["prompt_ids"], batch["prompt_mask"] = self._pad(prompts, left=True)
        if "row" in features[0]:
            batch["row"] = torch.tensor([f["row"] for f in features])
        return batch

    def _pad(self, rows: list[list[int]], left: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and attention mask, both [B, T] with the longest row's T."""
        width = max(map(len, rows))
        ids = torch.full((len(rows), width), self.pad_token_id)
        mask = torch.zeros_like(ids)
        for index, row in enumerate(rows):
            place = slice(width - len(row), width) if left else slice(len(row))
            ids[index, place] = torch.tensor(row, dtype=ids.dtype)
            mask[index, place] = 1
        return ids, mask


def lower(arguments: Any, positions: int, note: Callable[[str], Any] = print, **limits: int) -> None:
    """Lower flags to limits that a model of so many positions sets; `note` gets a line for each that was above.

    Raises:
        ValueError: for a limit that the flag doesn't take: the model is too small.
    """
    for name, limit in limits.items():
        asked, (words, fits) = getattr(arguments, name), RANGES[name]
        if asked > limit:
            if not fits(limit):
                raise ValueError(
                    f"--{name} must be {words}, and the model's {positions} positions (max_position_embeddings) leave "
                    f"room for {max(0, limit)}; take a model with more."
                )
            note(f"--{name} {asked} becomes {limit}: the model has {positions} positions (max_position_embeddings)")
            setattr(arguments, name, limit)


def numbers(results: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in results.items() if isinstance(value, (int, float))}


def prefixed(prefix: str, scores: dict[str, Any]) -> dict[str, Any]:
    return {f"{prefix}_{name}": value for name, value in scores.items()}
