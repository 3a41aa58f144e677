"""What `recommend` reads, histories, features, filters and new items, and the batches and files that it gives."""

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from modeling_deepseek.recommendation_head import feature_reader

from ..data.cells import ids
from ..data.files import json_of, read_list, read_text
from ..data.table import read_columns
from .arguments import RecommendArguments
from .items.feature_columns import known_only, parse_context, read_users, require_known, unknown_notes
from .items.interactions import (
    clean,
    contexts_of,
    in_order,
    read_interactions,
    sequences,
    split_file_rows,
)
from .recommender import Recommender

SCORES_AT_ONCE = 100_000_000  # of a batch of users with a large catalogue; 400 MB

SCHEMA = pa.schema([("user", pa.string()), ("rank", pa.int32()), ("item", pa.string()), ("score", pa.float32())])


def json_histories(arguments: RecommendArguments) -> dict[str, list[str]]:
    """Histories of a file that holds a list of items, or lists by user; none if it holds anything else.

    Raises:
        ValueError: if it can't be read, or an item is no id.
    """
    path = arguments.history
    text = read_text(path, f"--history {path}")
    try:
        content = json_of(text, path)
    except ValueError as error:
        if isinstance(error.__cause__, json.JSONDecodeError):
            return {}  # perhaps lines; the reader of tables says what is wrong
        raise
    if isinstance(content, list) and not any(isinstance(item, dict) for item in content):
        content = {"1": content}
    if not isinstance(content, dict) or not all(isinstance(items, list) for items in content.values()):
        return {}
    if {arguments.history_column, arguments.item_column} & content.keys():
        raise ValueError(f"{path}: holds columns, not lists of items by user; write one object per row.")
    users = [user.strip() for user in content]
    if "" in users or len(set(users)) < len(users):
        twice = next((user for user in users if users.count(user) > 1), "")
        fault = f"{users.count(twice)} histories of user {twice!r}; keep one" if twice else "a user without a name"
        raise ValueError(f"{path}: {fault}; mend the file.")
    try:
        return {user: ids(items) or [] for user, items in zip(users, content.values(), strict=True)}
    except ValueError as error:
        raise ValueError(f"{path}: a list holds what is {error}.") from None


def read_histories(
    arguments: RecommendArguments, context_columns: Sequence[str] = (), settings: dict[str, Any] | None = None
) -> tuple[dict[str, list[Any]], dict[str, list[Any]]]:
    """Histories by user, a single list being that of the user `1`; and {column: value} of each of their interactions,
    where the file is of interactions and has such columns. `settings` are those of training, see `history_settings`.

    Raises:
        ValueError: for a file that can't be read as histories.
    """
    path = arguments.history
    if path.endswith(".json") and (histories := json_histories(arguments)):
        return histories, {}
    columns = read_columns(path)
    contexts: dict[str, list[Any]] = {}
    if arguments.history_column in columns:
        names = (arguments.user_column, arguments.history_column, "")
        rows, notes = split_file_rows(columns, names, "train", path)
        histories = {row["user"]: row["source"] for row in rows}
        if len(histories) < len(rows):
            user, count = Counter(row["user"] for row in rows).most_common(1)[0]
            raise ValueError(f"{path}: {count} histories of user {user!r}; keep one row for each user.")
    else:
        names = (arguments.user_column, arguments.item_column, arguments.timestamp_column)
        present = [name for name in context_columns if name in columns]
        settings = settings or {}
        keep_repeats, tie_rule = settings.get("keep_repeats", False), settings.get("tie_rule", "file")
        frame, notes = clean(read_interactions(columns, names, path, present), keep_repeats, k_core=1)
        frame, _ = in_order(frame, tie_rule, settings.get("tie_seed") or 0)  # 0: of folders that don't say
        histories = sequences(frame)
        contexts = {
            user: [dict(zip(present, row, strict=True)) for row in rows] for user, rows in contexts_of(frame).items()
        }
        notes += [f"{path}: no column {name!r}; it counts as none" for name in context_columns if name not in present]
    for note in notes:
        print(note, file=sys.stderr)
    return histories, contexts


