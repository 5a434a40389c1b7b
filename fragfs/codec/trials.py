"""Predictions of a fragment tried on a sample of it, before one of them is encoded whole.

Everything that is sampled is sampled once. Pure; a `Trials` is for one fragment and one thread.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from operator import attrgetter

import numpy as np

from fragfs.codec.blends import BlendFits, fit_blend
from fragfs.codec.entropy import Bytes
from fragfs.codec.floats import FLOATS
from fragfs.codec.predict import SCALED, Prediction, Words, fit_scales, unit_size
from fragfs.codec.predicted import covered_words
from fragfs.codec.residual import encode_residual, estimate_residual, store_streams
from fragfs.codec.steps import STEPPED, fit_steps, pack_steps
from fragfs.types import Dtype, Level, Predictor

__all__ = [
    "NO_ROWS",
    "Candidate",
    "Rows",
    "Trial",
    "Trials",
    "sample_words",
]

_SLICE_COUNT = 16
_SLICE_WORDS = 2048
"""A sample is 2**15 words in runs long enough to show rows that nobody trained."""

_BLEND_GAIN = {Level.FAST: 0.7, Level.BALANCED: 0.88, Level.SMALL: 0.92}
"""A further base must bring a fragment below this share of what it takes without: it is one more to
decode at every read."""
_BLENDS_TRIED = {Level.FAST: 1, Level.BALANCED: 2, Level.SMALL: 3}
"""Sets of bases tried on the sample, the best of those that a few words were fitted to."""
_SCREEN_STEP = 4
"""Which sets these are is found from one in so many words; coefficients need all of them."""
_BLEND_FITS = 0.8
"""What a blend gets wrong, squared, must be below this share of what its best base gets wrong: the
gains above are not to be had with less. Not so for wide floats (see _WIDE_BITS)."""
_WIDE_BITS = 32
"""Of words this wide, checkpoints of a run are extrapolated as well: what weight decay and its
rounding have done to the last bits of f32 weights between two checkpoints they do again up to the
next. Shorter formats do not show it. (Embeddings of a run: 0.118 instead of 0.143. Scaling one base
by the decay: 0.23.) And their estimates are settled: these know nothing of runs, which decide
between checkpoints of f32 weights. With bf16 settling found nothing that estimates had not."""
_SETTLED_WITHIN = 1.5
"""Estimates that are this much larger than the best are believed without settling."""
_SETTLED_SHARE_MIN, _SETTLED_SHARE_MAX = 0.01, 0.25
"""Outside of these shares there is nothing to settle: nearly everything is as predicted, or words
have changed throughout, and residuals have no runs."""
_GROUPING_GAIN = 0.92
"""Level BALANCED groups residuals that get below this share of their ungrouped size."""
_DECAY_GAIN = 0.97
"""Steps must bring a fragment below this share of what it takes without: they are one more pass at
every read."""
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
class Trial:
    """A prediction that was tried on the sample.

    Attributes:
        bases: Indices of its candidates.
        prediction: How it predicts; scales of a quantization are fitted to the whole fragment.
        share: Stored / raw of the sample.
        grouped: Whether grouping is what stores that.
        depth: Fragments that reading the result takes besides itself, at most.
        words: The sample.
        predicted: What it is predicted to be.
        covered: The share of the fragment that the bases cover.
        estimate: Estimated bytes of the sample.
    """

    bases: tuple[int, ...]
    prediction: Prediction
    share: float
    grouped: bool
    depth: int
    words: Words = field(repr=False)
    predicted: Words = field(repr=False)
    covered: float
    estimate: int

    @property
    def rank(self) -> float:
        """Smaller is better; each further fragment to read must pay for itself."""
        return self.share / _SHALLOW_GAIN**self.depth


class Trials:
    """Tries predictions of one fragment.

    Args:
        view: Its bytes.
        dtype: How to read them.
        level: What to prefer.
        rows: Rows of the tensor, for quantized copies.
    """

    def __init__(self, view: memoryview, dtype: Dtype, level: Level, rows: Rows = NO_ROWS) -> None:
        self._view = view
        self._dtype = dtype
        self._level = level
        self._rows = rows
        self._unit = unit_size(dtype)
        self.candidates: list[Candidate] = []
        self._samples: dict[tuple[int, int], Words] = {}
        self._is_wide = dtype.bits >= _WIDE_BITS

    def try_singles(self, candidates: Sequence[Candidate]) -> list[Trial]:
        """Take more candidates and try each of them alone."""
        trials = []
        for candidate in candidates:
            index = len(self.candidates)
            self.candidates.append(candidate)
            prediction = self._predict_single(candidate)
            if prediction is None:
                continue
            count = self._covered((index,))
            # A base that covers a small part of a fragment saves no more than that part.
            if not count or count * self._unit < len(self._view) // 4:
                continue
            if prediction.predictor is Predictor.QUANTIZE:
                prediction = self._fit_scales(candidate, count)
                if prediction is None:
                    continue
            trials.append(self._with_steps(self._try((index,), prediction)))
            if trials[-1].share < 1e-3:
                break
        return trials

    def _predict_single(self, candidate: Candidate) -> Prediction | None:
        if candidate.dtype is self._dtype:
            return Prediction(Predictor.DELTA, (self._dtype,))
        if candidate.dtype in FLOATS and self._dtype in FLOATS:
            return Prediction(Predictor.CAST, (candidate.dtype,))
        if candidate.dtype in FLOATS and self._dtype in SCALED:
            return Prediction(Predictor.QUANTIZE, (candidate.dtype,))
        return None

    def _fit_scales(self, candidate: Candidate, count: int) -> Prediction | None:
        target = np.frombuffer(self._view, f"<u{self._unit}", count)
        base = np.frombuffer(candidate.raw, f"<u{unit_size(candidate.dtype)}", count)
        rows = self._rows
        words, first = (rows.words, rows.first_words) if 0 < rows.words < count else (0, 0)
        return fit_scales(target, self._dtype, (base, candidate.dtype), words, first)

    def _with_steps(self, trial: Trial) -> Trial:
        """The same base after steps, if there are any and they pay."""
        if self._dtype not in STEPPED or trial.prediction.predictor is not Predictor.DELTA:
            return trial
        if trial.share < _SETTLED_SHARE_MIN:
            return trial
        steps = fit_steps(trial.words, trial.predicted)
        if steps is None:
            return trial
        dtypes = trial.prediction.dtypes
        stepped = self._try(trial.bases, Prediction(Predictor.DECAY, dtypes, steps=steps))
        return stepped if stepped.share < _DECAY_GAIN * trial.share else trial

    def try_blends(
        self,
        indices: Sequence[int],
        limit: float,
        may_combine: Callable[[Sequence[int]], bool] = lambda _: True,
        *,
        screened: bool = True,
    ) -> list[Trial]:
        """Blends of the candidates with these indices that store less than `limit`, a share.

        Args:
            indices: Candidates, the best first.
            limit: The share.
            may_combine: Whether the candidates with these indices may be bases of one fragment.
            screened: Try only what fits so well that it has a chance against its best base.
        """
        if self._dtype not in FLOATS:
            return []
        usable = [index for index in indices if self.candidates[index].dtype in FLOATS]
        if len(usable) < 2:
            return []
        count = self._covered(usable)
        bases = [(self._sample(index, count), self.candidates[index].dtype) for index in usable]
        words = self._sample(None, count)
        fits = BlendFits(words, self._dtype, bases, step=_SCREEN_STEP)
        worst = float("inf")
        if screened and not self._is_wide:
            worst = _BLEND_FITS * min(map(fits.left_over, range(len(usable))))
        found: list[Trial] = []
        for size in (2, 3) if self._level is Level.SMALL else (2,):
            sets = combinations(range(len(usable)), size)
            tried = 0
            for fit in fits.fit(list(sets)):
                if tried == _BLENDS_TRIED[self._level] or fit.left_over > worst:
                    break
                chosen = tuple(usable[place] for place in fit.bases)
                if not may_combine(chosen):
                    continue
                tried += 1
                blend = fit_blend(words, self._dtype, [bases[place] for place in fit.bases])
                predictions = [] if blend is None else [blend]
                if size == 2 and self._is_wide:
                    dtypes = tuple(self.candidates[index].dtype for index in chosen)
                    predictions += [
                        Prediction(Predictor.BLEND, dtypes, coefficients)
                        for coefficients in ((2.0, -1.0), (-1.0, 2.0))
                    ]
                for prediction in predictions:
                    trial = self._try(chosen, prediction)
                    if trial.share < limit * _SETTLED_WITHIN:
                        trial = self.settle(trial)
                    if trial.share < limit:
                        found.append(trial)
            if found:
                limit = min(trial.share for trial in found) * _BLEND_GAIN[self._level]
        return found

    def blend_limit(self, share: float) -> float:
        """Below which share a blend is better than one base that stores `share`."""
        return share * _BLEND_GAIN[self._level]

    def _covered(self, indices: Sequence[int]) -> int:
        pairs = [(self.candidates[index].raw, self.candidates[index].dtype) for index in indices]
        return covered_words(self._view, self._dtype, pairs)

    def _sample(self, index: int | None, count: int) -> Words:
        """The sample of a candidate, or of the fragment, below its first `count` words."""
        key = (-1 if index is None else index, count)
        found = self._samples.get(key)
        if found is None:
            raw, dtype = self._view, self._dtype
            if index is not None:
                raw, dtype = self.candidates[index].raw, self.candidates[index].dtype
            found = self._samples[key] = sample_words(raw, dtype, count)
        return found

    def _try(self, bases: tuple[int, ...], prediction: Prediction) -> Trial:
        """What a prediction stores of the sample, estimated."""
        count = self._covered(bases)
        words = self._sample(None, count)
        if prediction.predictor is Predictor.QUANTIZE:
            # Its scales belong to places: predict all, then take the sample.
            raws = [self.candidates[index].raw for index in bases]
            whole = prediction.predict(raws, self._dtype, count)
            predicted = sample_words(whole.data, self._dtype, count)
        else:
            taken = [self._sample(index, count).data.cast("B") for index in bases]
            predicted = prediction.predict(taken, self._dtype, words.size)
        covered = count * self._unit / len(self._view)
        grouped = self._level is not Level.FAST
        estimate = 0
        if not np.array_equal(words, predicted):
            estimate = estimate_residual(words, predicted, self._dtype, grouped=grouped)
        if prediction.predictor is Predictor.DECAY:
            # The sample stands for the whole fragment, which has one table.
            estimate += _steps_size(prediction) * words.size // count
        depth = sum(self.candidates[index].depth for index in bases)
        trial = Trial(bases, prediction, 0, grouped, depth, words, predicted, covered, estimate)
        return replace(trial, share=_share(trial, estimate))

    def settle_best(self, trials: Sequence[Trial], count_max: int) -> Trial:
        """The best of some trials, the best few of them settled if they are close to each other.

        Args:
            trials: Best first.
            count_max: How many are settled at most.
        """
        limit = trials[0].rank * _SETTLED_WITHIN
        some = [trial for trial in trials[:count_max] if trial.rank < limit]
        if len(some) < 2 or not self._is_wide:
            return trials[0]
        return min(map(self.settle, some), key=attrgetter("rank"))

    def settle(self, trial: Trial) -> Trial:
        """A trial that was estimated, encoded: that takes three times as long, and sees runs."""
        if self._level is Level.FAST or not self._is_wide:
            return trial
        if not _SETTLED_SHARE_MIN <= trial.share <= _SETTLED_SHARE_MAX:
            return trial
        params, payload = encode_residual(
            trial.words, trial.predicted, self._dtype, grouped=trial.grouped, level=1
        )
        return replace(trial, share=_share(trial, len(params) + sum(map(len, payload))))

    def settle_grouping(self, trial: Trial) -> Trial:
        """Level BALANCED groups only where that saves enough to be worth the decoder's time."""
        if self._level is not Level.BALANCED or trial.share < _SETTLED_SHARE_MIN:
            return trial
        plain = estimate_residual(trial.words, trial.predicted, self._dtype, grouped=False)
        return replace(trial, grouped=trial.estimate < _GROUPING_GAIN * plain)


def _steps_size(prediction: Prediction) -> int:
    params: list[bytes] = []
    payload: list[Bytes] = []
    store_streams(pack_steps(prediction.steps), 1, params, payload)
    return sum(map(len, params)) + sum(map(len, payload))


def _share(trial: Trial, size: int) -> float:
    """What no base covers is stored solo: count it as not shrinking at all."""
    return size / trial.words.nbytes * trial.covered + (1 - trial.covered)


def sample_words(raw: memoryview | bytes, dtype: Dtype, count: int) -> Words:
    """Runs of words spread evenly over the first `count` words of a fragment; a copy."""
    words: Words = np.frombuffer(raw, f"<u{unit_size(dtype)}", count)
    if count <= _SLICE_COUNT * _SLICE_WORDS:
        return words.copy()
    step = (count - _SLICE_WORDS) // (_SLICE_COUNT - 1)
    starts = range(0, step * _SLICE_COUNT, step)
    return np.concatenate([words[start : start + _SLICE_WORDS] for start in starts])
