"""The decoder's self-test passes here, and notices whatever decodes otherwise."""

import time

import ml_dtypes
import numpy as np
import pytest

from fragfs.codec import floats, groups, predict, predicted, rebuild, selftest, steps
from fragfs.codec.selftest import check_decoder
from fragfs.errors import FormatError, FragmentError, IntegrityError
from fragfs.types import PREDICTORS_FROM_BASES, Dtype, Predictor
from tests.codec import reference
from tests.codec.families import unit_of, without_kernels

COMPILED = floats._kernels
LIBRARY = {
    Dtype.BF16: ml_dtypes.bfloat16,
    Dtype.F16: np.float16,
    Dtype.F8_E4M3: ml_dtypes.float8_e4m3fn,
    Dtype.F8_E5M2: ml_dtypes.float8_e5m2,
}


def test_this_machine_decodes_rightly(kernels):
    check_decoder()


def test_every_predictor_and_conversion_is_checked():
    records = list(selftest._records())
    assert {record.predictor for record in records} == set(Predictor)
    names = {record.name for record in records}
    for dtype in LIBRARY:
        assert {f"CAST from F32 to {dtype.name}", f"CAST from {dtype.name} to F32"} <= names
    widths = {unit_of(r.dtype) for r in records if r.predictor is Predictor.DELTA}
    assert widths == {1, 2, 4, 8}


def test_what_it_expects_is_what_the_reference_gives():
    for record in selftest._records():
        if record.predictor in PREDICTORS_FROM_BASES:
            covered = int.from_bytes(record.params[:4], "little") * unit_of(record.dtype)
            found = reference.decode(
                record.predictor,
                record.dtype,
                record.params,
                record.payload,
                len(record.raw),
                record.bases,
            )
            assert found[:covered] == record.raw[:covered], record.name


def test_it_is_over_at_once():
    best = 1.0
    for _ in range(20):
        start = time.perf_counter()
        check_decoder()
        best = min(best, time.perf_counter() - start)
    # 2 ms on an idle machine, which this one may not be.
    assert best < 0.02


def narrow_by_library(dtype):
    right = floats.narrow

    def narrow(numbers, wanted):
        if wanted is not dtype:
            return right(numbers, wanted)
        with np.errstate(all="ignore"):
            return numbers.astype(LIBRARY[dtype]).view(f"<u{dtype.bits // 8}")

    return narrow


def widen_by_library(dtype):
    right = floats.widen

    def widen(words, wanted):
        if wanted is not dtype:
            return right(words, wanted)
        return words.view(LIBRARY[dtype]).astype("<f4")

    return widen


def quantize_rounding_up(numbers, scales):
    with np.errstate(all="ignore"):
        ratio = np.floor(numbers / scales + np.float32(0.5))
    return np.clip(np.nan_to_num(ratio), -128, 127).astype(np.int8).view(np.uint8)


def quantize_nan_as_minimum(numbers, scales):
    found = floats.quantize(numbers, scales)
    found[np.isnan(numbers)] = 0x80
    return found


def quantize_wrapping(numbers, scales):
    with np.errstate(all="ignore"):
        ratio = np.nan_to_num(np.rint(numbers / scales), posinf=0, neginf=0)
        return ratio.clip(-1e9, 1e9).astype(np.int32).astype(np.uint8)


def blend_in_f64(inputs, coefficients):
    with np.errstate(all="ignore"):
        total = sum(
            floats._without_tiny(numbers).astype(np.float64) * np.float64(np.float32(coefficient))
            for numbers, coefficient in zip(inputs, coefficients, strict=True)
        ).astype("<f4")
    total[~np.isfinite(total)] = 0
    return total


def blend_keeping_infinities(inputs, coefficients):
    with np.errstate(all="ignore"):
        return sum(
            floats._without_tiny(numbers) * np.float32(coefficient)
            for numbers, coefficient in zip(inputs, coefficients, strict=True)
        ).astype("<f4")


def blend_with_tiny(inputs, coefficients):
    with np.errstate(all="ignore"):
        total = sum(
            numbers * np.float32(coefficient)
            for numbers, coefficient in zip(inputs, coefficients, strict=True)
        ).astype("<f4")
    total[~np.isfinite(total)] = 0
    return total


def unpack_high_bits_first(packed, bits, out):
    places = np.arange(8 - bits, -1, -bits, dtype=np.uint8)
    codes = packed[:, None] >> places & np.uint8((1 << bits) - 1)
    out[:] = codes.reshape(-1)


