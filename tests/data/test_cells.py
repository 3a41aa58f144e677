"""What a column is asked to be: its cells are that, or refused with file, row and column."""

import numpy as np
import pandas as pd
import pytest

from finetune_deepseek.data.cells import Column, as_ids, typed


def cells(kind, *values):
    return typed({"x": values}, [Column("x", kind)], "rows.csv")["x"]


def test_ids_are_one_text_whatever_they_were():
    assert cells("id", "01", " 1 ", 1, 1.0, np.int64(1), 7.5, b"B01", 2**70) == [
        "01", "1", "1", "1", "1", "7.5", "B01", str(2**70),
    ]  # fmt: skip
    assert cells("id", "a", "", None, float("nan"), pd.NA, pd.NaT) == ["a", None, None, None, None, None]
    for kind in ("id", "value", "label"):
        assert cells(kind, "a ", "", " ", None) == ["a", None, None, None]
    assert cells("text", "a ", "", None) == ["a ", "", None]
    assert as_ids([1.0, "x", None]) == ["1", "x", None]


def test_whole_numbers_that_became_fractions_are_read_back(capsys):
    assert cells("id", "10.0", None, "11.0") == ["10", None, "11"]
    assert "all of 'x' end in .0, as in 10.0" in capsys.readouterr().err
    assert cells("ids", "10.0 11.0", [12.0]) == [["10.0", "11.0"], ["12"]]
    assert cells("ids", "10.0 11.0", "12.0") == [["10", "11"], ["12"]]
    assert cells("id", "10.0", "10.5") == ["10.0", "10.5"]
    assert cells("label", "1.0", "0.0", None) == ["1", "0", None]
    assert cells("label", "1.0", "2.0") == ["1.0", "2.0"]  # no gap made them so
    capsys.readouterr()
    typed({"x": ["1.0", "0.0", None]}, [Column("x", "label")], "part.csv", first_row=11)
    err = capsys.readouterr().err
    assert err.startswith("part.csv: all of 'x' end in .0, as in 1.0;") and "; row 13 has none" in err


def test_a_cell_that_nests_too_deep_is_refused_with_its_place():
    cell = []
    for _ in range(100_000):
        cell = [cell]
    for kind in ("id", "words", "text", "label", "ids", "texts", "labels", "number"):
        with pytest.raises(ValueError, match="^f.json, row 1: 'x' ") as error:
            typed({"x": [cell]}, [Column("x", kind)], "f.json")
        assert "\n" not in str(error.value)


def test_labels_stay_apart():
    assert cells("label", "01", "1", "3.1", "3.10", True) == ["01", "1", "3.1", "3.10", "True"]
    assert cells("labels", "['warm', 'cold']", '["warm"]', ["b", 1], "warm, cold", "[warm]") == [
        ["warm", "cold"], ["warm"], ["b", "1"], "warm, cold", "[warm]",
    ]  # fmt: skip


@pytest.mark.parametrize("cell", ["[12, 15, 18]", "['12', '15', '18']", "(12, 15, 18)", "12 15  18", [12, "15", 18.0]])
def test_lists_of_items_in_every_form(cell):
    assert cells("ids", cell) == [["12", "15", "18"]]


def test_one_item_and_none():
    assert cells("ids", "12", "", None, [], [None], np.array([1, 2]), "a,b c|d") == [
        ["12"], [], None, [], [], ["1", "2"], ["a,b", "c|d"],
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "cell", "message"),
    [
        ("ids", "12,15,18", "'12,15,18', which may be one item or several"),
        ("ids", "a|b|c", "one item or several"),
        ("ids", "12, 15, 18", "one item or several"),
        ("ids", "['a' 'b']", "a list without commas; write it as JSON"),
        ("ids", "[12 15]", "not a list of items that JSON can read"),
        ("ids", '[{"item_id": 12}]', "not an id"),
        ("ids", [[1, 2]], "not an id"),
        ("ids", '{"item_id": 12}', "not a list of items"),
        ("ids", 5, "'5', not a list of items"),
        ("id", [1, 2], r"'\[1, 2\]', not an id"),
        ("id", True, "not an id"),
        ("id", b"\xff", "not an id"),
        ("text", 7, "'7', not a text"),
        ("texts", 7, "not a text or a list of texts"),
        ("texts", ["a", 7], "not a text or a list of texts"),
        ("number", "seven", "not a number"),
        ("value", ["a"], "not one value"),
    ],
)
def test_a_cell_of_another_kind_is_refused_with_its_place(kind, cell, message):
    with pytest.raises(ValueError, match=f"^rows.csv, row 2: 'x' is .*{message}") as error:
        cells(kind, None, cell)
    assert "\n" not in str(error.value)


def test_texts_and_numbers():
    assert cells("texts", "a", "['a', 'b']", ["a", None], "[1] cites", None) == [
        ["a"], ["a", "b"], ["a"], ["[1] cites"], None,
    ]  # fmt: skip
    assert cells("text", "NA", "01", b"x", None) == ["NA", "01", "x", None]
    assert cells("number", "3.10", 2, "nan", "") == [3.1, 2.0, None, None]
    assert cells("record", '{"text": ["a"]}', "{'text': ['a']}", {"text": 1}, "{a}") == [
        {"text": ["a"]}, {"text": ["a"]}, {"text": 1}, "{a}",
    ]  # fmt: skip


def test_absent_columns_say_what_there_is():
    with pytest.raises(ValueError, match=r"no column 'user_id'; it has users, item. Set --user_column.*users"):
        typed({"users": [], "item": []}, [Column("user_id", "id", "user_column")], "rows.csv")
    with pytest.raises(ValueError, match=r"it has a;\"b,c\" \(looks separated by ';'\)"):
        typed({'a;"b,c"': []}, [Column("a", "id")], "rows.csv")
    assert typed({"a": []}, [Column("b", "id", required=False)], "rows.csv") == {}
