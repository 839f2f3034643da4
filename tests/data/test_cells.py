"""What a cell of an answer column says."""

from datetime import date
from decimal import Decimal

import pytest

from mentor_trl.data import DataError, extract_solution
from mentor_trl.data.cells import answer_text, cell


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a #### 5", "5"),
        ("#### 1 #### -2", "-2"),
        ("#### 1,234,567.5", "1234567.5"),
        ("#### $1,000", "$1000"),
        ("#### 1,2", "1,2"),
        ("#### (1,000)", "(1,000)"),
        ("#### ", ""),
        ("no mark", None),
    ],
)
def test_extract_solution(text, expected):
    assert extract_solution(text, "####") == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (" 7 ", "7"),
        ("None", "None"),
        (7, "7"),
        (12345678901234567890123, "12345678901234567890123"),
        (7.0, "7"),
        (-0.1, "-0.1"),
        (0.00001, "0.00001"),
        (2.0**53 - 1, "9007199254740991"),
        (Decimal("1.50"), "1.50"),
        (Decimal("1E+3"), "1000"),
        (["7"], "7"),
        (["7", 8.0], "7, 8"),
        (None, None),
        ("  ", None),
        (float("nan"), None),
        (Decimal("nan"), None),
        ([], None),
        (["7", None], None),
    ],
)
def test_answers_are_text(value, expected):
    assert answer_text(value) == expected


@pytest.mark.parametrize(
    ("value", "part"),
    [
        (1.2345678901234568e22, "may have lost digits; write it as text, in quotes"),
        (2.0**53, "may have lost digits"),
        (float("-inf"), "is no number; write it as text"),
        (True, "is True, of type bool, not text or a number; write it as text"),
        (["7", False], "of type bool"),
        ({"a": 1, "b": 2}, r"is a record of \['a', 'b'\]; name one of its fields, as `column.field`"),
        (b"7", "of type bytes"),
        (date(2020, 1, 1), "of type date"),
    ],
)
def test_what_is_no_answer_is_refused(value, part):
    with pytest.raises(DataError, match=f"^The cell .*{part}"):
        answer_text(value, "The cell")


def test_fields_of_records():
    row = {"a": {"b": {"c": 1}, "d": None}, "a.b": 2}
    assert cell(row, "a.b") == 2 and cell(row, "a.b.c") == 1
    assert cell(row, "a.d.e") is None and cell(row, "x") is None and cell(row, "x.y") is None
