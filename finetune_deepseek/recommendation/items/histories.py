"""The histories of a run and what came next in them: read and split from whatever the flags name, and by number.

What a task on interactions begins with, whatever it makes of them (scores of all items, codes, prompts).
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

import pandas as pd

from ...data.arguments import SPLITS
from ...data.sources import DatasetColumns, Rows, open_hub
from ...data.table import read_columns
from ..arguments import RecommendationArguments
from .catalogue import PADDING
from .feature_columns import empty_values
from .interactions import (
    SplitRows,
    as_dataset,
    by_time,
    clean,
    find_split_files,
    in_order,
    leave_one_out,
    ml_100k,
    read_interactions,
    simulated,
    split_file_rows,
)


class Notes(list[str]):
    """Lines on the data: on the screen at once, on the card later."""

    def say(self, *lines: str) -> None:
        self.extend(lines)
        for line in lines:
            print(line)


class Histories:
    """Rows by split: `user`, `source` (the history as item ids), `target`, and `contexts` if there are.

    Args:
        contexts: columns of the interactions' contexts.
        candidates_column: of the scored files, where only some items are ranked.
    """

    def __init__(
        self,
        arguments: RecommendationArguments,
        seed: int,
        notes: Notes,
        contexts: Sequence[str] = (),
        candidates_column: str | None = None,
    ) -> None:
        self.arguments, self.seed, self.notes = arguments, seed, notes
        self.contexts, self.candidates_column = contexts, candidates_column
        self.candidates: dict[str, list[list[str]]] = {}  # in files, by scored split

    @property
    def _tie_seed(self) -> int:
        return self.seed if self.arguments.tie_seed is None else self.arguments.tie_seed

    def settings(self) -> dict[str, Any]:
        """What a trained model keeps beside the flags: the seed by which equal times were ordered, if one did."""
        return {"tie_seed": self._tie_seed} if self.arguments.tie_rule == "random" else {}

    def read(self) -> dict[str, Rows]:
        """The splits, of which each has as many rows as it may.

        Raises:
            ValueError: with one line, for what can't be read or split.
        """
        arguments = self.arguments
        if arguments.data_dir or arguments.train_file or arguments.validation_file or arguments.test_file:
            splits = self._read_files()
        else:
            splits = self._split_interactions()
        limits = (arguments.max_train_samples, arguments.max_eval_samples, arguments.max_predict_samples)
        limited = {name: splits[name][:limit] for name, limit in zip(SPLITS, limits, strict=True) if splits.get(name)}
        known = {item for row in limited.get("train", []) for item in row["source"]}
        for name in ("validation", "test"):
            if known and name in limited and (new := sum(row["target"] not in known for row in limited[name])):
                self.notes.say(
                    f"{name}: {new:,} of {len(limited[name]):,} targets are in no training history; they count"
                )
        return {name: as_dataset(rows) for name, rows in limited.items()}

    def _read_files(self) -> SplitRows:
        arguments = self.arguments
        files = find_split_files(arguments.data_dir) if arguments.data_dir else {
            split: path for split in SPLITS if (path := getattr(arguments, f"{split}_file"))
        }  # fmt: skip
        names = (arguments.user_column, arguments.history_column, arguments.target_column)
        splits = {}
        for split, path in files.items():
            candidates = (self.candidates_column or "") if split != "train" else ""
            splits[split], notes = split_file_rows(read_columns(path), names, split, path, candidates)
            if not splits[split]:
                raise ValueError(f"{path}: no row has a history{' and a target' * (split != 'train')}.")
            self.notes.say(*notes)
            if candidates:
                self.candidates[split] = [row["candidates"] for row in splits[split]]
        return splits

    def _split_interactions(self) -> SplitRows:
        arguments, say = self.arguments, self.notes.say
        frame, notes = clean(self._read_interactions(), arguments.keep_repeats, arguments.k_core)
        say(*notes)
        if self.contexts:
            say(*empty_values(frame["context"], self.contexts, "interactions"))
        frame, notes = in_order(frame, arguments.tie_rule, self._tie_seed)
        say(*notes)
        say(f"{frame['user'].nunique():,} users, {frame['item'].nunique():,} items, {len(frame):,} interactions")
        splits, notes = (
            leave_one_out(frame) if arguments.split == "leave_one_out" else by_time(frame, arguments.time_share)
        )
        say(*notes)
        if not splits["test"]:
            raise ValueError(
                "No user has enough interactions to be scored; three each are needed, or another --split."
            )
        return splits

    def _read_interactions(self) -> pd.DataFrame:
        arguments = self.arguments
        if arguments.is_embedded:
            if self.contexts:
                raise ValueError("--context_columns: simulated users have none; name --interactions_file.")
            self.notes.say("simulated users over CLDR's territories: they show the code path, not how people behave")
            return simulated()
        names = (arguments.user_column, arguments.item_column, arguments.timestamp_column)
        if arguments.interactions_file:
            path = arguments.interactions_file
            return read_interactions(read_columns(path), names, path, self.contexts)
        name = cast(str, arguments.dataset_name)
        if name == "ml-100k":
            return ml_100k(contexts=self.contexts)
        columns = DatasetColumns(open_hub(name, arguments.dataset_config_name, split="train"))
        return read_interactions(columns, names, f"{name}, split train", self.contexts)


def items_of(splits: Mapping[str, Rows]) -> Iterator[str]:
    """The items of all splits, as often as they are there: one that is new in a scored split is ranked too, as it
    would be in use."""
    for rows in splits.values():
        for history in rows["source"]:
            yield from history
        yield from (target for target in rows["target"] if target is not None)


class NumberedHistory(NamedTuple):
    """A row by the numbers of a catalogue."""

    items: list[int]  # those of the history that the catalogue has
    places: list[int]  # of these in the history
    windows: list[slice]  # of `items`, one for each feature
    target: int  # PADDING, where the catalogue doesn't have it or there is none


class NumberedHistories(list[NumberedHistory]):
    """The rows of a split by number; for training in windows of `limit` + 1 items, which overlap by one, so that
    every item but a history's first is learned once in each epoch, for evaluation the last `limit` items.

    Args:
        numbers: of the items, from 1.

    Raises:
        ValueError: if a scored history holds no item of the catalogue.
    """

    def __init__(self, rows: Rows, numbers: Mapping[str, int], limit: int, is_training: bool) -> None:
        self.is_training, self.num_unknown = is_training, 0
        for user, history, target in zip(rows["user"], rows["source"], rows["target"], strict=True):
            places = [place for place, item in enumerate(history) if item in numbers]
            items = [numbers[history[place]] for place in places]
            self.num_unknown += len(history) - len(items)
            if not is_training and not items:
                raise ValueError(f"User {user}: no item of this history is in the model's catalogue.")
            ends = range(len(items), 1, -limit)
            windows = [slice(max(0, end - limit - 1), end) for end in ends] if is_training else [slice(-limit, None)]
            self.append(NumberedHistory(items, places, windows, numbers.get(target, PADDING)))

    def notes_on_histories(self) -> list[str]:
        """What was left out of them."""
        if not self.num_unknown:
            return []
        return [f"left out {self.num_unknown:,} items of histories that are not in the model's catalogue"]

    def notes_on_targets(self) -> list[str]:
        """How many of the scored ones can't be recommended."""
        missing = 0 if self.is_training else sum(row.target == PADDING for row in self)
        return (
            [f"{missing:,} of {len(self):,} targets are not in the model's catalogue; they rank last"]
            if missing
            else []
        )

    def features(self) -> dict[str, list[Any]]:
        """`input_ids` and their `length`, as what is learned of them; for evaluation also `seen` and `target`.

        Raises:
            ValueError: if nothing can be learned.
        """
        features: dict[str, list[Any]] = {"input_ids": [row.items[window] for row in self for window in row.windows]}
        if not features["input_ids"]:
            raise ValueError("No training history has two items, so there is nothing to learn.")
        features["length"] = [len(window) - self.is_training for window in features["input_ids"]]
        if not self.is_training:
            # A repeated target stays among what can be recommended.
            features["seen"] = [[item for item in row.items if item != row.target] or [PADDING] for row in self]
            features["target"] = [row.target for row in self]
        features["number"] = list(range(len(features["length"])))  # by which a row's draws are its own
        return features
