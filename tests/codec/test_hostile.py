"""Damaged and hostile records: a documented error, or as many bytes as were asked for."""

from __future__ import annotations

import json
import random
import resource
import struct
import threading
import tracemalloc
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fragfs.codec.encoding import decode
from fragfs.errors import FormatError
from fragfs.types import PREDICTORS_FROM_BASES, Dtype, Predictor
from tests.codec.families import (
    as_dtype,
    blend,
    cast,
    decayed,
    delta,
    nudged,
    numbers,
    quantized,
    unit_of,
    with_specials,
)

MEMORY_FACTOR_MAX = 10
"""Memory that decoding may take, in raw sizes."""
MEMORY_PER_WORD_MAX = 24
"""Where words are bytes: indices of those that differ take eight bytes each, and a few copies."""
MEMORY_SPARE = 1 << 20


@pytest.fixture(autouse=True)
def bounded_memory():
    """A test that asks for too much gets a MemoryError, not the whole machine."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (1 << 30), hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@dataclass(frozen=True)
class Stored:
    """A record as it comes from disk, and its bases."""

    predictor: int
    dtype: Dtype
    params: bytes
    payload: bytes
    raw_size: int
    bases: tuple[bytes, ...]

    def decode(self) -> memoryview:
        return decode(
            self.predictor,
            self.dtype,
            self.params,
            memoryview(self.payload),
            self.raw_size,
            [memoryview(base) for base in self.bases],
        )

    def survives(self) -> bool:
        """Whether it decodes; anything but a FormatError and the right size fails the test."""
        try:
            back = self.decode()
        except FormatError:
            return False
        assert len(back) == self.raw_size
        return True


def golden() -> list[Stored]:
    path = Path(__file__).with_name("golden_predicted.json")
    return [
        Stored(
            vector["predictor"],
            Dtype[vector["dtype"]],
            bytes.fromhex(vector["params"]),
            bytes.fromhex(vector["payload"]),
            len(vector["raw"]) // 2,
            tuple(bytes.fromhex(base) for base in vector["bases"]),
        )
        for vector in json.loads(path.read_text())
    ]


def encoded() -> list[Stored]:
    """Larger ones, grouped, with zstd frames and packed codes."""
    values, other = numbers(9000, seed=1), numbers(9000, seed=2)
    bf16 = with_specials(as_dtype(values, Dtype.BF16), Dtype.BF16)
    f32 = as_dtype(values, Dtype.F32)
    pairs = [(Dtype.F32, f32), (Dtype.BF16, as_dtype(other, Dtype.BF16))]
    merged = as_dtype(values / 2 + other / 2, Dtype.F16)
    cases = [
        delta("", Dtype.BF16, nudged(bf16, Dtype.BF16, step=60) + b"\1", bf16),
        delta("", Dtype.F32, nudged(f32, Dtype.F32, share=0.1, step=1), f32[:30_000]),
        delta("", Dtype.F32, nudged(f32, Dtype.F32, share=0.005), f32),
        cast("", Dtype.F16, nudged(merged, Dtype.F16), Dtype.F32, f32),
        blend("", Dtype.F16, nudged(merged, Dtype.F16, share=0.1), pairs, (0.5, 0.5)),
        quantized("", values, Dtype.F32, 128, 100, b"tail"),
        decayed("", nudged(decayed("", None, f32).raw, Dtype.F32, share=0.1) + b"\1", f32),
    ]
    found = []
    for case in cases:
        encoding = case.encode(grouped=True)
        found.append(
            Stored(
                encoding.predictor,
                case.dtype,
                encoding.params,
                bytes(encoding.payload),
                len(case.raw),
                case.bases,
            )
        )
    return found


GOLDEN = golden()
ENCODED = encoded()


def test_the_records_are_of_every_predictor_and_decode():
    for records in (GOLDEN, ENCODED):
        assert {record.predictor for record in records} == PREDICTORS_FROM_BASES
        assert all(record.survives() for record in records)


@pytest.mark.slow
@pytest.mark.parametrize("predictor", sorted(PREDICTORS_FROM_BASES), ids=lambda p: p.name)
def test_every_damaged_byte_of_the_parameters(predictor, kernels):
    for record in (r for r in GOLDEN if r.predictor == predictor):
        params = record.params
        for end in range(len(params)):
            assert not replace(record, params=params[:end]).survives()
        assert not replace(record, params=params + b"\0").survives()
        for index in range(len(params)):
            for value in (0, 1, 2, 4, 8, 0x0D, 0x7F, 0x80, 0xFF, params[index] ^ 1):
                changed = params[:index] + bytes([value]) + params[index + 1 :]
                replace(record, params=changed).survives()


@pytest.mark.parametrize("record", ENCODED, ids=lambda r: f"{Predictor(r.predictor).name}")
def test_damaged_payloads(record, kernels):
    rng = random.Random(len(record.payload))
    payload = record.payload
    assert not replace(record, payload=payload + b"\0").survives()
    if payload:
        assert not replace(record, payload=payload[:-1]).survives()
        assert not replace(record, payload=b"").survives()
    for _ in range(120 if payload else 0):
        index = rng.randrange(len(payload))
        flipped = payload[index] ^ 1 << rng.randrange(8)
        changed = payload[:index] + bytes([flipped]) + payload[index + 1 :]
        replace(record, payload=changed).survives()
        assert not replace(record, payload=payload[:index]).survives()


FIELDS = [0, 1, 2, 255, 256, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFE, 0xFFFFFFFF]


@st.composite
def damaged(draw) -> Stored:
    """A valid record, after one to three kinds of damage."""
    record = draw(st.sampled_from(GOLDEN + ENCODED))
    for _ in range(draw(st.integers(1, 3))):
        record = _damage(draw, record)
    return record


def _damage(draw, record: Stored) -> Stored:
    kind = draw(st.sampled_from(["params", "payload", "field", "swap", "size", "head", "bases"]))
    match kind:
        case "params":
            return replace(record, params=_bytes_damaged(draw, record.params))
        case "payload":
            return replace(record, payload=_bytes_damaged(draw, record.payload))
        case "field":
            if len(record.params) < 4:
                return record
            place = draw(st.integers(0, len(record.params) - 4))
            value = struct.pack("<I", draw(st.sampled_from(FIELDS)))
            params = record.params[:place] + value + record.params[place + 4 :]
            return replace(record, params=params)
        case "swap":
            params = record.params
            a, b, c = sorted(draw(st.integers(0, len(params))) for _ in range(3))
            return replace(record, params=params[:a] + params[b:c] + params[a:b] + params[c:])
        case "size":
            step = draw(st.sampled_from([-1000, -8, -1, 1, 3, 8, 5000]))
            return replace(record, raw_size=max(record.raw_size + step, 0))
        case "head":
            return replace(
                record,
                predictor=draw(st.integers(0, 10)),
                dtype=draw(st.sampled_from(list(Dtype))),
            )
        case _:
            return replace(record, bases=_bases_damaged(draw, record.bases))


def _bytes_damaged(draw, data: bytes) -> bytes:
    place = draw(st.integers(0, len(data)))
    match draw(st.sampled_from(["cut", "flip", "extend", "drop"])):
        case "cut":
            return data[:place]
        case "flip" if place < len(data):
            flipped = data[place] ^ 1 << draw(st.integers(0, 7))
            return data[:place] + bytes([flipped]) + data[place + 1 :]
        case "drop":
            return data[:place] + data[place + draw(st.integers(1, 9)) :]
        case _:
            return data[:place] + draw(st.binary(min_size=1, max_size=9)) + data[place:]


def _bases_damaged(draw, bases: tuple[bytes, ...]) -> tuple[bytes, ...]:
    match draw(st.sampled_from(["short", "other", "none", "more", "swapped"])):
        case "short":
            return tuple(base[: draw(st.integers(0, len(base)))] for base in bases)
        case "other":
            noise = random.Random(draw(st.integers(0, 99)))
            return tuple(noise.randbytes(len(base)) for base in bases)
        case "none":
            return bases[1:]
        case "more":
            return (*bases, *bases[:1])
        case _:
            return bases[::-1]


@settings(max_examples=1500, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(record=damaged())
@pytest.mark.slow
def test_whatever_is_wrong_with_a_record(record):
    record.survives()


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@pytest.mark.slow
@given(
    predictor=st.sampled_from(sorted(PREDICTORS_FROM_BASES)),
    dtype=st.sampled_from(list(Dtype)),
    params=st.binary(max_size=60),
    payload=st.binary(max_size=60),
    raw_size=st.integers(-1, 200),
    bases=st.lists(st.binary(max_size=200), max_size=4),
)
def test_arbitrary_bytes(predictor, dtype, params, payload, raw_size, bases):
    Stored(predictor, dtype, params, payload, raw_size, tuple(bases)).survives()


@pytest.mark.parametrize("record", ENCODED, ids=lambda r: f"{Predictor(r.predictor).name}")
def test_wrong_bases(record, kernels):
    noise = random.Random(1)
    others = tuple(noise.randbytes(len(base)) for base in record.bases)
    replace(record, bases=others).survives()
    for size in (0, 1, 100, len(record.bases[0]) // 2):
        assert not replace(record, bases=(record.bases[0][:size], *record.bases[1:])).survives()
    assert not replace(record, bases=record.bases[1:]).survives()
    assert not replace(record, bases=(*record.bases, record.bases[0])).survives()
    replace(record, bases=tuple(base + b"more" for base in record.bases)).survives()
    for flipped in (0, 77, 5001):
        first = bytearray(record.bases[0])
        first[flipped] ^= 0x80
        replace(record, bases=(bytes(first), *record.bases[1:])).survives()


def test_a_group_table_that_is_not_the_bases(kernels):
    record = ENCODED[0]
    assert record.params[4] > 1
    words = np.frombuffer(record.bases[0], "<u2") ^ np.uint16(0x0400)
    assert not replace(record, bases=(words.tobytes(),)).survives()


# --- memory


def peak(record: Stored) -> int:
    """Bytes that decoding has taken at most, in a thread that holds no scratch memory yet."""
    thread = threading.Thread(target=record.survives)
    tracemalloc.start()
    try:
        thread.start()
        thread.join()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def peak_max(record: Stored) -> int:
    words = record.raw_size // unit_of(record.dtype)
    most = max(MEMORY_FACTOR_MAX * record.raw_size, MEMORY_PER_WORD_MAX * words)
    return most + MEMORY_SPARE


def constant_planes(values: bytes) -> tuple[bytes, bytes]:
    return b"\1\1\0\0\0" * len(values), values


SIZE = 1 << 20


def greedy_records() -> dict[str, Stored]:
    """Records of a few bytes that ask for as much as their raw size lets them."""
    base = bytes(SIZE)
    head = struct.pack("<I", SIZE)
    found = {}
    for dtype, unit in ((Dtype.U8, 1), (Dtype.BF16, 2), (Dtype.F32, 4), (Dtype.F64, 8)):
        count = SIZE // unit
        words = struct.pack("<I", count)
        descriptors, planes = constant_planes(bytes(unit))
        group = b"\1\xff" + words
        found[f"planes of {dtype.name}"] = Stored(
            Predictor.DELTA, dtype, words + group + b"\x08" + descriptors, planes, SIZE, (base,)
        )
        codes = b"\1" + struct.pack("<I", count) + b"\1\1\0\0\0"
        found[f"escapes of {dtype.name}"] = Stored(
            Predictor.DELTA,
            dtype,
            words + b"\1\xff" + words + codes + descriptors,
            b"\xff" + planes,
            SIZE,
            (base,),
        )
        changes, gaps = constant_planes(bytes(4))
        found[f"changes of {dtype.name}"] = Stored(
            Predictor.SPARSE,
            dtype,
            words + words + changes + descriptors,
            gaps + planes,
            SIZE,
            (base,),
        )
    words_f32 = struct.pack("<I", SIZE // 4)
    scales, ones = constant_planes(b"\0\0\x80\x3f")
    for name, row, first in (("of one", 1, 1), ("without end", 0xFFFFFFFF, 0xFFFFFFFF)):
        found[f"rows {name}"] = Stored(
            Predictor.QUANTIZE,
            Dtype.I8,
            head + bytes([Dtype.F8_E4M3.code]) + struct.pack("<II", row, first) + scales + b"\0",
            ones,
            SIZE,
            (base,),
        )
    found["steps and planes"] = Stored(
        Predictor.DECAY,
        Dtype.F32,
        words_f32 + scales + b"\1\xff" + words_f32 + b"\x08" + scales,
        ones + ones,
        SIZE,
        (base,),
    )
    small = struct.pack("<I", 10)
    found["last row without end"] = Stored(
        Predictor.QUANTIZE,
        Dtype.I8,
        small + bytes([Dtype.F8_E4M3.code]) + struct.pack("<II", 0xFFFFFFFF, 1) + scales + b"\0",
        ones,
        10,
        (base,),
    )
    return found


GREEDY = greedy_records()


@pytest.mark.parametrize("name", GREEDY)
def test_decoding_takes_a_small_multiple_of_the_raw_size(name):
    record = GREEDY[name]
    assert record.survives()
    assert peak(record) <= peak_max(record)


@pytest.mark.parametrize("record", ENCODED, ids=lambda r: f"{Predictor(r.predictor).name}")
def test_honest_records_take_little_memory(record):
    assert peak(record) <= peak_max(record)
