"""Conversions: golden digests of whole tables, and independent oracles for what is in them."""

from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fragfs.codec import floats as module
from fragfs.codec.floats import FLOATS, blend, narrow, quantize, widen, word_type
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
SIGN = {dtype: 1 << dtype.bits - 1 for dtype in LIBRARY}
NARROW = pytest.mark.parametrize("dtype", LIBRARY, ids=lambda dtype: dtype.name)
SATURATING = pytest.mark.parametrize("dtype", SMALL, ids=lambda dtype: dtype.name)


def floats(*bits):
    return np.array(bits, "<u4").view("<f4")


def narrowed(dtype, *bits):
    return narrow(floats(*bits), dtype).tolist()


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
    assert np.array_equal(widen(words, dtype).view("<u4"), expected.view("<u4"))


@NARROW
def test_the_inputs_of_the_tables_are_the_exact_numbers(dtype):
    words = all_words(dtype)[: SIGN[dtype]]
    assert np.array_equal(exact_f32(dtype), widen(words, dtype).view("<u4"))


def test_bf16_is_the_upper_half_of_f32_whatever_it_holds(kernels):
    words = all_words(Dtype.BF16)
    wide = widen(words, Dtype.BF16).view("<u4")
    assert np.array_equal(wide, words.astype(np.uint32) << np.uint32(16))


@SATURATING
def test_infinities_and_nans_widen_to_what_would_follow_the_largest(dtype, kernels):
    words = all_words(dtype)
    magnitudes = widen(words[: SIGN[dtype]], dtype).astype(np.float64)
    assert np.isfinite(magnitudes).all()
    assert (np.diff(magnitudes) > 0).all()
    beyond = magnitudes[LARGEST[dtype] :]
    octave = 1 << dtype.mantissa_bits
    if len(beyond) > 2 * octave:
        assert (np.diff(beyond[1 : octave + 1]) == beyond[2] - beyond[1]).all()
    both = widen(words, dtype).view("<u4")
    assert np.array_equal(both[SIGN[dtype] :], both[: SIGN[dtype]] | np.uint32(1 << 31))


def test_first_codes_beyond_the_largest_by_hand(kernels):
    assert widen(np.array([0x7F, 0xFF], "u1"), Dtype.F8_E4M3).tolist() == [480, -480]
    five = widen(np.array([0x7C, 0x7D, 0x7E, 0x7F, 0xFC], "u1"), Dtype.F8_E5M2)
    assert five.tolist() == [65536, 81920, 98304, 114688, -65536]
    half = widen(np.array([0x7C00, 0x7C01, 0x7FFF, 0xFC00], "<u2"), Dtype.F16)
    assert half.tolist() == [65536, 65600, 131008, -65536]


@NARROW
def test_narrowing_undoes_widening(dtype, kernels):
    words = all_words(dtype)
    if dtype is not Dtype.BF16:
        words = words[(words & (SIGN[dtype] - 1)) <= LARGEST[dtype]]
    assert np.array_equal(narrow(widen(words, dtype), dtype), words)


@NARROW
def test_narrowing_agrees_with_the_library_on_every_finite_result(dtype, kernels):
    bits = narrow_inputs(dtype)
    bits = bits[np.isfinite(bits.view("<f4"))]
    with np.errstate(over="ignore"):
        numbers = bits.view("<f4").astype(LIBRARY[dtype])
    finite = np.isfinite(numbers.astype(np.float32))
    expected = numbers.view(word_type(dtype))
    found = narrow(bits.view("<f4"), dtype)
    assert np.count_nonzero(finite) > 1 << dtype.bits - 1
    assert np.array_equal(found[finite], expected[finite])


@SATURATING
def test_what_is_too_large_becomes_the_largest(dtype, kernels):
    bits = narrow_inputs(dtype)
    magnitude = bits & np.uint32(0x7FFFFFFF)
    largest = exact_f32(dtype)[LARGEST[dtype]]
    found = narrow(bits.view("<f4"), dtype)[magnitude >= largest].astype(np.uint32)
    signs = bits[magnitude >= largest] >> np.uint32(31)
    assert np.array_equal(found, LARGEST[dtype] | signs * SIGN[dtype])


@SATURATING
def test_infinities_and_nans_become_the_largest_with_their_sign(dtype, kernels):
    specials = [0x7F800000, 0x7F800001, 0x7FC00000, 0x7FFFFFFF]
    assert narrowed(dtype, *specials) == [LARGEST[dtype]] * 4
    signed = [bits | 1 << 31 for bits in specials]
    assert narrowed(dtype, *signed) == [LARGEST[dtype] | SIGN[dtype]] * 4


