"""A task is one file and one line in TASKS: this file holds one, and the command runs it."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset
from transformers import GenerationConfig

import finetune_deepseek
from finetune_deepseek.commands.finetune import finetune
from finetune_deepseek.training.optimization import IGNORED_LABEL
from finetune_deepseek.training.task import CausalCollator, Task
from tests.small_runs import TINY, flags


@dataclass
class UppercaseArguments:
    """Which words."""

    words: list[str] = field(default_factory=list, metadata={"help": "The words."})


class Uppercase(Task):
    """Write a word in capital letters."""

    name = "uppercase"
    arguments_class = UppercaseArguments

    def load_splits(self):
        rows = Dataset.from_list([{"source": word, "target": word.upper()} for word in self.arguments.words])
        return {"train": rows, "test": rows}

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
    monkeypatch.setitem(finetune_deepseek.TASKS, "uppercase", f"{__name__}:Uppercase")
    settings = {name: value for name, value in TINY.items() if name not in ("target_lang", "max_target_length")}
    finetune(["uppercase", *flags(settings | {"output_dir": tmp_path, "max_steps": 40, "words": ["ab", "cat", "go"]})])
    results = json.loads((tmp_path / "all_results.json").read_text())
    assert results["test_right"] == 1
    assert "capital letters" in (tmp_path / "README.md").read_text()
