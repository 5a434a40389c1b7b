"""Who uses a cache directory, and which nobody uses any more."""

import os

from fragfs.cache.users import USERS_NAME, begin_use, end_use, find_abandoned, remove_abandoned


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
