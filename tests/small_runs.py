"""Small data, and a run of the command inside the test's process."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune_deepseek.commands.parsing.runs import parse_command
from finetune_deepseek.training.run import run_stages
from finetune_deepseek.translation.task import Translation

PAIRS = [("one", "eins"), ("two birds", "zwei Vögel"), ("three", "drei")]

# A model of 60 thousand parameters that still has every mechanism of V3, and settings that learn three rows by heart.
TINY = {
    "preset": "tiny_v3",
    "vocab_size": 300,
    "target_lang": "de",
    "use_cpu": True,
    "disable_tqdm": True,
    "max_target_length": 24,
    "per_device_train_batch_size": 3,
    "learning_rate": 0.01,
    "logging_steps": 1,
}


@pytest.fixture(autouse=True, scope="package")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def write_jsonl(path: Path, pairs: list[tuple[str, str]]) -> Path:
    rows = [{"translation": {"en": source, "de": target}} for source, target in pairs]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def data(tmp_path) -> dict[str, str]:
    """Flags that name the same three rows for every split."""
    path = str(write_jsonl(tmp_path / "rows.jsonl", PAIRS))
    return {f"{split}_file": path for split in ("train", "validation", "test")}


def flags(settings: dict[str, Any]) -> list[str]:
    argv = []
    for name, value in settings.items():
        if isinstance(value, list):
            argv += [f"--{name}", *map(str, value)]
        elif value is not None:
            argv.append(f"--{name}={value}")
    return argv


@pytest.fixture
def finetune():
    """Run `deepseek-hf finetune translation` with `TINY` and the given flags; gives the results."""

    def run(**settings: Any) -> dict[str, Any]:
        argv = flags(TINY | settings)
        return run_stages(Translation, parse_command("translation", Translation.arguments_class, argv))

    return run
