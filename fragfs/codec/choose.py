"""Best-of encoding of a fragment, given fragments that may resemble it.

Every form is tried on a sample first; the smallest is encoded whole and competes with solo coding by
what it really stores. Similarity nominates, bytes decide. Pure and thread-safe: bytes to bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from fragfs.codec.floats import FLOATS
from fragfs.codec.predict import SCALED, Prediction, Words, fit_blend, fit_scales, unit_size
from fragfs.codec.predicted import covered_words, encode_predicted
from fragfs.codec.residual import encode_residual
from fragfs.codec.solo import Buffer, Encoding, encode_solo
from fragfs.types import Dtype, Level, Predictor

__all__ = ["Candidate", "Choice", "Rows", "encode_best"]

_SLICE_COUNT = 8
_SLICE_WORDS = 4096
"""A sample is 2**15 words in runs long enough to show rows that nobody trained."""

_BLEND_PAYS_MIN = 0.02
"""Below this share of its size a fragment predicted from one base is not worth a second one."""
_BLEND_GAIN = 0.8
"""A second base must bring a fragment below this share of what the first one brings: it doubles what
a read decodes."""
_BLENDED_CANDIDATES_MAX = 3

_BASE_GAIN = 0.95
"""What a base must save against solo coding to be worth decoding it at every read."""
_CLOSE = 0.85
"""Estimates closer than this are settled by encoding both ways."""
_GROUPING_GAIN = 0.92
"""Level BALANCED groups residuals that get below this share of their ungrouped size."""
_SHALLOW_GAIN = 0.97
"""A candidate must beat one that needs fewer other fragments by this factor."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A fragment that may serve as a base.

    Attributes:
        raw: Its bytes.
        dtype: How they read.
        depth: How many fragments reading it takes, itself included.
    """

    raw: memoryview
    dtype: Dtype
    depth: int = 1


@dataclass(frozen=True, slots=True)
class Rows:
    """How the words of a fragment lie in the rows of its tensor.

    Attributes:
        words: Words of a row; 0 if unknown.
        first_words: Words that end the row in which the fragment starts.
    """

    words: int = 0
    first_words: int = 0


@dataclass(frozen=True, slots=True)
class Choice:
    """The encoding chosen, and the candidates it reads (by index, in the predictor's order)."""

    encoding: Encoding
    bases: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class _Trial:
    """A prediction that was tried on the sample.

    Attributes:
        bases: Indices of its candidates.
        prediction: How it predicts; scales of a quantization are fitted to the whole fragment.
        share: Stored / raw of the sample.
        grouped: Whether grouping is what stores that.
        depth: Fragments that reading the result takes besides itself, at most.
    """

    bases: tuple[int, ...]
    prediction: Prediction
    share: float
    grouped: bool
    depth: int


class _Sample:
    """Runs of words spread evenly over the part of a fragment that some bases cover."""

    def __init__(self, count: int) -> None:
        if count <= _SLICE_COUNT * _SLICE_WORDS:
            self._slices = [slice(0, count)]
        else:
            step = (count - _SLICE_WORDS) // (_SLICE_COUNT - 1)
            self._slices = [
                slice(index * step, index * step + _SLICE_WORDS) for index in range(_SLICE_COUNT)
            ]

    def take(self, raw: Buffer, dtype: Dtype) -> Words:
        """The sample's words of `raw`."""
        words: Words = np.frombuffer(memoryview(raw), f"<u{unit_size(dtype)}", self._end(raw, dtype))
        return np.concatenate([words[part] for part in self._slices])

    def _end(self, raw: Buffer, dtype: Dtype) -> int:
        return len(memoryview(raw)) // unit_size(dtype)


def encode_best(
    raw: Buffer,
    dtype: Dtype,
    candidates: Sequence[Candidate],
    *,
    level: Level,
    zstd_level: int,
    may_combine: Callable[[Sequence[int]], bool] = lambda _: True,
    rows: Rows = Rows(),
) -> Choice:
    """Encode a fragment the smallest way, from the candidates or from nothing.

    Args:
        raw: The fragment's bytes.
        dtype: How to read them.
        candidates: Fragments that may serve as bases, the likeliest first.
        level: What to prefer.
        zstd_level: zstd level where match finding pays.
        may_combine: Whether the candidates with these indices may all be bases of one fragment.
        rows: Rows of the tensor, for quantized copies.
    """
    view = memoryview(raw).cast("B")
    trials = _try_singles(view, dtype, candidates, level, rows)
    if not trials:
        return Choice(encode_solo(view, dtype, zstd_level=zstd_level))
    trials.sort(key=_rank)
    best = trials[0]
    if best.share > _BLEND_PAYS_MIN:
        blends = _try_blends(view, dtype, candidates, trials, level, may_combine)
        best = min([best, *blends], key=lambda trial: trial.share)
    solo_share = _solo_share(view, dtype, zstd_level) if best.share > 0.25 else 1.0
    if best.share > solo_share / _BASE_GAIN:
        return Choice(encode_solo(view, dtype, zstd_level=zstd_level))
    encoding = encode_predicted(
        view,
        dtype,
        best.prediction,
        [candidates[index].raw for index in best.bases],
        grouped=best.grouped,
        zstd_level=zstd_level,
    )
    if encoding.size > _CLOSE * solo_share * len(view):
        solo = encode_solo(view, dtype, zstd_level=zstd_level)
        if encoding.size > _BASE_GAIN * solo.size:
            return Choice(solo)
    return Choice(encoding, best.bases)


def _rank(trial: _Trial) -> float:
    """Smaller is better; each further fragment to read must pay for itself."""
    return trial.share / _SHALLOW_GAIN**trial.depth


def _try_singles(
    view: memoryview, dtype: Dtype, candidates: Sequence[Candidate], level: Level, rows: Rows
) -> list[_Trial]:
    trials = []
    for index, candidate in enumerate(candidates):
        prediction = _predict_single(dtype, candidate)
        if prediction is None:
            continue
        count = covered_words(view, dtype, [(candidate.raw, candidate.dtype)])
        # A base that covers a small part of a fragment saves no more than that part.
        if count * unit_size(dtype) < len(view) // 4:
            continue
        if prediction.predictor is Predictor.QUANTIZE:
            prediction = _fit_scales(view, dtype, candidate, count, rows)
            if prediction is None:
                continue
        trial = _try(view, dtype, candidates, (index,), prediction, level)
        trials.append(trial)
        if trial.share < 1e-3:
            break
    return trials


def _predict_single(dtype: Dtype, candidate: Candidate) -> Prediction | None:
    if candidate.dtype is dtype:
        return Prediction(Predictor.DELTA, (dtype,))
    if candidate.dtype in FLOATS and dtype in FLOATS:
        return Prediction(Predictor.CAST, (candidate.dtype,))
    if candidate.dtype in FLOATS and dtype in SCALED:
        return Prediction(Predictor.QUANTIZE, (candidate.dtype,))
    return None


def _fit_scales(
    view: memoryview, dtype: Dtype, candidate: Candidate, count: int, rows: Rows
) -> Prediction | None:
    target = np.frombuffer(view, f"<u{unit_size(dtype)}", count)
    base = np.frombuffer(candidate.raw, f"<u{unit_size(candidate.dtype)}", count)
    words, first = (rows.words, rows.first_words) if 0 < rows.words < count else (0, 0)
    return fit_scales(target, dtype, (base, candidate.dtype), words, first)


def _try_blends(
    view: memoryview,
    dtype: Dtype,
    candidates: Sequence[Candidate],
    trials: list[_Trial],
    level: Level,
    may_combine: Callable[[Sequence[int]], bool],
) -> list[_Trial]:
    if dtype not in FLOATS:
        return []
    close = [trial.bases[0] for trial in trials if candidates[trial.bases[0]].dtype in FLOATS]
    close = close[: _BLENDED_CANDIDATES_MAX + (level is Level.SMALL)]
    found = []
    limit = trials[0].share * _BLEND_GAIN
    for size in (2, 3) if level is Level.SMALL else (2,):
        for bases in combinations(close, size):
            if not may_combine(bases):
                continue
            pairs = [(candidates[index].raw, candidates[index].dtype) for index in bases]
            sample = _Sample(covered_words(view, dtype, pairs))
            prediction = fit_blend(
                sample.take(view, dtype), dtype, [(sample.take(r, d), d) for r, d in pairs]
            )
            if prediction is None:
                continue
            trial = _try(view, dtype, candidates, bases, prediction, level)
            if trial.share < limit:
                found.append(trial)
        if found:
            limit = min(trial.share for trial in found) * _BLEND_GAIN
    return found


def _try(
    view: memoryview,
    dtype: Dtype,
    candidates: Sequence[Candidate],
    bases: tuple[int, ...],
    prediction: Prediction,
    level: Level,
) -> _Trial:
    """What a prediction stores of the sample, as a share of its size."""
    pairs = [(candidates[index].raw, candidates[index].dtype) for index in bases]
    count = covered_words(view, dtype, pairs)
    sample = _Sample(count)
    words = sample.take(view, dtype)
    if prediction.predictor is Predictor.QUANTIZE:
        # Its scales belong to places: predict all, then take the sample.
        whole = prediction.predict([raw for raw, _ in pairs], dtype, count)
        predicted = sample.take(whole.data, dtype)
    else:
        taken = [sample.take(raw, base_dtype).data.cast("B") for raw, base_dtype in pairs]
        predicted = prediction.predict(taken, dtype, words.size)
    sizes = {}
    if level is not Level.SMALL:
        sizes[False] = _residual_size(words, predicted, dtype, grouped=False)
    if level is not Level.FAST and sizes.get(False) != 0:
        sizes[True] = _residual_size(words, predicted, dtype, grouped=True)
    grouped = True in sizes and sizes[True] <= sizes.get(False, np.inf) * _GROUPING_GAIN
    share = sizes[grouped] / words.nbytes if sizes[grouped] else 0.0
    # What no base covers is stored solo: count it as not shrinking at all.
    covered = count * unit_size(dtype) / len(view)
    depth = sum(candidates[index].depth for index in bases)
    return _Trial(bases, prediction, share * covered + (1 - covered), grouped, depth)


def _residual_size(words: Words, predicted: Words, dtype: Dtype, *, grouped: bool) -> int:
    if np.array_equal(words, predicted):
        return 0
    params, payload = encode_residual(words, predicted, dtype, grouped=grouped, level=1)
    return len(params) + sum(map(len, payload))


def _solo_share(view: memoryview, dtype: Dtype, zstd_level: int) -> float:
    sample = _Sample(len(view) // unit_size(dtype)).take(view, dtype)
    raw = sample.data.cast("B")
    return encode_solo(raw, dtype, zstd_level=min(zstd_level, 3)).size / len(raw)
