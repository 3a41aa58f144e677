"""Folders that are written whole: a save that is cut short, by a kill too, leaves what was there or what was to be.

A new folder comes by one rename. Where an earlier save stands, the files of both would mix while they are moved: the
new ones wait in a folder inside, until its head (config.json, say) takes its place with a word of where they wait,
which whoever opens the folder follows (`current`). Then the others get their places, and last the head as it is to be.

What a model in a folder is recognised by, as the base of an adapter (`fingerprint_of`), and where that is
(`base_folder`), stand here too.

The same file lies in modeling_deepseek and tokenization_deepseek, each of which travels without the other.
"""

import filecmp
import hashlib
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

# Files that say what a folder holds, and without which nobody opens it; the first that a save has is its head.
HEADS = ("config.json", "adapter_config.json", "tokenizer_config.json", "index.json")
WORD = "saved_in"  # in a head: the folder inside where the files of the latest save wait
PREFIX = "_saving-"  # of that folder; Trainer's uploads pass over a leading "_"
# A model's weights, whole or in shards. Loading prefers whole weights to shards, so none may stay from an older save.
WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
COMPARED_BYTES = 2**20  # files up to this size are left where they are if they would not change
MODEL_FILES = ("*.safetensors", "pytorch_model*.bin")
END = 65_536  # bytes at the end of each weight file that a print reads
LEFT_SECONDS = 24 * 60 * 60  # after which a folder to write to has nobody who writes there


def current(source: str | os.PathLike, name: str) -> str | os.PathLike:
    """The folder that holds the file `name` of the latest save into `source`: nearly always `source` itself.

    `source` may be a Hub id, and is given back.
    """
    for head in HEADS:
        waiting = os.path.join(source, _word(os.path.join(source, head)), name)
        if _word(os.path.join(source, head)) and os.path.exists(waiting):
            return os.path.dirname(waiting)
    return source


@contextmanager
def writing_beside(folder: str | os.PathLike) -> Iterator[str]:
    """Give a temporary folder to write to; when that is done, its files take their places in `folder`.

    Args:
        folder: made if absent. Files of other names in it stay, except weights that the new ones replace.

    Raises:
        OSError: if writing fails (a full disk, say); `folder` then holds what it held before.
    """
    folder = os.path.realpath(folder)  # a link may lead to another file system, which no rename leads to
    os.makedirs(folder, exist_ok=True)
    is_new = _can_be_renamed(folder)
    # Else inside, because beside a mounted folder there is another file system.
    place, prefix = (os.path.dirname(folder), f"_{os.path.basename(folder)}.saving-") if is_new else (folder, PREFIX)
    beside = os.path.join(place, prefix + secrets.token_hex(4))
    os.mkdir(beside)
    shutil.copymode(folder, beside)  # it may take the place of one that others may not read
    try:
        try:
            yield beside
        except (OSError, SafetensorError) as error:
            raise OSError(f"{folder}: saving failed, the folder is as it was before; {error}") from error
        _finish(folder)
        if not (is_new and _renamed(beside, folder)):
            _put(beside, folder)
        _sweep(place, prefix)
    finally:
        if os.path.basename(beside) not in _waiting(folder):
            shutil.rmtree(beside, ignore_errors=True)


def _can_be_renamed(folder: str) -> bool:
    """Whether a folder is empty, and another may take its place by one rename."""
    is_own = os.path.ismount(folder) or os.path.samefile(folder, ".")
    return not os.listdir(folder) and not is_own and os.access(os.path.dirname(folder), os.W_OK)


def _renamed(beside: str, folder: str) -> bool:
    try:
        os.replace(beside, folder)
    except OSError:  # another process has begun to write there, or the system has no such rename
        return False
    return True


def _waiting(folder: str) -> set[str]:
    """The folders inside that heads speak of: one that a killed save has left, if any."""
    words = {_word(os.path.join(folder, head)) for head in HEADS}
    return words & set(os.listdir(folder))


def _finish(folder: str) -> None:
    """Do the rest of a save that was killed: what is saved next may be other files than those."""
    for word in _waiting(folder):
        beside = os.path.join(folder, word)
        names = _files(beside)
        head = next(head for head in HEADS if _word(os.path.join(folder, head)) == word)
        _place(beside, folder, names, head)
        _remove_old_weights(folder, names)
        os.replace(os.path.join(beside, head), os.path.join(folder, head))
        shutil.rmtree(beside, ignore_errors=True)


def _put(beside: str, folder: str) -> None:
    names = _files(beside)
    for possible in HEADS:
        _drop_word(os.path.join(beside, possible))
    changed = [name for name in names if not _is_same(os.path.join(beside, name), os.path.join(folder, name))]
    head = next((head for head in HEADS if head in names and os.path.isfile(os.path.join(folder, head))), None)
    waits = head is not None and len(changed) > 1
    if head is not None and waits:
        _place_word(beside, folder, head)
    _place(beside, folder, changed, head, waits)
    _remove_old_weights(folder, names)
    if head is not None and (waits or head in changed):
        os.replace(os.path.join(beside, head), os.path.join(folder, head))


