"""The shared cache and prefill under real readers: right bytes, whatever is killed or damaged."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fragfs.cache.place import SHARED_MEMORY
from fragfs.library.add import AddOptions
from fragfs.library.library import FragmentLibrary
from fragfs.mount.table import find_mount
from fragfs.mount.unmount import unmount
from tests.mount import readers
from tests.mount.soak_reading import helpers_of, make_sources, read_status, soak
from tests.mount.support import (
    Reader,
    drop_pages,
    is_alive,
    make_library,
    wait_until,
    write_safetensors,
)

pytestmark = [pytest.mark.mount, pytest.mark.slow]

READERS_S = 200
"""How long a reader may take: a few seconds on an idle machine."""

STARTED = []
"""The readers of the test that runs."""

SOAK_S = 30
"""`python -m tests.mount.soak_reading MINUTES` runs it for longer."""


@pytest.fixture(scope="module")
def made(tmp_path_factory, source):
    """(library, directory of its sources): two related models, and the odd files of `source`."""
    root = tmp_path_factory.mktemp("prefill")
    make_sources(root / "sources")
    (root / "sources" / "org").mkdir()
    shutil.copytree(source, root / "sources" / "org" / "model")
    with FragmentLibrary.create(root / "library") as library:
        for name in ("base", "tuned", "org/model"):
            library.add([root / "sources" / name], AddOptions(name=os.fsencode(name)))
    return root / "library", root / "sources"


@pytest.fixture(scope="module")
def fragment_count(made):
    """Fragments that the files of the library need, bases included."""
    with FragmentLibrary.open(made[0]) as library:
        wanted = set()
        for model in library.models():
            for entry in library.files(model.name):
                node = library.lookup(model.name + b"/" + entry.path)
                wanted |= set(library.open_content(node.content).extents.fragments)
        pending = list(wanted)
        while pending:
            bases = set(library.bases(pending.pop())) - wanted
            wanted |= bases
            pending += bases
    return len(wanted)


@pytest.fixture
def mounts(mounts):
    """Mounts that are asked for every page: what the kernel reads itself is not stored ahead."""
    mounts.defaults["passthrough"] = False
    return mounts


@pytest.fixture(autouse=True)
def _ended():
    """Ends and closes the readers that a failed test left."""
    yield
    while STARTED:
        reader = STARTED.pop()
        reader.kill()
        reader.communicate()
        reader.stdout.close()
        reader.stderr.close()


def start_reader(mode, mounted, source, *arguments):
    STARTED.append(
        subprocess.Popen(
            [sys.executable, readers.__file__, mode, mounted, source, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    )
    return STARTED[-1]


def finish(reader, timeout=READERS_S):
    """(exit status, what it said); fails if it hangs."""
    _, errors = reader.communicate(timeout=timeout)
    return reader.returncode, errors


def read_all(mode, mounted, source):
    assert finish(start_reader(mode, mounted, source)) == (0, "")


def no_helpers_left(pids):
    return not any(is_alive(pid) for pid in pids)


# --- bytes


def test_h27_every_file_in_every_way(mounts, made):
    """With the defaults: cold pages, a cache that is warm after the first one."""
    mounted = mounts(made[0]).mountpoint
    for mode in readers.MODES:
        drop_pages(mounted)
        read_all(mode, mounted, made[1])
    status = read_status(mounted)
    assert status["cache"]["damaged"] == 0
    assert status["waiting"] == 0


def test_without_the_compiled_front(made, tmp_path):
    """Every read goes through pyfuse3 and the interpreter, and windows are stored ahead."""
    place = tmp_path / "place"
    place.mkdir()
    daemon = subprocess.Popen(
        [sys.executable, "-m", "tests.mount.plain_daemon", made[0], place],
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_until(lambda: find_mount(place) is not None, 20)
        for mode in readers.MODES:
            drop_pages(place)
            read_all(mode, place, made[1])
        status = read_status(place)
        assert not status["front"]
        if status["prefill"]["pid"] is not None:
            assert status["prefill"]["pushed_bytes"] > 0
        unmount(place)
        assert daemon.wait(10) == 0
    finally:
        if find_mount(place) is not None:
            unmount(place, lazy=True)
        daemon.kill()
        daemon.wait()


@pytest.mark.parametrize("mode", ["read", "map", "map threads", "map random"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"prefill": False},
        {"cache_bytes_max": 0},
        {"cache_bytes_max": 2 << 20},
        {"cache_on_disk": True},
    ],
    ids=["defaults", "no prefill", "no cache", "a small cache", "on disk"],
)
def test_cold_mounts_with_all_options(mounts, made, tmp_path, options, mode):
    if mode != "map" and options.get("cache_bytes_max") != 2 << 20:
        pytest.skip("one way of reading each; all of them with a cache smaller than a file")
    options = dict(options)
    if options.pop("cache_on_disk", False):
        options["cache_directory"] = tmp_path / "cache"
    report = mounts(made[0], **options)
    status = read_status(report.mountpoint)
    read_all(mode, report.mountpoint, made[1])
    assert (status["cache"] is None) == (options.get("cache_bytes_max") == 0)
    assert (status["prefill"] is None) == (status["cache"] is None or "prefill" in options)
    if "cache_directory" in options:
        assert not status["cache"]["in_memory"]
        assert Path(status["cache"]["directory"]).is_relative_to(tmp_path / "cache")
    unmount(report.mountpoint)
    wait_until(lambda: not is_alive(report.pid), 20)
    if "cache_directory" in options:
        # What is on disk stays for the next mount, which checks every byte of it.
        again = mounts(made[0], **options)
        read_all(mode, again.mountpoint, made[1])
        assert read_status(again.mountpoint)["decodes"] == 0


# --- sharing


def test_four_processes_that_load_at_once_cost_one_decode_per_fragment(
    mounts, made, fragment_count
):
    report = mounts(made[0], cache_bytes_max=256 << 20)
    loading = [
        start_reader(mode, report.mountpoint, made[1])
        for mode in ("map", "map sequential", "read", "map threads")
    ]
    assert [finish(reader) for reader in loading] == [(0, "")] * 4
    assert read_status(report.mountpoint)["decodes"] == fragment_count


def test_a_second_mount_has_what_the_first_one_decoded(mounts, made, fragment_count):
    first, second = (mounts(made[0], cache_bytes_max=256 << 20) for _ in range(2))
    read_all("map", first.mountpoint, made[1])
    read_all("map", second.mountpoint, made[1])
    assert read_status(first.mountpoint)["decodes"] == fragment_count
    status = read_status(second.mountpoint)
    assert status["decodes"] == 0
    assert status["cache"]["directory"] == read_status(first.mountpoint)["cache"]["directory"]


def test_two_mounts_that_are_read_at_once_cost_one_decode_per_fragment(
    mounts, made, fragment_count
):
    both = [mounts(made[0], cache_bytes_max=256 << 20) for _ in range(2)]
    loading = [start_reader("map", report.mountpoint, made[1]) for report in both]
    assert [finish(reader) for reader in loading] == [(0, "")] * 2
    decodes = sum(read_status(report.mountpoint)["decodes"] for report in both)
    assert decodes == fragment_count


@pytest.mark.skipif(not SHARED_MEMORY.is_dir(), reason="no shared memory")
def test_unmounting_leaves_no_file_and_no_process(mounts, made):
    reports = [mounts(made[0]) for _ in range(2)]
    pids, directories = set(), set()
    for report in reports:
        read_all("map", report.mountpoint, made[1])
        decoders, pusher = helpers_of(report.mountpoint)
        pids |= {report.pid, *decoders, *([pusher] if pusher else [])}
        directories.add(read_status(report.mountpoint)["cache"]["directory"])
    (directory,) = directories
    unmount(reports[0].mountpoint)
    assert os.path.isdir(directory)
    unmount(reports[1].mountpoint)
    wait_until(lambda: no_helpers_left(pids), 20)
    assert not os.path.exists(directory)


# --- damage


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_damaged_files_of_the_cache_are_never_served(mounts, made, tmp_path, where):
    options = {} if where == "memory" else {"cache_directory": tmp_path / "cache"}
    first = mounts(made[0], **options)
    read_all("map", first.mountpoint, made[1])
    directory = Path(read_status(first.mountpoint)["cache"]["directory"])
    for index, path in enumerate(sorted(directory.iterdir())):
        if path.name.startswith("."):
            continue
        data = bytearray(path.read_bytes())
        if index % 3 == 0:
            data = data[: len(data) // 2]
        else:
            data[len(data) // index % len(data)] ^= 0xFF
        # Replaced, not changed: what is mapped of the old file stays what it is.
        (tmp_path / "new").write_bytes(data)
        shutil.copyfile(tmp_path / "new", directory / ".new")
        os.rename(directory / ".new", path)
    second = mounts(made[0], **options)
    for report in (second, first):
        drop_pages(report.mountpoint)
        read_all("map", report.mountpoint, made[1])
    assert read_status(second.mountpoint)["cache"]["damaged"] > 0


def test_the_cache_s_directory_is_deleted_under_a_mount(mounts, made):
    report = mounts(made[0])
    reader = start_reader("map", report.mountpoint, made[1], "4")
    directory = read_status(report.mountpoint)["cache"]["directory"]
    for _ in range(3):
        time.sleep(0.7)
        shutil.rmtree(directory, ignore_errors=True)
    assert finish(reader) == (0, "")
    assert read_status(report.mountpoint)["cache"]["bytes_held"] >= 0
    drop_pages(report.mountpoint)
    read_all("read", report.mountpoint, made[1])
    unmount(report.mountpoint)


def _cache_bytes(directory, pids):
    """Bytes of the files in a directory, and of those that left it and are held open."""
    sizes = {}
    directories = [directory, *(f"/proc/{pid}/fd" for pid in pids)]
    for place in directories:
        with contextlib.suppress(OSError):
            for name in os.listdir(place):
                path = os.path.join(place, name)
                with contextlib.suppress(OSError):
                    if place == directory or os.readlink(path).startswith(directory):
                        status = os.stat(path)
                        sizes[status.st_ino] = status.st_blocks * 512
    return sum(sizes.values())


def test_what_is_held_open_is_within_the_budget(mounts, tmp_path):
    """A file that was evicted takes memory until the last one who reads from it closes it."""
    budget = 64 << 20
    for seed, name in enumerate(("one", "two")):
        (tmp_path / name).mkdir()
        write_safetensors(tmp_path / name / "model.safetensors", seed, 32, (1024, 600))
    made = make_library(tmp_path / "library", {b"one": tmp_path / "one", b"two": tmp_path / "two"})
    report = mounts(made, cache_bytes_max=budget)
    status = read_status(report.mountpoint)
    pids = [status["pid"], *status["helpers"]]
    if status["prefill"]["pid"] is not None:
        pids.append(status["prefill"]["pid"])
    reading = [
        start_reader("map random", report.mountpoint / "one", tmp_path / "one"),
        start_reader("map", report.mountpoint / "two", tmp_path / "two"),
        start_reader("read", report.mountpoint / "one", tmp_path / "one"),
    ]
    seen = []
    while any(reader.poll() is None for reader in reading):
        seen.append(_cache_bytes(status["cache"]["directory"], pids))
        time.sleep(0.01)
    assert [finish(reader) for reader in reading] == [(0, "")] * 3
    assert read_status(report.mountpoint)["cache"]["evictions"] > 0
    # Whoever fills the directory counts what others put there only now and then.
    assert budget // 2 < max(seen) < budget * 5 // 4


# --- removal


def test_h04_h05_a_model_is_removed_while_it_is_mapped_and_prefilled(mounts, made, tmp_path):
    """Its readers, of files they have mapped or open, get every byte of it."""
    shutil.copytree(made[0], tmp_path / "library")
    report = mounts(tmp_path / "library")
    program = """
