"""Section "storage": how many bytes a model takes."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import zstandard

from fragfs.library.library import FragmentLibrary
from tools.bench.models import Variant, read_tensors
from tools.bench.report import NOT_INSTALLED, Table
from tools.bench.setting import Setting
from tools.bench.workplace import fragfs, new_library, run_timed, tree_size
from tools.bench.zipnn_codec import DTYPES, open_zipnn

__all__ = ["measure_storage"]

_ZSTD_LEVEL = 3

Measure = Callable[[Variant, Path], int | None]


def measure_storage(setting: Setting) -> list[Table]:
    """Stored / raw of a model in each precision, by tool."""
    variants = setting.variants
    table = Table(
        f"Storage: stored / raw of {setting.model_name}",
        ["", *(f"{v.label} ({v.size / 1e6:.1f} MB)" for v in variants)],
        notes=[
            "zipnn compresses tensor by tensor, squashfs the whole file in blocks of 1 MiB. fragfs"
            " records are what one more such model adds to the packs; the library is everything"
            " in its directory, the catalog and its copy included."
        ],
    )
    libraries = {variant.label: _add(variant, setting.place) for variant in variants}
    measures: list[tuple[str, str, Measure]] = [
        ("plain files", "plain", lambda variant, _: variant.size),
        (f"zstd -{_ZSTD_LEVEL}", "zstd", lambda variant, _: _zstd(variant)),
        ("zipnn", "zipnn", lambda variant, _: _zipnn(variant)),
        ("squashfs, zstd", "squashfs", _squashfs),
        ("**fragfs**, records", "fragfs", lambda variant, _: libraries[variant.label][0]),
        ("fragfs, whole library", "library", lambda variant, _: libraries[variant.label][1]),
    ]
    for name, key, measure in measures:
        cells = []
        for variant in variants:
            stored = measure(variant, setting.place)
            if stored is None:
                cells.append(NOT_INSTALLED)
                continue
            share = stored / variant.size
            table.figures[f"storage.{variant.label}.{key}"] = share
            cells.append(f"{share:.4f}")
        table.add(name, *cells)
    return [table]


def _zstd(variant: Variant) -> int:
    """Bytes of all files, each compressed on its own."""
    stored = 0
    for path in variant.files:
        with path.open("rb") as source, Path(os.devnull).open("wb") as sink:
            size = path.stat().st_size
            compressor = zstandard.ZstdCompressor(level=_ZSTD_LEVEL)
            stored += compressor.copy_stream(source, sink, size=size)[1]
    return stored


def _zipnn(variant: Variant) -> int | None:
    """Bytes of all tensors compressed, and of the headers as they are."""
    codecs = {dtype: open_zipnn(dtype) for dtype in DTYPES}
    if None in codecs.values():
        return None
    stored = 0
    for path in variant.files:
        tensors = read_tensors(path)
        stored += path.stat().st_size - sum(len(tensor.raw) for tensor in tensors)
        for tensor in tensors:
            codec = codecs.get(tensor.dtype)
            raw = bytes(tensor.raw)
            stored += min(len(raw), len(codec.encode(raw))) if codec else len(raw)
    return stored


def _squashfs(variant: Variant, place: Path) -> int | None:
    if shutil.which("mksquashfs") is None:
        return None
    image = place / "image.squashfs"
    options = ["-comp", "zstd", "-b", "1M", "-noappend", "-no-progress", "-quiet"]
    run_timed("mksquashfs", *variant.files, image, *options)
    size = image.stat().st_size
    image.unlink()
    return size


def _add(variant: Variant, place: Path) -> tuple[int, int]:
    """(record bytes, bytes of the library) of a new library with this model in it."""
    path = new_library(place / "stored.fragfs")
    fragfs("add", *variant.files, "--name", "model", library=path)
    # Closing the last connection folds the write-ahead log into the catalog.
    with FragmentLibrary.open(path) as library:
        records = library.stats("model").stored_bytes
    size = tree_size(path)
    shutil.rmtree(path)
    return records, size
