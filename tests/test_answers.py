import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_sft_variants.answers import extract_answer, extract_last_number, normalize_number


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("36", "36"),
        ("36.0", "36"),
        ("36.", "36"),
        (" 1,036.50 ", "1036.5"),
        ("+7", "7"),
        ("-103", "-103"),
        ("-0.0", "0"),
        ("007", "7"),
        ("9" * 6000 + ".0", "9" * 6000),
    ],
)
def test_a_number_is_written_in_its_shortest_form(text, expected):
    assert normalize_number(text) == expected


@pytest.mark.parametrize("text", ["", "12 apples", "one", "1e3", "."])
def test_what_is_no_number_is_refused(text):
    with pytest.raises(ValueError, match="is not a number"):
        normalize_number(text)


@given(st.integers())
def test_every_way_to_write_an_integer_is_the_same_number(number):
    assert normalize_number(f"{number:,}.00") == normalize_number(str(number)) == str(number)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("4 - 1 = 3\n#### 3", "3"),
        ("####36.0", "36"),
        ("#### $1,000", "1000"),
        ("#### 5\nwait\n#### -6 pebbles\n7", "-6"),
        ("#### 5\n####", None),
        ("####\n5", None),
        ("The answer is 3.", None),
        ("", None),
    ],
)
def test_the_answer_is_the_number_behind_the_last_mark(text, expected):
    assert extract_answer(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"), [("1 + 5 = 6.", "6"), ("#### 5 of 7.50", "7.5"), ("nothing", None), ("", None)]
)
def test_the_last_number_needs_no_mark(text, expected):
    assert extract_last_number(text) == expected
