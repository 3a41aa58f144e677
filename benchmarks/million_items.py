"""A catalogue of a million items, trained and served on one core: memory, time per step, milliseconds per request.

    OMP_NUM_THREADS=1 python benchmarks/million_items.py --output runs/million_items

Interactions are simulated: users who mostly stay in one of many clusters of items, popularity falling as in Zipf's
law, every item at least once. They show what a catalogue of this size costs, not how people behave. Training is
`deepseek-hf finetune recommendation`; training and each way of serving have a process of their own, whose peak memory
is read at its end. Exact search and faiss are timed in turns in one process, on the same requests. The table goes
into docs/results.md, the numbers into docs/results/million_items.json.
"""

import argparse
import copy
import json
import os
import resource
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from compare import RESULTS, flags, machine_lines, number, write_section, write_whole

from finetune_deepseek.data.table import read_columns

NAME = "million_items"
CLUSTERS = 100
STAYS = 0.9  # share of the steps that stay in the user's cluster
EVENTS = 25  # per user


def simulate(path: Path, num_items: int, num_users: int, seed: int = 0) -> None:
    """Write interactions as parquet: user, item, time as integers."""
    rng = np.random.default_rng(seed)
    clusters = min(CLUSTERS, num_items // 100)
    size = num_items // clusters
    weights = 1 / np.arange(1, size + 1)
    cumulated = np.cumsum(weights / weights.sum())
    home = np.repeat(rng.integers(clusters, size=num_users), EVENTS)
    cluster = np.where(rng.random(len(home)) < STAYS, home, rng.integers(clusters, size=len(home)))
    rank = np.searchsorted(cumulated, rng.random(len(home))).clip(max=size - 1)
    users, items = np.repeat(np.arange(num_users), EVENTS), cluster * size + rank
    # Each item once more, at the beginning of someone's history, so that all are in the catalogue.
    times = np.tile(np.arange(EVENTS), num_users)
    every = np.arange(num_items)
    users = np.concatenate((rng.integers(num_users, size=num_items), users))
    items, times = np.concatenate((every, items)), np.concatenate((-1 - every, times))
    numbers = rng.permutation(num_items)  # an item's number says nothing about its cluster
    table = {"user_id": users, "item_id": numbers[items], "timestamp": times}
    pq.write_table(pa.table(table), path)


def settings(data: Path, folder: Path, minutes: float) -> dict[str, Any]:
    """Flags of the training."""
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
             "num_key_value_heads": 2, "num_item_negatives": 512}  # fmt: skip
    return {
        "interactions_file": data, "preset": "tiny_llm", "config_overrides": shape, "seed": 1, "cpu_threads": 1,
        "train_minutes": minutes, "per_device_train_batch_size": 256, "per_device_eval_batch_size": 32,
        "learning_rate": 0.01, "warmup_steps": 20, "max_eval_samples": 200, "max_predict_samples": 512,
        "num_train_epochs": 100, "logging_steps": 20, "use_cpu": True, "disable_tqdm": True, "output_dir": folder,
        "overwrite_output_dir": True,
    }  # fmt: skip


def as_flags(values: dict[str, Any]) -> list[str]:
    return flags({name: str(value) if isinstance(value, Path) else value for name, value in values.items()}, {})


