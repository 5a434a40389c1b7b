"""Adds records to golden_predicted.json: `python -m tests.codec.make_golden`.

A record that is there already is never touched: what was ever written must decode forever. Raw
bytes come from the reference in this folder; the code under test must agree before anything is
written.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fragfs.codec.encoding import decode
from fragfs.types import Dtype, Predictor
from tests.codec import reference
from tests.codec.families import FLOATS, specials, unit_of

GOLDEN = Path(__file__).with_name("golden_predicted.json")

NEAR_TIES = [
    # f32 half way between neighbours of bf16, f16, E4M3 and E5M2, just above and just below.
    *(0x3F808000, 0x3F808001, 0x3F817FFF, 0x3F801000, 0x3F801001, 0x3F803000, 0x33000000),
    *(0x33000001, 0x477FEFFF, 0x477FF000, 0x3F880000, 0x3F880001, 0x3A800000, 0x43E7FFFF),
    *(0x43E80000, 0x3F900000, 0x3F900001, 0x47600000, 0x4767FFFF, 0x36FFFFFF),
]


@dataclass(frozen=True)
class Record:
    name: str
    predictor: Predictor
    dtype: Dtype
    params: bytes
    payload: bytes
    bases: tuple[bytes, ...]
    tail: bytes = b""

    @property
    def raw(self) -> bytes:
        (count,) = struct.unpack_from("<I", self.params)
        size = count * unit_of(self.dtype)
        covered = reference.decode(
            self.predictor, self.dtype, self.params, self.payload, size, self.bases
        )
        return covered + self.tail


def base_of(dtype: Dtype, count: int = 40, seed: int = 0) -> bytes:
    """Special values, points near ties, and ordinary numbers of a dtype, as its bytes."""
    unit = unit_of(dtype)
    words = specials(dtype) + (NEAR_TIES if dtype is Dtype.F32 else [])
    rng = np.random.default_rng(seed)
    middle = 0x3C << 8 * unit - 8
    words += [
        int(middle + step) for step in rng.integers(-(3 << 8 * unit - 8), 3 << 8 * unit - 8, 64)
    ]
    return b"".join(word.to_bytes(unit, "little") for word in words[:count])


def residuals(count: int, near: int, seed: int) -> list[int]:
    """Mostly small numbers; some far away if `near` is 2 or more."""
    rng = np.random.default_rng(seed)
    values = rng.integers(-near, near + 1, count).tolist()
    values[1 % count] = 1000 if near > 1 else values[1 % count]
    return values


def residual_in_forms(
    base: bytes, dtype: Dtype, last_keys: Sequence[int], forms: Sequence[int], method: int
) -> tuple[bytes, bytes]:
    """A residual whose groups have given forms."""
    shift, mask = dtype.mantissa_bits, (1 << min(8, dtype.exponent_bits)) - 1
    unit = unit_of(dtype)
    keys = [
        int.from_bytes(base[i : i + unit], "little") >> shift & mask
        for i in range(0, len(base), unit)
    ]
    groups = []
    first = 0
    for index, (last, form) in enumerate(zip(last_keys, forms, strict=True)):
        size = sum(first <= key <= last for key in keys)
        assert size, f"no word has a key from {first} to {last}"
        values = residuals(size, {0: 0, 1: 1, 2: 2, 4: 8, 8: 90}[form], index)
        groups.append((last, form, values))
        first = last + 1
    return reference.residual_of(groups, unit, method)


def delta(
    name: str, dtype: Dtype, last_keys: Sequence[int], forms: Sequence[int], method: int = 0
) -> Record:
    base = base_of(dtype)
    count = len(base) // unit_of(dtype)
    params, payload = residual_in_forms(base, dtype, last_keys, forms, method)
    header = struct.pack("<I", count)
    return Record(f"delta {name}", Predictor.DELTA, dtype, header + params, payload, (base,))


def with_tail(
    record: Record, name: str, solo: int, solo_params: bytes, stored: bytes, tail: bytes
) -> Record:
    """A record whose fragment goes on behind its bases."""
    rest = struct.pack("<BH", solo, len(solo_params)) + solo_params
    return Record(
        name,
        record.predictor,
        record.dtype,
        record.params + rest,
        record.payload + stored,
        record.bases,
        tail,
    )


def sparse(name: str, dtype: Dtype, changes: Sequence[tuple[int, int]], method: int = 0) -> Record:
    base = base_of(dtype)
    places = [place for place, _ in changes]
    gaps = [b - a - 1 for a, b in zip([-1, *places], places)]  # noqa: B905 # of unequal length
    streams = [
        reference.planes_of(gaps, 4, [method] * 4),
        reference.planes_of(
            [value for _, value in changes], unit_of(dtype), [method] * unit_of(dtype)
        ),
    ]
    params = struct.pack("<II", len(base) // unit_of(dtype), len(changes))
    return Record(
        f"sparse {name}",
        Predictor.SPARSE,
        dtype,
        params + b"".join(p for p, _ in streams),
        b"".join(d for _, d in streams),
        (base,),
    )


def cast(source: Dtype, target: Dtype) -> Record:
    """What the conversion gives is what the fragment is."""
    base = base_of(source, 60 if source is Dtype.F32 else 40)
    params = struct.pack("<IB", len(base) // unit_of(source), source.code) + b"\0"
    name = f"cast {source.name} to {target.name}"
    return Record(name, Predictor.CAST, target, params, b"", (base,))


def blend(name: str, dtype: Dtype, bases: Sequence[Dtype], coefficients: Sequence[float]) -> Record:
    raws = tuple(base_of(base, seed=index) for index, base in enumerate(bases))
    # The specials of each base meet ordinary numbers of the next, and each other.
    raws = tuple(
        raw[7 * i * unit_of(base) :] + raw[: 7 * i * unit_of(base)]
        for i, (raw, base) in enumerate(zip(raws, bases, strict=True))
    )
    count = min(len(raw) // unit_of(base) for raw, base in zip(raws, bases, strict=True))
    params = struct.pack("<I", count) + b"".join(
        struct.pack("<Bf", base.code, value)
        for base, value in zip(bases, coefficients, strict=True)
    )
    return Record(f"blend {name}", Predictor.BLEND, dtype, params + b"\0", b"", raws)


def quantize(name: str, source: Dtype, row: int, first: int, scales: Sequence[float]) -> Record:
    base = base_of(source, 60 if source is Dtype.F32 else 40)
    bits = np.array(scales, "<f4").view("<u4").tolist()
    streams = reference.planes_of(bits, 4, [0] * 4)
    params = struct.pack("<IBII", len(base) // unit_of(source), source.code, row, first)
    return Record(
        f"quantize {name}",
        Predictor.QUANTIZE,
        Dtype.I8,
        params + streams[0] + b"\0",
        streams[1],
        (base,),
    )


def decay(name: str, differences: Sequence[int], method: int, errors: int = 0) -> Record:
    """Steps by what each has more than the one before it; `errors` is how far residuals go."""
    base = base_of(Dtype.F32, 60)
    # Leading mantissa bits of every kind, of both signs.
    base += b"".join((0x3C000000 + (i << 15) + 77 * i).to_bytes(4, "little") for i in range(256))
    base += b"".join((0xBD800000 - (i << 15)).to_bytes(4, "little") for i in range(0, 256, 5))
    count = len(base) // 4
    stored = [difference + 0x80808080 for difference in differences]
    streams = reference.planes_of(stored, 4, [method] * 4)
    residual = (b"\0", b"")
    if errors:
        values = residuals(count, errors, 3)
        residual = reference.residual_of([(255, 8, values)], 4, method)
    params = struct.pack("<I", count) + streams[0] + residual[0]
    payload = streams[1] + residual[1]
    return Record(f"decay {name}", Predictor.DECAY, Dtype.F32, params, payload, (base,))


def records() -> list[Record]:
    plain = delta("bf16 planes", Dtype.BF16, [255], [8])
    planes = bytes([1, 2]) + struct.pack("<BIBI", 0, 2, 1, 1)
    frame = reference.stream_of(b"layers." * 9, 2)[1]
    return [
        plain,
        delta("bf16 right throughout", Dtype.BF16, [255], [0]),
        delta("bf16 groups", Dtype.BF16, [0, 60, 125, 255], [2, 1, 4, 8]),
        delta("f16 groups, zstd", Dtype.F16, [0, 14, 255], [1, 8, 4], 2),
        delta("f32 groups", Dtype.F32, [0, 126, 255], [4, 8, 2]),
        delta("f32 zstd planes", Dtype.F32, [255], [8], 2),
        delta("f64 groups, a group of zeros", Dtype.F64, [100, 200, 255], [8, 0, 1]),
        delta("f8 groups", Dtype.F8_E4M3, [3, 7, 255], [2, 4, 8]),
        delta("u8 codes", Dtype.U8, [255], [4]),
        delta("i32 codes", Dtype.I32, [255], [2], 2),
        delta("c64 planes", Dtype.C64, [255], [8]),
        with_tail(plain, "delta tail raw", 0, b"", b"tail", b"tail"),
        with_tail(plain, "delta tail constant", 1, b"ab", b"", b"ababa"),
        with_tail(plain, "delta tail zstd", 2, b"", frame, b"layers." * 9),
        with_tail(
            plain, "delta tail planes", 3, planes, b"\x80\x01\x7f", bytes.fromhex("80bf813f")
        ),
        sparse("bf16", Dtype.BF16, [(0, 1), (1, 65535), (39, 300)]),
        sparse("f32, zstd", Dtype.F32, [(5, 1 << 31), (30, 7)], 2),
        sparse("u8", Dtype.U8, [(7, 128)], 1),
        with_tail(sparse("", Dtype.F64, [(39, 1 << 63)]), "sparse tail", 0, b"", b"end", b"end"),
        *(cast(source, target) for source in FLOATS for target in FLOATS if source is not target),
        blend("f32 half", Dtype.F32, [Dtype.F32, Dtype.F32], [0.5, 0.5]),
        blend("f32 extrapolated", Dtype.F32, [Dtype.F32, Dtype.F32], [2, -1]),
        blend("f32 that cancels", Dtype.F32, [Dtype.F32, Dtype.BF16], [1, -1]),
        blend("bf16 of three", Dtype.BF16, [Dtype.BF16] * 3, [1 / 3, -0.5, 0.1]),
        blend("f16 of f32 and bf16", Dtype.F16, [Dtype.F32, Dtype.BF16], [0.3, 0.7]),
        blend("e4m3", Dtype.F8_E4M3, [Dtype.F8_E4M3, Dtype.F16], [1.5, 2.0**-20]),
        blend("e5m2", Dtype.F8_E5M2, [Dtype.F8_E5M2, Dtype.F8_E5M2], [-3, 2.0**20]),
        quantize("f32 one scale", Dtype.F32, 0, 0, [0.001]),
        quantize("f32 rows", Dtype.F32, 16, 5, [2.0**-60, 1e-3, 0.5, 2.0**60, 3]),
        quantize("bf16 rows", Dtype.BF16, 39, 1, [0.25, 0.01]),
        quantize("f16 one scale", Dtype.F16, 0, 0, [1 / 127]),
        quantize("e4m3 one scale", Dtype.F8_E4M3, 0, 0, [2]),
        quantize("e5m2 one scale", Dtype.F8_E5M2, 0, 0, [400]),
        decay("equal differences", [-300] * 256, 1),
        decay("like a real one, residual", [-290, *[-1, 0, 0, 1, -3] * 51], 0, 90),
        decay("zstd", [-300, *[0] * 127, -100, *[0] * 127], 2, 2),
        decay("around the words", [(1 << 31) - 1, *[0x01010101 * i for i in range(255)]], 0),
        with_tail(decay("", [5] * 256, 1), "decay tail", 0, b"", b"end", b"end"),
    ]


def add_new() -> int:
    """Append the records whose names the file does not have; returns how many."""
    vectors = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else []
    known = {vector["name"] for vector in vectors}
    new = [record for record in records() if record.name not in known]
    for record in new:
        raw = record.raw
        bases = [memoryview(base) for base in record.bases]
        found = decode(
            record.predictor,
            record.dtype,
            record.params,
            memoryview(record.payload),
            len(raw),
            bases,
        )
        assert found == raw, record.name
        vectors.append(
            {
                "name": record.name,
                "predictor": int(record.predictor),
                "dtype": record.dtype.name,
                "params": record.params.hex(),
                "payload": record.payload.hex(),
                "bases": [base.hex() for base in record.bases],
                "raw": raw.hex(),
            }
        )
    GOLDEN.write_text(json.dumps(vectors, indent=1) + "\n")
    return len(new)


if __name__ == "__main__":
    print(f"{add_new()} records added to {GOLDEN.name}")
