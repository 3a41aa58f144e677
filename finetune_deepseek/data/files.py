"""Lines of text that are read, and results that are written whole or not at all."""

import json
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def read_lines(path: str | None) -> list[str]:
    """The lines of a UTF-8 file or of standard input, without their ends.

    Only a line feed ends a line: splitting at U+2028 and the like would lose the match with the output's lines.

    Raises:
        ValueError: if the file can't be read, or a line isn't UTF-8.
    """
    try:
        content = Path(path).read_bytes() if path else sys.stdin.buffer.read()
    except OSError as error:
        raise ValueError(f"--input {path}: can't be read ({error.strerror}).") from error
    lines = []
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").removesuffix(b"\n").split(b"\n"), start=1):
        try:
            lines.append(line.decode("utf-8").rstrip("\r"))
        except UnicodeDecodeError as error:
            raise ValueError(f"{path or 'standard input'}, line {number}: not UTF-8 text ({error.reason}).") from error
    return lines if content else []


def read_text(path: str, where: str = "") -> str:
    """The text of a UTF-8 file; `where` names it in messages.

    Raises:
        ValueError: if it can't be read, or isn't UTF-8.
    """
    try:
        content = Path(path).read_bytes()
        return content.decode("utf-8-sig")
    except OSError as error:
        raise ValueError(f"{where or path}: can't be read ({error.strerror}).") from error
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ValueError(f"{where or path}, line {line}: not UTF-8 text ({error.reason}).") from error


def json_of(text: str, where: str) -> Any:
    """The value in a text of JSON.

    Raises:
        ValueError: if it is broken, or an object has a key twice, of which one would be lost.
    """
    try:
        return json.loads(text, object_pairs_hook=unique_keys)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}, line {error.lineno}: broken JSON: {error.msg}.") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: {why(error)}.") from None


def why(error: Exception) -> str:
    """What keeps JSON from being read, in words."""
    is_deep = isinstance(error, RecursionError)
    return "lists or objects inside each other, too deep to be read" if is_deep else str(error)


class DoubledKey(ValueError):
    """A key that an object of JSON has twice."""


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, for `object_pairs_hook`.

    Raises:
        DoubledKey: for one that is there twice, of which json would keep the last without a word.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise DoubledKey(f"{next(name for name in names if names.count(name) > 1)!r} is there twice")
    return found


def read_list(path: str, where: str = "") -> list[Any]:
    """What a JSON list holds, or a text's lines that aren't blank; only a line feed ends a line.

    Raises:
        ValueError: for a file that can't be read.
    """
    text = read_text(path, where)
    if text.lstrip().startswith("["):
        return json_of(text, where or path)
    return [line.rstrip("\r") for line in text.split("\n") if line.strip()]


@contextmanager
def replaced_folder(folder: Path) -> Iterator[Path]:
    """A folder to write to; its files take their places in `folder` when all are written, see `writing_beside`."""
    from modeling_deepseek.whole_folders import writing_beside  # its package takes seconds, of which readers need none

    with writing_beside(folder) as beside:
        yield Path(beside)


def write_text(path: Path, text: str) -> None:
    """Write a text, on every system the same bytes, as `write_bytes`."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole or not at all, also where several processes of a training write the same."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.saving")
    try:
        beside.write_bytes(content)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def finite(content: Any) -> Any:
    """The content with None in place of numbers that JSON can't say: not a number, infinite."""
    if isinstance(content, dict):
        return {name: finite(value) for name, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def json_line(content: Any) -> str:
    """One line of JSON, with its end, that every reader takes."""
    return json.dumps(finite(content), ensure_ascii=False, allow_nan=False) + "\n"


def json_text(content: dict[str, Any]) -> str:
    """The content of a JSON file for people, sorted by name."""
    return json.dumps(finite(content), indent=4, ensure_ascii=False, sort_keys=True, allow_nan=False) + "\n"


def write_json(path: Path, content: dict[str, Any]) -> None:
    write_text(path, json_text(content))


def read_json(path: Path, missing: Any = None) -> Any:
    """The JSON object in a file; `missing` if there is no such file.

    Raises:
        ValueError: if it is damaged, or no object.
    """
    if not path.is_file():
        return missing
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({why(error)}); copy or download it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged (it holds no JSON object); copy or download it again")
    return content