def _place_word(beside: str, folder: str, head: str) -> None:
    """From here on the folder opens as what waits in `beside`."""
    written = os.path.join(beside, "_head")
    with open(written, "w", encoding="utf-8") as file:
        json.dump(_read(os.path.join(beside, head)) | {WORD: os.path.basename(beside)}, file, ensure_ascii=False)
    os.replace(written, os.path.join(folder, head))


def _place(beside: str, folder: str, names: list[str], head: str | None, waits: bool = True) -> None:
    """Give all files but the head their places, other heads last: without them what is new there doesn't open yet.

    Files that wait keep their names in `beside`, where they are read until the head is placed.
    """
    for name in sorted(set(names) - {head, "_head", "_second"}, key=lambda name: (name in HEADS, name)):
        target = os.path.join(folder, name)
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.replace(_second_name(beside, name) if waits else os.path.join(beside, name), target)


def _second_name(beside: str, name: str) -> str:
    source, second = os.path.join(beside, name), os.path.join(beside, "_second")
    with suppress(FileNotFoundError):
        os.remove(second)
    try:
        os.link(source, second)
    except OSError:  # not every file system has links
        shutil.copyfile(source, second)
    return second


def _remove_old_weights(folder: str, names: list[str]) -> None:
    if any(map(WEIGHTS.fullmatch, names)):
        for old in os.listdir(folder):
            if WEIGHTS.fullmatch(old) and old not in names:
                os.remove(os.path.join(folder, old))


def _sweep(place: str, prefix: str) -> None:
    """Remove what killed saves of another day have left."""
    for name in os.listdir(place):
        path = os.path.join(place, name)
        if name.startswith(prefix) and os.path.isdir(path) and time.time() - os.path.getmtime(path) > LEFT_SECONDS:
            shutil.rmtree(path, ignore_errors=True)


def _files(folder: str) -> list[str]:
    """All files, below each other's folders too, as relative paths."""
    found = (os.path.join(path, name) for path, _, names in os.walk(folder) for name in names)
    return sorted(os.path.relpath(path, folder) for path in found)


def _is_same(one: str, other: str) -> bool:
    try:
        return os.path.getsize(one) <= COMPARED_BYTES and filecmp.cmp(one, other, shallow=False)
    except OSError:
        return False


def _read(path: str) -> dict:
    """A JSON object; empty if there is none."""
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _word(head: str) -> str:
    """The folder that a head speaks of, which can be no other than one inside; empty if it speaks of none."""
    word = _read(head).get(WORD)
    return word if isinstance(word, str) and re.fullmatch(rf"{PREFIX}\w+", word) else ""


def _drop_word(head: str) -> None:
    """A head that was read while files waited for it may say so still."""
    content = _read(head)
    if content.pop(WORD, None) is not None:
        with open(head, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=2, ensure_ascii=False)


def model_files(folder: Path) -> list[Path]:
    """The weight files of a model, not of an adapter."""
    files = sorted(path for pattern in MODEL_FILES for path in folder.glob(pattern) if path.is_file())
    return [path for path in files if not path.name.startswith("adapter_")]


def fingerprint_of(folder: Path) -> str:
    """SHA-256 of config.json, and of the names, sizes and ends of the weight files: cheap, and of one model only."""
    digest = hashlib.sha256()
    if (folder / "config.json").is_file():
        digest.update((folder / "config.json").read_bytes())
    for path in model_files(folder):
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - END))
            digest.update(f"{path.name} {size} ".encode() + file.read())
    return digest.hexdigest()


def base_folder(adapter: Any, name: str, recorded: dict[str, Any], where: str | None = None) -> Path | None:
    """The folder of an adapter's base: beside it or of that name, as it was in training; None if there is none.

    Args:
        adapter: its folder or Hub id.
        name: of the base, as adapter_config.json has it.
        recorded: what deepseek_hf.json says of the base: `beside`, the way to it from the adapter; `print`, see
            `fingerprint_of`.
        where: what the error begins with, if not the adapter.

    Raises:
        ValueError: if another model is there.
    """
    beside, expected = recorded.get("beside"), recorded.get("print")
    places = [Path(adapter, beside)] if beside else []
    places = [place for place in (*places, Path(name)) if place.is_dir()]
    for place in places:
        if expected in (None, fingerprint_of(place)):
            return place
    if places:
        raise ValueError(
            f"{where or adapter}: its base model {name}: {places[0]} is another model than the one that the adapter "
            "was trained on (config.json or weights differ). Put that one there; or, to take this one all the same, "
            "remove `print` from the adapter's deepseek_hf.json."
        )
    return None
