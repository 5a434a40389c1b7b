"""Best-of encoding of a fragment, given fragments that may resemble it.

Every form is tried on a sample first; the smallest is encoded whole and competes with solo coding
by what it really stores. Similarity nominates, bytes decide. Pure and thread-safe: bytes to bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, islice

import numpy as np

from fragfs.codec.floats import FLOATS, widen
from fragfs.codec.predict import (
    SCALED,
    Prediction,
    Words,
    fit_blend,
    fit_scales,
    unit_size,
)
from fragfs.codec.predicted import covered_words, encode_predicted
from fragfs.codec.residual import encode_residual, estimate_residual
from fragfs.codec.solo import Buffer, Encoding, encode_solo
from fragfs.types import Dtype, Level, Predictor

__all__ = [
    "NO_ROWS",
    "Candidate",
    "Choice",
    "Rows",
    "encode_best",
    "encode_from",
    "estimate_blends",
    "estimate_single",
    "estimate_solo",
]

_SLICE_COUNT = 16
_SLICE_WORDS = 2048
"""A sample is 2**15 words in runs long enough to show rows that nobody trained."""

_BLEND_PAYS_MIN = 0.02
"""Below this share of its size a fragment predicted from one base is not worth a second one."""
_BLEND_GAIN = {Level.FAST: 0.7, Level.BALANCED: 0.88, Level.SMALL: 0.92}
"""A further base must bring a fragment below this share of what it takes without: it is one more to
decode at every read."""
_BLENDS_TRIED = {Level.FAST: 1, Level.BALANCED: 2, Level.SMALL: 3}
"""Sets of bases tried on the sample, the best of those that a few words were fitted to."""
_SCREEN_WORDS = 4096
_ESTIMATES_DIFFER = 1.1
_WIDE_ESTIMATES_DIFFER = 1.5
"""Estimates that are closer than this are settled. They know nothing of runs, which decide between
checkpoints of f32 weights."""

_CANDIDATES = {Level.FAST: (2,), Level.BALANCED: (3, 5), Level.SMALL: (4, 8)}
"""Candidates tried at a time: more of them only if the first do not make a fragment small."""
_CANDIDATES_NARROW = (4, 8)
"""For formats of one byte, whose own rounding hides which of a family they were made of."""
_GOOD = 0.08
_EXTRAPOLATED_BITS_MIN = 32
"""Checkpoints of a run are extrapolated as well: what weight decay and its rounding have done to
the last bits of f32 weights between two checkpoints they do again up to the next. Shorter formats
do not show it. (Embeddings of a run: 0.118 instead of 0.143. Scaling one base by the decay:
0.23.)"""

_SETTLED = {Level.FAST: 1, Level.BALANCED: 2, Level.SMALL: 3}
"""Of the candidates with the best estimates, how many are settled by encoding the sample."""
_SETTLED_SHARE_MIN = 0.01
"""Below this share there is nothing to settle."""

_BASE_GAIN = 0.95
"""What a base must save against solo coding to be worth decoding it at every read."""
_CLOSE = 0.85
"""Estimates closer than this are settled by encoding both ways."""
_SURE = 0.25
"""Below this share no fragment of weights is stored solo: what solo coding takes is not asked."""
_GROUPING_GAIN = 0.92
"""Level BALANCED groups residuals that get below this share of their ungrouped size."""
_SHALLOW_GAIN = 0.9
"""A candidate must beat one that needs fewer other fragments by this factor for each: reads decode
less, and what is shallow can be blended later on."""


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


NO_ROWS = Rows()


@dataclass(frozen=True, slots=True)
class Choice:
    """The encoding chosen, and the candidates it reads: by index, in the predictor's order.

    Attributes:
        encoding: The encoding.
        bases: Indices of the candidates, in the order in which they were given.
        raws: Their bytes.
    """

    encoding: Encoding
    bases: tuple[int, ...] = ()
    raws: tuple[memoryview, ...] = ()


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
        words: Words = np.frombuffer(
            memoryview(raw), f"<u{unit_size(dtype)}", self._end(raw, dtype)
        )
        return np.concatenate([words[part] for part in self._slices])

    def _end(self, raw: Buffer, dtype: Dtype) -> int:
        return len(memoryview(raw)) // unit_size(dtype)


def encode_best(
    raw: Buffer,
    dtype: Dtype,
    candidates: Iterable[Candidate],
    *,
    level: Level,
    zstd_level: int,
    may_combine: Callable[[Sequence[int]], bool] = lambda _: True,
    rows: Rows = NO_ROWS,
) -> Choice:
    """Encode a fragment the smallest way, from the candidates or from nothing.

    Args:
        raw: The fragment's bytes.
        dtype: How to read them.
        candidates: Fragments that may serve as bases, the likeliest first. No more are taken than
            the level allows, and fewer if the first do well.
        level: What to prefer.
        zstd_level: zstd level where match finding pays.
        may_combine: Whether the candidates with these indices may all be bases of one fragment.
        rows: Rows of the tensor, for quantized copies.
    """
    view = memoryview(raw).cast("B")
    taken: list[Candidate] = []
    trials: list[_Trial] = []
    source = iter(candidates)
    for count in _CANDIDATES[level] if dtype.bits > 8 else _CANDIDATES_NARROW:
        fresh = list(islice(source, count))
        trials += _try_singles(view, dtype, fresh, level, rows, first=len(taken))
        taken += fresh
        if not fresh or (trials and min(trial.share for trial in trials) < _GOOD):
            break
    if not trials:
        return Choice(encode_solo(view, dtype, zstd_level=zstd_level))
    trials.sort(key=_rank)
    best = trials[0]
    limit = _rank(best) * _differ(dtype)
    some = [trial for trial in trials[: _SETTLED[level]] if _rank(trial) < limit]
    if len(some) > 1:
        best = min((_settle(view, dtype, taken, one, level) for one in some), key=_rank)
    if best.share > _BLEND_PAYS_MIN:
        indices = [trial.bases[0] for trial in trials]
        limit = best.share * _BLEND_GAIN[level]
        blends = _try_blends(view, dtype, taken, indices, level, may_combine, limit)
        best = min([best, *blends], key=lambda trial: trial.share)
    best = _settle_grouping(view, dtype, taken, best, level)
    solo_share = estimate_solo(view, dtype, zstd_level) if best.share > _SURE else 1.0
    if best.share > solo_share / _BASE_GAIN:
        return Choice(encode_solo(view, dtype, zstd_level=zstd_level))
    encoding = _encode(view, dtype, taken, best, zstd_level)
    if encoding.size > _CLOSE * solo_share * len(view):
        solo = encode_solo(view, dtype, zstd_level=zstd_level)
        if encoding.size > _BASE_GAIN * solo.size:
            return Choice(solo)
    return Choice(encoding, best.bases, tuple(taken[index].raw for index in best.bases))


def encode_from(
    raw: Buffer,
    dtype: Dtype,
    bases: Sequence[Candidate],
    *,
    level: Level,
    zstd_level: int,
    rows: Rows = NO_ROWS,
) -> Encoding | None:
    """Encode a fragment from these bases, all of them; None if they cannot predict it."""
    view = memoryview(raw).cast("B")
    if len(bases) == 1:
        found = _try_singles(view, dtype, bases, level, rows)
    else:
        everything = range(len(bases))
        found = [
            trial
            for trial in _try_blends(view, dtype, bases, everything, level, lambda _: True, 1.0)
            if len(trial.bases) == len(bases)
        ]
    if not found:
        return None
    best = min(found, key=lambda trial: trial.share)
    best = _settle_grouping(view, dtype, bases, best, level)
    return _encode(view, dtype, bases, best, zstd_level)


def estimate_single(
    raw: Buffer, dtype: Dtype, base: Candidate, *, level: Level, rows: Rows = NO_ROWS
) -> float | None:
    """Stored / raw of a fragment predicted from a base, from a sample; None if it cannot be."""
    view = memoryview(raw).cast("B")
    found = _try_singles(view, dtype, [base], level, rows)
    return _settle(view, dtype, [base], found[0], level).share if found else None


def estimate_blends(
    raw: Buffer, dtype: Dtype, bases: Sequence[Candidate], *, level: Level
) -> dict[tuple[int, ...], float]:
    """Stored / raw of a fragment predicted from several of these, by their indices."""
    view = memoryview(raw).cast("B")
    everything = range(len(bases))
    trials = _try_blends(view, dtype, bases, everything, level, lambda _: True, 1.0)
    return {trial.bases: trial.share for trial in trials}


def estimate_solo(raw: Buffer, dtype: Dtype, zstd_level: int) -> float:
    """Stored / raw of a fragment predicted from nothing, from a sample."""
    view = memoryview(raw).cast("B")
    if len(view) < unit_size(dtype):
        return 1.0
    sample = _Sample(len(view) // unit_size(dtype)).take(view, dtype)
    taken = sample.data.cast("B")
    return encode_solo(taken, dtype, zstd_level=min(zstd_level, 3)).size / len(taken)


def _encode(
    view: memoryview,
    dtype: Dtype,
    candidates: Sequence[Candidate],
    trial: _Trial,
    zstd_level: int,
) -> Encoding:
    return encode_predicted(
        view,
        dtype,
        trial.prediction,
        [candidates[index].raw for index in trial.bases],
        grouped=trial.grouped,
        zstd_level=zstd_level,
    )


def _differ(dtype: Dtype) -> float:
    """How far apart estimates must be to be believed."""
    wide = dtype.bits >= _EXTRAPOLATED_BITS_MIN
    return _WIDE_ESTIMATES_DIFFER if wide else _ESTIMATES_DIFFER


def _rank(trial: _Trial) -> float:
    """Smaller is better; each further fragment to read must pay for itself."""
    return trial.share / _SHALLOW_GAIN**trial.depth


def _try_singles(
    view: memoryview,
    dtype: Dtype,
    candidates: Sequence[Candidate],
    level: Level,
    rows: Rows,
    *,
    first: int = 0,
) -> list[_Trial]:
    """Each candidate alone; `first` is the index of the first of them."""
    trials = []
    for index, candidate in enumerate(candidates):
        prediction = _predict_single(dtype, candidate)
        if prediction is None:
            continue
        count = covered_words(view, dtype, [(candidate.raw, candidate.dtype)])
        # A base that covers a small part of a fragment saves no more than that part.
        if not count or count * unit_size(dtype) < len(view) // 4:
            continue
        if prediction.predictor is Predictor.QUANTIZE:
            prediction = _fit_scales(view, dtype, candidate, count, rows)
            if prediction is None:
                continue
        trial = _try(view, dtype, candidates, (index,), prediction, level, exact=False)
        trials.append(replace(trial, bases=(first + index,)))
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
    indices: Sequence[int],
    level: Level,
    may_combine: Callable[[Sequence[int]], bool],
    limit: float,
) -> list[_Trial]:
    """Blends of the candidates with these indices that store less than `limit`, a share."""
    if dtype not in FLOATS:
        return []
    usable = [index for index in indices if candidates[index].dtype in FLOATS]
    found: list[_Trial] = []
    for size in (2, 3) if level is Level.SMALL else (2,):
        sets = [bases for bases in combinations(usable, size) if may_combine(bases)]
        for bases in _screen(view, dtype, candidates, sets)[: _BLENDS_TRIED[level]]:
            pairs = [(candidates[index].raw, candidates[index].dtype) for index in bases]
            sample = _Sample(covered_words(view, dtype, pairs))
            fitted = fit_blend(
                sample.take(view, dtype), dtype, [(sample.take(r, d), d) for r, d in pairs]
            )
            predictions = [fitted] if fitted is not None else []
            if size == 2 and dtype.bits >= _EXTRAPOLATED_BITS_MIN:
                dtypes = tuple(base_dtype for _, base_dtype in pairs)
                predictions += [
                    Prediction(Predictor.BLEND, dtypes, coefficients)
                    for coefficients in ((2.0, -1.0), (-1.0, 2.0))
                ]
            for prediction in predictions:
                trial = _try(view, dtype, candidates, bases, prediction, level, exact=False)
                if trial.share < limit * _differ(dtype):
                    trial = _settle(view, dtype, candidates, trial, level)
                if trial.share < limit:
                    found.append(trial)
        if found:
            limit = min(trial.share for trial in found) * _BLEND_GAIN[level]
    return found


def _screen(
    view: memoryview,
    dtype: Dtype,
    candidates: Sequence[Candidate],
    sets: list[tuple[int, ...]],
) -> list[tuple[int, ...]]:
    """The sets of bases in the order of how well a blend of each fits some words."""
    used = sorted({index for bases in sets for index in bases})
    if len(sets) < 2:
        return sets
    pairs = [(candidates[index].raw, candidates[index].dtype) for index in used]
    count = covered_words(view, dtype, pairs)
    step = max(1, count // _SCREEN_WORDS)
    columns = []
    for raw, column_dtype in ((view, dtype), *pairs):
        words = np.frombuffer(raw, f"<u{unit_size(column_dtype)}", count)[::step]
        floats = widen(np.ascontiguousarray(words), column_dtype)
        with np.errstate(all="ignore"):  # signalling NaNs
            columns.append(np.nan_to_num(floats.astype(np.float64), posinf=0, neginf=0))
    products = np.stack(columns) @ np.stack(columns).T
    place = {index: position + 1 for position, index in enumerate(used)}

    def left_over(bases: tuple[int, ...]) -> float:
        chosen = [place[index] for index in bases]
        square = products[np.ix_(chosen, chosen)]
        given = products[chosen, 0]
        coefficients = np.linalg.lstsq(square, given, rcond=1e-12)[0]
        return float(
            products[0, 0] - 2 * coefficients @ given + coefficients @ square @ coefficients
        )

    return sorted(sets, key=left_over)


def _try(
    view: memoryview,
    dtype: Dtype,
    candidates: Sequence[Candidate],
    bases: tuple[int, ...],
    prediction: Prediction,
    level: Level,
    *,
    exact: bool,
) -> _Trial:
    """What a prediction stores of the sample, as a share of its size.

    Estimated, or encoded if `exact`: that takes three times as long, and sees runs.
    """
    words, predicted, covered = _predict_sample(view, dtype, candidates, bases, prediction)
    grouped = level is not Level.FAST
    if np.array_equal(words, predicted):
        size = 0
    elif exact:
        params, payload = encode_residual(words, predicted, dtype, grouped=grouped, level=1)
        size = len(params) + sum(map(len, payload))
    else:
        size = estimate_residual(words, predicted, dtype, grouped=grouped)
    # What no base covers is stored solo: count it as not shrinking at all.
    share = size / words.nbytes * covered + (1 - covered)
    depth = sum(candidates[index].depth for index in bases)
    return _Trial(bases, prediction, share, grouped, depth)


def _predict_sample(
    view: memoryview,
    dtype: Dtype,
    candidates: Sequence[Candidate],
    bases: tuple[int, ...],
    prediction: Prediction,
) -> tuple[Words, Words, float]:
    """Sampled words, what they are predicted to be, and which share of the fragment is covered."""
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
    return words, predicted, count * unit_size(dtype) / len(view)


def _settle(
    view: memoryview, dtype: Dtype, candidates: Sequence[Candidate], trial: _Trial, level: Level
) -> _Trial:
    """A trial that was estimated, encoded."""
    if trial.share < _SETTLED_SHARE_MIN or level is Level.FAST:
        return trial
    return _try(view, dtype, candidates, trial.bases, trial.prediction, level, exact=True)


def _settle_grouping(
    view: memoryview, dtype: Dtype, candidates: Sequence[Candidate], trial: _Trial, level: Level
) -> _Trial:
    """Level BALANCED groups only where that saves enough to be worth the decoder's time."""
    if level is not Level.BALANCED or trial.share < _SETTLED_SHARE_MIN:
        return trial
    words, predicted, _ = _predict_sample(view, dtype, candidates, trial.bases, trial.prediction)
    grouped, plain = (
        estimate_residual(words, predicted, dtype, grouped=grouped) for grouped in (True, False)
    )
    return replace(trial, grouped=grouped < _GROUPING_GAIN * plain)
