"""`deepseek-hf recommend`: histories in, the best next items out, by a model of the recommendation task.

Histories are JSON (one list of item ids, or {user: list}), or any file that training reads: interactions, or a list of
items per user, for a whole user base.
"""

import sys
from collections.abc import Sequence
from typing import Any

from ..data.arguments import check_path
from ..data.files import json_line
from ..data.hub import check_source
from ..recommendation.arguments import RecommendArguments
from .parsing.verbs import parse_verb

EXAMPLES = """examples:
  deepseek-hf recommend runs/movies --history items.json --k 10
      items.json: ["318", "858"], or {"ann": ["318"], "bob": ["50", "858"]}
  deepseek-hf recommend runs/movies --history ratings.csv --user_column userId --item_column movieId \\
      --output recommended.parquet
      the whole user base, as rows of user, rank, item and score
  deepseek-hf recommend runs/movies --history ratings.csv --users_file users.csv --context weekday=Mo device=phone
      by a model of users' and contexts' features; contexts of the history are read from its columns"""


def parse(argv: Sequence[str]) -> tuple[str, RecommendArguments]:
    """The model and the arguments.

    Raises:
        ValueError: with one line, for flags that don't fit.
    """
    return parse_verb("recommend", RecommendArguments, argv, "MODEL --history FILE [--flag value ...]", EXAMPLES)


def recommend(argv: Sequence[str]) -> None:
    """Do what `deepseek-hf recommend` is followed by.

    Raises:
        ValueError: with one line, for bad input.
    """
    name, arguments = parse(argv)
    for flag in ("history", "filter", "users_file", "new_items"):
        check_path(flag, getattr(arguments, flag))
    check_source(name)
    # Imported here, since torch and transformers take seconds and bad input needs neither.
    from tqdm import tqdm
    from transformers.utils.logging import disable_progress_bar

    from ..recommendation import requests
    from ..recommendation.serving import history_settings, load_saved
    from ..training.saved import Saved

    saved = Saved.open(None, name, arguments.model_revision).require_model()
    allowed = requests.read_filter(arguments.filter)
    context_columns = sorted(saved.config.get("context_features") or ())
    histories, contexts = requests.read_histories(arguments, context_columns, history_settings(saved))
    disable_progress_bar()  # the bar of loading weights; ours counts users
    new_items = requests.read_new_items(arguments.new_items)
    recommender = load_saved(saved, arguments.index)
    if new_items:
        recommender.add_items(new_items)
    histories = requests.known_histories(recommender, histories)
    features = requests.features_of_users(recommender, arguments, histories, contexts)
    with tqdm(total=len(histories), desc="recommend", unit="user", file=sys.stderr) as bar:
        parts = requests.batches(recommender, histories, arguments, allowed, features, bar.update)
        if arguments.output:
            count = requests.write_parquet(arguments.output, parts)
        else:
            rows = [row for part in parts for row in part]
    if arguments.output:
        print(f"{count:,} recommendations for {len(histories):,} users: {arguments.output}")
        return
    for user, items in rows:
        line: dict[str, Any] = {"user": user, "items": [item for item, _ in items], "scores": [s for _, s in items]}
        if arguments.explain != "none":
            shares = recommender.explain(histories[user], items[0][0], arguments.explain, **features[user])
            line[arguments.explain] = {"of": items[0][0], "history": dict(sorted(shares, key=lambda pair: -pair[1]))}
        sys.stdout.buffer.write(json_line(line).encode())  # JSON is UTF-8, whatever the terminal's
    sys.stdout.flush()
