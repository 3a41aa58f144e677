"""The flags that name a task's data: a data set of the Hub, folders or files, and how many rows of them."""

from dataclasses import dataclass, field
from pathlib import Path

from .ranges import check_ranges

SPLITS = ("train", "validation", "test")
FORMATS = (
    ".json, .jsonl, .csv, .tsv, .inter or .parquet files, also .gz or .zst; a csv without commas in its header is "
    "separated by what it has of ; tab |."
)


@dataclass
class DataArguments:
    """Where rows come from, and how many of them are used."""

    _argument_group_name = "data"
    SOURCES = ("dataset_name", "data_dir", "train_file", "validation_file", "test_file")

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
