"""Predictions: what some fragments say about another one, as words of its dtype.

Pure integer arithmetic, or elementwise IEEE operations in a fixed order on numbers for which
flushing of denormals makes no difference. A prediction may be bad, it may not differ between
machines. Format: library/FORMAT.md, "Predictors".
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fragfs.codec.floats import FLOATS, convert, quantize, widen, word_type
from fragfs.codec.steps import STEPPED, add_steps
from fragfs.errors import FormatError
from fragfs.types import FRAGMENT_BYTES_MAX, Dtype, Predictor

__all__ = ["BLEND_BASES_MAX", "SCALED", "Prediction", "blend_of", "fit_scales", "unit_size"]

Words: TypeAlias = NDArray[np.unsignedinteger[Any]]
Floats: TypeAlias = NDArray[np.float32]

BLEND_BASES_MAX = 3
SCALED = (Dtype.I8,)
"""Dtypes that a float can be quantized to."""

_BLOCK_WORDS = 1 << 15
"""Words predicted at a time: all temporaries of a block fit the second-level cache."""

_COEFFICIENT_MIN = 2.0**-20
_COEFFICIENT_MAX = 2.0**20

_SCALE_MIN = 2.0**-60
_SCALE_MAX = 2.0**60

_BASE = struct.Struct("<B")  # dtype of a base
_BLEND = struct.Struct("<f")
_ROWS = struct.Struct("<II")  # words per row, words of the first row


def unit_size(dtype: Dtype) -> int:
    """Bytes of the words that a dtype's fragments are cut into; complex numbers are pairs."""
    if dtype in (Dtype.C64, Dtype.C128):
        return dtype.bits // 16
    return dtype.bits // 8 or 1


@dataclass(frozen=True, slots=True)
class Prediction:
    """How words are predicted, but not from which bytes.

    Attributes:
        predictor: DELTA, CAST, BLEND, QUANTIZE or DECAY.
        dtypes: How each base reads; of DELTA and DECAY it is the target's dtype.
        coefficients: BLEND: one f32 for each base.
        row_words: QUANTIZE: words that share a scale; 0 if all do.
        first_row_words: QUANTIZE: words before the second row begins; 0 if all share a scale.
        scales: QUANTIZE: one f32 for each row.
        steps: DECAY: STEP_COUNT words.
    """

    predictor: Predictor
    dtypes: tuple[Dtype, ...]
    coefficients: tuple[float, ...] = ()
    row_words: int = 0
    first_row_words: int = 0
    scales: Floats = field(default_factory=lambda: np.zeros(0, np.float32))
    steps: Words = field(default_factory=lambda: np.zeros(0, "<u4"))

    def predict(self, bases: Sequence[memoryview], dtype: Dtype, count: int) -> Words:
        """The first `count` words.

        Args:
            bases: Raw bytes of each base, at least `count` words of its dtype.
            dtype: What to predict words of.
            count: How many; at least 1.

        Returns:
            Words; for DELTA a view of the base.

        Raises:
            FormatError: A base is too short.
        """
        inputs = [
            _words(base, unit_size(base_dtype), count)
            for base, base_dtype in zip(bases, self.dtypes, strict=True)
        ]
        if self.predictor is Predictor.DELTA:
            return inputs[0]
        if self.predictor is Predictor.DECAY:
            return add_steps(inputs[0], self.steps)
        if self.predictor is not Predictor.QUANTIZE:
            coefficients = self.coefficients if self.predictor is Predictor.BLEND else None
            return convert(inputs, self.dtypes, coefficients, dtype)
        out: Words = np.empty(count, word_type(dtype))
        scales = self._scales(count)
        for start in range(0, count, _BLOCK_WORDS):
            part = slice(start, start + _BLOCK_WORDS)
            out[part] = quantize(widen(inputs[0][part], self.dtypes[0]), scales[part])
        return out

    def _scales(self, count: int) -> Floats:
        if not self.row_words:
            return np.broadcast_to(self.scales, count)
        # Rows from a damaged file may be of any length: never more words than there are.
        repeats = np.full(self.scales.size, min(self.row_words, count))
        repeats[0] = min(self.first_row_words, count)
        return np.repeat(self.scales, repeats)[:count]

    def pack(self) -> bytes:
        """The fields that `parse` reads; scales and steps are stored apart."""
        match self.predictor:
            case Predictor.DELTA | Predictor.DECAY:
                return b""
            case Predictor.CAST:
                return _BASE.pack(self.dtypes[0].code)
            case Predictor.BLEND:
                return b"".join(
                    _BASE.pack(dtype.code) + _BLEND.pack(coefficient)
                    for dtype, coefficient in zip(self.dtypes, self.coefficients, strict=True)
                )
            case _:
                return _BASE.pack(self.dtypes[0].code) + _ROWS.pack(
                    self.row_words, self.first_row_words
                )


