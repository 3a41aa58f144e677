"""What each way of `deepseek-hf compress` does to one model: size, time of a batch, scores.

    python benchmarks/compression.py MODEL --scores accuracy loss --images 256 3 8 8 -- --data_dir optdigits
    python benchmarks/compression.py MODEL --scores exact_match chrf2 loss --tokens 32 48 --recover 100 -- FLAGS ...

What stands behind -- goes to every compress: the data, and what trains in --recover. The models are timed in turn, one
batch of random input each, so that what else the machine does meets all of them; the table has medians.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

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
TRAINED = ("sparsity", "layer", "experts-25", "experts-50")  # with --recover, a second time


def compressed(model: str, folder: Path, ways: list[str], flags: list[str]) -> dict:
    """The report of one way, which is made unless it lies there from an earlier call."""
    report = folder / "compression.json"
    if not report.is_file():
        command = [sys.executable, "-W", "ignore", "-m", "finetune_deepseek", "compress", model, str(folder), *ways]
        subprocess.run([*command, "--disable_tqdm", "true", *flags], check=True, stdout=subprocess.DEVNULL)
    return json.loads(report.read_text(encoding="utf-8"))


def opened(folder: Path) -> torch.nn.Module:
    """The model in a folder, by the class that it was saved from."""
    name = json.loads((folder / "config.json").read_text(encoding="utf-8"))["architectures"][0]
    return getattr(modeling_deepseek, name).from_pretrained(folder).eval()


@torch.no_grad()
def milliseconds(models: list[torch.nn.Module], inputs: dict[str, torch.Tensor], rounds: int) -> list[float]:
    """The median time of a batch, of each model, all being asked in turn."""
    times: list[list[float]] = [[] for _ in models]
    for number in range(rounds + 2):
        for own, model in zip(times, models, strict=True):
            begun = time.perf_counter()
            model(**inputs)
            if number >= 2:  # the first ones prepare themselves
                own.append(1000 * (time.perf_counter() - begun))
    return [statistics.median(own) for own in times]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--scores", nargs="+", required=True, help="names in results, without the split")
    parser.add_argument("--tokens", nargs=2, type=int, help="rows and tokens of the batch that is timed")
    parser.add_argument("--images", nargs=4, type=int, help="or images, channels, height, width")
    parser.add_argument("--recover", type=int, default=0, help="steps of training, for pruned ones a second row")
    parser.add_argument("--output", default="runs/compression", help="folder for the models")
    parser.add_argument("--ways", nargs="+", choices=[*WAYS], default=[*WAYS])
    parser.add_argument("--rounds", type=int, default=30)
    own, flags = (sys.argv[1:], []) if "--" not in sys.argv else split_at(sys.argv[1:], "--")
    arguments = parser.parse_args(own)
    torch.set_num_threads(1)

    rows: list[tuple[str, Path, dict, str]] = []
    for way in arguments.ways:
        for steps in sorted({0, arguments.recover if way in TRAINED else 0}):
            words = [*WAYS[way], *(["--recover-steps", str(steps)] if steps else [])]
            folder = Path(arguments.output) / (f"{way}-recovered" if steps else way)
            report = compressed(arguments.model, folder, words, flags)
            rows.append((f"`{' '.join(words)}`", folder, report, "after"))
    rows.insert(0, ("as it was", Path(arguments.model), rows[0][2], "before"))

    models = [opened(folder) for _, folder, _, _ in rows]
    if arguments.images:
        inputs = {"pixel_values": torch.randn(arguments.images)}
    else:
        inputs = {"input_ids": torch.randint(3, models[0].config.vocab_size, arguments.tokens)}
    times = milliseconds(models, inputs, arguments.rounds)
    print(f"| | weights, MB | batch, ms | {' | '.join(arguments.scores)} |")
    print("|---" * (3 + len(arguments.scores)) + "|")
    for (name, _, report, when), took in zip(rows, times, strict=True):
        found = report[when]
        split = "eval" if f"eval_{arguments.scores[0]}" in found else "test"
        scores = " | ".join(f"{found[f'{split}_{score}']:.4f}" for score in arguments.scores)
        print(f"| {name} | {report[f'bytes_{when}'] / 1e6:.2f} | {took:.1f} | {scores} |")


def split_at(words: list[str], mark: str) -> tuple[list[str], list[str]]:
    place = words.index(mark)
    return words[:place], words[place + 1 :]


if __name__ == "__main__":
    main()
