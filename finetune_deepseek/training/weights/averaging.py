"""The mean of the last checkpoints' weights, as the Transformer was evaluated (arXiv 1706.03762, section 6.1)."""

from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy


def checkpoints(folder: Path) -> dict[int, Path]:
    """The checkpoint folders of a run by their steps, in order."""
    steps = {path.name.rpartition("-")[2]: path for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*")}
    return {step: steps[str(step)] for step in sorted(int(step) for step in steps if step.isdigit())}


class EnoughCheckpoints(TrainerCallback):
    """Refuses, before the first step, to average more checkpoints than the run will save.

    How many a run by time (--train_minutes) will save, or one that keeps what is best, nobody knows before.
    """

    def __init__(self, count: int) -> None:
        self.count = count

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        expected = expected_checkpoints(args, state)
        if expected is None or args.train_minutes is not None:
            return
        there = sum(step <= state.global_step for step in checkpoints(Path(args.output_dir)))
        if expected + there < self.count:
            raise ValueError(
                f"--average_checkpoints {self.count}: this run will have saved {expected + there}; lower --save_steps "
                "(or --average_checkpoints)."
            )


def expected_checkpoints(args: Any, state: TrainerState) -> int | None:
    """How many checkpoints Trainer will save from the present step on; None if that can't be known."""
    if args.save_strategy == SaveStrategy.STEPS:
        steps = state.save_steps
        whole = int(state.max_steps // steps - state.global_step // steps) if steps > 0 else 0
        is_odd = steps <= 0 or state.max_steps % steps != 0  # the last step is saved too
        return whole + is_odd * (state.max_steps > state.global_step)
    if args.save_strategy == SaveStrategy.EPOCH:
        per_epoch = state.max_steps / state.num_train_epochs
        return int(state.num_train_epochs) - int(state.global_step / per_epoch)
    return 0 if args.save_strategy == SaveStrategy.NO else None


def average_checkpoints(model: Any, folder: Path, count: int) -> int:
    """Set the model's weights to the mean over the last `count` checkpoints in `folder`, or over those there are.

    Returns how many there were: with none, the weights stay those of the last step.
    """
    last = list(checkpoints(folder).values())[-count:]
    sums: dict[str, torch.Tensor] = {}
    for path in last:
        weights = type(model).from_pretrained(path, dtype=torch.float32).state_dict()
        for name, tensor in weights.items():
            is_sum = name in sums and tensor.is_floating_point()  # whole numbers are no weights: the last ones stay
            sums[name] = sums[name] + tensor if is_sum else tensor
    own = model.state_dict()
    with torch.no_grad():
        for name, total in sums.items():
            mean = total / len(last) if total.is_floating_point() else total
            own[name].copy_(mean)
    return len(last)
