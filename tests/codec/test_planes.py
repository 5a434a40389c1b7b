import itertools
import random
import struct
import sys

import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from fragfs.codec import planes as module
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
def test_agrees_with_the_reference(unit, kernels):
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
    for kernels in (module._kernels, None):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "_kernels", kernels)
            assert decode_planes(params, memoryview(payload), unit, len(raw)) == raw


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("count", [1, 2047, 2048, 2049, 5000])
def test_words_of_many_blocks_at_any_address(unit, count, kernels):
    rng = np.random.default_rng(count)
    few = rng.integers(0, 3, (count, unit), np.uint8)
    for raw in (rng.bytes(count * unit), few.tobytes(), few.tobytes()[:unit] * count):
        for lead in (0, 1, 4):
            params, payload = encode_planes(memoryview(raw), unit, lead, LEVEL)
            for skip in range(4):
                stored = memoryview(bytes(skip) + payload)[skip:]
                assert decode_planes(params, stored, unit, len(raw)) == raw


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
def test_malformed_planes(params, payload_size, unit, kernels):
    with pytest.raises(FormatError):
        decode_planes(params, memoryview(bytes(payload_size)), unit, 10 * unit)


@pytest.mark.parametrize("packed", [3, 15, ZSTD | 1 << 4, RAW | 3 << 4])
def test_what_a_newer_version_may_write_names_the_remedy(packed):
    params = params_of(0, (packed, 10), *TEN_RAW)
    with pytest.raises(FormatError) as caught:
        decode_planes(params, memoryview(bytes(30)), 4, 40)
    assert caught.value.remedy == "upgrade fragfs"


def test_planes_that_expand_to_another_size(kernels):
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


@pytest.mark.skipif(module._kernels is None, reason="fragfs.codec._kernels is not compiled here")
class TestKernelArguments:
    def right(self):
        """Three words of eight bytes, their lowest byte and four in the middle constant."""
        lows = ((1, 1, bytearray(b"abc")), (2, 4, bytearray(b"ABCDEFGHIJKL")))
        return [8, 4, 0x6C, bytearray(3), bytearray(b"\1\2\3"), lows, bytearray(24)]

    def refused(self, arguments):
        """A call raises an error, and lets go of all buffers: arrays can grow again."""
        arrays = [argument for argument in arguments if isinstance(argument, bytearray)]
        counts = [sys.getrefcount(array) for array in arrays]
        before = [bytes(array) for array in arrays]
        with pytest.raises((ValueError, TypeError, BufferError, OverflowError)):
            module._kernels.put_together(*arguments)
        assert [sys.getrefcount(array) for array in arrays] == counts
        assert [bytes(array) for array in arrays] == before
        for array in arrays:
            array.append(0)

    def test_right_ones(self):
        arguments = self.right()
        for _ in range(1000):
            module._kernels.put_together(*arguments)
        assert arguments[6] == b"laABCD\x10\0lbEFGH\x20\0lcIJKL\x30\0"
        for array in (*arguments[3:5], arguments[6], *(low[2] for low in arguments[5])):
            array.append(0)

    def test_what_is_constant(self):
        out = bytearray(6)
        module._kernels.put_together(2, 0, 0x1234, None, None, (), out)
        assert out == b"\x34\x12" * 3
        module._kernels.put_together(2, 0, 0x1200, b"abc", None, (), out)
        assert out == b"a\x12b\x12c\x12"
        module._kernels.put_together(2, 1, 0x8001, None, b"\1\2\3", (), out)
        assert out == b"\x81\x80\x01\x81\x81\x81"

    def test_wrong_ones(self):
        strided = np.zeros((24, 2), np.uint8)[:, 0]
        low = bytearray(3)
        wrong = {
            0: (0, 1, 2, 3, 4, 5, 16, 0xFFFFFFFF, None, "8"),
            1: (8, 64, 0xFFFFFFFF, None),
            2: (None, "1", 1.5),
            3: (bytearray(), bytearray(2), bytearray(4), 7, "", strided),
            4: (bytearray(), bytearray(2), bytearray(4), 7, "", strided),
            5: (
                None,
                [],
                (None,),
                ((0, 1),),
                ([0, 1, low],),
                ((6, 1, low),),
                ((0xFFFFFFFF, 1, low),),
                ((5, 2, bytearray(6)),),
                ((3, 4, bytearray(12)),),
                ((0, 8, bytearray(24)),),
                ((0, 3, bytearray(9)),),
                ((0, 0, bytearray()),),
                ((0, 1, bytearray(2)),),
                ((0, 2, low),),
                ((0, 1, None),),
                ((0, 1, low),) * 9,
                ((0, 1, low), (0, 1, bytearray(4))),
            ),
            6: (bytearray(), bytearray(16), bytearray(25), bytes(24), None, strided),
        }
        for place, values in wrong.items():
            for value in values:
                arguments = self.right()
                arguments[place] = value
                self.refused(arguments)
                low.append(0)
                del low[3:]
        for count in range(7):
            self.refused(self.right()[:count])

    @pytest.mark.parametrize("unit", UNITS)
    def test_nothing_outside_is_written(self, unit):
        for count in (0, 1, 31, 2048, 2100):
            around = np.full(count * unit + 64, 0xAB, np.uint8)
            inside = around[32 : 32 + count * unit]
            plane = np.zeros(count, np.uint8)
            lows = tuple((position, 1, plane) for position in range(unit - 2))
            module._kernels.put_together(unit, 1, 0, plane, plane, lows, inside)
            assert not inside.any()
            assert (around[:32] == 0xAB).all()
            assert (around[32 + count * unit :] == 0xAB).all()