def features_of_users(
    recommender: Recommender, arguments: RecommendArguments, histories: dict[str, list[Any]], contexts: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    """Arguments of `Recommender.recommend` by user, out of the file of users, the history's contexts and --context.

    Raises:
        ValueError: for a file or context that the model doesn't read.
    """
    side = feature_reader(recommender.model)
    if arguments.users_file and (side is None or not side.user_numbers):
        raise ValueError("--users_file: this model reads no features of users; leave it out.")
    request, features = parse_context(arguments.context), {user: dict[str, Any]() for user in histories}
    require_known(request, side.context_numbers if side else {}, "--context")
    if side is None:
        return features
    unknown: Counter[str] = Counter()
    without = {"users_file": [] if arguments.users_file else list(side.user_numbers)}
    without["context"] = [name for name in side.context_numbers if name not in request]
    for flag, names in without.items():
        if names:
            print(f"without --{flag} of {', '.join(names)}: counts as none", file=sys.stderr)
    if arguments.users_file:
        path, columns = arguments.users_file, read_columns(arguments.users_file)
        for name in side.user_numbers:
            if name not in columns:
                raise ValueError(f"{path}: no column {name!r}, which the model reads; it has {', '.join(columns)}.")
        users, notes = read_users(columns, arguments.user_column, list(side.user_numbers), path)
        if missing := len(histories.keys() - users.keys()):
            notes.append(f"{path}: {missing:,} of {len(histories):,} users have no row; their features count as none")
        for note in notes:
            print(note, file=sys.stderr)
        for user in histories:
            features[user]["user_features"] = known_only(side.user_numbers, users.get(user, {}), unknown)
    if side.context_numbers:
        request = known_only(side.context_numbers, request, unknown)
        for user, history in histories.items():
            own = contexts.get(user) or [{}] * len(history)
            after = [known_only(side.context_numbers, context, unknown) for context in own[1:]]
            features[user]["context_features"] = [*after, request]
    for note in unknown_notes(unknown):
        print(note, file=sys.stderr)
    return features


def read_filter(path: str | None) -> list[Any] | None:
    """Item ids of a JSON list, or of a text's lines.

    Raises:
        ValueError: if it can't be read, or is empty.
    """
    if path is None:
        return None
    items = read_list(path, f"--filter {path}")
    if not items:
        raise ValueError(f"--filter {path}: it names no item, so nothing could be recommended.")
    return items


def read_new_items(path: str | None) -> dict[str, str]:
    """Texts by item id out of a JSON file.

    Raises:
        ValueError: if it can't be read, or holds anything else.
    """
    if path is None:
        return {}
    items = json_of(read_text(path, f"--new_items {path}"), f"--new_items {path}")
    if not isinstance(items, dict) or not items:
        raise ValueError(f'--new_items {path}: expected {{"id": "text", ...}}.')
    if any(not item.strip() for item in items):
        raise ValueError(f"--new_items {path}: an item without an id; name it.")
    return items


def known_histories(recommender: Recommender, histories: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Those with an item that the model knows; what is left out is counted on standard error.

    Raises:
        ValueError: if none is left.
    """
    counts = {user: recommender.number(items) for user, items in histories.items()}
    unknown, silent = sum(count for _, count in counts.values()), [u for u, (known, _) in counts.items() if not known]
    if unknown:
        print(f"left out {unknown:,} items of histories that are not in the model's catalogue", file=sys.stderr)
    if silent:
        print(
            f"{len(silent):,} of {len(histories):,} users have no known item and get nothing, first {silent[0]!r}",
            file=sys.stderr,
        )
    if len(silent) == len(histories):
        raise ValueError("No history holds an item that the model knows; are the ids those of its training data?")
    return {user: items for user, items in histories.items() if counts[user][0]}


def batches(
    recommender: Recommender,
    histories: dict[str, list[Any]],
    arguments: RecommendArguments,
    allowed: list[Any] | None,
    features: dict[str, dict[str, Any]],
    report: Callable[[int], Any],
) -> Iterator[list[tuple[str, list[tuple[str, float]]]]]:
    """Users with their items and scores, batch by batch in the histories' order."""
    users = list(histories)
    size = max(1, min(arguments.batch_size, SCORES_AT_ONCE // len(recommender.items)))
    for start in range(0, len(users), size):
        batch = users[start : start + size]
        given = {name: [features[u][name] for u in batch] for name in features[batch[0]]}
        rows = recommender.recommend(
            [list(histories[u]) for u in batch], arguments.k, arguments.exclude_seen, allowed, **given
        )
        report(len(batch))
        yield list(zip(batch, rows, strict=True))


def write_parquet(path: str, parts: Iterator[list[tuple[str, list[tuple[str, float]]]]]) -> int:
    """Write rows of user, rank, item, score as they come, whole or not at all; gives their number."""
    beside = Path(path).with_name(f".{Path(path).name}.saving")
    count = 0
    try:
        with pq.ParquetWriter(beside, SCHEMA) as writer:
            for part in parts:
                rows = [(u, rank, item, score) for u, row in part for rank, (item, score) in enumerate(row, start=1)]
                columns = list(zip(*rows, strict=True)) or [(), (), (), ()]
                writer.write_table(pa.table(dict(zip(SCHEMA.names, columns, strict=True)), schema=SCHEMA))
                count += len(rows)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    return count
