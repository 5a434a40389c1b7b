"""Section "scale": what a library of many similar models costs to search and to catalogue.

Models are tiny, so that there can be many: what is measured is the number of fragments, not bytes.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
import statistics
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from itertools import islice
from pathlib import Path

import numpy as np

from fragfs.library.add import AddOptions
from fragfs.library.catalog import CATALOG_NAME, Catalog
from fragfs.library.closure import Closures
from fragfs.library.library import FragmentLibrary
from fragfs.library.planning import CatalogSignatureRows, look_up_ahead
from fragfs.similarity.index import SimilarityIndex
from fragfs.similarity.signature import name_key
from fragfs.types import Dtype, LibraryConfig
from tools.bench.models import write_safetensors
from tools.bench.report import Table
from tools.bench.setting import Setting
from tools.bench.workplace import BenchError

__all__ = ["measure_scale"]

_ELEMENTS = 1 << 12
_TENSORS = 8
_MODELS = 1000
_EARLY = 10
_SEARCHES = 96
_CANDIDATES = 12
"""As many as level `small` tries."""


def measure_scale(setting: Setting) -> list[Table]:
    """Search time at 10 and at 1,000 models, and catalog bytes per fragment."""
    table = Table(
        f"Scale: libraries of {_MODELS:,} small models, {_TENSORS} fragments each",
        ["", f"search at {_EARLY}", f"search at {_MODELS:,}", "ratio", "catalog per fragment"],
        notes=[
            "Search: signing a fragment of the next model, finding candidates and the closures of"
            f" the {_CANDIDATES} that are tried at most, without decoding them, median; in both"
            " libraries in turn. Catalog: the database and nothing else, per fragment."
        ],
    )
    for name, key, families in (
        ("one family of 1,000", "one", 1),
        ("100 families of 10", "many", 100),
    ):
        early, late, row_bytes = _measure(setting.place / f"scale-{key}", families)
        table.figures |= {
            f"scale.{key}.search_ratio": late / early,
            f"scale.{key}.catalog_bytes": row_bytes,
        }
        table.add(
            name,
            f"{early * 1e6:.0f} us",
            f"{late * 1e6:.0f} us",
            f"{late / early:.2f}",
            f"{row_bytes:.0f} bytes",
        )
    return [table]


def _measure(place: Path, families: int) -> tuple[float, float, float]:
    rng = np.random.default_rng(5)
    bases = rng.standard_normal((families, _TENSORS, _ELEMENTS), np.float32) * np.float32(0.02)
    noise = np.float32(0.0004)
    place.mkdir()
    path, early = place / "library", place / "early"
    FragmentLibrary.create(path, LibraryConfig(fragment_elements=_ELEMENTS)).close()
    for first, end in ((0, _EARLY), (_EARLY, _MODELS)):
        with FragmentLibrary.open(path) as library:
            for number in range(first, end):
                weights = bases[number % families] + noise * rng.standard_normal(
                    bases.shape[1:], np.float32
                )
                source = place / f"model-{number}"
                _write(source / "model.safetensors", weights)
                library.add([source], AddOptions(space_check=False))
            fragments = library.stats().fragment_count
        if end == _EARLY:
            shutil.copytree(path, early)
    # Closing the last connection has folded the write-ahead log into the catalog.
    connection = sqlite3.connect(path / CATALOG_NAME)
    connection.execute("VACUUM")
    connection.close()
    size = os.stat(path / CATALOG_NAME).st_size
    searches = _search([early, path], bases[_MODELS % families], rng, noise)
    return searches[0], searches[1], size / fragments


def _write(path: Path, weights: np.ndarray[tuple[int, int], np.dtype[np.float32]]) -> None:
    raws = [(row.view("<u4") >> 16).astype("<u2").tobytes() for row in weights]
    specs = [(f"layer.{i}.weight", "BF16", (64, 64), len(raw)) for i, raw in enumerate(raws)]
    write_safetensors(path, specs, raws)


def _search(
    libraries: Sequence[Path],
    base: np.ndarray[tuple[int, int], np.dtype[np.float32]],
    rng: np.random.Generator,
    noise: np.float32,
) -> list[float]:
    """Seconds to find the candidates of a fragment of one more model, in each library in turn."""
    with ExitStack() as stack:
        catalogs = [stack.enter_context(closing(Catalog(path))) for path in libraries]
        taken: list[list[float]] = [[] for _ in catalogs]
        for number in range(_SEARCHES):
            row = base[number % _TENSORS]
            moved = row + noise * rng.standard_normal(row.size, np.float32)
            raw = (moved.view("<u4") >> 16).astype("<u2").tobytes()
            for catalog, times in zip(catalogs, taken, strict=True):
                times.append(_search_once(catalog, raw, f"layer.{number % _TENSORS}.weight"))
    return [statistics.median(times) for times in taken]


def _search_once(catalog: Catalog, raw: bytes, name: str) -> float:
    index = SimilarityIndex(CatalogSignatureRows(catalog))
    start = time.perf_counter()
    signature = index.sign(raw, Dtype.BF16)
    if signature is None:
        raise BenchError("a fragment of weights has no signature")
    closures = Closures(catalog.bases_of)
    matches = index.query(signature, [name_key(name, 0)], count=24)
    for match in islice(look_up_ahead(matches, closures), _CANDIDATES):
        closures.of([match.fragment])
    return time.perf_counter() - start
