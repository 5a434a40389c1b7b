"""Section "delta": decoding and encoding of predicted fragments on one core, beside zipnn.

The fine-tune is made up: the model's own weights moved by noise of one size for a whole tensor, as
optimizers move them. What is decoded has its bases decoded already, unless a row says otherwise.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np

from fragfs.codec.choose import Choice, encode_best
from fragfs.codec.encoding import decode
from fragfs.codec.solo import encode_solo
from fragfs.codec.trials import Candidate
from fragfs.library.records import checksum
from fragfs.similarity.index import MemorySignatureRows, SimilarityIndex
from fragfs.types import Dtype, Level
from tools.bench.codec import Timer, one_core, timer
from tools.bench.models import Variant, cast_f32, read_tensors
from tools.bench.report import NOT_INSTALLED, Table
from tools.bench.setting import Setting
from tools.bench.workplace import BenchError
from tools.bench.zipnn_codec import open_zipnn

__all__ = ["measure_delta"]

_ELEMENTS = 1 << 19
_FRAGMENTS_MAX = 24
_NOISE = 0.004
"""The fine-tune's noise, as a share of a tensor's standard deviation: stores 0.14, a usual one."""
_ZSTD_LEVEL = 12


@dataclass(frozen=True)
class _Case:
    """A kind of prediction.

    Attributes:
        name: For people.
        key: For programs.
        level: What encodings to prefer.
        dtype: Of the targets.
        targets: Fragments to store.
        bases: The bases of each.
    """

    name: str
    key: str
    level: Level
    dtype: Dtype
    targets: Sequence[bytes]
    bases: Sequence[Sequence[tuple[bytes, Dtype]]]


def measure_delta(setting: Setting) -> list[Table]:
    """Stored / raw and GB/s of each kind of prediction."""
    table = Table(
        "Predicted fragments: GB/s of raw bytes on one core",
        ["", "stored / raw", "decode", "with bases", "encode", "decode / zipnn's"],
        notes=[
            "Decode: with the checksum of the result, bases decoded before. With bases: those are"
            " stored solo and decoded as well. Encode: signing, searching, choosing and encoding,"
            " as `add` does. zipnn decodes the same bytes, which it stores solo."
        ],
    )
    with one_core():
        for case in _cases(setting.variants):
            _measure(case, setting.rounds, table)
    return [table]


def _cases(variants: Sequence[Variant]) -> list[_Case]:
    wide = _fragments(next(v for v in variants if v.label == "f32"))
    rng = np.random.default_rng(3)
    base = [cast_f32(memoryview(raw), "BF16") for raw in wide]
    half = [cast_f32(memoryview(raw), "F16") for raw in wide]
    tuned_wide = [[_tune(raw, rng) for raw in wide] for _ in range(2)]
    tuned, other = ([cast_f32(memoryview(raw), "BF16") for raw in one] for one in tuned_wide)
    merged = [
        cast_f32(memoryview((np.frombuffer(a, "<f4") + np.frombuffer(b, "<f4")) / 2), "BF16")
        for a, b in zip(*tuned_wide, strict=True)
    ]
    b16, f32 = Dtype.BF16, Dtype.F32
    on_base = [[(raw, b16)] for raw in base]
    on_wide = [[(raw, f32)] for raw in wide]
    on_both = [[(a, b16), (b, b16)] for a, b in zip(tuned, other, strict=True)]
    return [
        *(
            _Case(
                f"bf16 delta, `{level.name.lower()}`",
                f"delta_{level.name.lower()}",
                level,
                b16,
                tuned,
                on_base,
            )
            for level in (Level.FAST, Level.BALANCED, Level.SMALL)
        ),
        _Case("f32 delta, `balanced`", "delta_f32", Level.BALANCED, f32, tuned_wide[0], on_wide),
        _Case("bf16 cast of f32", "cast_bf16", Level.BALANCED, b16, base, on_wide),
        _Case("f16 cast of f32", "cast_f16", Level.BALANCED, Dtype.F16, half, on_wide),
        _Case("bf16 blend of two, `fast`", "blend_fast", Level.FAST, b16, merged, on_both),
        _Case("bf16 blend of two, `small`", "blend_small", Level.SMALL, b16, merged, on_both),
    ]


def _fragments(variant: Variant) -> list[bytes]:
    """Whole fragments of the model's largest tensors."""
    found: list[bytes] = []
    for path in variant.files:
        for tensor in read_tensors(path):
            step = 4 * _ELEMENTS
            pieces = range(0, len(tensor.raw) - step + 1, step) if tensor.dtype == "F32" else ()
            found += [bytes(tensor.raw[start : start + step]) for start in pieces]
    if not found:
        raise BenchError("the model has no tensor of half a million f32 weights to measure")
    return found[:: max(1, len(found) // _FRAGMENTS_MAX)][:_FRAGMENTS_MAX]


def _tune(raw: bytes, rng: np.random.Generator) -> bytes:
    weights = np.frombuffer(raw, "<f4")
    noise = rng.standard_normal(weights.size, np.float32)
    return (weights + noise * np.float32(_NOISE * weights.std())).tobytes()


def _measure(case: _Case, rounds: int, table: Table) -> None:
    choices = [
        _encode(case, raw, bases) for raw, bases in zip(case.targets, case.bases, strict=True)
    ]
    raw_size = sum(map(len, case.targets))
    stored = sum(choice.encoding.size for choice in choices)
    timers = _timers(case, choices, raw_size)
    seconds: dict[str, list[float]] = {name: [] for name in timers}
    for number in range(rounds + 1):
        for name in list(timers)[:: -1 if number % 2 else 1]:
            taken = timers[name]()
            if number:
                seconds[name].append(taken)
    cells = [f"{stored / raw_size:.3f}"]
    table.figures[f"delta.{case.key}.stored"] = stored / raw_size
    for name in ("decode", "closure", "encode"):
        rate = raw_size / statistics.median(seconds[name]) / 1e9
        table.figures[f"delta.{case.key}.{name}"] = rate
        cells.append(f"{rate:.2f}")
    if "zipnn" in seconds:
        pairs = zip(seconds["decode"], seconds["zipnn"], strict=True)
        ratio = statistics.median(theirs / ours for ours, theirs in pairs)
        table.figures[f"delta.{case.key}.zipnn_ratio"] = ratio
        cells.append(f"{ratio:.2f}")
    else:
        cells.append(NOT_INSTALLED)
    table.add(case.name, *cells)


def _encode(case: _Case, raw: bytes, bases: Sequence[tuple[bytes, Dtype]]) -> Choice:
    candidates = [Candidate(memoryview(base), dtype) for base, dtype in bases]
    choice = encode_best(raw, case.dtype, candidates, level=case.level, zstd_level=_ZSTD_LEVEL)
    if len(choice.bases) != len(bases):
        raise BenchError(f"{case.name}: a fragment is not predicted from its bases")
    return choice


def _timers(case: _Case, choices: Sequence[Choice], raw_size: int) -> dict[str, Timer]:
    numbers = range(len(case.targets))
    solo = [
        [
            (encode_solo(base, dtype, zstd_level=_ZSTD_LEVEL), dtype, len(base))
            for base, dtype in one
        ]
        for one in case.bases
    ]
    rows = MemorySignatureRows()
    similar = SimilarityIndex(rows)
    for number in numbers:
        for base, dtype in case.bases[number]:
            signature = similar.sign(base, dtype)
            if signature is not None:
                rows.add(number, signature)

    def decode_one(number: int, bases: Sequence[memoryview] | None = None) -> None:
        encoding, given = choices[number].encoding, choices[number].raws
        raw = decode(
            encoding.predictor,
            case.dtype,
            encoding.params,
            memoryview(encoding.payload),
            len(case.targets[number]),
            given if bases is None else bases,
        )
        checksum(raw)

    def decode_all(number: int) -> None:
        bases = []
        for index in choices[number].bases:
            encoding, dtype, size = solo[number][index]
            payload = memoryview(encoding.payload)
            bases.append(decode(encoding.predictor, dtype, encoding.params, payload, size))
            checksum(bases[-1])
        decode_one(number, bases)

    def encode_one(number: int) -> None:
        signature = similar.sign(case.targets[number], case.dtype)
        if signature is not None:
            similar.query(signature)
        _encode(case, case.targets[number], case.bases[number])

    def made(function: Callable[[int], None]) -> Timer:
        return timer(function, lambda: numbers, raw_size)

    timers = {"decode": made(decode_one), "closure": made(decode_all), "encode": made(encode_one)}
    codec = open_zipnn(case.dtype.name)
    if codec is not None:
        packed = [codec.encode(bytes(bytearray(raw))) for raw in case.targets]
        timers["zipnn"] = timer(codec.decode, lambda: packed, raw_size)
    return cast("dict[str, Timer]", timers)
