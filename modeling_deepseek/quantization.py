"""FP8 weights in blocks, as V3 and its successors are published (DeepSeek-V3, arXiv 2412.19437, section 3.3.2).

A weight [R, C] is e4m3; beside it lies `weight_scale_inv` [ceil(R / r), ceil(C / c)], one factor per block of r x c,
the last blocks of a row or column being partial: w = q * factor of its block. Factors are float32 or powers of two
(ue8m0, V3.1). The block comes from the config: a grid of scales does not tell it.
"""

from typing import Any

import torch

from .weight_names import SCALE, CheckpointError, grid_of

E4M3_MAX = 448.0
FP8_WORD = "F8_E4M3"  # as safetensors' headers have it


def dequantize_blocks(weight: torch.Tensor, scale: torch.Tensor, block: list[int]) -> torch.Tensor:
    """e4m3 [R, C] and its scales [ceil(R / r), ceil(C / c)] -> float32 [R, C], each product rounded once."""
    rows, columns = weight.shape
    factors = scale.float().repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)[:, :columns]
    return factors.mul_(weight.float())


def quantize_blocks(
    weight: torch.Tensor, block: list[int], scale_fmt: str | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The other way: [R, C] -> e4m3 [R, C] and float32 scales, such that each block's largest value is e4m3's.

    Args:
        block: [r, c].
        scale_fmt: "ue8m0" rounds the scales up to powers of two, as V3.1 has them.

    Returns:
        Quantized weight and scales; dequantized they differ from `weight` by at most one rounding to e4m3.
    """
    (rows, columns), (down, across) = weight.shape, grid_of(weight.shape, block)
    padded = torch.nn.functional.pad(
        weight.float(), (0, across * block[1] - columns, 0, down * block[0] - rows)
    ).unflatten(0, (down, block[0]))
    blocks = padded.unflatten(-1, (across, block[1]))  # [down, r, across, c]
    scale = blocks.abs().amax(dim=(1, 3)) / E4M3_MAX  # [down, across]
    scale = torch.where(scale > 0, scale, 1.0)
    if scale_fmt == "ue8m0":
        mantissa, exponent = torch.frexp(scale)  # mantissa in [1/2, 1)
        scale = torch.ldexp(torch.ones_like(scale), exponent - (mantissa == 0.5).int())
    quantized = (blocks / scale[:, None, :, None]).clamp(-E4M3_MAX, E4M3_MAX)
    return quantized.flatten(2, 3).flatten(0, 1)[:rows, :columns].to(torch.float8_e4m3fn), scale


class DequantizedSlice:
    """A quantized weight in a file that gives its values in float32 when it is read; like safetensors' slices."""

    def __init__(self, weight: Any, scale: Any, block: list[int]):
        self.weight, self.scale, self.block = weight, scale, block

    def get_shape(self) -> list[int]:
        """Shape of the weight."""
        return self.weight.get_shape()

    def get_dtype(self) -> str:
        """safetensors' word for the type of what is read."""
        return "F32"

    def __getitem__(self, index: Any) -> torch.Tensor:
        return dequantize_blocks(self.weight[...], self.scale[...], self.block)[index]


def check_readable(word: str, weight: str) -> None:
    """Refuse safetensors' word for powers of two in one byte where torch (2.6) has no such type.

    Raises:
        CheckpointError: the line begins with `weight`.
    """
    if word == "F8_E8M0" and not hasattr(torch, "float8_e8m0fnu"):
        raise CheckpointError(
            f"{weight} is of type {word}, which torch {torch.__version__} lacks; install 2.7 or later"
        )


def dequantized(weights: dict[str, Any], config: Any) -> dict[str, Any]:
    """Replace the quantized entries of a checkpoint by ones that dequantize themselves when read.

    Args:
        weights: key -> safetensors slice, scales among them.
        config: of the model; `source_quantization_config` says the block.

    Returns:
        Key -> slice, without the scales.

    Raises:
        CheckpointError: for a scale of the wrong shape, a quantized weight without one, one without its weight, and a
            config that does not say the block. The line names the key.
    """
    quantized = {key for key, entry in weights.items() if entry.get_dtype() == FP8_WORD}
    scales = {key for key in weights if key.endswith(f".{SCALE}")}
    if not quantized and not scales:
        return weights
    block = (config.source_quantization_config or {}).get("weight_block_size")
    if not block:
        raise CheckpointError(
            f"weight {min(quantized | scales)} is quantized in blocks, but config.json has no quantization_config "
            "with weight_block_size; copy it from the release"
        )
    result = {}
    for key, entry in weights.items():
        if key in scales:
            if key.removesuffix(SCALE) + "weight" not in quantized:
                raise CheckpointError(f"scale {key} has no quantized weight beside it; the checkpoint is damaged")
        elif key in quantized:
            scale_key = f"{key}_scale_inv"
            if scale_key not in scales:
                raise CheckpointError(f"weight {key} is quantized but its scale {scale_key} is missing")
            found, wanted = list(weights[scale_key].get_shape()), grid_of(entry.get_shape(), block)
            if found != wanted:
                raise CheckpointError(
                    f"scale {scale_key} has shape {tuple(found)}, but a weight of shape {tuple(entry.get_shape())} in "
                    f"blocks of {block[0]} x {block[1]} has {tuple(wanted)}; mend weight_block_size, or copy the "
                    "checkpoint again"
                )
            check_readable(weights[scale_key].get_dtype(), f"scale {scale_key}")
            result[key] = DequantizedSlice(entry, weights[scale_key], block)
        else:
            result[key] = entry
    return result
