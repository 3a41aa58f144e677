"""Weights on disk: names, shapes and types from the headers of files, values when they are asked for.

A checkpoint is a dictionary from names to `LazyTensor`s, which know shape and type and read themselves when asked.
What an export does to weights (split experts, merge an adapter, change the type) is a function from one such
dictionary to another; `shards.write_shards` is the only one that reads. Neither torch nor transformers is imported
before that.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from safetensors import SafetensorError, safe_open

from configuration_deepseek.fields import DeepSeekFields
from configuration_deepseek.weight_names import (
    ROUTED,
    SCALE,
    CheckpointError,
    block_of,
    grid_of,
    is_quantized_in_releases,
    with_our_names,
)

from ..data.files import read_json
from ..training.saved import ADAPTER_FILE

if TYPE_CHECKING:
    import torch

WEIGHTS_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"


class Kind(NamedTuple):
    """A type of tensors: torch's name for it, and the bytes of an element."""

    torch: str
    bytes: int


# By the words of a safetensors header.
TYPES = {
    "F64": Kind("float64", 8),
    "F32": Kind("float32", 4),
    "F16": Kind("float16", 2),
    "BF16": Kind("bfloat16", 2),
    "F8_E4M3": Kind("float8_e4m3fn", 1),
    "F8_E5M2": Kind("float8_e5m2", 1),
    "F8_E8M0": Kind("float8_e8m0fnu", 1),
    "I64": Kind("int64", 8),
    "I32": Kind("int32", 4),
    "I16": Kind("int16", 2),
    "I8": Kind("int8", 1),
    "U8": Kind("uint8", 1),
    "BOOL": Kind("bool", 1),
}
FP8, FP4 = "F8_E4M3", "I8"


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is read when it is needed."""

    shape: tuple[int, ...]
    word: str  # of `TYPES`
    read: Callable[[], "torch.Tensor"]
    cut: Callable[[Any], "torch.Tensor"] | None = None  # reads what an index selects, and no more

    @property
    def dtype(self) -> "torch.dtype":
        import torch  # which takes seconds, and who asks for names, shapes and sizes needs none

        return getattr(torch, TYPES[self.word].torch)

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * TYPES[self.word].bytes

    @property
    def is_floating_point(self) -> bool:
        return "F" in self.word

    # As safetensors' slices have them, so that quantization.py takes these as well.
    def get_shape(self) -> list[int]:
        """Shape of the tensor."""
        return list(self.shape)

    def get_dtype(self) -> str:
        """safetensors' word for the type."""
        return self.word

    def __getitem__(self, index: Any) -> "torch.Tensor":
        return self.read()[index] if self.cut is None else self.cut(index)

    def map(self, change: Callable[["torch.Tensor"], "torch.Tensor"], **fields: Any) -> "LazyTensor":
        """This tensor after `change`; `fields` (shape, word) are what it changes."""
        return replace(self, read=lambda: change(self.read()), cut=None, **fields)

    def to(self, word: str) -> "LazyTensor":
        """This tensor in another type."""
        cut, dtype = self.cut, lambda: replace(self, word=word).dtype
        made = self.map(lambda value: value.to(dtype()), word=word)
        return made if cut is None else replace(made, cut=lambda index: cut(index).to(dtype()))


Tensors: TypeAlias = dict[str, LazyTensor]


def unread() -> "torch.Tensor":
    """In place of `read` where only shape and type are known."""
    raise NotImplementedError("only the header of this weight was read")


def opened_file(path: Path, framework: str) -> Any:
    """A safetensors file.

    Raises:
        CheckpointError: if it is damaged.
    """
    try:
        return safe_open(path, framework, backend="pread")
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged ({error}); copy or download it again") from error


class OpenFiles:
    """Safetensors files, of which only the last one used is open. Read, not mapped: pages of maps count as used."""

    def __init__(self) -> None:
        self.path: Path | None = None
        self.file: Any = None

    def get(self, path: Path) -> Any:
        """The open file.

        Raises:
            CheckpointError: if it is damaged.
        """
        if path != self.path:
            self.path, self.file = None, None
            self.path, self.file = path, opened_file(path, "pt")
        return self.file


def known_word(word: str, weight: str) -> str:
    """A word of a header, if tensors of that type are read.

    Raises:
        CheckpointError: if they aren't; the line begins with `weight`.
    """
    if word == "F8_E8M0":  # not in every torch
        from modeling_deepseek.quantization import check_readable

        check_readable(word, weight)
    if word not in TYPES:
        raise CheckpointError(f"{weight} is of type {word}, which is not read")
    return word


