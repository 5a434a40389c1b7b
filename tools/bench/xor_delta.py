"""The published way to store model families, for comparison: XOR with the closest tensor.

ZipLLM (Wang et al. 2025) and TensorX store equal tensors once, XOR each other tensor with a similar
one, regroup the result by byte planes and compress these. This does the same and chooses better
than they do: the closest of all earlier tensors of the same shape and dtype, whatever its name, and
never worse than the tensor's own byte planes. Names, offsets and framing are not counted.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import zstandard
from numpy.typing import NDArray

from tools.bench.models import Tensor, read_tensors

__all__ = ["StoredTensor", "XorStore", "join_planes", "other_bytes", "split_planes"]

ITEM_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2}
"""By dtype as safetensors spells it; all others are 1."""

_SAMPLE_BYTES = 1 << 16
_PLANE_LEVEL = 1
_OTHER_LEVEL = 3
_BIT_COUNTS = np.array([number.bit_count() for number in range(256)], np.uint8)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as the baseline stores it.

    Attributes:
        planes: Compressed byte planes; one that does not shrink is stored as it is.
        item_bytes: How many planes its elements have.
        size: Bytes of the tensor.
        source: Number of the tensor it is XORed with; None if it stands alone.
    """

    planes: tuple[bytes, ...]
    item_bytes: int
    size: int
    source: int | None

    @property
    def stored_size(self) -> int:
        """Bytes of its planes."""
        return sum(map(len, self.planes))


class XorStore:
    """Tensors added one after the other, each stored as small as the baseline can.

    Tensors that were added are referred to, not copied: their bytes must stay valid.

    Args:
        keep: Keep what is stored, for `decode`; else only its size is.
    """

    def __init__(self, *, keep: bool = False) -> None:
        self._tensors: list[Tensor] = []
        self._samples: dict[tuple[str, tuple[int, ...]], list[tuple[int, NDArray[np.uint8]]]] = {}
        self._numbers: dict[tuple[str, bytes], int] = {}
        self._files: set[bytes] = set()
        self._stored: dict[int, StoredTensor] | None = {} if keep else None

    def add_directory(self, directory: Path) -> int:
        """Add a model; gives the bytes it takes. Its other files are stored once, by zstd."""
        grown = 0
        for path in sorted(path for path in directory.rglob("*") if path.is_file()):
            if path.suffix != ".safetensors":
                grown += self._add_bytes(path.read_bytes())
                continue
            tensors = read_tensors(path)
            grown += self._add_bytes(other_bytes(path))
            grown += sum(self.add(tensor)[1] for tensor in tensors)
        return grown

    def refer_to(self, directory: Path) -> None:
        """Take a model for stored, without finding out how small: what comes can refer to it."""
        for path in sorted(path for path in directory.rglob("*") if path.is_file()):
            if path.suffix != ".safetensors":
                self._files.add(_digest(path.read_bytes()))
                continue
            self._files.add(_digest(other_bytes(path)))
            for tensor in read_tensors(path):
                self._register(tensor, np.frombuffer(tensor.raw, np.uint8))

    def add(self, tensor: Tensor) -> tuple[int, int]:
        """Add a tensor; gives its number and the bytes it takes, 0 if it is there already."""
        raw = np.frombuffer(tensor.raw, np.uint8)
        number, is_new, source = self._register(tensor, raw)
        if not is_new:
            return number, 0
        stored = _encode(raw, tensor.dtype, None, None)
        if source is not None:
            other = np.frombuffer(self._tensors[source].raw, np.uint8)
            delta = _encode(raw, tensor.dtype, other, source)
            stored = min(stored, delta, key=lambda choice: choice.stored_size)
        if self._stored is not None:
            self._stored[number] = stored
        return number, stored.stored_size

    def _register(self, tensor: Tensor, raw: NDArray[np.uint8]) -> tuple[int, bool, int | None]:
        """(its number, whether it is new, the number of the closest one before it)."""
        key = (tensor.dtype, _digest(tensor.raw))
        if (known := self._numbers.get(key)) is not None:
            return known, False, None
        step = max(1, raw.size // _SAMPLE_BYTES) | 1  # odd: all bytes of an element get their turn
        sample = raw[::step].copy()
        group = self._samples.setdefault((tensor.dtype, tensor.shape), [])
        source = min(group, key=lambda item: _distance(item[1], sample))[0] if group else None
        number = self._numbers[key] = len(self._tensors)
        self._tensors.append(tensor)
        group.append((number, sample))
        return number, True, source

    def decode(self, number: int) -> bytes:
        """A tensor from what is stored alone."""
        assert self._stored is not None, "opened with keep=False"
        stored = self._stored[number]
        raw = join_planes(stored.planes, stored.item_bytes, stored.size)
        if stored.source is not None:
            raw = raw ^ np.frombuffer(self.decode(stored.source), np.uint8)
        return raw.tobytes()

    def _add_bytes(self, raw: bytes) -> int:
        if (digest := _digest(raw)) in self._files:
            return 0
        self._files.add(digest)
        return min(len(raw), len(zstandard.ZstdCompressor(level=_OTHER_LEVEL).compress(raw)))


def _digest(raw: bytes | memoryview) -> bytes:
    return hashlib.blake2b(raw, digest_size=20).digest()


def other_bytes(path: Path) -> bytes:
    """What a safetensors file has before its tensors."""
    with path.open("rb") as file:
        length = file.read(8)
        return length + file.read(int.from_bytes(length, "little"))


def _distance(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> int:
    """How many bits differ."""
    return int(_BIT_COUNTS[one ^ other].sum(dtype=np.int64))


def _encode(
    raw: NDArray[np.uint8], dtype: str, other: NDArray[np.uint8] | None, source: int | None
) -> StoredTensor:
    item_bytes = ITEM_BYTES.get(dtype, 1)
    planes = split_planes(raw if other is None else raw ^ other, item_bytes)
    return StoredTensor(planes, item_bytes, raw.size, source)


def split_planes(raw: NDArray[np.uint8], item_bytes: int) -> tuple[bytes, ...]:
    """Byte planes of elements, each compressed if that pays."""
    compress: Callable[[bytes], bytes] = zstandard.ZstdCompressor(level=_PLANE_LEVEL).compress
    planes = (raw[index::item_bytes].tobytes() for index in range(item_bytes))
    # On a tie it stays as it is: `join_planes` tells by the size.
    return tuple(min(plane, compress(plane), key=len) for plane in planes)


def join_planes(planes: tuple[bytes, ...], item_bytes: int, size: int) -> NDArray[np.uint8]:
    """The elements that `split_planes` was given."""
    raw = np.empty(size, np.uint8)
    for index, plane in enumerate(planes):
        target = raw[index::item_bytes]
        if len(plane) != target.size:
            plane = zstandard.ZstdDecompressor().decompress(plane)
        target[:] = np.frombuffer(plane, np.uint8)
    return raw
