"""Last stage: what a person reads on the screen; all of it is in files already, or nothing was measured yet."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

import numpy as np
from datasets import Dataset

from ..optimization import recipe
from ..task import numbers
from ..trainer_arguments import TrainingArguments
from ..weights.freezing import trained_weights, unreached_groups
from ..weights.lora import census_table
from ..weights.muon import multiplies_bfloat16
from .build import Built
from .prepare import Prepared
from .write import Results

EXAMPLES_SHOWN = 10
WEIGHTED = "; --config_overrides mtp_loss_weight=0.1 trains it"  # of a model with random weights


@contextmanager
def screen(is_shown: bool) -> Iterator[None]:
    """Standard output that takes every character, as an escape where its encoding lacks it; or none at all."""
    if not is_shown:
        with redirect_stdout(None):
            yield
        return
    stream: Any = sys.stdout
    reconfigure, before = getattr(stream, "reconfigure", None), getattr(stream, "errors", "strict")
    if reconfigure:
        reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        if reconfigure:
            reconfigure(errors=before)


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
    """The scores of each part, the first predictions, what the task has to say."""
    show_examples(results.lines)
    for text in results.texts:
        print(f"\n{text}\n")
    for part, scores in results.parts.items():
        results.built.trainer.log_metrics(part, numbers(scores))


def show_examples(lines: list[dict[str, Any]]) -> None:
    """The first predictions beside their references."""
    for line in lines[:EXAMPLES_SHOWN]:
        mark = "=" if line["prediction"] == line["target"] else " "
        print(f"  source      {line['source']}\n  reference   {line['target']}")
        print(f"{mark} prediction  {line['prediction']}\n")
