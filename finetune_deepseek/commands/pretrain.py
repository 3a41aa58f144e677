"""`deepseek-hf pretrain`: train a language model on texts; it is `finetune language_modeling`."""

from collections.abc import Sequence

from .finetune import finetune


def pretrain(argv: Sequence[str]) -> None:
    """Train a language model, then score and predict whatever there is a split for."""
    finetune(["language_modeling", *argv])
