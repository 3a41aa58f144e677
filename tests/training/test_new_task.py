"""A task is one file and one line in TASKS: this file holds one, and the command runs it."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any

from datasets import Dataset
from transformers import GenerationConfig

import finetune_deepseek
from finetune_deepseek import Entry
from finetune_deepseek.commands.finetune import finetune
from finetune_deepseek.commands.parsing.runs import parse_command
from finetune_deepseek.data.arguments import TaskFlags
from finetune_deepseek.training.optimization import IGNORED_LABEL
from finetune_deepseek.training.run import run_stages
from finetune_deepseek.training.task import HOOKS, CausalCollator, Task
from tests.small_runs import TINY, flags


@dataclass
class UppercaseArguments(TaskFlags):
    """Which words."""

    words: list[str] = field(default_factory=list, metadata={"help": "The words."})


class Uppercase(Task):
    """Write a word in capital letters."""

    name = "uppercase"
    arguments_class = UppercaseArguments

    def load_splits(self):
        rows = Dataset.from_list([{"source": word, "target": word.upper()} for word in self.arguments.words])
        return {"train": rows, "validation": rows, "test": rows}

    def tokenizer_texts(self, splits) -> Iterator[str]:
        for row in splits["train"]:
            yield f"{row['source']}>{row['target']}"

    def features(self, rows, tokenizer, is_training):
        def encode(row: dict[str, str]) -> dict[str, Any]:
            prompt = tokenizer(f"{row['source']}>")["input_ids"]
            target = [*tokenizer(row["target"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
            features = {
                "input_ids": prompt + target,
                "labels": [IGNORED_LABEL] * len(prompt) + target,
                "length": len(prompt + target),
            }
            return features if is_training else features | {"prompt_ids": prompt}

        return rows.map(encode, remove_columns=["source", "target"])

    def collator(self, tokenizer):
        return CausalCollator(tokenizer.pad_token_id)

    def generation_config(self, tokenizer, num_beams):
        return GenerationConfig(
            max_new_tokens=8, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
        )

    def score(self, predictions, rows):
        return {"right": sum(p == row["target"] for p, row in zip(predictions, rows, strict=True)) / len(rows)}

    def card_data(self):
        return {
            "language": ["en"], "pipeline_tag": "text-generation", "datasets": [], "dataset_name": "words",
            "metrics": {"right": ("exact_match", "right")}, "baseline": "-", "title": "capital letters",
            "prompt": "word>", "data": "", "preprocessing": "none",
        }  # fmt: skip


def test_a_task_is_one_file_and_one_line(tmp_path, monkeypatch):
    entry = Entry(f"{__name__}:Uppercase", f"{__name__}:UppercaseArguments")
    monkeypatch.setitem(finetune_deepseek.TASKS, "uppercase", entry)
    settings = {name: value for name, value in TINY.items() if name not in ("target_lang", "max_target_length")}
    finetune(["uppercase", *flags(settings | {"output_dir": tmp_path, "max_steps": 40, "words": ["ab", "cat", "go"]})])
    results = json.loads((tmp_path / "all_results.json").read_text())
    assert results["test_right"] == 1
    assert "capital letters" in (tmp_path / "README.md").read_text()


def recorded(calls: list[str]) -> type[Uppercase]:
    """The task, which writes down the first call of each hook."""

    def wrap(name: str):
        def hook(self, *args, **kwargs):
            if name not in calls:
                calls.append(name)
            return getattr(super(task, self), name)(*args, **kwargs)

        return hook

    task = type("Recorded", (Uppercase,), {name: wrap(name) for name in HOOKS})
    return task


def run(calls: list[str], settings: dict[str, Any]) -> None:
    task = recorded(calls)
    run_stages(task, parse_command(task.name, task.arguments_class, flags(settings)))


def test_hooks_are_called_in_the_order_that_is_written_down(tmp_path):
    """A hook may rely on what those before it have set, so the order is part of what a task is promised."""
    hooks = {name for name, value in vars(Task).items() if isinstance(value, FunctionType) and name != "__init__"}
    assert hooks == set(HOOKS)
    settings = {name: value for name, value in TINY.items() if name not in ("target_lang", "max_target_length")}
    settings |= {"words": ["ab", "cat"], "max_steps": 1, "save_strategy": "no"}
    calls: list[str] = []
    run(calls, settings | {"output_dir": tmp_path / "new"})
    assert calls == [name for name in HOOKS if name not in ("check_saved", "needs_new_tokenizer", "check_native")]
    calls.clear()
    saved = settings | {"output_dir": tmp_path / "again", "model_name_or_path": tmp_path / "new", "preset": None}
    run(calls, saved | {"vocab_size": None, "native": True})
    new_only = ("new_tokenizer", "tokenizer_texts", "model_config")
    assert calls == [name for name in HOOKS if name not in new_only]
