"""Conversions: golden digests of whole tables, and independent oracles for what is in them."""

import itertools
import sys
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fragfs.codec import floats as module
from fragfs.codec.floats import FLOATS, convert, narrow, quantize, widen, word_type
from fragfs.types import Dtype
from tests.codec import reference
from tests.codec.families import without_kernels
from tests.codec.tables import (
    DIGESTS,
    SMALL,
    SPECIAL_F32,
    TABLES,
    all_words,
    digest,
    exact_f32,
    narrow_inputs,
    quantize_inputs,
)

LIBRARY = {
    Dtype.BF16: ml_dtypes.bfloat16,
    Dtype.F16: np.float16,
    Dtype.F8_E4M3: ml_dtypes.float8_e4m3fn,
    Dtype.F8_E5M2: ml_dtypes.float8_e5m2,
}
LARGEST = {Dtype.BF16: 0x7F7F, Dtype.F16: 0x7BFF, Dtype.F8_E4M3: 0x7E, Dtype.F8_E5M2: 0x7B}
FORMATS = (Dtype.BF16, Dtype.F16, Dtype.F8_E4M3, Dtype.F8_E5M2, Dtype.F32)
"""In the order of the numbers that the compiled loops know them by."""
SIGN = {dtype: 1 << dtype.bits - 1 for dtype in LIBRARY}
NARROW = pytest.mark.parametrize("dtype", LIBRARY, ids=lambda dtype: dtype.name)
SATURATING = pytest.mark.parametrize("dtype", SMALL, ids=lambda dtype: dtype.name)


def widened(words, dtype):
    """Words of a dtype as f32."""
    return convert([words], [dtype], None, Dtype.F32).view("<f4")


def narrowed(bits, dtype):
    """Bits of f32 as words of a dtype."""
    return convert([bits], [Dtype.F32], None, dtype)


def rounded(dtype, *bits):
    return narrowed(np.array(bits, "<u4"), dtype).tolist()


@pytest.mark.parametrize("name", TABLES)
def test_tables_never_change(name, kernels):
    assert digest(name) == DIGESTS[name]


def test_every_conversion_has_a_digest():
    assert DIGESTS.keys() == TABLES.keys()
    assert {f"narrow {dtype.name}" for dtype in FLOATS if dtype is not Dtype.F32} <= DIGESTS.keys()
    assert {f"widen {dtype.name}" for dtype in FLOATS if dtype is not Dtype.F32} <= DIGESTS.keys()


@NARROW
def test_widening_agrees_with_the_library_on_every_finite_number(dtype, kernels):
    words = all_words(dtype)
    words = words[(words & (SIGN[dtype] - 1)) <= LARGEST[dtype]]
    expected = words.view(LIBRARY[dtype]).astype(np.float32)
    assert np.array_equal(widened(words, dtype).view("<u4"), expected.view("<u4"))


@NARROW
def test_the_inputs_of_the_tables_are_the_exact_numbers(dtype):
    words = all_words(dtype)[: SIGN[dtype]]
    assert np.array_equal(exact_f32(dtype), widened(words, dtype).view("<u4"))


def test_bf16_is_the_upper_half_of_f32_whatever_it_holds(kernels):
    words = all_words(Dtype.BF16)
    wide = widened(words, Dtype.BF16).view("<u4")
    assert np.array_equal(wide, words.astype(np.uint32) << np.uint32(16))


@SATURATING
def test_infinities_and_nans_widen_to_what_would_follow_the_largest(dtype, kernels):
    words = all_words(dtype)
    magnitudes = widened(words[: SIGN[dtype]], dtype).astype(np.float64)
    assert np.isfinite(magnitudes).all()
    assert (np.diff(magnitudes) > 0).all()
    beyond = magnitudes[LARGEST[dtype] :]
    octave = 1 << dtype.mantissa_bits
    if len(beyond) > 2 * octave:
        assert (np.diff(beyond[1 : octave + 1]) == beyond[2] - beyond[1]).all()
    both = widened(words, dtype).view("<u4")
    assert np.array_equal(both[SIGN[dtype] :], both[: SIGN[dtype]] | np.uint32(1 << 31))


