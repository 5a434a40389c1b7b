"""What is said of what is found: no mount, no machine."""

import dataclasses
import errno
from pathlib import Path

import pytest

from fragfs.mount.findings import (
    MountFacts,
    Severity,
    SystemFacts,
    examine_system,
    wants_background,
    wants_read_ahead,
)
from fragfs.mount.mount_findings import examine_mount
from fragfs.mount.probe import MountAnswer, MountState
from fragfs.mount.table import MountEntry
from fragfs.types import LIBRARY_FORMAT_VERSION

SYSTEM = SystemFacts(
    is_root=False,
    has_device=True,
    has_fusermount=True,
    has_control=True,
    default_timeout_s=0,
    max_timeout_s=0,
    max_pages=256,
    page_bytes=4096,
    memory_bytes=8 << 30,
    group_bytes=None,
    shared_bytes=64 << 20,
    shared_free_bytes=60 << 20,
    shared_small_pages=False,
    abandoned=(),
)
ENTRY = MountEntry(7, "0:42", Path("/mnt/m"), ("ro", "user_id=1000"), "fuse.fragfs", "fragfs")
CACHE = {
    "directory": "/dev/shm/fragfs-0/aa",
    "in_memory": True,
    "bytes_max": 1 << 30,
    "bytes_held": 5 << 20,
    "hits": 3,
    "misses": 1,
    "evictions": 0,
    "damaged": 0,
}
PREFILL = {"pid": 12, "alive": True, "windows": 1, "pushed_bytes": 9, "failed_stores": 0}
PASSTHROUGH = {"files": 1234, "opened": 5, "off": None}
OPTIONS = {"cache_bytes_max": None, "cache_directory": None, "prefill": True, "read_ahead_kb": None}
STATUS = {
    "pid": 10,
    "helpers": [13, 14],
    "library": "/srv/lib",
    "reads": 1234,
    "bytes_returned": 10**9,
    "decodes": 5,
    "bytes_decoded": 6,
    "waiting": 0,
    "options": OPTIONS,
    "cache": CACHE,
    "prefill": PREFILL,
    "passthrough": PASSTHROUGH,
    "last_errors": [],
}


def mount(state=MountState.ANSWERS, status=None, error=0, **fields):
    answer = MountAnswer(state, error, status)
    if state is MountState.ANSWERS and status is None:
        answer = MountAnswer(state, 0, STATUS)
    facts = {
        "entry": ENTRY,
        "answer": answer,
        "read_ahead_kb": 1024,
        "max_background": 64,
        "congestion_threshold": 48,
        "waiting": 0,
        "servers": (),
        "stopped": (),
        "dead_decoders": (),
        "library_format": LIBRARY_FORMAT_VERSION,
    }
    return MountFacts(**{**facts, **fields})


def one(findings, topic):
    (finding,) = (finding for finding in findings if finding.topic == topic)
    return finding


def levels(findings):
    return {finding.severity for finding in findings}


def of_mount(topic, system=SYSTEM, **fields):
    findings = examine_mount(mount(**fields), system)
    assert all(finding.mountpoint == ENTRY.mountpoint for finding in findings)
    return one(findings, topic)


def test_a_good_mount_on_a_good_machine_needs_nothing():
    findings = examine_system(SYSTEM) + examine_mount(mount(), SYSTEM)
    assert levels(findings) == {Severity.OK}
    assert all(finding.remedy is None for finding in findings)


@pytest.mark.parametrize("status", [{}, {"cache": None, "prefill": None}, {"library": "/x"}])
def test_counters_of_another_version_are_no_error(status):
    assert examine_mount(mount(status=status), SYSTEM)


@pytest.mark.parametrize(
    ("fields", "topic", "level", "text"),
    [
        ({"has_device": False}, "fuse", Severity.PROBLEM, "there is no /dev/fuse"),
        ({"has_fusermount": False}, "fuse", Severity.PROBLEM, "fusermount3 is not installed"),
        ({"default_timeout_s": 20}, "timeout", Severity.PROBLEM, "20 s over one request"),
        ({"max_timeout_s": 600}, "timeout", Severity.ADVICE, "fs.fuse.max_request_timeout"),
        ({"default_timeout_s": 300, "max_timeout_s": 600}, "timeout", Severity.ADVICE, "300 s"),
        ({"memory_bytes": 99 << 20}, "memory", Severity.PROBLEM, "104 MB available"),
        ({"group_bytes": 4 << 30}, "memory", Severity.OK, "control group still allows 4.29 GB"),
        ({"shared_small_pages": True}, "shared memory", Severity.ADVICE, "a quarter longer"),
        ({"abandoned": ((Path("/s/a"), 10**7),)}, "caches", Severity.ADVICE, "10 MB of memory"),
    ],
)
def test_the_machine(fields, topic, level, text):
    finding = one(examine_system(dataclasses.replace(SYSTEM, **fields)), topic)
    assert finding.severity is level
    assert text in finding.text
    assert (finding.remedy is None) == (level is Severity.OK)
    assert finding.mountpoint is None


