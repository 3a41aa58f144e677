"""What a run says of its scores: ranks by user in a file, the table beside others, the code of the card."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ..data.cells import Column, typed
from ..data.table import read_columns
from .arguments import RANKS_FILE
from .baselines import BASELINES
from .scores import per_user

# Names of a table's rows, of `RANKS_FILE`'s columns, and of what results begin with.
TAKEN = {*BASELINES, "model", "user", "target", "rank", "train", "eval", "test", "baseline"}

CARD_CODE = """from modeling_deepseek import AutoModelForRecommendation
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

FEATURE_CARD_CODE = """from finetune_deepseek.recommend import load

history = ["5", "3", "8"]  # ids of items, oldest first
print(load("{name}").recommend(history, k=10, """


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
