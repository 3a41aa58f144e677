"""What recommendation is told: which interactions, how they are split, what the model reads of them."""

from dataclasses import dataclass, field
from typing import Literal

from ..data.ranges import check_ranges
from ..data.sources import FORMATS
from .items.feature_columns import FeatureArguments
from .report import RANKS_FILE


@dataclass
class RecommendationArguments(FeatureArguments):
    """Which interactions, and how they are split."""

    _argument_group_name = "data"
    SOURCES = ("interactions_file", "dataset_name", "data_dir", "train_file", "validation_file", "test_file")

    interactions_file: str | None = field(
        default=None, metadata={"help": f"One file of user, item and time: {FORMATS}"}
    )
    user_column: str = field(default="user_id", metadata={"help": "Column of the user."})
    item_column: str = field(default="item_id", metadata={"help": "Column of the item."})
    timestamp_column: str = field(
        default="timestamp",
        metadata={
            "help": "Column of the time, numbers or dates, whose day or month may stand first, as one above 12 tells; "
            "none takes the file's order."
        },
    )
    items_file: str | None = field(
        default=None,
        metadata={"help": "File of items and their texts: items are then read as text, and new ones need no click."},
    )
    text_columns: list[str] = field(
        default_factory=lambda: ["title"], metadata={"help": "Its columns that make an item's text, in this order."}
    )
    max_text_length: int = field(default=32, metadata={"help": "Tokens of an item's text that a new model reads."})
    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "ml-100k (out of RecBole), or interactions on the Hub, in the split train.",
            "aliases": ["--dataset"],
        },
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Its configuration."})
    data_dir: str | None = field(
        default=None, metadata={"help": "Folder with train, validation and test files of ready histories."}
    )
    train_file: str | None = field(default=None, metadata={"help": "A list of items per user (--history_column)."})
    validation_file: str | None = field(default=None, metadata={"help": "The same, and the item that came next."})
    test_file: str | None = field(default=None, metadata={"help": "The same as for validation."})
    history_column: str = field(
        default="items", metadata={"help": "Column of the list; in csv with spaces between its items, or in JSON."}
    )
    target_column: str = field(default="target", metadata={"help": "Column of the item that came next."})
    split: Literal["leave_one_out", "time"] = field(
        default="leave_one_out",
        metadata={"help": "Test is each user's last item and validation the one before, or the time after a cut."},
    )
    time_share: float = field(default=0.1, metadata={"help": "Share of the interactions after each cut in time."})
    tie_rule: Literal["file", "item", "random"] = field(
        default="file", metadata={"help": "What orders a user's items of equal time; it can change scores by half."}
    )
    k_core: int = field(default=1, metadata={"help": "Leave out users and items with fewer interactions, repeatedly."})
    keep_repeats: bool = field(default=False, metadata={"help": "Keep an item that the user had before."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Use this many training users at most."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "The same, for validation."})
    max_predict_samples: int | None = field(default=None, metadata={"help": "The same, for test."})
    max_length: int = field(
        default=50, metadata={"help": "Items of a history that the model reads; training histories are cut into such."}
    )
    item_dropout: float = field(
        default=0.0,
        metadata={"help": "Leave out items of training histories, at a rate drawn for each between 0 and this."},
    )
    init_items: Literal["random", "svd"] = field(
        default="random",
        metadata={"help": "svd: item vectors of a new model begin with which items share users, and words if any."},
    )
    item_counts: bool = field(
        default=False,
        metadata={
            "help": "Add item-kNN over the last items and transitions from the last one to a new model's scores, by "
            "weights chosen on validation (--do_eval)."
        },
    )
    baselines: bool = field(
        default=True, metadata={"help": "Score popularity, transitions and item-kNN beside the model (--do_predict)."}
    )
    sasrec: bool = field(
        default=False,
        metadata={"help": "Train SASRec of the width, depth and heads of the --preset, to compare with."},
    )
    compare_with: list[str] | None = field(
        default=None,
        metadata={"help": f"Folders of other runs, whose {RANKS_FILE} are compared user by user.", "metavar": "RUN"},
    )

    def __post_init__(self) -> None:
        files = any((self.train_file, self.validation_file, self.test_file))
        if sum((bool(self.interactions_file), bool(self.dataset_name), bool(self.data_dir), files)) > 1:
            raise ValueError(
                "--interactions_file, --dataset_name, --data_dir and the --train_file group are ways to name data; "
                "use one."
            )
        if self.sasrec and self.items_file:
            raise ValueError("--items_file: SASRec reads no texts; leave out one of it and --sasrec.")
        if self.sasrec and (flags := self.feature_flags):
            raise ValueError(f"--{flags[0]}: SASRec reads no features; leave out it or --sasrec.")
        if self.sasrec and self.item_counts:
            raise ValueError("--item_counts: SASRec has none; leave out it or --sasrec.")
        self.check_features(self.dataset_name == "ml-100k", has_contexts=not (self.data_dir or files))
        check_ranges(self)

    @property
    def is_embedded(self) -> bool:
        return not any(getattr(self, name) for name in self.SOURCES)
