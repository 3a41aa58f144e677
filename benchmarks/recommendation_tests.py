"""Means over seeds, intervals over users and paired tests of the recommenders that compare.py has run.

    python benchmarks/compare.py benchmarks/lastfm.yaml --data ../shared/data --output runs/results
    python benchmarks/recommendation_tests.py runs/results/lastfm ours SASRec

Reads the ranks per user (user_ranks.csv) of every NAME_seed_N folder. A user's score is the mean over seeds; the
interval is a bootstrap over users, and the test flips the sign of each user's difference at random. The baselines in
those files are compared with the first system too. The table goes into docs/results.md, below that of compare.py.
"""

import argparse
import shlex
from pathlib import Path

import numpy as np
import pandas as pd
from compare import write_section

from finetune_deepseek.recommendation.arguments import RANKS_FILE
from finetune_deepseek.recommendation.baselines import BASELINES
from finetune_deepseek.recommendation.scores import bootstrap_interval, paired_p_value, per_user

SCORES = ("hr@10", "ndcg@10")


def seed_files(folder: Path, system: str) -> list[Path]:
    """The ranks of each seed.

    Raises:
        SystemExit: if there are none.
    """
    files = sorted(folder.glob(f"{system}_seed_*/{RANKS_FILE}"))
    if not files:
        raise SystemExit(f"{folder}: no {system}_seed_N/{RANKS_FILE}; run compare.py first.")
    return files


def read_ranks(path: Path) -> pd.DataFrame:
    """Ranks by user; one may be named NA."""
    return pd.read_csv(path, dtype={"user": str}, keep_default_na=False).set_index("user")


def mean_scores(files: list[Path], column: str, users: pd.Index) -> dict[str, np.ndarray]:
    """Each user's scores, mean over the files.

    Raises:
        SystemExit: if a file has other users.
    """
    parts = []
    for path in files:
        frame = read_ranks(path)
        if set(frame.index) != set(users):
            raise SystemExit(f"{path}: other users than in the first file; the runs had different data.")
        parts.append(per_user(frame.loc[users, column].to_numpy()))
    return {name: np.mean([part[name] for part in parts], axis=0) for name in SCORES}


def lines_of(folder: Path, systems: list[str]) -> list[str]:
    """A Markdown table: every system's scores, and how far the first is above it."""
    files = {name: seed_files(folder, name) for name in systems}
    first = systems[0]
    known = read_ranks(files[first][0])
    users = known.index
    scores = {f"{name}, {len(paths)} seeds": mean_scores(paths, "rank", users) for name, paths in files.items()}
    # Each seed's own, for a seed may decide the order of equal times, and so the targets.
    scores |= {name: mean_scores(files[first], name, users) for name in BASELINES if name in known}
    own = next(iter(scores.values()))
    lines = [
        "| | " + " | ".join(f"{s.upper()} [95 %] | {first} above [95 %] | p" for s in SCORES) + " |",
        "|---" * (1 + 3 * len(SCORES)) + "|",
    ]
    for name, values in scores.items():
        cells = []
        for score in SCORES:
            low, high = bootstrap_interval(values[score])
            cells.append(f"{values[score].mean():.4f} [{low:.4f}, {high:.4f}]")
            if values is own:
                cells += ["-", "-"]
                continue
            above = own[score] - values[score]
            low, high = bootstrap_interval(above)
            cells += [
                f"{above.mean():+.4f} [{low:+.4f}, {high:+.4f}]",
                f"{paired_p_value(own[score], values[score]):.4f}",
            ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the table's folder in compare.py's --output")
    parser.add_argument("systems", nargs="+", help="the first is compared with all others")
    arguments = parser.parse_args()
    lines = lines_of(arguments.folder, arguments.systems)
    print("\n".join(lines))
    name, systems = arguments.folder.name, shlex.join(arguments.systems)
    note = (
        "Means over seeds; interval by bootstrap over users, p by flipping the sign of users' differences at random."
    )
    command = f"Command: `python benchmarks/recommendation_tests.py runs/results/{name} {systems}`"
    write_section(f"{name}_tests", [f"### {name}, user by user", note, "", *lines, "", command])


if __name__ == "__main__":
    main()