def order_from_the_end(prediction, groups, shift, mask, right=groups._order):
    """The words of each group, the last of them first."""
    order = right(prediction, groups, shift, mask)
    ends = np.cumsum(groups.sizes)
    return np.concatenate([part[::-1] for part in np.split(order, ends[:-1])])


class Rebuilding:
    """Loops that rebuild otherwise: `change` gets and returns a group's fields and the escapes."""

    def __init__(self, change):
        self.merge_planes = COMPILED.merge_planes
        self._change = change

    def rebuild(self, width, prediction, out, shift, mask, groups, escapes):
        groups, escapes = self._change(groups, escapes)
        COMPILED.rebuild(width, prediction, out, shift, mask, groups, escapes)


def no_escapes(groups, escapes):
    return groups, np.zeros_like(escapes)


def planes_backwards(groups, escapes):
    return tuple((*fields[:4], fields[4][::-1]) for fields in groups), escapes


class RoundingDown:
    """A loop that cuts bf16 off instead of rounding to it."""

    @staticmethod
    def convert(inputs, scaled, form, out):
        if form != 0:
            COMPILED.convert(inputs, scaled, form, out)
            return
        wide = np.empty(out.size, "<u4")
        COMPILED.convert(inputs, scaled, 4, wide)
        out[:] = wide >> np.uint32(16)


def steps_by_rounded_mantissa(words, table):
    return words + table[(words + np.uint32(1 << 14) >> np.uint32(15)) & np.uint32(255)]


class SteppingSigned:
    """A loop whose steps end at the largest word instead of wrapping around."""

    @staticmethod
    def add_steps(words, table, out):
        moves = table[words >> np.uint32(15) & np.uint32(255)].astype(np.uint64)
        out[:] = np.minimum(words + moves, 0xFFFFFFFF)


BROKEN = {
    **{f"narrow {d.name}": (floats, "narrow", narrow_by_library(d)) for d in LIBRARY},
    **{
        f"widen {d.name}": (floats, "widen", widen_by_library(d))
        for d in LIBRARY
        if d is not Dtype.BF16  # there is one way only
    },
    "widen bf16 flushing": (
        floats,
        "widen",
        lambda words, dtype, right=floats.widen: np.where(
            np.abs(right(words, dtype)) < np.float32(2.0**-126), np.float32(0), right(words, dtype)
        ),
    ),
    "quantize rounding": (predict, "quantize", quantize_rounding_up),
    "quantize nan": (predict, "quantize", quantize_nan_as_minimum),
    "quantize wrapping": (predict, "quantize", quantize_wrapping),
    "blend fused": (floats, "blend", blend_in_f64),
    "blend infinities": (floats, "blend", blend_keeping_infinities),
    "blend tiny": (floats, "blend", blend_with_tiny),
    **(
        {
            "compiled rounding": (floats, "_kernels", RoundingDown),
            "compiled escapes": (rebuild, "_kernels", Rebuilding(no_escapes)),
            "compiled planes": (rebuild, "_kernels", Rebuilding(planes_backwards)),
        }
        if COMPILED
        else {}
    ),
    "codes": (rebuild, "unpack_codes", unpack_high_bits_first),
    "bias": (rebuild, "_bias", lambda unit: 0x80),
    "groups": (groups, "_order", order_from_the_end),
    "group keys": (groups, "key_field", lambda dtype: (dtype.mantissa_bits - 1, 0xFF)),
    "steps": (predict, "add_steps", steps_by_rounded_mantissa),
    "steps, not differences": (predicted, "parse_steps", lambda stored: stored),
    "steps wrapping": (steps, "_kernels", SteppingSigned),
    "changes": (
        predicted,
        "_apply_changes",
        lambda words, params, payload: (words, params[-3:], payload[-4:]),
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_decodes_otherwise_is_noticed(name, monkeypatch):
    module, attribute, broken = BROKEN[name]
    if attribute != "_kernels" and module in (floats, groups, rebuild):
        # The compiled loops do without these functions.
        without_kernels(monkeypatch)
    monkeypatch.setattr(module, attribute, broken)
    with pytest.raises(IntegrityError) as caught:
        check_decoder()
    assert "this machine" in str(caught.value)
    assert caught.value.remedy is not None


def test_a_decoder_that_refuses_is_noticed(monkeypatch):
    def refuse(*arguments):
        raise FormatError("a plane ends early")

    monkeypatch.setattr(rebuild, "decompress_into", refuse)
    with pytest.raises(FragmentError, match=r"cannot decode \(DELTA of F32\): a plane ends early"):
        check_decoder()