import random
sys.path.insert(0, sys.argv[3])
def compare(path, source, name):
    with open(source, "rb") as file:
        expected = file.read()
    mapped = map_file(path)
    return lambda: mapped[:] == expected
checks = [
    compare(os.path.join(sys.argv[1], model, "model.safetensors"),
            os.path.join(sys.argv[2], model, "model.safetensors"), model)
    for model in ("base", "tuned")
]
pause()
results = []
threads = [threading.Thread(target=lambda check=check: results.append(check())) for check in checks]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(results)
"""
    with Reader(program, report.mountpoint, made[1], "") as reader:
        reader.process.stdin.write("go\n")
        reader.process.stdin.flush()
        with FragmentLibrary.open(tmp_path / "library") as library:
            for name in ("base", "tuned"):
                library.remove(name)
            library.optimize()
        output, errors = reader.process.communicate(timeout=READERS_S)
    assert (reader.process.returncode, output, errors) == (0, "[True, True]\n", "")
    assert [name for name in os.listdir(report.mountpoint) if name != "org"] == []
    assert "ERROR" not in mounts.read_log()


# --- deaths


@pytest.mark.parametrize("victim", ["decoders", "pusher", "decoders and pusher"])
def test_helpers_are_killed_while_they_work_and_nobody_notices(mounts, made, victim):
    report = mounts(made[0], cache_bytes_max=8 << 20)
    reading = [
        start_reader(mode, report.mountpoint, made[1], "3") for mode in ("map", "map threads")
    ]
    for _ in range(4):
        time.sleep(0.5)
        decoders, pusher = helpers_of(report.mountpoint)
        victims = [*(decoders if "decoders" in victim else [])]
        if "pusher" in victim and pusher and is_alive(pusher):
            victims.append(pusher)
        for pid in victims:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    assert [finish(reader) for reader in reading] == [(0, "")] * 2
    drop_pages(report.mountpoint)
    read_all("read", report.mountpoint, made[1])
    unmount(report.mountpoint)


@pytest.mark.parametrize(
    "victim",
    [
        "daemon",
        "decoders and daemon",
        "pusher and daemon",
        "daemon and pusher",
        "daemon, with a stopped pusher",
        "helpers first",
    ],
)
def test_the_daemon_is_killed_while_readers_wait_for_it(mounts, made, victim):
    """No helper and no reader outlives it by more than a moment, and the mount clears.

    None reads with MAP_POPULATE: see `readers.py`.
    """
    report = mounts(made[0], cache_bytes_max=8 << 20)
    reading = [
        start_reader(mode, report.mountpoint, made[1], "600")
        for mode in ("map", "map threads", "read", "map random")
    ]
    for reader in reading:
        assert reader.stdout.read(1) == "."
    decoders, pusher = helpers_of(report.mountpoint)
    assert decoders
    helpers = [*decoders, *([pusher] if pusher else [])]
    if "pusher" in victim and pusher is None:
        pytest.skip("this user may not abort connections: there is no pusher")
    if "stopped" in victim:
        os.kill(pusher, signal.SIGSTOP)
        time.sleep(0.2)
    killed = {
        "decoders and daemon": [*decoders, report.pid],
        "pusher and daemon": [pusher, report.pid],
        "daemon and pusher": [report.pid, pusher],
        "helpers first": helpers,
    }.get(victim, [report.pid])
    for pid in killed:
        os.kill(pid, signal.SIGKILL)
    if victim == "helpers first":
        wait_until(lambda: no_helpers_left(helpers), 15)
        os.kill(report.pid, signal.SIGKILL)
    # Within a second on an idle machine.
    took = wait_until(lambda: no_helpers_left([report.pid, *helpers]), 15)
    ended = [finish(reader, 30) for reader in reading]
    for status, errors in ended:
        assert status == -signal.SIGBUS or (status == 1 and "Error" in errors), (status, errors)
        assert "wrong" not in errors
    assert took < 5
    if find_mount(report.mountpoint) is not None:
        unmount(report.mountpoint)
    assert find_mount(report.mountpoint) is None
    # The next mount takes over what the killed one left in shared memory.
    again = mounts(made[0], report.mountpoint, cache_bytes_max=8 << 20)
    read_all("map", again.mountpoint, made[1])


def test_a_pusher_that_is_killed_is_reaped_and_another_one_stores(mounts, made):
    report = mounts(made[0], cache_bytes_max=256 << 20)
    for _ in range(3):
        _, pusher = helpers_of(report.mountpoint)
        if pusher is None:
            pytest.skip("this user may not abort connections: there is no pusher")
        os.kill(pusher, signal.SIGKILL)
        # Not a zombie either.
        wait_until(lambda pid=pusher: not os.path.exists(f"/proc/{pid}"), 15)
        wait_until(lambda pid=pusher: helpers_of(report.mountpoint)[1] != pid, 15)
        before = status = read_status(report.mountpoint)["prefill"]
        assert before["alive"]
        deadline = time.monotonic() + 60
        # Reading everything may be over by the time that a process has started.
        while status["pushed_bytes"] == before["pushed_bytes"]:
            assert time.monotonic() < deadline
            drop_pages(report.mountpoint)
            read_all("map random", report.mountpoint, made[1])
            status = read_status(report.mountpoint)["prefill"]
        assert status["pid"] == before["pid"]
    last = status["pid"]
    unmount(report.mountpoint)
    wait_until(lambda: no_helpers_left([report.pid, last]), 15)


def test_stopped_decoders_hang_nobody(mounts, made):
    """They keep their claims and their jobs; one after the other is replaced."""
    report = mounts(made[0], cache_bytes_max=8 << 20)
    read_all("map", report.mountpoint, made[1])
    drop_pages(report.mountpoint)
    stopped, _ = helpers_of(report.mountpoint)
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
    try:
        read_all("map threads", report.mountpoint, made[1])
    finally:
        for pid in stopped:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


def test_a_stopped_daemon_elsewhere_that_shares_the_cache_hangs_nobody(mounts, made):
    first, second = (mounts(made[0], cache_bytes_max=256 << 20) for _ in range(2))
    reader = start_reader("map", first.mountpoint, made[1], "600")
    assert reader.stdout.read(1) == "."
    stopped = [first.pid, *helpers_of(first.mountpoint)[0]]
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
    try:
        read_all("map", second.mountpoint, made[1])
    finally:
        for pid in stopped:
            os.kill(pid, signal.SIGCONT)


def test_a_stopped_pusher_does_not_keep_a_mount_from_ending(mounts, made):
    report = mounts(made[0])
    _, pusher = helpers_of(report.mountpoint)
    if pusher is None:
        pytest.skip("this user may not abort connections: there is no pusher")
    os.kill(pusher, signal.SIGSTOP)
    read_all("map", report.mountpoint, made[1])
    unmount(report.mountpoint)
    wait_until(lambda: no_helpers_left([report.pid, pusher]), 20)


def test_readers_of_two_mounts_while_everything_is_killed(tmp_path):
    counts = soak(tmp_path, SOAK_S)
    assert sum(counts.values()) > 5
