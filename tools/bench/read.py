"""Section "read": what each kind of reader gets from fragfs, beside plain files and other servers.

The states of the file that is read:

- disk, tmpfs: a plain file, in the page cache.
- squashfs, squashfuse: in an image compressed with zstd, which is in the page cache.
- c: shown by a minimal FUSE server in C out of its memory; the mount's pages cold.
- cold: fragfs, nothing decoded, packs in the page cache.
- a: fragfs, all of the model in the fragment cache, the mount's pages cold. Of a mount by root the
  cache then has the file as a whole, for the kernel to read (passthrough).
- a_asked: the same, but the mount is asked for every page.
- a_new: as a, through another mount, which has served nothing yet.
- a_plain: as a_asked, on a mount that fills no pages before they are asked for.
- b: a fine-tune, after its base was read through the same mount: its residuals never decoded.
- warm: fragfs, the model was read right before.
- warm_asked: the same as a_asked: everything in the mount's page cache.
"""

from __future__ import annotations

import filecmp
import mmap
import os
import shutil
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from fragfs.library.library import FragmentLibrary
from tools.bench.memory import drop_caches, warm_cache
from tools.bench.models import make_normal_f32
from tools.bench.pages import drop_pages
from tools.bench.processes import cpu_seconds, watch_anon
from tools.bench.read_models import make_fine_tune, make_transformer
from tools.bench.read_report import ReadFacts, report
from tools.bench.reader_host import ReaderHost, reader_host
from tools.bench.report import Table
from tools.bench.samples import Sample, Samples
from tools.bench.servers import (
    SHARED_MEMORY,
    Server,
    build_c_server,
    fragfs_mount,
    make_image,
    mount_offers,
    serve_with_c,
    serve_with_squashfs,
    serve_with_squashfuse,
    set_read_ahead,
)
from tools.bench.setting import Setting
from tools.bench.workplace import BenchError, fragfs, has_fuse, new_library, run_child

__all__ = ["METHODS", "STATES", "WIDE_METHODS", "measure_read"]

METHODS: dict[str, frozenset[str]] = {
    "load": frozenset(
        "disk tmpfs squashfs squashfuse c cold a a_asked a_new a_plain b warm warm_asked".split()
    ),
    "read": frozenset(
        "disk tmpfs squashfs squashfuse c cold a a_asked a_new a_plain b warm warm_asked".split()
    ),
    "mmap": frozenset(
        "disk tmpfs squashfs squashfuse c cold a a_asked a_new a_plain b warm warm_asked".split()
    ),
    "names": frozenset("disk c a a_asked".split()),
    "natural": frozenset("disk c cold a a_asked".split()),
    "sequential": frozenset("disk c cold a a_asked a_new a_plain b".split()),
    "populate": frozenset("disk tmpfs c cold a a_asked a_plain".split()),
    "shuffled": frozenset("disk c cold a a_asked a_new b".split()),
    "touch": frozenset("disk squashfs squashfuse c cold a a_asked a_new".split()),
    "threads": frozenset("disk c cold a a_asked".split()),
    "backwards": frozenset("disk cold a a_asked".split()),
    "processes": frozenset("disk cold".split()),
}
"""Who reads what: rows that would only repeat another one are left out, they take minutes."""

STATES = "disk tmpfs squashfs squashfuse c a a_asked a_new a_plain warm warm_asked cold b".split()
"""What is compared with each other stands side by side; odd rounds go backwards."""

_NEW_MOUNTS = ("cold", "b", "a_new")

WIDE_METHODS = ("load", "read", "mmap", "sequential", "populate", "shuffled")
_READ_AHEAD_KB = 128
_WIDE_READ_AHEAD_KB = 512
_ROUNDS_MAX = 3
_BUDGET_S = 480
"""No round is started that would end later, on a slow or busy machine."""
_TOUCHED_BYTES = 128 << 20
_NO_PREFILL = "--no-prefill"
_NO_PASSTHROUGH = "--no-passthrough"
_PUT_TOGETHER_S = 10.0


