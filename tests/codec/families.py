"""Fragments that resemble each other, for tests of whatever is predicted from something."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import pytest

from fragfs.codec import floats, forms, groups, planes, rebuild, residual, steps
from fragfs.codec.encoding import decode
from fragfs.codec.predict import Prediction
from fragfs.codec.predicted import encode_predicted
from fragfs.codec.solo import Encoding
from fragfs.types import Dtype, Predictor

COUNT = 12_000
"""Words of most cases: enough for groups, little enough for hundreds of cases."""

FLOATS = (Dtype.F32, Dtype.BF16, Dtype.F16, Dtype.F8_E4M3, Dtype.F8_E5M2)
EVERY_KIND = (
    *(Dtype.F32, Dtype.BF16, Dtype.F16, Dtype.F64, Dtype.C64, Dtype.C128),
    *(Dtype.F8_E4M3, Dtype.F8_E5M2, Dtype.F8_E8M0, Dtype.F4, Dtype.BOOL, Dtype.BYTES, Dtype.QUANT),
    *(Dtype.U8, Dtype.I8, Dtype.U16, Dtype.I16, Dtype.U32, Dtype.I32, Dtype.U64, Dtype.I64),
)

NUMPY = {
    Dtype.F32: "<f4",
    Dtype.F16: "<f2",
    Dtype.F64: "<f8",
    Dtype.BF16: ml_dtypes.bfloat16,
    Dtype.F8_E4M3: ml_dtypes.float8_e4m3fn,
    Dtype.F8_E5M2: ml_dtypes.float8_e5m2,
}
REAL_STEPS = [-(3 + leading // 48) * 100 - leading % 3 for leading in range(256)]
"""Like those of 100 updates: a few hundred units, more of them for larger mantissas."""

# Bytes of a word, written out apart from the code under test.
UNIT = {
    **dict.fromkeys([Dtype.F16, Dtype.BF16, Dtype.I16, Dtype.U16], 2),
    **dict.fromkeys([Dtype.F32, Dtype.I32, Dtype.U32, Dtype.C64], 4),
    **dict.fromkeys([Dtype.F64, Dtype.I64, Dtype.U64, Dtype.C128], 8),
}


def without_kernels(patch: pytest.MonkeyPatch) -> None:
    """From now on numpy does what the compiled loops do."""
    for module in (floats, forms, groups, planes, rebuild, residual, steps):
        patch.setattr(module, "_kernels", None)


def unit_of(dtype: Dtype) -> int:
    return UNIT.get(dtype, 1)


def numbers(count: int = COUNT, seed: int = 0) -> np.ndarray:
    """Normally distributed weights, float64."""
    return np.random.default_rng(seed).standard_normal(count) * 0.02


def as_dtype(values: np.ndarray, dtype: Dtype) -> bytes:
    """Weights as a float dtype, rounded by the library; of an integer dtype, in steps of 0.001."""
    if dtype in (Dtype.C64, Dtype.C128):
        return values.astype("<f4" if dtype is Dtype.C64 else "<f8").tobytes()
    if dtype in NUMPY:
        return values.astype(NUMPY[dtype]).tobytes()
    steps = np.rint(values * 1000).astype(np.int64)
    return steps.astype(f"<i{unit_of(dtype)}").tobytes()


def words_of(raw: bytes, dtype: Dtype) -> np.ndarray:
    unit = unit_of(dtype)
    return np.frombuffer(raw[: len(raw) // unit * unit], f"<u{unit}").copy()


def nudged(raw: bytes, dtype: Dtype, seed: int = 1, share: float = 0.3, step: int = 3) -> bytes:
    """Some words moved by a few units in the last place."""
    rng = np.random.default_rng(seed)
    words = words_of(raw, dtype)
    moves = rng.integers(-step, step + 1, words.size) * (rng.random(words.size) < share)
    return (words + moves.astype(words.dtype)).tobytes()


def one_bit(raw: bytes, dtype: Dtype) -> bytes:
    words = words_of(raw, dtype)
    words[words.size // 2] ^= words.dtype.type(1)
    return words.tobytes()


def rows_shuffled(raw: bytes, dtype: Dtype) -> bytes:
    words = words_of(raw, dtype)
    rows = words[: words.size // 100 * 100].reshape(-1, 100)
    return np.random.default_rng(5).permutation(rows).tobytes() + words[rows.size :].tobytes()


def specials(dtype: Dtype) -> list[int]:
    """Zeros, denormals, infinities and NaNs with payloads, of both signs, as words."""
    bits = 8 * unit_of(dtype)
    mantissa = dtype.mantissa_bits
    exponents = ((1 << bits - 1) - 1) >> mantissa << mantissa
    magnitudes = [
        *(0, 1, 2, (1 << mantissa) - 1, 1 << mantissa, exponents - 1, exponents, exponents | 1),
        *(exponents | 1 << max(mantissa - 1, 0), (1 << bits - 1) - 1),
    ]
    return [m | sign for m in magnitudes for sign in (0, 1 << bits - 1)]


def with_specials(raw: bytes, dtype: Dtype, seed: int = 7) -> bytes:
    """Every special value several times, at random places."""
    rng = np.random.default_rng(seed)
    words = words_of(raw, dtype)
    values = np.array(specials(dtype) * 3, words.dtype)
    words[rng.permutation(words.size)[: values.size]] = values[: words.size]
    return words.tobytes()


@dataclass(frozen=True)
class Case:
    """A fragment, how it is predicted, and from what."""

    name: str
    dtype: Dtype
    raw: bytes
    prediction: Prediction
    bases: tuple[bytes, ...]

    def encode(self, *, grouped: bool) -> Encoding:
        return encode_predicted(
            self.raw,
            self.dtype,
            self.prediction,
            [memoryview(base) for base in self.bases],
            grouped=grouped,
            zstd_level=3,
        )

    def decode(self, encoding: Encoding) -> memoryview:
        return decode(
            encoding.predictor,
            self.dtype,
            encoding.params,
            memoryview(encoding.payload),
            len(self.raw),
            [memoryview(base) for base in self.bases],
        )

    def check(self, *, grouped: bool) -> Encoding:
        """Encode, decode, compare."""
        encoding = self.encode(grouped=grouped)
        back = self.decode(encoding)
        assert back.readonly
        assert back == self.raw
        return encoding


def delta(name: str, dtype: Dtype, raw: bytes, base: bytes) -> Case:
    prediction = Prediction(Predictor.DELTA, (dtype,))
    return Case(f"DELTA {dtype.name} {name}", dtype, raw, prediction, (base,))


def cast(name: str, dtype: Dtype, raw: bytes, base_dtype: Dtype, base: bytes) -> Case:
    prediction = Prediction(Predictor.CAST, (base_dtype,))
    full = f"CAST {base_dtype.name} to {dtype.name} {name}"
    return Case(full, dtype, raw, prediction, (base,))


def blend(
    name: str,
    dtype: Dtype,
    raw: bytes,
    bases: Sequence[tuple[Dtype, bytes]],
    coefficients: Sequence[float],
) -> Case:
    prediction = Prediction(
        Predictor.BLEND,
        tuple(base_dtype for base_dtype, _ in bases),
        tuple(float(np.float32(c)) for c in coefficients),
    )
    full = f"BLEND {dtype.name} {name}"
    return Case(full, dtype, raw, prediction, tuple(base for _, base in bases))


def quantized(
    name: str, values: np.ndarray, base_dtype: Dtype, row: int, first: int, extra: bytes = b""
) -> Case:
    """An int8 copy of weights, with a scale for each row (or one for all, row 0)."""
    base = as_dtype(values, base_dtype)
    exact = np.frombuffer(base, NUMPY[base_dtype]).astype(np.float32)
    starts = [0, *range(first, values.size, row)] if row else [0]
    scales = np.empty(values.size, np.float32)
    found = []
    for start, end in zip(starts, [*starts[1:], values.size], strict=True):
        scale = np.float32(max(float(np.abs(exact[start:end]).max()) / 127, 1e-6))
        scales[start:end] = scale
        found.append(scale)
    codes = np.clip(np.rint(exact / scales), -128, 127).astype(np.int8)
    prediction = Prediction(
        Predictor.QUANTIZE,
        (base_dtype,),
        row_words=row,
        first_row_words=first,
        scales=np.array(found, "<f4"),
    )
    full = f"QUANTIZE {base_dtype.name} {name}"
    return Case(full, Dtype.I8, codes.tobytes() + extra, prediction, (base,))


def decayed(name: str, raw: bytes | None, base: bytes, steps: Sequence[int] | None = None) -> Case:
    """A fragment (or exactly what is predicted) from a base and steps; of a real decay if None."""
    table = np.array(REAL_STEPS if steps is None else steps, "<i8").astype("<u4")
    if raw is None:
        words = words_of(base, Dtype.F32)
        raw = (words + table[words >> np.uint32(15) & np.uint32(255)]).tobytes()
    prediction = Prediction(Predictor.DECAY, (Dtype.F32,), steps=table)
    return Case(f"DECAY {name}", Dtype.F32, raw, prediction, (base,))


def delta_cases(dtype: Dtype) -> list[Case]:
    base = as_dtype(numbers(), dtype)
    odd = with_specials(base, dtype)
    unit = unit_of(dtype)
    noise = np.random.default_rng(11).bytes(len(base))
    return [
        delta("equal", dtype, base, base),
        delta("one bit", dtype, one_bit(base, dtype), base),
        delta("nudged", dtype, nudged(base, dtype), base),
        delta("nudged a little", dtype, nudged(base, dtype, share=0.05, step=1), base),
        delta("moved far", dtype, nudged(base, dtype, share=1, step=100), base),
        delta("specials in both", dtype, with_specials(nudged(odd, dtype), dtype, 8), odd),
        delta("shuffled rows", dtype, rows_shuffled(base, dtype), base),
        delta("noise", dtype, noise, base),
        delta("shorter base", dtype, nudged(base, dtype), base[: len(base) // 3 + 1]),
        delta("base of one word", dtype, nudged(base, dtype), base[:unit]),
        delta("longer base", dtype, nudged(base, dtype)[: 11_000 * unit], base),
        delta("tail", dtype, nudged(base, dtype) + b"tail.by"[: 7 % unit], base + b"other"),
        delta("one word", dtype, base[:unit], base[unit : 2 * unit]),
        delta("one equal word", dtype, base[:unit], base[:unit]),
    ]


def cast_cases() -> list[Case]:
    values = numbers(seed=2)
    found = []
    for source in FLOATS:
        base = with_specials(as_dtype(values, source), source)
        for target in FLOATS:
            raw = as_dtype(values, target)
            found.append(cast("copy", target, raw, source, base))
            if source is not target:
                odd = with_specials(nudged(raw, target, share=0.05), target, 9)
                found.append(cast("specials, tail", target, odd + b"\1", source, base))
                short = base[: len(base) // 2]
                found.append(cast("short base", target, raw, source, short))
    return found


def blend_cases() -> list[Case]:
    a, b, c = numbers(seed=3), numbers(seed=4), numbers(seed=5)
    found = []
    for dtype in FLOATS:
        bases = [
            (dtype, with_specials(as_dtype(v, dtype), dtype, s)) for s, v in enumerate((a, b, c))
        ]
        for name, values, chosen, coefficients in (
            ("half", a / 2 + b / 2, bases[:2], (0.5, 0.5)),
            ("extrapolated", 2 * a - b, bases[:2], (2, -1)),
            ("three", 0.2 * a + 0.3 * b + 0.5 * c, bases, (0.2, 0.3, 0.5)),
            ("extreme", a, bases[:2], (2.0**20, -(2.0**-20))),
        ):
            raw = with_specials(as_dtype(values, dtype), dtype, 12)
            found.append(blend(name, dtype, raw, chosen, coefficients))
    mixed = [(Dtype.F32, as_dtype(a, Dtype.F32)), (Dtype.BF16, as_dtype(b, Dtype.BF16)[:19_001])]
    raw = as_dtype(a / 4 + 3 * b / 4, Dtype.F16) + b"\7"
    found.append(blend("of other dtypes, short", Dtype.F16, raw, mixed, (0.25, 0.75)))
    return found


def quantize_cases() -> list[Case]:
    values = numbers(seed=6)
    found = []
    for source in FLOATS:
        found += [
            quantized("one scale", values, source, 0, 0),
            quantized("rows", values, source, 100, 100),
            quantized("rows cut", values, source, 256, 17, b"\1\2\3"),
            quantized("row of one", values[:300], source, 1, 1),
        ]
    return found


def decay_cases() -> list[Case]:
    base = as_dtype(numbers(), Dtype.F32)
    odd = with_specials(base, Dtype.F32)
    exact = decayed("", None, odd).raw
    wild = np.random.default_rng(13).integers(0, 1 << 32, 256).tolist()
    return [
        decayed("exact", None, odd),
        decayed("nudged", nudged(exact, Dtype.F32), odd),
        decayed("one bit", one_bit(exact, Dtype.F32), odd),
        decayed("specials in both", with_specials(exact, Dtype.F32, 8), odd),
        decayed("wrong steps", exact, odd, wild),
        decayed("wild steps", nudged(decayed("", None, odd, wild).raw, Dtype.F32), odd, wild),
        decayed("no steps", nudged(base, Dtype.F32), base, [0] * 256),
        decayed("noise", np.random.default_rng(11).bytes(len(base)), base),
        decayed("shorter base", exact, odd[: len(odd) // 3 + 1]),
        decayed("base of one word", exact, odd[:4]),
        decayed("longer base", exact[:44_000], odd),
        decayed("tail", exact + b"tai", odd + b"other"),
        decayed("one word", base[:4], base[4:8]),
    ]


def every_case() -> list[Case]:
    """All of them, for every predictor and dtype."""
    return [
        *(case for dtype in EVERY_KIND for case in delta_cases(dtype)),
        *cast_cases(),
        *blend_cases(),
        *quantize_cases(),
        *decay_cases(),
    ]


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
