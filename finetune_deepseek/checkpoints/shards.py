"""Weights on disk, read and written one shard at a time, so that a model far larger than memory passes through.

A checkpoint is a dictionary from names to `LazyTensor`s, which know shape and type and read themselves when asked.
What an export does to weights (split experts, merge an adapter, change the type) is a function from one such
dictionary to another; `write_shards` is the only one that reads.
"""

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from configuration_deepseek import DeepSeekConfig
from modeling_deepseek.checkpoint_files import CheckpointError
from modeling_deepseek.quantization import (
    QUANTIZED,
    DequantizedSlice,
    check_readable,
    dequantized,
    grid_of,
    quantize_blocks,
)

from ..data.files import read_json
from ..training.saved import ADAPTER_FILE, SMALL_FILES, Saved, download

WEIGHTS_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
# The words of a safetensors header.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
if hasattr(torch, "float8_e8m0fnu"):  # from torch 2.7 on
    DTYPES["F8_E8M0"] = torch.float8_e8m0fnu
SPOTS = 32  # values of each tensor that are compared after writing


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is read when it is needed."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], torch.Tensor]
    cut: Callable[[Any], torch.Tensor] | None = None  # reads what an index selects, and no more

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    # As safetensors' slices have them, so that quantization.py takes these as well.
    def get_shape(self) -> list[int]:
        """Shape of the tensor."""
        return list(self.shape)

    def get_dtype(self) -> str:
        """safetensors' word for the type."""
        return next(word for word, dtype in DTYPES.items() if dtype == self.dtype)

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self.read()[index] if self.cut is None else self.cut(index)

    def map(self, change: Callable[[torch.Tensor], torch.Tensor], **fields: Any) -> "LazyTensor":
        """This tensor after `change`; `fields` (shape, dtype) are what it changes."""
        return replace(self, read=lambda: change(self.read()), cut=None, **fields)


Tensors: TypeAlias = dict[str, LazyTensor]


def unread() -> torch.Tensor:
    """In place of `read` where only shape and type are known."""
    raise NotImplementedError("only the header of this weight was read")


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
            try:
                self.file = safe_open(path, "pt", backend="pread")
            except SafetensorError as error:
                raise CheckpointError(f"{path} is damaged ({error}); copy or download it again") from error
            self.path = path
        return self.file


def torch_type(word: str, weight: str) -> torch.dtype:
    """torch's type for a word of a header.

    Raises:
        CheckpointError: if there is none here; the line begins with `weight`.
    """
    check_readable(word, weight)
    if word not in DTYPES:
        raise CheckpointError(f"{weight} is of type {word}, which is not read")
    return DTYPES[word]


def open_weights(path: Path, files: OpenFiles) -> Tensors:
    """The tensors of one safetensors file, in the order in which they lie in it.

    Raises:
        CheckpointError: if the file is damaged; its length is checked, its values are not.
    """
    opened = files.get(path)
    tensors: Tensors = {}
    for name in opened.offset_keys():
        entry = opened.get_slice(name)
        dtype = torch_type(entry.get_dtype(), f"{path}: weight {name}")

        def read(name: str = name) -> torch.Tensor:
            return files.get(path).get_tensor(name)

        def cut(index: Any, name: str = name) -> torch.Tensor:
            return files.get(path).get_slice(name)[index]

        tensors[name] = LazyTensor(tuple(entry.get_shape()), dtype, read, cut)
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
    for name, file in read_json(folder / INDEX_FILE).get("weight_map", {}).items():
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


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write JSON as transformers does."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8", newline="\n")


def with_weights(saved: Saved) -> Path:
    """The folder of a model or adapter with its weights, which are downloaded from the Hub if need be.

    Raises:
        ValueError: if they can't be had.
    """
    if saved.commit is None:
        return saved.folder
    return download(saved.where, saved.name, saved.commit, [*SMALL_FILES, "*.safetensors"])


# Changes ------------------------------------------------------------------------------------------------------------


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
                split[f"{prefix}.{expert}.{part}.weight"] = LazyTensor((rows, columns), tensor.dtype, read)
    return split


def dequantize(tensors: Tensors, config: DeepSeekConfig) -> Tensors:
    """FP8 blocks as float32, without their scales; other weights as they are.

    Raises:
        CheckpointError: for scales that don't fit, see `quantization.dequantized`.
    """
    return {
        name: LazyTensor(tuple(entry.get_shape()), torch.float32, partial(entry.__getitem__, ...))
        if isinstance(entry, DequantizedSlice)
        else entry
        for name, entry in dequantized(tensors, config).items()
    }


def quantize(tensors: Tensors, block: list[int], scale_fmt: str | None = None) -> Tensors:
    """The weights that releases quantize as e4m3 with `weight_scale_inv` beside them; the others as they are."""
    quantized: Tensors = {}
    for name, tensor in tensors.items():
        if not QUANTIZED.fullmatch(name):
            quantized[name] = tensor
            continue
        both = _Quantized(tensor, block, scale_fmt)
        grid = tuple(grid_of(list(tensor.shape), block))
        quantized[name] = LazyTensor(tensor.shape, torch.float8_e4m3fn, both.weight)
        quantized[f"{name}_scale_inv"] = LazyTensor(grid, torch.float32, both.scale)
    return quantized


