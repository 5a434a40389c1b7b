"""Any order of changes, collections, crashes and reads, by several at one library.

The oracle is a dictionary of bytes. After every step the library shows what the dictionary says,
through whichever door is asked; in the end every byte is decoded and compared.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from fragfs.library.add import AddOptions
from fragfs.library.files import OsFiles
from fragfs.library.library import FragmentLibrary
from fragfs.types import Level, LibraryConfig
from tests.models import safetensors_bytes

CONFIG = LibraryConfig(fragment_elements=1 << 12, pack_bytes_max=1 << 20)
DOORS = 3
READERS_MAX = 4
MODELS_MAX = 7
CHILDREN_MAX = 2
"""Of one example: they take most of the time."""

NAMES = ("a", "b", "org/c", "org/d", "org/deep/e", "ünï")
PATHS = ("w.safetensors", "other.safetensors", "sub/w.safetensors", "text", "sub/deep/text")

SHARED_MEMORY = "/dev/shm"
HAS_ROOM = os.path.isdir(SHARED_MEMORY) and shutil.disk_usage(SHARED_MEMORY).free > 60_000_000
PLACE = SHARED_MEMORY if HAS_ROOM else None
"""In memory if there is room: thousands of fsyncs take long on some disks."""

Files = dict[str, bytes]


class PowerCut(BaseException):
    """Not an Exception: nothing in the product may take it for an error to handle."""


class MortalFiles(OsFiles):
    """Real files until so many changes of the disk were made; then nothing gets there any more."""

    def __init__(self, changes: int) -> None:
        self._left = changes

    def _step(self) -> None:
        if self._left <= 0:
            raise PowerCut
        self._left -= 1

    def create(self, path):
        self._step()
        return super().create(path)

    def append(self, descriptor, buffers):
        self._step()
        super().append(descriptor, buffers)

    def sync(self, descriptor):
        self._step()
        super().sync(descriptor)

    def sync_directory(self, path):
        self._step()
        super().sync_directory(path)

    def rename(self, old, new):
        self._step()
        super().rename(old, new)

    def unlink(self, path):
        self._step()
        super().unlink(path)


@cache
def content(kind: str, seed: int) -> bytes:
    """The bytes of a file; equal arguments give equal bytes, and many are predicted from others."""
    if kind == "empty":
        return b""
    if kind == "text":
        return b"line %d\n" % seed * 3000
    if kind == "noise":
        return random.Random(seed).randbytes(70_000 + seed)
    base = (np.random.default_rng(seed % 2).standard_normal((40, 256)) * 0.02).astype(np.float32)
    if kind != "base":
        noise = np.random.default_rng(seed).standard_normal(base.shape).astype(np.float32)
        base = base + noise * np.float32(1e-4)
    if kind == "half":
        words = (base.view("<u4") >> 16).astype("<u2")
        return safetensors_bytes({"t": ("BF16", base.shape, words.tobytes())})
    return safetensors_bytes({"t": ("F32", base.shape, base.astype("<f4").tobytes())})


contents = st.builds(
    content,
    st.sampled_from(("base", "tuned", "half", "noise", "text", "empty")),
    st.integers(0, 5),
)
sources = st.dictionaries(st.sampled_from(PATHS), contents, min_size=1, max_size=4)
crashes = st.one_of(st.none(), st.none(), st.integers(0, 25))
"""After how many changes of the disk the power goes; None: it stays."""


def sums(models: dict[str, Files]) -> dict[str, dict[str, str]]:
    return {
        name: {path: hashlib.sha256(data).hexdigest() for path, data in files.items()}
        for name, files in models.items()
    }


class LibraryMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp(prefix="fragfs-stateful-", dir=PLACE))
        self.path = self.directory / "lib"
        FragmentLibrary.create(self.path, CONFIG).close()
        self.doors = [FragmentLibrary.open(self.path) for _ in range(DOORS)]
        self.turn = 0
        self.models: dict[str, Files] = {}
        self.readers: list[tuple[object, bytes]] = []
        self.children = 0
        self.source_count = 0

    def teardown(self) -> None:
        try:
            for stream, expected in self.readers:
                stream.seek(0)
                assert stream.read() == expected
                stream.close()
            self.door.collect(grace_s=0, wait_s=0)
            for door in self.doors:
                assert self.decoded(door) == sums(self.models)
            assert self.door.check(data=True, workers=1).problems == ()
        finally:
            for door in self.doors:
                door.close()
            shutil.rmtree(self.directory)

    # --- helpers

    @property
    def door(self) -> FragmentLibrary:
        """Another one each time."""
        self.turn += 1
        return self.doors[self.turn % DOORS]

    def decoded(self, door, name=None):
        found: dict[str, dict[str, str]] = {}
        for item in door.verify(name, workers=1):
            assert item.error is None, item.error
            found.setdefault(os.fsdecode(item.model), {})[os.fsdecode(item.path)] = (
                item.sha256.hex()
            )
        return found

    def listed(self, door):
        return {
            os.fsdecode(model.name): {
                os.fsdecode(entry.path): entry.sha256.hex() for entry in door.files(model.name)
            }
            for model in door.models()
        }

    def write(self, files: Files) -> Path:
        self.source_count += 1
        root = self.directory / f"source{self.source_count}"
        for path, data in files.items():
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_bytes(data)
        return root

    def change(self, action, after: dict[str, Files], crash: int | None) -> None:
        """Run a change, or start it and let the power go; what comes of it is all or nothing."""
        if crash is None:
            action(self.door)
            self.models = after
            return
        with FragmentLibrary.open(self.path, files=MortalFiles(crash)) as mortal:
            try:
                action(mortal)
            except PowerCut:
                self.settle(after)
            else:
                self.models = after

    def settle(self, after: dict[str, Files]) -> None:
        found = self.listed(self.door)
        assert found in (sums(self.models), sums(after))
        if found == sums(after):
            self.models = after

    def choose(self, data, count=1):
        return data.draw(st.sampled_from(sorted(self.models)))

    # --- changes

    @initialize(files=sources)
    def begin(self, files):
        root = self.write(files)
        self.change(lambda door: door.add([root], AddOptions(name=b"a")), {"a": files}, None)

    @precondition(lambda self: len(self.models) < MODELS_MAX)
    @rule(name=st.sampled_from(NAMES), files=sources, crash=crashes)
    def add(self, name, files, crash):
        if name in self.models:
            return
        options = AddOptions(name=os.fsencode(name), workers=2)
        root = self.write(files)
        self.change(lambda door: door.add([root], options), self.models | {name: files}, crash)

    @precondition(lambda self: self.models)
    @rule(data=st.data(), files=sources, checksum=st.booleans(), crash=crashes)
    def update(self, data, files, checksum, crash):
        name = self.choose(data)
        options = AddOptions(name=os.fsencode(name), update=True, checksum=checksum, workers=1)
        root = self.write(files)
        self.change(lambda door: door.add([root], options), self.models | {name: files}, crash)

    @precondition(lambda self: self.models)
    @rule(data=st.data(), added=contents, number=st.integers(0, 3), crash=crashes)
    def add_into(self, data, added, number, crash):
        name = self.choose(data)
        folder = f"into{number}"
        if f"{folder}/file" in self.models[name]:
            return
        options = AddOptions(into=os.fsencode(f"{name}/{folder}"), workers=1)
        path = self.write({"file": added}) / "file"
        after = self.models | {name: self.models[name] | {f"{folder}/file": added}}
        self.change(lambda door: door.add([path], options), after, crash)

    @precondition(lambda self: len(self.models) > 1)
    @rule(data=st.data(), crash=crashes)
    def remove(self, data, crash):
        name = self.choose(data)
        after = {other: files for other, files in self.models.items() if other != name}
        self.change(lambda door: door.remove(name), after, crash)

    @precondition(lambda self: self.models)
    @rule(data=st.data(), crash=crashes)
    def remove_file(self, data, crash):
        name = self.choose(data)
        files = self.models[name]
        path = data.draw(st.sampled_from(sorted(files)))
        if len(files) == 1:
            return
        after = self.models | {name: {p: d for p, d in files.items() if p != path}}
        self.change(lambda door: door.remove(name, [os.fsencode(path)]), after, crash)

    @precondition(lambda self: self.models)
    @rule(data=st.data(), new=st.sampled_from(NAMES), crash=crashes)
    def move(self, data, new, crash):
        old = self.choose(data)
        if new in self.models:
            return
        after = {new if name == old else name: files for name, files in self.models.items()}
        self.change(lambda door: door.move(old, new), after, crash)

    @rule(level=st.sampled_from([None, *Level]), crash=crashes)
    def optimize(self, level, crash):
        self.change(lambda door: door.optimize(level, workers=1), self.models, crash)

    @rule(crash=crashes, grace_s=st.sampled_from([0, None]))
    def collect(self, crash, grace_s):
        self.change(lambda door: door.collect(grace_s=grace_s, wait_s=0), self.models, crash)

    @rule(repair=st.booleans())
    def check(self, repair):
        assert self.door.check(repair=repair, workers=1).problems == ()

    # --- other processes

    @precondition(lambda self: self.children < CHILDREN_MAX)
    @rule(
        data=st.data(),
        files=sources,
        action=st.sampled_from(["add", "rm", "optimize", "gc"]),
        kill_after_s=st.one_of(st.none(), st.floats(0.1, 0.9)),
    )
    def change_in_another_process(self, data, files, action, kill_after_s):
        self.children += 1
        after = dict(self.models)
        arguments = [action]
        if action == "add":
            name = f"child{self.children}"
            after[name] = files
            arguments += [os.fspath(self.write(files)), "--name", name]
        elif action == "rm" and len(self.models) > 1:
            name = self.choose(data)
            del after[name]
            arguments += [name]
        elif action == "rm":
            return
        elif action == "gc":
            arguments += ["--grace", "0"]
        process = subprocess.Popen(
            [sys.executable, "-m", "fragfs", "--library", self.path, *arguments],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        if kill_after_s is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(kill_after_s)
            process.kill()
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0 or kill_after_s is not None, errors.decode()
        self.settle(after)
        assert process.returncode != 0 or self.models == after

    @rule(number=st.integers(0, DOORS - 1))
    def reopen(self, number):
        self.doors[number].close()
        self.doors[number] = FragmentLibrary.open(self.path)

    # --- readers

    @precondition(lambda self: self.models and len(self.readers) < READERS_MAX)
    @rule(data=st.data())
    def open_reader(self, data):
        name = self.choose(data)
        path = data.draw(st.sampled_from(sorted(self.models[name])))
        # Of a door of its own: the others are closed and opened again.
        door = FragmentLibrary.open(self.path)
        stream = door.open_file(name, path)
        expected = self.models[name][path]
        assert stream.read(100) == expected[:100]
        self.readers.append((stream, expected))

    @precondition(lambda self: self.readers)
    @rule(data=st.data())
    def read_on(self, data):
        stream, expected = data.draw(st.sampled_from(self.readers))
        at = data.draw(st.integers(0, len(expected)))
        stream.seek(at)
        assert stream.read(20_000) == expected[at : at + 20_000]

    @precondition(lambda self: self.readers)
    @rule(data=st.data())
    def close_reader(self, data):
        index = data.draw(st.integers(0, len(self.readers) - 1))
        stream, expected = self.readers.pop(index)
        stream.seek(0)
        assert stream.read() == expected
        stream.close()

    @precondition(lambda self: self.models)
    @rule(data=st.data())
    def verify(self, data):
        name = self.choose(data)
        assert self.decoded(self.door, name)[name] == sums(self.models)[name]

    @invariant()
    def shows_what_it_must(self):
        assert self.listed(self.door) == sums(self.models)


LibraryMachine.TestCase.settings = settings(
    max_examples=25,
    stateful_step_count=30,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)

TestLibraryMachine = pytest.mark.slow(LibraryMachine.TestCase)
