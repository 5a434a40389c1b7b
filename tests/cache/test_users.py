"""Who uses a directory, and who gives it back: also after a kill."""

import os
import shutil
import threading

import pytest

from fragfs.cache.users import USERS_NAME, begin_use, end_use, find_abandoned, remove_abandoned
from tests.cache.support import Child

WAIT = "user = begin_use(directory); pause(); end_use(user, directory, remove=True)"


@pytest.fixture
def directory(tmp_path):
    made = tmp_path / "user" / "library"
    made.mkdir(parents=True)
    return made


def test_the_last_one_to_leave_removes_the_directory(directory):
    first, second = begin_use(directory), begin_use(directory)
    (directory / "a fragment").write_bytes(b"x")
    end_use(first, directory, remove=True)
    assert (directory / "a fragment").exists()
    end_use(second, directory, remove=True)
    assert not directory.exists()


def test_a_directory_on_disk_stays(directory):
    end_use(begin_use(directory), directory, remove=False)
    assert directory.exists()


def test_another_process_keeps_the_directory(directory):
    with Child(WAIT, directory).wait_ready() as child:
        end_use(begin_use(directory), directory, remove=True)
        assert directory.exists()
        child.proceed()
    assert not directory.exists()


def test_what_a_killed_user_left_is_removed_by_the_next_one_of_another_library(directory):
    with Child(WAIT, directory).wait_ready() as child:
        remove_abandoned(directory.parent, keep=directory.parent / "other")
        assert directory.exists()
        child.kill()
    remove_abandoned(directory.parent, keep=directory)
    assert directory.exists()
    remove_abandoned(directory.parent, keep=directory.parent / "other")
    assert not directory.exists()


def test_the_next_user_of_the_same_library_takes_over_what_a_killed_one_left(directory):
    with Child(WAIT, directory).wait_ready() as child:
        child.kill()
    end_use(begin_use(directory), directory, remove=True)
    assert not directory.exists()


def test_a_directory_that_somebody_is_just_making_is_not_taken_for_abandoned(directory):
    remove_abandoned(directory.parent, keep=directory.parent / "other")
    assert directory.exists()
    os.utime(directory, (1, 1))
    remove_abandoned(directory.parent, keep=directory.parent / "other")
    assert not directory.exists()


def test_only_directories_are_removed(directory, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / USERS_NAME).write_bytes(b"")
    (elsewhere / "precious").write_bytes(b"")
    os.symlink(elsewhere, directory.parent / "link")
    (directory.parent / "file").write_bytes(b"")
    remove_abandoned(directory.parent, keep=directory)
    assert (elsewhere / "precious").exists()
    assert sorted(os.listdir(directory.parent)) == ["file", directory.name, "link"]


def test_a_directory_that_vanishes_before_it_is_used_is_made_again(directory):
    """The last user of the same library removes it right after the place was chosen."""
    shutil.rmtree(directory)
    user = begin_use(directory)
    assert directory.stat().st_mode & 0o777 == 0o700
    end_use(user, directory, remove=True)
    assert not directory.exists()


def test_coming_and_going_at_once_never_fails(directory):
    failures = []

    def work():
        try:
            for _ in range(100):
                user = begin_use(directory)
                (directory / str(threading.get_ident())).write_bytes(b"")
                end_use(user, directory, remove=True)
        except OSError as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert not directory.exists()


def test_what_a_new_user_makes_is_not_removed_with_what_the_last_one_left(directory, monkeypatch):
    """The new one comes while the old files are being removed, and one has the name of an old."""
    rmtree = shutil.rmtree
    come = []

    def remove_after_somebody_came(path, **options):
        assert not directory.exists()
        come.append(begin_use(directory))
        (directory / "claims").write_bytes(b"new")
        rmtree(path, **options)

    last = begin_use(directory)
    (directory / "claims").write_bytes(b"old")
    monkeypatch.setattr(shutil, "rmtree", remove_after_somebody_came)
    end_use(last, directory, remove=True)
    monkeypatch.undo()
    assert (directory / "claims").read_bytes() == b"new"
    assert os.listdir(directory.parent) == [directory.name]
    end_use(come[0], directory, remove=True)
    assert os.listdir(directory.parent) == []


def test_only_what_its_lock_is_of_is_removed(directory):
    """Somebody deleted the directory, by hand, and another user made it again."""
    first = begin_use(directory)
    shutil.rmtree(directory)
    second = begin_use(directory)
    (directory / "fragment").write_bytes(b"x")
    end_use(first, directory, remove=True)
    assert (directory / "fragment").exists()
    end_use(second, directory, remove=True)
    assert not directory.exists()


def test_what_a_killed_one_was_removing_is_removed_by_the_next(directory, monkeypatch):
    user = begin_use(directory)
    (directory / "fragment").write_bytes(b"x" * 1000)
    monkeypatch.setattr(shutil, "rmtree", lambda path, **_: (path / USERS_NAME).unlink())
    end_use(user, directory, remove=True)
    monkeypatch.undo()
    [left] = directory.parent.iterdir()
    assert find_abandoned(directory.parent) == [(left, 1000)]
    remove_abandoned(directory.parent, keep=directory)
    assert list(directory.parent.iterdir()) == []


def make_cache(parent, name, size):
    directory = parent / name
    directory.mkdir()
    (directory / USERS_NAME).touch()
    (directory / "fragment").write_bytes(b"x" * size)
    return directory


def test_what_nobody_uses_is_found_with_its_size_and_removed(tmp_path):
    left = make_cache(tmp_path, "left", 1000)
    used = make_cache(tmp_path, "used", 2000)
    new = tmp_path / "new"
    new.mkdir()  # whoever makes it has not taken its lock yet
    user = begin_use(used)
    assert find_abandoned(tmp_path) == [(left, 1000)]
    assert left.exists()
    remove_abandoned(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["new", "used"]
    end_use(user, used, remove=False)
    assert find_abandoned(tmp_path) == [(used, 2000)]


def test_one_may_be_kept(tmp_path):
    kept = make_cache(tmp_path, "kept", 1)
    make_cache(tmp_path, "left", 1)
    remove_abandoned(tmp_path, keep=kept)
    assert os.listdir(tmp_path) == ["kept"]


def test_looking_never_keeps_a_directory_busy(tmp_path):
    directory = make_cache(tmp_path, "one", 1)
    find_abandoned(tmp_path)
    user = begin_use(directory)
    end_use(user, directory, remove=True)
    assert not directory.exists()


def test_without_a_directory_there_is_nothing(tmp_path):
    assert find_abandoned(tmp_path / "none") == []
    remove_abandoned(tmp_path / "none")
