"""Read one file, as a program of its own would, and print what it took as JSON.

Two ways to run it:

- `python -m tools.bench.reader METHOD PATH`, or `reader decode LIBRARY CONTENT THREADS [BASE]`.
- `python -m tools.bench.reader serve`: imports once, says which loader it has, and then forks a
  process for each line of JSON it gets: an import of torch takes longer than most reads.

Whatever is timed starts right after as much memory as it needs was touched and freed again.
"""

from __future__ import annotations

import importlib
import json
import mmap
import os
import random
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fragfs.types import Fragment
from tools.bench.memory import pretouch
from tools.bench.touches import percentile, touch_count

__all__ = ["METHODS", "main", "natural_key"]

_STEP = 1 << 20
_PAGE = 4096
_SPARE_BYTES = 128 << 20
_PARALLEL = 4
_SEQUENTIAL_BYTES_MAX = 192 << 20
"""Where MADV_SEQUENTIAL arrives as 4 KiB requests, a server gives 60 MB/s: this much takes 3 s."""
_ENDS_S = 180
Result = dict[str, Any]


# --- by system calls


def _read(path: Path) -> int:
    buffer = bytearray(_STEP)
    total = 0
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            total += count
    return total


def _read_at(descriptor: int, offsets: Iterable[int]) -> int:
    buffer = bytearray(_STEP)
    return sum(os.preadv(descriptor, [buffer], offset) for offset in offsets)


