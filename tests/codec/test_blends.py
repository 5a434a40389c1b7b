"""Fits of blends: coefficients, which sets of bases fit best, and what fits nothing."""

import numpy as np
import pytest

from fragfs.codec.blends import BlendFits, fit_blend
from fragfs.codec.predict import BLEND_BASES_MAX
from fragfs.types import Dtype, Predictor
from tests.codec.families import as_dtype, numbers, words_of


def fits_of(target, *columns):
    words = [np.asarray(column, "<f4").view("<u4") for column in (target, *columns)]
    return BlendFits(words[0], Dtype.F32, [(column, Dtype.F32) for column in words[1:]])


def blend_of(target, *columns):
    words = [np.asarray(column, "<f4").view("<u4") for column in (target, *columns)]
    return fit_blend(words[0], Dtype.F32, [(column, Dtype.F32) for column in words[1:]])


@pytest.mark.parametrize("wanted", [(0.5, 0.5), (2, -1), (0.3, 0.7), (-0.25, 1.5)])
def test_coefficients_are_found(wanted):
    a, b = numbers(seed=1), numbers(seed=2)
    found = blend_of(wanted[0] * a + wanted[1] * b, a, b)
    assert found.predictor is Predictor.BLEND
    assert found.dtypes == (Dtype.F32, Dtype.F32)
    assert found.coefficients == tuple(float(np.float32(value)) for value in wanted)


def test_three_bases():
    a, b, c = (numbers(seed=s) for s in range(3))
    found = blend_of(0.2 * a + 0.3 * b + 0.5 * c, a, b, c)
    assert found.coefficients == tuple(float(np.float32(v)) for v in (0.2, 0.3, 0.5))
    assert len(found.coefficients) == BLEND_BASES_MAX


def test_bases_of_several_dtypes():
    a, b = numbers(seed=1), numbers(seed=2)
    kinds = [Dtype.BF16, Dtype.F16]
    words = [words_of(as_dtype(x, k), k) for x, k in zip((a, b), kinds, strict=True)]
    target = words_of(as_dtype(0.25 * a + 0.75 * b, Dtype.F32), Dtype.F32)
    blend = fit_blend(target, Dtype.F32, list(zip(words, kinds, strict=True)))
    assert blend.dtypes == (Dtype.BF16, Dtype.F16)
    assert blend.coefficients == pytest.approx((0.25, 0.75), abs=1e-3)


def test_the_best_set_comes_first():
    columns = [numbers(seed=s) for s in range(5)]
    target = 0.5 * columns[1] + 0.5 * columns[3] + 1e-4 * columns[0]
    fits = fits_of(target, *columns)
    sets = [(0, 1), (0, 3), (1, 2), (1, 3), (2, 3), (3, 4)]
    found = fits.fit(sets)
    assert sorted(fit.bases for fit in found) == sets
    assert found[0].bases == (1, 3)
    rest = [fit.left_over for fit in found]
    assert rest == sorted(rest)
    # As if each set had been fitted by itself.
    for fit in found:
        chosen = np.stack([columns[index] for index in fit.bases], 1)
        left = np.linalg.lstsq(chosen, target, rcond=None)[1][0]
        assert fit.left_over == pytest.approx(left, rel=1e-3)


def test_what_one_base_leaves_over():
    a, b = numbers(4000, seed=1), numbers(4000, seed=2)
    fits = fits_of(a, a, a + b / 8, b)
    found = [fits.left_over(index) for index in range(3)]
    expected = [0, np.sum((b / 8) ** 2), np.sum((a - b) ** 2)]
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-9)


def test_special_values_are_left_out():
    a, b = numbers(seed=1), numbers(seed=2)
    target = 0.5 * a + 0.5 * b
    a[::7], b[::11], target[::13] = np.nan, np.inf, -np.inf
    assert blend_of(target, a, b).coefficients == (0.5, 0.5)


@pytest.mark.parametrize("bits", [0x7F800001, 0x7FA12345, 0xFF812345])
def test_signaling_nans_raise_no_warning(bits):
    a, b = (numbers(seed=s).astype("<f4") for s in (1, 2))
    words = [x.view("<u4").copy() for x in (a * np.float32(0.5) + b * np.float32(0.5), a, b)]
    for column in words:
        column[4] = bits
    columns = [column.view("<f4") for column in words]
    assert blend_of(*columns).coefficients == (0.5, 0.5)


def test_equal_bases_fit_no_better_than_one():
    a, b = numbers(seed=1), numbers(seed=2)
    fits = fits_of(a + b / 4, a, a)
    (fit,) = fits.fit([(0, 1)])
    assert np.isfinite(fit.coefficients).all()
    assert sum(fit.coefficients) == pytest.approx(1, abs=0.1)
    assert fit.left_over == pytest.approx(fits.left_over(0), rel=0.01)


def test_a_base_that_does_not_matter_makes_no_blend():
    a, b = numbers(seed=1), numbers(seed=2)
    assert blend_of(a, a, b) is None


def test_bases_of_zeros_make_no_blend():
    zeros = np.zeros(12_000)
    assert blend_of(numbers(), zeros, zeros) is None
    assert blend_of(zeros, zeros, zeros) is None


def test_too_few_words_fit_nothing():
    a, b = numbers(20, seed=1), numbers(20, seed=2)
    assert blend_of(a + b, a, b) is None
    assert blend_of(np.full(12_000, np.nan), numbers(seed=1), numbers(seed=2)) is None
    assert fits_of(a, a, b).fit([]) == []


def test_fewer_words_say_nearly_the_same():
    a, b = (numbers(seed=s).astype("<f4").view("<u4") for s in (1, 2))
    bases = [(a, Dtype.F32), (b, Dtype.F32)]
    whole, part = (BlendFits(a, Dtype.F32, bases, step).left_over(1) for step in (1, 4))
    assert part == pytest.approx(whole / 4, rel=0.1)
