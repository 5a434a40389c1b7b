import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fragfs.codec.packing import (
    PACKED_BITS,
    escape_code,
    pack_codes,
    packed_size,
    unpack_codes,
    zero_code,
)

EVERY_WIDTH = pytest.mark.parametrize("bits", PACKED_BITS)


def reference_pack(codes, bits):
    per_byte = 8 // bits
    return bytes(
        sum(code << bits * place for place, code in enumerate(codes[start : start + per_byte]))
        for start in range(0, len(codes), per_byte)
    )


def unpack(packed, bits):
    out = np.full(len(packed) * 8 // bits, 0xEE, np.uint8)
    unpack_codes(np.frombuffer(packed, np.uint8), bits, out)
    return out.tolist()


@EVERY_WIDTH
def test_every_byte_unpacks_low_bits_first(bits):
    per_byte = 8 // bits
    codes = unpack(bytes(range(256)), bits)
    for byte in range(256):
        expected = [byte >> bits * place & (1 << bits) - 1 for place in range(per_byte)]
        assert codes[byte * per_byte : (byte + 1) * per_byte] == expected


@EVERY_WIDTH
def test_every_byte_packs_again(bits):
    codes = np.array(unpack(bytes(range(256)), bits), np.uint8)
    assert pack_codes(codes, bits).tobytes() == bytes(range(256))


@settings(max_examples=50)
@given(data=st.data(), bits=st.sampled_from(PACKED_BITS))
def test_any_codes_round_trip(data, bits):
    codes = data.draw(st.lists(st.integers(0, (1 << bits) - 1), min_size=1, max_size=100))
    packed = pack_codes(np.array(codes, np.uint8), bits)
    assert packed.tobytes() == reference_pack(codes, bits)
    assert packed.size == packed_size(len(codes), bits)
    back = unpack(packed.tobytes(), bits)
    assert back[: len(codes)] == codes
    assert not any(back[len(codes) :])


@EVERY_WIDTH
def test_sizes(bits):
    for size in (*range(1, 18), 1000, 4096, 100_003):
        codes = np.random.default_rng(size).integers(0, 1 << bits, size).astype(np.uint8)
        before = codes.copy()
        packed = pack_codes(codes, bits)
        assert packed.tobytes() == reference_pack(codes.tolist(), bits), size
        assert np.array_equal(codes, before), size


def test_no_codes_at_all():
    for bits in PACKED_BITS:
        assert pack_codes(np.zeros(0, np.uint8), bits).size == packed_size(0, bits) == 0


def test_codes_by_hand():
    assert [(zero_code(bits), escape_code(bits)) for bits in PACKED_BITS] == [
        (0, 1),
        (1, 3),
        (7, 15),
    ]
    assert pack_codes(np.array([1, 0, 0, 0, 0, 0, 0, 1, 1], np.uint8), 1).tolist() == [0x81, 0x01]
    assert pack_codes(np.array([3, 0, 1, 2], np.uint8), 2).tolist() == [0b10010011]
    assert pack_codes(np.array([15, 7, 1], np.uint8), 4).tolist() == [0x7F, 0x01]
