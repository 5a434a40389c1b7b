"""One soak: everything at once, then everything quiet, then the count."""

from __future__ import annotations

import json
import os
import queue
import random
import statistics
import subprocess
import sys
import threading
import time
import traceback
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

from fragfs.cli.main import COMMANDS
from tools.soak import processes
from tools.soak.changes import Changer, parse_sums
from tools.soak.keeping import Keeper, library_bytes
from tools.soak.mounting import Mount, Readers
from tools.soak.runner import Child, Runner, SoakError
from tools.soak.shelf import Shelf
from tools.soak.sources import SourceMaker, Version

__all__ = ["Soak"]

_CHANGERS = 3
_STEADY_READERS = 2
_SAMPLE_S = 1.0
_CACHE_BYTES = "12M"
"""Smaller than the models, so that fragments leave while they are read."""

_DAEMON_BYTES_MAX = 1 << 30
_DAEMON_DESCRIPTORS_MAX = 2000
_DAEMON_GROWTH_MAX = 1.5
_DAEMON_SPARE_BYTES = 64 << 20
_DAEMON_SPARE_DESCRIPTORS = 1100
"""A daemon holds 64 MiB of fragments as open files, here of 64 KiB each, and up to 128 packs."""

_AFRESH_FACTOR_MAX = 1.05
_AFRESH_SPARE_BYTES = 2 << 20
"""A library that went through all this, compared with one built of the same models: packs are left
alone that have little to give back, and other bases were there when models came."""

_LEFTOVERS_S = 30.0

_CREATE = """
import sys
from fragfs.library.library import FragmentLibrary
from fragfs.types import LibraryConfig
FragmentLibrary.create(
    sys.argv[1], LibraryConfig(fragment_elements=1 << 15, pack_bytes_max=4 << 20)
).close()
"""
"""Small packs, so that many are sealed, compacted and removed."""


