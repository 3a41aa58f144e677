"""How long the command takes to answer, side by side with another commit of this repository.

    git worktree add /tmp/before 9e8363e
    python benchmarks/start_up.py --before /tmp/before

Counted is the CPU time of a process (user and system), which other work on the machine changes least; the two commits
take turns, and a row shows the medians. Where a commit doesn't have a command, what one typed instead is timed.
Nothing is downloaded: every command ends in help, in one line of error, or in the description of a tiny folder. The
table goes into docs/results.md.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from compare import machine_lines, write_section

SAVE = """from configuration_deepseek import preset; from modeling_deepseek import DeepSeekForCausalLM
from tokenization_deepseek import train_tokenizer
DeepSeekForCausalLM(preset("tiny_v3")).save_pretrained("tiny")
DeepSeekForCausalLM(preset("tiny_v3")).save_pretrained("tiny-with-tokenizer")
train_tokenizer(["one two three"] * 9, vocab_size=300).save_pretrained("tiny-with-tokenizer")"""
LIST_PRESETS = ["-c", "from configuration_deepseek import PRESETS; print(*PRESETS)"]
NAME_VERSION = ["-c", "import modeling_deepseek, importlib.metadata as m; print(m.version('deepseek-hf'))"]
RUN = ["-m", "finetune_deepseek"]
TRAIN = [*RUN, "finetune", "translation", "--preset", "tiny_v3", "--output_dir", "out"]
# (share of the time before that is wanted, command now, command before if it was another)
CASES: list[tuple[float, list[str], list[str] | None]] = [
    *((1 / 3, [*RUN, verb, "--help"], None) for verb in ("translate", "answer", "recommend", "export", "inspect")),
    *((1 / 2, [*RUN, "finetune", task, "--help"], None) for task in ("translation", "recommendation")),
    (1 / 3, [*TRAIN, "--train_fil", "train.json"], None),
    (1 / 3, [*RUN, "translate", "tiny", "--num_beam", "5"], None),
    (1 / 3, [*TRAIN, "--train_file", "absent.json"], None),
    (1 / 3, [*RUN, "predict", "translation", "tiny", "--test_file", "absent.json"], None),
    (1 / 3, [*RUN, "translate", "./absent"], None),
    (1 / 3, [*RUN, "export", "./absent", "out", "--to", "native"], None),
    (1 / 5, [*RUN, "inspect", "tiny"], None),
    (1 / 5, [*RUN, "inspect", "tiny-with-tokenizer"], None),
    (1 / 5, [*RUN, "presets"], LIST_PRESETS),
    (1 / 5, [*RUN, "--version"], NAME_VERSION),
]


def cpu_seconds(root: Path, command: list[str], folder: str) -> float:
    """User and system time of `python command` with the packages of `root`."""
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        [sys.executable, *command], cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    _, _, usage = os.wait4(process.pid, 0)
    return usage.ru_utime + usage.ru_stime


def shown(command: list[str]) -> str:
    words = command[2:] if command[:2] == RUN else command
    return f"`deepseek-hf {' '.join(words)}`"


def commit(root: Path) -> str:
    return subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True, check=True
    ).stdout.strip()


def heading(commits: dict[str, str], pairs: int) -> list[str]:
    return [
        "## How long the command takes to answer",
        "CPU time (user and system) of a process that ends in help, in one line of error, or, for `inspect`, in the",
        f"description of a tiny folder; medians of {pairs} runs of each of two commits, {commits['before']} and",
        f"{commits['now']}, that took turns. Where there was no `presets` or `--version`, the line of Python that",
        "said the same is timed.",
        "",
        "Command: `python benchmarks/start_up.py --before CHECKOUT`",
        *(f"- {line}" for line in machine_lines("other work on both cores.", ("torch", "transformers"))),
        "",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, required=True, help="root of a checkout of the other commit")
    parser.add_argument("--pairs", type=int, default=5)
    arguments = parser.parse_args()
    roots = {"before": arguments.before.resolve(), "now": Path(__file__).parents[1]}
    rows = ["| command | before, s | now, s | now / before | wanted |", "|---|---|---|---|---|"]
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "PYTHONPATH": str(roots["before"])}
        subprocess.run([sys.executable, "-c", SAVE], cwd=folder, env=environment, check=True)
        for wanted, now, before in CASES:
            times: dict[str, list[float]] = {"before": [], "now": []}
            for _ in range(arguments.pairs):
                times["before"].append(cpu_seconds(roots["before"], before or now, folder))
                times["now"].append(cpu_seconds(roots["now"], now, folder))
            was, is_now = (statistics.median(times[name]) for name in ("before", "now"))
            rows.append(f"| {shown(now)} | {was:.2f} | {is_now:.2f} | {is_now / was:.2f} | {wanted:.2f} |")
            print(rows[-1], flush=True)
    commits = {name: commit(root) for name, root in roots.items()}
    write_section("start_up", [*heading(commits, arguments.pairs), *rows])


if __name__ == "__main__":
    main()