def peak_gib() -> float:
    """Of this process, GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def in_fresh_process(function: str, *words: Any) -> dict[str, Any]:
    """What a function of this file returns, called in a process of its own."""
    print(time.strftime("%H:%M:%S"), function, *words, flush=True)
    command = [sys.executable, __file__, "--call", function, *map(str, words)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output.splitlines()[-1])


def train(data: Path, folder: Path, minutes: float) -> dict[str, Any]:
    """Results of the real command, with its peak memory."""
    words = as_flags(settings(data, folder, minutes))
    print(time.strftime("%H:%M:%S"), shlex.join(words), flush=True)
    command = [sys.executable, "-m", "finetune_deepseek", "finetune", "recommendation", *words]
    with open(f"{folder}.log", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"training failed; see {folder}.log")
    results = json.loads((folder / "all_results.json").read_text(encoding="utf-8"))
    steps = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["global_step"]
    seconds = results["train_runtime"] / steps
    return results | {"peak_gib": usage.ru_maxrss / 2**20, "steps": steps, "seconds_per_step": seconds}


def requests(folder: str, count: int) -> list[list[str]]:
    """Histories of the test split."""
    return read_columns(str(Path(folder, "generated_predictions.jsonl")), count)["source"]


def serve(folder: str, index: str) -> dict[str, Any]:
    """Load, first requests, peak memory."""
    from finetune_deepseek.recommendation.serving import load

    histories = requests(folder, 64)
    started = time.perf_counter()
    recommender = load(folder, index=index)
    loaded = time.perf_counter()
    recommender.recommend(histories[0])
    first = time.perf_counter()
    recommender.recommend(histories)
    return {"load_s": loaded - started, "first_request_s": first - loaded, "peak_gib": peak_gib()}


def milliseconds(action: Any) -> float:
    started = time.perf_counter()
    action()
    return 1000 * (time.perf_counter() - started)


def race(folder: str, pairs: str) -> dict[str, Any]:
    """Exact search and faiss in turns, and how much of the exact best ten faiss finds."""
    import torch

    from finetune_deepseek.recommendation.items.index import ItemIndex
    from finetune_deepseek.recommendation.serving import load

    exact = load(folder)
    faiss = copy.copy(exact)  # the same weights and catalogue
    faiss.search = {"search": ItemIndex()}
    histories = requests(folder, 512)
    best = [[item for item, _ in row] for start in range(0, len(histories), 64)
            for row in exact.recommend(histories[start : start + 64])]  # fmt: skip
    found = [[item for item, _ in row] for row in faiss.recommend(histories)]
    shared = sum(len(set(a) & set(b)) for a, b in zip(best, found, strict=True))
    results: dict[str, Any] = {"recall@10": shared / sum(map(len, best)), "recall_users": len(histories)}
    # With all vectors compared, faiss has to agree before anything is timed.
    numbered = [exact.number(history)[0] for history in histories[:64]]
    whole = faiss.model.recommend(numbered, 10, search=ItemIndex(exact_items=10**9))[1]
    ours = exact.model.recommend(numbered, 10)[1]
    error = float((whole - ours).abs().max() / ours.abs().max())
    if error > 1e-5:
        raise SystemExit(f"exact faiss and exact search differ by {error:.2g} of the best score; nothing was timed")
    results["error"] = error
    torch.set_num_threads(1)
    for batch in (1, 64):
        times: dict[str, list[float]] = {"exact": [], "faiss": []}
        for pair in range(int(pairs)):
            start = pair * batch % (len(histories) - batch + 1)
            asked = histories[start : start + batch]
            for name, recommender in (("exact", exact), ("faiss", faiss)):
                times[name].append(milliseconds(lambda r=recommender, a=asked: r.recommend(a)))
        ratios = [a / b for a, b in zip(times["exact"], times["faiss"], strict=True)]
        results[f"batch_{batch}"] = {
            "pairs": int(pairs),
            "ratio_median": statistics.median(ratios), "ratio_min": min(ratios), "ratio_max": max(ratios),
            **{name: {"median_ms": statistics.median(t), "min_ms": min(t), "max_ms": max(t)}
               for name, t in times.items()},
        }  # fmt: skip
    return results


def write(results: dict[str, Any]) -> None:
    """The section of docs/results.md."""
    training, serving, race = results["training"], results["serving"], results["race"]
    scores = [("HR@10", "hr@10"), ("NDCG@10", "ndcg@10")]
    others = [("ours", "test"), *((n, n) for n in ("popularity", "transitions", "item_knn"))]
    ms = [(f"batch {batch}", race[f"batch_{batch}"]) for batch in (1, 64)]
    lines = [
        "## A million items on one core (simulated interactions)",
        f"{results['items']:,} items, {results['interactions']:,} simulated interactions of {results['users']:,} "
        f"users in {CLUSTERS} clusters: what a catalogue of this size costs; it says nothing about people. The time "
        f"limit ends training after {training['epoch']:.2f} epochs, far from what can be learned: see the baselines. "
        f"Width 64, 2 layers, {training['parameters_total']:,} parameters, sampled softmax with log-q correction.",
        "",
        "| training | |",
        "|---|---|",
        f"| peak memory of the command, evaluation and baselines included | {training['peak_gib']:.2f} GiB |",
        f"| steps of 256 histories | {training['steps']:,} |",
        f"| seconds per step | {number(training['seconds_per_step'])} |",
        f"| seconds of training, of the whole command | {training['train_runtime']:.0f}, "
        f"{training['wall_time_seconds']:.0f} |",
        "",
        f"| full ranking, {training['test_samples']:,} users | {' | '.join(title for title, _ in scores)} |",
        "|---|---|---|",
        *(
            f"| {title} | " + " | ".join(f"{training[f'{prefix}_{key}']:.4f}" for _, key in scores) + " |"
            for title, prefix in others
        ),
        "",
        "| serving, k = 10 | exact | faiss, approximate |",
        "|---|---|---|",
        *(
            f"| {title} | " + " | ".join(f"{serving[name][key]:.2f} {unit}" for name in ("exact", "faiss")) + " |"
            for title, key, unit in (
                ("load", "load_s", "s"),
                ("first request, faiss: with making the index", "first_request_s", "s"),
                ("peak memory", "peak_gib", "GiB"),
            )
        ),
        *(
            f"| ms per call, {title}: median (min to max) of {r['pairs']} | "
            + " | ".join(
                f"{r[name]['median_ms']:.1f} ({r[name]['min_ms']:.1f} to {r[name]['max_ms']:.1f})"
                for name in ("exact", "faiss")
            )
            + " |"
            for title, r in ms
        ),
        *(
            f"| exact / faiss, {title}: median (min to max) of pairs | {r['ratio_median']:.2f} "
            f"({r['ratio_min']:.2f} to {r['ratio_max']:.2f}) | |"
            for title, r in ms
        ),
        f"| share of the exact best ten that is found, {race['recall_users']} users | 1 | {race['recall@10']:.4f} |",
        "",
        "Command: `OMP_NUM_THREADS=1 python benchmarks/million_items.py --output runs/million_items`",
    ]
    loads = [f"{load:.2f}" for load in results["loads"]]
    packages = ("torch", "transformers", "datasets", "faiss-cpu", "numpy", "scipy")
    circumstances = (
        f"one core, wall time, while other work shared it; load (1 minute) before training, serving and the timing, "
        f"and after it: {', '.join(loads)}."
    )
    lines += [f"- {line}" for line in machine_lines(circumstances, packages)]
    lines.append(
        "- Timed in turns (A B A B) in one process on the same weights and requests, after faiss over all vectors "
        f"agreed with exact search within {race['error']:.1e} of the best score. Memory and load "
        "time in fresh processes."
    )
    lines.append(f"- Flags: `{results['flags']}`.")
    write_section(NAME, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="folder for data, model, log and numbers")
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--users", type=int, default=60_000)
    parser.add_argument("--minutes", type=float, default=3.0, help="of training")
    parser.add_argument("--pairs", type=int, default=11, help="of timings, per batch size")
    parser.add_argument("--print", action="store_true", help="print the numbers, and leave docs/ as it is")
    parser.add_argument("--rewrite", action="store_true", help="write the table of the numbers in --output again")
    parser.add_argument("--call", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.call:
        function, *words = arguments.call
        print(json.dumps({"serve": serve, "race": race}[function](*words)))
        return
    if arguments.output is None:
        parser.error("--output is missing")
    if arguments.rewrite:
        write(json.loads((arguments.output / "results.json").read_text(encoding="utf-8")))
        return
    arguments.output.mkdir(parents=True, exist_ok=True)
    data, folder = arguments.output / "interactions.parquet", arguments.output / "model"
    print(f"simulated interactions over {arguments.items:,} items, which say nothing about people")
    simulate(data, arguments.items, arguments.users)
    loads = [os.getloadavg()[0]]
    training = train(data, folder, arguments.minutes)
    loads.append(os.getloadavg()[0])
    serving = {name: in_fresh_process("serve", folder, name) for name in ("exact", "faiss")}
    loads.append(os.getloadavg()[0])
    timed = in_fresh_process("race", folder, arguments.pairs)
    loads.append(os.getloadavg()[0])
    results = {
        "items": arguments.items,
        "users": arguments.users,
        "interactions": pq.read_metadata(data).num_rows,
        "loads": loads,
        "training": training,
        "serving": serving,
        "race": timed,
        "flags": shlex.join(as_flags(settings(Path("DATA"), Path("MODEL"), arguments.minutes))),
    }
    text = json.dumps(results, indent=1, sort_keys=True) + "\n"
    write_whole(arguments.output / "results.json", text)
    if arguments.print:
        print(text)
    else:
        write_whole(RESULTS.with_name("results") / f"{NAME}.json", text)
        write(results)


if __name__ == "__main__":
    main()
