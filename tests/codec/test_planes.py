import itertools
import random
import struct

import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from fragfs.codec.planes import LEAD_BITS_MAX, decode_planes, encode_planes
from fragfs.errors import FormatError

UNITS = (2, 4, 8)
LEVEL = 3

RAW, CONSTANT, ZSTD = 0, 1, 2


def reference_decode(params, payload, unit, raw_size):
    """The format's rules one element and one bit field at a time, sharing nothing with the code."""
    count, tail_size = divmod(raw_size, unit)
    lead, plane_count = params[:2]
    words = [0] * count
    position = offset = 0
    for index in range(plane_count):
        packed, size = struct.unpack_from("<BI", params, 2 + 5 * index)
        stored = payload[offset : offset + size]
        offset += size
        width = 1 << (packed >> 4)
        for element in range(count):
            if packed & 15 == RAW:
                value = int.from_bytes(stored[element * width : (element + 1) * width], "little")
            elif packed & 15 == CONSTANT:
                value = stored[0]
            else:
                value = zstandard.decompress(stored)[element]
            if position == unit - 1:
                value <<= 8 * unit - 8 - lead
            elif position == unit - 2:
                above = value >> (8 - lead)
                below = value & ((1 << (8 - lead)) - 1)
                value = above << (8 * unit - lead) | below << (8 * (unit - 2))
            else:
                value <<= 8 * position
            words[element] |= value
        position += width
    words_raw = b"".join(word.to_bytes(unit, "little") for word in words)
    return words_raw + payload[offset : offset + tail_size]


def mixed_planes(unit, seed):
    """Elements whose byte positions are each random, constant or of few values."""
    rng = random.Random(seed)
    kinds = [rng.choice(["random", "constant", "few"]) for _ in range(unit)]
    planes = [
        {
            "random": rng.randbytes(40),
            "constant": bytes([rng.randrange(256)]) * 40,
            "few": bytes(rng.choices(b"\0\1", weights=(9, 1), k=40)),
        }[kind]
        for kind in kinds
    ]
    return bytes(byte for element in zip(*planes, strict=True) for byte in element)


@pytest.mark.parametrize("unit", UNITS)
def test_agrees_with_the_reference(unit):
    for lead, seed in itertools.product(range(LEAD_BITS_MAX + 1), range(12)):
        raw = mixed_planes(unit, seed) + bytes(range(seed % unit))
        params, payload = encode_planes(memoryview(raw), unit, lead, LEVEL)
        assert reference_decode(params, payload, unit, len(raw)) == raw
        assert decode_planes(params, memoryview(payload), unit, len(raw)) == raw


@given(
    raw=st.binary(min_size=8, max_size=300),
    unit=st.sampled_from(UNITS),
    lead=st.integers(0, LEAD_BITS_MAX),
)
def test_any_bytes_round_trip(raw, unit, lead):
    params, payload = encode_planes(memoryview(raw), unit, lead, LEVEL)
    assert decode_planes(params, memoryview(payload), unit, len(raw)) == raw


def test_the_window_of_bf16_is_the_exponent():
    exponent, rest = 0x7E, 0b1_0110101
    word = rest >> 7 << 15 | exponent << 7 | rest & 0x7F
    raw = struct.pack("<H", word) * 3
    params, payload = encode_planes(memoryview(raw), 2, 1, LEVEL)
    assert params == bytes([1, 2]) + struct.pack("<BIBI", CONSTANT, 1, CONSTANT, 1)
    assert payload == bytes([rest, exponent])


def test_raw_low_planes_are_kept_together():
    raw = random.Random(1).randbytes(8 * 64)
    params, payload = encode_planes(memoryview(raw), 8, 0, LEVEL)
    sizes = [struct.unpack_from("<BI", params, 2 + 5 * index) for index in range(params[1])]
    assert sizes == [(RAW | 2 << 4, 256), (RAW | 1 << 4, 128), (RAW, 64), (RAW, 64)]
    assert payload[:256] == np.frombuffer(raw, "<u4")[::2].tobytes()


