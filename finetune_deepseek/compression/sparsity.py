"""Weights of the pattern 2:4: of each four neighbours in a row, the two that matter least are 0.

A weight matters by its size times the norm of what comes in at its column (Wanda, arXiv 2306.11695), counted over the
calibration tokens; a layer that no token reaches goes by size alone. The file is as large and a CPU as slow as before:
graphics cards from Nvidia's Ampere on multiply such matrices faster, by `torch.sparse.to_sparse_semi_structured`.
"""

from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from .calibration import Calibration
from .rebuilding import prefix_of, with_experts_apart, with_experts_fused

PATTERN, BLOCK, KEPT = "2:4", 4, 2


def sparse_linears(model: Any) -> dict[str, nn.Linear]:
    """The linear layers that get the pattern, by name: those of decoder layers whose rows are fours."""
    inside = f"{prefix_of(model)}layers."
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith(inside) and module.in_features % BLOCK == 0
    }


def input_norms(model: Any, calibration: Calibration) -> dict[str, torch.Tensor]:
    """The norm of each column's input over all tokens [in], float32, by the name of the linear layer."""
    linears = sparse_linears(model)
    squares = {name: torch.zeros(linear.in_features, device=model.device) for name, linear in linears.items()}

    def add(name: str, module: nn.Module, args: Any, output: Any) -> None:
        squares[name] += args[0].float().flatten(0, -2).square().sum(0)

    calibration.watch(model, {linear: partial(add, name) for name, linear in linears.items()})
    return {name: found.sqrt() for name, found in squares.items()}


def pattern_of(weight: torch.Tensor, norms: torch.Tensor) -> torch.Tensor:
    """[out, in] and [in] -> [out, in], true where a weight stays: two of each four."""
    matters = weight.float().abs() * (norms if norms.any() else torch.ones_like(norms))
    best = matters.unflatten(-1, (-1, BLOCK)).topk(KEPT, dim=-1).indices
    kept = torch.zeros_like(matters, dtype=torch.bool).unflatten(-1, (-1, BLOCK))
    return kept.scatter(-1, best, True).flatten(-2)


@torch.no_grad()
def make_sparse(model: Any, calibration: Calibration) -> tuple[Any, float]:
    """The model with the pattern in its decoder layers, and the share of all its weights that are 0 by it.

    Raises:
        ValueError: for weights or inputs that are not finite numbers.
    """
    was_fused = model.config.fused_experts
    model = with_experts_apart(model)
    norms, zeros = input_norms(model, calibration), 0
    for name, linear in sparse_linears(model).items():
        if not (norms[name].isfinite().all() and linear.weight.isfinite().all()):
            raise ValueError(f"--sparsity: {name} has weights or inputs that are not finite numbers.")
        kept = pattern_of(linear.weight, norms[name])
        linear.weight = nn.Parameter(linear.weight * kept)
        zeros += int((~kept).sum())
    share = zeros / sum(parameter.numel() for parameter in model.parameters())
    return (with_experts_fused(model) if was_fused else model), share


def has_pattern(weight: torch.Tensor) -> bool:
    """Whether no four neighbours in a row [..., in] have more than two that aren't 0."""
    if weight.ndim < 2 or weight.shape[-1] % BLOCK:
        return False
    return bool((weight.unflatten(-1, (-1, BLOCK)).ne(0).sum(-1) <= KEPT).all())


class KeepZeros(TrainerCallback):
    """Sets what the pattern has made 0 to 0 again after each step, so that training keeps the pattern."""

    def __init__(self, model: nn.Module) -> None:
        self.kept = [(weight, weight != 0) for weight in model.parameters() if has_pattern(weight.detach())]

    @torch.no_grad()
    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        for weight, kept in self.kept:
            weight.mul_(kept)
