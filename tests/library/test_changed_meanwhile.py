"""Reading what others change between one look at the catalog and the next."""

from __future__ import annotations

import os
import threading

import numpy as np
import pytest

from fragfs.codec.predict import Prediction
from fragfs.codec.predicted import encode_predicted
from fragfs.errors import IntegrityError, NotFoundError
from fragfs.library.add import AddOptions
from fragfs.library.batch import Replacement
from fragfs.library.decode import NO_SOURCE
from fragfs.library.files import OsFiles
from fragfs.library.library import FragmentLibrary
from fragfs.library.records import checksum
from fragfs.types import Dtype, Fragment, FragmentId, LibraryConfig, Predictor
from tests.models import digests, make_model, safetensors_bytes

ELEMENTS = 1 << 14


class CallingFiles(OsFiles):
    """Calls a function once, after a record was read and before anybody can look at it."""

    def __init__(self):
        self.then = None

    def read_at(self, descriptor, size, offset):
        data = super().read_at(descriptor, size, offset)
        then, self.then = self.then, None
        if then is not None:
            then()
        return data


@pytest.fixture
def pair(tmp_path):
    """A library of two tensors, of which one is a delta to the other: (path, base, dependent)."""
    rng = np.random.default_rng(0)
    base = (rng.standard_normal(ELEMENTS) * 0.02).astype("<f4")
    tuned = (base + rng.standard_normal(ELEMENTS) * 1e-5).astype("<f4")
    path = tmp_path / "lib"
    with FragmentLibrary.create(path, LibraryConfig(fragment_elements=ELEMENTS)) as library:
        for name, values in (("base", base), ("tuned", tuned)):
            source = tmp_path / name
            source.mkdir()
            tensors = {"t": ("F32", values.shape, values.tobytes())}
            (source / "model.safetensors").write_bytes(safetensors_bytes(tensors))
            library.add([source], AddOptions())
        deltas = [n for n in range(1, 10) if exists(library, n) and library.bases(n)]
        assert len(deltas) == 1
        return path, library.bases(deltas[0])[0], deltas[0]


def exists(library, number):
    try:
        library.fragment(number)
    except NotFoundError:
        return False
    return True


def swap(path, base, dependent):
    """Store the dependent as it is, and the base as a delta to it: one commit."""
    with FragmentLibrary.open(path) as library:
        raws = {n: bytes(library.decode_fragment(n, NO_SOURCE)) for n in (base, dependent)}
        ids = {n: FragmentId(library.fragment(n).id) for n in raws}
        raw = raws[dependent]
        alone = Fragment(
            ids[dependent], Dtype.F32, len(raw), checksum(raw), Predictor.RAW, b"", raw
        )
        delta = encode_predicted(
            raws[base],
            Dtype.F32,
            Prediction(Predictor.DELTA, (Dtype.F32,)),
            [memoryview(raw)],
            grouped=True,
            zstd_level=3,
        )
        turned = Fragment(
            ids[base],
            Dtype.F32,
            len(raws[base]),
            checksum(raws[base]),
            delta.predictor,
            delta.params,
            delta.payload,
            (ids[dependent],),
        )
        with library._start_batch() as batch:
            batch.replace_fragments([Replacement(dependent, alone), Replacement(base, turned)])
            batch.commit()


def test_a_prediction_that_is_turned_around_while_it_is_read(pair):
    path, base, dependent = pair
    files = CallingFiles()
    with FragmentLibrary.open(path, files=files) as library:
        expected = bytes(library.decode_fragment(dependent, NO_SOURCE))
        # The record read names the base, which from now on is predicted from it.
        files.then = lambda: swap(path, base, dependent)
        assert library.decode_fragment(dependent, NO_SOURCE) == expected
        assert files.then is None
        assert library.bases(base) == (dependent,)


def test_a_prediction_that_is_turned_around_while_it_is_checked(pair):
    path, base, dependent = pair
    files = CallingFiles()
    with FragmentLibrary.open(path, files=files) as library:
        files.then = lambda: swap(path, base, dependent)
        checked = set()
        library._decoder.check_closure(library.fragment(dependent), checked)
        assert checked == {dependent}


