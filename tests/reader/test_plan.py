import pytest
from hypothesis import given
from hypothesis import strategies as st

from fragfs.reader.plan import Piece, plan_read
from tests.reader.fakes import extents_of

SIZES = st.lists(st.integers(1, 50), max_size=12)


@given(SIZES, st.integers(0, 700), st.integers(0, 700), st.data())
def test_pieces_are_the_bytes_of_the_range(sizes, offset, size, data):
    offsets = [data.draw(st.integers(0, 20)) for _ in sizes]
    fragments = [data.draw(st.integers(1, 4)) for _ in sizes]
    extents = extents_of(sizes, fragments, offsets)
    # The oracle: every byte of the file as (fragment, offset in it).
    file = [(f, o + k) for s, f, o in zip(sizes, fragments, offsets, strict=True) for k in range(s)]
    pieces = plan_read(extents, offset, size)
    read = [(p.fragment, p.fragment_offset + k) for p in pieces for k in range(p.size)]
    assert read == file[offset : offset + size]
    assert all(piece.size > 0 for piece in pieces)


@given(SIZES.filter(bool), st.data())
def test_a_piece_never_leaves_its_extent(sizes, data):
    extents = extents_of(sizes)
    offset = data.draw(st.integers(0, sum(sizes) - 1))
    for piece in plan_read(extents, offset, sum(sizes)):
        assert piece.fragment_offset + piece.size <= sizes[piece.fragment - 1]


def test_reads_inside_across_and_beyond():
    extents = extents_of([10, 20, 30])
    assert plan_read(extents, 12, 5) == [Piece(2, 2, 5)]
    assert plan_read(extents, 8, 25) == [Piece(1, 8, 2), Piece(2, 0, 20), Piece(3, 0, 3)]
    assert plan_read(extents, 59, 100) == [Piece(3, 29, 1)]
    assert plan_read(extents, 60, 1) == []
    assert plan_read(extents, 10**18, 1) == []
    assert plan_read(extents, 5, 0) == []
    assert plan_read(extents_of([]), 0, 10) == []


@pytest.mark.parametrize(("offset", "size"), [(-1, 5), (0, -1)])
def test_negative_ranges_are_a_bug_of_the_caller(offset, size):
    with pytest.raises(ValueError, match="cannot read"):
        plan_read(extents_of([10]), offset, size)
