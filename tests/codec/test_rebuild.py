"""Residuals decoded: every form, as somebody else may store it, and what breaks the format."""

import itertools
import struct
import sys

import numpy as np
import pytest

from fragfs.codec import rebuild as module
from fragfs.codec.groups import GROUPS_MAX, key_field
from fragfs.codec.rebuild import decode_residual
from fragfs.errors import FormatError
from fragfs.types import Dtype
from tests.codec import reference
from tests.codec.families import escapes_of

WIDTHS = {1: Dtype.U8, 2: Dtype.BF16, 4: Dtype.F32, 8: Dtype.F64}
KEYED = {**WIDTHS, 1: Dtype.F8_E4M3}
EVERY_WIDTH = pytest.mark.parametrize("unit", WIDTHS)


@EVERY_WIDTH
@pytest.mark.parametrize("form", [1, 2, 4, 8])
def test_every_form_decodes(unit, form, loops):
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


def test_forms_may_change_from_group_to_group(loops):
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


@EVERY_WIDTH
def test_groups_of_many_escapes_between_others(unit, loops):
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


def residual_in_groups(unit, keys, forms, rng):
    """A prediction with such keys, what is stored of it, and what it decodes to.

    Args:
        unit: Bytes of a word.
        keys: The key of each word: index of its group.
        forms: The form of each group.
        rng: Where the rest comes from.
    """
    shift, _ = key_field(KEYED[unit])
    low = rng.integers(0, 1 << min(shift, 30), keys.size)
    prediction = ((keys.astype(np.uint64) << np.uint64(shift)) | low.astype(np.uint64)).astype(
        f"<u{unit}"
    )
    residuals = np.zeros(keys.size, np.int64)
    groups = []
    for index, form in enumerate(forms):
        places = np.flatnonzero(keys == index)
        near = (1 << form - 1) - 1 if 0 < form < 8 else 0
        values = rng.integers(-near, near + 1, places.size)
        if form:
            values = np.where(rng.random(places.size) < 0.2, 90 - 180 * (values > 0), values)
        residuals[places] = values
        last = 255 if index == len(forms) - 1 else index
        groups.append((last, form, values.tolist()))
    expected = prediction + residuals.astype(prediction.dtype)
    return prediction, reference.residual_of(groups, unit, reference.ZSTD), expected


@EVERY_WIDTH
@pytest.mark.parametrize("count", [1024, 1025, 2047, 5000, 8192])
def test_words_of_many_blocks(unit, count, loops):
    """Groups mixed, one behind the other, and rare ones: sources run ahead and run out."""
    rng = np.random.default_rng(count + unit)
    forms = (8, 1, 0, 2, 4, 8, 1)
    mixed = rng.integers(0, len(forms), count)
    rare = np.where(rng.random(count) < 0.99, 3, mixed)
    for keys in (mixed, rare, np.sort(mixed), np.sort(mixed)[::-1]):
        keys = keys.copy()
        keys[rng.permutation(count)[: len(forms)]] = range(len(forms))
        prediction, (params, payload), expected = residual_in_groups(unit, keys, forms, rng)
        for overwrite in (False, True):
            given = prediction.copy()
            back, _, _ = decode_residual(
                memoryview(params), memoryview(payload), given, KEYED[unit], overwrite=overwrite
            )
            assert np.array_equal(back, expected)
            assert (back is given) == overwrite
            assert overwrite or np.array_equal(given, prediction)


@EVERY_WIDTH
def test_as_many_groups_as_there_may_be(unit, loops):
    rng = np.random.default_rng(unit)
    keys = np.resize(np.arange(GROUPS_MAX if unit > 1 else 15), 4000)
    forms = np.resize([1, 2, 4, 8], keys.max() + 1).tolist()
    prediction, (params, payload), expected = residual_in_groups(unit, keys, forms, rng)
    back, _, _ = decode_residual(memoryview(params), memoryview(payload), prediction, KEYED[unit])
    assert np.array_equal(back, expected)


@EVERY_WIDTH
@pytest.mark.parametrize("count", [3000, 3072])
def test_groups_of_other_words_are_refused(unit, count, loops):
    """Sizes that belong to other predictions: more than a source has are asked of it."""
    rng = np.random.default_rng(unit)
    keys = np.resize([0, 0, 0, 1, 2], count)
    for forms in itertools.product((0, 2, 8), repeat=3):
        prediction, (params, payload), _ = residual_in_groups(unit, keys, forms, rng)
        shift, _ = key_field(KEYED[unit])
        for wrong in (0, 1, 2):
            other = prediction.copy()
            other[:: count - 1] = wrong << shift
            if np.count_nonzero(other >> other.dtype.type(shift) == wrong) != np.count_nonzero(
                keys == wrong
            ):
                with pytest.raises(FormatError):
                    decode_residual(memoryview(params), memoryview(payload), other, KEYED[unit])
        for other in (np.zeros_like(prediction), np.full_like(prediction, 2 << shift)):
            with pytest.raises(FormatError):
                decode_residual(memoryview(params), memoryview(payload), other, KEYED[unit])