def word_of(dtype: "torch.dtype") -> str:
    """The word of a header for torch's type."""
    name = str(dtype).removeprefix("torch.")
    return next(word for word, kind in TYPES.items() if kind.torch == name)


def open_weights(path: Path, files: OpenFiles) -> Tensors:
    """The tensors of one safetensors file, in the order in which they lie in it.

    Raises:
        CheckpointError: if the file is damaged; its length is checked, its values are not.
    """
    opened = opened_file(path, "np")  # which gives the header alone, without torch
    tensors: Tensors = {}
    for name in opened.offset_keys():
        entry = opened.get_slice(name)

        def read(name: str = name) -> "torch.Tensor":
            return files.get(path).get_tensor(name)

        def cut(index: Any, name: str = name) -> "torch.Tensor":
            return files.get(path).get_slice(name)[index]

        word = known_word(entry.get_dtype(), f"{path}: weight {name}")
        tensors[name] = LazyTensor(tuple(entry.get_shape()), word, read, cut)
    return tensors


def weight_files(folder: Path) -> dict[str, list[str]]:
    """The weight files of a checkpoint folder, and the names that its index says are in each (empty without index).

    Raises:
        CheckpointError: if there are no weights, or one of the files is not there.
    """
    if (folder / WEIGHTS_FILE).is_file():
        return {WEIGHTS_FILE: []}
    if not (folder / INDEX_FILE).is_file():
        kind = "an adapter" if (folder / ADAPTER_FILE).is_file() else "no weights"
        raise CheckpointError(f"{folder} holds {kind}: there is neither {WEIGHTS_FILE} nor {INDEX_FILE}")
    files: dict[str, list[str]] = {}
    listed = read_json(folder / INDEX_FILE).get("weight_map")
    if not isinstance(listed, dict) or not all(isinstance(file, str) for file in listed.values()):
        raise CheckpointError(f"{folder / INDEX_FILE} is damaged (no weight_map of names); copy or download it again")
    for name, file in listed.items():
        files.setdefault(file, []).append(name)
    for file in sorted(files):
        if not (folder / file).is_file():
            raise CheckpointError(f"{folder / file} is not there, but {INDEX_FILE} lists it; copy or download it")
    return dict(sorted(files.items()))


def has_weights(folder: Path) -> bool:
    """Whether all weight files are there, as in a snapshot of the Hub that was loaded before."""
    try:
        return bool(weight_files(folder))
    except CheckpointError:
        return False


def open_checkpoint(folder: Path) -> Tensors:
    """The weights of a checkpoint folder, whole or in shards.

    Raises:
        CheckpointError: naming the file or weight that is missing or damaged.
    """
    files = OpenFiles()
    tensors: Tensors = {}
    for file, listed in weight_files(folder).items():
        found = open_weights(folder / file, files)
        for name in listed:
            if name not in found:
                raise CheckpointError(f"{folder / file} lacks weight {name}, which {INDEX_FILE} says is there")
        tensors |= found
    return tensors


# Changes ------------------------------------------------------------------------------------------------------------


def open_model_weights(folder: Path, config: DeepSeekFields) -> Tensors:
    """`open_checkpoint`, under our names and with experts one by one."""
    return split_experts(with_our_names(open_checkpoint(folder), config))


def is_fp4(name: str, tensor: LazyTensor) -> bool:
    """Whether each element of a weight holds two numbers."""
    return tensor.word == FP4 and name.endswith(".weight")


def is_packed(name: str, tensor: LazyTensor) -> bool:
    """Whether a weight is quantized."""
    return tensor.word == FP8 or is_fp4(name, tensor)


def split_experts(tensors: Tensors) -> Tensors:
    """Fused experts (`experts.gate_up_proj` [E, 2I, D], `experts.down_proj`) under their per-expert official names."""
    split: Tensors = {}
    for name, tensor in tensors.items():
        if not name.endswith((".experts.gate_up_proj", ".experts.down_proj")):
            split[name] = tensor
            continue
        prefix, _, parameter = name.rpartition(".")
        experts, rows, columns = tensor.shape
        parts = ("gate_proj", "up_proj") if parameter == "gate_up_proj" else ("down_proj",)
        rows //= len(parts)
        for expert in range(experts):
            for place, part in enumerate(parts):
                where = (expert, slice(place * rows, (place + 1) * rows))
                read = partial(tensor.__getitem__, where)
                split[f"{prefix}.{expert}.{part}.weight"] = LazyTensor((rows, columns), tensor.word, read)
    return split


