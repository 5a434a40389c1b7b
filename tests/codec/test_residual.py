"""Residual words: every form, alone and mixed, and streams of whole words."""

import itertools
import struct
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fragfs.codec import residual as module
from fragfs.codec.groups import GROUPS_MAX, key_field
from fragfs.codec.packing import pack_codes
from fragfs.codec.residual import (
    decode_residual,
    encode_residual,
    estimate_residual,
    parse_streams,
    store_streams,
)
from fragfs.errors import FormatError
from fragfs.types import Dtype
from tests.codec import reference
from tests.codec.families import EVERY_KIND, as_dtype, nudged, numbers, unit_of, words_of

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


def escapes_of(form, count, rng):
    """Residuals for codes of `form` bits of which none, one, some and all are escapes."""
    near = rng.integers(1 - (1 << form - 1), 1 << form - 1, count)
    # The nearest on both sides, and those farthest away.
    escape = 1 << form - 1
    far = rng.choice([escape, -escape, 100, -100, 127, -128], count)
    for share in (0, 0.02, 0.5, 0.98, 1):
        yield np.where(rng.random(count) < share, far, near).tolist()
    for place in {0, count // 2, count - 1}:
        values = near.tolist()
        values[place] = 100
        yield values


@EVERY_WIDTH
@pytest.mark.parametrize("form", [1, 2, 4, 8])
def test_every_form_decodes(unit, form, kernels):
    """Groups of any number of escapes, as they are stored by somebody else."""
    rng = np.random.default_rng(form)
    dtype = WIDTHS[unit]
    for count, method in itertools.product((1, 5, 77, 300), (reference.RAW, reference.ZSTD)):
        for values in escapes_of(form, count, rng):
            params, payload = reference.residual_of([(255, form, values)], unit, method)
            prediction = np.frombuffer(rng.bytes(count * unit), f"<u{unit}")
            back, _, _ = decode_residual(memoryview(params), memoryview(payload), prediction, dtype)
            expected = prediction + np.array(values).astype(prediction.dtype)
            assert np.array_equal(back, expected), (count, method, values)


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


def test_forms_may_change_from_group_to_group(kernels):
    prediction = np.arange(0, 1 << 15, 41, dtype=np.uint32).astype("<u2")
    keys = (prediction >> 7).tolist()
    groups = []
    first = 0
    rng = np.random.default_rng(1)
    for last, form in zip((40, 41, 80, 120, 200, 255), (1, 0, 8, 4, 2, 8), strict=True):
        size = sum(first <= key <= last for key in keys)
        near = {0: 1, 1: 2, 2: 3, 4: 12, 8: 1000}[form]
        values = rng.integers(-near, near, size) * (form > 0)
        groups.append((last, form, values.tolist()))
        first = last + 1
    params, payload = reference.residual_of(groups, 2)
    back, _, _ = decode_residual(memoryview(params), memoryview(payload), prediction, Dtype.BF16)
    queues = [iter(values) for _, _, values in groups]
    expected = [
        (word + next(queues[next(g for g, (last, _, _) in enumerate(groups) if key <= last)]))
        % (1 << 16)
        for word, key in zip(prediction.tolist(), keys, strict=True)
    ]
    assert back.tolist() == expected


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


@EVERY_WIDTH
def test_groups_of_many_escapes_between_others(unit, kernels):
    """Escapes of all groups stand together: each group takes its own."""
    dtype = {1: Dtype.F8_E4M3, 2: Dtype.BF16, 4: Dtype.F32, 8: Dtype.F64}[unit]
    shift, mask = key_field(dtype)
    rng = np.random.default_rng(unit)
    forms = [(1, "some"), (2, "none"), (4, "all"), (0, "none"), (4, "some"), (8, "all"), (2, "all")]
    groups, prediction, expected = [], [], []
    for index, (form, share) in enumerate(forms):
        count = int(rng.integers(20, 90))
        near = (1 << form - 1) - 1 if 0 < form < 8 else 0
        values = rng.integers(-near, near + 1, count)
        if share != "none":
            chosen = rng.random(count) < (0.3 if share == "some" else 1)
            values = np.where(chosen, rng.integers(20, 120, count) * rng.choice([-1, 1]), values)
        key = 2 * index
        last = 255 if index == len(forms) - 1 else key + 1
        groups.append((last, form, values.tolist()))
        words = [key << shift | int(low) for low in rng.integers(0, 1 << min(shift, 7), count)]
        prediction += words
        expected += [(w + v) % (1 << 8 * unit) for w, v in zip(words, values.tolist(), strict=True)]
    assert mask >= 2 * len(forms) - 1
    # Words of a group keep their order; groups are mixed.
    group_of = np.repeat(np.arange(len(groups)), [len(values) for *_, values in groups])
    queues = [iter(np.flatnonzero(group_of == group).tolist()) for group in range(len(groups))]
    places = [next(queues[group]) for group in rng.permutation(group_of).tolist()]
    words = np.array(prediction, f"<u{unit}")[places]
    params, payload = reference.residual_of(groups, unit)
    back, _, _ = decode_residual(memoryview(params), memoryview(payload), words, dtype)
    assert back.tolist() == [expected[place] for place in places]


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

    def test_widths_and_sizes_of_patching(self):
        for width in (0, 3, 5, 7, 9, 16, 64, 0x7FFFFFFF, 0xFFFFFFFF):
            self.refused("patch", width, bytearray(48), 0, bytearray(16))
        for width in (2, 4, 8):
            for wrong in (1, width - 1, width + 1, 8 * width - 1):
                self.refused("patch", width, bytearray(wrong), 0, bytearray(width))
                self.refused("patch", width, bytearray(width), 0, bytearray(wrong))

    def test_kinds_for_patching(self):
        frozen = np.zeros(16, np.uint8)
        frozen.flags.writeable = False
        strided = np.zeros((16, 2), np.uint8)[:, 0]
        for wrong in (None, "text", 7, strided, frozen, bytes(16)):
            self.refused("patch", 2, wrong, 0, bytearray(16))
        for wrong in (None, "text", 7, strided):
            self.refused("patch", 2, bytearray(16), 0, wrong)
        for wrong in (None, "1", 1.5, b"\0"):
            self.refused("patch", wrong, bytearray(16), 0, bytearray(16))
            self.refused("patch", 2, bytearray(16), wrong, bytearray(16))
        arguments = (2, bytearray(16), 0, bytearray(16))
        for count in range(4):
            self.refused("patch", *arguments[:count])
        self.refused("patch", *arguments, 1)

    @EVERY_WIDTH
    def test_patching(self, unit):
        """Any number of markers and replacements: all markers are counted, the first replaced."""
        top = (1 << 8 * unit) - 1
        for marker in (0, 8, top):
            other = [word for word in (0, 1, 7, 9, top - 1) if word != marker]
            for count, more in itertools.product((0, 1, 5, 100), (0, 1, 4, 5, 60, 200)):
                for share in (0, 0.3, 1):
                    rng = np.random.default_rng(count + more)
                    words = rng.choice(np.array(other, f"<u{unit}"), count)
                    words[rng.random(count) < share] = marker
                    # A replacement may be a marker itself: it is put in place, and not looked at.
                    replacements = np.resize(np.array([marker, 3, top], f"<u{unit}"), more)
                    expected, taken = words.tolist(), iter(replacements.tolist())
                    places = [i for i, word in enumerate(expected) if word == marker]
                    for place, replacement in zip(places, taken, strict=False):
                        expected[place] = replacement
                    right = np.array(expected, f"<u{unit}")
                    for skip in (0, 1, 3):
                        around = np.full(count * unit + 40, 0xAB, np.uint8)
                        inside = slice(16 + skip, 16 + skip + count * unit)
                        around[inside] = words.view(np.uint8)
                        odd = bytes(skip) + replacements.tobytes()
                        found = module._kernels.patch(
                            unit, around[inside], marker, memoryview(odd)[skip:]
                        )
                        assert found == len(places)
                        assert around[inside].tobytes() == right.tobytes()
                        assert (around[: 16 + skip] == 0xAB).all()
                        assert (around[inside.stop :] == 0xAB).all()

    def test_patching_keeps_nothing(self):
        values, replacements = bytearray(b"\1\2" * 8), bytearray(b"\3" * 8)
        counts = [sys.getrefcount(thing) for thing in (values, replacements)]
        for _ in range(1000):
            assert module._kernels.patch(1, values, 9, replacements) == 0
        assert [sys.getrefcount(thing) for thing in (values, replacements)] == counts
        values.append(0)
        replacements.append(0)

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


# --- refusals

TEN = np.arange(10, dtype="<u2")


def group(last, size, form):
    return struct.pack("<BIB", last, size, form)


def plane(method, size):
    return struct.pack("<BI", method, size)


PLANES = plane(0, 10) * 2


@pytest.mark.parametrize(
    ("params", "payload"),
    [
        pytest.param(b"", b"", id="nothing"),
        pytest.param(b"\1", b"", id="no group"),
        pytest.param(b"\1" + group(255, 10, 8)[:-1], b"", id="half a group"),
        pytest.param(b"\1" + group(255, 10, 8), b"", id="no planes"),
        pytest.param(b"\1" + group(255, 10, 8) + plane(0, 10), bytes(10), id="one plane"),
        pytest.param(b"\1" + group(255, 10, 8) + PLANES, bytes(19), id="payload ends early"),
        pytest.param(b"\1" + group(255, 9, 8) + plane(0, 9) * 2, bytes(18), id="too few words"),
        pytest.param(b"\1" + group(255, 11, 8) + plane(0, 11) * 2, bytes(22), id="too many words"),
        pytest.param(b"\1" + group(255, 0, 8) + PLANES, bytes(20), id="no words"),
        pytest.param(b"\1" + group(255, 0xFFFFFFFF, 0), b"", id="very many words"),
        pytest.param(b"\1" + group(254, 10, 8) + PLANES, bytes(20), id="keys without group"),
        pytest.param(b"\2" + group(255, 5, 0) * 2, b"", id="group twice"),
        pytest.param(b"\2" + group(255, 5, 0) + group(1, 5, 0), b"", id="groups out of order"),
        pytest.param(b"\2" + group(9, 5, 0) + group(255, 5, 0), b"", id="sizes of other words"),
        pytest.param(
            bytes([GROUPS_MAX + 1])
            + b"".join(group(i, 1, 0) for i in range(GROUPS_MAX))
            + group(255, 1, 0),
            b"",
            id="too many groups",
        ),
        pytest.param(b"\1" + group(255, 10, 3), bytes(20), id="unknown form"),
        pytest.param(b"\1" + group(255, 10, 8) + plane(3, 10) * 2, bytes(20), id="unknown method"),
        pytest.param(b"\1" + group(255, 10, 8) + plane(1, 0) * 2, b"", id="constant of no byte"),
        pytest.param(b"\1" + group(255, 10, 8) + plane(1, 2) * 2, bytes(4), id="constant of two"),
        pytest.param(b"\1" + group(255, 10, 8) + plane(2, 10) * 2, bytes(20), id="no frame"),
        pytest.param(b"\1" + group(255, 10, 8) + plane(0, 1 << 31) * 2, bytes(20), id="huge plane"),
        pytest.param(b"\1" + group(255, 10, 4) + bytes(4), b"", id="codes without a stream"),
        pytest.param(b"\1" + group(255, 10, 4) + bytes(4) + plane(0, 4), bytes(4), id="few codes"),
        pytest.param(b"\1" + group(255, 10, 4) + bytes(4) + plane(0, 6), bytes(6), id="many codes"),
        pytest.param(
            b"\1" + group(255, 10, 4) + b"\1\0\0\0" + plane(0, 5), bytes(5), id="escapes missing"
        ),
        pytest.param(
            b"\1" + group(255, 10, 4) + b"\xff\0\0\0" + plane(1, 1), b"\xff", id="too many escapes"
        ),
        pytest.param(
            b"\1" + group(255, 10, 4) + b"\x0a\0\0\0" + plane(1, 1), b"\xff", id="escapes unstored"
        ),
    ],
)
def test_malformed(params, payload, kernels):
    with pytest.raises(FormatError):
        decode_residual(memoryview(params), memoryview(payload), TEN, Dtype.BF16)


@EVERY_WIDTH
def test_wrong_numbers_of_escapes(unit, kernels):
    """Too few or too many, where streams of any size are as they should be."""
    prediction = np.zeros(10, f"<u{unit}")
    streams = plane(1, 1) * unit, b"\x85" * unit

    def stored(*groups):
        params = b"".join(
            group(last, len(codes), 4) + struct.pack("<I", count) + plane(0, -(-len(codes) // 2))
            for last, codes, count in groups
        )
        codes = [
            bytes(a | b << 4 for a, b in zip(c[::2], (*c, 0)[1::2], strict=False))
            for _, c, _ in groups
        ]
        return bytes([len(groups)]) + params + streams[0], b"".join(codes) + streams[1]

    def decoded(*groups):
        params, payload = stored(*groups)
        return decode_residual(memoryview(params), memoryview(payload), prediction, WIDTHS[unit])[0]

    four = (15, 7, 15, 7, 7, 15, 7, 7, 7, 15)
    expected = int("05" * unit, 16)
    assert decoded((255, four, 4)).tolist() == [expected if c == 15 else 0 for c in four]
    for count in (1, 2, 3, 5, 6, 9, 10, 11, 1 << 16, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF):
        with pytest.raises(FormatError):
            decoded((255, four, count))
    with pytest.raises(FormatError):
        decoded((255, (7,) * 10, 1))
    # Codes that only fill up the last byte are none.
    prediction = np.zeros(9, f"<u{unit}")
    assert decoded((255, four[:9], 3)).tolist() == [expected if c == 15 else 0 for c in four[:9]]


def test_numbers_of_escapes_that_are_right_in_sum_only(kernels):
    prediction = np.array([0] * 5 + [0x3F80] * 5, "<u2")
    codes = b"\x7f\x7f\x07", b"\x7f\x77\x07"  # two escapes, and one

    def decoded(first, second):
        params = b"\2" + b"".join(
            group(last, 5, 4) + struct.pack("<I", count) + plane(0, 3)
            for last, count in ((100, first), (255, second))
        )
        payload = b"".join(codes) + bytes([1, 2, 3]) + b"\x80"
        return decode_residual(
            memoryview(params + plane(0, 3) + plane(1, 1)),
            memoryview(payload),
            prediction,
            Dtype.BF16,
        )[0]

    found = (decoded(2, 1) - prediction).astype("<i2").tolist()
    assert found == [-127, 0, -126, 0, 0, -125, 0, 0, 0, 0]
    for wrong in ((1, 2), (3, 1 << 32 - 1), (2, 2), (1, 1), (3, 1)):
        with pytest.raises(FormatError):
            decoded(*wrong)


@pytest.mark.parametrize(
    "params",
    [
        pytest.param(bytes([GROUPS_MAX + 1]), id="groups"),
        pytest.param(b"\1" + group(255, 10, 16), id="form"),
        pytest.param(b"\1" + group(255, 10, 8) + plane(3, 0), id="method"),
    ],
)
def test_what_a_newer_version_may_write_names_the_remedy(params):
    with pytest.raises(FormatError) as caught:
        decode_residual(memoryview(params), memoryview(b""), TEN, Dtype.BF16)
    assert caught.value.remedy == "upgrade fragfs"


def test_words_of_every_width_are_little_endian():
    assert [unit_of(dtype) for dtype in WIDTHS.values()] == [1, 2, 4, 8]
