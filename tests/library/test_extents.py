from __future__ import annotations

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from fragfs.errors import FormatError
from fragfs.library.extents import ExtentMap, ExtentMapBuilder
from fragfs.types import SpanKind

rows = st.lists(
    st.tuples(
        st.integers(1, 2**24),
        st.integers(1, 2**40),
        st.integers(0, 2**24),
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
    again = ExtentMap.parse(extents.pack())
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
    assert ExtentMap.parse(build([]).pack()).size == 0


@pytest.mark.parametrize(
    "blob",
    [b"", b"garbage", zstandard.compress(b""), zstandard.compress(b"\xff\xff\xff\xff" + bytes(17))],
)
def test_damaged_blobs_are_named_as_such(blob):
    with pytest.raises(FormatError, match="extents of a file"):
        ExtentMap.parse(blob)


def test_an_extent_costs_little_when_neighbours_are_neighbours():
    builder = ExtentMapBuilder()
    for number in range(28_000):
        builder.append(1 << 20, 5000 + number, 0, SpanKind.TENSOR, first=number % 8 == 0)
    assert len(builder.build().pack()) < 28_000 // 10
