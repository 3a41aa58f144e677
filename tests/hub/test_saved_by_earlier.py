"""Runs of an earlier commit, whose cards hold what is now in deepseek_hf.json: models and adapters open as before."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

PAIRS = [("one", "eins"), ("two birds", "zwei Vögel"), ("three", "drei")]
TINY = ["--preset", "tiny_v3", "--vocab_size", "300"]
COMMON = ["--use_cpu", "True", "--disable_tqdm", "True", "--max_steps", "8", "--learning_rate", "0.01"]
# name -> task, flags
RUNS = {
    "model": ("translation", [*TINY, "--target_lang", "de", "--max_target_length", "24"]),
    "adapter": (
        "translation",
        [*("--model_name_or_path", "model", "--use_peft", "True", "--target_lang", "de"), "--max_target_length", "20"],
    ),
    "vectors": (
        "embedding",
        [*("--model_name_or_path", "model", "--use_peft", "True", "--pooling", "last_token"),
         *("--query_prefix", "q: ", "--query_column", "en", "--passage_column", "de")],
    ),
    "labels": (
        "classification",
        ["--model_name_or_path", "model", "--use_peft", "True", "--text_column", "en", "--label_column", "de"],
    ),
}  # fmt: skip


def command(*argv):
    import sys

    from finetune_deepseek.__main__ import main

    sys.argv = ["deepseek-hf", *map(str, argv)]
    assert main() == 0, argv


def train_by(code, folder, runs, common):
    """Do the runs by the packages in the folder `code`, and evaluate each; the evaluations' losses."""
    import os
    import sys

    sys.path.insert(0, code)
    import finetune_deepseek

    assert Path(finetune_deepseek.__file__).is_relative_to(code)
    os.chdir(folder)
    rows = ["--train_file", "rows.jsonl", "--validation_file", "rows.jsonl"]
    for name, (task, flags) in runs.items():
        command("finetune", task, *flags, *rows, *common, "--output_dir", name)
    return {name: json.loads(Path(f"{name}/all_results.json").read_text())["eval_loss"] for name in runs}


def evaluate_all(folder, runs):
    """Evaluate each folder, serve what can be served, and train on from an adapter; losses and facts."""
    import os

    import torch

    from finetune_deepseek.retrieval.passage_index import Retriever
    from finetune_deepseek.training.saved import Saved

    os.chdir(folder)
    facts = {}
    for name, (task, flags) in runs.items():
        columns = (
            [word for word in flags if word.endswith("_column") or word in ("en", "de")]
            if task != "translation"
            else []
        )
        rows = ["--validation_file", "rows.jsonl", "--use_cpu", "True", "--disable_tqdm", "True"]
        command("evaluate", task, name, *columns, *rows, "--output_dir", f"again-{name}")
        saved = Saved.open(None, name)
        facts[name] = {
            "loss": json.loads(Path(f"again-{name}/all_results.json").read_text())["eval_loss"],
            "task": saved.task,
            "changes": saved.changes,
            "settings": saved.settings,
        }
    retriever = Retriever.load("vectors")
    facts["pooling"] = [retriever.model.config.pooling, retriever.model.config.query_prefix]
    facts["norm"] = float(torch.linalg.vector_norm(retriever.encode(["one"], is_query=True)))
    command("translate", "adapter", "--input", "lines.txt", "--output", "out.txt")
    facts["translated"] = len(Path("out.txt").read_text().splitlines())
    return facts


def test_runs_of_earlier_code_are_evaluated_the_same(earlier_code, run_client, tmp_path):
    lines = [json.dumps({"en": source, "de": target}, ensure_ascii=False) for source, target in PAIRS]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "lines.txt").write_text("one\nthree\n")
    expected = run_client(train_by, str(earlier_code), str(tmp_path), RUNS, COMMON)
    assert not list(tmp_path.rglob("deepseek_hf.json"))
    facts = run_client(evaluate_all, str(tmp_path), RUNS)
    for name, loss in expected.items():
        assert facts[name]["loss"] == pytest.approx(loss, rel=1e-4), name
    assert facts["adapter"]["settings"]["max_target_length"] == 20
    assert facts["vectors"]["changes"]["pooling"] == "last_token"
    assert facts["labels"]["task"] is None  # its card said nothing
    assert facts["labels"]["changes"]["id2label"] == {"0": "drei", "1": "eins", "2": "zwei Vögel"}
    assert facts["pooling"] == ["last_token", "q: "] and facts["norm"] == pytest.approx(1, abs=1e-4)
    assert facts["translated"] == 2
