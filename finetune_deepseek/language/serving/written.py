"""JSON lines that a run writes in order, and that the next run of the same command goes on with.

Beside FILE lies FILE.settings.json with what the lines depend on. A run that was killed leaves whole lines and at most
one half line, which is cut off.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ...data.files import finite, json_line, read_json, write_json


class WrittenLines:
    """A file of JSON lines, of which the first `done` are there.

    Args:
        settings: what the lines depend on; those of the run that began the file have to be the same.
        expected: what each line begins with.

    Raises:
        ValueError: if the file is another run's, or nobody's.
    """

    def __init__(
        self, path: Path, settings: dict[str, Any], expected: Sequence[dict[str, Any]], overwrite: bool = False
    ):
        self.path, self.beside = path, path.with_name(f"{path.name}.settings.json")
        settings = json.loads(json.dumps(finite(settings)))
        has_lines = path.is_file() and path.stat().st_size > 0
        if has_lines and not overwrite:
            self._check_settings(settings)
            self.done = self._check_lines(expected)
        else:
            self.done = 0
            self._begin()
        write_json(self.beside, settings)

    def _begin(self) -> None:
        try:
            self.path.write_bytes(b"")
        except OSError as error:
            raise ValueError(
                f"--output {self.path}: can't be written ({error.strerror}); name another file."
            ) from error

    def _check_settings(self, settings: dict[str, Any]) -> None:
        before = read_json(self.beside)
        where, advice = f"--output {self.path}", "name another file, or begin this one anew by --overwrite"
        if before is None:
            raise ValueError(
                f"{where}: it is there, and {self.beside.name}, which would say how to go on, isn't; {advice}."
            )
        for name in (*settings, *before):
            if before.get(name) != settings.get(name):
                raise ValueError(
                    f"{where}: it was begun with {name} {_said(before.get(name))}, now it is "
                    f"{_said(settings.get(name))}; {advice}."
                )

    def _check_lines(self, expected: Sequence[dict[str, Any]]) -> int:
        """The number of whole lines; what follows them is cut off."""
        content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        lines = whole.split(b"\n")[:-1]
        if len(lines) > len(expected):
            raise ValueError(f"--output {self.path}: {len(lines):,} lines, but there are {len(expected):,} prompts.")
        for number, (line, prompt) in enumerate(zip(lines, expected, strict=False), 1):
            if not _begins(line, json.loads(json.dumps(finite(prompt), default=str))):
                raise ValueError(
                    f"--output {self.path}, line {number}: it isn't of this input's prompt {number}; name another "
                    "file, or begin this one anew by --overwrite."
                )
        if len(whole) < len(content):
            with self.path.open("r+b") as file:
                file.truncate(len(whole))
        return len(lines)

    def write(self, lines: Iterable[dict[str, Any]]) -> None:
        """Add lines, each on the disk before the next is asked for."""
        with self.path.open("ab") as file:
            for line in lines:
                file.write(json_line(line).encode("utf-8"))
                file.flush()


def _begins(line: bytes, prompt: dict[str, Any]) -> bool:
    try:
        found = json.loads(line)
    except ValueError:
        return False
    return isinstance(found, dict) and {name: found.get(name) for name in prompt} == prompt


def _said(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:60] + "..."
