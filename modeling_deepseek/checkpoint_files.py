"""Reading checkpoint folders: a load that fails names the file, and none holds copies."""

import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from safetensors import SafetensorError, safe_open

from .weight_names import CheckpointError


def open_slices(files: list[str]) -> dict[str, Any]:
    """Key -> a slice of safetensors that is read when it is indexed, for all tensors of the files.

    Read, not mapped into memory: pages of a mapped file stay beside the fused experts that are made of them.
    """
    opened = [safe_open(path, framework="pt", device="cpu", backend="pread") for path in files]
    return {key: file.get_slice(key) for file in opened for key in file.keys()}  # noqa: SIM118  no mapping


_turn = threading.Lock()
_loads: list[str | None] = []  # one for each load that is under way, the first being what the variable was before


@contextmanager
def in_turn() -> Iterator[None]:
    """Let transformers read weights one after another: its reading threads run ahead and hold most of them twice.

    It is told by an environment variable, which stays set while any thread of the process loads.
    """
    name = "HF_DEACTIVATE_ASYNC_LOAD"
    with _turn:
        _loads.append(os.environ.get(name))
        os.environ[name] = "1"
    try:
        yield
    finally:
        with _turn:
            before = _loads.pop()
            if not _loads and before is not None:
                os.environ[name] = before
            elif not _loads:
                os.environ.pop(name, None)


def unlisted(source: str | os.PathLike | None) -> list[str]:
    """Shards in a folder that its index does not list, so that nobody reads them."""
    index = os.path.join(source or "", "model.safetensors.index.json")
    if source is None or not os.path.isfile(index):
        return []
    with open(index, encoding="utf-8") as file:
        listed = set(json.load(file)["weight_map"].values())
    shards = (name for name in os.listdir(source) if name.startswith("model") and name.endswith(".safetensors"))
    return sorted(name for name in shards if name not in listed)


@contextmanager
def naming_the_broken_file(source: str | os.PathLike | None) -> Iterator[None]:
    """Turn a parser's complaint while `source` is loaded into a line that names the file.

    Raises:
        CheckpointError: for a safetensors or json file that is damaged.
    """
    try:
        yield
    except (SafetensorError, json.JSONDecodeError) as error:
        broken = _first_broken_file(source) or f"a file of {source}"
        raise CheckpointError(f"{broken} is damaged ({error}); copy or download it again") from error


def _first_broken_file(source: str | os.PathLike | None) -> str | None:
    if source is None or not os.path.isdir(source):
        return None
    for name in sorted(os.listdir(source)):
        path = os.path.join(source, name)
        try:
            if name.endswith(".safetensors"):
                with safe_open(path, "pt"):
                    pass
            elif name.endswith(".json"):
                with open(path, encoding="utf-8") as file:
                    json.load(file)
        except (SafetensorError, ValueError):
            return path
    return None
