"""How well signatures find siblings, measured: synthetic weights, a large library, real models.

    python -m tests.similarity.measure_recall                  synthetic weights and 10**5 fragments
    python -m tests.similarity.measure_recall --large          the same with 10**6 fragments
    python -m tests.similarity.measure_recall DIR              real models: DIR/*/*.safetensors

An independent oracle says which fragments are siblings: numbers at thousands of places, none of
which it shares with signatures, compared up to a scale. No hints by name are given.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sqlite3
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import ml_dtypes
import numpy as np

from fragfs.similarity.index import MemorySignatureRows, SimilarityIndex, split_limit
from fragfs.similarity.signature import (
    DEFAULT_SIGNATURE_CONFIG,
    SIGNATURE_VERSION,
    FragmentSignature,
    SignatureConfig,
    sign_fragment,
)
from fragfs.similarity.sketch import sketch_distance, sketch_distances
from fragfs.types import DTYPES_BY_NAME, Dtype

FRAGMENT_ELEMENTS = 1 << 19

NUMPY_DTYPES = {
    Dtype.F32: np.dtype("<f4"),
    Dtype.F16: np.dtype("<f2"),
    Dtype.BF16: np.dtype(ml_dtypes.bfloat16),
    Dtype.F8_E4M3: np.dtype(ml_dtypes.float8_e4m3fn),
    Dtype.F8_E5M2: np.dtype(ml_dtypes.float8_e5m2),
    Dtype.I8: np.dtype("<i1"),
}


class SqliteSignatureRows:
    """Signature rows as a catalog keeps them: sketches by number, and an index by key."""

    def __init__(self, path: str = ":memory:") -> None:
        self.connection = sqlite3.connect(path)
        self.connection.executescript(
            "PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; PRAGMA cache_size = -200000;"
            "CREATE TABLE sketch (fragment INTEGER PRIMARY KEY, sketch BLOB);"
            "CREATE TABLE similar (key INTEGER, fragment INTEGER, PRIMARY KEY (key, fragment))"
            " WITHOUT ROWID;"
        )

    def add(self, number: int, signature: FragmentSignature, hint_keys: Sequence[int] = ()) -> None:
        self.add_many([(number, signature.sketch, [*signature.keys, *hint_keys])])

    def add_many(self, rows: Sequence[tuple[int, bytes, Sequence[int]]]) -> None:
        self.connection.executemany(
            "INSERT OR REPLACE INTO sketch VALUES (?, ?)",
            [(number, sketch) for number, sketch, _ in rows],
        )
        self.connection.executemany(
            "INSERT OR IGNORE INTO similar VALUES (?, ?)",
            sorted({(key, number) for number, _, keys in rows for key in keys}),
        )

    def fragments_of(self, keys: Sequence[int], limit: int) -> list[tuple[int, bytes]]:
        oldest, newest = split_limit(limit)
        found: dict[int, bytes] = {}
        query = (
            "SELECT fragment, sketch FROM similar JOIN sketch USING (fragment)"
            " WHERE key = ? ORDER BY fragment {} LIMIT ?"
        )
        for key in dict.fromkeys(keys):
            rows = self.connection.execute(query.format(""), (key, limit + 1)).fetchall()
            if len(rows) > limit:
                del rows[oldest:]
                rows += self.connection.execute(query.format("DESC"), (key, newest))
            found.update(rows)
        return sorted(found.items())


@dataclass
class CountingRows:
    """Rows that count what queries look at."""

    rows: MemorySignatureRows | SqliteSignatureRows
    queries: int = 0
    scored: int = 0

    def fragments_of(self, keys: Sequence[int], limit: int) -> list[tuple[int, bytes]]:
        found = self.rows.fragments_of(keys, limit)
        self.queries += 1
        self.scored += len(found)
        return found


def print_table(head: str, rows: Sequence[Sequence[object]]) -> None:
    print(f"\n{head}")
    texts = [[f"{x:.4g}" if isinstance(x, float) else str(x) for x in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    for row in texts:
        print("  " + "  ".join(x.rjust(w) for x, w in zip(row, widths, strict=True)))


# Synthetic weights


def cast_int8(values: np.ndarray) -> np.ndarray:
    return np.rint(values * (127 / np.abs(values).max()))


def synthetic_changes(rng: np.random.Generator) -> dict[str, tuple[Dtype, Callable]]:
    """What is done to a fragment of weights: name to (dtype, function of float32 weights)."""

    def noise(share: float) -> Callable[[np.ndarray], np.ndarray]:
        return lambda x: x + rng.standard_normal(x.size, np.float32) * np.float32(x.std() * share)

    def keep(x: np.ndarray) -> np.ndarray:
        return x

    changes: dict[str, tuple[Dtype, Callable]] = {}
    for share in (0.002, 0.01, 0.03, 0.05, 0.1, 0.2, 0.5):
        changes[f"noise {share:.1%}"] = (Dtype.F32, noise(share))
    for dtype in (Dtype.BF16, Dtype.F16, Dtype.F8_E4M3, Dtype.F8_E5M2):
        changes[f"cast {dtype.name}"] = (dtype, keep)
    changes["noise 3.0% BF16"] = (Dtype.BF16, noise(0.03))
    changes["noise 3.0% F8_E4M3"] = (Dtype.F8_E4M3, noise(0.03))
    changes["scaled F8_E4M3"] = (Dtype.F8_E4M3, lambda x: x * (448 / np.abs(x).max()))
    changes["int8"] = (Dtype.I8, cast_int8)
    changes["noise 3.0% int8"] = (Dtype.I8, lambda x: cast_int8(noise(0.03)(x)))
    changes["int8 per 512 row"] = (
        Dtype.I8,
        lambda x: np.concatenate([cast_int8(row) for row in np.split(x, x.size // 512)]),
    )
    changes["5% of rows new"] = (Dtype.F32, lambda x: _renew_rows(rng, x))
    changes["shorter by 1 row"] = (Dtype.F32, lambda x: noise(0.01)(x[:-512]))
    changes["shorter by 40%"] = (Dtype.F32, lambda x: noise(0.01)(x[: x.size * 6 // 10]))
    changes["stranger"] = (Dtype.F32, lambda x: rng.permutation(x))
    return changes


def _renew_rows(rng: np.random.Generator, values: np.ndarray) -> np.ndarray:
    rows = values.reshape(-1, 512).copy()
    chosen = rng.random(len(rows)) < 0.05
    rows[chosen] = rng.standard_normal((chosen.sum(), 512)) * values.std()
    return rows.reshape(-1)


def measure_synthetic(config: SignatureConfig, fragments: int = 300, count: int = 1 << 14) -> None:
    rng = np.random.default_rng(7)
    rows, others = CountingRows(MemorySignatureRows()), MemorySignatureRows()
    index = SimilarityIndex(rows, config=config)
    weights, sketches = [], []
    for number in range(fragments):
        draw = rng.standard_normal(count) if number % 2 else rng.standard_t(5, count) * 0.77
        weights.append((draw * (0.02 + 0.03 * rng.random())).astype(np.float32))
        signature = sign_fragment(weights[-1].tobytes(), Dtype.F32, config)
        assert signature
        rows.rows.add(number, signature)
        others.add(number, signature)
        sketches.append(signature.sketch)
    table: list[list[object]] = [["change", "key met", "top 1", "wrong", "distance", "p1", "p99"]]
    for name, (dtype, change) in synthetic_changes(rng).items():
        met = top = wrong = 0
        distances = []
        for number, values in enumerate(weights):
            raw = change(values).astype(NUMPY_DTYPES[dtype]).tobytes()
            signature = sign_fragment(raw, dtype, config)
            assert signature
            keys = dict(others.fragments_of(signature.keys, 1000))
            met += number in keys
            distances.append(sketch_distance(signature.sketch, sketches[number]))
            matches = index.query(signature)
            top += bool(matches) and matches[0].fragment == number
            wrong += any(match.fragment != number for match in matches)
        table.append(
            [
                name,
                met / fragments,
                top / fragments,
                wrong / fragments,
                float(np.mean(distances)),
                *np.quantile(distances, (0.01, 0.99)).tolist(),
            ]
        )
    print_table(f"synthetic: {fragments} fragments of {count} numbers", table)
    print(f"  scored per query: {rows.scored / rows.queries:.2f} of {fragments}")


# A large library


def measure_library(config: SignatureConfig, fragments: int, folder: str) -> None:
    """Bytes and time per query with one family of 1,000, 100 of 10, and strangers.

    The families are real fragments; the strangers' signatures are made up, with coarse keys that
    are as likely to be equal as those of real weights: one of 32 tokens per window.
    """
    rng = np.random.default_rng(11)
    path = str(Path(folder, "similar.sqlite"))
    rows = SqliteSignatureRows(path)
    members = _families(rng, config)
    count = len(members)
    places = rng.permutation(fragments)[:count]
    places.sort()
    by_place = dict(zip(places.tolist(), members, strict=True))
    coarse = rng.integers(0, 32**config.band_windows, (fragments, config.bands))
    fine = rng.integers(-(2**31), 2**31, (fragments, 3))
    # Spread over 32 bits by an odd factor, as hashing does.
    band_keys = (coarse * config.bands + np.arange(config.bands)) * 2654435761 % 2**32 - 2**31
    keys = np.concatenate([band_keys, fine], axis=1).tolist()
    sketch = members[0][1].sketch
    start = time.perf_counter()
    for first in range(0, fragments, 2000):
        batch = []
        for number in range(first, min(first + 2000, fragments)):
            member = by_place.get(number)
            if member is None:
                batch.append((number, sketch[:4] + rng.bytes(44), keys[number]))
            else:
                batch.append((number, member[1].sketch, [*member[1].keys, keys[number][-1]]))
        rows.add_many(batch)
    rows.connection.commit()
    insert_s = time.perf_counter() - start
    counting = CountingRows(rows)
    index = SimilarityIndex(counting, config=config)
    numbers = {member[0]: place for place, member in by_place.items()}
    table: list[list[object]] = [["query", "top 1", "top 4", "us", "us p90"]]
    for name, wanted, queries in _family_queries(rng, config):
        top = four = 0
        times = []
        for truth, signature in zip(wanted, queries, strict=True):
            start = time.perf_counter()
            found = [match.fragment for match in index.query(signature)]
            times.append((time.perf_counter() - start) * 1e6)
            good = {numbers[member] for member in truth}
            top += bool(found) and found[0] in good
            four += bool(good & set(found))
        total = len(queries)
        table.append(
            [
                name,
                top / total,
                four / total,
                statistics.median(times),
                float(np.quantile(times, 0.9)),
            ]
        )
    print_table(f"library of {fragments} fragments", table)
    mean = counting.scored / counting.queries
    print(f"  scored per query: {mean:.1f}, {mean / fragments:.2e} of the library")
    print(
        f"  bytes per fragment: {os.path.getsize(path) / fragments:.0f}"
        f" ({config.bands} coarse, 2 fine and 1 name key, sketch and row);"
        f" {insert_s / fragments * 1e6:.0f} us to insert"
    )


LARGE_FAMILY, SMALL_FAMILIES, SMALL_FAMILY, MEMBER_NUMBERS = 1000, 100, 10, 4096
LARGE_NOISE, SMALL_NOISE, NEIGHBOUR_NOISE = 0.03, 0.05, 0.004


def _weights(*path: int) -> np.ndarray:
    return np.random.default_rng(path).standard_normal(MEMBER_NUMBERS).astype(np.float32)


def _member(family: int, member: int) -> np.ndarray:
    """Member 0 is the base; the others are fine-tunes of it, unrelated to each other."""
    base = _weights(family, 0)
    noise = LARGE_NOISE if family == 0 else SMALL_NOISE
    return base if member == 0 else base + _weights(family, member) * np.float32(noise)


def _families(
    rng: np.random.Generator, config: SignatureConfig
) -> list[tuple[tuple[int, int], FragmentSignature]]:
    names = [(0, member) for member in range(1, LARGE_FAMILY)]
    names += itertools.product(range(1, SMALL_FAMILIES + 1), range(1, SMALL_FAMILY))
    rng.shuffle(names)
    names = [(family, 0) for family in range(SMALL_FAMILIES + 1)] + [tuple(n) for n in names]
    return [(name, _sign(_member(*name), config)) for name in names]


def _sign(values: np.ndarray, config: SignatureConfig) -> FragmentSignature:
    raw = values.astype(ml_dtypes.bfloat16).tobytes()
    signature = sign_fragment(raw, Dtype.BF16, config)
    assert signature
    return signature


def _family_queries(
    rng: np.random.Generator, config: SignatureConfig
) -> Iterator[tuple[str, list[list[tuple[int, int]]], list[FragmentSignature]]]:
    for share in (0.001, NEIGHBOUR_NOISE, 0.01):
        members = [(0, int(n)) for n in rng.integers(1, LARGE_FAMILY, 200)]
        near = [_member(*name) + _weights(7, *name) * np.float32(share) for name in members]
        name = f"one of 1000: next checkpoint, {share:.1%} on"
        yield name, [[m] for m in members], [_sign(x, config) for x in near]
    fresh = [_member(0, LARGE_FAMILY + n) for n in range(200)]
    yield (
        "one of 1000: base of a new fine-tune",
        [[(0, 0)]] * 200,
        [_sign(x, config) for x in fresh],
    )
    families = [1 + n % SMALL_FAMILIES for n in range(200)]
    fresh = [_member(family, 100 + n) for n, family in enumerate(families)]
    yield (
        "ten: base of a new fine-tune",
        [[(family, 0)] for family in families],
        [_sign(x, config) for x in fresh],
    )
    near = [
        _member(family, 1 + n % 9) + _weights(8, family, n) * np.float32(NEIGHBOUR_NOISE)
        for n, family in enumerate(families)
    ]
    yield (
        "ten: next checkpoint",
        [[(family, 1 + n % 9)] for n, family in enumerate(families)],
        [_sign(x, config) for x in near],
    )
    strangers = [_weights(9, n) for n in range(200)]
    yield "stranger (should find nothing)", [[]] * 200, [_sign(x, config) for x in strangers]


# Real models


@dataclass
class RealFragment:
    model: str
    tensor: str
    index: int
    dtype: Dtype
    count: int
    signature: FragmentSignature | None
    probe: dict[int, np.ndarray] = field(repr=False)
    sign_us: float = 0.0


def read_fragments(path: Path, model: str, config: SignatureConfig) -> Iterator[RealFragment]:
    raw = memoryview(np.memmap(path, np.uint8, mode="r"))
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(bytes(raw[8 : 8 + size]))
    for tensor, entry in header.items():
        dtype = DTYPES_BY_NAME.get(entry.get("dtype", ""))
        if dtype not in NUMPY_DTYPES:
            continue
        begin, end = (8 + size + offset for offset in entry["data_offsets"])
        step = FRAGMENT_ELEMENTS * dtype.bits // 8
        for index, offset in enumerate(range(begin, end, step)):
            part = bytes(raw[offset : min(offset + step, end)])
            if len(part) < 4096:
                continue
            start = time.perf_counter()
            signature = sign_fragment(part, dtype, config)
            sign_us = (time.perf_counter() - start) * 1e6
            values = np.frombuffer(part, NUMPY_DTYPES[dtype])
            yield RealFragment(
                model, tensor, index, dtype, values.size, signature, _probe(values), sign_us
            )


def _probe(values: np.ndarray) -> dict[int, np.ndarray]:
    """2,048 numbers of the prefix of each length that a sibling may have."""
    probes = {}
    for count in {values.size, 1 << (values.size.bit_length() - 1)}:
        places = np.random.default_rng(count).integers(0, count, 2048)
        with np.errstate(all="ignore"):
            probe = values[places].astype(np.float64)
        probe = np.nan_to_num(probe - np.median(probe))
        probes[count] = probe / max(np.sqrt(np.square(probe).sum()), 1e-300)
    return probes


def oracle_distance(a: RealFragment, b: RealFragment) -> float:
    """What of one fragment's spread the other does not explain up to a scale: 0 to 1."""
    common = set(a.probe) & set(b.probe)
    if not common:
        return 1.0
    count = max(common)
    cosine = float(a.probe[count] @ b.probe[count])
    return float(np.sqrt(max(0.0, 1 - cosine * max(cosine, 0.0))))


