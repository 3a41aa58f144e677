"""Second stage: tokenizer, model, features and Trainer, ready for the first step."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM, EarlyStoppingCallback, GenerationConfig, PreTrainedTokenizerBase

from ...data.fault_report import Report, fault_list, report_text
from ...data.files import write_json
from ...data.sources import Rows
from .. import saved
from ..batches import ResumableStream
from ..callbacks import PlotCallback, StreamPosition
from ..loading import load_model, load_tokenizer
from ..trainer import FinetuneTrainer
from ..weights.averaging import EnoughCheckpoints
from ..weights.freezing import freeze_unreached, freeze_weights
from ..weights.lora import GroupCensus, apply_lora, census
from .predictions import Scorer, evaluation_features
from .prepare import Prepared
from .screen import LONG, dataset_bars

PROMPTS = "prompts"  # the features that `Task.prompts` gives
DATA_REPORT_FILE = "data_report.json"


@dataclass(frozen=True)
class Built:
    """What is trained and scored.

    Attributes:
        features: model inputs by split.
        examples: the text rows of the scored splits, which features name by number.
        data_report: faults in the data; empty where nobody looked.
        census: parameters by group of weights.
    """

    tokenizer: PreTrainedTokenizerBase
    model: Any
    features: dict[str, Rows]
    examples: list[dict[str, Any]]
    data_report: Report
    census: dict[str, GroupCensus]
    scorer: Scorer
    trainer: FinetuneTrainer

    @property
    def sizes(self) -> dict[str, Any]:
        """The census in results."""
        total = sum(group.total for group in self.census.values())
        trainable = sum(group.trainable for group in self.census.values())
        return {
            "parameters_total": total,
            "parameters_active": sum(group.active for group in self.census.values()),
            "parameters_trainable": trainable,
            "parameters_trainable_share": trainable / total,
        }


def build(prepared: Prepared) -> Built:
    """Make everything that the run works with.

    Raises:
        ValueError: with one line, for what doesn't fit: model, tokenizer, data, lengths, options of training.
    """
    tokenizer = load_tokenizer(prepared.stage.model, prepared.task, prepared.splits, prepared.checkpoint)
    model = build_model(prepared, tokenizer)
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions:
        prepared.task.fit_lengths(positions, tokenizer)
    report = check_data(prepared, tokenizer)  # by the lengths that hold
    features, examples = make_features(prepared, tokenizer)
    check_lengths(features, positions)
    scorer = Scorer(prepared.task, tokenizer, examples)
    trainer = make_trainer(prepared, tokenizer, model, features, scorer)
    write_data_report(prepared, report)  # a run that can't begin leaves its folder empty
    return Built(tokenizer, model, features, examples, report, census(model), scorer, trainer)


def check_data(prepared: Prepared, tokenizer: PreTrainedTokenizerBase) -> Report:
    """Print the task's report on its data.

    Raises:
        ValueError: if there are faults and --data_checks refuse asks for none.
    """
    mode, names = prepared.args.data_checks, prepared.task.fault_names
    report = {} if mode == "off" else prepared.task.check_splits(prepared.splits, tokenizer)
    if report:
        print(report_text(report, names))
    faults = fault_list(report, names)
    if faults and mode == "refuse":
        write_data_report(prepared, report)
        raise ValueError(
            f"--data_checks refuse: {faults}. Mend the data ({DATA_REPORT_FILE} has examples), or use "
            "--data_checks report."
        )
    return report


def write_data_report(prepared: Prepared, report: Report) -> None:
    if report and prepared.args.process_index == 0:
        write_json(prepared.folder / DATA_REPORT_FILE, report)


def build_model(prepared: Prepared, tokenizer: PreTrainedTokenizerBase) -> Any:
    """The model as it is trained: with what the data decide, its adapter, its frozen weights."""
    task, arguments, lora = prepared.task, prepared.stage.model, prepared.stage.lora
    begun = prepared.saved
    fields = task.config_fields(prepared.splits, begun.config if begun else {})
    model = load_model(arguments, task, tokenizer, fields, is_trained=prepared.args.do_train)
    task.prepare_model(model.get_base_model() if isinstance(model, PeftModel) else model, tokenizer)
    if isinstance(model, PeftModel):
        print(f"going on with the adapter in {arguments.model_name_or_path}, whose LoRA settings stay")
    elif lora.use_peft:
        model = apply_lora(model, lora, task.peft_task_type)
        model.active_peft_config.revision = begun.commit if begun else None
        if lora.use_dora:
            print("DoRA adapters are opened by PeftModel or AutoPeftModel; AutoModel gives other numbers")
    freeze_weights(model, prepared.args)
    if prepared.args.do_train:
        freeze_unreached(model)
    return model


def make_features(
    prepared: Prepared, tokenizer: PreTrainedTokenizerBase
) -> tuple[dict[str, Rows], list[dict[str, Any]]]:
    """Features by split, and the text rows of the scored splits, which features name by number."""
    args, task, splits = prepared.args, prepared.task, prepared.splits
    features: dict[str, Rows] = {}
    examples: list[dict[str, Any]] = []
    if args.do_train:
        with dataset_bars(isinstance(splits["train"], Dataset) and len(splits["train"]) >= LONG):
            features["train"] = task.features(splits["train"], tokenizer, is_training=True)
    for split, is_used in (("validation", args.do_eval), ("test", args.do_predict)):
        if is_used:
            features[split] = evaluation_features(task, splits[split], tokenizer, len(examples))
            examples += list(splits[split])
    prompts = task.prompts(splits["test"], tokenizer) if args.do_predict else None
    if prompts is not None:
        features[PROMPTS] = prompts.add_column("row", [len(examples) + number for number in range(len(prompts))])
        examples += list(prompts.select_columns(["source", "target"]))
    if prepared.off_rows:
        features["adapter-off"] = off_features(prepared, tokenizer)
    return features, examples


def off_features(prepared: Prepared, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Features of --adapter_off_check: the same in the same order make the same batches, so that outputs can be equal.

    Raises:
        ValueError: if the rows are not of this task.
    """
    try:
        return evaluation_features(prepared.task, Dataset.from_list(prepared.off_rows), tokenizer, 0)
    except (KeyError, TypeError, AttributeError, pa.ArrowInvalid) as error:
        path = prepared.stage.lora.adapter_off_check
        raise ValueError(f"--adapter_off_check {path}: these are no rows of this task ({error!r}).") from error