class _Quantized:
    """Quantizes once for weight and scale, of which the scale is asked for last."""

    def __init__(self, tensor: LazyTensor, block: list[int], scale_fmt: str | None) -> None:
        self.tensor, self.block, self.scale_fmt = tensor, block, scale_fmt
        self.kept: torch.Tensor | None = None

    def _both(self) -> tuple[torch.Tensor, torch.Tensor]:
        return quantize_blocks(self.tensor.read(), self.block, self.scale_fmt)

    def weight(self) -> torch.Tensor:
        weight, self.kept = self._both()
        return weight

    def scale(self) -> torch.Tensor:
        scale, self.kept = self.kept, None
        return self._both()[1] if scale is None else scale


def cast(tensors: Tensors, dtype: torch.dtype, keep: Iterable[str] = ()) -> Tensors:
    """Floating-point tensors in another type, except for names that end in one of `keep`."""
    kept = tuple(keep)
    return {
        name: tensor.map(lambda value: value.to(dtype), dtype=dtype)
        if tensor.dtype.is_floating_point and tensor.dtype != dtype and not (kept and name.endswith(kept))
        else tensor
        for name, tensor in tensors.items()
    }


# Writing ------------------------------------------------------------------------------------------------------------


def spots(tensor: torch.Tensor) -> bytes:
    """The bytes of up to `SPOTS` evenly spaced elements, first and last among them."""
    flat = tensor.reshape(-1)
    places = torch.tensor(sorted({spot * (flat.numel() - 1) // (SPOTS - 1) for spot in range(SPOTS)}))
    return flat.view(torch.uint8).unflatten(0, (-1, flat.itemsize))[places].numpy().tobytes() if flat.numel() else b""


def write_shards(
    tensors: Tensors,
    folder: Path,
    max_shard_size: int | str = "5GB",
    report: Callable[[int, int], Any] = lambda done, total: None,
) -> None:
    """Write the weights as model.safetensors, or as shards with an index, then read them again and compare.

    Args:
        max_shard_size: bytes, or a number with KB, MB, GB; one shard at a time is held in memory.
        report: is told the number of shards that are written, and of all.

    Raises:
        ValueError: for a size that can't be read.
        OSError: if what is on the disk afterwards is not what was written.
    """
    try:
        split = split_state_dict_into_shards_factory(
            tensors,  # type: ignore[arg-type]
            get_storage_size=lambda tensor: tensor.nbytes,
            filename_pattern="model{suffix}.safetensors",
            max_shard_size=max_shard_size,
        )
    except ValueError as error:
        raise ValueError(f"--max-shard-size {max_shard_size}: {error}; write 5GB or 500MB, say") from error
    shards = list(split.filename_to_tensors.items())
    written: dict[str, dict[str, bytes]] = {}
    for done, (file, names) in enumerate(shards, start=1):
        shard = {name: tensors[name].read().contiguous() for name in names}
        save_file(shard, folder / file, {"format": "pt"})
        written[file] = {name: spots(tensor) for name, tensor in shard.items()}
        del shard
        report(done, len(shards))
    if split.is_sharded:
        size = sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": size}, "weight_map": split.tensor_to_filename}
        write_json(folder / INDEX_FILE, index)
    verify_shards(folder, tensors, written)


def verify_shards(folder: Path, tensors: Tensors, written: dict[str, dict[str, bytes]]) -> None:
    """Read what was written: every name, shape and type, and some values of each tensor.

    Raises:
        OSError: naming the first file or weight that differs.
    """
    if set(weight_files(folder)) != set(written):
        raise OSError(f"{folder}: other weight files than were written")
    files = OpenFiles()
    for file, names in written.items():
        found = open_weights(folder / file, files)
        if found.keys() != names.keys():
            raise OSError(f"{file}: weight {min(found.keys() ^ names.keys())} is in only one of plan and file")
        for name, values in names.items():
            with_shape = (found[name].shape, found[name].dtype) == (tensors[name].shape, tensors[name].dtype)
            if not with_shape or spots(found[name].read()) != values:
                raise OSError(f"{file}: weight {name} reads back otherwise than it was written; is the disk sound?")


@contextmanager
def new_destination(destination: str | os.PathLike, is_file: bool = False) -> Iterator[Path]:
    """Check that `destination` can be written to and holds nothing yet; if writing fails, it is as it was.

    Raises:
        ValueError: if it exists (an empty folder may), or can't be made.
    """
    path = Path(destination)
    if path.exists() and (is_file or not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{destination} exists; name another destination, or remove it")
    folder = path.parent if is_file else path
    chain = [folder, *folder.parents]
    made = chain[: next(i for i, parent in enumerate(chain) if parent.exists())]
    try:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not os.access(folder, os.W_OK):
                raise PermissionError(13, "no right to write there")
        except OSError as error:
            raise ValueError(f"{destination}: can't be written ({error.strerror}); name another") from error
        yield path
    except BaseException:
        for parent in made:
            if parent.is_dir() and not any(parent.iterdir()):
                parent.rmdir()
        raise
