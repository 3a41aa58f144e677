"""Features of users and contexts: columns of a file of users and of the interactions, and a model's numbers for them.

The values that training shows go into the model's config; modeling_deepseek/side_features.py says how they are read.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from modeling_deepseek.side_features import NO_VALUE, feature_numbers

from ...data import cells
from ...data.cells import Column, one, plain, typed
from ...data.words import nearest_match
from ..arguments import FeatureArguments

FEATURES = ("user_features", "context_features")  # fields of the config, and inputs of the model
MAX_NUMBERS = 1000  # of a column of numbers; more of them hardly repeat, and each would be a value of its own


def read_users(
    columns: Mapping[str, Sequence[Any]], user_column: str, names: Sequence[str], where: str
) -> tuple[dict[str, dict[str, str | None]], list[str]]:
    """Values by column by user, and a line for each kind of gap.

    Raises:
        ValueError: if a column is missing or holds lists, or there are no users.
    """
    wanted = [Column(name, "value", "user_feature_columns") for name in names]
    features = typed(columns, wanted, where)
    users = one(columns, Column(user_column, "id", "user_column"), where)
    found: dict[str, dict[str, str | None]] = {}
    nameless = repeated = 0
    for user, *values in zip(users, *(features[name] for name in names), strict=True):
        nameless += user is None
        repeated += user in found
        if user is not None and user not in found:
            found[user] = dict(zip(names, values, strict=True))
    if not found:
        raise ValueError(f"{where}: no users.")
    counts = {
        "rows without a user were left out": nameless,
        "rows of a user of a row before were left out": repeated,
    }
    notes = [f"{Path(where).name}: {count:,} {what}" for what, count in counts.items() if count]
    return found, notes + empty_values((row.values() for row in found.values()), names, Path(where).name)


def empty_values(rows: Iterable[Iterable[Any]], names: Sequence[str], where: str) -> list[str]:
    """A line for each column with gaps, given the cells of each row in the order of `names`."""
    empty = Counter(name for row in rows for name, value in zip(names, row, strict=True) if value is None)
    return [f"{where}: {count:,} values of {name!r} are empty and count as none" for name, count in empty.items()]


def known_values(rows: Iterable[Iterable[str | None]], names: Sequence[str], flag: str) -> dict[str, list[str]]:
    """The values of each column, given the cells of each row in the order of `names`.

    Raises:
        ValueError: for a column without any, or with too many numbers.
    """
    found: list[set[str]] = [set() for _ in names]
    for row in rows:
        for column, value in zip(found, row, strict=True):
            if value is not None:
                column.add(value)
    known = {}
    for name, values in zip(names, map(sorted, found), strict=True):
        if not values:
            raise ValueError(f"--{flag} {name}: no row of the training data has a value there; leave it out.")
        if len(values) > MAX_NUMBERS and all(map(_is_number, values)):
            raise ValueError(
                f"--{flag} {name}: {len(values):,} different numbers, of which none says anything of the next one; "
                f"bin them into at most {MAX_NUMBERS:,}, such as decades."
            )
        known[name] = values
    return known


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def number_values(
    numbers: Mapping[str, Mapping[str, int]], row: Mapping[str, Any] | None, unknown: Counter[str]
) -> list[int]:
    """A row's numbers in the order of the model's columns; values that the model doesn't know are counted."""
    found = []
    for name, known in numbers.items():
        value = cells.value(plain((row or {}).get(name)))
        unknown[name] += value is not None and value not in known
        found.append(known.get(value, NO_VALUE) if value is not None else NO_VALUE)
    return found


def known_only(
    numbers: Mapping[str, Mapping[str, int]], row: Mapping[str, Any], unknown: Counter[str]
) -> dict[str, Any]:
    """What of a row the model knows; its other values are counted by column."""
    found = number_values(numbers, row, unknown)
    return {name: row[name] for name, number in zip(numbers, found, strict=True) if number != NO_VALUE}


def contexts_after(contexts: Sequence[Any] | None, known: Sequence[int], length: int) -> list[Any]:
    """Of the items at the places `known` of a history, what is given of the next such item's interaction.

    Args:
        contexts: of each interaction of the history, and of the one that follows it, if that is known.
        length: of the history.
    """
    following = [*known[1:], length]
    return [contexts[place] if contexts is not None and place < len(contexts) else None for place in following]


def require_known(names: Iterable[str], numbers: Mapping[str, Any], where: str) -> None:
    """Refuse columns that the model doesn't read.

    Raises:
        ValueError: naming the first one.
    """
    for name in names:
        if name not in numbers:
            raise ValueError(
                f"{where}: the model reads no column {name!r}{nearest_match(name, numbers)}; it reads "
                f"{', '.join(numbers) or 'none'}."
            )


