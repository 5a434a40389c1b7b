"""Steps of weights that only decay: added alike by both loops, found where there are any."""

import numpy as np
import pytest

from fragfs.codec.steps import STEP_COUNT, add_steps, fit_steps, pack_steps, parse_steps
from fragfs.types import Dtype
from tests.codec.families import REAL_STEPS, as_dtype, numbers, with_specials, words_of

STEPS = np.array(REAL_STEPS, "<i4").view("<u4")


def words(count=40_000, seed=0):
    return words_of(as_dtype(numbers(count, seed), Dtype.F32), Dtype.F32)


def trained(values, share, seed=3):
    """Some of them moved by what is different for each."""
    rng = np.random.default_rng(seed)
    moves = rng.integers(-(1 << 18), 1 << 18, values.size) * (rng.random(values.size) < share)
    return values + moves.astype("<i4").view("<u4")


def decayed_by(values, factor, updates):
    """As an optimizer does it."""
    floats = values.view("<f4").copy()
    with np.errstate(invalid="ignore"):  # signalling NaNs
        for _ in range(updates):
            floats *= np.float32(factor)
    return floats.view("<u4")


@pytest.mark.parametrize("count", [0, 1, 7, (1 << 15) - 1, (1 << 15) + 1, 3 * (1 << 15) + 77])
def test_steps_are_told_by_eight_bits_and_wrap_around(count, kernels):
    rng = np.random.default_rng(count)
    base = rng.integers(0, 1 << 32, count, dtype=np.uint32)
    steps = rng.integers(0, 1 << 32, STEP_COUNT, dtype=np.uint32)
    before = base.copy()
    found = add_steps(base, steps)
    expected = [(word + int(steps[word // 2**15 % 256])) % 2**32 for word in base[:1000].tolist()]
    assert found[:1000].tolist() == expected
    whole = base.astype(np.uint64) + steps[base >> np.uint32(15) & np.uint32(255)]
    assert np.array_equal(found, whole.astype(np.uint32))
    assert np.array_equal(base, before)


def test_whatever_is_packed_comes_back():
    rng = np.random.default_rng(1)
    for steps in (STEPS, rng.integers(0, 1 << 32, STEP_COUNT, dtype=np.uint32), 0 * STEPS):
        assert np.array_equal(parse_steps(pack_steps(steps)), steps)


def test_steps_of_neighbours_differ_in_one_byte():
    assert np.array_equal(pack_steps(STEPS)[1:] >> np.uint32(8), np.full(255, 0x808080))


class TestFitting:
    def test_every_step_is_found(self):
        base = words()
        found = fit_steps(add_steps(base, STEPS), base)
        assert np.array_equal(found, STEPS)

    def test_of_rows_of_which_most_are_trained(self):
        base = words(1 << 15)
        target = trained(add_steps(base, STEPS), 0.7)
        assert np.mean(fit_steps(target, base) == STEPS) > 0.9

    @pytest.mark.parametrize("factor", [1 - 5e-7, 1 - 1e-6, 1 - 2e-6])
    def test_of_a_decay(self, factor):
        base = with_specials(words().tobytes(), Dtype.F32)
        base = np.frombuffer(base, "<u4")
        target = decayed_by(base, factor, 100)
        assert np.mean(add_steps(base, fit_steps(target, base)) == target) > 0.8

    def test_ranges_without_words_have_the_step_below(self):
        base = words()
        some = base[(base >> np.uint32(15) & np.uint32(255)) % 48 >= 24]
        found = fit_steps(add_steps(some, STEPS), some)
        known = np.arange(STEP_COUNT) % 48 >= 24
        assert np.array_equal(found[known], STEPS[known])
        assert np.all(found[:24] == STEPS[24])
        assert np.all(found[48:72] == STEPS[47])

    def test_there_are_none_between_weights_that_were_trained(self):
        base = words()
        assert fit_steps(trained(base, 1), base) is None
        assert fit_steps(words(seed=5), base) is None

    def test_there_are_none_where_most_is_equal(self):
        base = words()
        assert fit_steps(base.copy(), base) is None
        assert fit_steps(trained(base, 0.05), base) is None

    def test_moves_too_far_to_be_alike_are_none(self):
        base = words()
        assert fit_steps(base + np.uint32(1 << 16), base) is None

    @pytest.mark.parametrize("count", [1, 2, 5, 300])
    def test_of_few_words(self, count):
        base = words(count)
        found = fit_steps(base - np.uint32(300), base)
        if count == 300:
            assert np.all(found == np.uint32(-300 % (1 << 32)))
        else:
            assert found is None
