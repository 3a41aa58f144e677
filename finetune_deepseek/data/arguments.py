"""The flags that name a task's data: a data set of the Hub, folders or files, and how many rows of them."""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

from .ranges import check_ranges
from .words import nearest_match

SPLITS = ("train", "validation", "test")
FORMATS = ".json, .jsonl, .csv (, ; tab | between cells), .tsv, .inter or .parquet, also .gz or .zst."


class TaskFlags:
    """What the command line asks of a task's dataclass beside its flags, before the task itself is imported.

    Of the flags, those that end in `_file` and `_dir` name what is read.
    """

    _argument_group_name = "data"
    SOURCES: ClassVar[tuple[str, ...]] = ()  # the flags that name data
    FIRST: ClassVar[tuple[str, ...]] = ()  # the flags that people use first, for --help
    SAVED: ClassVar[tuple[str, ...]] = ()  # those that a trained model depends on, saved with it: training/saved.py
    RECIPE: ClassVar[Path | None] = None  # YAML file to run when neither a model nor data is named
    EXAMPLES: ClassVar[str] = ""  # commands, each with a line that says what it does; --help shows the first

    @property
    def config_defaults(self) -> dict[str, Any]:
        """What a new model's config has where neither its file nor --config_overrides says it."""
        return {}

    def check_paths(self) -> None:
        """Refuse files and folders that aren't there.

        Raises:
            ValueError: for the first, with the flag.
        """
        for flag in (flag.name for flag in fields(self)):  # type: ignore[arg-type]  # subclasses are dataclasses
            if kind := {"dir": "folder", "file": "file"}.get(flag.rpartition("_")[2]):
                value = getattr(self, flag)
                for path in [value] if isinstance(value, str) else value or ():
                    check_path(flag, path, kind)


def check_path(flag: str, path: str | None, kind: str = "file") -> None:
    """Refuse a path that isn't there; None is none.

    Args:
        kind: "file", "folder", or "file or folder".

    Raises:
        ValueError: with the flag, and what lies beside it and may have been meant.
    """
    there = {"file": Path.is_file, "folder": Path.is_dir}.get(kind, Path.exists)
    if path is not None and not there(Path(path)):
        beside = Path(path).parent
        known = [entry.name for entry in beside.iterdir()] if beside.is_dir() else []
        raise ValueError(f"--{flag} {path}: no such {kind}{nearest_match(Path(path).name, known)}.")


@dataclass
class DataArguments(TaskFlags):
    """Where rows come from, and how many of them are used."""

    SOURCES = ("dataset_name", "data_dir", "train_file", "validation_file", "test_file")
    FIRST: ClassVar[tuple[str, ...]] = ("data_dir", "train_file", "validation_file", "test_file", "dataset_name")

    dataset_name: str | None = field(default=None, metadata={"help": "Data set id on the Hub."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Its configuration, such as de-en."})
    data_dir: list[str] | None = field(
        default=None, metadata={"help": "Folders with train, validation and test files.", "metavar": "DIR"}
    )
    train_file: list[str] | None = field(default=None, metadata={"help": FORMATS, "metavar": "FILE"})
    validation_file: list[str] | None = field(
        default=None, metadata={"help": "The same, for --do_eval.", "metavar": "FILE"}
    )
    test_file: list[str] | None = field(
        default=None, metadata={"help": "The same, for --do_predict.", "metavar": "FILE"}
    )
    max_train_samples: int | None = field(
        default=None, metadata={"help": "Use this many rows at most of each training file."}
    )
    max_eval_samples: int | None = field(default=None, metadata={"help": "The same, for validation."})
    max_predict_samples: int | None = field(default=None, metadata={"help": "The same, for test."})

    def __post_init__(self) -> None:
        for name in ("data_dir", "train_file", "validation_file", "test_file"):
            if isinstance(value := getattr(self, name), str):
                setattr(self, name, [value])
        files = any((self.train_file, self.validation_file, self.test_file))
        if sum((bool(self.dataset_name), bool(self.data_dir), files)) > 1:
            raise ValueError(
                "--dataset_name, --data_dir and the --train_file group are three ways to name data; use one."
            )
        check_ranges(self)

    @property
    def names_data(self) -> bool:
        return any(getattr(self, name) for name in self.SOURCES)

    @property
    def data_name(self) -> str:
        """For the card: the Hub's id, or local names without their folders, which are nobody else's business."""
        paths = [path for name in self.SOURCES[1:] for path in getattr(self, name) or []]
        return self.dataset_name or ", ".join(dict.fromkeys(Path(path).name for path in paths))

    @property
    def limits(self) -> dict[str, int | None]:
        return dict(
            zip(SPLITS, (self.max_train_samples, self.max_eval_samples, self.max_predict_samples), strict=True)
        )
