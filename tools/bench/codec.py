"""Section "codec": encoding and decoding on one core, beside zipnn."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TypeVar, cast

import numpy as np
from blake3 import blake3

from fragfs.codec.encoding import decode
from fragfs.codec.solo import encode_solo
from fragfs.library.catalog import Catalog
from fragfs.library.decode import NO_SOURCE, FragmentDecoder
from fragfs.library.packs import PackReader
from fragfs.library.records import checksum, pack_fragment_record
from fragfs.types import (
    DTYPES_BY_NAME,
    Dtype,
    Fragment,
    FragmentId,
    FragmentMetadata,
    LibraryConfig,
)
from tools.bench.memory import pretouch
from tools.bench.models import Variant, read_tensors
from tools.bench.report import NOT_INSTALLED, Table
from tools.bench.setting import Setting
from tools.bench.workplace import BenchError
from tools.bench.zipnn_codec import DTYPES, open_zipnn

__all__ = [
    "MemoryRecords",
    "Rates",
    "Timer",
    "cut",
    "measure_codec",
    "measure_rates",
    "one_core",
    "store",
    "timer",
]

_RAW_BYTES_MAX = 96 << 20
_TENSOR_BYTES_MIN = 64 << 10
_PIECE_BYTES = 1 << 20

_CONFIG = LibraryConfig()
_Item = TypeVar("_Item")
Timer = Callable[[], float]


class MemoryRecords:
    """Records in memory, in the place of a library's catalog and packs.

    So decoding does all that it does in a library, every check included, but for the look-up in
    SQLite and reading a file.
    """

    def __init__(self) -> None:
        self.records: list[bytes] = []
        self._metadata: list[FragmentMetadata] = []

    def append(self, fragment: Fragment) -> None:
        """Keep a fragment; its number is how many were kept before."""
        header, payload = pack_fragment_record(fragment)
        record = b"".join([header, payload])
        number = len(self.records)
        self.records.append(record)
        self._metadata.append(
            FragmentMetadata(
                number, fragment.id, 1, number, len(record), fragment.raw_size, fragment.predictor
            )
        )

    def fragment(self, number: int) -> FragmentMetadata:
        """As Catalog.fragment."""
        return self._metadata[number]

    def read(self, pack: int, offset: int, size: int) -> bytes:
        """As PackReader.read; the offset is the fragment's number."""
        return self.records[offset]

    def decoder(self) -> FragmentDecoder:
        """A library's decoder that reads from here."""
        return FragmentDecoder(cast("Catalog", self), cast("PackReader", self))


def cut(items: Sequence[tuple[bytes, Dtype]], size: int | None = None) -> list[tuple[bytes, Dtype]]:
    """Tensors in pieces: of `size` bytes, or as a library with the usual settings cuts them."""
    pieces = []
    for raw, dtype in items:
        step = size or _CONFIG.fragment_elements * dtype.bits // 8
        pieces += [(raw[start : start + step], dtype) for start in range(0, len(raw), step)]
    return pieces


def store(raw: bytes, dtype: Dtype) -> Fragment:
    """What adding does to a fragment: name, encode, decode, compare, checksum."""
    fragment_id = FragmentId(blake3(raw).digest())
    encoding = encode_solo(raw, dtype, zstd_level=_CONFIG.zstd_level)
    decoded = decode(
        encoding.predictor, dtype, encoding.params, memoryview(encoding.payload), len(raw)
    )
    if not np.array_equal(np.frombuffer(decoded, np.uint8), np.frombuffer(raw, np.uint8)):
        raise BenchError("a fragment does not decode to what was encoded")
    return Fragment(
        fragment_id,
        dtype,
        len(raw),
        checksum(raw),
        encoding.predictor,
        encoding.params,
        encoding.payload,
    )


@dataclass(frozen=True)
class Rates:
    """Rates of one dtype.

    Attributes:
        raw_size: Bytes encoded and decoded in each round.
        seconds: By what was measured, one value per round; rounds correspond.
    """

    raw_size: int
    seconds: dict[str, list[float]]

    def rate(self, name: str) -> float | None:
        """Median bytes of raw data per second."""
        return self.raw_size / statistics.median(self.seconds[name]) if self._has(name) else None

    def ratio(self, name: str, other: str) -> float | None:
        """Median over the rounds of how many times as fast `name` is as `other`."""
        if not (self._has(name) and self._has(other)):
            return None
        pairs = zip(self.seconds[name], self.seconds[other], strict=True)
        return statistics.median(theirs / ours for ours, theirs in pairs)

    def _has(self, name: str) -> bool:
        return bool(self.seconds.get(name))


def measure_codec(setting: Setting) -> list[Table]:
    """GB/s of raw bytes per core: encoding and decoding, beside zipnn."""
    variants = setting.variants
    with one_core():
        rates = {variant.label: _variant_rates(variant, setting.rounds) for variant in variants}
    table = Table(
        "Codec: GB/s of raw bytes on one core",
        ["", *rates],
        notes=[
            "Median of rounds that run everything once, in changing order, on one core, over"
            f" tensors of {setting.model_name}; ratios are medians of the ratios within a round."
            " Reading: XXH3 of the record's header and of the decoded bytes, as in every read of a"
            " library. Adding: BLAKE3, encoding, decoding it again, comparing, XXH3. zipnn checks"
            " nothing."
        ],
    )
    for name, text in (
        ("add", "**fragfs**, add (checks included)"),
        ("encode", "fragfs, encode alone"),
        ("zipnn encode", "zipnn, encode, whole tensors"),
        ("zipnn encode 1M", "zipnn, encode, 1 MiB pieces"),
        ("read", "**fragfs**, read (checks included)"),
        ("decode", "fragfs, decode alone"),
        ("zipnn decode", "zipnn, decode, whole tensors"),
        ("zipnn decode 1M", "zipnn, decode, 1 MiB pieces"),
    ):
        values = {label: measured.rate(name) for label, measured in rates.items()}
        _add_row(table, values, f"{name}_rate".replace(" ", "_"), text, 1e9)
    for key, ours, theirs in (
        ("encode_ratio", "add", "zipnn encode"),
        ("encode_ratio_1m", "add", "zipnn encode 1M"),
        ("decode_ratio", "read", "zipnn decode"),
        ("decode_ratio_1m", "read", "zipnn decode 1M"),
    ):
        pieces = "1 MiB pieces" if theirs.endswith("1M") else "whole tensors"
        text = f"fragfs, {ours} / zipnn, {pieces}"
        values = {label: measured.ratio(ours, theirs) for label, measured in rates.items()}
        _add_row(table, values, key, text, 1)
    return [table]


