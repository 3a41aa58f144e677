"""What a model does with the user's data: hooks that look on while it computes its loss on some training rows.

Letters: B rows, S tokens of a row, N = B S, D width.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from datasets import Dataset
from torch import nn

from ..training.stages.build import Built
from ..training.stages.prepare import Prepared

Hook = Callable[..., None]


@dataclass(frozen=True)
class Calibration:
    """Batches of training rows, and the trainer that knows their loss."""

    trainer: Any
    batches: list[dict[str, Any]]

    @torch.no_grad()
    def watch(self, model: Any, hooks: dict[nn.Module, Hook]) -> None:
        """Run all batches through the model, each hook being called as torch's forward hooks of its module are."""
        handles = [module.register_forward_hook(hook) for module, hook in hooks.items()]
        try:
            with predictions_ahead(model.eval()):
                for batch in self.batches:
                    self.trainer.compute_loss(model, dict(batch))
        finally:
            for handle in handles:
                handle.remove()


@contextmanager
def predictions_ahead(model: Any) -> Iterator[None]:
    """Let a language model run its prediction layers for its loss."""
    weight, model.config.mtp_loss_weight = model.config.mtp_loss_weight, float(model.config.num_nextn_predict_layers)
    try:
        yield
    finally:
        model.config.mtp_loss_weight = weight


class Tokens:
    """Which tokens of the batch that is running are none of padding."""

    def __init__(self, model: Any) -> None:
        self.mask: torch.Tensor | None = None
        self.handle = model.base_model.register_forward_pre_hook(self.look, with_kwargs=True)

    def look(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        mask = kwargs.get("attention_mask")
        self.mask = mask.flatten().bool() if isinstance(mask, torch.Tensor) and mask.ndim == 2 else None

    def of(self, rows: torch.Tensor) -> torch.Tensor:
        """[N, ...] -> those of the tokens, by which a batch's padding changes no statistics."""
        return rows if self.mask is None else rows[self.mask]

    def __enter__(self) -> "Tokens":
        return self

    def __exit__(self, *error: Any) -> None:
        self.handle.remove()


def calibration_of(prepared: Prepared, built: Built, rows: int) -> Calibration:
    """Batches of up to so many training rows, drawn by the seed.

    Raises:
        ValueError: if there are no training rows.
    """
    train = prepared.splits.get("train")
    if train is None:
        raise ValueError(
            "there are no training rows to calibrate by: give --train_file, or a data set with a train split."
        )
    features: Any = prepared.task.features(train, built.tokenizer, is_training=True)
    if isinstance(features, Dataset):
        features = features.shuffle(seed=prepared.args.seed).select(range(min(rows, len(features))))
    else:
        features = Dataset.from_list(list(islice(features, rows)))  # a stream is shuffled already
    loader = built.trainer.get_eval_dataloader(features)
    return Calibration(built.trainer, [built.trainer._prepare_inputs(batch) for batch in loader])