def test_an_old_kernel_says_nothing_of_timeouts():
    old = dataclasses.replace(SYSTEM, default_timeout_s=None, max_timeout_s=None, max_pages=None)
    assert "timeout" not in {finding.topic for finding in examine_system(old)}


@pytest.mark.parametrize(
    ("state", "fields", "level", "text", "remedy"),
    [
        (MountState.DEAD, {}, Severity.PROBLEM, "its process is gone", "fragfs umount /mnt/m"),
        (MountState.HANGS, {"waiting": 3}, Severity.PROBLEM, "hangs; 3 requests wait", "--force"),
        (MountState.HANGS, {"servers": (8,)}, Severity.PROBLEM, "hangs (process 8)", "--force"),
        (
            MountState.HANGS,
            {"servers": (8, 9), "stopped": (8,)},
            Severity.PROBLEM,
            "stopped by a signal",
            "kill -CONT 8",
        ),
        (MountState.FAILS, {"error": errno.EIO}, Severity.PROBLEM, "with an error: EIO", "log"),
        (
            MountState.FAILS,
            {"error": errno.EACCES},
            Severity.ADVICE,
            "user 1000 mounted it",
            "--allow-other",
        ),
    ],
)
def test_a_mount_that_does_not_answer(state, fields, level, text, remedy):
    (finding,) = examine_mount(mount(state, **fields), SYSTEM)
    assert (finding.topic, finding.severity) == ("answers", level)
    assert text in finding.text
    assert remedy in finding.remedy


def test_a_mount_without_counters():
    facts = dataclasses.replace(mount(), answer=MountAnswer(MountState.ANSWERS))
    finding = one(examine_mount(facts, SYSTEM), "answers")
    assert finding.severity is Severity.ADVICE
    assert "another version" in finding.text


def test_names_that_loaders_do_not_find():
    entry = dataclasses.replace(ENTRY, mountpoint=Path("/mnt/my models"))
    findings = examine_mount(mount(entry=entry), SYSTEM)
    assert "spaces" in one(findings, "name").text


def test_read_ahead():
    finding = of_mount("read-ahead", read_ahead_kb=128)
    assert finding.severity is Severity.ADVICE
    assert "the kernel's default" in finding.text
    assert finding.remedy == "as root: echo 512 > /sys/class/bdi/0:42/read_ahead_kb"
    root = dataclasses.replace(SYSTEM, is_root=True)
    assert "doctor --fix /mnt/m" in of_mount("read-ahead", root, read_ahead_kb=128).remedy
    assert of_mount("read-ahead", read_ahead_kb=None).severity is Severity.OK
    small = dataclasses.replace(SYSTEM, max_pages=32)
    assert "up to 128 KiB" in of_mount("read-ahead", small).text


def test_a_read_ahead_that_somebody_chose_stays():
    chosen = STATUS | {"options": OPTIONS | {"read_ahead_kb": 256}}
    assert not wants_read_ahead(mount(status=chosen, read_ahead_kb=256))
    assert of_mount("read-ahead", status=chosen, read_ahead_kb=256).severity is Severity.OK
    assert wants_read_ahead(mount(status=chosen, read_ahead_kb=128)), "it was not obeyed"
    assert not wants_read_ahead(mount(MountState.DEAD, read_ahead_kb=128))


def test_background_requests():
    assert of_mount("background", max_background=12).severity is Severity.ADVICE
    assert wants_background(mount(max_background=12))
    assert not wants_background(mount(max_background=None))
    assert "root, may know" in of_mount("background", max_background=None).text
    bare = dataclasses.replace(SYSTEM, has_control=False)
    assert "is not mounted" in of_mount("background", bare, max_background=None).text


