"""What a run says of its scores: ranks by user in a file, the table beside others, the code of the card."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ..data.cells import Column, typed
from ..data.sources import Rows
from ..data.table import read_columns
from ..training.task import Scores, prefixed
from .arguments import RANKS_FILE, RecommendationArguments
from .baselines import BASELINES
from .items.catalogue import PADDING
from .scores import bootstrap_interval, comparison, per_user, ranking_scores

# Names of a table's rows, of `RANKS_FILE`'s columns, and of what results begin with.
TAKEN = {*BASELINES, "model", "user", "target", "rank", "train", "eval", "test", "baseline"}

MODEL_CARD_CODE = """from modeling_deepseek import AutoModelForRecommendation
from transformers import PreTrainedTokenizerFast

catalogue = PreTrainedTokenizerFast.from_pretrained("{name}")
model = AutoModelForRecommendation.from_pretrained("{name}")
history = [5, 3, 8]  # numbers of items, oldest first, as catalogue.convert_tokens_to_ids gives them
items, scores = model.recommend(history, k=10)
print(catalogue.convert_ids_to_tokens(items.tolist()))"""

TEXT_CARD_CODE = """from finetune_deepseek.recommend import load

recommender = load("{name}")
recommender.add_items({{"new": "The text of an item without a click"}})
history = ["5", "3", "8"]  # ids of items, oldest first
print(recommender.recommend(history, k=10))"""

CARD_CODE = """from finetune_deepseek.recommend import load

history = ["5", "3", "8"]  # ids of items, oldest first
print(load("{name}").recommend(history, k=10))"""

FEATURE_CARD_CODE = """from finetune_deepseek.recommend import load

