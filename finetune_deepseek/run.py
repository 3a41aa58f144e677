"""The one training path: data, tokenizer, model, LoRA, census, Trainer, scores, files, card, push.

`run(task_class, stage)` does it for every task; a `Task` supplies rows, features, a collator and scores. Generation
happens inside Trainer's evaluation: `FinetuneTrainer.prediction_step` generates from left-padded prompts beside the
loss on the full rows, and returns row numbers in place of labels, so that scores see the references' own text. A task
without a generation config is predicted from the model's logits.
"""

import hashlib
import json
import math
import os
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

import numpy as np
import torch
import yaml
from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel
from safetensors import SafetensorError
from torch.utils.data import Sampler
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    EarlyStoppingCallback,
    EvalPrediction,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    Seq2SeqTrainer,
    Trainer,
    set_seed,
)
from transformers.trainer_utils import SchedulerType, get_last_checkpoint

from configuration_deepseek import DeepSeekConfig
from configuration_deepseek.official import SOURCES
from configuration_deepseek.presets import preset
from modeling_deepseek.register import MODELS_BY_AUTO_CLASS
from tokenization_deepseek import DeepSeekTokenizer, train_tokenizer

from . import model_card
from .arguments import ModelArguments, Stage, TrainingArguments, check_output_dir
from .callbacks import PlotCallback
from .checks import Report, fault_list, report_markdown, report_text
from .freezing import freeze_weights, trained_weights
from .lora import apply_lora, census, census_table
from .optimization import (
    IGNORED_LABEL,
    MULTI_STEP,
    add_l1_gradient,
    l1_norm,
    multi_step_schedule,
    recipe,
    smooth_labels,
    target_losses,
)

PREDICTIONS_FILE = "generated_predictions.jsonl"
DATA_REPORT_FILE = "data_report.json"
EXAMPLES_SHOWN = 10
Rows: TypeAlias = Dataset | IterableDataset


