"""Section "read-many": ten thousand small files behind a mount, listed and opened."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np

from tools.bench.models import Spec, write_safetensors
from tools.bench.report import Table
from tools.bench.servers import fragfs_mount
from tools.bench.setting import Setting
from tools.bench.workplace import BenchError, fragfs, has_fuse, new_library, run_child

__all__ = ["measure_read_many"]

FILE_COUNT = 10_000
_PER_DIRECTORY = 100
_ELEMENTS = 512
_MODEL = "many"

_ROWS = (
    ("walk", "os.walk and stat"),
    ("open", "open, read the header, close"),
)


def measure_read_many(setting: Setting) -> list[Table]:
    """Seconds for all files, cold and again, beside the plain files."""
    if not has_fuse():
        return [Table("Read-many: this machine cannot mount", [""])]
    directory = setting.place / "read-many"
    plain = directory / _MODEL
    _make_files(plain)
    library = new_library(directory / "library.fragfs")
    fragfs("add", plain, "--name", _MODEL, library=library)
    table = Table(
        f"Read-many: seconds for {FILE_COUNT:,} files",
        ["", "plain files", "mount, cold", "again"],
        notes=[
            "Safetensors files of one small tensor, a hundred to a directory. Cold: a new mount,"
            " for each row; again: another process, the same mount. Plain: their names and pages"
            " are in the kernel's caches."
        ],
    )
    for method, text in _ROWS:
        _seconds(method, plain)
        seconds = [_seconds(method, plain)]
        with fragfs_mount(library) as server:
            seconds += [_seconds(method, server.mountpoint / _MODEL) for _ in range(2)]
        table.add(text, *(f"{value:.2f}" for value in seconds))
        for state, value in zip(("plain", "cold", "again"), seconds, strict=True):
            table.figures[f"read_many.{method}.{state}_s"] = value
    shutil.rmtree(directory)
    return [table]


def _make_files(directory: Path) -> None:
    rng = np.random.default_rng(7)
    specs: list[Spec] = [("weight", "BF16", (_ELEMENTS,), 2 * _ELEMENTS)]
    for number in range(FILE_COUNT):
        place = directory / f"part-{number // _PER_DIRECTORY:03}" / f"{number:05}.safetensors"
        write_safetensors(place, specs, [rng.bytes(2 * _ELEMENTS)])


def _seconds(method: str, directory: Path) -> float:
    result = run_child("reader", method, directory)
    if result["size"] != FILE_COUNT:
        raise BenchError(f"{directory} has {result['size']:.0f} files, not {FILE_COUNT}")
    return result["seconds"]
