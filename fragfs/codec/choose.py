"""Best-of encoding of a fragment, given fragments that may resemble it.

Every form is tried on a sample first; the smallest is encoded whole and competes with solo coding
by what it really stores. Similarity nominates, bytes decide. Pure and thread-safe: bytes to bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from operator import attrgetter

from fragfs.codec.predict import unit_size
from fragfs.codec.predicted import encode_predicted
from fragfs.codec.solo import Buffer, Encoding, encode_solo
from fragfs.codec.trials import NO_ROWS, Candidate, Rows, Trial, Trials, sample_words
from fragfs.types import Dtype, Level

__all__ = [
    "Choice",
    "encode_best",
    "encode_from",
    "estimate_blends",
    "estimate_single",
    "estimate_solo",
]

_BLEND_PAYS_MIN = 0.02
"""Below this share of its size a fragment predicted from one base is not worth a second one."""

_CANDIDATES = {Level.FAST: (2,), Level.BALANCED: (3, 5), Level.SMALL: (4, 8)}
"""Candidates tried at a time: more of them only if the first do not make a fragment small."""
_CANDIDATES_NARROW = (4, 8)
"""For formats of one byte, whose own rounding hides which of a family they were made of."""
_GOOD = 0.08

_SETTLED = {Level.FAST: 1, Level.BALANCED: 2, Level.SMALL: 3}
"""Of the candidates with the best estimates, how many are settled by encoding the sample."""

_BASE_GAIN = 0.95
"""What a base must save against solo coding to be worth decoding it at every read."""
_CLOSE = 0.85
"""Estimates closer than this are settled by encoding both ways."""
_SURE = 0.25
"""Below this share no fragment of weights is stored solo: what solo coding takes is not asked."""


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
    tried = Trials(view, dtype, level, rows)
    trials: list[Trial] = []
    source = iter(candidates)
    for count in _CANDIDATES[level] if dtype.bits > 8 else _CANDIDATES_NARROW:
        fresh = list(islice(source, count))
        trials += tried.try_singles(fresh)
        if not fresh or (trials and min(trial.share for trial in trials) < _GOOD):
            break
    if not trials:
        return Choice(encode_solo(view, dtype, zstd_level=zstd_level))
    trials.sort(key=attrgetter("rank"))
    best = tried.settle_best(trials, _SETTLED[level])
    if best.share > _BLEND_PAYS_MIN:
        indices = [trial.bases[0] for trial in trials]
        blends = tried.try_blends(indices, tried.blend_limit(best.share), may_combine)
        best = min([best, *blends], key=attrgetter("share"))
    best = tried.settle_grouping(best)
    solo_share = estimate_solo(view, dtype, zstd_level) if best.share > _SURE else 1.0
    if best.share > solo_share / _BASE_GAIN:
        return Choice(encode_solo(view, dtype, zstd_level=zstd_level))
    encoding = _encode(view, dtype, tried.candidates, best, level, zstd_level)
    if encoding.size > _CLOSE * solo_share * len(view):
        solo = encode_solo(view, dtype, zstd_level=zstd_level)
        if encoding.size > _BASE_GAIN * solo.size:
            return Choice(solo)
    return Choice(encoding, best.bases, tuple(tried.candidates[index].raw for index in best.bases))


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
    tried = Trials(view, dtype, level, rows)
    if len(bases) == 1:
        found = tried.try_singles(bases)
    else:
        tried.candidates += bases
        found = [
            trial
            for trial in tried.try_blends(range(len(bases)), 1.0, screened=False)
            if len(trial.bases) == len(bases)
        ]
    if not found:
        return None
    best = tried.settle_grouping(min(found, key=attrgetter("share")))
    return _encode(view, dtype, bases, best, level, zstd_level)


def estimate_single(
    raw: Buffer, dtype: Dtype, base: Candidate, *, level: Level, rows: Rows = NO_ROWS
) -> float | None:
    """Stored / raw of a fragment predicted from a base, from a sample; None if it cannot be."""
    tried = Trials(memoryview(raw).cast("B"), dtype, level, rows)
    found = tried.try_singles([base])
    return tried.settle(found[0]).share if found else None


def estimate_blends(
    raw: Buffer, dtype: Dtype, bases: Sequence[Candidate], *, level: Level
) -> dict[tuple[int, ...], float]:
    """Stored / raw of a fragment predicted from several of these, by their indices."""
    tried = Trials(memoryview(raw).cast("B"), dtype, level)
    tried.candidates += bases
    trials = tried.try_blends(range(len(bases)), 1.0, screened=False)
    found: dict[tuple[int, ...], float] = {}
    for trial in trials:  # several blends of the same bases may have been tried
        found[trial.bases] = min(trial.share, found.get(trial.bases, trial.share))
    return found


def estimate_solo(raw: Buffer, dtype: Dtype, zstd_level: int) -> float:
    """Stored / raw of a fragment predicted from nothing, from a sample."""
    view = memoryview(raw).cast("B")
    count = len(view) // unit_size(dtype)
    if not count:
        return 1.0
    taken = sample_words(view, dtype, count).data.cast("B")
    return encode_solo(taken, dtype, zstd_level=min(zstd_level, 3)).size / len(taken)


def _encode(
    view: memoryview,
    dtype: Dtype,
    candidates: Sequence[Candidate],
    trial: Trial,
    level: Level,
    zstd_level: int,
) -> Encoding:
    return encode_predicted(
        view,
        dtype,
        trial.prediction,
        [candidates[index].raw for index in trial.bases],
        grouped=trial.grouped,
        fine=level is Level.SMALL,
        zstd_level=zstd_level,
    )
