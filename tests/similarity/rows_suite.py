"""What every keeper of signature rows must do: run these checks against each implementation.

A check takes an empty `WritableRows`. `tests/similarity/test_index.py` shows how they are run:

    @pytest.mark.parametrize("check", ROWS_CHECKS)
    def test_rows(check):
        check(MyRows())
"""

import struct
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from fragfs.similarity.index import SignatureRows, split_limit
from fragfs.similarity.signature import SIGNATURE_VERSION, FragmentSignature


class WritableRows(SignatureRows, Protocol):
    """Rows and a way to put signatures into them."""

    def add(
        self, number: int, signature: FragmentSignature, hint_keys: Sequence[int] = ()
    ) -> None: ...


KEY_MIN, KEY_MAX = -(2**63), 2**63 - 1


def make_signature(number: int, *keys: int) -> FragmentSignature:
    """A signature with a sketch of its own."""
    sketch = struct.pack("<q", number) * 6
    return FragmentSignature(SIGNATURE_VERSION, 1000, sketch, keys)


def fill(rows: WritableRows, numbers: Iterable[int], *keys: int) -> None:
    for number in numbers:
        rows.add(number, make_signature(number, *keys))


def expected(*numbers: int) -> list[tuple[int, bytes]]:
    return [(number, make_signature(number).sketch) for number in numbers]


def check_empty(rows: WritableRows) -> None:
    assert rows.fragments_of([1, 2, 3], 16) == []
    assert rows.fragments_of([], 16) == []


def check_fragments_come_with_their_sketches(rows: WritableRows) -> None:
    fill(rows, [7], 1, 2)
    fill(rows, [3], 2, 4)
    assert rows.fragments_of([1], 16) == expected(7)
    assert rows.fragments_of([2], 16) == expected(3, 7)
    assert rows.fragments_of([5], 16) == []


def check_a_fragment_under_many_keys_comes_once(rows: WritableRows) -> None:
    fill(rows, [1, 2], 10, 11, 12)
    assert rows.fragments_of([10, 11, 12, 11], 16) == expected(1, 2)


def check_extreme_keys(rows: WritableRows) -> None:
    fill(rows, [1], KEY_MIN, -1, 0, KEY_MAX)
    for key in (KEY_MIN, -1, 0, KEY_MAX):
        assert rows.fragments_of([key], 1) == expected(1)
    assert rows.fragments_of([KEY_MIN + 1, 1, KEY_MAX - 1], 16) == []


def check_hint_keys_find_too(rows: WritableRows) -> None:
    rows.add(5, make_signature(5, 1), [100, 101])
    assert rows.fragments_of([101], 16) == expected(5)


def check_adding_again_adds_keys(rows: WritableRows) -> None:
    rows.add(5, make_signature(5, 1), [100])
    rows.add(5, make_signature(5, 1), [101])
    assert rows.fragments_of([1, 100, 101], 16) == expected(5)
    assert rows.fragments_of([100], 16) == expected(5)


def check_a_crowded_key_gives_its_oldest_and_newest(rows: WritableRows) -> None:
    fill(rows, range(10, 70), 1)
    for limit in (1, 10, 20, 30, 59):
        oldest, newest = split_limit(limit)
        kept = [*range(10, 10 + oldest), *range(70 - newest, 70)]
        assert rows.fragments_of([1], limit) == expected(*kept)
    for limit in (60, 61, 100):
        assert rows.fragments_of([1], limit) == expected(*range(10, 70))


def check_a_key_is_crowded_by_itself(rows: WritableRows) -> None:
    fill(rows, range(0, 100), 1)
    fill(rows, range(100, 200), 2)
    fill(rows, range(200, 240), 3)
    few = [0, 1, 98, 99, 100, 101, 198, 199]
    assert rows.fragments_of([1, 2, 3], 40) == expected(*few, *range(200, 240))


def check_age_is_the_number_not_the_order_of_adding(rows: WritableRows) -> None:
    fill(rows, [*range(39, 0, -1), 40], 1)
    assert rows.fragments_of([1], 20) == expected(1, 40)
    assert rows.fragments_of([1], 30) == expected(1, 2, 40)


ROWS_CHECKS: list[Callable[[WritableRows], None]] = [
    check_empty,
    check_fragments_come_with_their_sketches,
    check_a_fragment_under_many_keys_comes_once,
    check_extreme_keys,
    check_hint_keys_find_too,
    check_adding_again_adds_keys,
    check_a_crowded_key_gives_its_oldest_and_newest,
    check_a_key_is_crowded_by_itself,
    check_age_is_the_number_not_the_order_of_adding,
]
