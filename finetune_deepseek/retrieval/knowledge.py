"""The files of a knowledge base, texts and tables, as passages with the places that they come from."""

import hashlib
import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from ..data.cells import plain
from ..data.table import ENDINGS, is_table, read_columns

TEXT_ENDINGS = (".txt", ".md", ".rst")
TEXT_COLUMNS = ("text", "passage", "context")  # of a table, the first that it has
MAX_CHARACTERS = 1000
OWN_FILES = ("index.json", "passages.jsonl", "embeddings.safetensors")  # of an index, which may lie in what it is of
SAVING = re.compile(r"_(.+\.)?saving-[0-9a-f]{8}")  # folders that a killed save has left
SPACE = re.compile(r"\s*")
SENTENCE_END = re.compile(r"(?<=[.!?])(?=\s)|(?<=[。！？])")


@dataclass(frozen=True)
class Passage:
    """A stretch of a file; `source` is its path below the knowledge folder and its first line (a table's row)."""

    text: str
    source: str


def split_text(text: str, max_characters: int = MAX_CHARACTERS) -> Iterator[tuple[int, str]]:
    """Passages of a text with the number of the line that each begins in, from 1.

    Paragraphs (which end at an empty line) are joined while they fit; a longer one is cut between sentences, and a
    longer sentence anywhere.
    """
    held, held_line = "", 1
    for line, paragraph in _paragraphs(text):
        counted = 0  # up to where the paragraph's lines are in `line`
        for start, piece in _pieces(paragraph, max_characters):
            if held and len(held) + len(piece) + 1 > max_characters:
                yield held_line, held
                held = ""
            if not held:
                line += paragraph.count("\n", counted, start)
                held_line, counted = line, start
            held = f"{held}\n{piece}" if held else piece
    if held:
        yield held_line, held


def _paragraphs(text: str) -> Iterator[tuple[int, str]]:
    line = 1
    for block in re.split(r"(\n[^\S\n]*\n\s*)", text):
        if block.strip():
            yield line + block[: len(block) - len(block.lstrip())].count("\n"), block.strip()
        line += block.count("\n")


def _pieces(paragraph: str, max_characters: int) -> Iterator[tuple[int, str]]:
    """Where each piece begins, and its text as it stands in the paragraph."""
    start = end = 0
    for sentence_end in (*(match.start() for match in SENTENCE_END.finditer(paragraph)), len(paragraph)):
        if end > start and sentence_end - start > max_characters:
            yield start, paragraph[start:end]
            start = end
        start = cast(re.Match, SPACE.match(paragraph, start)).end() if start == end else start
        while sentence_end - start > max_characters:
            yield start, paragraph[start : start + max_characters]
            start += max_characters
        end = sentence_end
    if end > start:
        yield start, paragraph[start:end]


def read_passages(path: Path, name: str, max_characters: int) -> list[Passage]:
    """The passages of one file.

    Raises:
        ValueError: if it can't be read, or holds no text.
    """
    if path.suffix in TEXT_ENDINGS:
        try:
            text = path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"can't be read as UTF-8 text (byte {error.start + 1}); convert the file") from error
        passages = [Passage(piece, f"{name}:{line}") for line, piece in split_text(text, max_characters)]
    elif is_table(path):
        columns = read_columns(str(path))
        column = next((column for column in TEXT_COLUMNS if column in columns), None)
        if column is None:
            raise ValueError(f"none of the columns {', '.join(TEXT_COLUMNS)}; it has {', '.join(columns)}")
        passages = [
            Passage(piece, f"{name}:{number}")
            for number, text in enumerate(map(plain, columns[column]), start=1)
            if isinstance(text, str)
            for _, piece in split_text(text, max_characters)
        ]
    else:
        raise ValueError(f"unknown ending; texts are {', '.join(TEXT_ENDINGS)}, tables {', '.join(ENDINGS)}")
    if not passages:
        raise ValueError("no text in it")
    for passage in passages:
        try:
            passage.text.encode()
        except UnicodeEncodeError:  # JSON may name half of a character
            raise ValueError(f"{passage.source} holds half of a character (such as \\ud83d); mend it") from None
    return passages


def readable(path: Path) -> str:
    """A path with `/`; bytes that aren't UTF-8, as old archives name files, as escapes."""
    return path.as_posix().encode(errors="surrogateescape").decode(errors="backslashreplace")