class FeatureColumns:
    """The features of a run: what the data have, and once the model's columns are known, their numbers."""

    def __init__(self, arguments: FeatureArguments) -> None:
        self.user_columns = list(dict.fromkeys(arguments.user_feature_columns or ()))
        self.context_columns = list(dict.fromkeys(arguments.context_columns or ()))
        self.users: dict[str, dict[str, str | None]] = {}
        self.user_numbers: dict[str, dict[str, int]] = {}
        self.context_numbers: dict[str, dict[str, int]] = {}
        self.unknown: Counter[str] = Counter()

    def read_users(
        self, columns: Mapping[str, Sequence[Any]], user_column: str, where: str, users: set[str]
    ) -> list[str]:
        """Take the features of these users out of a file's columns; what is missing.

        Raises:
            ValueError: as `read_users`, and if it has none of them.
        """
        self.users, notes = read_users(columns, user_column, self.user_columns, where)
        missing = len(users - self.users.keys())
        if missing == len(users):
            raise ValueError(f"{where}: none of the {missing:,} users of the interactions has a row there.")
        if missing:
            notes.append(
                f"{Path(where).name}: {missing:,} of {len(users):,} users have no row; their features count as none"
            )
        return notes

    def config_fields(self, train: Any, saved: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """The config's fields, those of a saved model or of the values in the training rows, and lines on them.

        Raises:
            ValueError: for columns that a saved model doesn't read, and as `known_values`.
        """
        asked = {"user_features": self.user_columns, "context_features": self.context_columns}
        flags = dict(zip(FEATURES, ("user_feature_columns", "context_columns"), strict=True))
        if any(asked.values()) and saved.get("model_type") == "sasrec":
            raise ValueError("SASRec reads no features of users or contexts; leave out their columns.")
        notes, fields = [], {}
        is_fixed = any(saved.get(name) for name in FEATURES)
        rows: dict[str, Iterable[Any]] = dict.fromkeys(FEATURES, ())
        if train:
            users = [self.users.get(user, {}) for user in dict.fromkeys(train["user"])]
            rows["user_features"] = ([row.get(name) for name in self.user_columns] for row in users)
        if train and self.context_columns:
            rows["context_features"] = (context for row in train["contexts"] for context in row)
        for name in FEATURES:
            columns = saved.get(name) or {}
            if is_fixed:
                require_known(asked[name], columns, f"--{flags[name]}")
                if missing := [column for column in sorted(columns) if column not in asked[name]]:
                    notes.append(f"{', '.join(missing)}: read by the model, but not given; it counts as none")
            elif asked[name]:
                columns = known_values(rows[name], asked[name], flags[name])
            if columns:
                fields[name] = columns
                sizes = ", ".join(f"{column} ({len(columns[column]):,} values)" for column in sorted(columns))
                notes.append(f"{name.replace('_', ' ')}: {sizes}")
        self.user_numbers, self.context_numbers = feature_numbers(*(fields.get(name) for name in FEATURES))
        return fields, notes

    def of_user(self, user: str) -> list[int]:
        """[F] numbers."""
        return number_values(self.user_numbers, self.users.get(user), self.unknown)

    def of_contexts(self, contexts: Sequence[Sequence[Any]] | None, known: Sequence[int], length: int) -> list[Any]:
        """[S, C] numbers for `known` items, see `contexts_after`."""
        rows = [
            None if context is None else dict(zip(self.context_columns, context, strict=True))
            for context in contexts_after(contexts, known, length)
        ]
        return [number_values(self.context_numbers, row, self.unknown) for row in rows]

    def notes_on_unknown(self) -> list[str]:
        """A line for each column with values that the model doesn't know; counting begins anew."""
        counts, self.unknown = self.unknown, Counter()
        return unknown_notes(counts)

    def example(self) -> str:
        """Arguments of `Recommender.recommend`, for the card's code."""
        shown = dict(zip(FEATURES, (self.user_numbers, self.context_numbers), strict=True))
        values = {name: {column: next(iter(known)) for column, known in n.items()} for name, n in shown.items() if n}
        return ", ".join(f"{name}={row!r}" for name, row in values.items())


def unknown_notes(counts: Counter[str]) -> list[str]:
    return [
        f"{count:,} values of {name!r} are unknown to the model and count as none" for name, count in counts.items()
        if count
    ]  # fmt: skip


def request_features(
    numbers: Sequence[Mapping[str, Mapping[str, int]]],
    histories: Sequence[tuple[int, Sequence[int]]],
    user_features: Sequence[Mapping[str, Any]] | None,
    context_features: Sequence[Any] | None,
) -> tuple[dict[str, Any], list[str]]:
    """What a model's `recommend` takes for several histories, and a line for each column with unknown values.

    Args:
        numbers: the model's for users, and for contexts.
        histories: of each the length, and the places of the items that the model knows.
        user_features: {column: value} of each; context_features: of each {column: value} of the request, or a list of
            such, one per item, see `Recommender.recommend`.

    Raises:
        ValueError: for a column that the model doesn't read, or another number of rows.
    """
    users, contexts = numbers
    unknown: Counter[str] = Counter()
    features: dict[str, Any] = {}
    for name, given in (("user_features", user_features), ("context_features", context_features)):
        if given is not None and len(given) != len(histories):
            raise ValueError(f"{name} has {len(given)} rows for {len(histories)} histories")
    if user_features is not None:
        for row in user_features:
            require_known(row, users, "user_features")
        features["user_features"] = [number_values(users, row, unknown) for row in user_features]
    if context_features is not None:
        features["context_features"] = []
        for (length, known), given in zip(histories, context_features, strict=True):
            after = [None] * (length - 1) + [given] if isinstance(given, Mapping) else list(given)
            if len(after) != length:
                raise ValueError(f"context_features has {len(after)} contexts for a history of {length} items")
            for context in after:
                require_known(context or (), contexts, "context_features")
            own = [None, *after]  # an item's own context is what follows the item before it
            rows = [number_values(contexts, context, unknown) for context in contexts_after(own, known, length)]
            features["context_features"].append(rows)
    return features, unknown_notes(unknown)


def parse_context(words: Sequence[str] | None) -> dict[str, str]:
    """`weekday=Mo device=phone` as {column: value}.

    Raises:
        ValueError: for a word without a column.
    """
    pairs = [word.partition("=") for word in words or ()]
    for name, equals, value in pairs:
        if not name or not equals:
            raise ValueError(f"--context {name or equals + value}: write it as column=value.")
    return {name: value for name, _, value in pairs}