def test_first_codes_beyond_the_largest_by_hand(kernels):
    assert widened(np.array([0x7F, 0xFF], "u1"), Dtype.F8_E4M3).tolist() == [480, -480]
    five = widened(np.array([0x7C, 0x7D, 0x7E, 0x7F, 0xFC], "u1"), Dtype.F8_E5M2)
    assert five.tolist() == [65536, 81920, 98304, 114688, -65536]
    half = widened(np.array([0x7C00, 0x7C01, 0x7FFF, 0xFC00], "<u2"), Dtype.F16)
    assert half.tolist() == [65536, 65600, 131008, -65536]


@NARROW
def test_narrowing_undoes_widening(dtype, kernels):
    words = all_words(dtype)
    if dtype is not Dtype.BF16:
        words = words[(words & (SIGN[dtype] - 1)) <= LARGEST[dtype]]
    assert np.array_equal(narrowed(widened(words, dtype).view("<u4"), dtype), words)


@NARROW
def test_narrowing_agrees_with_the_library_on_every_finite_result(dtype, kernels):
    bits = narrow_inputs(dtype)
    bits = bits[np.isfinite(bits.view("<f4"))]
    with np.errstate(over="ignore"):
        numbers = bits.view("<f4").astype(LIBRARY[dtype])
    finite = np.isfinite(numbers.astype(np.float32))
    expected = numbers.view(word_type(dtype))
    found = narrowed(bits, dtype)
    assert np.count_nonzero(finite) > 1 << dtype.bits - 1
    assert np.array_equal(found[finite], expected[finite])


@SATURATING
def test_what_is_too_large_becomes_the_largest(dtype, kernels):
    bits = narrow_inputs(dtype)
    magnitude = bits & np.uint32(0x7FFFFFFF)
    largest = exact_f32(dtype)[LARGEST[dtype]]
    found = narrowed(bits, dtype)[magnitude >= largest].astype(np.uint32)
    signs = bits[magnitude >= largest] >> np.uint32(31)
    assert np.array_equal(found, LARGEST[dtype] | signs * SIGN[dtype])


@SATURATING
def test_infinities_and_nans_become_the_largest_with_their_sign(dtype, kernels):
    specials = [0x7F800000, 0x7F800001, 0x7FC00000, 0x7FFFFFFF]
    assert rounded(dtype, *specials) == [LARGEST[dtype]] * 4
    signed = [bits | 1 << 31 for bits in specials]
    assert rounded(dtype, *signed) == [LARGEST[dtype] | SIGN[dtype]] * 4


def test_infinities_and_nans_round_like_numbers_in_bf16(kernels):
    assert rounded(Dtype.BF16, 0x7F800000, 0xFF800000) == [0x7F80, 0xFF80]
    # A NaN whose payload is low may become an infinity, one whose payload is full a zero.
    assert rounded(Dtype.BF16, 0x7F800001, 0x7F808000, 0x7F808001) == [0x7F80, 0x7F80, 0x7F81]
    assert rounded(Dtype.BF16, 0x7FC00000, 0xFFC12345) == [0x7FC0, 0xFFC1]
    assert rounded(Dtype.BF16, 0x7FFFFFFF, 0xFFFFFFFF) == [0x8000, 0x0000]
    assert rounded(Dtype.BF16, 0x7F7FFFFF, 0xFF7FFFFF) == [0x7F80, 0xFF80]


@NARROW
def test_zeros_and_denormals_keep_their_sign(dtype, kernels):
    denormals = [0x00000000, 0x00000001, 0x00001234]
    assert rounded(dtype, *denormals) == [0, 0, 0]
    assert rounded(dtype, *(bits | 1 << 31 for bits in denormals)) == [SIGN[dtype]] * 3


def test_denormals_of_f32_round_to_those_of_bf16(kernels):
    assert rounded(Dtype.BF16, 0x00008000, 0x00008001, 0x00018000, 0x007FFFFF) == [0, 1, 2, 0x80]


@SATURATING
def test_ties_below_the_smallest_number_go_to_even(dtype, kernels):
    smallest = Fraction(float(widened(np.array([1], word_type(dtype)), dtype)[0]))
    halves = np.array([float(smallest * k / 2) for k in range(8)], "<f4")
    assert narrowed(halves.view("<u4"), dtype).tolist() == [0, 0, 1, 2, 2, 2, 3, 4]
    above = np.nextafter(halves[1::2], np.float32(1))
    below = np.nextafter(halves[1::2], np.float32(0))
    assert narrowed(above.view("<u4"), dtype).tolist() == [1, 2, 3, 4]
    assert narrowed(below.view("<u4"), dtype).tolist() == [0, 1, 2, 3]