def _add_row(
    table: Table, values: dict[str, float | None], key: str, text: str, scale: float
) -> None:
    cells = []
    for label, value in values.items():
        cells.append(NOT_INSTALLED if value is None else f"{value / scale:.2f}")
        if value is not None:
            table.figures[f"codec.{label}.{key}"] = value
    table.add(text, *cells)


@contextmanager
def one_core() -> Iterator[None]:
    """Keep this process on one core, so that no library uses more of them than another."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(cores)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


def _variant_rates(variant: Variant, rounds: int) -> Rates:
    """Rates over the large tensors of the precision that most of the model has."""
    found = [tensor for path in variant.files for tensor in read_tensors(path)]
    known = [t for t in found if t.dtype in DTYPES and len(t.raw) >= _TENSOR_BYTES_MIN]
    if not known:
        raise BenchError(f"the model ({variant.label}) has no f32, bf16 or f16 tensor to measure")
    sizes = {name: sum(len(t.raw) for t in known if t.dtype == name) for name in DTYPES}
    main = max(sizes, key=lambda name: sizes[name])
    items: list[bytes] = []
    for tensor in known:
        if tensor.dtype == main and sum(map(len, items)) < _RAW_BYTES_MAX:
            items.append(bytes(tensor.raw[:_RAW_BYTES_MAX]))
    return measure_rates(items, main, rounds)


def measure_rates(items: Sequence[bytes], dtype_name: str, rounds: int) -> Rates:
    """Encode and decode tensors again and again, with everything that is to be compared.

    Args:
        items: Raw tensors, all of one dtype.
        dtype_name: That dtype, as safetensors spells it; one of `DTYPES`.
        rounds: How often, after one round that is not counted.
    """
    dtype = DTYPES_BY_NAME[dtype_name]
    whole: list[tuple[bytes, Dtype]] = [(raw, dtype) for raw in items]
    raw_size = sum(map(len, items))
    timers = _fragfs_timers(cut(whole), raw_size)
    timers |= _zipnn_timers(dtype_name, whole, raw_size)
    seconds: dict[str, list[float]] = {name: [] for name in timers}
    names = list(timers)
    for number in range(rounds + 1):
        for name in names[:: -1 if number % 2 else 1]:
            taken = timers[name]()
            if number:
                seconds[name].append(taken)
    return Rates(raw_size, seconds)


def _fragfs_timers(pieces: list[tuple[bytes, Dtype]], raw_size: int) -> dict[str, Timer]:
    memory = MemoryRecords()
    fragments = [store(raw, dtype) for raw, dtype in pieces]
    for fragment in fragments:
        memory.append(fragment)
    decoder = memory.decoder()
    stored = [
        (f.predictor, f.dtype, f.params, memoryview(f.payload), f.raw_size) for f in fragments
    ]
    numbers = range(len(pieces))
    level = _CONFIG.zstd_level
    return {
        "add": timer(lambda piece: store(*piece), lambda: pieces, raw_size),
        "encode": timer(
            lambda piece: encode_solo(*piece, zstd_level=level), lambda: pieces, raw_size
        ),
        "read": timer(lambda n: decoder.decode(n, NO_SOURCE), lambda: numbers, raw_size),
        "decode": timer(lambda fields: decode(*fields), lambda: stored, raw_size),
    }


def _zipnn_timers(
    dtype_name: str, whole: list[tuple[bytes, Dtype]], raw_size: int
) -> dict[str, Timer]:
    codec = open_zipnn(dtype_name)
    if codec is None:
        return {}
    timers: dict[str, Timer] = {}
    for suffix, pieces in (("", whole), (" 1M", cut(whole, _PIECE_BYTES))):
        raws = [raw for raw, _ in pieces]
        packed = [codec.encode(raw) for raw in _copies(raws)]
        if any(codec.decode(one) != raw for one, raw in zip(packed, raws, strict=True)):
            raise BenchError("zipnn does not decode to what it encoded")
        # It rearranges its input in place (0.5.4): every encoding gets a copy, made beforehand.
        timers[f"zipnn encode{suffix}"] = timer(codec.encode, partial(_copies, raws), raw_size)
        timers[f"zipnn decode{suffix}"] = timer(codec.decode, partial(list, packed), raw_size)
    return timers


def _copies(raws: Sequence[bytes]) -> list[bytes]:
    return [bytes(bytearray(raw)) for raw in raws]


def timer(
    function: Callable[[_Item], object], make_items: Callable[[], Sequence[_Item]], raw_size: int
) -> Timer:
    """What gives the seconds of this process's core that calling a function for items takes."""

    def time_once() -> float:
        items = make_items()
        pretouch(2 * raw_size)
        start = time.process_time()
        for item in items:
            function(item)
        return time.process_time() - start

    return time_once
