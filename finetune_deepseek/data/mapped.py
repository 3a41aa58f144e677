"""Text of files that may be larger than memory: mapped from the copy that `datasets` keeps on disk, or as a stream."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import pyarrow as pa
from datasets import (
    ArrowBasedBuilder,
    BuilderConfig,
    Dataset,
    DatasetInfo,
    Features,
    IterableDataset,
    SplitGenerator,
    Value,
)
from datasets.exceptions import DatasetGenerationError

from .cells import Column, typed
from .table import Columns, batches

Rows: TypeAlias = Dataset | IterableDataset

NESTED = "translation"  # the column of {language: text} in Hugging Face's layout


@dataclass
class TextConfig(BuilderConfig):
    """Which columns of which file; a copy is made anew when one of these changes."""

    path: str = ""
    texts: tuple[str, ...] = ()
    separator: str | None = None
    stamp: tuple[Any, ...] = ()


class TextBuilder(ArrowBasedBuilder):
    """Columns of text of a file of any kind as `datasets` keeps them: mapped from disk, or as a stream."""

    VERSION = "1.0.0"  # raise it with what table.py and cells.py read
    BUILDER_CONFIG_CLASS = TextConfig
    config: TextConfig

    def _info(self) -> DatasetInfo:
        return DatasetInfo(features=Features({name: Value("string") for name in self.config.texts}))

    def _split_generators(self, dl_manager: Any) -> list[SplitGenerator]:
        return [SplitGenerator(name="train", gen_kwargs={"paths": [self.config.path]})]

    def _generate_tables(self, paths: list[str]) -> Iterator[tuple[int, pa.Table]]:
        first_row = 1
        for number, batch in enumerate(raw for path in paths for raw in self._batches(path)):
            wanted = [Column(name, "text", required=False) for name in self.config.texts]
            size = max(map(len, batch.values()), default=0)
            texts = {name: [None] * size for name in self.config.texts}
            texts |= typed(_flat(batch, paths[0], first_row), wanted, paths[0], first_row)
            arrays = {name: _strings(cells, f"{paths[0]}, row ", first_row) for name, cells in texts.items()}
            yield number, pa.table(arrays)
            first_row += size

    def _batches(self, path: str) -> Iterator[Columns]:
        return batches(path, separator=self.config.separator)


def _strings(cells: list[Any], where: str, first_row: int) -> pa.Array:
    try:
        return pa.array(cells, pa.string())
    except UnicodeEncodeError:  # JSON may name half of a character, as texts do that were cut
        rows = enumerate(cells, start=first_row)
        row = next(number for number, cell in rows if cell and cell.encode("utf-8", "replace").decode() != cell)
        raise ValueError(f"{where}{row}: the text holds half of a character (such as \\ud83d); mend it.") from None


def _flat(batch: Columns, where: str, first_row: int) -> Columns:
    """A batch whose column `translation` holds {language: text}, as columns by language; any other as it is."""
    if NESTED not in batch:
        return batch
    rows = typed(batch, [Column(NESTED, "record")], where, first_row)[NESTED]
    for number, row in enumerate(rows, start=first_row):
        if row is not None and not isinstance(row, dict):
            raise ValueError(
                f"{where}, row {number}: {NESTED!r} must hold {{language: text}}, found {str(row)[:40]!r}."
            )
    names = dict.fromkeys(name for row in rows for name in row or ())
    return {name: [(row or {}).get(name) for row in rows] for name in names}


def text_rows(
    path: str, texts: Iterable[str], streaming: bool = False, separator: str | None = None
) -> tuple[Rows, dict[str, Any] | None]:
    """Rows of those columns of text that a file has, in columns of their own or within one named `translation`; and
    an example of a row with all of the file's columns, None if there is none.

    What the first `ROWS` rows don't have, the file doesn't. `separator` is that of a text file's documents, which are
    in the column `text`.

    Raises:
        ValueError: if the file can't be read, or a cell is no text.
    """
    batch = next(batches(path, separator=separator))
    flat = _flat(batch, path, 1)
    texts = tuple(name for name in texts if name in flat)
    if not any(map(len, batch.values())):
        return Dataset.from_dict({name: [] for name in texts}), None
    first: dict[str, Any] = {name: next((c for c in cells if c is not None), None) for name, cells in batch.items()}
    if NESTED in first:
        first[NESTED] = dict.fromkeys(flat)
    if not texts:
        return Dataset.from_dict({}), first
    stamp = (str(Path(path).resolve()), Path(path).stat().st_mtime_ns, Path(path).stat().st_size)
    builder = TextBuilder(config_name="text", path=str(path), texts=texts, separator=separator, stamp=stamp)
    if streaming:
        return builder.as_streaming_dataset("train"), first
    try:
        builder.download_and_prepare()
    except DatasetGenerationError as error:
        raise ValueError(str(error.__cause__)) from error
    return builder.as_dataset("train"), first