SIBLING, STRANGER = 0.4, 0.9


def measure_models(
    directory: Path, config: SignatureConfig, first: Sequence[str] = ()
) -> list[RealFragment]:
    """Recall by model (library: all models before it) and by pair of models."""
    paths = sorted(directory.glob("[!.]*/*.safetensors"))
    paths.sort(key=lambda path: (path.parent.name not in first, path.parent.name))
    fragments = [f for path in paths for f in read_fragments(path, path.parent.name, config)]
    by_model: dict[str, list[int]] = {}
    for number, fragment in enumerate(fragments):
        by_model.setdefault(fragment.model, []).append(number)
    models = list(by_model)
    print(f"{len(models)} models, {len(fragments)} fragments of at least 4 KiB")
    unsigned = [f for f in fragments if f.signature is None]
    print(f"without signature: {len(unsigned)}", *[(f.model, f.tensor) for f in unsigned[:5]])
    oracle = np.ones((len(fragments), len(fragments)))
    for i, a in enumerate(fragments):
        for j in range(i):
            oracle[i, j] = oracle[j, i] = oracle_distance(a, fragments[j])
    _print_arrival(fragments, by_model, oracle, config)
    _print_pairs(fragments, by_model, models, oracle, config)
    _print_strangers(fragments, oracle)
    times = [f.sign_us for f in fragments if f.count == FRAGMENT_ELEMENTS]
    if times:
        print(f"  us to sign a full fragment: {statistics.median(times):.0f}")
    return fragments


