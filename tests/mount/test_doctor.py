"""Diagnosis and repair of real mounts, and what the machine says of itself."""

import dataclasses
import os
import signal
import subprocess
import time

import pytest

from fragfs.cache.users import USERS_NAME
from fragfs.errors import NotFoundError, StorageError, UsageError
from fragfs.mount import doctor
from fragfs.mount.doctor import diagnose, find_entries, read_system, repair
from fragfs.mount.findings import LARGE_PAGES, Severity
from fragfs.mount.live import live_mounts, named_mount
from fragfs.mount.probe import MountAnswer, MountState, ask_mount, ask_mounts
from fragfs.mount.table import MountEntry, find_mount
from fragfs.types import LIBRARY_FORMAT_VERSION
from tests.mount.support import is_alive, make_library, run_reader, wait_until

mounted = [pytest.mark.mount, pytest.mark.slow]


def marks(test):
    for mark in mounted:
        test = mark(test)
    return test


# --- without a mount


def test_an_ordinary_directory_answers_and_tells_nothing(tmp_path):
    found = ask_mounts([tmp_path, tmp_path / "none"], 10)
    assert found == [MountAnswer(MountState.ANSWERS), MountAnswer(MountState.FAILS, 2)]
    assert ask_mounts([], 10) == []


def test_what_is_no_mount_is_not_found(tmp_path):
    with pytest.raises(NotFoundError, match="fragfs doctor"):
        find_entries(tmp_path)
    with pytest.raises(NotFoundError, match="mount it: fragfs mount"):
        named_mount(tmp_path, tmp_path, 5)
    assert live_mounts(tmp_path, 1) == []


def test_the_machine_tells_what_it_has(tmp_path):
    facts = read_system(tmp_path)
    assert facts.memory_bytes > 0
    assert facts.shared_bytes >= facts.shared_free_bytes > 0
    assert facts.page_bytes == os.sysconf("SC_PAGESIZE")
    assert facts.abandoned == ()


@pytest.mark.parametrize("release", ["6.14.0", "7.0-rc1", "6.13.9-generic", "5.15"])
def test_small_pages_of_shared_memory_are_seen(tmp_path, monkeypatch, release):
    options = "size=16m"
    entry = MountEntry(7, "0:42", tmp_path, ("rw", options), "tmpfs", "tmpfs")
    uname = os.uname()
    named = os.uname_result((uname.sysname, uname.nodename, release, uname.version, uname.machine))
    monkeypatch.setattr(doctor, "find_mount", lambda place: entry if place == tmp_path else None)
    monkeypatch.setattr(doctor.os, "uname", lambda: named)
    is_known = os.path.isdir("/sys/kernel/mm/transparent_hugepage")
    is_new = release[0] == "7" or release.startswith("6.14")
    assert read_system(tmp_path).shared_small_pages == (is_known and is_new)
    assert not read_system(tmp_path.parent).shared_small_pages
    large = dataclasses.replace(entry, options=("rw", options, "huge=within_size"))
    monkeypatch.setattr(doctor, "find_mount", lambda _: large)
    assert not read_system(tmp_path).shared_small_pages


def test_shared_memory_is_given_large_pages(tmp_path):
    if os.geteuid() != 0:
        pytest.skip("only root may mount a tmpfs")
    options = "size=16m,nosuid,nodev,noexec,noatime"
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "shared", tmp_path], check=False)
    if made.returncode:
        pytest.skip("no tmpfs to be had")
    try:
        before = set(find_mount(tmp_path).options)
        facts = dataclasses.replace(read_system(tmp_path), shared_small_pages=True)
        diagnosis = dataclasses.replace(diagnose([]), system=facts)
        assert repair(diagnosis, machine=False, shared_memory=tmp_path) == []
        (done,) = repair(diagnosis, shared_memory=tmp_path)
        if done.error is not None:
            pytest.skip(f"a kernel without them: {done.error}")
        assert set(find_mount(tmp_path).options) == {*before, LARGE_PAGES}
        assert not read_system(tmp_path).shared_small_pages
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_large_pages_that_are_not_to_be_had_are_no_failure(tmp_path):
    facts = dataclasses.replace(read_system(tmp_path), shared_small_pages=True)
    diagnosis = dataclasses.replace(diagnose([]), system=facts)
    (done,) = repair(diagnosis, shared_memory=tmp_path)
    assert "mount" in done.error
    assert "root may do it" in done.error


