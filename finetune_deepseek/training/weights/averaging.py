"""The mean of the last checkpoints' weights, as the Transformer was evaluated (arXiv 1706.03762, section 6.1)."""

from pathlib import Path
from typing import Any

import torch
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR


def average_checkpoints(model: Any, folder: Path, count: int) -> None:
    """Set the model's weights to the mean over the last `count` checkpoints in `folder`.

    Raises:
        ValueError: if there are fewer.
    """
    steps = {path: path.name.rpartition("-")[2] for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*")}
    last = sorted((path for path, step in steps.items() if step.isdigit()), key=lambda path: int(steps[path]))[-count:]
    if len(last) < count:
        raise ValueError(f"--average_checkpoints {count}: {folder} has {len(last)} checkpoints; save more often.")
    sums: dict[str, torch.Tensor] = {}
    for path in last:
        weights = type(model).from_pretrained(path, dtype=torch.float32).state_dict()
        for name, tensor in weights.items():
            is_sum = name in sums and tensor.is_floating_point()  # whole numbers are no weights: the last ones stay
            sums[name] = sums[name] + tensor if is_sum else tensor
    own = model.state_dict()
    with torch.no_grad():
        for name, total in sums.items():
            mean = total / count if total.is_floating_point() else total
            own[name].copy_(mean)
    print(f"averaged the weights of {', '.join(path.name for path in last)}")
