"""Readers of two mounts while everything around them is killed.

`python -m tests.mount.soak_reading MINUTES [SEED]` runs for as long as is wanted; the suite runs
half a minute of it. What must hold: no wrong byte, no reader that hangs, readers of a mount whose
daemon lives see no error, and in the end no process, no mount and no file of the cache is left.
"""

import contextlib
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from fragfs.library.add import AddOptions
from fragfs.library.library import FragmentLibrary
from fragfs.mount.launch import mount
from fragfs.mount.options import MountOptions
from fragfs.mount.table import find_mount
from fragfs.mount.unmount import detach, unmount
from tests.mount.support import is_alive, wait_until

HANG_S = 120.0
"""A reader of a few MiB that says nothing for so long hangs; machines of tests may be busy."""

READERS = 4
CACHE_BYTES = 12 << 20
"""Smaller than the models, so that fragments leave while they are read."""


def make_sources(directory, mebibytes=12):
    """Two models, one predicted from the other, and odd files."""
    import numpy as np

    from tests.models import safetensors_bytes

    chosen = np.random.default_rng(3)
    rows = mebibytes * 256
    base = (chosen.standard_normal((rows, 512)) * 0.02).astype("<f4")
    tuned = (base + chosen.standard_normal(base.shape) * 1e-4).astype("<f4")
    paths = []
    for name, values in (("base", base), ("tuned", tuned)):
        path = directory / name
        path.mkdir(parents=True)
        words = (values.view("<u4") >> 16).astype("<u2")
        cuts = [0, rows // 3 + 1, rows // 2, rows // 2 + 3, rows]
        tensors = {
            f"t{index}": ("BF16", (stop - start, 512), words[start:stop].tobytes())
            for index, (start, stop) in enumerate(itertools.pairwise(cuts))
        }
        (path / "model.safetensors").write_bytes(safetensors_bytes(tensors))
        (path / "odd.bin").write_bytes(chosen.bytes(1_234_567))
        (path / "small").write_bytes(name.encode())
        paths.append(path)
    return paths


def make_soak_library(directory):
    """(library, directory of the sources)."""
    sources = make_sources(directory / "sources")
    with FragmentLibrary.create(directory / "library") as library:
        for source in sources:
            library.add([source], AddOptions())
    return directory / "library", directory / "sources"


def read_status(mountpoint):
    """The counters of a mount."""
    return json.loads(os.getxattr(mountpoint, "user.fragfs.status"))


def helpers_of(mountpoint):
    """Process ids of a mount's decoders and pusher."""
    status = read_status(mountpoint)
    pusher = status["prefill"] and status["prefill"]["pid"]
    return status["helpers"], pusher


class _Reader:
    def __init__(self, mountpoint, sources, log, *, must_live):
        self.must_live = must_live
        self._log = log
        self.output = tempfile.TemporaryFile(dir=log)  # noqa: SIM115  # closed with the reader
        self.errors = tempfile.TemporaryFile(dir=log)  # noqa: SIM115
        mode = "any" if must_live else "any that may fail"
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.mount.readers", mode, mountpoint, sources, "100000"],
            stdout=self.output,
            stderr=self.errors,
            cwd=Path(__file__).parents[2],
        )
        self._said, self._at = 0, time.monotonic()

    def check(self):
        """Raise if it hangs or saw what it must not see; False if it has ended."""
        said = os.fstat(self.output.fileno()).st_size
        now = time.monotonic()
        if said != self._said:
            self._said, self._at = said, now
        status = self.process.poll()
        if status is None:
            if now - self._at > HANG_S:
                stack = Path(f"/proc/{self.process.pid}/wchan").read_text()
                raise AssertionError(f"reader {self.process.pid} hangs in {stack}")
            return True
        self.errors.seek(0)
        text = self.errors.read().decode(errors="replace")
        assert status != 3, text
        if self.must_live:
            raise AssertionError(f"a reader of a live mount ended with {status}: {text[-500:]}")
        assert status == -signal.SIGBUS or "OSError" in text or "Error" in text, (status, text)
        return False

    def kill(self):
        self.process.kill()
        started = time.monotonic()
        self.process.wait(HANG_S)
        self.output.close()
        self.errors.close()
        return time.monotonic() - started