def parse_prediction(
    predictor: Predictor, params: memoryview, dtype: Dtype, base_count: int
) -> tuple[Prediction, memoryview]:
    """Read what `Prediction.pack` wrote, and give what is left of `params`.

    Raises:
        FormatError: The fields break a rule of the format, or the number of bases does.
    """
    wanted = range(2, BLEND_BASES_MAX + 1) if predictor is Predictor.BLEND else range(1, 2)
    if base_count not in wanted:
        raise FormatError("a prediction has the wrong number of bases", actual=base_count)
    if predictor is Predictor.DELTA:
        return Prediction(predictor, (dtype,)), params
    if predictor is Predictor.DECAY:
        if dtype not in STEPPED:
            raise FormatError(f"{dtype.name} has no steps", remedy="upgrade fragfs")
        return Prediction(predictor, (dtype,)), params
    dtypes, coefficients = [], []
    for _ in range(base_count):
        (code,), params = _take(_BASE, params)
        base_dtype = Dtype.of_code(code)
        if base_dtype not in FLOATS:
            raise FormatError("a base has no dtype to predict from", actual=code)
        dtypes.append(base_dtype)
        if predictor is Predictor.BLEND:
            (coefficient,), params = _take(_BLEND, params)
            if not _COEFFICIENT_MIN <= abs(coefficient) <= _COEFFICIENT_MAX:
                raise FormatError("a blend has an impossible coefficient")
            coefficients.append(coefficient)
    is_known = dtype in (SCALED if predictor is Predictor.QUANTIZE else FLOATS)
    if not is_known:
        raise FormatError(f"{dtype.name} cannot be predicted this way", remedy="upgrade fragfs")
    if predictor is not Predictor.QUANTIZE:
        return Prediction(predictor, tuple(dtypes), tuple(coefficients)), params
    (row_words, first_row_words), params = _take(_ROWS, params)
    if first_row_words > row_words or bool(row_words) != bool(first_row_words):
        raise FormatError("impossible rows of a quantized fragment", actual=row_words)
    return (
        Prediction(predictor, tuple(dtypes), row_words=row_words, first_row_words=first_row_words),
        params,
    )


def scale_count(prediction: Prediction, count: int) -> int:
    """Scales that `count` words need.

    Raises:
        FormatError: More than there are words.
    """
    if not prediction.row_words:
        return 1
    rest = max(0, count - prediction.first_row_words)
    return 1 + -(-rest // prediction.row_words)


def check_scales(scales: Floats) -> None:
    """Refuse scales that no writer stores.

    Raises:
        FormatError: One is not a plain positive number of moderate size.
    """
    if not bool(np.all((scales >= _SCALE_MIN) & (scales <= _SCALE_MAX))):
        raise FormatError("a quantized fragment has an impossible scale")


def _take(layout: struct.Struct, params: memoryview) -> tuple[tuple[Any, ...], memoryview]:
    if len(params) < layout.size:
        raise FormatError("parameters of a prediction end early", actual=len(params))
    return layout.unpack_from(params), params[layout.size :]


def _words(raw: memoryview, unit: int, count: int) -> Words:
    if len(raw) < unit * count or unit * count > FRAGMENT_BYTES_MAX:
        raise FormatError("a base is too short", expected=unit * count, actual=len(raw))
    words: Words = np.frombuffer(raw, f"<u{unit}", count)
    # A base stored RAW is a view of its record: its words may lie anywhere.
    return words if words.flags.aligned else words.copy()


# --- fitting, for writers only: nothing here needs to be the same everywhere


def blend_of(dtypes: Sequence[Dtype], coefficients: Sequence[float]) -> Prediction | None:
    """The blend of bases that read so; None if a coefficient is none that can be stored."""
    stored = tuple(float(np.float32(value)) for value in coefficients)
    if not all(_COEFFICIENT_MIN <= abs(value) <= _COEFFICIENT_MAX for value in stored):
        return None
    return Prediction(Predictor.BLEND, tuple(dtypes), stored)


def fit_scales(
    target: Words, dtype: Dtype, base: tuple[Words, Dtype], row_words: int, first_row_words: int
) -> Prediction | None:
    """Scales of a quantization, one for each row; None if it is none.

    Args:
        target: All words of what is to be predicted.
        dtype: How they read; one of SCALED.
        base: As many words of the base, and how they read.
        row_words: Words to a row; 0 to fit one scale for all.
        first_row_words: Words of the first row, which may be the end of one.
    """
    assert dtype in SCALED
    codes = np.abs(target.view(np.int8).astype(np.float32))
    with np.errstate(all="ignore"):
        sizes = np.abs(widen(*base))
        # Rounding to a code puts the scale between these two.
        low = np.where(codes > 0, sizes / (codes + np.float32(0.5)), np.float32(0))
        high = np.where(codes > 0, sizes / (codes - np.float32(0.5)), np.float32(np.inf))
    starts = np.zeros(1, np.intp)
    if row_words:
        starts = np.append(starts, np.arange(first_row_words, target.size, row_words))
    with np.errstate(all="ignore"):
        lowest = np.maximum.reduceat(np.where(codes < 127, low, np.float32(0)), starts)
        highest = np.minimum.reduceat(high, starts)
        # Where they contradict each other, the copy was made of something close to the base.
        squares = np.add.reduceat(codes * codes, starts)
        fitted = np.add.reduceat(np.nan_to_num(sizes) * codes, starts) / squares
        scales = np.where(lowest <= highest, (lowest + highest) / 2, fitted).astype(np.float32)
    scales = np.where(
        np.isfinite(scales) & (scales >= _SCALE_MIN) & (scales <= _SCALE_MAX), scales, 1
    ).astype("<f4")
    return Prediction(
        Predictor.QUANTIZE,
        (base[1],),
        row_words=row_words,
        first_row_words=first_row_words if row_words else 0,
        scales=scales,
    )
