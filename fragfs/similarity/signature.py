"""Signatures: what the catalog keeps of a fragment so that its siblings find it.

A signature is a sketch, by which candidates are ranked, and keys, by which they are found. Two
fragments are candidates of each other if they share a key:

- *Coarse* keys hash the winners of a few windows: in each window of neighbouring elements, which
  one is largest, and its sign. Casts, scales and strong fine-tunes rarely change a winner. Half of
  the coarse keys look below the largest power of two in the fragment's length, half below the one
  before, so that a sibling on the other side of a power of two still shares some.
- *Fine* keys hash more, and what moves sooner: all winners with their leading bits, and the leading
  bits of the sketch's numbers. Only close siblings share them, so that these find each other in a
  family that is larger than what a query looks at under one key.

Pure; a signature depends on the raw bytes, the dtype and the configuration alone.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from typing import TypeAlias

import numpy as np

from fragfs.errors import UsageError
from fragfs.similarity.numbers import Patterns, find_reader, magnitudes
from fragfs.similarity.positions import SAMPLES, Places, sample_places, window_starts
from fragfs.similarity.sketch import pack_sketch
from fragfs.types import Dtype

__all__ = [
    "DEFAULT_SIGNATURE_CONFIG",
    "SIGNATURE_VERSION",
    "Buffer",
    "FragmentSignature",
    "SignatureConfig",
    "name_key",
    "sign_fragment",
]

SIGNATURE_VERSION = 1
"""Version of keys and sketches. Keys of different versions never meet."""

Buffer: TypeAlias = bytes | bytearray | memoryview
"""Contiguous bytes."""

_KEY_BYTES = 4
"""Keys use 32 of their 64 bits: SQLite then keeps an index row in 14 bytes instead of 19. At 10**7
fragments with 7 keys one key in 60 has a stranger among its rows, which ranking drops."""

_COARSE, _WINNERS, _NUMBERS = range(3)
_DOMAIN = struct.Struct("<8sBBBBBB")  # tag, version, kind, level, band, windows, window size
_DOMAIN_TAG, _NAME_TAG = b"fragsign", b"fragname"
_DROPPED_BITS = 23 - 3
"""Windows are compared at the precision of F8_E4M3, and the first of equals wins. Casts to it then
keep all coarse keys (with exact magnitudes 73 %), casts to F8_E5M2 63 % (54 %), fine-tunes that
move weights by 5 % of their spread 74 % (79 %). Gaussian weights, default configuration."""

_FINE_LIVELY = 0.75
"""Share of windows that must hold different magnitudes for the fine key of winners."""


@dataclass(frozen=True, slots=True)
class SignatureConfig:
    """What signatures look at, and how far a query goes.

    All but the last attribute decide which keys a signature has: signatures that were made with
    different ones may not find each other.

    Attributes:
        bands: Coarse keys of a signature; 2 to 16, even.
        band_windows: Windows a coarse key hashes. More: fewer strangers, fewer distant siblings.
        window_size: Elements of a window; a power of two, 4 to 128.
        numbers_min: Fewest numbers a fragment must have to be signed. In smaller ones windows
            overlap: 256 numbers find 94 % of siblings 10 % away, 512 and more find 96 to 97 %.
        rows_per_key: The most rows a query looks at under one key; of a key with more it looks at
            a few (see `split_limit`).
    """

    bands: int = 4
    band_windows: int = 4
    window_size: int = 16
    numbers_min: int = 512
    rows_per_key: int = 40

    def __post_init__(self) -> None:
        if not 2 <= self.bands <= 16 or self.bands % 2:
            raise UsageError(f"a signature has 2 to 16 coarse keys, an even number: {self.bands}")
        if not 1 <= self.band_windows <= 64:
            raise UsageError(f"a coarse key hashes 1 to 64 windows, not {self.band_windows}")
        if self.window_size not in (4, 8, 16, 32, 64, 128):
            raise UsageError(f"a window has 4, 8, ... 128 elements, not {self.window_size}")
        if self.numbers_min < 2 * self.window_size:
            raise UsageError(
                f"fragments of {self.numbers_min} numbers do not fill two windows "
                f"of {self.window_size}"
            )
        if self.rows_per_key < 1:
            raise UsageError(f"a query looks at one row per key or more, not {self.rows_per_key}")


DEFAULT_SIGNATURE_CONFIG = SignatureConfig()


@dataclass(frozen=True, slots=True)
class FragmentSignature:
    """A locality-sensitive summary of a fragment.

    Attributes:
        version: `SIGNATURE_VERSION` of the code that made it.
        element_count: Elements of the fragment.
        sketch: What candidates are ranked by; `SKETCH_SIZE` bytes that describe themselves.
        keys: What candidates are found by: distinct signed 64-bit integers, coarse ones first.
    """

    version: int
    element_count: int
    sketch: bytes
    keys: tuple[int, ...]


def sign_fragment(
    raw: Buffer, dtype: Dtype, config: SignatureConfig = DEFAULT_SIGNATURE_CONFIG
) -> FragmentSignature | None:
    """Summarize a fragment so that its siblings can be found.

    Pure and thread-safe; reads a few hundred elements, whatever the fragment's size.

    Args:
        raw: Little-endian elements back to back; a rest shorter than an element is ignored.
        dtype: How to read them.
        config: What to look at.

    Returns:
        None where there is nothing to find siblings by: dtypes without numbers, few numbers, or
        numbers that are nearly all the same one.
    """
    reader = find_reader(dtype)
    if reader is None:
        return None
    size = raw.nbytes if isinstance(raw, memoryview) else len(raw)
    count = size // reader.word.itemsize
    if count < config.numbers_min:
        return None
    level = count.bit_length() - 1
    plan = _plan(config, level)
    words = np.frombuffer(raw, reader.word, count).take(plan.places)
    patterns = reader.to_patterns(words)
    sketch = pack_sketch(patterns[-SAMPLES:], dtype, level)
    if sketch is None:
        return None
    keys = tuple(dict.fromkeys(_keys(patterns, plan)))
    return FragmentSignature(SIGNATURE_VERSION, size // (dtype.bits // 8), sketch, keys)


def name_key(name: str, fragment_index: int) -> int:
    """The key shared by fragments at one index of tensors of one name, in any model."""
    index = fragment_index.to_bytes(8, "little")
    return _hash(_NAME_TAG + index + name.encode("utf-8", "surrogatepass"))


@dataclass(frozen=True, slots=True)
class _Plan:
    """How fragments of one level are read.

    Attributes:
        places: Elements of all windows, then the sketch's numbers.
        windows: Shape (windows, elements of one).
        starts: Where each window starts among the elements read.
        coarse: What the hash of each coarse key starts with.
        winners: What the fine key of winners starts with.
        numbers: What the fine key of the sketch's numbers starts with.
    """

    places: Places
    windows: tuple[int, int]
    starts: Places
    coarse: tuple[bytes, ...]
    winners: bytes
    numbers: bytes


@lru_cache(maxsize=256)
def _plan(config: SignatureConfig, level: int) -> _Plan:
    count, size = config.band_windows, config.window_size

    def domain(kind: int, level: int, band: int) -> bytes:
        return _DOMAIN.pack(_DOMAIN_TAG, SIGNATURE_VERSION, kind, level, band, count, size)

    # Odd bands look below the previous power of two, as even ones of a shorter sibling do.
    bands = [(level - band % 2, band // 2) for band in range(config.bands)]
    starts = np.concatenate([window_starts(*band, count, size) for band in bands])
    windows = (starts[:, None] + np.arange(size)).reshape(-1)
    return _Plan(
        places=np.concatenate([windows, sample_places(level)]),
        windows=(starts.size, size),
        starts=np.arange(starts.size) * size,
        coarse=tuple(domain(_COARSE, *band) for band in bands),
        winners=domain(_WINNERS, level, config.bands),
        numbers=domain(_NUMBERS, level, 0),
    )


def _keys(patterns: Patterns, plan: _Plan) -> Iterator[int]:
    count, size = plan.windows
    rounded = _round(magnitudes(patterns[: count * size]))
    heights = rounded.reshape(count, size)
    winners = plan.starts + heights.argmax(axis=1)
    leading = rounded.take(winners)
    lively = (leading > heights.min(axis=1)).tobytes()
    signs = patterns.take(winners) >> np.uint32(31)
    tokens = (winners - plan.starts << 1 | signs).astype(np.uint8).tobytes()
    step = count // len(plan.coarse)
    for start, domain in zip(range(0, count, step), plan.coarse, strict=True):
        if 0 not in lively[start : start + step]:
            yield _hash(domain + tokens[start : start + step])
    if lively.count(1) >= _FINE_LIVELY * count:
        yield _hash(plan.winners + tokens + leading.astype("<u2").tobytes())
    yield _hash(plan.numbers + _leading_bits(patterns[count * size :], 23))


def _round(magnitude: Patterns) -> Patterns:
    """Exponents and three mantissa bits, rounded as casts round: to nearest, ties to even."""
    odd = magnitude >> np.uint32(_DROPPED_BITS) & np.uint32(1)
    return magnitude + odd + np.uint32((1 << (_DROPPED_BITS - 1)) - 1) >> np.uint32(_DROPPED_BITS)


def _leading_bits(patterns: Patterns, shift: int) -> bytes:
    return (patterns >> np.uint32(shift)).astype("<u2").tobytes()


def _hash(tokens: bytes) -> int:
    return int.from_bytes(blake2b(tokens, digest_size=_KEY_BYTES).digest(), "little", signed=True)
