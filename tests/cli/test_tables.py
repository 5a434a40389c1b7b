import pytest

from fragfs.cli.tables import (
    describe_mechanism,
    format_bytes,
    format_count,
    format_share,
    format_table,
    list_savings,
)
from fragfs.types import Predictor


@pytest.mark.parametrize(
    ("size", "shown"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (9_994, "9.99 kB"),
        (9_996, "10.0 kB"),
        (99_960, "100 kB"),
        (999_499, "999 kB"),
        (999_999, "1.00 MB"),
        (90_868_376, "90.9 MB"),
        (1_500_000_000, "1.50 GB"),
        (10**22, "10000 EB"),
    ],
)
def test_sizes_have_three_digits_and_the_right_unit(size, shown):
    assert format_bytes(size) == shown


def test_shares_and_counts():
    assert format_share(1, 3) == "33.3 %"
    assert format_share(1, 0) == "-"
    assert format_count(1, "file") == "1 file"
    assert format_count(12_000, "file") == "12,000 files"
    assert format_count(2, "copy", "copies") == "2 copies"


def test_columns_line_up_and_lines_have_no_trailing_blanks():
    rows = [("size", "file"), ("1 B", "a"), ("100 kB", "")]
    assert format_table(rows, "rl") == ["  size  file", "   1 B  a", "100 kB"]


def test_every_predictor_has_plain_words():
    for predictor in Predictor:
        name = predictor.name.lower()
        assert describe_mechanism(name) != name or name == "zstd"
    assert describe_mechanism("novel") == "novel"


def test_savings_are_ranked_and_empty_ones_left_out():
    saved = {"raw": -24, "exact": 0, "planes": 1000, "zstd": 5000, "novel": 7}
    assert list_savings(saved) == [
        ("5.00 kB", "by zstd"),
        ("1.00 kB", "by byte planes"),
        ("7 B", "by novel"),
    ]