def params_of(lead, *planes):
    return bytes([lead, len(planes)]) + b"".join(struct.pack("<BI", *plane) for plane in planes)


TEN_RAW = [(RAW, 10), (RAW, 10)]


@pytest.mark.parametrize(
    ("params", "payload_size", "unit"),
    [
        pytest.param(b"", 20, 2, id="no parameters"),
        pytest.param(b"\1", 20, 2, id="half a header"),
        pytest.param(params_of(1, *TEN_RAW)[:-1], 20, 2, id="cut plane"),
        pytest.param(params_of(1, *TEN_RAW) + b"\0", 20, 2, id="more than planes"),
        pytest.param(params_of(8, *TEN_RAW), 20, 2, id="unknown lead"),
        pytest.param(params_of(1, (RAW, 10)), 10, 2, id="too few planes"),
        pytest.param(params_of(1, *TEN_RAW, (RAW, 10)), 30, 2, id="too many planes"),
        pytest.param(params_of(1), 0, 2, id="no planes"),
        pytest.param(params_of(1, *TEN_RAW), 19, 2, id="payload too short"),
        pytest.param(params_of(1, *TEN_RAW), 21, 2, id="payload too long"),
        pytest.param(params_of(1, (RAW, 9), (RAW, 11)), 20, 2, id="plane of a wrong size"),
        pytest.param(params_of(1, (CONSTANT, 0), (RAW, 10)), 10, 2, id="constant of no byte"),
        pytest.param(params_of(1, (CONSTANT, 2), (RAW, 10)), 12, 2, id="constant of two bytes"),
        pytest.param(params_of(1, (3, 10), (RAW, 10)), 20, 2, id="unknown method"),
        pytest.param(params_of(1, (ZSTD, 10), (RAW, 10)), 20, 2, id="no zstd frame"),
        pytest.param(params_of(1, (RAW | 1 << 4, 20)), 20, 2, id="wide top plane"),
        pytest.param(params_of(1, (RAW, 10), (RAW | 1 << 4, 20)), 30, 4, id="wide rim"),
        pytest.param(params_of(1, (RAW | 2 << 4, 40)), 40, 4, id="wide over the top"),
        pytest.param(params_of(1, (RAW | 3 << 4, 80)), 80, 8, id="width of a whole element"),
        pytest.param(
            params_of(1, (CONSTANT | 1 << 4, 1), *TEN_RAW), 21, 4, id="wide constant plane"
        ),
        pytest.param(params_of(1, (RAW, 0xFFFFFFFF), (RAW, 10)), 20, 2, id="huge plane"),
    ],
)
def test_malformed_planes(params, payload_size, unit):
    with pytest.raises(FormatError):
        decode_planes(params, memoryview(bytes(payload_size)), unit, 10 * unit)


@pytest.mark.parametrize("packed", [3, 15, ZSTD | 1 << 4, RAW | 3 << 4])
def test_what_a_newer_version_may_write_names_the_remedy(packed):
    params = params_of(0, (packed, 10), *TEN_RAW)
    with pytest.raises(FormatError) as caught:
        decode_planes(params, memoryview(bytes(30)), 4, 40)
    assert caught.value.remedy == "upgrade fragfs"


def test_planes_that_expand_to_another_size():
    for size in (9, 11):
        frame = zstandard.compress(bytes(size))
        params = params_of(1, (ZSTD, len(frame)), (RAW, 10))
        with pytest.raises(FormatError):
            decode_planes(params, memoryview(frame + bytes(10)), 2, 20)


def test_a_frame_cut_short():
    frame = zstandard.compress(bytes(range(10)))
    for cut in range(len(frame)):
        params = params_of(1, (ZSTD, cut), (RAW, 10))
        with pytest.raises(FormatError):
            decode_planes(params, memoryview(frame[:cut] + bytes(10)), 2, 20)
