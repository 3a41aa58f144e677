"""Quantized weights as releases publish them: FP8 in blocks (DeepSeek-V3, arXiv 2412.19437, section 3.3.2), and FP4.

FP8: a weight [R, C] is e4m3; beside it lies `weight_scale_inv` [ceil(R / r), ceil(C / c)], one factor per block of
r x c, the last blocks of a row or column being partial: w = q * factor of its block. Factors are float32 or powers of
two (ue8m0, V3.1 and V4). The block comes from the config: a grid of scales does not tell it.

Whole numbers of 4 bits, which torchao computes with one to a byte, are stored two to a byte: `NAME_packed` [R, C / 2].

FP4, V4's routed experts: an int8 weight [R, C / 2] holds two e2m1 numbers in each byte, the even column in its lower
half, and every 32 columns of a row share a power of two, [R, C / 32]. Tables of n-grams (V4.1): e4m3, such scales.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from .weight_names import ROW_BLOCK, SCALE, CheckpointError, block_of, grid_of

E4M3_MAX = 448.0
FP8_WORD = "F8_E4M3"  # as safetensors' headers have it
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # by the lower three bits; the fourth is the sign
E2M1_MAX = E2M1[-1]
E2M1_TIES = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)  # halfway between two; the code of even number takes it
FP4_WORD, FP4_BLOCK = "I8", ROW_BLOCK
PACKED = "_packed"  # behind the name of a tensor of torchao's, where two numbers are in a byte


def unpack_fp4(packed: torch.Tensor) -> torch.Tensor:
    """int8 [R, C / 2] -> float32 [R, C]."""
    table = torch.tensor([*E2M1, *(-value for value in E2M1)], device=packed.device)
    codes = packed.view(torch.uint8).int()
    return table[torch.stack((codes & 15, codes >> 4), dim=-1).flatten(-2)]


def pack_fp4(values: torch.Tensor) -> torch.Tensor:
    """The other way: [R, C], C even and no value beyond 6 -> int8 [R, C / 2], each rounded to the nearest."""
    ties = torch.tensor(E2M1_TIES, device=values.device)
    upwards = torch.arange(len(E2M1_TIES), device=values.device) % 2 == 1
    ties = torch.where(upwards, torch.nextafter(ties, ties.new_zeros(())), ties)
    codes = torch.bucketize(values.float().abs(), ties) + 8 * values.signbit().int()
    even, odd = codes.unflatten(-1, (-1, 2)).unbind(-1)
    return (even + 16 * odd).to(torch.uint8).view(torch.int8)


def dequantize_blocks(weight: torch.Tensor, scale: torch.Tensor, block: list[int]) -> torch.Tensor:
    """e4m3 [R, C] or int8 [R, C / 2], and scales [ceil(R / r), ceil(C / c)] -> float32 [R, C], each product rounded
    once."""
    values = unpack_fp4(weight) if weight.dtype == torch.int8 else weight.float()
    rows, columns = values.shape
    factors = scale.float().repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)[:, :columns]
    return factors.mul_(values)


def power_of_two_from(scale: torch.Tensor) -> torch.Tensor:
    """The least powers of two that are not below positive numbers."""
    mantissa, exponent = torch.frexp(scale)  # mantissa in [1/2, 1)
    return torch.ldexp(torch.ones_like(scale), exponent - (mantissa == 0.5).int())


def quantize_fp4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[R, C], C a multiple of 32 -> int8 [R, C / 2] and float32 powers of two [R, C / 32].

    What was FP4 before becomes the same values again; other weights are off by at most one rounding to e2m1.
    """
    blocks = weight.float().unflatten(-1, (-1, FP4_BLOCK[1]))
    largest = blocks.abs().amax(-1)
    scale = power_of_two_from(torch.where(largest > 0, largest / E2M1_MAX, 1.0))
    return pack_fp4((blocks / scale.unsqueeze(-1)).flatten(-2)), scale


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
        scale = power_of_two_from(scale)
    quantized = (blocks / scale[:, None, :, None]).clamp(-E4M3_MAX, E4M3_MAX)
    return quantized.flatten(2, 3).flatten(0, 1)[:rows, :columns].to(torch.float8_e4m3fn), scale


class DequantizedSlice:
    """A quantized weight in a file that gives its values in float32 when it is read; like safetensors' slices."""

    def __init__(self, weight: Any, scale: Any, block: list[int]):
        self.weight, self.scale, self.block = weight, scale, block

    def get_shape(self) -> list[int]:
        """Shape of the weight, unpacked."""
        return shape_of(self.weight)

    def get_dtype(self) -> str:
        """safetensors' word for the type of what is read."""
        return "F32"

    def __getitem__(self, index: Any) -> torch.Tensor:
        if isinstance(index, slice) and self.block[0] == 1:  # each row has scales of its own
            return dequantize_blocks(self.weight[index], self.scale[index], self.block)
        return dequantize_blocks(self.weight[...], self.scale[...], self.block)[index]


def pack_int4(values: torch.Tensor) -> torch.Tensor:
    """int8 from -8 to 7 [R, C], C even -> uint8 [R, C / 2], the even column in the lower half of a byte."""
    even, odd = (values.view(torch.uint8) & 15).unflatten(-1, (-1, 2)).unbind(-1)
    return even + 16 * odd


