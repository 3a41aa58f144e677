"""The one training path: data, tokenizer, model, LoRA, census, Trainer, scores, files, card, push.

`run(task_class, stage)` does it for every task; a `Task` (task.py) supplies rows, features, a collator and scores.
"""

import hashlib
import json
import os
import shutil
import time
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    EarlyStoppingCallback,
    EvalPrediction,
    GenerationConfig,
    PreTrainedTokenizerBase,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from configuration_deepseek.presets import preset

from ..data.fault_report import Report, fault_list, report_markdown, report_text
from ..data.files import write_json, write_text
from ..data.hub import check_named
from ..data.sources import Rows
from ..data.table import read_columns
from . import model_card
from .arguments import Stage, TrainingArguments
from .callbacks import PlotCallback
from .loading import load_model, load_tokenizer, parse_overrides, saved_config
from .optimization import recipe
from .task import Task, numbers, prefixed
from .trainer import FinetuneTrainer
from .weights.averaging import average_checkpoints
from .weights.freezing import freeze_weights, trained_weights
from .weights.lora import apply_lora, census, census_table
from .weights.muon import multiplies_bfloat16

PREDICTIONS_FILE = "generated_predictions.jsonl"
DATA_REPORT_FILE = "data_report.json"
EXAMPLES_SHOWN = 10


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


def check_output_dir(training: TrainingArguments) -> None:
    """Make the output folder, or say in one line why it can't be used.

    Raises:
        ValueError: if the path is a file or can't be written, or if it holds checkpoints of an earlier run that is
            neither resumed nor overwritten (Trainer would mix up the two runs' checkpoints).
    """
    folder = Path(training.output_dir or "")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--output_dir {folder}: can't make this folder ({error.strerror}); name another.") from error
    if not os.access(folder, os.W_OK):
        raise ValueError(f"--output_dir {folder}: no right to write there; name another.")
    is_new = training.do_train and not training.resume_from_checkpoint and not training.overwrite_output_dir
    if is_new and any(folder.glob("checkpoint-*")):
        raise ValueError(
            f"--output_dir {folder} holds checkpoints of an earlier run: add --resume_from_checkpoint true, or "
            "--overwrite_output_dir to remove them, or name another folder."
        )


def evaluation_features(task: Task, rows: Rows, tokenizer: PreTrainedTokenizerBase, offset: int) -> Dataset:
    """Features of a scored split, longest first (a batch that doesn't fit shows at once), with row numbers."""
    features = task.features(rows, tokenizer, is_training=False)
    assert isinstance(features, Dataset)
    longest_first = np.argsort(-np.array(features["length"]), kind="stable")
    return features.add_column("row", list(range(offset, offset + len(features)))).select(longest_first)


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
        for flag in ("model_name_or_path", "config_name", "tokenizer_name"):
            if name := getattr(stage.model, flag):
                check_named(flag, name)
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
            print(report_text(report, self.task.fault_names))
        faults = fault_list(report, self.task.fault_names)
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
        self.task.prepare_model(model.get_base_model() if isinstance(model, PeftModel) else model, self.tokenizer)
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
            batches_per_step = self.args.gradient_accumulation_steps * self.args.world_size
            if self.args.tokens_per_batch:
                line += f", up to {batches_per_step * self.args.tokens_per_batch:,} tokens per step"
            else:
                rows = self.args.train_batch_size * batches_per_step
                mean_length = float(np.mean(self.features["train"]["length"]))
                line += f", {rows} rows or about {rows * mean_length:,.0f} tokens per step"
        is_adamw = "adamw" in self.args.optim
        memory = f"about {memory_mb(self.model, 2 if is_adamw else 0):,.0f} MB for weights and gradients"
        print(f"{line}, {memory}{' and AdamW' if is_adamw else ''}, without activations")
        if self.args.do_train:
            print(f"trained weights: {trained_weights(self.model, self.args)}")
            for name, text in recipe(self.args, self.model.config).items():
                print(f"{name}: {text}")
            if self.args.bf16 and self.args.use_cpu and not multiplies_bfloat16():
                print("bf16: without instructions for it on this processor, --bf16 false is several times as fast")
        print()

    def _generation_config(self) -> GenerationConfig | None:
        generation = self.task.generation_config(self.tokenizer, self.args.generation_num_beams or 1)
        if generation is not None:
            generation.length_penalty = self.args.generation_length_penalty
        return generation

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
            generation_config=self._generation_config(),
            sampler=self.task.sampler(train) if isinstance(train, Dataset) else None,
            card=self._write_card,
            save_beside=self.task.save_beside,
            is_language_model=self.task.auto_class is AutoModelForCausalLM,
            task=self.task,
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
            with self.args.main_process_first(local=False, desc="removal of old checkpoints"):
                for old in self.folder.glob("checkpoint-*"):
                    shutil.rmtree(old)
        metrics = self.trainer.train(resume_from_checkpoint=self.checkpoint).metrics
        train = self.features["train"]
        if isinstance(train, Dataset) and self.checkpoint is None:
            tokens = metrics["epoch"] * sum(train["length"])  # without padding
            metrics["train_tokens_per_second"] = round(tokens / metrics["train_runtime"], 1)
        if self.args.average_checkpoints:
            self.trainer.accelerator.wait_for_everyone()  # the first process may still be saving the last one
            average_checkpoints(self.model, self.folder, self.args.average_checkpoints)
        self.trainer.save_model()
        self.trainer.save_state()
        self._record("train", metrics | self._count("train"))

    def evaluate(self) -> None:
        results = self.trainer.evaluate(metric_key_prefix="eval") | self._count("validation", "eval")
        self._record("eval", results | self.task.after_evaluation(self.folder))

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
            results |= self.task.report(predictions, rows, self.splits.get("train"), self.folder)
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
            columns = read_columns(str(path))
            prompts, expected = columns["prompt"], columns["prediction"]
        except (ValueError, KeyError) as error:
            raise ValueError(
                f"--adapter_off_check {path}: expected lines with `prompt` and `prediction` ({error!r})."
            ) from error
        # The same features in the same order make the same batches, so that outputs can be equal bit by bit.
        features = evaluation_features(self.task, Dataset.from_dict(columns), self.tokenizer, 0)
        self.trainer.compute_metrics = None  # these rows have their own numbers
        with self.model.disable_adapter():
            found = self._predictions(self.trainer.predict(features, metric_key_prefix="off"))
        differing = [number for number in range(len(prompts)) if found[number] != expected[number]]
        if differing:
            number = differing[0]
            raise ValueError(
                f"--adapter_off_check {path}: {len(differing)} of {len(prompts)} outputs differ with the adapter off, "
                f"first {expected[number]!r} before and {found[number]!r} now."
            )
        print(f"adapter switched off: all {len(prompts):,} outputs equal those in {path}")
        self.results["adapter_off_equal"] = len(prompts)

    def _count(self, split: str, prefix: str | None = None) -> dict[str, int]:
        rows = self.splits[split]
        return {f"{prefix or split}_samples": len(rows)} if isinstance(rows, Dataset) else {}

    def _record(self, name: str, results: dict[str, Any]) -> None:
        self.results |= results
        self.trainer.log_metrics(name, numbers(results))
        if self.trainer.is_world_process_zero():
            write_json(self.folder / f"{name}_results.json", results)

    def _write_card(self, folder: Path) -> None:
        checks = report_markdown(self.data_report, self.task.fault_names)
        card = self.task.card_data() | {"data_checks": checks}
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
