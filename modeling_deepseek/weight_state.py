"""What tells that a module's weights or adapters have changed, without a look at any number.

Weights written in place through `.data`, as PEFT's hot swapping does, leave no trace.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

PEFT_SWITCHES = ("_active_adapter", "_disable_adapters", "merged_adapters", "scaling")


def state_of(*modules: nn.Module) -> tuple:
    """Equal to an earlier one while nothing has changed: places and versions of weights, switches of PEFT's layers."""
    weights = [_mark(weight) for module in modules for weight in module.parameters()]
    return *weights, *_switches(modules)


def _mark(tensor: torch.Tensor) -> tuple:
    if tensor.is_meta:
        return (id(tensor),)
    try:
        place = tensor.data_ptr()
    except RuntimeError:  # of a subclass that keeps its numbers elsewhere
        place = id(tensor)
    return id(tensor), place, tensor.dtype, 0 if tensor.is_inference() else tensor._version


def _switches(modules: tuple[nn.Module, ...]) -> Iterator[Any]:
    for module in modules:
        for part in module.modules():
            for name in PEFT_SWITCHES:
                if name in vars(part):
                    yield _frozen(vars(part)[name])


def _frozen(value: Any) -> Any:
    if isinstance(value, dict):
        return tuple((key, _frozen(item)) for key, item in value.items())
    if isinstance(value, list):
        return tuple(value)
    return _mark(value) if isinstance(value, torch.Tensor) else value
