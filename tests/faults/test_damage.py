"""Damage to a library, at every file, record, field, page and cell: the matrix of `damages.py`.

Each damage is done to a copy. Then every file is read: each comes out right, or is an error that
says where and what to do, and files whose records were not touched come out right. Reading changes
nothing. What was damaged is found: by a reader, or by `fragfs check`.
"""

from __future__ import annotations

import itertools
import shutil
from bisect import bisect_left
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from fragfs.errors import FragmentError, NotFoundError
from fragfs.library.add import AddOptions
from fragfs.library.library import FragmentLibrary
from fragfs.types import LibraryConfig
from tests.faults.damages import (
    CATALOG,
    Damage,
    cell_damages,
    file_damages,
    pack_damages,
    page_damages,
)
from tests.models import safetensors_bytes

CONFIG = LibraryConfig(fragment_elements=1 << 12, pack_bytes_max=1 << 20)
AREAS = ("file", "pack", "page", "cell")
ELEMENTS = 10_000


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
        with FragmentLibrary.create(self.path, CONFIG) as library:
            self._add(library, "gone", {"junk": rng.bytes(200_000)})
            self._add(library, "org/base", {"m.safetensors": _weights(base), "config.json": b"{}"})
            self._add(library, "org/tuned", {"m.safetensors": _weights(tuned)})
        shutil.copytree(self.path, self.older)
        with FragmentLibrary.open(self.path) as library:
            self._add(library, "org/other", {"m.safetensors": _weights(other)})
            self._add(library, "few", {"m.safetensors": _weights(few), "empty": b""})
            self._add(library, "merge", {"m.safetensors": _weights(merged)})
            constant = {"zeros": bytes(100_000), "text": b"words and words\n" * 9000}
            self._add(library, "plain", {"sub/dir/zeros": constant["zeros"], "t": constant["text"]})
            library.remove("gone")
            del self.expected[b"gone", b"junk"]
            self._add(library, "big", {"random": rng.bytes(1_100_000)})
            library.optimize(workers=1)
            self._add(library, "later", {"note": b"later", "more": rng.bytes(3000)})
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


def _weights(values: np.ndarray) -> bytes:
    return safetensors_bytes({"layer.weight": ("F32", values.shape, values.tobytes())})


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


@pytest.fixture(scope="module")
def template(tmp_path_factory) -> Template:
    return Template(tmp_path_factory.mktemp("damage"))


def damages_of(area: str, template: Template) -> list[Damage]:
    return list(
        {
            "file": lambda: file_damages(template.hot, template.older),
            "pack": lambda: pack_damages(template.path),
            "page": lambda: page_damages(template.path),
            "cell": lambda: cell_damages(template.path),
        }[area]()
    )


def read_all(path: Path, expected: dict[tuple[bytes, bytes], bytes]) -> dict:
    """What comes of reading every file: the errors, by (model, path). Wrong bytes fail here."""
    errors: dict[tuple[bytes, bytes], FragmentError] = {}
    try:
        library = FragmentLibrary.open(path)
    except FragmentError as error:
        return dict.fromkeys(expected, error)
    with library:
        for (model, name), data in expected.items():
            try:
                with library.open_file(model, name) as stream:
                    found = stream.read()
            except FragmentError as error:
                errors[model, name] = error
            else:
                assert found == data, f"{model!r}/{name!r} was served with other bytes"
    return errors


def snapshot(path: Path) -> dict[str, bytes | None]:
    """The files of a library, the catalog and its companions left out."""
    return {
        str(file.relative_to(path)): file.read_bytes() if file.is_file() else None
        for file in sorted(path.rglob("*"))
        # Readers hold leases, and make what is missing for it.
        if not file.name.startswith(CATALOG) and file.parent.name != "leases"
    }


def judge(template: Template, damage: Damage, path: Path) -> str:
    """Read the damaged library and say what came of it: "error" or "right"."""
    before = snapshot(path)
    touched = template.touched(path)
    errors = read_all(path, template.expected)
    assert snapshot(path) == before, "reading has changed the library"
    for error in errors.values():
        assert error.remedy, f"no remedy: {error}"
        if damage.area != "pack" and isinstance(error, NotFoundError):
            continue  # a damaged name is another name: `check` finds it
        named = f"{error} {error.path}"
        assert any(word in named for word in ("pack", "catalog", "library", "fragment")), named
    if damage.area == "harmless":
        assert not errors
    if damage.area == "pack":
        assert errors.keys() <= touched, "an error for a file that was not touched"
        assert not any(isinstance(error, NotFoundError) for error in errors.values())
    return "error" if errors else "right"


@pytest.mark.parametrize("area", AREAS)
def test_matrix(template, area):
    failures = []
    outcomes = Counter()
    for damage in damages_of(area, template):
        path = template.copy(hot=area == "file")
        try:
            damage.apply(path)
            outcomes[judge(template, damage, path)] += 1
        except Exception as error:
            failures.append(f"{damage.name}: {type(error).__name__}: {error}")
        finally:
            shutil.rmtree(path)
    print(area, outcomes)
    assert not failures, "\n" + "\n".join(failures[:60]) + f"\n{len(failures)}"