def check_lengths(features: dict[str, Rows], limit: int | None) -> None:
    """Hold the longest rows against the model's positions.

    Raises:
        ValueError: if a row has more tokens than the model takes.
    """
    for split, rows in features.items():
        longest = max(rows["length"]) if isinstance(rows, Dataset) else 0
        if limit and longest > limit:
            raise ValueError(
                f"The longest {split} row has {longest} tokens, the model takes {limit}; lower the length "
                "limits of the data, or raise max_position_embeddings by --config_overrides."
            )


def generation_config(prepared: Prepared, tokenizer: PreTrainedTokenizerBase) -> GenerationConfig | None:
    generation = prepared.task.generation_config(tokenizer, prepared.args.generation_num_beams or 1)
    if generation is not None:
        generation.length_penalty = prepared.args.generation_length_penalty
    return generation


def save_beside(prepared: Prepared, model: Any, folder: Path) -> None:
    """Write what a saved model needs beside its weights and tokenizer."""
    write_record(prepared, model, folder)
    prepared.task.save_beside(folder)


def write_record(prepared: Prepared, model: Any, folder: Path) -> None:
    """Write the task, its settings, and what training has made of an adapter's base: see saved.py."""
    task, begun = prepared.task, prepared.saved
    if begun and isinstance(model, PeftModel):
        architecture = type(model.get_base_model()).__name__
        config = model.config.to_dict()
        saved.write(folder, task.name, task.settings(), begun.base or begun, config, architecture)
    else:
        saved.write(folder, task.name, task.settings())


def make_trainer(
    prepared: Prepared,
    tokenizer: PreTrainedTokenizerBase,
    model: Any,
    features: dict[str, Rows],
    scorer: Scorer,
) -> FinetuneTrainer:
    args, task = prepared.args, prepared.task
    callbacks: list[Any] = [PlotCallback()]
    if args.early_stopping_patience is not None:
        callbacks.append(EarlyStoppingCallback(args.early_stopping_patience))
    if args.average_checkpoints:
        callbacks.append(EnoughCheckpoints(args.average_checkpoints))
    train = features.get("train")
    args.max_steps = task.max_steps(args) or args.max_steps
    if isinstance(train, ResumableStream):
        args.ignore_data_skip = True  # it goes on by itself
        rows_per_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        callbacks.append(StreamPosition(train, rows_per_step))
    return FinetuneTrainer(
        model=model,
        args=args,
        train_dataset=train,
        eval_dataset=features.get("validation"),
        processing_class=tokenizer,
        data_collator=task.collator(tokenizer),
        compute_loss_func=task.loss_function(args.label_smoothing_factor),
        compute_metrics=scorer if args.predict_with_generate else None,
        callbacks=callbacks,
        generation_config=generation_config(prepared, tokenizer),
        save_beside=partial(save_beside, prepared, model),
        is_language_model=task.auto_class is AutoModelForCausalLM,
        task=task,
    )
