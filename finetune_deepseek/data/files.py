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


@contextmanager
def replaced_folder(folder: Path) -> Iterator[Path]:
    """A folder to write to; its files take their places in `folder` when all are written, see `writing_beside`."""
    from modeling_deepseek.whole_folders import writing_beside  # its package takes seconds, of which readers need none

    with writing_beside(folder) as beside:
        yield Path(beside)


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all, also where several processes of a training write the same."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.saving")
    try:
        beside.write_text(text, encoding="utf-8")
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
