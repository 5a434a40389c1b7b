"""One reader, a process of its own: `python -m tools.soak.reader`, told what to do in JSON.

Compares every byte of a mounted model with its source. Says "bytes N" on standard output after each
file; a reader that says nothing for long hangs. Imports nothing that takes time.

Exit status: 0 all as it must be, 3 a wrong byte, 4 what should be there is not, or the other way
round, 5 an error of the operating system.
"""

import fcntl
import json
import mmap
import os
import random
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NoReturn

WRONG, MISSING, REFUSED = 3, 4, 5
_PAGE = mmap.PAGESIZE
_DIRECT_BYTES = 1 << 17
_Task = dict[str, Any]
_Pieces = Iterator[tuple[int, bytes]]
_VANISHED = (FileNotFoundError, NotADirectoryError)


def main() -> None:
    task = json.loads(sys.argv[1])
    model = os.fsencode(task["model"])
    versions = [os.fsencode(version) for version in task["versions"]]
    chosen = random.Random(task["seed"])
    try:
        {"plain": _plain, "hold": _hold, "race": _race, "gone": _gone}[task["mode"]](
            task, model, versions, chosen
        )
    except OSError as error:
        _end(REFUSED, f"{type(error).__name__} {error.errno}: {error}")


def _plain(task: _Task, model: bytes, versions: list[bytes], chosen: random.Random) -> None:
    """Read a model that nobody changes, once it is shown."""
    source = versions[0]
    names = _names(source)
    _wait(task, lambda: _is_shown(model, source, names), f"{model!a} is not as {source!a}")
    deadline = time.monotonic() + task["seconds"]
    while True:
        chosen.shuffle(names)
        for name in names:
            _compare_file(os.path.join(model, name), [os.path.join(source, name)], chosen)
            if time.monotonic() > deadline:
                return


def _hold(task: _Task, model: bytes, versions: list[bytes], chosen: random.Random) -> None:
    """Open everything, wait for a word, and read what may have been removed meanwhile."""
    source = versions[0]
    names = _names(source)
    _wait(task, lambda: _is_shown(model, source, names), f"{model!a} is not as {source!a}")
    opened = [(name, os.open(os.path.join(model, name), os.O_RDONLY)) for name in names]
    print("ready", flush=True)
    sys.stdin.readline()
    time.sleep(task["seconds"])
    chosen.shuffle(opened)
    for name, descriptor in opened:
        expected = _content(os.path.join(source, name))
        _compare(name, descriptor, [expected], chosen)
        os.close(descriptor)


def _race(task: _Task, model: bytes, versions: list[bytes], chosen: random.Random) -> None:
    """Read while the model changes: each file is what it was or what it becomes, or is gone."""
    names = sorted({name for version in versions for name in _names(version)})
    deadline = time.monotonic() + task["seconds"]
    while time.monotonic() < deadline:
        name = chosen.choice(names)
        sources = [os.path.join(version, name) for version in versions]
        try:
            _compare_file(os.path.join(model, name), filter(os.path.exists, sources), chosen)
        except _VANISHED:
            time.sleep(0.02)


def _gone(task: _Task, model: bytes, versions: list[bytes], chosen: random.Random) -> None:
    """Wait until the model is shown no more."""
    _wait(task, lambda: not os.path.lexists(model), f"{model!a} is still shown")
    _say(0)


def _wait(task: _Task, condition: Callable[[], bool], text: str) -> None:
    deadline = time.monotonic() + task["patience"]
    while not condition():
        if time.monotonic() > deadline:
            _end(MISSING, text)
        time.sleep(0.05)


def _names(directory: bytes) -> list[bytes]:
    def refuse(error: OSError) -> None:
        if not isinstance(error, _VANISHED):
            raise error

    found = []
    for parent, _, names in os.walk(directory, onerror=refuse):
        found += [os.path.relpath(os.path.join(parent, name), directory) for name in names]
    return sorted(found)


def _is_shown(model: bytes, source: bytes, names: list[bytes]) -> bool:
    """Whether names and sizes are those of the source."""
    if _names(model) != names:
        return False
    try:
        return all(
            os.stat(os.path.join(model, name)).st_size
            == os.stat(os.path.join(source, name)).st_size
            for name in names
        )
    except _VANISHED:
        return False