def test_damage_is_still_told_after_a_change(pair):
    path, base, dependent = pair
    files = CallingFiles()

    def swap_and_damage():
        swap(path, base, dependent)
        with FragmentLibrary.open(path) as other:
            meta = other.fragment(dependent)
        with (path / "packs" / f"{meta.pack:010d}.pack").open("r+b") as stream:
            stream.seek(meta.offset + meta.record_size - 5)
            stream.write(b"wrong")

    with FragmentLibrary.open(path, files=files) as library:
        files.then = swap_and_damage
        with pytest.raises(IntegrityError):
            library.decode_fragment(dependent, NO_SOURCE)


@pytest.fixture
def two(tmp_path):
    sources = {name: make_model(tmp_path / name, seed=n) for n, name in enumerate("ab")}
    with FragmentLibrary.create(tmp_path / "lib") as library:
        for source in sources.values():
            library.add([source], AddOptions())
        yield library, sources


@pytest.fixture
def gate(two, monkeypatch):
    """Lets one fragment be decoded, and the others once it is set."""
    library, _ = two
    opened, first = threading.Event(), threading.Event()
    decode = library._decoder.decode

    def wait(number, source):
        if first.is_set():
            assert opened.wait(60)
        first.set()
        return decode(number, source)

    monkeypatch.setattr(library._decoder, "decode", wait)
    yield opened
    opened.set()


def test_verify_passes_over_a_model_that_is_removed_meanwhile(two, gate):
    library, sources = two
    results = library.verify(workers=1)
    first = next(results)
    library.remove("b")
    gate.set()
    rest = list(results)
    assert {item.model for item in (first, *rest)} == {b"a"}
    assert not [item.error for item in (first, *rest) if item.error]
    assert {item.path.decode() for item in (first, *rest)} == digests(sources["a"]).keys()


def test_verify_passes_over_a_file_that_is_replaced_meanwhile(two, gate):
    library, sources = two
    results = library.verify("b", workers=1)
    first = next(results)
    (sources["b"] / "tokenizer" / "vocab.txt").write_bytes(b"another")
    library.add([sources["b"]], AddOptions(update=True))
    gate.set()
    rest = list(results)
    assert not [item.error for item in (first, *rest) if item.error]
    assert b"tokenizer/vocab.txt" not in {item.path for item in (first, *rest)}
    assert b"model.safetensors" in {item.path for item in (first, *rest)}


def test_verify_of_a_library_whose_models_go_before_they_are_listed(two, monkeypatch):
    library, _ = two
    models = library.models()
    library.remove("a")
    monkeypatch.setattr(library, "models", lambda: models)
    assert {item.model for item in library.verify()} == {b"b"}


class MeddlingFiles(OsFiles):
    """Calls a function whenever the packs are listed: after the catalog was asked about them."""

    def __init__(self):
        self.meddle = None

    def names(self, path):
        if path.name == "packs" and self.meddle is not None:
            self.meddle()
        return super().names(path)


class StoppingFiles(OsFiles):
    """Stops where a batch is written and its commit is still to come."""

    def __init__(self):
        self.is_there, self.go_on = threading.Event(), threading.Event()

    def sync(self, descriptor):
        super().sync(descriptor)
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith(".pack"):
            self.is_there.set()
            assert self.go_on.wait(60)


def test_a_check_beside_a_commit(two, tmp_path):
    library, _ = two
    source = make_model(tmp_path / "c", seed=9)
    stopping, meddling = StoppingFiles(), MeddlingFiles()

    def add():
        with FragmentLibrary.open(library.path, files=stopping) as other:
            other.add([source], AddOptions())

    adder = threading.Thread(target=add)

    def begin_commit():
        if not adder.ident:
            adder.start()
            assert stopping.is_there.wait(60)

    try:
        with FragmentLibrary.open(library.path, files=meddling) as checking:
            meddling.meddle = begin_commit
            assert checking.check(workers=1).problems == ()
            assert adder.ident
    finally:
        stopping.go_on.set()
        adder.join()


def test_a_check_while_others_never_stop(two, tmp_path):
    library, _ = two
    meddling = MeddlingFiles()
    sources = [make_model(tmp_path / f"new{n}", seed=20 + n, rows=30) for n in range(3)]
    waiting = list(sources)

    def add_another():
        if waiting:
            library.add([waiting.pop()], AddOptions())

    with FragmentLibrary.open(library.path, files=meddling) as checking:
        meddling.meddle = add_another
        assert checking.check(data=True, workers=1).problems == ()
    assert waiting == []
    assert len(library.models()) == 5