def test_f32_is_a_view_both_ways():
    words = np.arange(16, dtype="<u4")
    assert np.shares_memory(widen(words, Dtype.F32), words)
    assert np.shares_memory(narrow(words.view("<f4"), Dtype.F32), words)
    # Without a cast there is nothing to convert, but the words are still in fresh memory.
    found = convert([words], [Dtype.F32], None, Dtype.F32)
    assert np.array_equal(found, words)
    assert not np.shares_memory(found, words)


@NARROW
def test_inputs_are_left_alone(dtype, kernels):
    words, bits = all_words(dtype), narrow_inputs(dtype)
    for array in (words, bits):
        array.flags.writeable = False
    widened(words, dtype)
    narrowed(bits, dtype)
    convert([words, bits[: words.size]], [dtype, Dtype.F32], (0.5, 2.0), dtype)
    assert np.array_equal(words, all_words(dtype))
    assert np.array_equal(bits, narrow_inputs(dtype))


@settings(max_examples=40)
@given(st.lists(st.integers(0, 0xFFFFFFFF), min_size=1, max_size=40))
def test_narrowing_agrees_with_exact_arithmetic(bits):
    for dtype in FLOATS:
        expected = [reference.narrow(word, dtype) for word in bits]
        assert rounded(dtype, *bits) == expected
        with pytest.MonkeyPatch.context() as patch:
            without_kernels(patch)
            assert rounded(dtype, *bits) == expected


@NARROW
def test_widening_agrees_with_exact_arithmetic(dtype, kernels):
    words = all_words(dtype)[:: 1 if dtype.bits == 8 else 37].copy()
    expected = [reference.widen(word, dtype) for word in words.tolist()]
    assert widened(words, dtype).view("<u4").tolist() == expected


BLOCK = 2048
"""Words that the compiled loops convert at a time; what stands in for them takes 2**15."""
COUNTS = (
    *(0, 1, 7, 8, 9, 31, 33, 1001),
    *(BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK - 1, 2 * BLOCK, 2 * BLOCK + 1, 5 * BLOCK + 17),
    *((1 << 15) - 1, 1 << 15, (1 << 15) + 1),
)


def moved(words, skip):
    """The same words, across their natural places in memory."""
    return np.frombuffer(bytes(skip) + words.tobytes(), words.dtype, offset=skip)


def words_of_every_kind(dtype, count, first=0):
    """All words of a dtype over and over, or special ones and many others of f32."""
    words = narrow_inputs(Dtype.F8_E4M3) if dtype is Dtype.F32 else all_words(dtype)
    return np.resize(np.roll(words, -first), count)


@pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: dtype.name)
def test_any_count_and_place_in_memory(dtype, kernels):
    """Vector loops, what remains of them, blocks, and words that lie anywhere."""
    longest = max(COUNTS)
    words = words_of_every_kind(dtype, longest, first=12_345)
    other = words_of_every_kind(Dtype.F32, longest)
    for target in FLOATS:
        cast = convert([words], [dtype], None, target)
        blend = convert([words, other], [dtype, Dtype.F32], (0.3, -0.7), target)
        for index, count in enumerate(COUNTS):
            # Every place with a short and with a long count.
            for skip in range(5) if count in (33, BLOCK + 1) else (0, 1 + index % 4):
                parts = [moved(words[:count], skip), moved(other[:count], (skip + 1) % 4)]
                found = convert(parts[:1], [dtype], None, target)
                assert np.array_equal(found, cast[:count]), (target, count, skip)
                found = convert(parts, [dtype, Dtype.F32], (0.3, -0.7), target)
                assert np.array_equal(found, blend[:count]), (target, count, skip)


# --- the compiled loops against what stands in for them


COEFFICIENTS = ((0.3, -0.7, 1 / 3), (2.0**20, -(2.0**-20), 1.0), (-1.0, 2.0, -(2.0**20)))
compiled = pytest.mark.skipif(
    module._kernels is None, reason="fragfs.codec._kernels is not compiled here"
)


