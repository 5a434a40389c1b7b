"""The best of all encodings: what is chosen for which family, and that it is never wrong."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fragfs.codec.choose import Choice, encode_best, encode_from, estimate_blends
from fragfs.codec.encoding import decode
from fragfs.codec.solo import encode_solo
from fragfs.codec.trials import Candidate, Rows
from fragfs.types import Dtype, Level, Predictor
from tests.codec.families import (
    EVERY_KIND,
    FLOATS,
    NUMPY,
    as_dtype,
    decayed,
    nudged,
    numbers,
    one_bit,
    quantized,
    rows_shuffled,
    unit_of,
    with_specials,
)

EVERY_LEVEL = pytest.mark.parametrize("level", Level, ids=lambda level: level.name)
COUNT = 50_000


def names(value):
    return getattr(value, "name", value)


EVERY_KIND_OF_WORD = pytest.mark.parametrize("dtype", EVERY_KIND, ids=names)


def choose(raw, dtype, *bases, level=Level.BALANCED, **options) -> Choice:
    """Encode, decode from the chosen candidates alone, compare."""
    candidates = [Candidate(memoryview(base), base_dtype) for base_dtype, base in bases]
    choice = encode_best(raw, dtype, candidates, level=level, zstd_level=3, **options)
    encoding = choice.encoding
    assert len(set(choice.bases)) == len(choice.bases)
    back = decode(
        encoding.predictor,
        dtype,
        encoding.params,
        memoryview(encoding.payload),
        len(raw),
        [candidates[index].raw for index in choice.bases],
    )
    assert back == raw
    # The format's promise, which bounds records.
    assert encoding.size <= len(raw)
    return choice


@EVERY_KIND_OF_WORD
def test_a_fine_tune_is_a_delta(dtype):
    base = with_specials(as_dtype(numbers(), dtype), dtype)
    raw = nudged(base, dtype, share=0.1, step=1)
    for level in Level:
        choice = choose(raw, dtype, (dtype, base), level=level)
        assert choice.encoding.predictor is Predictor.DELTA, level
        assert choice.encoding.size <= 0.5 * encode_solo(raw, dtype, zstd_level=3).size, level


def test_level_small_groups_more_finely():
    weights = numbers(1 << 19)
    base = as_dtype(weights, Dtype.BF16)
    raw = as_dtype(weights + 0.01 * numbers(1 << 19, seed=1), Dtype.BF16)
    encodings = [
        choose(raw, Dtype.BF16, (Dtype.BF16, base), level=level).encoding
        for level in (Level.BALANCED, Level.SMALL)
    ]
    balanced, small = (encoding.params[4] for encoding in encodings)  # behind `covered`
    assert 1 < balanced < small


@EVERY_KIND_OF_WORD
def test_one_changed_bit_is_listed(dtype):
    base = as_dtype(numbers(), dtype)
    for level in Level:
        choice = choose(one_bit(base, dtype), dtype, (dtype, base), level=level)
        assert choice.encoding.predictor is Predictor.SPARSE, level
        assert choice.encoding.size < 100, level


@EVERY_KIND_OF_WORD
def test_strangers_are_not_used(dtype):
    raw = as_dtype(numbers(seed=1), dtype)
    strangers = [np.random.default_rng(1).bytes(len(raw))]
    if dtype.exponent_bits:
        # Small integers gain even by a stranger: a residual knows no sign extension.
        strangers.append(rows_shuffled(raw, dtype))
    for level in Level:
        for base in strangers:
            choice = choose(raw, dtype, (dtype, base), level=level)
            assert choice.bases == (), level
            assert choice.encoding == encode_solo(raw, dtype, zstd_level=3), level


@EVERY_LEVEL
@pytest.mark.parametrize("source", FLOATS, ids=names)
def test_a_copy_in_another_float_is_a_cast(source, level):
    base = as_dtype(numbers(), source)
    exact = np.frombuffer(base, NUMPY[source]).astype(np.float64)
    for target in FLOATS:
        if source is target:
            continue
        raw = as_dtype(exact, target)
        choice = choose(raw, target, (source, base), level=level)
        assert choice.encoding.predictor is Predictor.CAST, target
        assert choice.encoding.size <= 0.003 * len(raw), target


@pytest.mark.parametrize("row", [0, 100])
def test_an_int8_copy_is_quantized(row):
    case = quantized("", numbers(), Dtype.F32, row, row)
    choice = choose(case.raw, Dtype.I8, (Dtype.F32, case.bases[0]), rows=Rows(row, row))
    assert choice.encoding.predictor is Predictor.QUANTIZE
    assert choice.encoding.size <= 0.06 * len(case.raw)


def test_an_int8_copy_with_cut_rows_and_a_tail():
    case = quantized("", numbers(), Dtype.BF16, 256, 17, b"\1\2\3")
    choice = choose(case.raw, Dtype.I8, (Dtype.BF16, case.bases[0]), rows=Rows(256, 17))
    assert choice.encoding.predictor is Predictor.QUANTIZE


def test_an_int8_copy_whose_rows_are_not_known():
    case = quantized("", numbers(), Dtype.F32, 100, 100)
    choose(case.raw, Dtype.I8, (Dtype.F32, case.bases[0]))


def test_rows_that_only_decay_are_stepped():
    base = with_specials(as_dtype(numbers(COUNT), Dtype.F32), Dtype.F32)
    exact = decayed("", None, base).raw
    raw = exact[:-40_000] + nudged(exact[-40_000:], Dtype.F32, share=1, step=1 << 16)
    for level in Level:
        choice = choose(raw + b"tail", Dtype.F32, (Dtype.F32, base), level=level)
        assert choice.encoding.predictor is Predictor.DECAY, level
        assert choice.encoding.size <= 0.75 * 40_000, level
        alone = [Candidate(memoryview(base), Dtype.F32)]
        encoding = encode_from(raw + b"tail", Dtype.F32, alone, level=level, zstd_level=3)
        assert encoding == choice.encoding, level


def test_steps_that_do_not_pay_are_left_out():
    base = as_dtype(numbers(COUNT), Dtype.F32)
    # All that is as predicted is as the base is, too.
    raw = nudged(base, Dtype.F32, share=0.1, step=1)
    assert choose(raw, Dtype.F32, (Dtype.F32, base)).encoding.predictor is Predictor.DELTA
    # A table is more than there is to save.
    exact = decayed("", None, base[:60]).raw
    assert choose(exact, Dtype.F32, (Dtype.F32, base[:60])).encoding.predictor is not (
        Predictor.DECAY
    )


def test_only_words_of_f32_are_stepped():
    base = as_dtype(numbers(COUNT), Dtype.F32)
    exact = decayed("", None, base).raw
    for dtype in (Dtype.U32, Dtype.I32, Dtype.BF16, Dtype.C64):
        choice = choose(exact, dtype, (dtype, base))
        assert choice.encoding.predictor is not Predictor.DECAY, dtype


@pytest.mark.parametrize("wanted", [(0.5, 0.5), (0.3, 0.7), (2, -1), (-0.5, 1.5)])
@pytest.mark.parametrize("dtype", [Dtype.F32, Dtype.BF16, Dtype.F16], ids=names)
def test_a_merge_is_a_blend(dtype, wanted):
    a = numbers(COUNT, seed=1)
    b = a + 0.1 * numbers(COUNT, seed=2)
    wide = [x.astype("<f4") for x in (a, b)]
    merged = wide[0] * np.float32(wanted[0]) + wide[1] * np.float32(wanted[1])
    pairs = [(Dtype.F32, x.tobytes()) for x in wide]
    choice = choose(as_dtype(merged, dtype), dtype, *pairs)
    assert choice.encoding.predictor is Predictor.BLEND
    assert sorted(choice.bases) == [0, 1]
    assert choice.encoding.size <= 0.02 * unit_of(dtype) * COUNT


@pytest.mark.parametrize("wanted", [(0.5, 0.5), (0.3, 0.7), (2, -1)])
@pytest.mark.parametrize("dtype", [Dtype.F32, Dtype.BF16], ids=names)
def test_a_blend_is_estimated_by_the_best_coefficients(dtype, wanted):
    a = numbers(COUNT, seed=1)
    b = a + 0.1 * numbers(COUNT, seed=2)
    wide = [x.astype("<f4") for x in (a, b)]
    merged = wide[0] * np.float32(wanted[0]) + wide[1] * np.float32(wanted[1])
    bases = [Candidate(memoryview(x.tobytes()), Dtype.F32) for x in wide]
    found = estimate_blends(as_dtype(merged, dtype), dtype, bases, level=Level.BALANCED)
    assert found[0, 1] <= 0.02


def test_a_merge_of_three_at_the_smallest_level():
    values = [numbers(COUNT, seed=s).astype("<f4") for s in range(3)]
    shares = [np.float32(x) for x in (0.2, 0.3, 0.5)]
    base = numbers(COUNT, seed=9).astype("<f4")
    pairs = [(Dtype.F32, (base + np.float32(0.2) * x).tobytes()) for x in values]
    tuned = [np.frombuffer(raw, "<f4") for _, raw in pairs]
    merged = sum(x * f for x, f in zip(tuned, shares, strict=True)).astype("<f4")
    choice = choose(merged.tobytes(), Dtype.F32, *pairs, level=Level.SMALL)
    assert choice.encoding.predictor is Predictor.BLEND
    assert sorted(choice.bases) == [0, 1, 2]
    assert choice.encoding.size <= 0.05 * merged.nbytes


def test_bases_that_may_not_be_combined_are_not():
    a, b = numbers(COUNT, seed=1), numbers(COUNT, seed=2)
    pairs = [(Dtype.F32, as_dtype(a + 0.1 * b * sign, Dtype.F32)) for sign in (1, -1)]
    asked = []

    def may_combine(indices):
        asked.append(tuple(indices))
        return False

    choice = choose(as_dtype(a, Dtype.F32), Dtype.F32, *pairs, may_combine=may_combine)
    assert asked
    assert len(choice.bases) <= 1


def test_the_closest_of_several_is_used():
    base = as_dtype(numbers(COUNT), Dtype.BF16)
    near, far = nudged(base, Dtype.BF16, 1, 0.1, 1), nudged(base, Dtype.BF16, 2, 1, 30)
    noise = np.random.default_rng(1).bytes(len(base))
    choice = choose(base, Dtype.BF16, *((Dtype.BF16, raw) for raw in (noise, far, near)))
    assert choice.bases == (2,)


def test_a_base_in_another_dtype_with_equal_bytes():
    raw = as_dtype(numbers(), Dtype.F32)
    choice = choose(raw, Dtype.F32, (Dtype.U8, raw), (Dtype.BF16, raw), (Dtype.U32, raw))
    assert choice.encoding.size <= encode_solo(raw, Dtype.F32, zstd_level=3).size


@pytest.mark.parametrize("share", [0.1, 0.3, 0.6, 0.999])
def test_a_base_that_covers_a_part(share):
    raw = as_dtype(numbers(COUNT), Dtype.F32)
    base = nudged(raw, Dtype.F32, share=0.1)[: int(share * len(raw))]
    choice = choose(raw, Dtype.F32, (Dtype.F32, base))
    solo = encode_solo(raw, Dtype.F32, zstd_level=3).size
    assert choice.encoding.size <= solo
    if share > 0.5:
        assert choice.encoding.size <= solo * (1.05 - share)


def test_a_base_that_is_longer():
    base = as_dtype(numbers(COUNT), Dtype.F32)
    raw = nudged(base[:70_001], Dtype.F32, share=0.1) + b"\1"
    choice = choose(raw, Dtype.F32, (Dtype.F32, base))
    assert choice.encoding.size <= 0.1 * len(raw)


@EVERY_LEVEL
def test_constants_stay_constants(level):
    raw = bytes(40_000)
    base = as_dtype(numbers(10_000), Dtype.F32)
    assert choose(raw, Dtype.F32, (Dtype.F32, base), level=level).encoding.size <= 16


@pytest.mark.parametrize("dtype", [Dtype.F32, Dtype.BF16, Dtype.F64, Dtype.U8, Dtype.I8], ids=names)
def test_tiny_fragments(dtype):
    for size in range(20):
        raw = bytes(range(size))
        for base_dtype in {dtype, Dtype.F32, Dtype.BF16}:
            for base_size in (1, 3, 8, 200):
                choose(raw, dtype, (base_dtype, bytes(base_size)))


@settings(max_examples=60)
@given(
    raw=st.binary(min_size=1, max_size=120),
    bases=st.lists(
        st.tuples(st.sampled_from(list(Dtype)), st.binary(min_size=1, max_size=150)), max_size=4
    ),
    dtype=st.sampled_from(list(Dtype)),
    level=st.sampled_from(list(Level)),
)
def test_any_candidates_of_any_bytes(raw, bases, dtype, level):
    choose(raw, dtype, *bases, level=level)


@EVERY_LEVEL
def test_special_values_everywhere(level):
    for dtype in FLOATS:
        raws = [with_specials(as_dtype(numbers(seed=s), dtype), dtype, s) for s in range(4)]
        merged = as_dtype(numbers(seed=1) / 2 + numbers(seed=2) / 2, dtype)
        choose(with_specials(merged, dtype), dtype, *((dtype, raw) for raw in raws), level=level)


@pytest.mark.slow
def test_the_largest_fragment():
    values = numbers(1 << 21)
    base = as_dtype(values, Dtype.F64)
    raw = nudged(base, Dtype.F64, share=0.1)
    assert choose(raw, Dtype.F64, (Dtype.F64, base)).encoding.size < 0.1 * len(raw)