class Soak:
    """Everything of one soak.

    Args:
        directory: An empty directory for all that it makes.
        seed: Chooses what happens; when it happens, the machine chooses as well.
    """

    def __init__(self, directory: Path, seed: int) -> None:
        self._directory = directory
        self._seed = seed
        self._mark = os.fspath(directory)
        self._library = directory / "library"
        self._mounts = directory / "mounts"
        self._mounts.mkdir()
        self.runner = Runner(directory, self._library, self._mark)
        self._shelf = Shelf()
        self._readers = Readers(self.runner)
        self._maker = SourceMaker(directory / "sources", seed)
        self._held: queue.Queue[tuple[Child, str, list[Version]]] = queue.Queue()
        self._samples: dict[str, list[tuple[int, int]]] = defaultdict(list)
        self._caches: set[str] = set()
        self._steady: Mount | None = None
        self._threads: list[threading.Thread] = []
        self.sizes: dict[str, int] = {}

    # --- the busy part

    def run(self, seconds: float) -> None:
        """Be busy for so long, then check that everything is as it must be.

        What does not hold is in `runner.failures`.
        """
        self._guarded(self._begin)()
        if not self.runner.failures:
            self._be_busy(seconds)
        if not self.runner.failures:
            self._guarded(self._finish)()

    def _begin(self) -> None:
        subprocess.run(
            [sys.executable, "-c", _CREATE, self._library], check=True, env=self.runner.environment
        )
        point = self._mounts / "steady"
        point.mkdir()
        self._steady = Mount(self.runner, point, ["--cache", _CACHE_BYTES])
        self._remember_cache(self._steady)

    def _be_busy(self, seconds: float) -> None:
        steady = self._steady
        assert steady is not None
        for number in range(_CHANGERS):
            changer = Changer(
                self.runner,
                self._shelf,
                self._maker,
                self._readers,
                steady,
                self._random(f"changer {number}"),
                lambda child, mode, versions: self._hold(child, mode, versions),
            )
            self._start(f"changer {number}", changer.run)
        for name in ("reorganizing", "reading"):
            keeper = Keeper(
                self.runner,
                self._shelf,
                self._directory,
                steady.point,
                self._random(f"keeper {name}"),
            )
            self._start(f"keeper {name}", getattr(keeper, f"run_{name}"))
        for number in range(_STEADY_READERS):
            self._start(f"reader {number}", self._read_steadily, self._random(f"reader {number}"))
        self._start("held", self._finish_held)
        self._start("guests", self._mount_and_unmount, self._random("guests"))
        self._start("killer", self._disturb_helpers, self._random("killer"))
        self._start("sampler", self._sample)
        try:
            self.runner.stopping.wait(seconds)
        except BaseException:
            self.runner.stopping.set()
            while any(thread.is_alive() for thread in self._threads):
                self.runner.kill_children()
                time.sleep(0.1)
            raise
        self.runner.stopping.set()
        for thread in self._threads:
            thread.join()

    def _hold(self, child: Child, mode: str, versions: list[Version]) -> None:
        for version in versions:
            self._shelf.keep(version)
        self._held.put((child, mode, versions))

    def _random(self, name: str) -> random.Random:
        return random.Random(f"{self._seed} {name}")

    def _start(self, name: str, work: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=self._guarded(work), args=arguments, name=name)
        self._threads.append(thread)
        thread.start()

    def _guarded(self, work: Callable[..., None]) -> Callable[..., None]:
        """The work, with errors noted as failures of the soak."""

        def run(*arguments: object) -> None:
            try:
                work(*arguments)
            except SoakError as error:
                self.runner.fail(str(error))
            except Exception:
                self.runner.fail(traceback.format_exc())

        return run

    def _read_steadily(self, chosen: random.Random) -> None:
        """Read models through the mount that lives all the time."""
        steady = self._steady
        assert steady is not None
        while not self.runner.stopping.is_set():
            with self._shelf.shared(chosen) as shared:
                if shared is None:
                    time.sleep(0.2)
                    continue
                name, version = shared
                seconds = chosen.random() * 4
                child = self._readers.start("plain", steady, name, [version], chosen, seconds)
                self._readers.finish(child, steady, "plain")

    def _finish_held(self) -> None:
        """Wait for those who read on what was changed or removed."""
        steady = self._steady
        assert steady is not None
        changers = [thread for thread in self._threads if thread.name.startswith("changer")]
        while True:
            try:
                child, mode, versions = self._held.get(timeout=0.2)
            except queue.Empty:
                if not any(thread.is_alive() for thread in changers):
                    return
                continue
            self._readers.finish(child, steady, mode)
            for version in versions:
                self._shelf.drop(version)

    def _mount_and_unmount(self, chosen: random.Random) -> None:
        """Mounts that come and go, with readers."""
        number = 0
        while not self.runner.stopping.is_set():
            number += 1
            point = self._mounts / f"guest{number}"
            point.mkdir()
            self._be_guest(point, chosen)
            if chosen.random() < 0.3:
                self._be_guest(point, chosen)  # after whatever end the one before had
            point.rmdir()
            point.with_suffix(".log").unlink(missing_ok=True)

    def _be_guest(self, point: Path, chosen: random.Random) -> None:
        options = chosen.choice(
            (
                ["--cache", _CACHE_BYTES],
                ["--cache", "0"],
                ["--no-prefill", "--cache", _CACHE_BYTES],
                ["--cache", "4M", "--cache-dir", os.fspath(self._directory / "cache")],
            )
        )
        mount = Mount(self.runner, point, [*options, "--grace", "1"])
        self._remember_cache(mount)
        end = chosen.choice(("umount", "force", "lazy", "SIGTERM", "SIGKILL", "SIGKILL"))
        is_cut_off = end in ("force", "SIGTERM", "SIGKILL")
        # Who looks only after the end finds an empty directory, and need not look for long.
        seconds, patience_s = (30.0, 5.0) if is_cut_off else (2.0, 120.0)
        readers = []
        with self._shelf.shared(chosen) as one, self._shelf.shared(chosen) as other:
            for shared in (one, other):
                if shared is not None:
                    name, version = shared
                    versions = [version]
                    readers.append(
                        self._readers.start(
                            "plain", mount, name, versions, chosen, seconds, patience_s
                        )
                    )
            time.sleep(chosen.random() * 5)
            if not is_cut_off:
                if chosen.random() < 0.5:
                    mount.disturb_helpers(chosen)
                for reader in readers:
                    self._readers.finish(reader, mount, "plain")
                mount.unmount(*(["--lazy"] if end == "lazy" else []))
                mount.check_log()
                return
            # Their end first: what cuts readers off is what is to be seen.
            if end == "force":
                mount.unmount("--force")
            elif end == "SIGTERM":
                mount.terminate(chosen)
            else:
                mount.kill(chosen)
            for reader in readers:
                self._readers.finish(reader, mount, "plain", must_live=False)
        if end == "SIGKILL" and point in processes.mounts_below(self._mounts):
            self.runner.run("umount", "umount", point)

    def _remember_cache(self, mount: Mount) -> None:
        # One on disk stays for the next mount.
        if mount.cache is not None and not mount.cache.startswith(self._mark):
            self._caches.add(mount.cache)

    def _disturb_helpers(self, chosen: random.Random) -> None:
        """Kill and stop the helpers of the steady mount; its readers must not notice."""
        steady = self._steady
        assert steady is not None
        while not self.runner.stopping.wait(0.5 + chosen.random() * 3):
            steady.disturb_helpers(chosen)

    def _sample(self) -> None:
        """Watch what the steady mount's processes take."""
        steady = self._steady
        assert steady is not None
        while not self.runner.stopping.wait(_SAMPLE_S):
            if not steady.is_alive:
                raise SoakError(f"the steady mount has died:\n{steady.log_text()}")
            pids = {"daemon": [steady.pid], **steady.helpers()}
            for kind, members in pids.items():
                for pid in members:
                    memory, files = (
                        processes.anonymous_bytes(pid),
                        processes.descriptor_count(pid),
                    )
                    self._samples[kind].append((memory, files))
                    if memory > _DAEMON_BYTES_MAX or files > _DAEMON_DESCRIPTORS_MAX:
                        raise SoakError(f"{kind} {pid} takes {memory:,} bytes and {files} files")

    def peaks(self) -> dict[str, tuple[int, int]]:
        """The most memory and descriptors that a process of each kind had."""
        return {
            kind: (max(memory for memory, _ in taken), max(files for _, files in taken))
            for kind, taken in self._samples.items()
        }

    # --- the quiet part

    def _finish(self) -> None:
        steady = self._steady
        assert steady is not None
        self._check_growth()
        run = self.runner.run
        self._compare_list()
        if "gc" in COMMANDS:
            run("gc", "gc", "--grace", "0")  # with a mount that nobody reads through
        steady.unmount()
        steady.check_log()
        self._check_no_processes()
        if "check" in COMMANDS:
            run("check", "check")
            run("check --data", "check", "--data")
        self._verify_models()
        run("optimize", "optimize")
        if "gc" in COMMANDS:
            run("gc", "gc", "--grace", "0")
        self._verify_models()
        self._compare_sizes()
        if "check" in COMMANDS:
            self._rebuild()
        self._check_nothing_left()

    def _check_growth(self) -> None:
        """Memory and descriptors at the end are about those of before."""
        taken = self._samples["daemon"]
        if len(taken) < 100:
            return
        fifth = len(taken) // 5
        for index, (what, spare) in enumerate(
            (("bytes", _DAEMON_SPARE_BYTES), ("descriptors", _DAEMON_SPARE_DESCRIPTORS))
        ):
            early = statistics.median(sample[index] for sample in taken[fifth : 2 * fifth])
            late = statistics.median(sample[index] for sample in taken[-fifth:])
            if late > early * _DAEMON_GROWTH_MAX + spare:
                raise SoakError(f"the steady mount has grown from {early:,} to {late:,} {what}")

    def _compare_list(self) -> None:
        told = json.loads(self.runner.run("ls", "ls", "--json").output)
        names = {model["name"] for model in told["models"]}
        if names != self._shelf.models().keys():
            difference = names ^ self._shelf.models().keys()
            raise SoakError(f"the library lists other models than it must: {difference}")

    def _verify_models(self) -> None:
        """Decode everything, and compare it with the oracle."""
        wanted = {
            os.fsencode(name) + b"/" + path: digest
            for name, version in self._shelf.models().items()
            for path, digest in version.sums.items()
        }
        found = parse_sums(self.runner.run("verify all", "verify", "--sha256sum").output)
        if found != wanted:
            difference = set(found.items()) ^ set(wanted.items())
            raise SoakError(f"the library holds what it must not, or lacks: {difference}")

    def _compare_sizes(self) -> None:
        """Compare with a library that is built of the same models and nothing else."""
        afresh = self._directory / "afresh"
        environment = self.runner.environment
        subprocess.run([sys.executable, "-c", _CREATE, afresh], check=True, env=environment)
        for name, version in self._shelf.models().items():
            self.runner.run(
                "add afresh", "--library", afresh, "add", version.directory, "--name", name
            )
        self.runner.run("optimize", "--library", afresh, "optimize")
        self.sizes = {
            "sources": self._shelf.size,
            "library": library_bytes(self._library / "packs"),
            "built afresh": library_bytes(afresh / "packs"),
        }
        allowed = _AFRESH_FACTOR_MAX * self.sizes["built afresh"] + _AFRESH_SPARE_BYTES
        if self.sizes["library"] > allowed:
            raise SoakError(f"the library is larger than it need be: {self.sizes}")

    def _rebuild(self) -> None:
        """A catalog made of the packs alone says the same."""
        self.runner.run("check --rebuild", "check", "--rebuild")
        self._compare_list()
        self._verify_models()

    def _check_no_processes(self) -> None:
        left = processes.wait_for_end(processes.marked(self._mark), _LEFTOVERS_S)
        if left:
            text = "\n".join(processes.describe(pid) for pid in left)
            raise SoakError(f"processes are left:\n{text}")

    def _check_nothing_left(self) -> None:
        self._check_no_processes()
        if mounts := processes.mounts_below(self._directory):
            raise SoakError(f"mounts are left: {mounts}")
        staged = sorted(path.name for path in (self._library / "staging").iterdir())
        if staged not in ([], ["batch.intent"]):
            raise SoakError(f"the library's staging directory holds {staged}")
        leases = sorted(path.name for path in (self._library / "leases").iterdir())
        if len(leases) > 1:
            raise SoakError(f"leases are left: {leases}")
        if caches := [cache for cache in self._caches if os.path.exists(cache)]:
            raise SoakError(f"caches are left: {caches}")

    # --- the end

    def close(self) -> None:
        """Take down whatever is left: processes, then mounts."""
        self.runner.stopping.set()
        self.runner.kill_children()
        # Again and again: what was being started when its parent was killed comes up later.
        deadline = time.monotonic() + _LEFTOVERS_S
        while time.monotonic() < deadline:
            pids = processes.marked(self._mark)
            for pid in pids:
                processes.kill(pid)
            points = processes.mounts_below(self._directory)
            for point in points:
                subprocess.run(["fusermount3", "-u", "-z", point], check=False)
            if not pids and not points:
                break
            time.sleep(0.1)
        self.runner.close()