@compiled
@pytest.mark.parametrize("source", FLOATS, ids=lambda dtype: dtype.name)
def test_both_kernels_convert_the_same(source, monkeypatch):
    """Every pair of formats, casts, and sums of one to three inputs of any formats."""
    count = 70_001
    rounds = []
    for target in FLOATS:
        words = [words_of_every_kind(source, count)]
        rounds += [(words, [source], chosen, target) for chosen in (None, (0.3,), (-(2.0**20),))]
        for index, second in enumerate(FLOATS):
            third = FLOATS[(index + 1) % len(FLOATS)]
            formats = [source, second, third]
            inputs = [
                words_of_every_kind(dtype, count, first=7919 * place)
                for place, dtype in enumerate(formats)
            ]
            for size in (2, 3):
                chosen = COEFFICIENTS[(index + size) % len(COEFFICIENTS)][:size]
                rounds.append((inputs[:size], formats[:size], chosen, target))
    found = [convert(*arguments) for arguments in rounds]
    without_kernels(monkeypatch)
    for arguments, words in zip(rounds, found, strict=True):
        assert words.dtype == word_type(arguments[-1])
        assert np.array_equal(convert(*arguments), words), arguments[1:]


@compiled
def test_the_compiled_loops_are_what_converts(monkeypatch):
    asked = []

    class Recording:
        @staticmethod
        def convert(given, scaled, form, out):
            asked.append(([known for known, *_ in given], bool(scaled), form))
            out.fill(0)

    monkeypatch.setattr(module, "_kernels", Recording)
    inputs = {dtype: words_of_every_kind(dtype, 10) for dtype in FLOATS}
    for dtype in FLOATS:
        convert([inputs[Dtype.F32]], [Dtype.F32], None, dtype)
    for dtype in FLOATS:
        convert([inputs[dtype]] * 2, [dtype] * 2, (1.0, 1.0), Dtype.F16)
    casts = [([4], False, form) for form in (4, 0, 1, 2, 3)]
    # They read no floats of 8 bits.
    assert asked == casts + [([form] * 2, True, 1) for form in (4, 0, 1)]


# --- blending


def blended(columns, coefficients):
    exact = [float(np.float32(value)) for value in coefficients]
    words = [np.array(column, "<u4") for column in columns]
    return convert(words, [Dtype.F32] * len(words), exact, Dtype.F32).tolist()


@settings(max_examples=60)
@given(
    columns=st.integers(1, 12).flatmap(
        lambda count: st.lists(
            st.lists(st.integers(0, 0xFFFFFFFF), min_size=count, max_size=count),
            min_size=2,
            max_size=3,
        )
    ),
    coefficients=st.lists(
        st.floats(2.0**-20, 2.0**20, width=32) | st.floats(-(2.0**20), -(2.0**-20), width=32),
        min_size=3,
        max_size=3,
    ),
)
def test_blending_agrees_with_exact_arithmetic(columns, coefficients):
    chosen = coefficients[: len(columns)]
    expected = [reference.blend(row, chosen) for row in zip(*columns, strict=True)]
    assert blended(columns, chosen) == expected
    with pytest.MonkeyPatch.context() as patch:
        without_kernels(patch)
        assert blended(columns, chosen) == expected


def test_products_are_rounded_before_they_are_added(kernels):
    """One operation for both (a fused one) would round once."""
    rng = np.random.default_rng(1)
    columns = [(rng.standard_normal(2000).astype("<f4")).view("<u4").tolist() for _ in range(3)]
    coefficients = [float(np.float32(value)) for value in (1 / 3, -0.7, 0.1)]
    expected = [reference.blend(row, coefficients) for row in zip(*columns, strict=True)]
    assert blended(columns, coefficients) == expected
    fused = sum(
        np.array(column, "<u4").view("<f4").astype(np.float64) * value
        for column, value in zip(columns, coefficients, strict=True)
    )
    assert np.count_nonzero(fused.astype("<f4").view("<u4") != expected) > 50


def test_special_values_of_a_blend(kernels):
    one, tiny, small, largest = 0x3F800000, 0x00000001, 0x20000000, 0x7F7FFFFF
    infinity, nan, minus = 0x7F800000, 0x7FC12345, 0x80000000
    for row in ((infinity, one), (one, nan), (infinity, infinity | minus), (largest, largest)):
        assert blended([[word] for word in row], (1, 1)) == [0]
    assert blended([[tiny, 0x1FFFFFFF, small], [one, one, 0]], (1, 1)) == [one, one, small]
    assert blended([[one, minus], [one, minus]], (1, -1)) == [0, 0]
    assert blended([[0], [0]], (-1, -1)) == [minus]


# --- the compiled module by itself: wrong arguments are errors, never writes


