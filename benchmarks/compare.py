"""Runs of `deepseek-hf finetune` side by side, as a YAML file describes them, and their table in docs/results.md.

    python benchmarks/compare.py benchmarks/multi30k_20_minutes.yaml --data ../shared/data --output runs/results

For each system the flag under `choose` is tried with each of its values, and the best by the validation score named
there is kept; then every seed is run with every system in turn (A B A B). What is found in --output, or in
docs/results/NAME.json from earlier calls, isn't repeated, and refused if the system's settings have changed since;
table and JSON are written at the end. A value `{data}` in a
flag stands for --data, `{runs}` for this table's folder in --output, `{here}` for the folder of the YAML file.
`include` names a table whose keys this one adds to or replaces, `curve` has scores of the evaluations during training,
which are printed below the table, and with `processes` in place of a flag so many of them train in parallel.
"""

import argparse
import hashlib
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import yaml

from finetune_deepseek.training.arguments import is_more_better

RESULTS = Path(__file__).parents[1] / "docs" / "results.md"
PACKAGES = ("torch", "transformers", "peft", "datasets", "sacrebleu")
KEPT = "_by_scores.json"
SETTINGS = "settings_hash"  # of a run, beside its results


def flags(settings: dict[str, Any], places: dict[str, str]) -> list[str]:
    """Settings as flags, without those that are null; the words in braces filled in."""
    words: list[str] = []
    for name, value in settings.items():
        if value is None:
            continue
        values = value if isinstance(value, list) else [json.dumps(value) if isinstance(value, dict) else value]
        words += [f"--{name}", *(fill(str(value), places) for value in values)]
    return words


def fill(text: str, places: dict[str, str]) -> str:
    for name, place in places.items():
        text = text.replace("{" + name + "}", place)
    return text


def hash_of(settings: dict[str, Any]) -> str:
    """What tells settings apart, whatever their order and the seed; null is as good as absent."""
    told = {"processes": 1, **settings}
    words = [flags({name: told[name]}, {}) for name in sorted(told) if name not in (KEPT, "seed")]
    return hashlib.sha256(json.dumps([word for word in words if word]).encode()).hexdigest()[:12]


def told_by(folder: Path) -> Path:
    """Where it stands by which settings a folder's run was started."""
    return folder.with_name(f"{folder.name}.settings")


def refuse_other_settings(name: str, known: str | Path | None, settings: dict[str, Any], home: Path) -> None:
    """Results before there were hashes have none, and are taken as they are. `known` may be the file of one.

    Raises:
        SystemExit: for results by other settings.
    """
    if isinstance(known, Path):
        known = known.read_text() if known.is_file() else None
    if known not in (None, hash_of(settings)):
        raise SystemExit(f"compare.py: {name} was run with other settings: remove it from {home}, or name it anew.")


def run(task: str, settings: dict[str, Any], folder: Path, places: dict[str, str]) -> dict[str, Any]:
    """The results of one run; those on disk if it was done before."""
    results = folder / "all_results.json"
    if results.is_file():
        refuse_other_settings(folder.name, told_by(folder), settings, folder.parent)
    else:
        folder.mkdir(parents=True, exist_ok=True)
        told_by(folder).write_text(hash_of(settings))
        settings = {"processes": 1, **settings}
        processes = settings.pop("processes")
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        words = flags({**settings, "output_dir": str(folder), "overwrite_output_dir": True}, places)
        print(time.strftime("%H:%M"), shlex.join(words), flush=True)
        with open(f"{folder}.log", "w") as log:
            threads = str(settings.get("cpu_threads", ""))
            environment = os.environ | ({"OMP_NUM_THREADS": threads} if threads else {})
            command = [*(launcher if processes > 1 else []), "-m", "finetune_deepseek", "finetune", task, *words]
            subprocess.run(
                [sys.executable, *command], check=True, stdout=log, stderr=subprocess.STDOUT, env=environment
            )
    return json.loads(results.read_text())


def read_table(path: Path) -> dict[str, Any]:
    """A table's YAML file, on top of the one that it includes. A key with null is left out."""
    table = yaml.safe_load(path.read_text(encoding="utf-8"))
    if "include" in table:
        table = merged(read_table(path.with_name(table.pop("include"))), table)
    return table


def merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Two mappings as one, `common` key by key."""
    both = below | above
    if "common" in below and "common" in above:
        both["common"] = below["common"] | above["common"]
    return {key: value for key, value in both.items() if value is not None}


def systems_of(table: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {name: {**table["common"], **settings} for name, settings in table["systems"].items()}


def choose(
    table: dict[str, Any], folder: Path, places: dict[str, str], only: str | None, known: dict[str, dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """For each system the settings with the best value of the chosen flag, and what was tried under `KEPT`.

    Args:
        known: choices of earlier calls, which stay.
    """
    chosen = {}
    for name, settings in systems_of(table).items():
        if only not in (None, name):
            continue
        if name in known:
            settings = {**settings, **known[name]}
        elif "choose" in table:
            flag, metric = table["choose"]["flag"], table["choose"]["metric"]
            tried = {}
            for value in table["choose"]["values"]:
                trial = {**settings, **table["choose"]["settings"], flag: value}
                tried[value] = run(table["task"], trial, folder / f"{name}_{flag}_{value}", places)[metric]
            scores = {value: score for value, score in tried.items() if score is not None}  # None is no number
            best = (max if is_more_better(metric) else min)(scores, key=scores.__getitem__)
            settings = {**settings, flag: best, KEPT: tried}
        chosen[name] = settings
    return chosen


def protocol(table: dict[str, Any], chosen: dict[str, dict[str, Any]], example: dict[str, Any]) -> list[str]:
    """The lines below the table."""
    lines = [
        *machine_lines(table.get("machine", "")),
        f"Data: {table['source']}"
        + f" Hash of the test rows: {example.get('test_data_hash')}." * ("test_data_hash" in example),
    ]
    for key in sorted(example):
        if key.startswith("test_") and key.endswith("signature"):
            lines.append(f"Signature of {key.removeprefix('test_').removesuffix('_signature')}: `{example[key]}`.")
    for name, settings in chosen.items():
        if KEPT in settings:
            tried = ", ".join(f"{float(value):g}: {score:.3f}" for value, score in settings[KEPT].items())
            flag, metric = table["choose"]["flag"], table["choose"]["metric"]
            lines.append(f"{name}: --{flag} {settings[flag]:g} of {len(settings[KEPT])}, by {metric} ({tried}).")
    return [f"- {line.strip().rstrip(';')}" for line in lines]


def machine_lines(circumstances: str, packages: tuple[str, ...] = PACKAGES) -> list[str]:
    versions = ", ".join(f"{name} {importlib.metadata.version(name).partition('+')[0]}" for name in packages)
    return [
        f"Machine: {os.cpu_count()} cores, {platform.machine()}, {cpu_name()}; {circumstances}",
        f"Versions: Python {platform.python_version()}, {versions}. Date: {time.strftime('%Y-%m-%d')}.",
    ]


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())


def curve(state: Path, columns: dict[str, str]) -> list[list[Any]]:
    """Step, epoch and scores of the evaluations during training."""
    history = json.loads(state.read_text())["log_history"]
    keys = ["step", "epoch", *columns]
    return [[entry[key] for key in keys] for entry in history if all(key in entry for key in keys)]


def number(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not isinstance(value, float):
        return f"{value:,}" if isinstance(value, int) else str(value)
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.2f}"


def write_table(
    table: dict[str, Any], path: Path, chosen: dict[str, dict[str, Any]], rows: dict[tuple[str, int], Any]
):
    """Put the section of this table into docs/results.md, between its own markers."""
    columns = table["columns"]
    head = f"| {table.get('rows', 'system')} | seed | {' | '.join(columns.values())} |"
    lines = [f"## {table['title']}", table["text"].strip(), "", head, "|---" * (2 + len(columns)) + "|"]
    for (name, seed), results in rows.items():
        lines.append(f"| {name} | {seed} | {' | '.join(number(results.get(key, '')) for key in columns)} |")
    for name in chosen:
        own = [results for (system, _), results in rows.items() if system == name]
        if len(own) > 1:
            values = [[results[key] for results in own] for key in columns]
            cells = [number(v[0]) if len(set(v)) == 1 else f"{number(mean(v))} ± {number(stdev(v))}" for v in values]
            lines.append(f"| {name} | mean ± s.d. | {' | '.join(cells)} |")
    for (name, seed), results in rows.items():
        if results.get("curve"):
            heads = ["step", "epoch", *table["curve"].values()]
            lines += [
                "",
                f"During training ({name}, seed {seed}):",
                "",
                f"| {' | '.join(heads)} |",
                "|---" * len(heads) + "|",
            ]
            lines += [f"| {' | '.join(map(number, entry))} |" for entry in results["curve"]]
    open_runs = [f"{name} {seed}" for seed in table["seeds"] for name in chosen if (name, seed) not in rows]
    if open_runs:
        lines += ["", f"Not run yet: {', '.join(open_runs)}."]
    script = table.get("script", "benchmarks/compare.py")
    command = f"python {script} {path} --data DATA --output runs/results"
    lines += ["", f"Command: `{command}`", *protocol(table, chosen, max(rows.values(), key=len))]
    write_section(table["name"], lines)


def write_section(name: str, lines: list[str]) -> None:
    """Put lines into docs/results.md between the markers of that name, in place of what is there."""
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    text = RESULTS.read_text(encoding="utf-8") if RESULTS.is_file() else "# Results\n"
    section = "\n".join([begin, *lines, end])
    if begin in text:
        text = text[: text.index(begin)] + section + text[text.index(end) + len(end) :]
    else:
        text = text.rstrip("\n") + "\n\n" + section + "\n"
    write_whole(RESULTS, text)


def write_whole(path: Path, text: str) -> None:
    beside = path.with_name(f".{path.name}.writing")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path, help="YAML file of a comparison")
    parser.add_argument("--data", required=True, help="folder of the data sets")
    parser.add_argument("--output", type=Path, required=True, help="folder for models, logs and results")
    parser.add_argument("--system", help="run this system only, to use another core for the others")
    parser.add_argument("--seeds", type=int, nargs="*", help="run these seeds only")
    arguments = parser.parse_args()
    table = read_table(arguments.table)
    folder = arguments.output / table["name"]
    here = str(arguments.table.parent)
    places = {"data": arguments.data, "runs": str(folder), "here": here}
    record = RESULTS.with_name("results") / f"{table['name']}.json"
    known = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {"chosen": {}, "rows": {}}
    chosen = choose(table, folder, places, arguments.system, known["chosen"])
    for seed in table["seeds"] if arguments.seeds is None else arguments.seeds:
        for name, settings in chosen.items():
            if f"{name} {seed}" not in known["rows"]:
                settings = {flag: value for flag, value in settings.items() if flag != KEPT}
                run(table["task"], {**settings, "seed": seed}, folder / f"{name}_seed_{seed}", places)
    rows = {}
    for seed in table["seeds"]:
        for name, settings in chosen.items():
            results = folder / f"{name}_seed_{seed}" / "all_results.json"
            if results.is_file():
                refuse_other_settings(results.parent.name, told_by(results.parent), settings, folder)
                row = known["rows"][f"{name} {seed}"] = json.loads(results.read_text())
                row |= {SETTINGS: hash_of(settings)} if told_by(results.parent).is_file() else {}
                if "curve" in table:
                    row["curve"] = curve(results.with_name("trainer_state.json"), table["curve"])
            if row := known["rows"].get(f"{name} {seed}"):
                refuse_other_settings(f"{name} {seed}", row.get(SETTINGS), settings, record)
                rows[name, seed] = row
    if rows and arguments.system is None:
        tried = {name: {flag: settings[flag] for flag in (table["choose"]["flag"], KEPT)}
                 for name, settings in chosen.items() if KEPT in settings}  # fmt: skip
        record.parent.mkdir(exist_ok=True)
        write_whole(record, json.dumps({"chosen": tried, "rows": known["rows"]}, indent=1, sort_keys=True) + "\n")
        write_table(table, arguments.table, chosen, rows)


if __name__ == "__main__":
    main()
