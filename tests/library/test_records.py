from __future__ import annotations

import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from fragfs.errors import FormatError, FragmentError, IntegrityError
from fragfs.library.records import (
    PACK_FOOTER,
    PACK_HEADER,
    BatchTrailer,
    IndexEntry,
    PackHeader,
    RecordKind,
    checksum,
    pack_batch_trailer,
    pack_fragment_record,
    pack_index,
    pack_pack_header,
    pack_plain_record,
    parse_batch_trailer,
    parse_fragment_record,
    parse_index,
    parse_pack_header,
    parse_record_header,
)
from fragfs.types import (
    LIBRARY_FORMAT_VERSION,
    Dtype,
    Fragment,
    FragmentId,
    LibraryConfig,
    Predictor,
)


def fragment(payload: bytes = b"payload", params: bytes = b"params") -> Fragment:
    return Fragment(
        id=FragmentId(blake3(payload).digest()),
        dtype=Dtype.BF16,
        raw_size=1000,
        raw_checksum=77,
        predictor=Predictor.PLANES,
        params=params,
        payload=payload,
    )


def record(of: Fragment) -> bytes:
    return b"".join(bytes(part) for part in pack_fragment_record(of))


@given(st.binary(max_size=500), st.binary(max_size=200))
@settings(deadline=None, derandomize=True)
def test_a_fragment_record_comes_back_equal(payload, params):
    original = fragment(payload, params)
    assert parse_fragment_record(record(original), "here") == original


def test_any_flipped_bit_of_a_fragment_record_is_noticed():
    good = record(fragment())
    for position in range(len(good)):
        bad = bytearray(good)
        bad[position] ^= 1 << (position % 8)
        with pytest.raises(FragmentError, match="here"):
            parse_fragment_record(bytes(bad), "here")


@pytest.mark.parametrize("size", [0, 1, 23, 24, 50, 90])
def test_a_truncated_record_is_noticed(size):
    with pytest.raises(IntegrityError):
        parse_fragment_record(record(fragment())[:size], "here")


def test_a_record_of_another_kind_is_not_a_fragment():
    with pytest.raises(IntegrityError, match="another record"):
        parse_fragment_record(pack_plain_record(RecordKind.REMOVAL, b"org/name"), "here")


def test_what_a_newer_writer_made_is_refused_by_name():
    from dataclasses import replace

    newer = replace(fragment(), bases=(FragmentId(bytes(32)),))
    with pytest.raises(FormatError, match="upgrade fragfs"):
        parse_fragment_record(record(newer), "here")


def test_pack_header_round_trip_and_damage():
    header = PackHeader(b"u" * 16, 12, LibraryConfig(fragment_elements=1 << 14))
    data = pack_pack_header(header)
    assert len(data) == PACK_HEADER.size
    assert parse_pack_header(data, "p") == header
    for position in range(len(data)):
        bad = bytearray(data)
        bad[position] ^= 4
        with pytest.raises(FragmentError):
            parse_pack_header(bytes(bad), "p")


def test_a_pack_of_a_newer_format_is_refused():
    data = bytearray(pack_pack_header(PackHeader(b"u" * 16, 1, LibraryConfig())))
    data[8] = LIBRARY_FORMAT_VERSION + 1
    data[-8:] = checksum(bytes(data[:-8])).to_bytes(8, "little")
    with pytest.raises(FormatError, match="upgrade fragfs"):
        parse_pack_header(bytes(data), "p")


def test_trailer_round_trip():
    trailer = BatchTrailer(9, b"b" * 16, b"p" * 16, 64, 5, 123)
    data = pack_batch_trailer(trailer)
    assert parse_record_header(data, "here").kind is RecordKind.BATCH_TRAILER
    assert parse_batch_trailer(data) == trailer


def test_index_round_trip():
    entries = [
        IndexEntry(b"i" * 32, 64, 100, 1000, RecordKind.FRAGMENT),
        IndexEntry(bytes(32), 164, 50, 0, RecordKind.MANIFEST),
    ]
    data = pack_index(entries, 214)
    assert parse_index(data[: -PACK_FOOTER.size], "here") == entries
    assert PACK_FOOTER.unpack(data, len(data) - PACK_FOOTER.size)[0] == 214