def refused(*arguments, errors=(ValueError, TypeError, BufferError)):
    """A call raises one of these errors, and lets go of all buffers: arrays can grow again."""
    inputs = arguments[0] if isinstance(arguments[0], list) else []
    items = [item for item in inputs if isinstance(item, tuple)]
    arrays = [part for item in (*items, arguments) for part in item if isinstance(part, bytearray)]
    counts = [sys.getrefcount(thing) for thing in (*items, *arrays)]
    try:
        module._kernels.convert(*arguments)
    except errors:
        pass
    else:
        pytest.fail(f"accepted {arguments}")
    assert [sys.getrefcount(thing) for thing in (*items, *arrays)] == counts
    for array in arrays:
        array.append(0)
        array.pop()


def one(form, size, coefficient=1.0):
    return form, bytearray(size), coefficient


@compiled
class TestKernelArguments:
    def test_formats_that_nothing_is_converted_from(self):
        for form in (2, 3, 5, 255, 1 << 31, 0xFFFFFFFF):
            for size in (0, 10, 20, 40):
                refused([one(form, size)], False, 0, bytearray(20))
                refused([one(4, 40), one(form, size)], True, 0, bytearray(20))

    def test_formats_that_nothing_is_converted_to(self):
        for form in (5, 6, 255, 1 << 31, 0xFFFFFFFF):
            for size in (0, 10, 20, 40):
                refused([one(4, 40)], False, form, bytearray(size))

    def test_sizes(self):
        widths = {0: 2, 1: 2, 2: 1, 3: 1, 4: 4}
        for source, target in itertools.product((0, 1, 4), widths):
            wide, narrow_ = 10 * widths[source], 10 * widths[target]
            for size in {0, 1, wide - 1, wide + 1, wide + widths[source], 2 * wide}:
                refused([one(source, size)], False, target, bytearray(narrow_))
                # The first one that does not fit is behind others that do.
                inputs = [one(source, wide), one(4, 40), one(source, size)]
                refused(inputs, True, target, bytearray(narrow_))
            for size in {0, narrow_ - 1, narrow_ + 1, narrow_ + widths[target]}:
                refused([one(source, wide)], False, target, bytearray(size))
            module._kernels.convert([one(source, wide)], False, target, bytearray(narrow_))
            module._kernels.convert([one(source, 0)], True, target, bytearray())

    def test_numbers_of_inputs(self):
        for count in (0, 4, 5, 1000):
            refused([one(4, 40)] * count, True, 0, bytearray(20))
        for count in (1, 2, 3):
            for kind in (list, tuple):
                inputs = kind([one(4, 40)] * count)
                module._kernels.convert(inputs, True, 0, bytearray(20))

    def test_kinds(self):
        strided = np.zeros((20, 2), np.uint8)[:, 0]
        for wrong in (None, "text", 7, strided, bytes(20)):
            refused([one(4, 40)], False, 0, wrong)
        for wrong in (None, "text", 7, np.zeros((40, 2), np.uint8)[:, 0]):
            refused([(4, wrong, 1.0)], False, 0, bytearray(20))
            refused([one(4, 40), (4, wrong, 1.0)], True, 0, bytearray(20))
        frozen = np.zeros(20, np.uint8)
        frozen.flags.writeable = False
        refused([one(4, 40)], False, 0, frozen)
        for wrong in (None, "1", b"", [1.0]):
            refused([(4, bytearray(40), wrong)], True, 0, bytearray(20))
            refused([(wrong, bytearray(40), 1.0)], True, 0, bytearray(20))
            refused([one(4, 40)], True, wrong, bytearray(20))
        for wrong in (None, 7, 1.5, {}, {0: one(4, 40)}, iter([one(4, 40)]), "", b"\0" * 4):
            refused(wrong, True, 0, bytearray(20))
        for wrong in ((), (4,), (4, bytearray(40)), (4, bytearray(40), 1.0, 1.0)):
            refused([wrong], True, 0, bytearray(20))
            refused([one(4, 40), wrong], True, 0, bytearray(20))
        for count in range(4):
            refused(*([one(4, 40)], True, 0)[:count] or ([],))
        refused([one(4, 40)], True, 0, bytearray(20), 1)

    def test_inputs_that_are_no_tuples(self):
        for wrong in (None, 7, "text", list(one(4, 40))):
            for inputs in ([wrong], [one(4, 40), wrong]):
                refused(inputs, True, 0, bytearray(20), errors=TypeError)

    def test_sequences_that_are_not_what_they_say(self):
        class Wrong:
            def __init__(self, length, error):
                self.length = length
                self.error = error
                self.items = [one(4, 40)]

            def __len__(self):
                return self.length

            def __getitem__(self, index):
                if index:
                    raise self.error
                return self.items[index]

        for error in (IndexError(), KeyError(), ValueError(), StopIteration()):
            wrong, out = Wrong(3, error), bytearray(20)
            refused(wrong, True, 0, out, errors=(type(error),))
            out.append(0)
            wrong.items[0][1].append(0)
        for length in (-1, 0, 4, 1 << 62, 1 << 70):
            refused(Wrong(length, IndexError()), True, 0, bytearray(20), errors=(ValueError,))

    def test_memory_that_is_given_back_meanwhile(self):
        class Meddling(list):
            def __getitem__(self, index):
                with pytest.raises(BufferError):
                    out.clear()
                if index:
                    with pytest.raises(BufferError):
                        super().__getitem__(0)[1].clear()
                    return (4, bytearray(40), 1.0)
                return super().__getitem__(index)

        out = bytearray(20)
        module._kernels.convert(Meddling([one(4, 40)] * 2), True, 0, out)
        out.append(0)

    def test_nothing_is_kept(self):
        out, inputs = bytearray(20), [one(4, 40), one(0, 20)]
        things = (out, inputs, *inputs, inputs[0][1], inputs[1][1])
        before = [sys.getrefcount(thing) for thing in things]
        for _ in range(1000):
            module._kernels.convert(inputs, True, 0, out)
        assert [sys.getrefcount(thing) for thing in things] == before
        for array in (out, inputs[0][1], inputs[1][1]):
            array.append(0)

    def test_nothing_is_written_outside(self):
        for form, width in ((0, 2), (1, 2), (2, 1), (3, 1), (4, 4)):
            for count in (0, 1, 25, BLOCK, BLOCK + 25):
                bits = words_of_every_kind(Dtype.F32, count)
                expected = convert([bits], [Dtype.F32], None, FORMATS[form]).tobytes()
                for skip in range(5):
                    around = np.full(count * width + 200, 0xAB, np.uint8)
                    place = slice(100 + skip, 100 + skip + count * width)
                    module._kernels.convert([(4, bits, 1.0)], False, form, around[place])
                    assert around[place].tobytes() == expected
                    assert (around[: 100 + skip] == 0xAB).all()
                    assert (around[100 + skip + count * width :] == 0xAB).all()

    def test_any_coefficient_gives_finite_sums(self):
        ones = np.full(3, 0x3F800000, "<u4")
        for coefficient in (np.nan, np.inf, -np.inf):
            out = bytearray(b"\xab" * 12)
            module._kernels.convert([(4, ones, coefficient)] * 2, True, 4, out)
            assert out == bytes(12)


