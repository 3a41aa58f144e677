"""`deepseek-hf predict`: the score of a saved model on the test split, and every prediction in a file."""

from collections.abc import Sequence

from .finetune import score


def predict(argv: Sequence[str]) -> None:
    """Score a saved model on the test split, and write its predictions."""
    score("predict", "do_predict", argv)