def unpack_int4(packed: torch.Tensor) -> torch.Tensor:
    """The other way."""
    codes = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2).view(torch.int8)
    return torch.where(codes > 7, codes - 16, codes)


class UnpackedSlice:
    """Numbers of 4 bits in a file that become one to a byte when they are read; like safetensors' slices."""

    def __init__(self, packed: Any):
        self.packed = packed

    def get_shape(self) -> list[int]:
        """Shape of the numbers."""
        *rows, columns = self.packed.get_shape()
        return [*rows, 2 * columns]

    def get_dtype(self) -> str:
        """safetensors' word for the type of what is read."""
        return "I8"

    def __getitem__(self, index: Any) -> torch.Tensor:
        return unpack_int4(self.packed[...])[index]


def unpacked(weights: dict[str, Any]) -> dict[str, Any]:
    """The entries of a checkpoint, numbers of 4 bits one to a byte and under torchao's names."""
    packed = {key for key in weights if key.endswith(PACKED)}
    plain = {key: entry for key, entry in weights.items() if key not in packed}
    return plain | {key.removesuffix(PACKED): UnpackedSlice(weights[key]) for key in packed}


def write_packed(folder: str) -> None:
    """Pack torchao's numbers of 4 bits in the weight files that `save_pretrained` has written into a folder."""
    for path in sorted(Path(folder).glob("model*.safetensors")):
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            names = {f"{_of_torchao(name)}_qdata" for name, word in metadata.items() if _has_4_bits(word)}
            tensors = {name: file.get_tensor(name) for name in file.keys()} if names else {}  # noqa: SIM118
        if names:
            packed = {f"{name}{PACKED}": pack_int4(tensors.pop(name)) for name in names}
            save_file(tensors | packed, path, metadata)
            _rename_in_index(Path(folder), names)


def _of_torchao(name: str) -> str:
    """`a.b.weight` -> `a.b._weight`, with which the names of its parts begin."""
    module, _, parameter = name.rpartition(".")
    return f"{module}._{parameter}"


def _has_4_bits(word: str) -> bool:
    """Whether torchao's description of a tensor, in JSON, is of 4 bits that are held one to a byte."""
    try:
        described = json.loads(word)
    except ValueError:
        return False
    data = described.get("_data") if isinstance(described, dict) else None
    is_unpacked = isinstance(data, dict) and described.get("_type") == "IntxUnpackedToInt8Tensor"
    return is_unpacked and "int4" in str(data.get("target_dtype"))


def _rename_in_index(folder: Path, names: set[str]) -> None:
    path = folder / "model.safetensors.index.json"
    if path.is_file():
        index = json.loads(path.read_text(encoding="utf-8"))
        found = index["weight_map"].items()
        index["weight_map"] = {f"{name}{PACKED}" if name in names else name: file for name, file in found}
        path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def shape_of(entry: Any) -> list[int]:
    """Shape of what a slice of safetensors means: a byte of packed FP4 is two columns."""
    *rows, columns = entry.get_shape()
    return [*rows, 2 * columns if entry.get_dtype() == FP4_WORD else columns]


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
        config: of the model; `source_quantization_config` says the block of FP8.

    Returns:
        Key -> slice, without the scales.

    Raises:
        CheckpointError: for a scale of the wrong shape, a quantized weight without one, one without its weight, and a
            config that does not say the block. The line names the key.
    """
    scales = {key for key in weights if key.endswith(f".{SCALE}")}
    quantized = {key for key, entry in weights.items() if is_quantized(key, entry)}
    for key in sorted(scales):
        if key.removesuffix(SCALE) + "weight" not in quantized:
            raise CheckpointError(f"scale {key} has no quantized weight beside it; the checkpoint is damaged")
    return {
        key: _dequantized(key, weights, config) if key in quantized else entry
        for key, entry in weights.items()
        if key not in scales
    }


def is_quantized(key: str, entry: Any) -> bool:
    """Whether an entry of a checkpoint is a weight in FP8 or FP4."""
    return entry.get_dtype() == FP8_WORD or (entry.get_dtype() == FP4_WORD and key.endswith(".weight"))


def _dequantized(key: str, weights: dict[str, Any], config: Any) -> DequantizedSlice:
    """A weight that reads itself by its scale, with the errors of `dequantized`."""
    entry, scale_key = weights[key], f"{key}_scale_inv"
    if scale_key not in weights:
        raise CheckpointError(f"weight {key} is quantized but its scale {scale_key} is missing")
    is_fp4 = entry.get_dtype() == FP4_WORD
    block = FP4_BLOCK if is_fp4 else (config.source_quantization_config or {}).get("weight_block_size")
    if not block:
        raise CheckpointError(
            f"weight {key} is quantized in blocks, but config.json has no quantization_config with "
            "weight_block_size; copy it from the release"
        )
    block, shape = block_of(key, block), shape_of(entry)
    found, wanted = list(weights[scale_key].get_shape()), grid_of(shape, block)
    if found != wanted:
        mend = "" if is_fp4 else "mend weight_block_size, or "
        raise CheckpointError(
            f"scale {scale_key} has shape {tuple(found)}, but a weight of shape {tuple(shape)} in blocks of "
            f"{block[0]} x {block[1]} has {tuple(wanted)}; {mend}copy the checkpoint again"
        )
    check_readable(weights[scale_key].get_dtype(), f"scale {scale_key}")
    return DequantizedSlice(entry, weights[scale_key], block)