def test_unused_caches_are_found_and_removed(tmp_path):
    left = tmp_path / f"fragfs-{os.geteuid()}" / "aa"
    left.mkdir(parents=True)
    (left / USERS_NAME).touch()
    (left / "fragment").write_bytes(b"x" * 100)
    facts = read_system(tmp_path)
    assert facts.abandoned == ((left, 100),)
    diagnosis = diagnose([])
    object.__setattr__(diagnosis, "system", facts)
    assert repair(diagnosis, machine=False) == []
    (done,) = repair(diagnosis, shared_memory=tmp_path)
    assert (done.text, done.error) == (f"removed the unused fragment cache {left}", None)
    assert not left.exists()


# --- with one


def topics(diagnosis, mountpoint):
    return {
        finding.topic: finding for finding in diagnosis.findings if finding.mountpoint == mountpoint
    }


@marks
def test_a_mount_from_its_birth_to_its_death(mounts, library_path, tmp_path):
    # Without the process that ends the connection, and perhaps the mount, when the daemon dies.
    report = mounts(library_path, prefill=False)
    place = report.mountpoint
    entries = find_entries(place)
    diagnosis = diagnose(entries)
    found = topics(diagnosis, place)
    assert not diagnosis.has_problem
    assert f"process {report.pid}" in found["answers"].text
    assert str(library_path) in found["library"].text
    assert str(report.cache_directory) in found["cache"].text
    assert diagnosis.mounts[0].library_format == LIBRARY_FORMAT_VERSION

    (live,) = live_mounts(library_path, 5)
    assert live == named_mount(library_path, place, 10)
    assert live.status["last_errors"] == []
    assert live.status["options"]["prefill"] is False
    assert live_mounts(tmp_path, 1) == []
    with pytest.raises(UsageError, match="shows the library"):
        named_mount(tmp_path, place, 10)

    done = repair(diagnosis, machine=False)
    if os.geteuid() == 0:
        assert [tried.error for tried in done] == [None] * len(done)
        assert find_mount(place).read_ahead_kb == 512
        assert repair(diagnose(entries), machine=False) == []

    os.kill(report.pid, signal.SIGSTOP)
    try:
        started = time.monotonic()
        diagnosis = diagnose(entries, timeout_s=0.5)
        assert time.monotonic() - started < 5
        found = topics(diagnosis, place)["answers"]
        assert found.severity is Severity.PROBLEM
        assert found.remedy == f"let it go on: kill -CONT {report.pid}"
        assert live_mounts(library_path, 0.5) == []
        with pytest.raises(StorageError, match="does not answer"):
            named_mount(library_path, place, 0.5)
        assert repair(diagnosis, machine=False) == [], "a mount that hangs is not ended"
    finally:
        os.kill(report.pid, signal.SIGCONT)

    os.kill(report.pid, signal.SIGKILL)
    wait_until(lambda: not is_alive(report.pid))
    wait_until(lambda: ask_mount(place, 5).state is MountState.DEAD, 30)
    diagnosis = diagnose(entries)
    assert diagnosis.has_problem
    assert "its process is gone" in topics(diagnosis, place)["answers"].text
    (done,) = repair(diagnosis, machine=False)
    assert (done.text, done.error) == (f"cleared the dead mount on {place}", None)
    assert find_mount(place) is None


@marks
def test_damage_is_told(mounts, source, tmp_path):
    library = make_library(tmp_path / "library", {b"m": source})
    report = mounts(library, cache_bytes_max=0, prefill=False)
    for pack in (library / "packs").glob("*.pack"):
        with pack.open("r+b") as file:
            file.seek(4096)
            file.write(b"\xff" * (pack.stat().st_size - 8192))
    reading = run_reader(
        "import sys; open(sys.argv[1], 'rb').read()",
        report.mountpoint / "m" / "model-00002-of-00004.safetensors",
        check=False,
    )
    assert "Input/output error" in reading.stderr
    diagnosis = diagnose(find_entries(report.mountpoint))
    assert diagnosis.has_problem
    found = topics(diagnosis, report.mountpoint)
    assert found["error"].text.startswith("m/model-00002-of-00004.safetensors: ")
    assert "as --cache 0 says" in found["cache"].text
    assert found["prefill"].text == "off, for want of a fragment cache"