@pytest.mark.parametrize(
    ("cache", "asked", "level", "text"),
    [
        ({}, {}, Severity.OK, "in memory: 5.24 MB of 1.07 GB in /dev/shm/fragfs-0/aa, 75 % of 4"),
        ({"hits": 0, "misses": 0}, {}, Severity.OK, "fragfs-0/aa"),
        ({"evictions": 7}, {}, Severity.OK, "7 evicted"),
        ({"in_memory": False}, {}, Severity.ADVICE, "/dev/shm has 67.1 MB, 62.9 MB free"),
        ({"in_memory": False}, {"cache_directory": "/x"}, Severity.OK, "as --cache-dir says"),
        ({"bytes_max": 99 << 20}, {}, Severity.ADVICE, "small, for want of room"),
        ({"bytes_max": 99 << 20}, {"cache_bytes_max": 99 << 20}, Severity.OK, "of 104 MB"),
        (None, {}, Severity.ADVICE, "none: no room"),
        (None, {"cache_bytes_max": 0}, Severity.ADVICE, "as --cache 0 says"),
    ],
)
def test_the_cache(cache, asked, level, text):
    status = STATUS | {
        "cache": None if cache is None else CACHE | cache,
        "options": OPTIONS | asked,
    }
    finding = of_mount("cache", status=status)
    assert finding.severity is level
    assert text in finding.text


def test_a_damaged_cache_is_a_problem_of_its_own():
    findings = examine_mount(mount(status=STATUS | {"cache": CACHE | {"damaged": 2}}), SYSTEM)
    assert [finding.severity for finding in findings if finding.topic == "cache"] == [
        Severity.PROBLEM,
        Severity.OK,
    ]


@pytest.mark.parametrize(
    ("changed", "level", "text"),
    [
        ({}, Severity.OK, "ahead of readers; 9 B stored"),
        ({"prefill": PREFILL | {"failed_stores": 4}}, Severity.OK, "4 refused"),
        ({"prefill": PREFILL | {"pid": None}}, Severity.ADVICE, "may not abort"),
        ({"prefill": PREFILL | {"alive": False}}, Severity.PROBLEM, "keeps ending"),
        ({"prefill": None}, Severity.OK, "as --no-prefill says"),
        ({"prefill": None, "cache": None}, Severity.OK, "for want of a fragment cache"),
    ],
)
def test_prefill(changed, level, text):
    finding = of_mount("prefill", status=STATUS | changed)
    assert finding.severity is level
    assert text in finding.text


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({}, "it has 1,234, opened 5 times"),
        (
            {"passthrough": PASSTHROUGH | {"off": "this process may not"}},
            "off: this process may not",
        ),
        ({"passthrough": None}, "only of a mount by root"),
        (
            {"passthrough": None, "options": OPTIONS | {"passthrough": False}},
            "as --no-passthrough says",
        ),
    ],
)
def test_passthrough(changed, text):
    finding = of_mount("passthrough", status=STATUS | changed)
    assert finding.severity is Severity.OK
    assert text in finding.text


def test_the_way_to_prefill_where_nobody_may_abort():
    status = STATUS | {"prefill": PREFILL | {"pid": None}}
    bare = dataclasses.replace(SYSTEM, has_control=False)
    assert "mount -t fusectl" in of_mount("prefill", bare, status=status).remedy


def test_reads_without_the_compiled_part():
    assert of_mount("reads", status=STATUS | {"front": False}).severity is Severity.ADVICE
    assert "reads" not in {finding.topic for finding in examine_mount(mount(), SYSTEM)}


def test_decoders():
    assert "2 processes" in of_mount("decoders").text
    assert "1 process;" in of_mount("decoders", dead_decoders=(13,)).text
    assert of_mount("decoders", dead_decoders=(13, 14)).severity is Severity.PROBLEM
    assert of_mount("decoders", status=STATUS | {"helpers": []}).severity is Severity.PROBLEM
    assert (
        of_mount("decoders", status=STATUS | {"helpers": [], "cache": None}).severity is Severity.OK
    )


def test_faults_are_problems():
    faults = [{"at_s": 1, "what": "m/f", "error": "damaged; restore it"}] * 2
    findings = examine_mount(mount(status=STATUS | {"last_errors": faults}), SYSTEM)
    shown = [finding for finding in findings if finding.topic == "error"]
    assert [finding.text for finding in shown] == ["m/f: damaged; restore it"] * 2
    assert levels(shown) == {Severity.PROBLEM}


@pytest.mark.parametrize(
    ("version", "level"),
    [
        (None, Severity.PROBLEM),
        (LIBRARY_FORMAT_VERSION - 1, Severity.ADVICE),
        (LIBRARY_FORMAT_VERSION, Severity.OK),
        (LIBRARY_FORMAT_VERSION + 1, Severity.PROBLEM),
    ],
)
def test_the_library(version, level):
    finding = of_mount("library", library_format=version)
    assert finding.severity is level
    assert "/srv/lib" in finding.text