# --- quantizing


def quantized(bits, scales):
    return quantize(np.array(bits, "<u4").view("<f4"), np.array(scales, "<f4")).tolist()


def test_quantizing_rounds_ties_to_even_and_clips():
    values = np.array([0.5, 1.5, 2.5, -0.5, -1.5, 126.5, 127.5, 128, -128, -128.5, -200], "<f4")
    found = quantize(values, np.ones(11, "<f4")).view(np.int8).tolist()
    assert found == [0, 2, 2, 0, -2, 126, 127, 127, -128, -128, -128]


def test_quantizing_special_values():
    specials = [0x7FC00000, 0xFFC00001, 0x7F800000, 0xFF800000, 0x00000001, 0x80000000]
    assert quantized(specials, [2.0**-60] * 6) == [0, 0, 127, 128, 0, 0]


def test_a_denormal_divided_by_the_smallest_scale_is_zero():
    assert quantized([0x007FFFFF, 0x807FFFFF, 0x00800000], [2.0**-60] * 3) == [0, 0, 0]


def test_quantizing_agrees_with_exact_arithmetic():
    bits, scales = (table[::31] for table in quantize_inputs())
    expected = [
        reference.quantize(word, scale)
        for word, scale in zip(bits.tolist(), scales.tolist(), strict=True)
    ]
    assert quantize(bits.view("<f4"), scales.view("<f4")).tolist() == expected


def test_special_inputs_are_what_they_say():
    kinds = SPECIAL_F32.view("<f4")
    assert np.isnan(kinds).sum() == 8
    assert np.isinf(kinds).sum() == 1
    tiny = np.float32(2.0**-126)
    assert ((kinds > 0) & (kinds < tiny)).sum() == 5
