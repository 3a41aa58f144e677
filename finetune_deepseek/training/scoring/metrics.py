"""What the metrics of the tasks are made of: an `evaluate.Metric` that needs no network.

`evaluate.load("sacrebleu")` fetches a script from the Hub. These classes are made directly (`SacreBleu("zh")`), and
combine as evaluate's own do: `evaluate.combine([SacreBleu("zh"), ExactMatch()])`.
"""

from typing import Any

import evaluate
from datasets import Features


class InMemoryMetric(evaluate.Metric):
    """An `evaluate.Metric` that writes nothing to disk and refuses bad input with one line, its state untouched."""

    features: Features
    description: str

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(keep_in_memory=True, **kwargs)

    def _build_data_dir(self) -> str:
        return ""  # evaluate would make a folder in its cache, even for a metric that is kept in memory

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=self.description, citation="", inputs_description="", features=type(self).features
        )

    # The two docstrings below are needed: evaluate appends to them.
    def add_batch(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> None:
        """Add predictions and as many references."""
        counts = [0 if column is None else len(column) for column in (predictions, references)]
        if counts[0] != counts[1] or not counts[0]:
            raise ValueError(
                f"{type(self).__name__} got {counts[0]} predictions and {counts[1]} references; "
                "give one reference per prediction, at least one."
            )
        super().add_batch(predictions=predictions, references=references, **kwargs)

    def compute(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> dict[str, Any] | None:
        """Score what was added, and the predictions and references given here."""
        if predictions is None and references is None and self.writer is None:
            raise ValueError(f"{type(self).__name__} has nothing to score; give predictions and references.")
        return super().compute(predictions=predictions, references=references, **kwargs)
