"""`deepseek-hf evaluate`: the score of a saved model on the validation split."""

from collections.abc import Sequence

from .finetune import score


def evaluate(argv: Sequence[str]) -> None:
    """Score a saved model on the validation split."""
    score("evaluate", "do_eval", argv)