def _print_arrival(
    fragments: list[RealFragment],
    by_model: dict[str, list[int]],
    oracle: np.ndarray,
    config: SignatureConfig,
) -> None:
    memory = MemorySignatureRows()
    rows = CountingRows(memory)
    index = SimilarityIndex(rows, config=config)
    table: list[list[object]] = [
        "model|dtype|siblings|top 1|top 4|near best 1|near best 4|wrong|scored|library".split("|")
    ]
    sums = np.zeros(6)
    for model, numbers in by_model.items():
        scores = np.zeros(6)
        before = numbers[0]
        rows.queries = rows.scored = 0
        for number in numbers:
            signature = fragments[number].signature
            truth = oracle[number, :before]
            best = truth.min(initial=1.0)
            found = [m.fragment for m in index.query(signature)] if signature else []
            scores[5] += any(truth[f] > STRANGER for f in found)
            if best > SIBLING:
                continue
            hits = [truth[f] <= SIBLING for f in found]
            near = [truth[f] <= 1.25 * best + 0.002 for f in found]
            scores[:5] += [1, any(hits[:1]), any(hits), any(near[:1]), any(near)]
        for number in numbers:
            if signature := fragments[number].signature:
                memory.add(number, signature)
        shares = (scores[1:5] / max(scores[0], 1)).tolist()
        table.append(
            [
                model,
                fragments[numbers[0]].dtype.name,
                int(scores[0]),
                *shares,
                int(scores[5]),
                rows.scored / max(rows.queries, 1),
                before,
            ]
        )
        sums += scores
    shares = (sums[1:5] / max(sums[0], 1)).tolist()
    table.append(["all", "", int(sums[0]), *shares, int(sums[5]), "", ""])
    print_table("each model against those before it", table)