def test_infinities_and_nans_round_like_numbers_in_bf16(kernels):
    assert narrowed(Dtype.BF16, 0x7F800000, 0xFF800000) == [0x7F80, 0xFF80]
    # A NaN whose payload is low may become an infinity, one whose payload is full a zero.
    assert narrowed(Dtype.BF16, 0x7F800001, 0x7F808000, 0x7F808001) == [0x7F80, 0x7F80, 0x7F81]
    assert narrowed(Dtype.BF16, 0x7FC00000, 0xFFC12345) == [0x7FC0, 0xFFC1]
    assert narrowed(Dtype.BF16, 0x7FFFFFFF, 0xFFFFFFFF) == [0x8000, 0x0000]
    assert narrowed(Dtype.BF16, 0x7F7FFFFF, 0xFF7FFFFF) == [0x7F80, 0xFF80]


@NARROW
def test_zeros_and_denormals_keep_their_sign(dtype, kernels):
    denormals = [0x00000000, 0x00000001, 0x00001234]
    assert narrowed(dtype, *denormals) == [0, 0, 0]
    assert narrowed(dtype, *(bits | 1 << 31 for bits in denormals)) == [SIGN[dtype]] * 3


def test_denormals_of_f32_round_to_those_of_bf16(kernels):
    assert narrowed(Dtype.BF16, 0x00008000, 0x00008001, 0x00018000, 0x007FFFFF) == [0, 1, 2, 0x80]


@SATURATING
def test_ties_below_the_smallest_number_go_to_even(dtype, kernels):
    smallest = Fraction(float(widen(np.array([1], word_type(dtype)), dtype)[0]))
    halves = np.array([float(smallest * k / 2) for k in range(8)], "<f4")
    assert narrow(halves, dtype).tolist() == [0, 0, 1, 2, 2, 2, 3, 4]
    above = np.nextafter(halves[1::2], np.float32(1))
    below = np.nextafter(halves[1::2], np.float32(0))
    assert narrow(above, dtype).tolist() == [1, 2, 3, 4]
    assert narrow(below, dtype).tolist() == [0, 1, 2, 3]


def test_f32_is_a_view_both_ways():
    words = np.arange(16, dtype="<u4")
    assert np.shares_memory(widen(words, Dtype.F32), words)
    assert np.shares_memory(narrow(words.view("<f4"), Dtype.F32), words)


@NARROW
def test_inputs_are_left_alone(dtype, kernels):
    words = all_words(dtype)
    words.flags.writeable = False
    wide = widen(words, dtype)
    before = wide.tobytes()
    wide.flags.writeable = False
    narrow(wide, dtype)
    assert wide.tobytes() == before
    assert np.array_equal(words, all_words(dtype))


@settings(max_examples=40)
@given(st.lists(st.integers(0, 0xFFFFFFFF), min_size=1, max_size=40))
def test_narrowing_agrees_with_exact_arithmetic(bits):
    for dtype in FLOATS:
        expected = [reference.narrow(word, dtype) for word in bits]
        assert narrowed(dtype, *bits) == expected
        with pytest.MonkeyPatch.context() as patch:
            without_kernels(patch)
            assert narrowed(dtype, *bits) == expected


@NARROW
def test_widening_agrees_with_exact_arithmetic(dtype, kernels):
    words = all_words(dtype)[:: 1 if dtype.bits == 8 else 37].copy()
    expected = [reference.widen(word, dtype) for word in words.tolist()]
    assert widen(words, dtype).view("<u4").tolist() == expected


@NARROW
@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 31, 33, 1001])
def test_any_count_and_place_in_memory(dtype, count, kernels):
    """Vector loops, what remains of them, and words that lie across their natural places."""
    bits = narrow_inputs(dtype)[-count:] if count else narrow_inputs(dtype)[:0]
    words = all_words(dtype)[-count:] if count else all_words(dtype)[:0]
    for skip in range(5):
        moved = np.frombuffer(bytes(skip) + bits.tobytes(), "<f4", offset=skip)
        assert np.array_equal(narrow(moved, dtype), narrow(bits.view("<f4"), dtype))
        moved = np.frombuffer(bytes(skip) + words.tobytes(), words.dtype, offset=skip)
        wide = widen(words, dtype)
        assert np.array_equal(widen(moved, dtype).view("<u4"), wide.view("<u4"))


# --- blending