def is_index(folder: Path) -> bool:
    """Whether an index of passages is kept in a folder, by what its index.json says, or that it can't be read."""
    if not all((folder / name).is_file() for name in OWN_FILES[:2]):
        return False
    try:
        content = json.loads((folder / OWN_FILES[0]).read_bytes())
    except (ValueError, RecursionError):
        return True
    return isinstance(content, dict) and {"format", "files", "max_characters"} <= content.keys()


def is_hidden(below: Path) -> bool:
    """Whether a file below a folder is hidden, or what a killed save has left."""
    return any(part.startswith(".") or SAVING.fullmatch(part) for part in below.parts)


def knowledge_files(knowledge: Path, index_folder: Path | None = None) -> dict[str, Path]:
    """Name by path of the files of a folder (hidden ones and those of indexes left out) or of one file.

    Raises:
        ValueError: if there is nothing.
    """
    if knowledge.is_file():
        return {readable(Path(knowledge.name)): knowledge}
    if not knowledge.is_dir():
        raise ValueError(f"{knowledge}: no such file or folder.")
    found = [(path.relative_to(knowledge), path) for path in sorted(knowledge.rglob("*")) if path.is_file()]
    found = [(below, path) for below, path in found if not is_hidden(below)]
    own = None if index_folder is None else index_folder.resolve()
    indexes = {path.parent for _, path in found if path.name == OWN_FILES[0] and is_index(path.parent)}
    for folder in sorted(folder for folder in indexes if folder.resolve() != own):
        print(f"left out {folder}: an index of passages, which are read where they come from", file=sys.stderr)
    indexes |= {path.parent for _, path in found if path.parent.resolve() == own}
    files = {readable(b): path for b, path in found if path.name not in OWN_FILES or path.parent not in indexes}
    if not files:
        raise ValueError(f"{knowledge}: there are no files in this folder.")
    return files


@dataclass
class Knowledge:
    """What was read of a knowledge base.

    Attributes:
        passages: of all files.
        files: name, hash, place of the first passage and number of passages, in the order of these.
        before: where each passage stood in what was read before, None for a new one.
        unreadable: how many files were left out.
    """

    passages: list[Passage] = field(default_factory=list)
    files: list[dict[str, Any]] = field(default_factory=list)
    before: list[int | None] = field(default_factory=list)
    unreadable: int = 0

    @property
    def new(self) -> list[int]:
        """The places of new passages."""
        return [place for place, before in enumerate(self.before) if before is None]

    def add(self, name: str, digest: str, passages: list[Passage], before: Sequence[int | None]) -> None:
        """Take up a file."""
        start = len(self.passages)
        self.files.append({"name": name, "sha256": digest, "start": start, "passages": len(passages)})
        self.passages += passages
        self.before += before


def read_knowledge(
    knowledge: Path,
    max_characters: int,
    known: Sequence[dict[str, Any]],
    passages: Sequence[Passage],
    index_folder: Path | None = None,
) -> Knowledge:
    """The passages of a folder or file; a file that hasn't changed keeps those that it had. What can't be read is left
    out, with a line each.

    Args:
        known: files as in `Knowledge.files`, and passages: what was read of them before.
        index_folder: whose own files are no knowledge, should it lie in it.

    Raises:
        ValueError: if there is nothing to read, or nothing of it can be read.
    """
    found, earlier = Knowledge(), {file["name"]: file for file in known}
    for name, path in knowledge_files(knowledge, index_folder).items():
        try:
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            if name in earlier and earlier[name]["sha256"] == digest:
                start = earlier[name]["start"]
                places = range(start, start + earlier[name]["passages"])
                found.add(name, digest, [passages[place] for place in places], places)
            else:
                fresh = read_passages(path, name, max_characters)
                found.add(name, digest, fresh, [None] * len(fresh))
        except (ValueError, OSError) as error:
            found.unreadable += 1
            print(f"left out {name}: {' '.join(str(error).split())}", file=sys.stderr)
    if not found.passages:
        raise ValueError(
            f"{knowledge}: none of its {found.unreadable} files can be read, so there is nothing to find."
        )
    print(
        f"{len(found.passages):,} passages of {len(found.files):,} files ({len(found.new):,} new; "
        f"{found.unreadable:,} files left out)",
        file=sys.stderr,
    )
    return found
