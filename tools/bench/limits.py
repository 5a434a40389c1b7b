"""Section "limits": what very many tensors or fragments in one file cost."""

from __future__ import annotations

import shutil
import statistics
import time

import numpy as np

from fragfs.library.library import FragmentLibrary
from tools.bench.models import Spec, write_safetensors
from tools.bench.report import Table
from tools.bench.setting import Setting
from tools.bench.workplace import BenchError, fragfs, new_library, tree_size

__all__ = ["measure_limits"]

SCALAR_COUNT = 100_000
FRAGMENT_COUNT = 28_000

_FRAGMENT_ELEMENTS = 4096  # the smallest a library can have
_OPENINGS = 21


def measure_limits(setting: Setting) -> list[Table]:
    """Disk per scalar tensor, and time to open a file of many fragments."""
    table = Table("Limits", ["", "measured"])
    per_scalar, seconds = _scalars(setting)
    table.figures["limits.scalar_bytes"] = per_scalar
    table.figures["limits.scalar_add_s"] = seconds
    table.add(
        f"{SCALAR_COUNT:,} scalar tensors in one file, disk per tensor", f"{per_scalar:.1f} bytes"
    )
    table.add("adding that file", f"{seconds:.1f} s")
    first, median = _openings(setting)
    table.figures["limits.open_first_s"] = first
    table.figures["limits.open_s"] = median
    table.add(f"opening a file of {FRAGMENT_COUNT:,} fragments, median", f"{median * 1e3:.2f} ms")
    table.add("the first time in a process", f"{first * 1e3:.2f} ms")
    return [table]


def _scalars(setting: Setting) -> tuple[float, float]:
    """(bytes the library grew by per tensor, seconds of `add`)."""
    names = [
        f"model.layers.{i // 640}.mlp.experts.{i // 5 % 128}.part_{i % 5}.weight_scale"
        for i in range(SCALAR_COUNT)
    ]
    specs: list[Spec] = [(name, "F32", (), 4) for name in names]
    values = np.random.default_rng(3).standard_normal(SCALAR_COUNT, np.float32).tobytes()
    path = write_safetensors(setting.place / "scalars.safetensors", specs, [values])
    library = new_library(setting.place / "limits.fragfs")
    before = tree_size(library)
    run = fragfs("add", path, "--name", "scalars", library=library)
    grown = tree_size(library) - before
    shutil.rmtree(library)
    path.unlink()
    return grown / SCALAR_COUNT, run.seconds


def _openings(setting: Setting) -> tuple[float, float]:
    """(first, median) seconds of opening a file of many small fragments, no two alike."""
    raw = np.random.default_rng(4).bytes(FRAGMENT_COUNT * _FRAGMENT_ELEMENTS)
    shape = (FRAGMENT_COUNT, _FRAGMENT_ELEMENTS)
    specs: list[Spec] = [("weight", "U8", shape, len(raw))]
    path = write_safetensors(setting.place / "fragments.safetensors", specs, [raw])
    library_path = setting.place / "limits.fragfs"
    new_library(library_path, "--fragment-elements", str(_FRAGMENT_ELEMENTS))
    fragfs("add", path, "--name", "fragments", library=library_path)
    seconds = []
    with FragmentLibrary.open(library_path) as library:
        content = library.files("fragments")[0].content
        for _ in range(_OPENINGS):
            start = time.perf_counter()
            opened = library.open_content(content)
            seconds.append(time.perf_counter() - start)
    if len(opened.extents) < FRAGMENT_COUNT:
        raise BenchError(f"the file has {len(opened.extents)} fragments, not {FRAGMENT_COUNT}")
    shutil.rmtree(library_path)
    path.unlink()
    return seconds[0], statistics.median(seconds)
