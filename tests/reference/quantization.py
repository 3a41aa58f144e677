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


# e2m1: sign, two bits of exponent with bias 1, one of mantissa (OCP microscaling formats, version 1.0, 5.3.3)
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]


def dequantize_fp4(packed: torch.Tensor, exponents: torch.Tensor) -> torch.Tensor:
    """Bytes [R, C / 2], the even column in the lower half, and bytes of e8m0 [R, C / 32] -> float64 [R, C], exact."""
    rows = []
    for codes, powers in zip(packed.view(torch.uint8).tolist(), exponents.tolist(), strict=True):
        columns = [nibble for code in codes for nibble in (code % 16, code // 16)]
        rows.append([E2M1[nibble] * 2.0 ** (powers[j // 32] - 127) for j, nibble in enumerate(columns)])
    return torch.tensor(rows, dtype=torch.float64)


def nearest_e2m1(value: float) -> float:
    """The nearest number of e2m1; of two equally near ones that with an even code."""
    codes = sorted(range(8), key=lambda code: (abs(abs(value) - E2M1[code]), code % 2))
    return E2M1[codes[0]] * (-1 if value < 0 else 1)