def blended(columns, coefficients):
    exact = [float(np.float32(value)) for value in coefficients]
    return blend([floats(*column) for column in columns], exact).view("<u4").tolist()


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
    columns = [(rng.standard_normal(4000).astype("<f4")).view("<u4").tolist() for _ in range(3)]
    coefficients = [float(np.float32(value)) for value in (1 / 3, -0.7, 0.1)]
    expected = [reference.blend(row, coefficients) for row in zip(*columns, strict=True)]
    assert blended(columns, coefficients) == expected
    fused = sum(
        np.array(column, "<u4").view("<f4").astype(np.float64) * value
        for column, value in zip(columns, coefficients, strict=True)
    )
    assert np.count_nonzero(fused.astype("<f4").view("<u4") != expected) > 100


def test_special_values_of_a_blend(kernels):
    one, tiny, small, largest = 0x3F800000, 0x00000001, 0x20000000, 0x7F7FFFFF
    infinity, nan, minus = 0x7F800000, 0x7FC12345, 0x80000000
    for row in ((infinity, one), (one, nan), (infinity, infinity | minus), (largest, largest)):
        assert blended([[word] for word in row], (1, 1)) == [0]
    assert blended([[tiny, 0x1FFFFFFF, small], [one, one, 0]], (1, 1)) == [one, one, small]
    assert blended([[one, minus], [one, minus]], (1, -1)) == [0, 0]
    assert blended([[0], [0]], (-1, -1)) == [minus]


def test_blends_of_words_that_lie_anywhere(kernels):
    raw = np.random.default_rng(2).standard_normal(999).astype("<f4").tobytes()
    pairs = [np.frombuffer(raw, "<f4"), np.frombuffer(raw[::-1], "<f4")]
    expected = blend(pairs, (0.5, 2.0))
    for skip in (1, 2, 3):
        moved = [np.frombuffer(bytes(skip) + x.tobytes(), "<f4", offset=skip) for x in pairs]
        assert np.array_equal(blend(moved, (0.5, 2.0)).view("<u4"), expected.view("<u4"))


# --- the compiled module by itself: wrong arguments are errors, never writes


@pytest.mark.skipif(module._kernels is None, reason="fragfs.codec._kernels is not compiled here")
class TestKernelArguments:
    @pytest.mark.parametrize("form", [2, 3, 4, 1 << 31, 0xFFFFFFFF])
    def test_forms_that_nothing_is_widened_from(self, form):
        for count in (10, 20):
            with pytest.raises(ValueError, match="fit each other"):
                module._kernels.widen(form, bytes(count), np.zeros(10, "<f4"))

    @pytest.mark.parametrize("form", [4, 5, 1 << 31, 0xFFFFFFFF])
    def test_forms_that_nothing_is_narrowed_to(self, form):
        for count in (10, 20):
            with pytest.raises(ValueError, match="fit each other"):
                module._kernels.narrow(form, np.zeros(10, "<f4"), bytearray(count))

    @pytest.mark.parametrize("form", range(4))
    def test_sizes(self, form):
        width = 2 if form < 2 else 1
        for floats_size, words_size in (
            *((40, 10 * width - 1), (40, 10 * width + 1), (40, 11 * width), (39, 10 * width)),
            *((0, 10 * width), (40, 0), (10 * width, 40)),
        ):
            with pytest.raises(ValueError, match="fit each other"):
                module._kernels.narrow(form, bytes(floats_size), bytearray(words_size))
            if form < 2:
                with pytest.raises(ValueError, match="fit each other"):
                    module._kernels.widen(form, bytes(words_size), bytearray(floats_size))
        module._kernels.narrow(form, b"", bytearray())

    @pytest.mark.parametrize("sizes", [(40, 36), (36, 40), (0, 4), (3, 3), (39, 39)])
    def test_sizes_of_scaling(self, sizes):
        with pytest.raises(ValueError, match="fit each other"):
            module._kernels.scale(bytes(sizes[0]), 1.0, True, bytearray(sizes[1]))

    def test_kinds(self):
        for wrong in (None, "text", 7, np.zeros((20, 2), np.uint8)[:, 0], bytes(40)):
            with pytest.raises((TypeError, ValueError, BufferError)):
                module._kernels.widen(0, bytes(20), wrong)
            with pytest.raises((TypeError, ValueError, BufferError)):
                module._kernels.scale(bytes(40), 1.0, True, wrong)
        with pytest.raises(TypeError):
            module._kernels.scale(bytes(40), None, True, bytearray(40))

    def test_nothing_is_written_outside(self):
        for form, width in ((0, 2), (1, 2), (2, 1), (3, 1)):
            around = np.full(300, 0xAB, np.uint8)
            bits = np.full(100 // width, 0x3F800000, "<u4")
            module._kernels.narrow(form, bits, around[100:200])
            assert (around[:100] == 0xAB).all()
            assert (around[200:] == 0xAB).all()


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