history = ["5", "3", "8"]  # ids of items, oldest first
print(load("{name}").recommend(history, k=10, """


class RankingReport:
    """What a run on interactions says of the ranks of its targets, beside baselines and other runs.

    Raises:
        ValueError: if one of --compare_with is no scored run.
    """

    def __init__(self, arguments: RecommendationArguments) -> None:
        self.arguments = arguments
        self.table = ""
        named = run_names(arguments.compare_with or [])
        self.others = {name: read_ranks(folder) for folder, name in named.items()}

    def check_users(self, test: Rows | None) -> None:
        """Refuse runs that have scored other users.

        Raises:
            ValueError: naming the run.
        """
        users = set() if test is None else set(test["user"])
        for name, column in self.others.items():
            if users - set(column.index):
                raise ValueError(f"--compare_with {name}: that run has scored other users; give both the same data.")

    def scores(self, predictions: list[Any], rows: list[dict[str, Any]], baselines: dict[str, np.ndarray]) -> Scores:
        """Intervals over users, the baselines and other runs with paired tests; ranks per user go into a file."""
        ranks, users = ranks_in(predictions), [row["user"] for row in rows]
        others = baselines | {name: column[users].to_numpy() for name, column in self.others.items()}
        results: dict[str, Any] = {}
        for name in ("hr@10", "ndcg@10"):
            results[f"test_{name}_low"], results[f"test_{name}_high"] = bootstrap_interval(per_user(ranks)[name])
        results |= comparison(ranks, others)
        if "popularity" in others:
            results |= prefixed("baseline", ranking_scores(others["popularity"]))  # the card's second column
        frame = pd.DataFrame({"user": users, "target": [row["target"] for row in rows], "rank": ranks} | others)
        self.table = scores_table(ranks, others, results)
        return Scores(results, files={RANKS_FILE: frame.to_csv(index=False, lineterminator="\n")}, text=self.table)

    def card(self, notes: list[str]) -> dict[str, Any]:
        """What the card says of data and scores, whatever has made the ranks."""
        arguments = self.arguments
        paths = (arguments.interactions_file, arguments.data_dir, arguments.train_file, arguments.test_file)
        local = ", ".join(Path(path).name for path in paths if path)
        source = "CLDR territories, simulated users" if arguments.is_embedded else arguments.dataset_name or local
        return {
            "language": None,
            "pipeline_tag": "other",
            "datasets": [arguments.dataset_name] if arguments.dataset_name and "/" in arguments.dataset_name else [],
            "metrics": {name: (name, name.upper()) for name in ranking_scores(np.ones(1))},
            "dataset_name": source,
            "baseline": "popularity",
            "prompt": "",
            "data": "\n".join(f"- {note}" for note in notes) + f"\n\n{self.table}",
        }


def ranks_in(predictions: list[Any]) -> np.ndarray:
    """[B] of predictions that have one each."""
    return np.array([prediction["rank"] for prediction in predictions])


def full_ranking(predictions: list[Any], num_items: int) -> dict[str, Any]:
    """The scores of ranks among all items, and how they were counted."""
    return ranking_scores(ranks_in(predictions)) | {
        "ranking_signature": f"full ranking of {num_items:,} items, history excluded, ties against us"
    }


def ranked_items(outputs: np.ndarray, names: Sequence[str]) -> list[dict[str, Any]]:
    """Predictions of outputs [B, 1 + M]: the target's rank, and the best items by number, PADDING for none."""
    tokens = np.array(names, dtype=object)
    return [{"rank": int(row[0]), "items": tokens[row[1:][row[1:] > PADDING]].tolist()} for row in outputs.astype(int)]


def run_names(folders: list[str]) -> dict[str, str]:
    """What to call each of some runs: its folder, with as many of those above as tell it from the other runs, the
    baselines and the columns of `RANKS_FILE`.

    Raises:
        ValueError: if a run is named twice.
    """
    parts = {folder: Path(folder).resolve().parts[1:] for folder in folders}
    if len(set(parts.values())) < len(folders):
        raise ValueError(f"--compare_with {' '.join(folders)}: a run is named twice; name each once.")
    names: dict[str, str] = {}
    for folder, mine in parts.items():
        others = {tail for theirs in parts.values() if theirs != mine for tail in tails(theirs)} | TAKEN
        names[folder] = next((tail for tail in tails(mine) if tail not in others), folder)
    return names


def tails(parts: tuple[str, ...]) -> list[str]:
    """The ends of a path, shortest first."""
    return ["/".join(parts[-count:]) for count in range(1, len(parts) + 1)]


def read_ranks(folder: str) -> pd.Series:
    """Ranks by user of another run.

    Raises:
        ValueError: if there are none.
    """
    path = Path(folder) / RANKS_FILE
    try:
        columns = typed(read_columns(str(path)), [Column("user", "id"), Column("rank", "number")], RANKS_FILE)
        return pd.Series(columns["rank"], index=columns["user"], dtype=int)
    except ValueError as error:
        raise ValueError(f"--compare_with {folder}: no {RANKS_FILE} of a scored run there ({error}).") from error


def scores_table(ranks: np.ndarray, others: dict[str, np.ndarray], results: dict[str, Any]) -> str:
    """Markdown: HR@10 and NDCG@10 of the model and all others, and how far the model is above them."""
    names = ("hr@10", "ndcg@10")
    lines = [
        "| | HR@10 | NDCG@10 | model above, HR@10 [95 %] | p | model above, NDCG@10 [95 %] | p |",
        "|---|---|---|---|---|---|---|",
        "| model | "
        + " | ".join(
            f"{per_user(ranks)[n].mean():.4f} [{results[f'test_{n}_low']:.4f}, {results[f'test_{n}_high']:.4f}]"
            for n in names
        )
        + " | - | - | - | - |",
    ]
    for other in others:
        cells = [f"{results[f'{other}_{name}']:.4f}" for name in names]
        for name in names:
            key = f"above_{other}_{name}"
            cells += [f"{results[key]:+.4f} [{results[f'{key}_low']:+.4f}, {results[f'{key}_high']:+.4f}]"]
            cells += [f"{results[f'{key}_p']:.4f}"]
        lines.append(f"| {other} | {' | '.join(cells)} |")
    return "\n".join(lines)
