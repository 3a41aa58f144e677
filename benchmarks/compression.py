"""What each way of `deepseek-hf compress` does to the models of a table: size, time of a batch, scores.

    python benchmarks/compression.py benchmarks/compression.yaml --data ../shared/data --output runs/results

A model is trained once, by the first stage of a recipe or by a system of another table, unless its folder lies in
--output; --model NAME=FOLDER takes one that is there. Then every way makes a folder beside it, those that prune a
second one with `--recover-steps`; what lies there isn't made again. The models are timed in turn, one batch of random
input each, by the CPU time of one thread, which other work on the machine hardly changes. Tables and JSON go into
docs/results.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from compare import PACKAGES, RESULTS, flags, machine_lines, read_table, run, systems_of, write_section, write_whole

import modeling_deepseek

WAYS = {
    "int8": ["--int8"],
    "int8-dynamic": ["--int8", "dynamic"],
    "int4": ["--int4"],
    "sparsity": ["--sparsity", "2:4"],
    "layer": ["--prune-layers", "1"],
    "experts-25": ["--prune-experts", "0.25"],
    "experts-50": ["--prune-experts", "0.5"],
}
TRAINED = ("sparsity", "layer", "experts-25", "experts-50")  # with --recover-steps, a second time
Row = tuple[str, Path, dict[str, Any], str]  # what was done, the folder, its report, "before" or "after"


def training_of(entry: dict[str, Any], here: Path) -> dict[str, Any]:
    """The settings by which a model is trained."""
    if "stage" in entry:
        recipe = yaml.safe_load((here / entry["stage"]).read_text(encoding="utf-8"))
        first = recipe.pop("stages")[0]
        return {**recipe, **first, **entry["train"]}
    return {**systems_of(read_table(here / entry["table"]))[entry["system"]], **entry["train"]}


def compressed(model: Path, folder: Path, ways: list[str], settings: list[str]) -> dict[str, Any]:
    """The report of one way, which is made unless it lies there from an earlier call."""
    report = folder / "compression.json"
    if not report.is_file():
        print(time.strftime("%H:%M"), folder, flush=True)
        command = [sys.executable, "-W", "ignore", "-m", "finetune_deepseek", "compress", str(model), str(folder)]
        with open(f"{folder}.log", "w") as log:
            words = [*command, *ways, "--disable_tqdm", "true", *settings]
            subprocess.run(words, check=True, stdout=log, stderr=subprocess.STDOUT)
    return json.loads(report.read_text(encoding="utf-8"))


def rows_of(entry: dict[str, Any], model: Path, folder: Path, places: dict[str, str]) -> list[Row]:
    """The model as it was, and as every way has made it."""
    rows: list[Row] = []
    for way in entry["ways"]:
        for steps in sorted({0, entry["recover_steps"] if way in TRAINED else 0}):
            words = [*WAYS[way], *(["--recover-steps", str(steps)] if steps else [])]
            made = folder / (f"{way}-recovered" if steps else way)
            report = compressed(model, made, words, flags(entry["flags"], places))
            rows.append((f"`{' '.join(words)}`", made, report, "after"))
    return [("as it was", model, rows[0][2], "before"), *rows]


def opened(folder: Path) -> torch.nn.Module:
    """The model in a folder, by the class that it was saved from."""
    name = json.loads((folder / "config.json").read_text(encoding="utf-8"))["architectures"][0]
    return getattr(modeling_deepseek, name).from_pretrained(folder).eval()


@torch.no_grad()
def milliseconds(models: list[torch.nn.Module], inputs: dict[str, torch.Tensor], rounds: int) -> list[float]:
    """The median CPU time of a batch, of each model, all being asked in turn."""
    times: list[list[float]] = [[] for _ in models]
    for number in range(rounds + 2):
        for own, model in zip(times, models, strict=True):
            begun = time.process_time()
            model(**inputs)
            if number >= 2:  # the first ones prepare themselves
                own.append(1000 * (time.process_time() - begun))
    return [statistics.median(own) for own in times]


def batch_of(shapes: dict[str, list[int]], vocab_size: int) -> dict[str, torch.Tensor]:
    """Random input: token ids, or pixels."""
    torch.manual_seed(0)
    return {
        name: torch.randint(3, vocab_size, shape) if name == "input_ids" else torch.randn(shape)
        for name, shape in shapes.items()
    }


def measured(entry: dict[str, Any], rows: list[Row], rounds: int) -> list[dict[str, Any]]:
    """Of each row its size, time and scores."""
    models = [opened(folder) for _, folder, _, _ in rows]
    times = milliseconds(models, batch_of(entry["batch"], models[0].config.vocab_size), rounds)
    found = []
    for (name, _, report, when), took in zip(rows, times, strict=True):
        scores = {
            score: report[when].get(f"eval_{score}", report[when].get(f"test_{score}")) for score in entry["scores"]
        }
        found.append({"way": name, "bytes": report[f"bytes_{when}"], "milliseconds": took, **scores})
    return found


def table_lines(title: str, entry: dict[str, Any], rows: list[dict[str, Any]]) -> list[str]:
    columns = [title, "weights, MB", "batch, ms", *entry["scores"].values()]
    lines = ["", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for row in rows:
        scores = " | ".join(f"{row[score]:.4f}" for score in entry["scores"])
        lines.append(f"| {row['way']} | {row['bytes'] / 1e6:.2f} | {row['milliseconds']:.1f} | {scores} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path)
    parser.add_argument("--data", required=True, help="folder of the data sets")
    parser.add_argument("--output", type=Path, required=True, help="folder for models, logs and results")
    parser.add_argument("--model", nargs="*", default=[], metavar="NAME=FOLDER", help="models that are there")
    parser.add_argument("--rounds", type=int, default=30)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    table, here = read_table(arguments.table), arguments.table.parent
    places, there = {"data": arguments.data}, dict(pair.split("=", 1) for pair in arguments.model)
    lines, record = [f"## {table['title']}", table["text"].strip()], {}
    for name, entry in table["models"].items():
        folder = arguments.output / table["name"] / name
        folder.mkdir(parents=True, exist_ok=True)
        if name not in there:
            run(entry["task"], training_of(entry, here), folder / "model", places)
        rows = rows_of(entry, Path(there.get(name, folder / "model")), folder, places)
        record[name] = measured(entry, rows, arguments.rounds)
        lines += table_lines(name, entry, record[name])
    command = f"python benchmarks/compression.py {arguments.table} --data DATA --output runs/results"
    lines += ["", f"Command: `{command}`"]
    lines += [f"- {line.strip()}" for line in machine_lines(table["machine"], (*PACKAGES, "torchao"))]
    write_whole(RESULTS.with_name("results") / f"{table['name']}.json", json.dumps(record, indent=1) + "\n")
    write_section(table["name"], [*lines, f"- Data: {table['source']}"])


if __name__ == "__main__":
    main()
