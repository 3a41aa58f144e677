"""Weights written to disk one shard at a time, so that a model far larger than memory passes through.

`write_shards` is the only one that reads the tensors that it is given; tensors.py says what they are.
"""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors.torch import save_file

from ..training.saved import SMALL_FILES, Saved, download
from .tensors import INDEX_FILE, OpenFiles, Tensors, open_weights, weight_files

SPOTS = 32  # values of each tensor that are compared after writing


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
