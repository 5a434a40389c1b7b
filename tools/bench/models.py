"""Models to measure with: a published one, its casts, and large ones made up.

Reads and writes safetensors files itself, so that a defect of fragfs cannot hide in its input.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tools.bench.workplace import BenchError

__all__ = [
    "Tensor",
    "Variant",
    "cast_f32",
    "find_weights",
    "make_normal_bf16",
    "make_normal_f32",
    "read_tensors",
    "variants_of",
    "write_safetensors",
]

_ROW = 4096
_LAYER_ROWS = 4096
Spec = tuple[str, str, tuple[int, ...], int]
"""Name, dtype as safetensors spells it, shape, bytes."""


@dataclass(frozen=True)
class Tensor:
    """A tensor of a file.

    Attributes:
        name: Its name.
        dtype: Its dtype as the file spells it.
        shape: Its shape.
        raw: Its bytes: a view of the mapped file.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    raw: memoryview


@dataclass(frozen=True)
class Variant:
    """A model in one precision.

    Attributes:
        label: What to call it: "f32", "bf16", "f16" or "as it is".
        files: Its safetensors files.
    """

    label: str
    files: tuple[Path, ...]

    @property
    def size(self) -> int:
        """Bytes of its files."""
        return sum(path.stat().st_size for path in self.files)


# --- safetensors files


def read_tensors(path: Path) -> list[Tensor]:
    """The tensors of a file, in file order; their bytes stay valid."""
    with path.open("rb") as file:
        mapped = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    start = 8 + int.from_bytes(mapped[:8], "little")
    entries = json.loads(bytes(mapped[8:start]))
    entries.pop("__metadata__", None)
    tensors = []
    for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
        first, end = entry["data_offsets"]
        raw = mapped[start + first : start + end]
        tensors.append(Tensor(name, entry["dtype"], tuple(entry["shape"]), raw))
    return tensors


def write_safetensors(
    path: Path, specs: list[Spec], contents: Iterable[memoryview | bytes]
) -> Path:
    """Write a file tensor by tensor.

    Args:
        path: Where; its directory is created.
        specs: The tensors.
        contents: Their bytes, in the same order.
    """
    header: dict[str, object] = {}
    offset = 0
    for name, dtype, shape, size in specs:
        header[name] = {
            "dtype": dtype,
            "shape": list(shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for raw in contents:
            file.write(raw)
    return path


# --- published models


def find_weights(directory: Path) -> tuple[Path, ...]:
    """The safetensors files below a directory.

    Raises:
        BenchError: There are none.
    """
    files = tuple(sorted(path for path in directory.rglob("*.safetensors") if path.is_file()))
    if not files:
        raise BenchError(f"{directory} has no safetensors files")
    return files


def variants_of(files: tuple[Path, ...], place: Path) -> list[Variant]:
    """A model as f32, bf16 and f16; only as it is, if it has no f32 tensors to cast."""
    if not any(tensor.dtype == "F32" for path in files for tensor in read_tensors(path)):
        return [Variant("as it is", files)]
    variants = [Variant("f32", files)]
    for dtype in ("BF16", "F16"):
        cast = [_cast_file(path, place / dtype.lower() / path.name, dtype) for path in files]
        variants.append(Variant(dtype.lower(), tuple(cast)))
    return variants


def _cast_file(source: Path, target: Path, dtype: str) -> Path:
    tensors = read_tensors(source)
    specs: list[Spec] = [
        (t.name, dtype, t.shape, len(t.raw) // 2)
        if t.dtype == "F32"
        else (t.name, t.dtype, t.shape, len(t.raw))
        for t in tensors
    ]
    raws = (cast_f32(t.raw, dtype) if t.dtype == "F32" else t.raw for t in tensors)
    return write_safetensors(target, specs, raws)


def cast_f32(raw: memoryview, dtype: str) -> bytes:
    """Round f32 values to the nearest, ties to even; `dtype` is BF16 or F16."""
    if dtype == "F16":
        with np.errstate(over="ignore"):
            return np.frombuffer(raw, "<f4").astype("<f2").tobytes()
    bits = np.frombuffer(raw, "<u4")
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    is_nan = bits & 0x7FFFFFFF > 0x7F800000
    return np.where(is_nan, bits >> 16 | 0x40, rounded).astype("<u2").tobytes()


# --- models made up


def make_normal_f32(path: Path, size: int, seed: int = 1) -> Path:
    """About `size` bytes of normally distributed f32 weights, in matrices of 1024 x 1024."""
    rng = np.random.default_rng(seed)
    shape = (1024, 1024)
    step = 4 * prod(shape)
    count = max(1, size // step)
    specs: list[Spec] = [(f"layers.{index}.weight", "F32", shape, step) for index in range(count)]
    scale = np.float32(0.02)
    raws = ((rng.standard_normal(shape, np.float32) * scale).tobytes() for _ in specs)
    return write_safetensors(path, specs, raws)


def make_normal_bf16(path: Path, size: int, seed: int = 2) -> Path:
    """About `size` bytes of bf16 weights, no two alike, in matrices of 4096 columns.

    Signs and exponents are those of normally distributed weights, mantissas are random: that is
    what entropy coding meets in trained weights, and it is made as fast as a disk takes it.
    """
    rng = np.random.Generator(np.random.SFC64(seed))
    rows = [_LAYER_ROWS] * (size // (2 * _ROW * _LAYER_ROWS))
    if rest := size // (2 * _ROW) - sum(rows):
        rows.append(rest)
    values = rng.standard_normal(_ROW * max(rows), np.float32) * np.float32(0.02)
    upper = (values.view("<u4") >> 16).astype("<u2").view("<u8") & np.uint64(0xFF80FF80FF80FF80)
    specs: list[Spec] = [
        (f"layers.{index}.weight", "BF16", (count, _ROW), 2 * count * _ROW)
        for index, count in enumerate(rows)
    ]
    return write_safetensors(path, specs, _mantissas(rng, upper, rows))


def _mantissas(
    rng: np.random.Generator, upper: NDArray[np.uint64], rows: list[int]
) -> Iterator[bytes]:
    for count in rows:
        words = rng.integers(0, 1 << 64, count * _ROW // 4, np.uint64)
        words &= np.uint64(0x007F007F007F007F)
        # Turned by some words each time: fragments with equal signs and exponents are siblings.
        words |= np.roll(upper, int(rng.integers(1, upper.size)))[: words.size]
        yield words.tobytes()
