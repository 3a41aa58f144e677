"""Last stage: what a person reads on the screen; all of it is in files already, or nothing was measured yet."""

import shlex
from datetime import timedelta
from typing import Any

import numpy as np
from datasets import Dataset

from ..optimization import recipe
from ..trainer_arguments import TrainingArguments
from ..weights.freezing import trained_weights, unreached_groups
from ..weights.lora import census_table
from ..weights.muon import multiplies_bfloat16
from .build import Built
from .prepare import Prepared
from .write import Results

SHOWN_CHARACTERS = 160
NO_SCORES = ("_runtime", "_per_second", "_low", "_high", "_preparation_time")
WEIGHTED = "; --config_overrides mtp_loss_weight=0.1 trains it"  # of a model with random weights


def memory_mb(model: Any, moments: int) -> float:
    """Weights, gradients and the optimizer's moments (AdamW: 2) in MB (10^6 bytes); activations come on top."""
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    training = sum(p.numel() * p.element_size() * (1 + moments) for p in model.parameters() if p.requires_grad)
    return (weights + training) / 1e6


def show_plan(prepared: Prepared, built: Built) -> None:
    """What is trained and how, before it begins."""
    args, model = prepared.args, built.model
    print("\n" + census_table(built.census))
    is_adamw = "adamw" in args.optim
    memory = f"about {memory_mb(model, 2 if is_adamw else 0):,.0f} MB for weights and gradients"
    share = f"trained: {built.sizes['parameters_trainable_share']:.1%}"
    print(f"{share}{step_size(args, built)}, {memory}{' and AdamW' * is_adamw}, without activations")
    if args.do_train:
        print(f"trained weights: {trained_weights(model, args)}")
        for group in unreached_groups(model):
            print(f"frozen: {group}, which no loss reaches{WEIGHTED if group == 'mtp' else ''}")
        for name, text in recipe(args, model.config).items():
            print(f"{name}: {text}")
        if args.bf16 and args.use_cpu and not multiplies_bfloat16():
            print("bf16: without instructions for it on this processor, --bf16 false is several times as fast")
    print()


def step_size(args: TrainingArguments, built: Built) -> str:
    """Rows and tokens of an optimizer step, with a comma before it; nothing where there are none to count."""
    train = built.features.get("train")
    if not isinstance(train, Dataset):
        return ""
    batches_per_step = args.gradient_accumulation_steps * args.world_size
    if args.tokens_per_batch:
        return f", up to {batches_per_step * args.tokens_per_batch:,} tokens per step"
    rows = args.train_batch_size * batches_per_step
    return f", {rows} rows or about {rows * float(np.mean(train['length'])):,.0f} tokens per step"


def show(results: Results) -> None:
    """The first predictions, what the task has to say, the scores, and where everything is."""
    prepared = results.prepared
    show_examples(results.lines[: prepared.args.examples_shown])
    for text in results.texts:
        print(f"{text}\n")
    if "train_runtime" in results.numbers:
        print(training_line(results.numbers))
    if table := scores_table(results.numbers):
        print(table)
    print(last_line(prepared))


def show_examples(lines: list[dict[str, Any]]) -> None:
    """Predictions beside their references."""
    for line in lines:
        mark = "=" if line["prediction"] == line["target"] else " "
        print(f"  source      {shortened(line['source'])}\n  reference   {shortened(line['target'])}")
        print(f"{mark} prediction  {shortened(line['prediction'])}\n")


def shortened(value: Any) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}…"


def training_line(numbers: dict[str, Any]) -> str:
    took = str(timedelta(seconds=round(numbers["train_runtime"])))
    speed = numbers.get("train_tokens_per_second")
    tokens = f", {speed:,.0f} tokens a second" if speed else ""
    return f"trained {numbers['epoch']:.3g} epochs in {took}{tokens}; mean loss {numbers['train_loss']:.4g}"


def scores_table(numbers: dict[str, Any]) -> str:
    """The scores of each split beside the baseline's, without intervals and speeds, which the files have."""
    splits = {"eval": "validation", "test": "test", "baseline": "baseline"}
    columns = {
        title: {
            name.removeprefix(f"{split}_"): value
            for name, value in numbers.items()
            if name.startswith(f"{split}_") and isinstance(value, (int, float)) and not name.endswith(NO_SCORES)
        }
        for split, title in splits.items()
    }
    columns = {title: scores for title, scores in columns.items() if scores}
    names = sorted({name for scores in columns.values() for name in scores} - {"samples"})
    if not names:
        return ""
    width = max(map(len, names)) + 2
    lines = [" " * width + "".join(f"{title:>14}" for title in columns)]
    for name in [*names, "samples"]:
        cells = (columns[title].get(name, "") for title in columns)
        lines.append(f"{name:<{width}}" + "".join(f"{f'{cell:.6g}' if cell != '' else '':>14}" for cell in cells))
    return "\n".join(line.rstrip() for line in lines)


def last_line(prepared: Prepared) -> str:
    """Where everything is, and what to type next."""
    folder = shlex.quote(str(prepared.folder))
    following = prepared.task.next_command.format(task=prepared.task.name, folder=folder)
    return f"everything is in {folder}" + f"; next: {following}" * prepared.args.do_train