class _Soak:
    def __init__(self, directory, seed):
        self._random = random.Random(seed)
        self._directory = directory
        self._library, self._sources = make_soak_library(directory)
        self.seen = set()
        self.counts = dict.fromkeys(("reader", "decoder", "pusher", "mount", "restarts"), 0)
        self._points = [directory / name for name in ("steady", "killed")]
        self._pids = [0, 0]
        self._cache = None
        for index, point in enumerate(self._points):
            point.mkdir()
            self._mount(index)
        self._readers = [self._start(index % 2) for index in range(READERS)]

    def _mount(self, index):
        point = self._points[index]
        report = mount(
            MountOptions(
                self._library,
                point,
                cache_bytes_max=CACHE_BYTES,
                log_file=self._directory / "log",
                grace_s=1.0,
            ),
            timeout_s=60,
        )
        self._pids[index] = report.pid
        status = read_status(point)
        self._cache = status["cache"] and status["cache"]["directory"]
        self._helpers(index)
        self.seen.add(report.pid)

    def _helpers(self, index):
        decoders, pusher = helpers_of(self._points[index])
        # What has ended is forgotten: in ten minutes its number may become another process's.
        self.seen = {pid for pid in self.seen if is_alive(pid)}
        self.seen |= {*decoders, *([pusher] if pusher else [])}
        return decoders + ([pusher] if pusher else [])

    def _start(self, index):
        return _Reader(self._points[index], self._sources, self._directory, must_live=index == 0)

    def run(self, seconds):
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            time.sleep(self._random.uniform(0.1, 1.2))
            getattr(
                self, "_kill_" + self._random.choice(("reader", "decoder", "pusher", "mount"))
            )()
            for index, reader in enumerate(self._readers):
                if not reader.check():
                    reader.kill()
                    self._readers[index] = self._start(index % 2)
                    self.counts["restarts"] += 1

    def _kill_reader(self):
        index = self._random.randrange(READERS)
        self._readers[index].check()
        self._readers[index].kill()
        self._readers[index] = self._start(index % 2)
        self.counts["reader"] += 1

    def _kill_decoder(self):
        decoders, _ = helpers_of(self._points[0])
        for pid in decoders[: self._random.randint(1, 2)]:
            os.kill(pid, signal.SIGKILL)
        self.counts["decoder"] += 1

    def _kill_pusher(self):
        _, pusher = helpers_of(self._points[self._random.randrange(2)])
        if pusher and is_alive(pusher):
            os.kill(pusher, signal.SIGKILL)
            self.counts["pusher"] += 1

    def _kill_mount(self):
        helpers = self._helpers(1)
        _, pusher = helpers_of(self._points[1])
        together = [pusher, self._pids[1]] if pusher and is_alive(pusher) else [self._pids[1]]
        # Both, in either order, or the daemon alone.
        for pid in self._random.choice((together, together[::-1], together[-1:])):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not any(is_alive(pid) for pid in (self._pids[1], *helpers)), 20)
        self._mount(1)
        self.counts["mount"] += 1

    def end(self):
        """Take everything down; what is left is a failure."""
        for index in range(2):
            self._helpers(index)
        for reader in self._readers:
            reader.check()
            took = reader.kill()
            assert took < 20, "a killed reader took long to end: it waited for the mount"
        for point in self._points:
            unmount(point)
            assert find_mount(point) is None
        wait_until(lambda: not any(map(is_alive, self.seen)), 20)
        assert self._cache is not None
        assert not os.path.exists(self._cache), os.listdir(self._cache)

    def abandon(self):
        for reader in self._readers:
            reader.process.kill()
        for pid in self.seen:
            if is_alive(pid):
                os.kill(pid, signal.SIGKILL)
        for point in self._points:
            while (entry := find_mount(point)) is not None:
                detach(entry)


def soak(directory, seconds, seed=0):
    """Run for some seconds; returns how often what was killed.

    Raises:
        AssertionError: Something did not hold.
    """
    running = _Soak(directory, seed)
    try:
        running.run(seconds)
        running.end()
    except BaseException:
        running.abandon()
        raise
    return running.counts


def main(minutes, seed="0"):
    with tempfile.TemporaryDirectory(prefix="soak") as directory:
        counts = soak(Path(directory).resolve(), float(minutes) * 60, int(seed))
        print(f"{minutes} min, seed {seed}: all right; killed {counts}")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