@dataclass
class _Place:
    """Files and mounts of a run.

    Attributes:
        directory: Where all of it is.
        host: Starts readers.
        plain: The model, on disk.
        tune: Its fine-tune, on disk.
        library: Has both.
        files: The file of each state that is there for the whole run.
        servers: The server of each.
        samples: What was measured.
        notes: What is missing, and why.
        contents: Numbers of the contents in the library: of the model and of its fine-tune.
    """

    directory: Path
    host: ReaderHost
    plain: Path
    tune: Path
    library: Path
    files: dict[str, Path] = field(default_factory=dict)
    servers: dict[str, Server] = field(default_factory=dict)
    samples: Samples = field(default_factory=Samples)
    notes: list[str] = field(default_factory=list)
    contents: tuple[int, int] = (0, 0)

    @property
    def size(self) -> int:
        """Bytes of the model."""
        return self.plain.stat().st_size

    def shown(self, server: Server, path: Path) -> Path:
        """Where a fragfs mount shows a plain file."""
        return server.mountpoint / path.parent.name / path.name


def measure_read(setting: Setting) -> list[Table]:
    """Tables of rates, ratios, latencies and of what the daemon took."""
    if not has_fuse():
        return [
            Table("Read: this machine cannot mount (/dev/fuse or fusermount3 is missing)", [""])
        ]
    rounds = min(_ROUNDS_MAX, setting.rounds)
    with ExitStack() as stack:
        start = time.monotonic()
        place = _prepare(setting, stack)
        _say(f"prepared, {time.monotonic() - start:.0f} s")
        for number in range(rounds):
            begun = time.monotonic()
            _measure_round(place, number)
            took = time.monotonic() - begun
            _say(f"round {number + 1} of {rounds}, {took:.0f} s")
            if time.monotonic() - start + took > _BUDGET_S and number + 1 < rounds:
                place.notes.append(f"Rounds: {number + 1} of {rounds}, then time was up.")
                break
        _compare(place)
        facts = _facts(place)
    return report(place.samples, facts)


def _say(text: str) -> None:
    print(f"[read: {text}]", file=sys.stderr, flush=True)


# --- before


def _prepare(setting: Setting, stack: ExitStack) -> _Place:
    directory = setting.place / "read"
    stack.callback(shutil.rmtree, directory, ignore_errors=True)
    plain = make_transformer(directory / "base" / "model.safetensors", setting.read_bytes)
    tune = make_fine_tune(plain, directory / "tune" / "model.safetensors")
    library = new_library(directory / "library.fragfs")
    for path in (plain, tune):
        fragfs("add", path, "--name", path.parent.name, library=library)
    place = _Place(directory, stack.enter_context(reader_host()), plain, tune, library)
    with FragmentLibrary.open(library) as opened:
        base, moved = (opened.files(name)[0].content for name in ("base", "tune"))
        place.contents = (base, moved)
    for state, size, level, make in (
        ("cold_f32", min(setting.read_bytes, _TOUCHED_BYTES), "balanced", make_normal_f32),
        ("cold_small", min(setting.read_bytes, _TOUCHED_BYTES), "small", make_transformer),
    ):
        path = make(directory / state / "model.safetensors", size)
        other = new_library(directory / f"{state}.fragfs", "--level", level)
        fragfs("add", path, "--name", state, library=other)
    place.files["disk"] = plain
    _start_others(place, stack)
    for option in (_NO_PREFILL, _NO_PASSTHROUGH):
        if not mount_offers(option):
            place.notes.append(f"`fragfs mount` has no {option}: there is no such column.")
    if not mount_offers("--cache-dir"):
        place.notes.append("`fragfs mount` has no --cache-dir: switch A decodes once more.")
    return place