def dequantize(tensors: Tensors, config: DeepSeekFields) -> Tensors:
    """FP8 and FP4 blocks as float32, without their scales; other weights as they are.

    Raises:
        CheckpointError: for scales that don't fit, see `quantization.dequantized`.
    """
    if not any(is_packed(name, tensor) or name.endswith(f".{SCALE}") for name, tensor in tensors.items()):
        return tensors
    from modeling_deepseek.quantization import DequantizedSlice, dequantized  # its package takes seconds

    return {
        name: LazyTensor(tuple(entry.get_shape()), "F32", partial(entry.__getitem__, ...), entry.__getitem__)
        if isinstance(entry, DequantizedSlice)
        else entry
        for name, entry in dequantized(tensors, config).items()
    }


def quantize(tensors: Tensors, config: DeepSeekFields) -> Tensors:
    """The weights that releases quantize as they have them, with `weight_scale_inv` beside; the others as they are.

    Blocks of FP8 are those of `config.source_quantization_config`; routed experts are FP4 if `config.expert_dtype`
    says so, and all scales one byte each then.
    """
    has_fp4 = config.expert_dtype == "fp4"
    scale_word = "F8_E8M0" if has_fp4 else "F32"
    quantized: Tensors = {}
    for name, tensor in tensors.items():
        if not is_quantized_in_releases(name, config):
            quantized[name] = tensor
        elif has_fp4 and ROUTED.fullmatch(name):
            quantized |= _both(name, tensor, _Quantized(tensor, _in_fp4), FP4, [1, 32], scale_word)
        else:
            release: Any = config.source_quantization_config
            block, scale_fmt = block_of(name, release["weight_block_size"]), release.get("scale_fmt")
            change = partial(_in_fp8, block=block, scale_fmt=scale_fmt)
            quantized |= _both(name, tensor, _Quantized(tensor, change), FP8, block, scale_word)
    return quantized


def _both(name: str, tensor: LazyTensor, both: "_Quantized", word: str, block: list[int], scale_word: str) -> Tensors:
    rows, columns = tensor.shape
    grid = tuple(grid_of([rows, columns], block))
    if word == FP4 and columns % block[1]:
        raise CheckpointError(f"weight {name} has {columns} columns, no multiple of {block[1]} as FP4 needs; use bf16")
    scale = LazyTensor(grid, "F32", both.scale)
    return {
        name: LazyTensor((rows, columns // 2 if word == FP4 else columns), word, both.weight),
        f"{name}_scale_inv": scale
        if scale_word == "F32"
        else scale.to(known_word(scale_word, f"the scale of {name}")),
    }


def _in_fp8(weight: "torch.Tensor", **how: Any) -> tuple["torch.Tensor", "torch.Tensor"]:
    from modeling_deepseek.quantization import quantize_blocks

    return quantize_blocks(weight, **how)


def _in_fp4(weight: "torch.Tensor") -> tuple["torch.Tensor", "torch.Tensor"]:
    from modeling_deepseek.quantization import quantize_fp4

    return quantize_fp4(weight)


class _Quantized:
    """Quantizes once for weight and scale, of which the scale is asked for last."""

    def __init__(self, tensor: LazyTensor, change: Callable[["torch.Tensor"], tuple]) -> None:
        self.tensor, self.change = tensor, change
        self.kept: torch.Tensor | None = None

    def _both(self) -> tuple["torch.Tensor", "torch.Tensor"]:
        return self.change(self.tensor.read())

    def weight(self) -> "torch.Tensor":
        weight, self.kept = self._both()
        return weight

    def scale(self) -> "torch.Tensor":
        scale, self.kept = self.kept, None
        return self._both()[1] if scale is None else scale


def cast(tensors: Tensors, word: str, keep: Iterable[str] = ()) -> Tensors:
    """Floating-point tensors in the type of a word, except for names that end in one of `keep`."""
    kept = tuple(keep)
    return {
        name: tensor
        if not tensor.is_floating_point or tensor.word == word or (kept and name.endswith(kept))
        else tensor.to(word)
        for name, tensor in tensors.items()
    }