def _content(path: bytes) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def _compare_file(path: bytes, sources: Iterable[bytes], chosen: random.Random) -> None:
    flags = os.O_RDONLY | (os.O_DIRECT if chosen.random() < 0.15 else 0)
    descriptor = os.open(path, flags)
    try:
        _compare(path, descriptor, [_content(source) for source in sources], chosen)
    finally:
        os.close(descriptor)


def _compare(path: bytes, descriptor: int, contents: list[bytes], chosen: random.Random) -> None:
    """Read an open file in a random way; what it has must be one of the contents."""
    size = os.fstat(descriptor).st_size
    if size not in map(len, contents):
        _end(WRONG, f"{path!a} has {size} bytes, not {[len(content) for content in contents]}")
    if chosen.random() < 0.5:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    direct = bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT)
    way = _direct if direct else chosen.choice(_WAYS)
    compared = 0
    for at, data in way(descriptor, size, chosen):
        # Only contents that all bytes so far agree with: no mixture of two passes.
        contents = [c for c in contents if len(c) == size and c[at : at + len(data)] == data]
        if not contents:
            _end(WRONG, f"{path!a} differs in {len(data)} bytes at {at}, read by {way.__name__}")
        compared += len(data)
    _say(compared)


def _read(descriptor: int, size: int, chosen: random.Random) -> _Pieces:
    step = chosen.choice((1 << 20, 77_777, 1 << 17))
    at = 0
    os.lseek(descriptor, 0, os.SEEK_SET)
    while at < size:
        data = os.read(descriptor, step)
        if not data:
            _end(WRONG, f"a read ended at {at} of {size}")
        yield at, data
        at += len(data)


def _pread(descriptor: int, size: int, chosen: random.Random) -> _Pieces:
    for _ in range(min(30, 1 + size // 1000)):
        at = chosen.randrange(size + 1)
        length = min(chosen.choice((1, _PAGE, 70_001, 1_000_000)), size - at)
        data = os.pread(descriptor, length, at)
        if len(data) != length:
            # Short where a page could not be had, of a server that was killed: that page says so.
            os.pread(descriptor, 1, at + len(data))
            _end(WRONG, f"a pread of {length} at {at} of {size} got {len(data)}")
        yield at, data


def _map(descriptor: int, size: int, chosen: random.Random) -> _Pieces:
    if not size:
        return
    flags = chosen.choice((mmap.MAP_PRIVATE, mmap.MAP_SHARED))
    with mmap.mmap(descriptor, size, flags, mmap.PROT_READ) as mapped:
        pages = list(range(0, size, _PAGE))
        if chosen.random() < 0.5:
            chosen.shuffle(pages)
            mapped.madvise(mmap.MADV_RANDOM)
        for at in pages:
            yield at, mapped[at : at + _PAGE]


def _sendfile(descriptor: int, size: int, chosen: random.Random) -> _Pieces:
    sink = os.memfd_create("sink")
    try:
        at = 0
        while at < size:
            sent = os.sendfile(sink, descriptor, at, 1 << 20)
            if not sent:
                _end(WRONG, f"sendfile ended at {at} of {size}")
            yield at, os.pread(sink, sent, at)
            at += sent
    finally:
        os.close(sink)


def _direct(descriptor: int, size: int, chosen: random.Random) -> _Pieces:
    with mmap.mmap(-1, _DIRECT_BYTES) as buffer:
        at = 0
        while at < size:
            got = os.preadv(descriptor, [buffer], at)
            if got != min(_DIRECT_BYTES, size - at):
                _end(WRONG, f"a direct read at {at} of {size} got {got}")
            yield at, buffer[:got]
            at += got


_WAYS = (_read, _pread, _map, _map, _sendfile)


def _say(compared: int) -> None:
    os.write(1, b"bytes %d\n" % compared)


def _end(status: int, text: str) -> NoReturn:
    os.write(2, text.encode(errors="backslashreplace") + b"\n")
    os._exit(status)


if __name__ == "__main__":
    main()