def _start_others(place: _Place, stack: ExitStack) -> None:
    """Whatever fragfs is compared with; what cannot be had is noted."""
    if SHARED_MEMORY.is_dir() and os.access(SHARED_MEMORY, os.W_OK):
        memory = Path(tempfile.mkdtemp(prefix="fragfs-bench-", dir=SHARED_MEMORY))
        stack.callback(shutil.rmtree, memory, ignore_errors=True)
        place.files["tmpfs"] = Path(shutil.copyfile(place.plain, memory / "file"))
    program = build_c_server(place.directory)
    if isinstance(program, Path):
        server = stack.enter_context(serve_with_c(program, place.plain))
        place.servers["c"], place.files["c"] = server, server.mountpoint / "file"
    else:
        place.notes.append(f"No server in C: {program}.")
    image = make_image(place.plain, place.directory / "image.squashfs")
    if not isinstance(image, Path):
        place.notes.append(f"No squashfs: {image}.")
        return
    for state, serve in (("squashfs", serve_with_squashfs), ("squashfuse", serve_with_squashfuse)):
        try:
            server = stack.enter_context(serve(image))
        except BenchError as error:
            place.notes.append(f"No {state}: {error}.")
            continue
        place.servers[state], place.files[state] = server, server.mountpoint / place.plain.name


# --- rounds


def _measure_round(place: _Place, number: int) -> None:
    _refresh_memory(place)
    _measure_decoding(place, number)
    with ExitStack() as stack:
        files, servers = dict(place.files), dict(place.servers)
        for state, options in (
            ("a", ()),
            ("a_asked", (_NO_PASSTHROUGH,)),
            ("a_plain", (_NO_PASSTHROUGH, _NO_PREFILL)),
        ):
            if all(map(mount_offers, options)):
                server = stack.enter_context(fragfs_mount(place.library, *options))
                servers[state], files[state] = server, place.shown(server, place.plain)
                # Fills the fragment cache; what it leaves in the page cache is dropped each time.
                place.host.run("read", files[state], 2 * place.size)
        if not _wait_until_whole(servers["a"]):
            place.notes.append("No passthrough here: switch A is asked for every page as well.")
        _set_read_aheads(servers, _READ_AHEAD_KB)
        for state in ("a", "a_asked"):
            if state in files:
                warm = state.replace("a", "warm", 1)
                servers[warm], files[warm] = servers[state], files[state]
        for method, states in METHODS.items():
            if method in ("load", "processes") and place.host.loader is None:
                continue
            for state in STATES[:: -1 if number % 2 else 1]:
                if state == "a_new" and servers["a"].cache_directory is None:
                    continue
                if state in states and (state in files or state in _NEW_MOUNTS):
                    sample = _measure_one(place, state, method, files, servers)
                    place.samples.add(state, method, number, sample)
        _measure_wide(place, number, files, servers)
    for state in ("cold_f32", "cold_small"):
        plain = place.directory / state / "model.safetensors"
        sample = _read_new(place, place.directory / f"{state}.fragfs", plain, "touch")
        place.samples.add(state, "touch", number, sample)


def _refresh_memory(place: _Place) -> None:
    """Free memory for a round, and have in the page cache what all readers start from."""
    free = os.sysconf("SC_AVPHYS_PAGES") * mmap.PAGESIZE
    if free < 6 * place.size:
        drop_caches(sync=False)  # for memory's sake; others' writes are not waited for
    # Of the images and libraries too: reading a model is measured, not the disk. What is mounted
    # in the same directory must stay cold.
    for pattern in ("*/*.safetensors", "*.squashfs", "*.fragfs"):
        for path in place.directory.glob(pattern):
            if not path.parent.name.startswith("mount-"):
                warm_cache(path)
    if place.host.loader is not None:
        # Not timed: its own libraries may have left the page cache, too.
        place.host.run("load", place.plain, 0)


def _wait_until_whole(server: Server) -> bool:
    """Wait until the kernel can read a file that was read; False if it will not."""
    deadline = time.monotonic() + _PUT_TOGETHER_S
    while time.monotonic() < deadline:
        passthrough = server.status().get("passthrough")
        if passthrough is None or passthrough["off"] is not None:
            return False
        if passthrough["files"]:
            return True
        time.sleep(0.05)
    return False


def _set_read_aheads(servers: dict[str, Server], kilobytes: int) -> bool:
    chosen = [
        server for state, server in servers.items() if state in ("c", "a", "a_asked", "a_plain")
    ]
    return all([set_read_ahead(server.mountpoint, kilobytes) for server in chosen])