def _print_pairs(
    fragments: list[RealFragment],
    by_model: dict[str, list[int]],
    models: list[str],
    oracle: np.ndarray,
    config: SignatureConfig,
) -> None:
    """Fragments of one model (rows) whose sibling is found in another one alone (columns)."""
    groups: dict[tuple[str, str], list[float]] = {}
    table: list[list[object]] = [["", *range(len(models))]]
    for row, a in enumerate(models):
        line: list[object] = [f"{row} {a}"]
        for b in models:
            memory = MemorySignatureRows()
            for number in by_model[b]:
                if signature := fragments[number].signature:
                    memory.add(number, signature)
            index = SimilarityIndex(memory, config=config)
            total = hits = 0
            for number in by_model[a]:
                truth = oracle[number, by_model[b]]
                if a == b or truth.min() > SIBLING:
                    continue
                total += 1
                signature = fragments[number].signature
                found = [m.fragment for m in index.query(signature)] if signature else []
                hit = any(oracle[number, f] <= SIBLING for f in found[:1])
                hits += hit
                sibling = by_model[b][int(truth.argmin())]
                pair = (fragments[number].dtype.name, fragments[sibling].dtype.name)
                groups.setdefault(pair, []).append(float(hit))
            line.append(f"{100 * hits / total:.0f}" if total else "-")
        table.append(line)
    print_table("recall at top 1 between two models, in percent", table)
    print_table(
        "by dtype of target and base",
        [["target", "base", "pairs", "top 1"]]
        + [[a, b, len(x), statistics.fmean(x)] for (a, b), x in sorted(groups.items())],
    )


