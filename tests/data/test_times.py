"""Times: integers exactly, dates in one format for a column, and a refusal where nothing decides."""

import numpy as np
import pytest

from finetune_deepseek.data.times import parse_times

DAY = 24 * 3600 * 10**9


def days(*values):
    """Days of January to March 2024."""
    return ((parse_times(values, "rows.csv", "time") - 19723 * DAY) / DAY + 1).tolist()


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (1, 0, 2, 3), (3, 2, 1, 0)])
def test_the_day_stands_first_if_any_cell_demands_it(order):
    cells, expected = ["31/01/2024", "05/02/2024", "15/02/2024", "01/03/2024"], [31, 36, 46, 61]
    assert days(*(cells[place] for place in order)) == [expected[place] for place in order]


def test_the_month_stands_first_if_a_cell_demands_that():
    assert days("02/05/2024", "01/31/2024") == [36, 31]


def test_other_forms_of_dates():
    assert days("2024-01-31", "2024-02-05T12:00:00Z") == [31, 36.5]
    assert days("5.2.2024 06:00", "31.1.2024 18:00") == [36.25, 31.75]
    assert days("1/31/2024 6:00 PM", "2/5/2024 6:00 AM") == [31.75, 36.25]
    assert days("31 Jan 2024", "5 Feb 2024") == [31, 36]
    assert days("Wed, 31 Jan 2024 12:00:00 GMT") == [31.5]
    assert days("01/01/2024", "02/02/2024") == [1, 33]  # either way


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["05/02/2024", "03/04/2024"], "nothing in 'time' says whether '05/02/2024' in row 1 is %d/%m/%Y or %m/%d/%Y"),
        (
            ["31/01/2024", "01/31/2024"],
            "1 of 2 .* no time in the format of the others, .*'01/31/2024' in row 2",
        ),
        (["2024-01-31", "5 Feb 2024"], "the first is '5 Feb 2024' in row 2"),
        (["2024-01-31", 5], "the first is '2024-01-31' in row 1"),
        (["2024-01-31", None], "the first is 'None' in row 2"),
        (["5", "nan"], "the first is 'nan' in row 2"),
        ([True], "the first is 'True' in row 1"),
        (["soon", "2024-01-31"], "1 of 2 values of 'time' are no time, the first is 'soon' in row 1"),
    ],
)
def test_what_is_no_time_is_refused(values, message):
    with pytest.raises(ValueError, match=f"rows.csv: .*{message}"):
        parse_times(values, "rows.csv", "time")


def test_nanoseconds_are_exact():
    first = 1_700_000_000_000_000_001
    for values in ([first, first + 1], [str(first), str(first + 1)]):
        assert parse_times(values, "x", "time").tolist() == [first, first + 1]
    assert parse_times([np.float64(1.5), "2"], "x", "time").tolist() == [1.5, 2]
    assert np.diff(parse_times(["2024-01-01T00:00:00.000000001", "2024-01-01"], "x", "time")) == [-1]


def test_dates_beyond_nanoseconds_keep_their_order():
    assert np.diff(parse_times(["2024-01-01", "9999-12-31"], "x", "time"))[0] > 0
