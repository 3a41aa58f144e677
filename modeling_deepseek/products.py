"""Products of float32 matrices on a CPU, for training.

torch asks MKL for them, which on AMD's processors uses half of what AVX-512 can do; oneDNN, which torch has too, uses
all. oneDNN prepares itself for each shape that it meets, which takes half a millisecond and half a megabyte, and keeps
a thousand.
"""

from functools import cache
from pathlib import Path

import torch
from torch.nn import functional as F

LEAST = 2**22  # multiplications that a product has at least, so that oneDNN's longer way and its memory pay
ROWS = 64  # experts' numbers of rows are filled up to multiples of it, so that few shapes come up


@cache
def is_amd_with_avx512() -> bool:
    described = Path("/proc/cpuinfo")  # Linux's
    is_amd = described.exists() and "AuthenticAMD" in described.read_text()
    return is_amd and torch.backends.cpu.get_cpu_capability() == "AVX512"


@cache
def has_onednn() -> bool:
    """Whether products go by oneDNN: where it is the faster one, and by an operator of torch's own, if it is there."""
    backends = torch.backends
    are_both_there = backends.mkl.is_available() and backends.mkldnn.is_available()
    return is_amd_with_avx512() and are_both_there and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@cache
def linear_pointwise():
    """oneDNN's product, as an operator of torch; looked up once."""
    return torch.ops.mkldnn._linear_pointwise.default


def goes_by_onednn(rows: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether `product` of these does."""
    is_large = rows.numel() * weight.shape[0] >= LEAST
    return is_large and rows.dtype == weight.dtype == torch.float32 and rows.is_cpu and has_onednn()


def onednn_product(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`product` by oneDNN."""
    if not (weight.is_contiguous() or weight.mT.is_contiguous()):
        weight = weight.contiguous()  # of others it takes its reference kernel, which is fifty times slower
    return linear_pointwise()(rows, weight, None, "none", [], "")


def product(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """rows weight^T, of which autograd knows nothing: [..., in], [out, in] -> [..., out]."""
    return (onednn_product if goes_by_onednn(rows, weight) else F.linear)(rows, weight)


def plain_outer_product(grad: torch.Tensor, rows: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """`outer_product` of [rows, out] and [rows, in], never by oneDNN."""
    return torch.mm(grad.mT, rows, out=out)


def outer_product(grad: torch.Tensor, rows: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """The sum over all rows of their outer products, a weight's gradient: [..., out], [..., in] -> [out, in]."""
    grad, rows = grad.flatten(0, -2).mT, rows.flatten(0, -2).mT
    if not goes_by_onednn(grad, rows):
        return torch.mm(grad, rows.mT, out=out)
    # oneDNN copies the first into rows of its own: the smaller one
    found = onednn_product(grad, rows) if len(grad) <= len(rows) else onednn_product(rows, grad).mT
    return found.contiguous() if out is None else out.copy_(found)


def padded(order: torch.Tensor, counts: list[int], fill: int) -> tuple[torch.Tensor, list[int]]:
    """[P] in groups of so many -> each group filled up to a multiple of `ROWS`."""
    whole = [-(-count // ROWS) * ROWS for count in counts]
    filled = order.new_full((sum(whole),), fill)
    for own, place in zip(order.split(counts), filled.split(whole), strict=True):
        place[: len(own)] = own
    return filled, whole
