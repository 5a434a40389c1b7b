"""A small library with records of every kind, for damage: what it holds, and copies of it."""

from __future__ import annotations

import itertools
import shutil
from bisect import bisect_left
from pathlib import Path

import numpy as np

from fragfs.library.add import AddOptions
from fragfs.library.library import FragmentLibrary
from fragfs.types import LibraryConfig
from tests.models import safetensors_bytes

CONFIG = LibraryConfig(fragment_elements=1 << 12, pack_bytes_max=1 << 20)
ELEMENTS = 34_000
"""Enough that a bf16 copy is cut into fragments: files of up to 64 KiB are one."""


class Template:
    """A small library with a record of every kind, what it holds, and copies of it to spoil.

    Attributes:
        path: The library, closed: its catalog is one file.
        hot: The same while it is open, with changes in the write-ahead log.
        older: Its files before the last few changes.
        expected: Bytes by (model, path).
        records: Places (pack, start, end) of the records that each of these needs.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.path, self.hot, self.older = root / "lib", root / "hot", root / "older"
        self.expected: dict[tuple[bytes, bytes], bytes] = {}
        self._count = itertools.count()
        self._build()
        with FragmentLibrary.open(self.path) as library:
            self.records = {key: self._needed(library, key) for key in self.expected}

    def _build(self) -> None:
        rng = np.random.default_rng(11)
        base = rng.standard_normal(ELEMENTS).astype("<f4") * np.float32(0.02)
        tuned = base + rng.standard_normal(ELEMENTS).astype("<f4") * np.float32(1e-4)
        other = base + rng.standard_normal(ELEMENTS).astype("<f4") * np.float32(1e-4)
        few = base.copy()
        few[[5, 5000]] += 1
        merged = (tuned + other) / 2
        copy = (base.view("<u4") + 0x8000 >> 16).astype("<u2")
        with FragmentLibrary.create(self.path, CONFIG) as library:
            self._add(library, "gone", {"junk": rng.bytes(200_000)})
            self._add(library, "org/base", {"m.safetensors": _weights(base), "config.json": b"{}"})
            self._add(library, "org/copy", {"m.safetensors": _weights(copy, "BF16")})
            self._add(library, "org/tuned", {"m.safetensors": _weights(tuned)})
            self._add(library, "org/other", {"m.safetensors": _weights(other)})
            self._add(library, "few", {"m.safetensors": _weights(few), "empty": b""})
            self._add(library, "merge", {"m.safetensors": _weights(merged)})
            text = b"words and words\n" * 5000
            self._add(library, "plain", {"sub/dir/zeros": bytes(70_000), "text": text})
            library.remove("gone")
            del self.expected[b"gone", b"junk"]
            library.optimize(workers=1)
        shutil.copytree(self.path, self.older)
        with FragmentLibrary.open(self.path) as library:
            self._add(library, "big", {"random": rng.bytes(700_000)})
            self._add(
                library, "later", {"note": b"later", "one": rng.bytes(3000), "two": rng.bytes(3000)}
            )
            (self.path / "staging" / "batch.intent").write_bytes(bytes(range(16)))
        with FragmentLibrary.open(self.path) as library:
            self._add(library, "newest", {"note": b"newest"})
            (self.path / "staging" / "batch.intent").write_bytes(bytes(range(16)))
            shutil.copytree(self.path, self.hot)

    def _add(self, library: FragmentLibrary, name: str, files: dict[str, bytes]) -> None:
        source = self.root / "sources" / name
        for path, data in files.items():
            (source / path).parent.mkdir(parents=True, exist_ok=True)
            (source / path).write_bytes(data)
            self.expected[name.encode(), path.encode()] = data
        library.add([source], AddOptions(name=name.encode()))

    def _needed(
        self, library: FragmentLibrary, key: tuple[bytes, bytes]
    ) -> set[tuple[int, int, int]]:
        node = library.lookup(b"/".join(key))
        waiting = list(library.open_content(node.content).extents.fragments)
        seen: set[int] = set()
        while waiting:
            number = waiting.pop()
            if number not in seen:
                seen.add(number)
                waiting += library.bases(number)
        places = [library.fragment(number) for number in seen]
        return {(place.pack, place.offset, place.offset + place.record_size) for place in places}

    def copy(self, hot: bool = False) -> Path:
        """A fresh copy to spoil."""
        path = self.root / f"copy{next(self._count)}"
        shutil.copytree(self.hot if hot else self.path, path)
        return path

    def touched(self, library: Path) -> set[tuple[bytes, bytes]]:
        """The files that need a byte of a pack that differs from the template's."""
        found = set()
        for path in (self.path / "packs").iterdir():
            pack, spoilt = int(path.stem), library / "packs" / path.name
            differing = _differing(
                path.read_bytes(), spoilt.read_bytes() if spoilt.is_file() else b""
            )
            if differing and differing[0] < 64:
                differing = range(1 << 40)  # without its header a pack is none
            for key, records in self.records.items():
                for number, start, end in records:
                    at = bisect_left(differing, start)
                    if number == pack and at < len(differing) and differing[at] < end:
                        found.add(key)
        return found


def _weights(values: np.ndarray, dtype: str = "F32") -> bytes:
    return safetensors_bytes({"layer.weight": (dtype, values.shape, values.tobytes())})


def _differing(one: bytes, other: bytes) -> list[int] | range:
    size = min(len(one), len(other))
    found = np.flatnonzero(
        np.frombuffer(one, np.uint8, size) != np.frombuffer(other, np.uint8, size)
    ).tolist()
    return (
        found
        + list(range(size, max(len(one), len(other)))[:1])
        + ([] if len(one) == len(other) else list(range(size, len(one), 32)))
    )