class Task(ABC):
    """What a task supplies. A subclass sets the class variables and is entered in `TASKS`."""

    name: ClassVar[str]
    arguments_class: ClassVar[type]  # the dataclass of its data flags
    recipe: ClassVar[Path | None] = None  # YAML file to run when neither a model nor data is named
    examples: ClassVar[str] = ""  # the end of --help
    auto_class: ClassVar[Any] = AutoModelForCausalLM
    peft_task_type: ClassVar[str] = "CAUSAL_LM"

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

    def config_fields(self, splits: dict[str, Rows], saved: dict[str, Any]) -> dict[str, Any]:
        """Fields of the model's config that the data decide, such as its labels. Called before `features`.

        `saved` is the config.json of the model or adapter that is loaded, empty for random weights.
        """
        return {}

    @abstractmethod
    def features(self, rows: Rows, tokenizer: PreTrainedTokenizerBase, is_training: bool) -> Rows:
        """Model inputs with a `length` in tokens; for evaluation one per row in the rows' order."""

    @abstractmethod
    def collator(self, tokenizer: PreTrainedTokenizerBase) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        """What makes a batch of features."""

    def sampler(self, features: Dataset) -> Sampler[int] | None:
        """The order of the training features, None for that of --train_sampling_strategy."""
        return None

    def loss_function(self, label_smoothing: float) -> Callable[..., torch.Tensor] | None:
        """Trainer's `compute_loss_func`, None for the model's own loss."""
        return None

    def generation_config(self, tokenizer: PreTrainedTokenizerBase, num_beams: int) -> GenerationConfig | None:
        """How to generate at evaluation, None to predict from the model's logits."""
        return None

    def decode(self, outputs: np.ndarray, tokenizer: PreTrainedTokenizerBase) -> list[Any]:
        """One prediction per row, as `score` and JSON take it, from generated tokens [B, T] or from logits."""
        ids = np.where(outputs == IGNORED_LABEL, tokenizer.pad_token_id, outputs)
        return [text.strip() for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]

    @abstractmethod
    def score(self, predictions: list[Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Scores (numbers) and their signatures (texts) of one prediction per row."""

    def check_splits(self, splits: dict[str, Rows], tokenizer: PreTrainedTokenizerBase) -> Report:
        """Faults in the data by split, see checks.py."""
        return {}

    def baseline(self, train: Rows | None, rows: list[dict[str, Any]]) -> list[Any] | None:
        """Predictions of a trivial method to compare with, None for no comparison."""
        return None

    @abstractmethod
    def card_data(self) -> dict[str, Any]:
        """What the model card says about the task and its data; see model_card.py."""


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


@contextmanager
def replaced_folder(folder: Path) -> Iterator[Path]:
    """A folder beside `folder` to write to; its files take their places only when all are written."""
    beside = folder.with_name(f".{folder.name}.saving")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        yield beside
        folder.mkdir(exist_ok=True)
        for path in sorted(beside.rglob("*")):
            target = folder / path.relative_to(beside)
            if path.is_dir():
                target.mkdir(exist_ok=True)
            else:
                os.replace(path, target)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    beside = path.with_name(f".{path.name}.saving")
    try:
        beside.write_text(text, encoding="utf-8")
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def write_json(path: Path, content: dict[str, Any]) -> None:
    write_text(path, json.dumps(content, indent=4, ensure_ascii=False, sort_keys=True) + "\n")


class FinetuneTrainer(Seq2SeqTrainer):
    """Seq2SeqTrainer for decoder-only models, with whole-or-nothing saving and this package's model card.

    Where the loss is a language model's, evaluation reports it as the mean over all target tokens of the split, and
    its exponential as perplexity.
    """

    model: Any
    args: TrainingArguments

    def __init__(
        self,
        *,
        generation_config: GenerationConfig | None,
        sampler: Sampler[int] | None,
        card: Callable[[Path], None],
        is_language_model: bool,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.is_language_model = is_language_model
        self.target_loss, self.target_tokens = 0.0, 0
        if is_language_model and self.args.label_smoothing_factor:
            self.label_smoother = None
            hook = partial(smooth_labels, factor=self.args.label_smoothing_factor)
            self.model.register_forward_hook(hook, with_kwargs=True)
        if isinstance(self.model, PeftModel):
            # The vocabulary is never resized here, so a LoRA on embeddings needs no copy of them in the adapter.
            self.model.save_pretrained = partial(self.model.save_pretrained, save_embedding_layers=False)  # type: ignore
        self.generation = generation_config
        self.sampler = sampler
        self.card = card

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None, **gen_kwargs):  # type: ignore[no-untyped-def]
        """Returns the loss (None without labels), new tokens [B, T] or logits, and row numbers [B]."""
        inputs = self._prepare_inputs(inputs)
        prompt_ids, prompt_mask, rows = (inputs.pop(name, None) for name in ("prompt_ids", "prompt_mask", "row"))
        if self.generation is None:
            loss_only = prediction_loss_only or not self.args.predict_with_generate
            loss, logits, _ = Trainer.prediction_step(self, model, inputs, loss_only)
            return loss, logits, rows
        loss = None
        if "labels" in inputs:
            with torch.no_grad(), self.compute_loss_context_manager():
                loss, outputs = self.compute_loss(model, dict(inputs), return_outputs=True)
            loss = loss.detach().mean()
            if self.is_language_model:
                sums, counts = target_losses(outputs["logits"], inputs["labels"])
                sums, counts = self.accelerator.gather_for_metrics((sums, counts))
                self.target_loss += sum(sums.tolist())
                self.target_tokens += sum(counts.tolist())
        if prediction_loss_only or not self.args.predict_with_generate or prompt_ids is None:
            return loss, None, None
        generated = self.model.generate(
            input_ids=prompt_ids, attention_mask=prompt_mask, generation_config=self.generation
        )
        return loss, generated[:, prompt_ids.shape[1] :], rows

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        self.target_loss, self.target_tokens = 0.0, 0
        output: Any = super().evaluation_loop(*args, **kwargs)
        if self.target_tokens:
            loss = self.target_loss / self.target_tokens
            perplexity = math.exp(loss) if loss < 700 else math.inf  # beyond that a float overflows
            output.metrics.update(prefixed(kwargs["metric_key_prefix"], {"loss": loss, "perplexity": perplexity}))
        return output

    def _regularized_weights(self) -> list[torch.nn.Parameter]:
        """The trained weights that weight decay and L1 take hold of: all but norms and biases."""
        names = set(self.get_decay_parameter_names(self.model))
        return [p for name, p in self.model.named_parameters() if name in names and p.requires_grad]

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if is_new and self.args.l1:
            # The weights are looked up at each step, for sharding replaces them.
            optimizer.register_step_pre_hook(lambda *_: add_l1_gradient(self._regularized_weights(), self.args.l1))
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        if self.args.lr_scheduler_type == MULTI_STEP:
            optimizer = optimizer or self.optimizer
            assert optimizer is not None
            self.lr_scheduler = multi_step_schedule(optimizer, self.args, num_training_steps)
            return self.lr_scheduler
        try:
            return super().create_scheduler(num_training_steps, optimizer)
        except TypeError as error:  # wrong or missing names
            raise ValueError(
                f"--lr_scheduler_type {SchedulerType(self.args.lr_scheduler_type).value} with "
                f"--lr_scheduler_kwargs {json.dumps(self.args.lr_scheduler_kwargs or {})}: {error}."
            ) from error

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.args.l1 and "loss" in logs:
            logs["l1_penalty"] = self.args.l1 * l1_norm(self._regularized_weights())
        super().log(logs, start_time)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return self.sampler or super()._get_train_sampler(train_dataset)

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        # Evaluation rows are sorted by length already; Trainer's own choice would shuffle them.
        return torch.utils.data.SequentialSampler(eval_dataset) if self.args.world_size <= 1 else None

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        # Trainer switches config.use_cache off for its own forwards; a saved model should generate fast.
        config: Any = self.model.config
        use_cache, config.use_cache = config.use_cache, True
        try:
            with replaced_folder(Path(output_dir or self.args.output_dir or "")) as folder:
                super()._save(str(folder), state_dict)
                if isinstance(self.model, PeftModel) and self.model.active_peft_config.modules_to_save:
                    config.save_pretrained(str(folder))  # the base's doesn't know this head's labels
        finally:
            config.use_cache = use_cache

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        try:
            super()._save_checkpoint(model, trial)
        except BaseException:  # a half-written checkpoint would be resumed from
            folder = Path(str(self._get_output_dir(trial=trial))) / f"checkpoint-{self.state.global_step}"
            shutil.rmtree(folder, ignore_errors=True)
            raise

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        if self.is_world_process_zero():
            self.card(Path(str(self.args.output_dir)))


def parse_overrides(text: str | None) -> dict[str, Any]:
    """`hidden_size=64,hidden_act=silu` or a JSON object as a dict with YAML's types."""
    if not text:
        return {}
    if text.lstrip().startswith("{"):
        return yaml.safe_load(text)
    pairs = [pair.partition("=") for pair in text.split(",")]
    for name, equals, _ in pairs:
        if not equals:
            raise ValueError(f"--config_overrides {text}: {name!r} has no value; write name=value,name=value.")
    return {name.strip(): yaml.safe_load(value) for name, _, value in pairs}


@contextmanager
def named_source(flag: str, name: str) -> Iterator[None]:
    """Loading what a flag names: errors say which flag and name, in one line.

    Raises:
        ValueError: for a path that isn't there, and for whatever the loading raises for missing or broken files.
    """
    is_path = Path(name).is_absolute() or name.startswith(".") or name.count("/") > 1
    if is_path and not Path(name).exists():
        raise ValueError(f"--{flag} {name}: no such folder; an id on the Hub is written owner/name.")
    try:
        yield
    except (ValueError, OSError, SafetensorError) as error:
        raise ValueError(f"--{flag} {name}: {' '.join(str(error).split())}") from error


def saved_config(source: str, revision: str) -> dict[str, Any]:
    """The config.json of a folder or a model on the Hub; empty if it has none."""
    try:
        return PreTrainedConfig.get_config_dict(source, revision=revision)[0]
    except OSError:  # a tokenizer's folder, an adapter, or nothing at all: the loader will say
        return {}


def is_deepseek(source: str, revision: str) -> bool:
    """Whether `source` is a DeepSeek checkpoint in our form or a published one.

    Those get this package's classes even where transformers has some of its own: PEFT rewrites LoRA targets of the
    native models, and the native tokenizer loses the beginning-of-sentence token.
    """
    model_type = saved_config(source, revision).get("model_type")
    return model_type in SOURCES and model_type != "llama"


def load_tokenizer(
    arguments: ModelArguments, task: Task, splits: dict[str, Rows], checkpoint: str | None
) -> PreTrainedTokenizerBase:
    """The named tokenizer, the model's, or a new one trained on the data.

    Raises:
        ValueError: if it has no end-of-text token.
    """
    source = arguments.tokenizer_name or checkpoint or arguments.model_name_or_path
    if source:
        flag = "tokenizer_name" if arguments.tokenizer_name else "model_name_or_path"
        with named_source("resume_from_checkpoint" if source == checkpoint else flag, source):
            loader = DeepSeekTokenizer if is_deepseek(source, arguments.model_revision) else AutoTokenizer
            tokenizer = loader.from_pretrained(
                source, revision=arguments.model_revision, trust_remote_code=arguments.trust_remote_code
            )
    else:
        if "train" not in splits:
            raise ValueError("A model with random weights needs a training split or --tokenizer_name.")
        texts = task.tokenizer_texts(splits)
        tokenizer = train_tokenizer(texts, arguments.vocab_size, arguments.tokenizer_generation)
        print(f"trained a tokenizer of {len(tokenizer):,} tokens")
    if tokenizer.eos_token_id is None:
        raise ValueError(f"{source}: this tokenizer has no eos_token, so a model couldn't learn where to end.")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # padding is masked by length, never by id
    return tokenizer


def load_model(
    arguments: ModelArguments,
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    fields: dict[str, Any],
    is_trained: bool,
) -> Any:
    """The pretrained model (with its adapter, if a LoRA folder is named), or one with random weights.

    `fields` are set in its config.

    Raises:
        ValueError: if no model is named, or the tokenizer has more tokens than the model.
    """
    loading: dict[str, Any] = {
        "revision": arguments.model_revision,
        "trust_remote_code": arguments.trust_remote_code,
        "dtype": arguments.dtype,
        "attn_implementation": arguments.attn_implementation,
    }

    def load(source: str) -> Any:
        ours = is_deepseek(source, arguments.model_revision)
        model_class = MODELS_BY_AUTO_CLASS[task.auto_class] if ours else task.auto_class
        if not arguments.dropouts:
            return model_class.from_pretrained(source, **loading, **fields)
        config_class: Any = DeepSeekConfig if ours else AutoConfig
        config = config_class.from_pretrained(
            source, revision=arguments.model_revision, trust_remote_code=arguments.trust_remote_code, **fields
        )
        return model_class.from_pretrained(source, **loading, config=with_dropout(config, arguments))

    path = arguments.model_name_or_path
    model: Any
    if path:
        with named_source("model_name_or_path", path):
            if (Path(path) / "adapter_config.json").is_file():
                model = load(str(PeftConfig.from_pretrained(path).base_model_name_or_path))
                model = PeftModel.from_pretrained(model, path, is_trainable=is_trained)
            else:
                model = load(path)
    elif arguments.preset or arguments.config_name:
        config = make_config(arguments, tokenizer, fields)
        dtype = torch.float32 if arguments.dtype == "auto" else getattr(torch, arguments.dtype)
        kwargs = {"attn_implementation": arguments.attn_implementation} if arguments.attn_implementation else {}
        model = task.auto_class.from_config(
            config, dtype=dtype, trust_remote_code=arguments.trust_remote_code, **kwargs
        )
        if arguments.head_from_embeddings:
            if model.get_output_embeddings() is None:
                raise ValueError(f"--head_from_embeddings: {task.name} models have no head over the vocabulary.")
            # Copying a token is then one map that holds for all of them, as with tied weights, rare ones included.
            model.get_output_embeddings().load_state_dict(model.get_input_embeddings().state_dict())
    else:
        raise ValueError("No model is named: give --model_name_or_path, --preset or --config_name.")
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise ValueError(f"The tokenizer has {len(tokenizer):,} tokens, the model {rows:,}; name the model's own.")
    model.config.pad_token_id = tokenizer.pad_token_id  # a classifier looks for the last token that is no padding
    return model


def make_config(arguments: ModelArguments, tokenizer: PreTrainedTokenizerBase, fields: dict[str, Any]) -> Any:
    """The config for random weights: preset or file, overrides, `fields`, and the tokenizer's size and tokens."""
    overrides = parse_overrides(arguments.config_overrides) | {
        **fields,
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if arguments.preset:
        return with_dropout(preset(arguments.preset, **overrides), arguments)
    assert arguments.config_name is not None
    with named_source("config_name", arguments.config_name):
        config = AutoConfig.from_pretrained(
            arguments.config_name, trust_remote_code=arguments.trust_remote_code, **overrides
        )
    return with_dropout(config, arguments)


def with_dropout(config: Any, arguments: ModelArguments) -> Any:
    """The config with the dropout rates that were asked for.

    Raises:
        ValueError: if this kind of model has no such dropout.
    """
    for name, rate in arguments.dropouts.items():
        if not hasattr(config, name):
            raise ValueError(f"--{name}: a model of model_type {config.model_type!r} has none; leave the flag out.")
        setattr(config, name, rate)
    return config


def choose_work(stage: Stage, splits: dict[str, Rows]) -> None:
    """Set do_train, do_eval, do_predict: as given, or everything that there is data for.

    Raises:
        ValueError: if data is missing for what was asked.
    """
    args = stage.training
    needs = {"do_train": "train", "do_eval": "validation", "do_predict": "test"}
    if not stage.given & set(needs):
        for flag, split in needs.items():
            setattr(args, flag, split in splits)
    for flag, split in needs.items():
        if getattr(args, flag) and split not in splits:
            raise ValueError(f"--{flag}: there is no {split} data, only {', '.join(splits)}; add --{split}_file.")
    if args.do_train and isinstance(splits["train"], IterableDataset) and args.max_steps <= 0:
        raise ValueError("--streaming: the length of a stream is unknown, so give --max_steps.")
    if isinstance(splits.get("train"), IterableDataset):
        args.train_sampling_strategy = "random"  # a stream is read in its own, buffered order


def evaluation_features(task: Task, rows: Rows, tokenizer: PreTrainedTokenizerBase, offset: int) -> Dataset:
    """Features of a scored split, longest first (a batch that doesn't fit shows at once), with row numbers."""
    features = task.features(rows, tokenizer, is_training=False)
    assert isinstance(features, Dataset)
    longest_first = np.argsort(-np.array(features["length"]), kind="stable")
    return features.add_column("row", list(range(offset, offset + len(features)))).select(longest_first)


def numbers(results: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in results.items() if isinstance(value, (int, float))}


def prefixed(prefix: str, scores: dict[str, Any]) -> dict[str, Any]:
    return {f"{prefix}_{name}": value for name, value in scores.items()}


def memory_mb(model: torch.nn.Module, moments: int) -> float:
    """Weights, gradients and the optimizer's moments (AdamW: 2) in MB (10^6 bytes); activations come on top."""
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    training = sum(p.numel() * p.element_size() * (1 + moments) for p in model.parameters() if p.requires_grad)
    return (weights + training) / 1e6


def data_hash(rows: list[dict[str, Any]]) -> str:
    """The first 12 digits of the rows' SHA-256: names the data behind a score."""
    return hashlib.sha256(json.dumps(rows, ensure_ascii=False, sort_keys=True).encode()).hexdigest()[:12]


class Run:
    """One run of one task: the steps of `run`, with what they share."""

    def __init__(self, task_class: type[Task], stage: Stage) -> None:
        self.stage = stage
        self.args: TrainingArguments = stage.training
        self.folder = Path(self.args.output_dir or "")
        self.started = time.monotonic()
        self.results: dict[str, Any] = {}
        if stage.model.preset:  # a wrong name or field should not wait for the data
            preset(stage.model.preset, **parse_overrides(stage.model.config_overrides))
        set_seed(self.args.seed)
        if self.args.cpu_threads:
            torch.set_num_threads(self.args.cpu_threads)
        self.task = task_class(stage.data, self.args.seed)
        self.splits = self.task.load_splits()
        choose_work(stage, self.splits)
        check_output_dir(self.args)
        self.checkpoint = self._find_checkpoint()
        self.tokenizer = load_tokenizer(stage.model, self.task, self.splits, self.checkpoint)
        self.data_report = self._check_data()
        self.model = self._load_model()
        self.features, self.examples = self._make_features()
        self._print_census()
        self.trainer = self._make_trainer()
        self._write_data_report(self.data_report)  # a run that can't begin leaves its folder empty

    def _find_checkpoint(self) -> str | None:
        asked = self.args.resume_from_checkpoint
        if not asked or not self.args.do_train or asked.lower() == "false":
            return None
        if asked.lower() == "true":
            return get_last_checkpoint(str(self.folder))
        if not (Path(asked) / "trainer_state.json").is_file():
            raise ValueError(f"--resume_from_checkpoint {asked}: no checkpoint there (no trainer_state.json).")
        return asked

    def _check_data(self) -> Report:
        """Print the task's report on its data.

        Raises:
            ValueError: if there are faults and --data_checks refuse asks for none.
        """
        mode = self.args.data_checks
        report = {} if mode == "off" else self.task.check_splits(self.splits, self.tokenizer)
        if report:
            print(report_text(report))
        faults = fault_list(report)
        if faults and mode == "refuse":
            self._write_data_report(report)
            raise ValueError(
                f"--data_checks refuse: {faults}. Mend the data ({DATA_REPORT_FILE} has examples), or use "
                "--data_checks report."
            )
        return report

    def _write_data_report(self, report: Report) -> None:
        if report and self.args.process_index == 0:
            write_json(self.folder / DATA_REPORT_FILE, report)

    def _load_model(self) -> Any:
        arguments, lora = self.stage.model, self.stage.lora
        path = arguments.model_name_or_path
        saved = saved_config(path, arguments.model_revision) if path else {}
        fields = self.task.config_fields(self.splits, saved)
        model = load_model(arguments, self.task, self.tokenizer, fields, is_trained=self.args.do_train)
        if isinstance(model, PeftModel):
            print(f"going on with the adapter in {arguments.model_name_or_path}, whose LoRA settings stay")
        elif lora.use_peft:
            model = apply_lora(model, lora, self.task.peft_task_type)
            if lora.use_dora:
                print("DoRA adapters are opened by PeftModel or AutoPeftModel; AutoModel gives other numbers")
        freeze_weights(model, self.args)
        return model

    def _make_features(self) -> tuple[dict[str, Rows], list[dict[str, Any]]]:
        """Features by split, and the text rows of the scored splits, which features name by number."""
        features: dict[str, Rows] = {}
        examples: list[dict[str, Any]] = []
        if self.args.do_train:
            features["train"] = self.task.features(self.splits["train"], self.tokenizer, is_training=True)
        for split, is_used in (("validation", self.args.do_eval), ("test", self.args.do_predict)):
            if is_used:
                features[split] = evaluation_features(self.task, self.splits[split], self.tokenizer, len(examples))
                examples += list(self.splits[split])
        limit = getattr(self.model.config, "max_position_embeddings", None)
        for split, rows in features.items():
            longest = max(rows["length"]) if isinstance(rows, Dataset) else 0
            if limit and longest > limit:
                raise ValueError(
                    f"The longest {split} row has {longest} tokens, the model takes {limit}; lower the length "
                    "limits of the data, or raise max_position_embeddings by --config_overrides."
                )
        return features, examples

    def _print_census(self) -> None:
        groups = census(self.model)
        print("\n" + census_table(groups))
        trainable = sum(group.trainable for group in groups.values())
        self.results |= {
            "parameters_total": sum(group.total for group in groups.values()),
            "parameters_active": sum(group.active for group in groups.values()),
            "parameters_trainable": trainable,
        }
        self.results["parameters_trainable_share"] = trainable / self.results["parameters_total"]
        line = f"trained: {self.results['parameters_trainable_share']:.1%}"
        if isinstance(self.features.get("train"), Dataset):
            mean_length = float(np.mean(self.features["train"]["length"]))
            rows_per_step = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
            line += f", {rows_per_step} rows or about {rows_per_step * mean_length:,.0f} tokens per step"
        is_adamw = "adamw" in self.args.optim
        memory = f"about {memory_mb(self.model, 2 if is_adamw else 0):,.0f} MB for weights and gradients"
        print(f"{line}, {memory}{' and AdamW' if is_adamw else ''}, without activations")
        if self.args.do_train:
            print(f"trained weights: {trained_weights(self.model, self.args)}")
            for name, text in recipe(self.args, self.model.config).items():
                print(f"{name}: {text}")
        print()

    def _make_trainer(self) -> FinetuneTrainer:
        callbacks: list[Any] = [PlotCallback()]
        if self.args.early_stopping_patience is not None:
            callbacks.append(EarlyStoppingCallback(self.args.early_stopping_patience))
        train = self.features.get("train")
        return FinetuneTrainer(
            model=self.model,
            args=self.args,
            train_dataset=train,
            eval_dataset=self.features.get("validation"),
            processing_class=self.tokenizer,
            data_collator=self.task.collator(self.tokenizer),
            compute_loss_func=self.task.loss_function(self.args.label_smoothing_factor),
            compute_metrics=self._compute_metrics if self.args.predict_with_generate else None,
            callbacks=callbacks,
            generation_config=self.task.generation_config(self.tokenizer, self.args.generation_num_beams or 1),
            sampler=self.task.sampler(train) if isinstance(train, Dataset) else None,
            card=self._write_card,
            is_language_model=self.task.auto_class is AutoModelForCausalLM,
        )

    def _predictions(self, output: Any) -> dict[int, Any]:
        """Predictions by row number; a row that several processes predicted counts once."""
        predictions = self.task.decode(output.predictions, self.tokenizer)
        return dict(zip(output.label_ids.tolist(), predictions, strict=True))

    def _compute_metrics(self, output: EvalPrediction) -> dict[str, Any]:
        predictions = self._predictions(output)
        rows = [self.examples[number] for number in predictions]
        return numbers(self.task.score(list(predictions.values()), rows))

    def train(self) -> None:
        if self.args.overwrite_output_dir and self.checkpoint is None:
            for old in self.folder.glob("checkpoint-*"):
                shutil.rmtree(old)
        metrics = self.trainer.train(resume_from_checkpoint=self.checkpoint).metrics
        self.trainer.save_model()
        self.trainer.save_state()
        self._record("train", metrics | self._count("train"))

    def evaluate(self) -> None:
        self._record("eval", self.trainer.evaluate(metric_key_prefix="eval") | self._count("validation", "eval"))

    def predict(self) -> None:
        """Score the test split and its baseline; write and show the predictions."""
        output = self.trainer.predict(self.features["test"], metric_key_prefix="test")
        if output.predictions is None:  # predict_with_generate is off
            self._record("test", (output.metrics or {}) | self._count("test"))
            return
        by_row = sorted(self._predictions(output).items())
        predictions = [prediction for _, prediction in by_row]
        rows = [self.examples[number] for number, _ in by_row]
        results = (output.metrics or {}) | prefixed("test", self.task.score(predictions, rows)) | self._count("test")
        baseline = self.task.baseline(self.splits.get("train"), rows)
        if baseline is not None:
            results |= prefixed("baseline", self.task.score(baseline, rows))
        results["test_data_hash"] = data_hash(rows)
        lines = [row | {"prediction": prediction} for row, prediction in zip(rows, predictions, strict=True)]
        if self.trainer.is_world_process_zero():
            content = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            write_text(self.folder / PREDICTIONS_FILE, content)
            show_examples(lines)
        self._record("test", results)

    def check_adapter_off(self) -> None:
        """Generate a base model's predictions again with the adapter switched off.

        Raises:
            ValueError: if the file can't be used, or an output differs.
        """
        path = Path(self.stage.lora.adapter_off_check or "")
        try:
            rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            prompts, expected = [row["prompt"] for row in rows], [row["prediction"] for row in rows]
        except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(
                f"--adapter_off_check {path}: expected lines with `prompt` and `prediction` ({error!r})."
            ) from error
        # The same features in the same order make the same batches, so that outputs can be equal bit by bit.
        features = evaluation_features(self.task, Dataset.from_list(rows), self.tokenizer, 0)
        self.trainer.compute_metrics = None  # these rows have their own numbers
        with self.model.disable_adapter():
            found = self._predictions(self.trainer.predict(features, metric_key_prefix="off"))
        differing = [number for number in range(len(prompts)) if found[number] != expected[number]]
        if differing:
            number = differing[0]
            raise ValueError(
                f"--adapter_off_check {path}: {len(differing)} of {len(rows)} outputs differ with the adapter off, "
                f"first {expected[number]!r} before and {found[number]!r} now."
            )
        print(f"adapter switched off: all {len(rows):,} outputs equal those in {path}")
        self.results["adapter_off_equal"] = len(rows)

    def _count(self, split: str, prefix: str | None = None) -> dict[str, int]:
        rows = self.splits[split]
        return {f"{prefix or split}_samples": len(rows)} if isinstance(rows, Dataset) else {}

    def _record(self, name: str, results: dict[str, Any]) -> None:
        self.results |= results
        self.trainer.log_metrics(name, numbers(results))
        if self.trainer.is_world_process_zero():
            write_json(self.folder / f"{name}_results.json", results)

    def _write_card(self, folder: Path) -> None:
        card = self.task.card_data() | {"data_checks": report_markdown(self.data_report)}
        model_card.write(card, self.stage, self.model, self.results, self.splits, folder, write_text)

    def finish(self) -> dict[str, Any]:
        """Write all_results.json and the card; push."""
        self.results["wall_time_seconds"] = round(time.monotonic() - self.started, 1)
        if self.trainer.is_world_process_zero():
            write_results(self.folder, self.results, keep_old=not self.args.do_train)
            self._write_card(self.folder)
        if self.args.push_to_hub:
            self.trainer.push_to_hub()
        return self.results


def show_examples(lines: list[dict[str, Any]]) -> None:
    """Print the first predictions beside their references."""
    for line in lines[:EXAMPLES_SHOWN]:
        mark = "=" if line["prediction"] == line["target"] else " "
        print(f"  source      {line['source']}\n  reference   {line['target']}")
        print(f"{mark} prediction  {line['prediction']}\n")


def write_results(folder: Path, results: dict[str, Any], keep_old: bool) -> None:
    """Write all_results.json, on top of what is there if `keep_old`."""
    path = folder / "all_results.json"
    old = json.loads(path.read_text(encoding="utf-8")) if keep_old and path.is_file() else {}
    write_json(path, old | results)


def run(task_class: type[Task], stage: Stage) -> dict[str, Any]:
    """Do one run as its flags say, and return its results (the content of all_results.json).

    Raises:
        ValueError: with one line, for everything in the arguments or the data that can't work.
    """
    the_run = Run(task_class, stage)
    if stage.training.do_train:
        the_run.train()
    if stage.training.do_eval:
        the_run.evaluate()
    if stage.training.do_predict:
        the_run.predict()
    if stage.lora.adapter_off_check:
        the_run.check_adapter_off()
    return the_run.finish()


def run_stages(task_class: type[Task], stages: list[Stage]) -> dict[str, Any]:
    """Run every stage; a named stage's results also go into the first folder's all_results.json, `name_...`."""
    results: dict[str, Any] = {}
    folder = Path(stages[0].training.output_dir or "")
    for number, stage in enumerate(stages, start=1):
        with nullcontext() if stage.training.process_index == 0 else redirect_stdout(None):
            if len(stages) > 1:
                print(f"\n=== stage {number} of {len(stages)}: {stage.training.output_dir} ===")
            stage_results = run(task_class, stage)
        if stage.name:
            own = {key.removeprefix("test_").removeprefix(f"{stage.name}_"): v for key, v in stage_results.items()}
            stage_results = prefixed(stage.name, own)
        results |= stage_results
        if number > 1 and stage.training.process_index == 0:
            write_results(folder, results, keep_old=True)
    return results
