"""Whatever is predicted from bases comes back, in every dtype, from every kind of base."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fragfs.codec import groups
from fragfs.codec.encoding import decode
from fragfs.codec.predict import SCALED, Prediction, fit_scales
from fragfs.codec.predicted import covered_words, encode_predicted
from fragfs.errors import FormatError
from fragfs.types import FRAGMENT_BYTES_MAX, PREDICTORS_FROM_BASES, Dtype, Predictor
from tests.codec import reference
from tests.codec.families import (
    EVERY_KIND,
    FLOATS,
    NUMPY,
    Case,
    as_dtype,
    blend,
    blend_cases,
    cast,
    cast_cases,
    decay_cases,
    decayed,
    delta,
    delta_cases,
    nudged,
    numbers,
    quantize_cases,
    quantized,
    unit_of,
    with_specials,
    without_kernels,
)

GOLDEN = json.loads(Path(__file__).with_name("golden_predicted.json").read_text())


def names(value):
    return getattr(value, "name", value)


@pytest.mark.parametrize("dtype", EVERY_KIND, ids=names)
def test_deltas_round_trip(dtype, kernels):
    for case in delta_cases(dtype):
        for grouped in (False, True):
            case.check(grouped=grouped)


@pytest.mark.parametrize("cases", [cast_cases, blend_cases, quantize_cases, decay_cases])
def test_conversions_round_trip(cases, kernels):
    for case in cases():
        for grouped in (False, True):
            case.check(grouped=grouped)


@pytest.mark.skipif(groups._kernels is None, reason="fragfs.codec._kernels is not compiled here")
@pytest.mark.parametrize(
    "cases",
    [
        *(partial(delta_cases, dtype) for dtype in EVERY_KIND),
        *(cast_cases, blend_cases, quantize_cases, decay_cases),
    ],
    ids=lambda cases: cases.args[0].name if isinstance(cases, partial) else cases.__name__,
)
def test_both_kernels_store_the_same_bytes(cases, monkeypatch):
    found = cases()
    compiled = [case.encode(grouped=True) for case in found]
    without_kernels(monkeypatch)
    for case, encoding in zip(found, compiled, strict=True):
        assert case.encode(grouped=True) == encoding, case.name
        assert case.decode(encoding) == case.raw, case.name


@given(
    raw=st.binary(min_size=16, max_size=200),
    base=st.binary(min_size=16, max_size=200),
    dtype=st.sampled_from(list(Dtype)),
    grouped=st.booleans(),
)
def test_any_bytes_are_stored_as_a_delta_of_any_others(raw, base, dtype, grouped):
    delta("", dtype, raw, base).check(grouped=grouped)


@pytest.mark.slow
@settings(max_examples=100)
@given(
    raw=st.binary(min_size=4, max_size=40),
    bases=st.lists(st.binary(min_size=4, max_size=40), min_size=3, max_size=3),
    dtypes=st.lists(st.sampled_from(FLOATS), min_size=4, max_size=4),
    coefficients=st.lists(
        st.sampled_from([0.5, -0.5, 2, -1, 1, 0.3, -0.7, 2.0**20, 2.0**-20]), min_size=3, max_size=3
    ),
    count=st.integers(2, 3),
)
def test_predictions_agree_with_exact_arithmetic(raw, bases, dtypes, coefficients, count):
    target, *of_bases = dtypes
    pairs = list(zip(of_bases, bases, strict=True))
    cases = [
        cast("", target, raw, *pairs[0]),
        blend("", target, raw, pairs[:count], coefficients[:count]),
        Case("", Dtype.I8, raw, _scaled(of_bases[0], raw, bases[0]), (bases[0],)),
        delta("", target, raw, bases[0]),
        decayed("", raw, bases[0]),
        decayed("", raw, bases[0], [index * 0x01234567 for index in range(256)]),
    ]
    for case in cases:
        encoding = case.check(grouped=False)
        # Whole words; a tail that no base covers is not in the reference's answer.
        found = reference.decode(
            encoding.predictor,
            case.dtype,
            encoding.params,
            bytes(encoding.payload),
            len(case.raw),
            case.bases,
        )
        covered = covered_words(
            case.raw,
            case.dtype,
            [(memoryview(b), d) for b, d in zip(case.bases, case.prediction.dtypes, strict=True)],
        ) * unit_of(case.dtype)
        assert found[:covered] == case.raw[:covered]


def _scaled(dtype, raw, base):
    """Rows of 11 words, the first one cut to 5."""
    count = min(len(raw), len(base) // unit_of(dtype))
    scales = [0.1, 3, 0.01, 40, 1e-9][: 1 + -(-max(0, count - 5) // 11)]
    return Prediction(
        Predictor.QUANTIZE,
        (dtype,),
        row_words=11,
        first_row_words=5,
        scales=np.array(scales, "<f4"),
    )


@pytest.mark.parametrize("dtype", [Dtype.BF16, Dtype.F32, Dtype.F8_E4M3, Dtype.F64], ids=names)
def test_groups_agree_with_the_reference(dtype, kernels):
    base = with_specials(as_dtype(numbers(12000), dtype), dtype)
    case = delta("", dtype, with_specials(nudged(base, dtype, step=9), dtype, 3), base)
    encoding = case.check(grouped=True)
    assert encoding.predictor is Predictor.DELTA
    assert encoding.params[4] > 1, "not grouped"
    found = reference.decode(
        encoding.predictor, dtype, encoding.params, bytes(encoding.payload), len(base), [base]
    )
    assert found == case.raw


class TestSizes:
    """What copies must shrink to."""

    def test_equal_bytes_cost_their_header(self):
        for dtype in EVERY_KIND:
            raw = as_dtype(numbers(), dtype)
            assert delta("", dtype, raw, raw).check(grouped=True).size == 5, dtype

    def test_equal_bytes_in_another_dtype(self):
        raw = as_dtype(numbers(), Dtype.F32)
        for dtype in (Dtype.U32, Dtype.I32, Dtype.U8, Dtype.C64, Dtype.BYTES):
            assert delta("", dtype, raw, raw).check(grouped=True).size == 5

    def test_one_changed_word_is_listed(self):
        for dtype in EVERY_KIND:
            base = as_dtype(numbers(), dtype)
            words = bytearray(base)
            words[-1] ^= 0x40
            encoding = delta("", dtype, bytes(words), base).check(grouped=True)
            assert encoding.predictor is Predictor.SPARSE, dtype
            assert encoding.size <= 8 + 6 * (4 + unit_of(dtype)), dtype

    @pytest.mark.parametrize("target", FLOATS[1:], ids=names)
    def test_a_narrower_copy_costs_its_header(self, target):
        values = numbers().astype("<f4").astype(np.float64)
        raw = as_dtype(values, target)
        assert (
            cast("", target, raw, Dtype.F32, as_dtype(values, Dtype.F32)).check(grouped=True).size
            == 6
        )

    @pytest.mark.parametrize("source", FLOATS[1:], ids=names)
    def test_a_wider_copy_costs_its_header(self, source):
        base = as_dtype(numbers(), source)
        values = np.frombuffer(base, NUMPY[source]).astype(np.float64)
        raw = as_dtype(values, Dtype.F32)
        assert cast("", Dtype.F32, raw, source, base).check(grouped=True).size == 6

    def test_a_merge_costs_its_header(self):
        a, b, c = (numbers(seed=s).astype("<f4") for s in range(3))
        pairs = [(Dtype.F32, x.tobytes()) for x in (a, b, c)]
        half = np.float32(0.5)
        raw = (a * half + b * half).tobytes()
        assert blend("", Dtype.F32, raw, pairs[:2], (0.5, 0.5)).check(grouped=True).size == 15
        raw = (a * np.float32(2) + b * np.float32(-1)).tobytes()
        assert blend("", Dtype.F32, raw, pairs[:2], (2, -1)).check(grouped=True).size == 15
        thirds = [np.float32(1 / 3)] * 3
        raw = ((a * thirds[0] + b * thirds[1]) + c * thirds[2]).tobytes()
        assert blend("", Dtype.F32, raw, pairs, (1 / 3,) * 3).check(grouped=True).size == 20

    def test_a_quantized_copy_costs_its_scales(self):
        case = quantized("", numbers(), Dtype.F32, 0, 0)
        assert case.check(grouped=True).size <= 50
        case = quantized("", numbers(), Dtype.F32, 100, 100)
        assert case.check(grouped=True).size <= 50 + 4 * 120

    def test_decay_costs_its_steps(self):
        base = with_specials(as_dtype(numbers(), Dtype.F32), Dtype.F32)
        assert decayed("", None, base).check(grouped=True).size <= 200
        wild = np.random.default_rng(1).integers(0, 1 << 32, 256).tolist()
        assert decayed("", None, base, wild).check(grouped=True).size <= 25 + 4 * 256

    def test_a_tune_of_small_steps(self):
        base = as_dtype(numbers(50_000), Dtype.BF16)
        raw = nudged(base, Dtype.BF16, share=0.05, step=1)
        assert delta("", Dtype.BF16, raw, base).check(grouped=True).size <= 0.035 * len(raw)

    def test_what_no_base_covers_is_stored_solo(self):
        raw = as_dtype(numbers(), Dtype.BF16)
        encoding = delta("", Dtype.BF16, raw, raw[: len(raw) // 2]).check(grouped=True)
        assert encoding.size <= 0.36 * len(raw)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [Dtype.BF16, Dtype.F64, Dtype.U8], ids=names)
def test_the_largest_fragment(dtype, kernels):
    count = FRAGMENT_BYTES_MAX // unit_of(dtype)
    rng = np.random.default_rng(1)
    words = rng.integers(0, 1 << 62, FRAGMENT_BYTES_MAX // 8, dtype=np.uint64)
    base = words.view(f"<u{unit_of(dtype)}")
    raw = base.copy()
    raw[::50] += raw.dtype.type(1)
    case = delta("", dtype, raw.tobytes(), base.tobytes())
    assert len(case.raw) == FRAGMENT_BYTES_MAX == count * unit_of(dtype)
    case.check(grouped=True)


@pytest.mark.slow
def test_the_largest_conversions():
    values = numbers(1 << 21)
    base = as_dtype(values, Dtype.F32)
    cast("", Dtype.BF16, as_dtype(values, Dtype.BF16), Dtype.F32, base).check(grouped=True)
    quantized("", values, Dtype.F32, 1024, 100).check(grouped=True)
    pairs = [(Dtype.F32, base), (Dtype.BF16, as_dtype(values, Dtype.BF16))]
    blend("", Dtype.F32, base, pairs, (0.5, 0.5)).check(grouped=True)


def test_blocks_of_a_prediction_join():
    # More words than are converted at a time, and not a multiple of it.
    values = numbers(3 * (1 << 15) + 77)
    base = with_specials(as_dtype(values, Dtype.F32), Dtype.F32)
    for target in FLOATS[1:]:
        cast("", target, as_dtype(values, target), Dtype.F32, base).check(grouped=True)
    quantized("", values, Dtype.BF16, 1000, 333).check(grouped=False)


# --- fitting, for writers only


class TestFitting:
    @pytest.mark.parametrize("source", FLOATS, ids=names)
    def test_scales_predict_nearly_everything(self, source):
        for row, first in ((0, 0), (100, 100), (100, 1), (7, 3), (12_000, 11_999)):
            self.check_scales(source, row, first)

    def check_scales(self, source, row, first):
        case = quantized("", numbers(), source, row, first)
        target = np.frombuffer(case.raw, "u1")
        base = np.frombuffer(case.bases[0], f"<u{unit_of(source)}")
        found = fit_scales(target, Dtype.I8, (base, source), row, first)
        predicted = found.predict([memoryview(case.bases[0])], Dtype.I8, target.size)
        # Two numbers of a short row leave much room for a scale.
        assert np.count_nonzero(predicted != target) <= (120 if row == 7 else 6)

    def test_rows_of_zeros_and_specials_have_a_scale_that_may_be_stored(self):
        base = np.zeros(400, "<f4")
        base[100:200] = np.inf
        base[200:300] = np.nan
        target = np.zeros(400, "u1")
        target[150:] = 5
        found = fit_scales(target, Dtype.I8, (base.view("<u4"), Dtype.F32), 100, 100)
        case = Case("", Dtype.I8, target.tobytes(), found, (base.tobytes(),))
        case.check(grouped=False)

    def test_what_can_be_quantized(self):
        assert SCALED == (Dtype.I8,)


# --- golden records


def golden_arguments(vector):
    return (
        vector["predictor"],
        Dtype[vector["dtype"]],
        bytes.fromhex(vector["params"]),
        memoryview(bytes.fromhex(vector["payload"])),
        len(vector["raw"]) // 2,
        [memoryview(bytes.fromhex(base)) for base in vector["bases"]],
    )


def test_golden_records_decode_forever(kernels):
    wrong = [v["name"] for v in GOLDEN if decode(*golden_arguments(v)).hex() != v["raw"]]
    assert wrong == []


def test_golden_records_cover_every_predictor_and_conversion():
    assert {vector["predictor"] for vector in GOLDEN} == PREDICTORS_FROM_BASES
    cast_names = {v["name"] for v in GOLDEN if v["predictor"] == Predictor.CAST}
    assert len(cast_names) == len(FLOATS) * (len(FLOATS) - 1)
    names = [vector["name"] for vector in GOLDEN]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("chosen", sorted(PREDICTORS_FROM_BASES), ids=names)
def test_golden_records_agree_with_the_reference(chosen):
    for vector in (v for v in GOLDEN if v["predictor"] == chosen):
        predictor, dtype, params, payload, raw_size, bases = golden_arguments(vector)
        raw = bytes.fromhex(vector["raw"])
        found = reference.decode(
            predictor, dtype, params, payload.tobytes(), raw_size, [bytes(base) for base in bases]
        )
        covered = int.from_bytes(params[:4], "little") * unit_of(dtype)
        assert found[:covered] == raw[:covered], vector["name"]


# --- refusals


def refuse(case: Case, params: bytes, payload: bytes = b"", bases=None, raw_size=None):
    with pytest.raises(FormatError) as caught:
        decode(
            case.prediction.predictor,
            case.dtype,
            params,
            memoryview(payload),
            len(case.raw) if raw_size is None else raw_size,
            [memoryview(base) for base in (case.bases if bases is None else bases)],
        )
    return caught.value


BASE = as_dtype(numbers(40), Dtype.F32)
AS_DELTA = delta("", Dtype.F32, BASE, BASE)
HEAD = (40).to_bytes(4, "little")
F32_CODE = bytes([Dtype.F32.code])


class TestRefusals:
    @pytest.mark.parametrize("count", [0, 41, 1 << 30, (1 << 32) - 1])
    def test_words_covered(self, count):
        refuse(AS_DELTA, count.to_bytes(4, "little") + b"\0")

    @pytest.mark.parametrize("size", range(5))
    def test_parameters_that_end_early(self, size):
        refuse(AS_DELTA, (HEAD + b"\0")[:size])

    def test_more_than_a_residual(self):
        refuse(AS_DELTA, HEAD + b"\0\0")
        refuse(AS_DELTA, HEAD + b"\0", b"\0")

    @pytest.mark.parametrize("raw_size", [0, -1, 159, 161, FRAGMENT_BYTES_MAX + 1])
    def test_raw_size(self, raw_size):
        refuse(AS_DELTA, HEAD + b"\0", raw_size=raw_size)

    def test_number_of_bases(self):
        for predictor in PREDICTORS_FROM_BASES:
            few, many = (0, 4) if predictor == Predictor.BLEND else (0, 2)
            for count in (few, many, 255):
                with pytest.raises(FormatError):
                    decode(
                        predictor, Dtype.F32, HEAD + bytes(60), memoryview(b""), 160, [BASE] * count
                    )

    def test_a_base_that_is_too_short(self):
        refuse(AS_DELTA, HEAD + b"\0", bases=[BASE[:-1]])
        refuse(cast("", Dtype.F32, BASE, Dtype.F32, BASE), HEAD + F32_CODE + b"\0", bases=[b""])

    @pytest.mark.parametrize("code", [0, 3, Dtype.F64.code, Dtype.C64.code, 18, 24, 25, 255])
    def test_dtypes_of_bases(self, code):
        refuse(cast("", Dtype.F32, BASE, Dtype.F32, BASE), HEAD + bytes([code, 0]))

    @pytest.mark.parametrize("dtype", [Dtype.U8, Dtype.F64, Dtype.C64, Dtype.BYTES, Dtype.F8_E8M0])
    def test_dtypes_that_nothing_converts_to(self, dtype):
        case = Case("", dtype, BASE, Prediction(Predictor.CAST, (Dtype.F32,)), (BASE,))
        error = refuse(case, (20).to_bytes(4, "little") + F32_CODE + b"\0", bases=[BASE * 9])
        assert error.remedy == "upgrade fragfs"

    @pytest.mark.parametrize("value", [0, -0.0, 2.0**-21, 2.0**21, np.inf, np.nan, -np.inf, 1e-44])
    def test_coefficients(self, value):
        case = blend("", Dtype.F32, BASE, [(Dtype.F32, BASE)] * 2, (1, 1))
        one = F32_CODE + np.array([1], "<f4").tobytes()
        other = F32_CODE + np.array([value], "<f4").tobytes()
        refuse(case, HEAD + one + other + b"\0")
        refuse(case, HEAD + other + one + b"\0")

    @pytest.mark.parametrize(
        "value", [0, -1, -0.0, 2.0**-61, 2.0**61, np.inf, np.nan, 1e-44, -np.inf]
    )
    def test_scales(self, value):
        codes = quantized("", numbers(40), Dtype.F32, 0, 0)
        stored = np.array([value], "<f4").tobytes()
        streams = b"\1\1\0\0\0" * 4
        refuse(codes, HEAD + F32_CODE + bytes(8) + streams + b"\0", stored)

    @pytest.mark.parametrize(("row", "first"), [(0, 1), (1, 0), (5, 6)])
    def test_rows(self, row, first):
        codes = quantized("", numbers(40), Dtype.F32, 0, 0)
        rows = row.to_bytes(4, "little") + first.to_bytes(4, "little")
        refuse(codes, HEAD + F32_CODE + rows + b"\1\1\0\0\0" * 4 + b"\0", b"\1\1\1\x3f")

    @pytest.mark.parametrize("changes", [0, 41, (1 << 32) - 1])
    def test_numbers_of_changes(self, changes):
        raw = AS_DELTA.raw
        params = HEAD + changes.to_bytes(4, "little") + b"\1\1\0\0\0" * 8
        with pytest.raises(FormatError):
            decode(Predictor.SPARSE, Dtype.F32, params, memoryview(bytes(8)), 160, [raw])

    def test_a_change_behind_the_end(self):
        params = HEAD + (1).to_bytes(4, "little") + b"\1\1\0\0\0" * 8
        for gap in (40, 1 << 24):
            payload = gap.to_bytes(4, "little") + b"\1\0\0\0"
            with pytest.raises(FormatError):
                decode(Predictor.SPARSE, Dtype.F32, params, memoryview(payload), 160, [BASE])
        last = (39).to_bytes(4, "little") + b"\1\0\0\0"
        assert (
            len(decode(Predictor.SPARSE, Dtype.F32, params, memoryview(last), 160, [BASE])) == 160
        )

    @pytest.mark.parametrize("dtype", [d for d in EVERY_KIND if d is not Dtype.F32], ids=names)
    def test_dtypes_without_steps(self, dtype):
        case = Case("", dtype, BASE, Prediction(Predictor.DECAY, (dtype,)), (BASE,))
        params = (1).to_bytes(4, "little") + b"\1\1\0\0\0" * 4 + b"\0"
        assert refuse(case, params, bytes(4)).remedy == "upgrade fragfs"

    def test_streams_of_steps(self):
        case = decayed("", BASE, BASE)
        for descriptors, stored in (
            (b"\1\1\0\0\0" * 3, bytes(3)),
            (b"\1\1\0\0\0" * 4, bytes(3)),
            (b"\1\1\0\0\0" * 4, bytes(5)),
            (b"\0\xff\0\0\0" + b"\1\1\0\0\0" * 3, bytes(258)),
            (b"\0\1\1\0\0" + b"\1\1\0\0\0" * 3, bytes(260)),
            (b"\3\1\0\0\0" + b"\1\1\0\0\0" * 3, bytes(4)),
        ):
            refuse(case, HEAD + descriptors + b"\0", stored)
        for value in (0, 0x7F, 0x80, 0xFF):
            params = HEAD + b"\1\1\0\0\0" * 4 + b"\0"
            payload = memoryview(bytes([value]) * 4)
            assert len(decode(Predictor.DECAY, Dtype.F32, params, payload, 160, [BASE])) == 160

    def test_a_tail_of_an_unknown_kind(self):
        for solo in (4, 5, 9, 255):
            refuse(
                AS_DELTA,
                HEAD + b"\0" + bytes([solo, 0, 0]),
                b"tail",
                raw_size=164,
            )
        refuse(AS_DELTA, HEAD + b"\0" + bytes([0, 1, 0]), b"tail", raw_size=164)
        refuse(AS_DELTA, HEAD + b"\0" + bytes([0, 0, 0]), b"tai", raw_size=164)


def test_a_prediction_with_bases_only_takes_as_much_as_all_cover():
    raw = memoryview(bytes(100))
    pairs = [(memoryview(bytes(41)), Dtype.F32), (memoryview(bytes(15)), Dtype.BF16)]
    assert covered_words(raw, Dtype.F32, pairs) == 7
    assert covered_words(raw, Dtype.F64, pairs[:1]) == 10
    assert covered_words(raw[:7], Dtype.F32, pairs) == 1


def test_the_residual_keeps_the_bytes_of_its_base_unharmed():
    base = bytearray(as_dtype(numbers(), Dtype.BF16))
    before = bytes(base)
    raw = nudged(before, Dtype.BF16)
    prediction = Prediction(Predictor.DELTA, (Dtype.BF16,))
    for grouped in (False, True):
        encoding = encode_predicted(
            raw, Dtype.BF16, prediction, [memoryview(base)], grouped=grouped, zstd_level=3
        )
        back = decode(
            encoding.predictor,
            Dtype.BF16,
            encoding.params,
            memoryview(encoding.payload),
            len(raw),
            [memoryview(base)],
        )
        assert back == raw
        assert base == before