def _measure_one(
    place: _Place,
    state: str,
    method: str,
    files: dict[str, Path],
    servers: dict[str, Server],
) -> Sample:
    if state == "cold":
        return _read_new(place, place.library, place.plain, method)
    if state == "b":
        return _read_new(place, place.library, place.tune, method, before=place.plain)
    if state == "a_new":
        cache_directory = servers["a"].cache_directory
        return _read_new(place, place.library, place.plain, method, cache_directory=cache_directory)
    if state in ("disk", "tmpfs"):
        return _sample(place, None, files[state], method, 0)
    if state in ("warm", "warm_asked"):
        place.host.run("read", files[state], place.size)
        return _sample(place, servers[state], files[state], method, 0)
    leftover = drop_pages(files[state])
    if (servers[state].status().get("passthrough") or {}).get("files"):
        leftover = 0.0  # what is seen there are the pages of the cache's own file
    return _sample(place, servers[state], files[state], method, place.size, leftover)


def _read_new(
    place: _Place,
    library: Path,
    plain: Path,
    method: str,
    *,
    before: Path | None = None,
    cache_directory: Path | None = None,
) -> Sample:
    """Read through a new mount, over a fragment cache that is new unless one is given."""
    with fragfs_mount(library, cache_directory=cache_directory) as server:
        set_read_ahead(server.mountpoint, _READ_AHEAD_KB)
        if before is not None:
            place.host.run("read", place.shown(server, before), 2 * before.stat().st_size)
        size = plain.stat().st_size
        return _sample(place, server, place.shown(server, plain), method, 2 * size)


def _sample(
    place: _Place,
    server: Server | None,
    path: Path,
    method: str,
    memory_bytes: int,
    leftover: float = 0.0,
) -> Sample:
    pids = server.processes() if server else []
    before = server.counters() if server else {}
    cpu = cpu_seconds(pids)
    with watch_anon(pids) as peak:
        result = place.host.run(method, path, memory_bytes)
    after = server.counters() if server else {}
    return Sample(
        seconds=result["seconds"],
        size=result["size"],
        p50=result.get("p50"),
        p99=result.get("p99"),
        cpu_s=cpu_seconds(server.processes()) - cpu if server else None,
        anon_bytes=peak.size if server else None,
        counters={name: value - before.get(name, 0) for name, value in after.items()},
        leftover=leftover,
    )


def _measure_decoding(place: _Place, number: int) -> None:
    """Decoding in a process of its own, on one core: what a cold read cannot be faster than."""
    base, moved = place.contents
    for state, arguments in (("decode", (base, 1)), ("decode_b", (moved, 1, base))):
        result = run_child("reader", "decode", place.library, *arguments)
        sample = Sample(result["seconds"], int(result["size"]))
        place.samples.add(state, "decode", number, sample)


def _measure_wide(
    place: _Place, number: int, files: dict[str, Path], servers: dict[str, Server]
) -> None:
    """The server in C and fragfs again, where the kernel reads ahead further."""
    if not _set_read_aheads(servers, _WIDE_READ_AHEAD_KB):
        return
    for method in WIDE_METHODS:
        if method == "load" and place.host.loader is None:
            continue
        for state in ("c", "a", "a_asked")[:: -1 if number % 2 else 1]:
            if state in files:
                sample = _measure_one(place, state, method, files, servers)
                place.samples.add(f"{state}_wide", method, number, sample)


# --- afterwards


def _compare(place: _Place) -> None:
    """What was read is what was added."""
    with fragfs_mount(place.library) as server:
        for path in (place.plain, place.tune):
            if not filecmp.cmp(path, place.shown(server, path), shallow=False):
                raise BenchError(f"the mounted file differs from {path}, which was added")


def _facts(place: _Place) -> ReadFacts:
    with FragmentLibrary.open(place.library) as library:
        extents = library.open_content(place.contents[0]).extents
    return ReadFacts(
        size=place.size,
        fragment_count=len(set(extents.fragments)),
        loader=place.host.loader,
        read_ahead_kb=_READ_AHEAD_KB,
        wide_read_ahead_kb=_WIDE_READ_AHEAD_KB,
        notes=tuple(place.notes),
    )
