"""FP8 blocks, element by element: what the bytes of e4m3 and the scales of blocks mean (OCP 8-bit format, 2023)."""

import torch


def e4m3(byte: int) -> float:
    """Sign, four bits of exponent with bias 7, three of mantissa; exponent 0 is subnormal, 0x7f is not a number."""
    sign, exponent, mantissa = byte >> 7, (byte >> 3) & 15, byte & 7
    if exponent == 15 and mantissa == 7:
        return float("nan")
    value = mantissa / 8 * 2**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return -value if sign else value


def dequantize(weight: torch.Tensor, scale: torch.Tensor, block: list[int]) -> torch.Tensor:
    """e4m3 [R, C], scales of blocks -> float64 [R, C], exact."""
    codes, factors = weight.view(torch.uint8).tolist(), scale.double().tolist()
    rows = [
        [e4m3(code) * factors[i // block[0]][j // block[1]] for j, code in enumerate(row)]
        for i, row in enumerate(codes)
    ]
    return torch.tensor(rows, dtype=torch.float64)
