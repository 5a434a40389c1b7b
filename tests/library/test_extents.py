from __future__ import annotations

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from fragfs.errors import FormatError
from fragfs.library.extents import ExtentMap, ExtentMapBuilder, check_seal
from fragfs.types import SpanKind

OF = (1024, bytes(range(32)))

rows = st.lists(
    st.tuples(
        st.integers(1, 2**24),
        st.integers(1, 2**40),
        st.integers(0, 2**24 - 1),
        st.sampled_from(list(SpanKind)),
        st.booleans(),
    ),
    max_size=60,
)


def build(values) -> ExtentMap:
    builder = ExtentMapBuilder()
    for size, fragment, offset, kind, first in values:
        builder.append(size, fragment, offset, kind, first=first)
    return builder.build()


@given(rows)
@settings(deadline=None, derandomize=True)
def test_a_packed_map_comes_back_equal(values):
    extents = build(values)
    again = ExtentMap.parse(extents.pack(*OF))
    assert list(again) == list(extents)
    assert again.size == sum(row[0] for row in values)


@given(rows.filter(bool), st.data())
@settings(deadline=None, derandomize=True)
def test_every_byte_is_found_in_the_extent_that_covers_it(values, data):
    extents = build(values)
    offset = data.draw(st.integers(0, extents.size - 1))
    found = extents[extents.index_at(offset)]
    assert found.offset <= offset < found.offset + found.size


def test_bytes_outside_the_file_are_refused():
    extents = build([(10, 1, 0, SpanKind.TENSOR, True)])
    for offset in (-1, 10):
        with pytest.raises(IndexError):
            extents.index_at(offset)


def test_an_empty_file_has_no_extents():
    assert ExtentMap.parse(build([]).pack(*OF)).size == 0


@pytest.mark.parametrize(
    "blob",
    [b"", b"garbage", zstandard.compress(b""), zstandard.compress(b"\xff\xff\xff\xff" + bytes(17))],
)
def test_damaged_blobs_are_named_as_such(blob):
    with pytest.raises(FormatError, match="extents of a file"):
        ExtentMap.parse(blob)


@pytest.mark.parametrize(
    "value",
    [
        (0, 1, 0, SpanKind.TENSOR, True),
        ((1 << 24) + 1, 1, 0, SpanKind.TENSOR, True),
        (1, 0, 0, SpanKind.TENSOR, True),
        (1, 1, 1 << 24, SpanKind.TENSOR, True),
        (1, 1, 0, 9, True),
    ],
)
def test_extents_that_cannot_be_are_refused(value):
    with pytest.raises(FormatError, match="cannot be"):
        ExtentMap.parse(build([value]).pack(*OF))


def test_numbers_that_overflow_are_refused():
    steps = ((1 << 63) - 1).to_bytes(8, "little") * 2
    body = (2).to_bytes(4, "little") + b"\1\0\0\0" * 2 + steps + bytes(8) + bytes(2)
    with pytest.raises(FormatError, match="cannot be"):
        ExtentMap.parse(zstandard.compress(body))


def test_the_seal_ties_extents_to_their_content():
    blob = build([(5, n, 0, SpanKind.TENSOR, True) for n in range(1, 50)]).pack(*OF)
    check_seal(blob, *OF)
    for number, sha256 in ((1025, OF[1]), (OF[0], bytes(32))):
        with pytest.raises(FormatError, match="checksum"):
            check_seal(blob, number, sha256)


def test_no_flipped_bit_of_packed_extents_goes_unseen():
    values = [(5 + n, 100 - n, n, SpanKind.TENSOR, n == 0) for n in range(40)]
    expected, blob = list(build(values)), build(values).pack(*OF)
    for bit in range(8 * len(blob)):
        damaged = bytearray(blob)
        damaged[bit // 8] ^= 1 << bit % 8
        try:
            check_seal(bytes(damaged), *OF)
            found = list(ExtentMap.parse(bytes(damaged)))
        except FormatError:
            continue
        # One bit says that there is a checksum: without it the bytes are what they were.
        assert found == expected


def test_extents_of_an_older_fragfs_have_no_seal():
    body = (1).to_bytes(4, "little") + b"\5\0\0\0" + (7).to_bytes(8, "little") + bytes(5)
    blob = zstandard.compress(body)
    check_seal(blob, *OF)
    assert ExtentMap.parse(blob).fragments[0] == 7


def test_an_extent_costs_little_when_neighbours_are_neighbours():
    builder = ExtentMapBuilder()
    for number in range(28_000):
        builder.append(1 << 20, 5000 + number, 0, SpanKind.TENSOR, first=number % 8 == 0)
    assert len(builder.build().pack(*OF)) < 28_000 // 10
