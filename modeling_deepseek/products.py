"""Products of float32 matrices on a CPU, for training.

torch asks MKL for them, which on AMD's processors uses half of what AVX-512 can do; oneDNN, which torch has too, uses
all. oneDNN prepares itself for each shape that it meets, which takes about half a millisecond, and keeps a thousand.
"""

from functools import cache
from pathlib import Path

import torch
from torch.nn import functional as F

LEAST = 2**20  # multiplications that a product has at least, so that oneDNN's longer way to its kernel pays
ROWS = 32  # experts' numbers of rows are filled up to multiples of it, so that few shapes come up


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


def goes_by_onednn(rows: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether `product` of these does."""
    is_large = rows.numel() * len(weight) >= LEAST
    return is_large and rows.dtype == weight.dtype == torch.float32 and rows.device.type == "cpu" and has_onednn()


def product(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """rows weight^T, of which autograd knows nothing: [..., in], [out, in] -> [..., out]."""
    if goes_by_onednn(rows, weight):
        if not (weight.is_contiguous() or weight.T.is_contiguous()):
            weight = weight.contiguous()  # of others it takes its reference kernel, which is fifty times slower
        return torch.ops.mkldnn._linear_pointwise(rows, weight, None, "none", [], "")
    return F.linear(rows, weight)


def outer_product(grad: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """The sum over all rows of their outer products, a weight's gradient: [..., out], [..., in] -> [out, in]."""
    grad, rows = grad.flatten(0, -2), rows.flatten(0, -2)
    return product(grad.T, rows.T) if goes_by_onednn(grad.T, rows.T) else grad.T @ rows


def padded(order: torch.Tensor, counts: list[int], fill: int) -> tuple[torch.Tensor, list[int]]:
    """[P] in groups of so many -> each group filled up to a multiple of `ROWS`."""
    whole = [-(-count // ROWS) * ROWS for count in counts]
    filled = order.new_full((sum(whole),), fill)
    for own, place in zip(order.split(counts), filled.split(whole), strict=True):
        place[: len(own)] = own
    return filled, whole
