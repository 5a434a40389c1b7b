"""Helpers of the tests that mount: children that read, files to compare, waiting."""

import os
import subprocess
import sys
import time

import numpy as np

from fragfs.library.add import AddOptions
from fragfs.library.library import FragmentLibrary

TIMEOUT_S = 60
"""How long a child may take before the test fails instead of hanging."""


def run_reader(program, *arguments, timeout=TIMEOUT_S, check=True):
    """Run Python code in a child process, so that a mount that hangs cannot hang the tests."""
    return subprocess.run(
        [sys.executable, "-c", program, *map(argument, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=check,
    )


def argument(value):
    return value if isinstance(value, (str, bytes, os.PathLike)) else str(value)


class Reader:
    """A child that says it is ready, then waits for a line on standard input to go on."""

    def __init__(self, program, *arguments):
        self.process = subprocess.Popen(
            [sys.executable, "-c", READER_PRELUDE + program, *map(argument, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        line = self.process.stdout.readline()
        assert line == "ready\n", line + self.process.stderr.read()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.communicate()

    @property
    def pid(self):
        return self.process.pid

    def proceed(self, timeout=TIMEOUT_S):
        """Let it go on to its end; returns (exit status, output, seconds it took)."""
        started = time.monotonic()
        output, errors = self.process.communicate("go\n", timeout=timeout)
        return self.process.returncode, output + errors, time.monotonic() - started


READER_PRELUDE = """
import hashlib, mmap, os, sys, threading
def pause():
    print("ready", flush=True)
    sys.stdin.readline()
def map_file(path):
    fd = os.open(path, os.O_RDONLY)
    return mmap.mmap(fd, os.fstat(fd).st_size, mmap.MAP_PRIVATE, mmap.PROT_READ)
"""


def wait_until(condition, timeout_s=5.0):
    """Wait for something outside this process; returns how long it took."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < timeout_s, "waited too long"
        time.sleep(0.01)
    return time.monotonic() - started


def is_alive(pid):
    """Whether a process runs; a zombie does not."""
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def rss_anonymous_bytes(pid):
    with open(f"/proc/{pid}/status") as status:
        for line in status:
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    raise AssertionError("no RssAnon")


def cpu_s(pid):
    with open(f"/proc/{pid}/stat") as stat:
        fields = stat.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def drop_pages(directory):
    """Forget the cached pages of every file below a directory, so that reads ask the daemon."""
    for name in source_files(directory):
        descriptor = os.open(os.path.join(os.fsencode(directory), name), os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def write_safetensors(path, seed, tensor_count=6, shape=(350, 512), dtype=np.float32):
    from safetensors.numpy import save_file

    random = np.random.default_rng(seed)
    tensors = {
        f"model.layers.{index}.weight": random.standard_normal(shape).astype(dtype)
        for index in range(tensor_count)
    }
    save_file(tensors, path, metadata={"format": "pt"})


def source_files(directory):
    """Every regular file below a directory, relative, as bytes paths."""
    root = os.fsencode(directory)
    found = []
    for parent, _, names in os.walk(root):
        found += [os.path.relpath(os.path.join(parent, name), root) for name in names]
    return sorted(found)


def make_library(path, models):
    """A new library with directories added as models; returns its path."""
    with FragmentLibrary.create(path) as library:
        for name, directory in models.items():
            library.add([directory], AddOptions(name=name))
    return path
