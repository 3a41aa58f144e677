"""`deepseek-hf evaluate` and `predict`: the score of a saved model on the validation and on the test split."""

from collections.abc import Sequence

from .finetune import score


def evaluate(argv: Sequence[str]) -> None:
    """Score a saved model on the validation split."""
    score("evaluate", "do_eval", argv)


def predict(argv: Sequence[str]) -> None:
    """Score a saved model on the test split, and write its predictions."""
    score("predict", "do_predict", argv)
