"""What is told of a compressed model: a table for the screen, and its card."""

from pathlib import Path
from typing import Any

from ..data.files import write_text
from ..training import model_card
from ..training.saved import Saved
from ..training.stages.build import Built
from ..training.stages.prepare import Prepared

NO_SCORES = (
    "epoch",
    "_runtime",
    "_per_second",
    "_low",
    "_high",
    "_preparation_time",
    "_samples",
    "_trainable",
    "_share",
)


def rows_of(report: dict[str, Any]) -> list[list[Any]]:
    """Name, before, after: the size of the weight files, the parameters, and every score that both have."""
    before, after = report["before"], report["after"]
    names = [
        name
        for name, value in before.items()
        if isinstance(value, (int, float))
        and name in after
        and not name.endswith(NO_SCORES)
        and not name.startswith("baseline_")
    ]
    sizes = [f"{report[f'bytes_{when}'] / 1e6:.3g} MB" for when in ("before", "after")]
    scores = [[name, *(shown(part.get(name)) for part in (before, after))] for name in names]
    return [["weights on disk", *sizes], *scores]


def shown(value: Any) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return "-" if value is None else f"{value:.4g}"


def table_of(report: dict[str, Any]) -> str:
    """The table as text."""
    rows = [["", "before", "after"], *rows_of(report)]
    width = max(len(row[0]) for row in rows) + 2
    return "\n".join(f"{row[0]:<{width}}{row[1]:>14}{row[2]:>14}" for row in rows)


def write_card(
    prepared: Prepared, built: Built, report: dict[str, Any], saved: Saved, destination: Path, folder: Path
) -> None:
    """Write README.md into the folder, as it will lie at the destination."""
    stage, source = prepared.stage, model_card.shown_folder(saved.name)
    flags = " ".join(report["ways"])
    scores = model_card.table(["", "before", "after"], rows_of(report))
    card = prepared.task.card_data() | {
        "summary": f"A model for {prepared.task.card_data()['title']}, made of `{source}` by "
        f"`deepseek-hf compress {flags}`.",
        "scores": f"Before and after, on the same rows.\n\n{scores}",
    }
    stage.training.output_dir = str(destination)
    model_card.write(card, stage, built.model, report["after"], prepared.splits, folder, write_text)
