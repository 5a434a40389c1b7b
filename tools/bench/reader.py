"""Read one file, as a program of its own would, and print what it took as JSON.

Run by the section "read": `python -m tools.bench.reader METHOD PATH [CONTENT THREADS]`.
"""

from __future__ import annotations

import json
import mmap
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from tools.bench.memory import pretouch

__all__ = ["METHODS", "main"]

_STEP = 1 << 20
_SPARE_BYTES = 128 << 20


def _read(path: Path) -> int:
    buffer = bytearray(_STEP)
    total = 0
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            total += count
    return total


def _map(path: Path) -> int:
    with path.open("rb") as file:
        mapped = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
    buffer = np.empty(_STEP, np.uint8)
    for start in range(0, mapped.size, _STEP):
        part = mapped[start : start + _STEP]
        np.copyto(buffer[: part.size], part)
    return mapped.size


def _load(path: Path) -> int:
    from safetensors.numpy import load_file

    return sum(tensor.nbytes for tensor in load_file(path).values())


METHODS: dict[str, Callable[[Path], int]] = {"read": _read, "mmap": _map, "load_file": _load}
"""By name: what reads a whole file and says how many bytes that gave."""


def _decode(library_path: Path, content: int, threads: int) -> tuple[float, int]:
    """Decode a file's fragments in this process; gives seconds and bytes."""
    from fragfs.library.decode import NO_SOURCE
    from fragfs.library.library import FragmentLibrary

    with FragmentLibrary.open(library_path) as library, ThreadPoolExecutor(threads) as pool:
        extents = library.open_content(content).extents
        pretouch(_SPARE_BYTES)
        start = time.perf_counter()
        sizes = pool.map(
            lambda number: len(library.decode_fragment(number, NO_SOURCE)), extents.fragments
        )
        total = sum(sizes)
        return time.perf_counter() - start, total


def main(arguments: list[str]) -> int:
    method, path = arguments[0], Path(arguments[1])
    if method == "decode":
        seconds, size = _decode(path, int(arguments[2]), int(arguments[3]))
    else:
        if method == "load_file":
            # What imports take is not timed; ml_dtypes gives numpy the dtype bfloat16.
            import ml_dtypes  # noqa: F401
            import safetensors.numpy  # noqa: F401
        # The page cache of a mount, and what load_file makes of it.
        pretouch(2 * os.stat(path).st_size + _SPARE_BYTES)
        start = time.perf_counter()
        size = METHODS[method](path)
        seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds, "size": size}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
