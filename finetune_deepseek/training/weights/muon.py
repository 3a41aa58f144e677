"""Muon for the matrices inside the layers, AdamW for the rest.

Muon (Jordan et al. 2024) steps along the nearest semi-orthogonal matrix to the momentum, found by Newton-Schulz
iterations; scaled by 0.2 sqrt(longer side) its step is of AdamW's size, so that one learning rate and weight decay
serve both (arXiv 2502.16982, section 2.2).
"""

import platform
from collections.abc import Iterable
from functools import cache
from typing import Any, cast

import torch
from torch import nn

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic whose iterates take singular values of 0..1 to about 1


@cache
def multiplies_bfloat16() -> bool:
    """Whether torch has this processor's own instructions for products of bfloat16; else it goes by way of float32."""
    if platform.machine() in ("x86_64", "AMD64"):
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def orthogonalized(matrices: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """[..., m, n] -> the same singular vectors with all singular values near 1 (0.7 to 1.2), in bfloat16.

    In float32 where the processor has no instructions for bfloat16, which is then several times slower.
    """
    x = matrices.float() if matrices.device.type == "cpu" and not multiplies_bfloat16() else matrices.bfloat16()
    is_tall = x.shape[-2] > x.shape[-1]
    if is_tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if is_tall else x


class Muon(torch.optim.Optimizer):
    """One optimizer to Trainer; the groups with `muon` true are stepped here, the others by AdamW.

    Args:
        groups: parameter groups, each with `muon`; stacks of matrices [E, m, n] (experts) are stepped one by one, and
            kernels of a convolution, whose groups `convolution` counts, as a matrix from window to channels for each.
        lr, weight_decay: for all groups that don't name their own.
        betas, eps: AdamW's.
        momentum: Muon's, in Nesterov's form.
        processes: how many have the same weights and gradients (DDP): each orthogonalizes its part of the matrices.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        processes: int = 1,
    ) -> None:
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "muon": False, "convolution": 0}
        super().__init__(groups, defaults)
        rest = [group for group in self.param_groups if not group["muon"]]
        self.adamw = torch.optim.AdamW(rest, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay) if rest else None
        self.processes = processes
        self._share_state()

    def _share_state(self) -> None:
        if self.adamw:
            self.adamw.param_groups = [group for group in self.param_groups if not group["muon"]]
            self.adamw.state = self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        is_older = any("convolution" not in group for group in state_dict["param_groups"])
        if is_older and any(group["convolution"] for group in self.param_groups):
            raise ValueError(
                "the checkpoint's state of Muon is of a version that took kernels of convolutions for stacks of small "
                "matrices: train from its weights anew, without --resume_from_checkpoint"
            )
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            group.setdefault("convolution", 0)
        self._share_state()

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        moved = [
            (parameter, group)
            for group in self.param_groups
            if group["muon"]
            for parameter in group["params"]
            if parameter.grad is not None
        ]
        directions = (self._direction(parameter, group) for parameter, group in moved)
        for (parameter, group), direction in zip(moved, self._orthogonalized(directions), strict=True):
            step = direction.to(parameter.dtype).reshape(parameter.shape)
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.add_(step, alpha=-group["lr"] * 0.2 * max(direction.shape[-2:]) ** 0.5)
        if self.adamw:
            self.adamw.step()
        return loss

    def _direction(self, parameter: torch.Tensor, group: dict[str, Any]) -> torch.Tensor:
        """Nesterov's momentum, as matrices."""
        state, gradient = self.state[parameter], cast(torch.Tensor, parameter.grad)
        if not state:
            state["momentum"] = torch.zeros_like(gradient)
        state["momentum"].lerp_(gradient, 1 - group["momentum"])
        direction = gradient.lerp(state["momentum"], group["momentum"])
        parts = group["convolution"]
        return direction.reshape(parts, len(direction) // parts, -1) if parts else direction

    def _orthogonalized(self, directions: Iterable[torch.Tensor]) -> Iterable[torch.Tensor]:
        if self.processes == 1:
            return map(orthogonalized, directions)
        directions, own = list(directions), torch.distributed.get_rank()
        if not directions:
            return []
        parts = [
            orthogonalized(direction) if number % self.processes == own else torch.zeros_like(direction)
            for number, direction in enumerate(directions)
        ]
        # Adding zeros is exact, so that all go on with the same weights.
        everything = torch.cat([part.flatten().to(directions[0].dtype) for part in parts])
        torch.distributed.all_reduce(everything)
        pieces = everything.split([direction.numel() for direction in directions])
        return [piece.view_as(direction) for piece, direction in zip(pieces, directions, strict=True)]


def muon_groups(model: nn.Module, decayed: Iterable[str], weight_decay: float) -> list[dict[str, Any]]:
    """The trained parameters in groups: matrices inside the model by Muon; embeddings, head, vectors by AdamW.

    Args:
        decayed: names of the parameters that weight decay takes hold of.
    """
    outside = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, nn.Embedding) or module is getattr(model, "get_output_embeddings", lambda: None)()
        for parameter in module.parameters()
    }
    convolutions = (module for module in model.modules() if isinstance(module, nn.modules.conv._ConvNd))
    kernels = {id(module.weight): module.groups for module in convolutions}
    decayed = set(decayed)
    groups: dict[tuple[bool, int, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_inside = parameter.ndim >= 2 and id(parameter) not in outside
            kind = is_inside, kernels.get(id(parameter), 0), name in decayed
            groups.setdefault(kind, []).append(parameter)
    decay = {True: weight_decay, False: 0.0}
    return [
        {"params": parameters, "muon": muon, "convolution": convolution, "weight_decay": decay[is_decayed]}
        for (muon, convolution, is_decayed), parameters in groups.items()
    ]
