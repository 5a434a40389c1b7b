"""A library to interrupt commands on, what it may show afterwards, and whether it is whole."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np

from fragfs.library.catalog import CATALOG_NAME, SNAPSHOT_NAME
from fragfs.library.library import FragmentLibrary
from fragfs.library.records import PACK_FOOTER
from fragfs.types import LibraryConfig
from tests.archives import unpack
from tests.library.test_bases import (
    add,
    check_closures,
    quantized,
    tuned,
    write_model,
)
from tests.library.test_compact import check_rebuildable
from tests.models import digests

CONFIG = LibraryConfig(fragment_elements=1 << 12, pack_bytes_max=1 << 20)
GOLDEN = Path(__file__).parents[1] / "library" / "golden"
Shown = dict[str, dict[str, str]]
"""SHA-256 of every file of every model."""


class Forker:
    """Runs commands through `forker.py`.

    Attributes:
        text: What the last command printed, if its output was wanted.
    """

    def __init__(self) -> None:
        self.text = ""
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("forker.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._line() == "ready"

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def run(self, library: Path, arguments: Sequence[str], **options: object) -> int:
        """Run a command; gives its exit status, or less the signal that ended it.

        Options are those of a request, see `forker.py`.
        """
        assert self._process.stdin is not None
        request = {"arguments": ["--library", str(library), *arguments], **options}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        status = int(self._line())
        if "output" in options:
            self.text = Path(str(options["output"])).read_text()
        return status

    def close(self) -> None:
        self._process.communicate()


def make_libraries(place: Path) -> None:
    """Libraries to start from, each `lib` in a directory of its own, and `sources` to add."""
    (place / "nothing").mkdir()
    (place / "empty" / "lib").mkdir(parents=True)
    (place / "sources").mkdir()
    make_family(place)
    shutil.copytree(place / "family", place / "half")
    with FragmentLibrary.open(place / "half" / "lib") as library:
        library.remove("tuned")
        assert library.stats().unreferenced_bytes, "and some of it predicts what stays"
    shutil.copytree(place / "family", place / "damaged")
    damage(place / "damaged" / "lib", place / "sources")
    shutil.copytree(place / "family", place / "lost")
    for name in (CATALOG_NAME, SNAPSHOT_NAME):
        (place / "lost" / "lib" / name).unlink()
    for golden in GOLDEN.glob("format*"):
        directory = place / golden.name
        unpack(golden / "library.tar.gz", directory)
        (directory / "library").rename(directory / "lib")


def make_family(place: Path) -> None:
    """A library with a base that came last, and much that no model needs; two models to add."""
    sources = place / "sources"
    rng = np.random.default_rng(3)
    # Larger than the files that are not cut, so that there is something to predict.
    weights = {"up.weight": (rng.standard_normal((72, 256)) * 0.02).astype(np.float32)}
    base = write_model(sources / "base", weights)
    (base / "sub").mkdir()
    (base / "sub" / "notes.txt").write_bytes(b"notes " * 20)
    write_model(sources / "tuned", tuned(weights, 1))
    int8 = write_model(sources / "int8", quantized(weights), "I8")
    # All but fills a pack: the next add seals it, and begins another one.
    (int8 / "noise.bin").write_bytes(rng.bytes(750_000))
    gone = write_model(
        sources / "gone", {"x": (rng.standard_normal((120, 256)) * 0.02).astype("f4")}
    )
    new = write_model(sources / "new", tuned(weights, 2))
    (new / "noise.bin").write_bytes(rng.bytes(30_000))
    (new / "noise.txt").write_bytes(rng.bytes(1000))
    write_model(sources / "other", tuned(weights, 5))
    update = write_model(sources / "update" / "base", tuned(weights, 4))
    (update / "more.bin").write_bytes(rng.bytes(3000))
    (place / "family").mkdir()
    with FragmentLibrary.create(place / "family" / "lib", CONFIG) as library:
        add(library, int8)
        add(library, gone)
        add(library, sources / "tuned")
        add(library, base)
        library.remove("gone")


def damage(path: Path, sources: Path) -> None:
    """Take away what can be derived again, and flip a byte of one fragment of "base"."""
    with FragmentLibrary.open(path) as library:
        add(library, sources / "new")
        [entry] = [e for e in library.files("base") if e.path == b"model.safetensors"]
        extents = library.open_content(entry.content).extents
        place = library.fragment(extents[len(extents) - 1].fragment)
    pack = path / "packs" / f"{place.pack:010d}.pack"
    data = bytearray(pack.read_bytes())
    data[place.offset + place.record_size - 1] ^= 1
    index_offset, _ = PACK_FOOTER.unpack(bytes(data), len(data) - PACK_FOOTER.size)
    pack.write_bytes(data[:index_offset])
    (path / SNAPSHOT_NAME).unlink()
    connection = sqlite3.connect(path / CATALOG_NAME)
    with connection:
        connection.execute("DELETE FROM bases")
        connection.execute("UPDATE contents SET stored_bytes = 1")
    connection.close()


def shown(path: Path, copy: Path) -> Shown:
    """What a library shows; looked at in a copy, for opening it may bring it up to date."""
    if not (path / CATALOG_NAME).exists():
        return {}
    shutil.copytree(path, copy)
    with FragmentLibrary.open(copy) as library:
        return models_of(library)


def pack_bytes(files: dict[Path, bytes | None]) -> int:
    return sum(len(data or b"") for path, data in files.items() if path.suffix == ".pack")


def models_of(library: FragmentLibrary) -> Shown:
    return {
        os.fsdecode(model.name): {
            os.fsdecode(entry.path): entry.sha256.hex() for entry in library.files(model.name)
        }
        for model in library.models()
    }


def check_bytes(library: FragmentLibrary, damaged: Collection[str] = ()) -> None:
    """Every file of every model decodes to its bytes, or is known to be damaged."""
    failed = {os.fsdecode(item.model) for item in library.verify(workers=1) if item.error}
    assert failed == set(damaged)


def check_records(library: FragmentLibrary) -> None:
    """The packs say what the catalog says, and no closure is too large."""
    if library.models():
        check_rebuildable(library)
        check_closures(library)


def check_whole(path: Path, allowed: Sequence[Shown], damaged: Collection[str] = ()) -> Shown:
    """Gives what the library in a directory shows, which is one of `allowed`, and whole."""
    with FragmentLibrary.open(path) as library:
        found = models_of(library)
        assert found in allowed, f"shows {found}"
        check_bytes(library, damaged)
        if not damaged:
            check_records(library)
    check_snapshot(path / SNAPSHOT_NAME)
    return found


def check_snapshot(path: Path) -> None:
    """What other users read instead of the catalog is whole, or not there yet."""
    if path.exists():
        connection = sqlite3.connect(f"{path.as_uri()}?mode=ro&immutable=1", uri=True)
        try:
            assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        finally:
            connection.close()


# --- what a library may show after a command, by what it showed before: an interrupted one first


def same(before: Shown, _: Path) -> Sequence[Shown]:
    return [before]


def with_new(before: Shown, sources: Path) -> Sequence[Shown]:
    one = {**before, "new": digests(sources / "new")}
    return [one, {**one, "other": digests(sources / "other")}]


def without(name: str):
    return lambda before, _: [{key: files for key, files in before.items() if key != name}]


def without_folder(before: Shown, _: Path) -> Sequence[Shown]:
    kept = {path: sha for path, sha in before["base"].items() if not path.startswith("sub/")}
    return [{**before, "base": kept}]


def renamed(before: Shown, _: Path) -> Sequence[Shown]:
    rest = {name: files for name, files in before.items() if name != "tuned"}
    return [{**rest, "org/tuned": before["tuned"]}]


def with_more(before: Shown, sources: Path) -> Sequence[Shown]:
    more = {f"more/new/{path}": sha for path, sha in digests(sources / "new").items()}
    return [{**before, "base": {**before["base"], **more}}]


def updated(before: Shown, sources: Path) -> Sequence[Shown]:
    return [{**before, "base": digests(sources / "update" / "base")}]


def whole_family(_: Shown, sources: Path) -> Sequence[Shown]:
    return [{name: digests(sources / name) for name in ("base", "int8", "tuned")}]
