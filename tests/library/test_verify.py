"""Verifying several files at once, and going on after an interruption."""

from __future__ import annotations

import shutil
import threading

import pytest

from fragfs.errors import FormatError
from fragfs.library.add import AddOptions
from fragfs.library.library import FragmentLibrary
from fragfs.library.verify import VerifyState
from tests.library.checks import flip_fragment, write_catalog
from tests.library.families import ORDER, make_library
from tests.models import make_model


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    return make_library(tmp_path_factory.mktemp("family"), 1 << 14)[1]


@pytest.fixture
def library(family):
    with FragmentLibrary.open(family) as opened:
        yield opened


class Counted:
    """A progress that counts; complains if two threads tell it at once."""

    def __init__(self):
        self.total = 0
        self.advanced = 0
        self._lock = threading.Lock()

    def start(self, what, total_bytes):
        self.total = total_bytes

    def advance(self, size):
        assert self._lock.acquire(blocking=False)
        self.advanced += size
        self._lock.release()

    def note(self, text):
        assert self._lock.acquire(blocking=False)
        self._lock.release()


def test_a_rebuilt_catalog_is_verified_from_the_start(family, tmp_path):
    path = tmp_path / "lib"
    shutil.copytree(family, path)
    with FragmentLibrary.open(path) as library:
        state = library.verify_state(tmp_path / "state", resume=False)
        state.add(1024)
        state.close()
        again = library.verify_state(tmp_path / "state", resume=True)
        assert again.done == {1024}
        again.close()
    FragmentLibrary.rebuild(path)
    with FragmentLibrary.open(path) as library:
        state = library.verify_state(tmp_path / "state", resume=True)
        assert state.done == set()
        state.close()


@pytest.mark.parametrize("jobs", [1, 2, 7])
def test_results_come_in_order_however_many_files_are_read_at_once(library, jobs):
    progress = Counted()
    results = list(library.verify(None, progress, jobs))
    assert [(r.model, r.path) for r in results] == sorted(
        (name.encode(), path) for name in ORDER for path in (b"config.json", b"model.safetensors")
    )
    assert all(r.error is None and not r.resumed for r in results)
    contents = {e.content: e.size for name in ORDER for e in library.files(name)}
    assert progress.advanced == progress.total == sum(contents.values())


def test_what_models_share_is_decoded_once(library, monkeypatch):
    decoded = []
    real = library._decoder._decode_record
    monkeypatch.setattr(
        library._decoder,
        "_decode_record",
        lambda fragment, metadata, bases: (
            decoded.append(metadata.number) or real(fragment, metadata, bases)
        ),
    )
    assert all(r.error is None for r in library.verify(None, workers=1))
    assert len(decoded) == len(set(decoded)) == library.stats().fragment_count


def test_damage_is_told_for_each_file(tmp_path):
    _, path = make_library(tmp_path, 1 << 14)
    with FragmentLibrary.open(path) as library:
        number = library.open_content(library.files("base")[1].content).extents[1].fragment
        flip_fragment(library, number)
        bad = {r.model for r in library.verify(workers=3) if r.error}
        assert b"base" in bad
        assert len(bad) > 1


def test_damaged_extents_do_not_keep_the_files_after_them_from_being_verified(tmp_path):
    with FragmentLibrary.create(tmp_path / "lib") as library:
        for seed, name in enumerate(("a", "b")):
            library.add([make_model(tmp_path / name, seed, rows=20)], AddOptions())
        entry = next(e for e in library.files("a") if e.path == b"model.safetensors")
        write_catalog(
            library.path, "UPDATE contents SET extents = x'00' WHERE number = ?", entry.content
        )
        results = list(library.verify())
        assert len(results) == len(library.files("a")) + len(library.files("b"))
        [bad] = [r for r in results if r.error]
        assert (bad.model, bad.path) == (b"a", entry.path)
        assert isinstance(bad.error, FormatError)


# --- going on


def state_of(library, tmp_path, **options):
    return library.verify_state(tmp_path / "state" / "verify", resume=options.get("resume", True))


def test_an_interrupted_run_goes_on_where_it_stopped(library, tmp_path):
    state = state_of(library, tmp_path)
    assert state.done == set()
    running = library.verify(None, workers=1, state=state)
    first = [next(running) for _ in range(3)]
    running.close()
    state.close()
    state = state_of(library, tmp_path)
    assert len(state.done) == 3
    progress = Counted()
    results = list(library.verify(None, progress, state=state))
    assert [(r.model, r.path, r.sha256) for r in results[:3]] == [
        (r.model, r.path, r.sha256) for r in first
    ]
    assert [r.resumed for r in results] == [True] * 3 + [False] * 7
    assert progress.advanced == progress.total == sum(r.size for r in results[3:])
    state.finish()
    assert not (tmp_path / "state" / "verify").exists()
    assert state_of(library, tmp_path).done == set()


def test_without_resume_everything_is_read_again(library, tmp_path):
    state = state_of(library, tmp_path)
    state.add(library.files("base")[0].content)
    state.close()
    assert state_of(library, tmp_path, resume=False).done == set()


def test_nothing_is_vouched_for_once_the_library_has_changed(tmp_path):
    with FragmentLibrary.create(tmp_path / "lib") as library:
        library.add([make_model(tmp_path / "a", rows=20)], AddOptions())
        state = state_of(library, tmp_path)
        assert all(r.error is None for r in library.verify(state=state))
        state.close()
        library.add([make_model(tmp_path / "b", 2, rows=20)], AddOptions())
        assert state_of(library, tmp_path).done == set()


def test_failures_are_never_written_down(tmp_path):
    with FragmentLibrary.create(tmp_path / "lib") as library:
        library.add([make_model(tmp_path / "a", rows=20)], AddOptions())
        entry = next(e for e in library.files("a") if e.path == b"model.safetensors")
        flip_fragment(library, library.open_content(entry.content).extents[0].fragment)
        state = state_of(library, tmp_path)
        assert [r.path for r in library.verify(state=state) if r.error] == [entry.path]
        state.close()
        assert entry.content not in state_of(library, tmp_path).done


@pytest.mark.parametrize("cut", [1, 2, 5])
def test_a_torn_state_vouches_for_less_and_never_for_more(tmp_path, cut):
    path = tmp_path / "verify"
    state = VerifyState(path, bytes(16), bytes(16), "1", resume=False)
    for number in (1024, 10240, 102400):
        state.add(number)
    state.close()
    path.write_bytes(path.read_bytes()[:-cut])
    state = VerifyState(path, bytes(16), bytes(16), "1", resume=True)
    assert state.done == {1024, 10240}
    state.add(7777)
    state.close()
    assert VerifyState(path, bytes(16), bytes(16), "1", resume=True).done == {1024, 10240, 7777}


def test_two_runs_at_once_do_not_mix(library, tmp_path):
    one = state_of(library, tmp_path)
    two = state_of(library, tmp_path)
    one.add(1024)
    two.add(2048)
    two.finish()
    one.close()
    assert state_of(library, tmp_path).done == {1024}
