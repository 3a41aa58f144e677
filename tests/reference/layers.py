"""RMSNorm (arXiv 1910.07467, eq. 4) and SwiGLU (2002.05202, eq. 6), one vector at a time."""

import torch


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """[..., W] -> [..., W]: each vector divided by the root of its mean square."""
    if x.ndim > 1:
        return torch.stack([rms_norm(row, weight, eps) for row in x])
    mean_square = sum(x[i] * x[i] for i in range(len(x))) / len(x)
    return torch.stack([x[i] / (mean_square + eps) ** 0.5 * weight[i] for i in range(len(x))])


def linear(x: torch.Tensor, weights: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """x W^T + b with `{name}.weight` and, where there is one, `{name}.bias`."""
    y = x @ weights[f"{name}.weight"].T
    return y + weights[f"{name}.bias"] if f"{name}.bias" in weights else y


def swiglu(
    x: torch.Tensor, weights: dict[str, torch.Tensor], prefix: str = "", limit: float | None = None
) -> torch.Tensor:
    """down(swish(gate(x)) * up(x)), swish(z) = z / (1 + e^-z); gate up to the limit, up between both (V4)."""
    gate, up = linear(x, weights, f"{prefix}gate_proj"), linear(x, weights, f"{prefix}up_proj")
    if limit is not None:
        gate = torch.where(gate > limit, limit, gate)
        up = torch.where(up.abs() > limit, limit * up.sign(), up)
    return linear(gate / (1 + torch.exp(-gate)) * up, weights, f"{prefix}down_proj")