def test_a_prediction_at_odd_addresses(loops):
    rng = np.random.default_rng(1)
    keys = rng.integers(0, 3, 3000)
    prediction, (params, payload), expected = residual_in_groups(2, keys, (8, 2, 1), rng)
    for skip in (1, 3):
        moved = np.frombuffer(bytes(skip) + prediction.tobytes(), "<u2", offset=skip)
        back, _, _ = decode_residual(
            memoryview(params), memoryview(b"-" + payload)[1:], moved, Dtype.BF16
        )
        assert np.array_equal(back, expected)


# --- the compiled module by itself: wrong arguments are errors, never accesses outside


@pytest.mark.skipif(module._kernels is None, reason="fragfs.codec._kernels is not compiled here")
class TestKernelArguments:
    def right(self):
        """Five words in two groups: three codes of four bits, one of them an escape; two planes."""
        groups = (
            (9, 3, 4, 1, (bytearray(b"\x7f\x07"),)),
            (255, 2, 8, 0, (bytearray(b"\x81\x80"), bytearray(b"\x80"))),
        )
        prediction = bytearray(np.array([0, 10 << 7, 0, 10 << 7, 0], "<u2"))
        escapes = bytearray(np.array([500, *[0] * 16], "<u2"))
        return [2, prediction, bytearray(10), 7, 255, groups, escapes]

    def refused(self, name, arguments):
        """A call raises an error, and lets go of all buffers: arrays can grow again."""
        arrays = [argument for argument in arguments if isinstance(argument, bytearray)]
        counts = [sys.getrefcount(array) for array in arrays]
        with pytest.raises((ValueError, TypeError, BufferError, OverflowError)):
            getattr(module._kernels, name)(*arguments)
        assert [sys.getrefcount(array) for array in arrays] == counts
        for array in arrays:
            array.append(0)

    def test_right_ones(self):
        arguments = self.right()
        module._kernels.rebuild(*arguments)
        assert np.frombuffer(arguments[2], "<u2").tolist() == [500, 1281, 0, 1280, 0]

    def test_nothing_is_kept(self):
        arguments = self.right()
        for _ in range(1000):
            module._kernels.rebuild(*arguments)
        for array in (*arguments[1:3], arguments[6], *arguments[5][0][4], *arguments[5][1][4]):
            array.append(0)

    def test_wrong_ones(self):
        strided = np.zeros((10, 2), np.uint8)[:, 0]
        wrong = {
            0: (0, 1, 3, 4, 8, 16, 0xFFFFFFFF, -1, None, "2"),
            1: (bytearray(), bytearray(8), bytearray(9), bytearray(12), None, 7, "", strided),
            2: (bytearray(), bytearray(8), bytearray(9), bytearray(12), bytes(10), None, strided),
            3: (16, 64, 0xFFFFFFFF, None),
            4: (256, 0xFFFFFFFF, None),
            5: ((), None, 7, [], list(self.right()[5]), self.right()[5] * 9),
            6: (bytearray(), bytearray(32), bytearray(33), bytearray(35), None, strided),
        }
        for place, values in wrong.items():
            for value in values:
                arguments = self.right()
                arguments[place] = value
                self.refused("rebuild", arguments)
        for count in range(7):
            self.refused("rebuild", self.right()[:count])

    def test_wrong_groups(self):
        planes = (bytearray(b"\x81\x80"), bytearray(b"\x80"))
        codes = (bytearray(b"\x7f\x07"),)
        second = (255, 2, 8, 0, planes)
        for groups in (
            ((9, 3, 4, 1, codes),),
            (second, second),
            (second, (9, 3, 4, 1, codes)),
            ((9, 3, 4, 1, codes), (254, 2, 8, 0, planes)),
            ((9, 3, 4, 1, codes), (256, 2, 8, 0, planes)),
            ((9, 3, 4, 1, codes), (9, 2, 8, 0, planes)),
            ((9, 4, 4, 1, codes), second),
            ((9, 2, 4, 1, codes), second),
            ((9, 0, 4, 1, codes), (255, 5, 0, 0, ())),
            ((9, 0xFFFFFFFF, 0, 0, ()), (255, 6, 0, 0, ())),
            ((9, 0x80000000, 0, 0, ()), (255, 0x80000005, 0, 0, ())),
            ((9, 3, 3, 1, codes), second),
            ((9, 3, 16, 1, codes), second),
            ((9, 3, 4, 0, codes), second),
            ((9, 3, 4, 2, codes), second),
            ((9, 3, 4, 4, codes), second),
            ((9, 3, 4, 0xFFFFFFFF, codes), second),
            ((9, 3, 4, 1, ()), second),
            ((9, 3, 4, 1, codes * 2), second),
            ((9, 3, 4, 1, (bytearray(1),)), second),
            ((9, 3, 4, 1, (bytearray(3),)), second),
            ((9, 3, 4, 1, (bytearray(),)), second),
            ((9, 3, 4, 1, (None,)), second),
            ((9, 3, 4, 1, codes), (255, 2, 8, 0, planes[:1])),
            ((9, 3, 4, 1, codes), (255, 2, 8, 0, planes * 2)),
            ((9, 3, 4, 1, codes), (255, 2, 8, 1, planes)),
            ((9, 3, 4, 1, codes), (255, 2, 8, 0, (planes[0], bytearray(3)))),
            ((9, 3, 4, 1, codes), (255, 2, 8, 0, (planes[0], bytearray()))),
            ((9, 3, 4, 1, codes), (255, 2, 8, 0, list(planes))),
            ((9, 3, 4, 1, codes), (255, 2, 8, 0)),
            ((9, 3, 4, 1, codes), [255, 2, 8, 0, planes]),
            ((9, 3, 4, 1, codes), None),
            ((9, 3, 0, 0, codes), second),
        ):
            arguments = self.right()
            arguments[5] = groups
            self.refused("rebuild", arguments)
            planes[0].append(0)
            del planes[0][2:]
            codes[0].append(0)
            del codes[0][2:]

    @EVERY_WIDTH
    @pytest.mark.parametrize("vectors", [False, True])
    def test_nothing_outside_is_written(self, unit, vectors):
        module._kernels.allow_vectors(vectors)
        try:
            for count, form in itertools.product((1, 7, 16, 1023, 3001), (0, 1, 2, 4, 8)):
                planes = (np.zeros(count, np.uint8),) * unit
                given = {0: (), 8: planes}.get(form, (np.zeros(-(-count * form // 8), np.uint8),))
                around = np.full(count * unit + 64, 0xAB, np.uint8)
                inside = around[32 : 32 + count * unit]
                groups = ((255, count, form, 0, given),)
                room = bytes(16 * unit)
                module._kernels.rebuild(unit, bytes(count * unit), inside, 0, 0, groups, room)
                assert (around[:32] == 0xAB).all()
                assert (around[32 + count * unit :] == 0xAB).all()
                inside[:] = 0xAB
                module._kernels.merge_planes(unit, planes, 0, inside)
                assert not inside.any()
                assert (around[:32] == 0xAB).all()
                assert (around[32 + count * unit :] == 0xAB).all()
        finally:
            module._kernels.allow_vectors(True)

    def test_merging(self):
        out = bytearray(8)
        module._kernels.merge_planes(2, (b"\1\2\3\4", b"\5"), 0x0101, out)
        assert np.frombuffer(out, "<u2").tolist() == [0x400, 0x401, 0x402, 0x403]
        for arguments in (
            (0, (), 0, bytearray(8)),
            (3, (b"1",) * 3, 0, bytearray(9)),
            (2, (b"1",), 0, bytearray(8)),
            (2, (b"1",) * 3, 0, bytearray(8)),
            (2, (b"1", b"12"), 0, bytearray(8)),
            (2, (b"1", b""), 0, bytearray(8)),
            (2, (b"1", None), 0, bytearray(8)),
            (2, [b"1", b"1"], 0, bytearray(8)),
            (2, (b"1", b"1"), 0, bytearray(9)),
            (2, (b"1", b"1"), 0, bytes(8)),
            (2, (b"1", b"1"), None, bytearray(8)),
        ):
            self.refused("merge_planes", arguments)


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
def test_malformed(params, payload, loops):
    with pytest.raises(FormatError):
        decode_residual(memoryview(params), memoryview(payload), TEN, Dtype.BF16)


@EVERY_WIDTH
def test_wrong_numbers_of_escapes(unit, loops):
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


def test_numbers_of_escapes_that_are_right_in_sum_only(loops):
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
