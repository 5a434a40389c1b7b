"""Residual words: every form, alone and mixed, and streams of whole words."""

import itertools
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fragfs.codec import residual as module
from fragfs.codec.packing import pack_codes
from fragfs.codec.rebuild import decode_residual, parse_streams
from fragfs.codec.residual import encode_residual, estimate_residual, store_streams
from fragfs.types import Dtype
from tests.codec.families import (
    EVERY_KIND,
    as_dtype,
    escapes_of,
    nudged,
    numbers,
    unit_of,
    words_of,
)

WIDTHS = {1: Dtype.U8, 2: Dtype.BF16, 4: Dtype.F32, 8: Dtype.F64}
EVERY_WIDTH = pytest.mark.parametrize("unit", WIDTHS)


def names(value):
    return getattr(value, "name", value)


def round_trip(words, prediction, dtype, *, grouped):
    params, payload = encode_residual(words, prediction, dtype, grouped=grouped, level=3)
    stored = b"".join(bytes(part) for part in payload)
    back, rest_params, rest_payload = decode_residual(
        memoryview(params + b"after"), memoryview(stored + b"behind"), prediction, dtype
    )
    assert np.array_equal(back, words)
    assert (bytes(rest_params), bytes(rest_payload)) == (b"after", b"behind")
    return params, stored


@pytest.mark.parametrize("dtype", EVERY_KIND, ids=names)
def test_round_trips(dtype, kernels):
    prediction = words_of(as_dtype(numbers(), dtype), dtype)
    for share, step in ((0, 1), (0.02, 1), (0.2, 1), (0.9, 2), (1, 7), (1, 120), (1, 30_000)):
        words = words_of(nudged(prediction.tobytes(), dtype, 3, share, step), dtype)
        for grouped in (False, True):
            round_trip(words, prediction, dtype, grouped=grouped)


@EVERY_WIDTH
def test_sizes(unit, kernels):
    dtype = WIDTHS[unit]
    for count in (1, 2, 3, 7, 8, 9, 63, 4095, 4096, 4097, 16_385):
        prediction = words_of(as_dtype(numbers(count), dtype), dtype)
        for step in (0, 1, 3, 200):
            words = words_of(nudged(prediction.tobytes(), dtype, 3, 0.5, step), dtype)
            for grouped in (False, True):
                round_trip(words, prediction, dtype, grouped=grouped)


@EVERY_WIDTH
def test_extreme_residuals(unit):
    dtype = WIDTHS[unit]
    top = (1 << 8 * unit) - 1
    prediction = np.array([0, top, 0, top, top >> 1, 1] * 500, f"<u{unit}")
    words = np.array([top, 0, 0, top, (top >> 1) + 1, 0] * 500, f"<u{unit}")
    round_trip(words, prediction, dtype, grouped=True)


@settings(max_examples=50)
@given(
    data=st.data(),
    unit=st.sampled_from(list(WIDTHS)),
    grouped=st.booleans(),
)
def test_any_words_round_trip(data, unit, grouped):
    count = data.draw(st.integers(1, 50))
    raw = [data.draw(st.binary(min_size=count * unit, max_size=count * unit)) for _ in range(2)]
    words, prediction = (np.frombuffer(part, f"<u{unit}") for part in raw)
    round_trip(words, prediction, WIDTHS[unit], grouped=grouped)


@EVERY_WIDTH
def test_any_number_of_escapes_is_encoded(unit, kernels):
    rng = np.random.default_rng(unit)
    dtype = WIDTHS[unit]
    for form, count in itertools.product((1, 2, 4), (1, 77, 5000)):
        for values in escapes_of(form, count, rng):
            prediction = np.frombuffer(rng.bytes(count * unit), f"<u{unit}")
            words = prediction + np.array(values).astype(prediction.dtype)
            round_trip(words, prediction, dtype, grouped=True)