def _print_strangers(fragments: list[RealFragment], oracle: np.ndarray) -> None:
    signed = [n for n, f in enumerate(fragments) if f.signature]
    sketches = [fragments[n].signature.sketch for n in signed]
    bins = [0, 0.002, 0.01, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 1.1]
    found: list[list[float]] = [[] for _ in bins]
    for position, number in enumerate(signed):
        distances = sketch_distances(sketches[position], sketches)
        truths = oracle[number, signed]
        for other in range(len(signed)):
            if other != position:
                bin_ = int(np.searchsorted(bins, truths[other], "right")) - 1
                found[bin_].append(distances[other])
    table: list[list[object]] = [["true distance", "pairs", "mean", "p1", "p99", "within 0.6"]]
    for low, high, values in zip(bins, bins[1:], found, strict=False):
        if values:
            data = np.array(values)
            quantiles = np.quantile(data, (0.01, 0.99)).tolist()
            table.append(
                [
                    f"{low}-{high}",
                    len(values),
                    float(data.mean()),
                    *quantiles,
                    float((data <= 0.6).mean()),
                ]
            )
    print_table("sketch distance by true distance, all pairs of fragments", table)
    shared: dict[int, int] = {}
    for number in signed:
        for key in fragments[number].signature.keys:
            shared[key] = shared.get(key, 0) + 1
    print(f"  most fragments under one key: {max(shared.values())}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", nargs="?", type=Path)
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--first", nargs="*", default=[], help="models that were added first")
    arguments = parser.parse_args()
    print(f"signature version {SIGNATURE_VERSION}, {DEFAULT_SIGNATURE_CONFIG}")
    if arguments.directory:
        measure_models(arguments.directory, DEFAULT_SIGNATURE_CONFIG, arguments.first)
        return
    measure_synthetic(DEFAULT_SIGNATURE_CONFIG)
    with tempfile.TemporaryDirectory() as folder:
        fragments = 1_000_000 if arguments.large else 100_000
        measure_library(DEFAULT_SIGNATURE_CONFIG, fragments, folder)


if __name__ == "__main__":
    main()