def _read_backwards(path: Path) -> int:
    with path.open("rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        return _read_at(file.fileno(), reversed(range(0, size, _STEP)))


def _read_in_threads(path: Path) -> int:
    """Each thread reads its own quarter: one descriptor, four places at once."""
    with path.open("rb", buffering=0) as file, ThreadPoolExecutor(_PARALLEL) as pool:
        offsets = range(0, os.fstat(file.fileno()).st_size, _STEP)
        share = -(-len(offsets) // _PARALLEL)
        parts = [offsets[start : start + share] for start in range(0, len(offsets), share)]
        return sum(pool.map(lambda part: _read_at(file.fileno(), part), parts))


# --- many files


def _walk(directory: Path) -> int:
    """Gives the number of files."""
    return sum(
        1
        for place, _, names in os.walk(directory)
        for name in names
        if os.stat(f"{place}/{name}").st_size
    )


def _open_all(directory: Path) -> int:
    """Open every safetensors file, read its header, close it; gives their number."""
    count = 0
    for place, _, names in os.walk(directory):
        for name in names:
            with open(f"{place}/{name}", "rb", buffering=0) as file:
                size = int.from_bytes(file.read(8), "little")
                json.loads(file.read(size))
                count += 1
    return count


# --- mapped


def _mapped(
    path: Path, advice: int | None = None, flags: int = mmap.MAP_SHARED
) -> NDArray[np.uint8]:
    with path.open("rb") as file:
        mapping = mmap.mmap(file.fileno(), 0, flags=flags, prot=mmap.PROT_READ)
    if advice is not None:
        mapping.madvise(advice)
    return np.frombuffer(mapping, np.uint8)


def _copy(mapped: NDArray[np.uint8], ranges: Iterable[tuple[int, int]]) -> int:
    """Copy ranges of a mapping out of it, in steps that stay in the processor's cache."""
    buffer = np.empty(_STEP, np.uint8)
    total = 0
    for first, end in ranges:
        for start in range(first, end, _STEP):
            part = mapped[start : min(end, start + _STEP)]
            np.copyto(buffer[: part.size], part)
            total += part.size
    return total


def _map(path: Path) -> int:
    mapped = _mapped(path)
    return _copy(mapped, [(0, mapped.size)])


def _map_sequential(path: Path) -> int:
    mapped = _mapped(path, advice=mmap.MADV_SEQUENTIAL)
    return _copy(mapped, [(0, min(mapped.size, _SEQUENTIAL_BYTES_MAX))])


def _map_populated(path: Path) -> int:
    """As llama.cpp does: advice for the descriptor, then a mapping that is filled at once."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
    mapped = _mapped(path, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
    return _copy(mapped, [(0, mapped.size)])


def natural_key(name: str) -> list[tuple[int, str]]:
    """Sorts layer 10 behind layer 9."""
    return [(int(part), "") if part.isdecimal() else (0, part) for part in re.split(r"(\d+)", name)]


def _tensors(mapped: NDArray[np.uint8]) -> dict[str, tuple[int, int]]:
    """Byte ranges of a safetensors file's tensors, by name."""
    start = 8 + int.from_bytes(mapped[:8].tobytes(), "little")
    entries = json.loads(mapped[8:start].tobytes())
    entries.pop("__metadata__", None)
    ranges = ((name, entry["data_offsets"]) for name, entry in entries.items())
    return {name: (start + first, start + end) for name, (first, end) in ranges}


def _map_by_name(path: Path) -> int:
    mapped = _mapped(path)
    return _copy(mapped, [place for _, place in sorted(_tensors(mapped).items())])


def _map_naturally(path: Path) -> int:
    mapped = _mapped(path)
    tensors = _tensors(mapped)
    return _copy(mapped, [tensors[name] for name in sorted(tensors, key=natural_key)])


def _map_shuffled(path: Path) -> int:
    mapped = _mapped(path)
    places = [place for _, place in sorted(_tensors(mapped).items())]
    random.Random(1).shuffle(places)
    return _copy(mapped, places)


def _touch(path: Path) -> Result:
    """One byte each of random pages: how long every one took."""
    mapped = _mapped(path)
    count = touch_count(mapped.size)
    choose = random.Random(2)
    offsets = [choose.randrange(mapped.size // _PAGE) * _PAGE for _ in range(count)]
    took = []
    for offset in offsets:
        start = time.perf_counter()
        mapped.item(offset)
        took.append(time.perf_counter() - start)
    return {
        "size": count * _PAGE,
        "seconds": sum(took),
        "p50": percentile(took, 0.5),
        "p99": percentile(took, 0.99),
    }


# --- loaders


def _loader() -> str | None:
    """What safetensors can fill here: torch's tensors, else numpy's, else nothing."""
    if find_spec("safetensors") is None:
        return None
    if find_spec("torch") is not None:
        return "torch"
    return "numpy" if find_spec("ml_dtypes") is not None else None


def _import_loader() -> str | None:
    """Import it: what imports take is not timed."""
    loader = _loader()
    modules = {
        "torch": ("torch", "safetensors.torch"),
        # ml_dtypes gives numpy the dtype bfloat16.
        "numpy": ("ml_dtypes", "safetensors.numpy"),
    }
    for name in modules[loader] if loader else ():
        importlib.import_module(name)
    if loader == "torch":
        # What the first tensor of a process costs is not a matter of files.
        importlib.import_module("torch").zeros(1).clone()
    return loader


def _load(path: Path) -> int:
    """Open a safetensors file, and copy tensor by tensor out of it."""
    from safetensors import safe_open

    with_torch = _loader() == "torch"
    total = 0
    with safe_open(path, "pt" if with_torch else "np") as file:
        for name in file.keys():  # noqa: SIM118 - it is not a mapping
            tensor = file.get_tensor(name)
            # torch's tensor is a view of the mapped file, numpy's is a copy already.
            total += (tensor.clone() if with_torch else tensor).nbytes
    return total


def _load_in_processes(path: Path) -> int:
    """The same model in four processes at once, as the ranks of one server load it."""
    children = []
    for _ in range(_PARALLEL):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                signal.alarm(_ENDS_S)  # does not pass a fork
                _load(path)
                status = 0
            finally:
                os._exit(status)
        children.append(child)
    if any([os.waitpid(child, 0)[1] for child in children]):
        raise ChildProcessError("a process could not load the file")
    return _PARALLEL * path.stat().st_size


METHODS: dict[str, Callable[[Path], int]] = {
    "load": _load,
    "read": _read,
    "mmap": _map,
    "names": _map_by_name,
    "natural": _map_naturally,
    "sequential": _map_sequential,
    "populate": _map_populated,
    "shuffled": _map_shuffled,
    "backwards": _read_backwards,
    "threads": _read_in_threads,
    "processes": _load_in_processes,
    "walk": _walk,
    "open": _open_all,
}
"""By name: what reads a file and says how many bytes that gave, or how many files there are."""


# --- without a mount


class _Kept:
    """Decoded fragments of one file, kept; others are not."""

    def __init__(self) -> None:
        self.fragments: dict[int, memoryview] = {}

    def get(self, number: int) -> memoryview | None:
        return self.fragments.get(number)

    def put(self, number: int, raw: memoryview, record: Fragment | None = None) -> None:
        return None


def _decode(library_path: Path, content: int, threads: int, base: int | None) -> Result:
    """Decode a file's fragments in this process; those of `base` are decoded before."""
    from fragfs.library.library import FragmentLibrary

    with FragmentLibrary.open(library_path) as library, ThreadPoolExecutor(threads) as pool:
        kept = _Kept()
        if base is not None:
            for number in library.open_content(base).extents.fragments:
                kept.fragments[number] = library.decode_fragment(number, kept)
        extents = library.open_content(content).extents
        pretouch(_SPARE_BYTES)
        start = time.perf_counter()
        sizes = pool.map(
            lambda number: len(library.decode_fragment(number, kept)), extents.fragments
        )
        total = sum(sizes)
        return {"seconds": time.perf_counter() - start, "size": total}


# --- running


def _measure(method: str, path: Path, memory_bytes: int) -> Result:
    pretouch(memory_bytes + _SPARE_BYTES)
    if method == "touch":
        return _touch(path)
    start = time.perf_counter()
    size = METHODS[method](path)
    return {"seconds": time.perf_counter() - start, "size": size}


def _serve() -> int:
    """Fork a reader for each line of standard input: METHOD, PATH and bytes of memory."""
    print(json.dumps({"loader": _import_loader()}), flush=True)
    assert threading.active_count() == 1  # forks would lose the others
    for line in sys.stdin:
        method, path, memory_bytes = json.loads(line)
        child = os.fork()
        if child == 0:
            # Nothing else ends a reader that waits for a daemon which does not answer.
            signal.alarm(_ENDS_S)
            status = 1
            try:
                try:
                    result = _measure(method, Path(path), memory_bytes)
                except Exception as error:
                    result = {"error": f"{type(error).__name__}: {error}"}
                print(json.dumps(result), flush=True)
                status = 0
            finally:
                os._exit(status)
        status = os.waitpid(child, 0)[1]
        if status:
            print(json.dumps({"error": f"the reader ended with status {status}"}), flush=True)
    return 0


def main(arguments: list[str]) -> int:
    method = arguments[0]
    if method == "serve":
        return _serve()
    path = Path(arguments[1])
    if method == "decode":
        base = int(arguments[4]) if len(arguments) > 4 else None
        result = _decode(path, int(arguments[2]), int(arguments[3]), base)
    else:
        _import_loader()
        # The page cache of a mount, and as much again for what the daemon may need.
        result = _measure(method, path, 2 * os.stat(path).st_size)
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