@EVERY_WIDTH
@pytest.mark.parametrize("bits", [1, 2, 4])
def test_codes_and_what_is_outside(unit, bits, kernels):
    zero, escape = (1 << bits - 1) - 1, (1 << bits) - 1
    top = 1 << 8 * unit
    edges = [-zero - 1, -zero, 0, escape - zero - 1, escape - zero, top // 2, top // 2 - 1, -1, 1]
    for count in (0, 1, 2, len(edges), 1001):
        values = np.resize(np.array([edge % top for edge in edges], f"<u{unit}"), count)
        for ordered in (values, values[::-1].copy()):
            before = ordered.copy()
            packed, outside = module._pack(ordered, bits)
            shifted = [(value + zero) % top for value in ordered.tolist()]
            codes = np.array([min(value, escape) for value in shifted], np.uint8)
            assert packed.tolist() == pack_codes(codes, bits).tolist()
            far = [v for v, s in zip(ordered.tolist(), shifted, strict=True) if s >= escape]
            assert outside.dtype == ordered.dtype
            assert outside.tolist() == far
            assert np.array_equal(ordered, before)


def test_right_throughout_is_the_prediction_itself():
    prediction = np.arange(100, dtype="<u4")
    assert encode_residual(prediction, prediction, Dtype.F32, grouped=True, level=3) == (b"\0", [])
    back, params, payload = decode_residual(
        memoryview(b"\0more"), memoryview(b"stored"), prediction, Dtype.F32
    )
    assert back is prediction
    assert (bytes(params), bytes(payload)) == (b"more", b"stored")


def test_decoded_words_outlive_the_next_decode():
    prediction = np.zeros(5000, "<u2")
    backs = []
    for step in (1, 2):
        words = np.full(5000, step, "<u2")
        words[::3] = 40_000 + step
        params, payload = encode_residual(words, prediction, Dtype.BF16, grouped=True, level=3)
        backs.append(
            decode_residual(
                memoryview(params), memoryview(b"".join(payload)), prediction, Dtype.BF16
            )[0]
        )
    assert [back[1] for back in backs] == [1, 2]
    assert [back[0] for back in backs] == [40_001, 40_002]


@pytest.mark.parametrize("dtype", [Dtype.BF16, Dtype.F32, Dtype.F16, Dtype.U8], ids=names)
@pytest.mark.parametrize(("share", "step"), [(0, 1), (0.05, 1), (0.5, 3), (1, 20), (1, 120)])
def test_estimates_are_near_what_is_stored(dtype, share, step):
    prediction = words_of(as_dtype(numbers(100_000), dtype), dtype)
    words = words_of(nudged(prediction.tobytes(), dtype, 3, share, step), dtype)
    for grouped in (False, True):
        params, payload = encode_residual(words, prediction, dtype, grouped=grouped, level=3)
        stored = len(params) + sum(map(len, payload))
        guess = estimate_residual(words, prediction, dtype, grouped=grouped)
        assert abs(guess - stored) <= 0.12 * stored + 0.01 * words.nbytes


@EVERY_WIDTH
@pytest.mark.parametrize("count", [1, 2, 1000, 70_000])
def test_streams(unit, count):
    for words in (
        np.arange(count, dtype=np.uint64).astype(f"<u{unit}"),
        np.full(count, (1 << 8 * unit) - 1, f"<u{unit}"),
        np.frombuffer(np.random.default_rng(1).bytes(count * unit), f"<u{unit}"),
    ):
        params, payload = [], []
        store_streams(words, 3, params, payload)
        back, rest, behind = parse_streams(
            memoryview(b"".join(params) + b"p"),
            memoryview(b"".join(payload) + b"q"),
            count,
            np.dtype(f"<u{unit}"),
        )
        assert np.array_equal(back, words)
        assert (bytes(rest), bytes(behind)) == (b"p", b"q")


# --- the compiled module by itself: wrong arguments are errors, never writes


@pytest.mark.skipif(module._kernels is None, reason="fragfs.codec._kernels is not compiled here")
class TestKernelArguments:
    def refused(self, name, *arguments):
        """A call raises an error, and lets go of all buffers: arrays can grow again."""
        arrays = [argument for argument in arguments if isinstance(argument, bytearray)]
        counts = [sys.getrefcount(array) for array in arrays]
        before = [bytes(array) for array in arrays]
        with pytest.raises((ValueError, TypeError, BufferError)):
            getattr(module._kernels, name)(*arguments)
        assert [sys.getrefcount(array) for array in arrays] == counts
        assert [bytes(array) for array in arrays] == before
        for array in arrays:
            array.append(0)

    def refused_each(self, name, right, wrong):
        """The right arguments are taken, and refused with any one of the wrong ones in place."""
        getattr(module._kernels, name)(*right())
        for place, values in wrong.items():
            for value in values:
                arguments = right()
                arguments[place] = value
                self.refused(name, *arguments)
        for count in range(len(right())):
            self.refused(name, *right()[:count])

    def test_wrong_arguments_of_packing(self):
        strided = np.zeros((20, 2), np.uint8)[:, 0]
        wrong = {
            0: (0, 1, 3, 4, 8, 16, 0xFFFFFFFF, None, "2"),
            1: (bytearray(18), bytearray(19), bytearray(24), bytearray(), None, 7, "", strided),
            2: (0, 2, 3, 8, 0xFFFFFFFF, None, 1.5),
            3: (bytearray(4), bytearray(6), bytearray(10), bytearray(), bytes(5), None, strided),
            4: (bytearray(18), bytearray(19), bytearray(22), bytearray(), bytes(20), None, strided),
        }
        self.refused_each("pack", lambda: [2, bytearray(20), 4, bytearray(5), bytearray(20)], wrong)

    def test_wrong_arguments_of_taking_planes(self):
        strided = np.zeros((20, 2), np.uint8)[:, 0]
        wrong = {
            0: (0, 3, 5, 16, 0xFFFFFFFF, None, "2"),
            1: (bytearray(18), bytearray(19), bytearray(22), bytearray(), None, 7, "", strided),
            2: (None, 1.5, "1"),
            3: (bytearray(18), bytearray(19), bytearray(22), bytearray(), bytes(20), None, strided),
        }
        self.refused_each("planes", lambda: [2, bytearray(20), 0x8080, bytearray(20)], wrong)
        self.refused("planes", 4, bytearray(22), 0, bytearray(22))

    @EVERY_WIDTH
    def test_packing_writes_nothing_outside(self, unit):
        for count, skip in itertools.product((0, 1, 33, 1000), (0, 1, 3)):
            values = np.frombuffer(np.random.default_rng(1).bytes(count * unit), np.uint8)
            size = -(-count // 2)
            packed = np.full(size + 40, 0xAB, np.uint8)
            outside = np.full(count * unit + 40, 0xAB, np.uint8)
            ends = 16 + skip + size, 16 + skip + count * unit
            module._kernels.pack(
                unit, values, 4, packed[16 + skip : ends[0]], outside[16 + skip : ends[1]]
            )
            for array, end in zip((packed, outside), ends, strict=True):
                assert (array[: 16 + skip] == 0xAB).all()
                assert (array[end:] == 0xAB).all()

    @EVERY_WIDTH
    def test_taking_planes_writes_nothing_outside(self, unit):
        for count, skip in itertools.product((0, 1, 33, 1000), (0, 1, 3)):
            values = np.frombuffer(np.random.default_rng(1).bytes(count * unit), np.uint8)
            planes = np.full(count * unit + 40, 0xAB, np.uint8)
            end = 16 + skip + count * unit
            module._kernels.planes(unit, values, 0, planes[16 + skip : end])
            assert (planes[: 16 + skip] == 0xAB).all()
            assert planes[16 + skip : end].tolist() == values.reshape(-1, unit).T.ravel().tolist()
            assert (planes[end:] == 0xAB).all()


def test_words_of_every_width_are_little_endian():
    assert [unit_of(dtype) for dtype in WIDTHS.values()] == [1, 2, 4, 8]
