"""What happens to sources and to other people's changes: nothing is lost silently."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from fragfs.errors import LimitError, StorageError, UsageError
from fragfs.library.add import AddOptions
from fragfs.library.library import FragmentLibrary
from fragfs.types import LibraryConfig
from tests.models import digests, make_model


@pytest.fixture
def library(tmp_path):
    with FragmentLibrary.create(tmp_path / "lib", LibraryConfig(fragment_elements=1 << 14)) as lib:
        yield lib


def add(library: FragmentLibrary, *paths: Path, **options):
    return library.add(list(paths), AddOptions(**options))


def shown(library: FragmentLibrary, name: str) -> dict[str, str]:
    return {os.fsdecode(entry.path): entry.sha256.hex() for entry in library.files(name)}


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


class Interferes:
    """Progress that does something once, after planning and before anything is stored."""

    def __init__(self, act):
        self.act = act

    def start(self, what, total_bytes):
        return None

    def advance(self, size):
        return None

    def note(self, text):
        act, self.act = self.act, None
        if act is not None:
            act()


# --- several sources, one place


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("a/config.json", "b/config.json"),
        ("a/sub", "b/sub"),
        ("file/t", "dir/t"),
        ("dir/t", "file/t"),
    ],
)
def test_two_sources_never_take_one_place(library, tmp_path, first, second):
    add(library, make_model(tmp_path / "m"))
    for name in ("a", "b"):
        write(tmp_path / name / "config.json", name)
        write(tmp_path / name / "sub" / "x", name)
    write(tmp_path / "file" / "t", "file")
    write(tmp_path / "dir" / "t" / "inner", "dir")
    before = shown(library, "m")
    with pytest.raises(UsageError, match="two of the sources"):
        add(library, tmp_path / first, tmp_path / second, into=b"m", remove_source=True)
    assert shown(library, "m") == before
    assert (tmp_path / first).exists()
    assert (tmp_path / second).exists()


def test_directories_of_two_sources_are_joined(library, tmp_path):
    add(library, make_model(tmp_path / "m"))
    write(tmp_path / "a" / "sub" / "x", "x")
    write(tmp_path / "b" / "sub" / "y", "y")
    add(library, tmp_path / "a" / "sub", tmp_path / "b" / "sub", into=b"m")
    assert {"sub/x", "sub/y"} <= shown(library, "m").keys()


def test_sources_that_contain_one_another_are_refused(library, tmp_path):
    source = make_model(tmp_path / "m")
    for paths in ((source, source), (source, source / "tokenizer")):
        with pytest.raises(UsageError, match="contain one another"):
            add(library, *paths)


def test_an_empty_directory_does_not_take_the_place_of_a_file(library, tmp_path):
    add(library, make_model(tmp_path / "m"))
    add(library, write(tmp_path / "sub", "a file"), into=b"m")
    (tmp_path / "x" / "sub" / "inner").mkdir(parents=True)
    write(tmp_path / "x" / "sub" / "other", "other")
    with pytest.raises(UsageError, match="would take the place of a file"):
        add(library, tmp_path / "x" / "sub", into=b"m")


# --- removing sources


def test_what_only_looks_unchanged_is_read_before_it_is_removed(library, tmp_path):
    source = make_model(tmp_path / "m")
    add(library, source)
    path = source / "config.json"
    status = path.stat()
    path.write_text(path.read_text().replace("test", "TEST"))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_size == status.st_size
    expected = digests(source)
    add(library, source, update=True, remove_source=True)
    assert shown(library, "m") == expected
    assert not source.exists()


def test_checksum_reads_what_only_looks_unchanged(library, tmp_path):
    source = make_model(tmp_path / "m")
    add(library, source)
    path = source / "config.json"
    status = path.stat()
    path.write_text(path.read_text().replace("test", "TEST"))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert add(library, source, update=True).unchanged_count == 4
    add(library, source, update=True, checksum=True)
    assert shown(library, "m") == digests(source)


def test_nothing_behind_a_link_is_removed(library, tmp_path):
    source = make_model(tmp_path / "m")
    precious = write(tmp_path / "outside" / "precious", "precious")
    (source / "link").symlink_to(tmp_path / "outside")
    with pytest.raises(UsageError, match="lies behind one"):
        add(library, source, follow_links=True, remove_source=True)
    assert precious.exists()


def test_a_tools_own_state_is_not_touched(library, tmp_path):
    source = make_model(tmp_path / "m")
    (source / ".git" / "refs" / "heads").mkdir(parents=True)
    add(library, source, remove_source=True)
    assert [p.name for p in source.iterdir()] == [".git"]
    assert (source / ".git" / "refs" / "heads").is_dir()


def test_nothing_is_removed_if_somebody_replaced_the_model_meanwhile(library, tmp_path):
    source = make_model(tmp_path / "m", rows=50)
    library.add([source], AddOptions())
    other = write(tmp_path / "other" / "config.json", "other")

    def replace():
        with FragmentLibrary.open(library.path) as second:
            second.add([other], AddOptions(into=b"m", update=True))

    options = AddOptions(into=b"m/new", remove_source=True)
    write(tmp_path / "new.txt", "new")
    library.add([tmp_path / "new.txt"], options, Interferes(replace))
    names = shown(library, "m")
    assert names["config.json"] == digests(tmp_path / "other")["config.json"]
    assert "new/new.txt" in names


# --- changes by others


@pytest.mark.parametrize("change", ["remove", "move"])
@pytest.mark.parametrize("how", ["into", "update"])
def test_a_model_that_vanishes_meanwhile_is_not_published_to(library, tmp_path, change, how):
    source = make_model(tmp_path / "m", rows=50)
    add(library, source)
    write(source / "new.txt", "new")

    def vanish():
        with FragmentLibrary.open(library.path) as second:
            second.remove("m") if change == "remove" else second.move("m", "elsewhere")

    options = AddOptions(update=True) if how == "update" else AddOptions(into=b"m")
    paths = [source] if how == "update" else [source / "new.txt"]
    with pytest.raises(StorageError, match="changed by another command") as caught:
        library.add(paths, options, Interferes(vanish))
    assert caught.value.retryable
    assert [model.name for model in library.models()] == (
        [] if change == "remove" else [b"elsewhere"]
    )
    assert library.stats().file_count == (0 if change == "remove" else 4)


def test_files_added_into_a_model_meanwhile_stay(library, tmp_path):
    add(library, make_model(tmp_path / "m"))
    write(tmp_path / "one.txt", "one")
    write(tmp_path / "two.txt", "two")

    def meanwhile():
        with FragmentLibrary.open(library.path) as second:
            second.add([tmp_path / "two.txt"], AddOptions(into=b"m"))

    library.add([tmp_path / "one.txt"], AddOptions(into=b"m"), Interferes(meanwhile))
    assert {"one.txt", "two.txt"} <= shown(library, "m").keys()


def test_one_file_does_not_update_a_model_away(library, tmp_path):
    source = make_model(tmp_path / "m")
    add(library, source)
    with pytest.raises(UsageError, match="--into m --update"):
        add(library, source / "config.json", name=b"m", update=True)
    assert len(shown(library, "m")) == 4


# --- odd sources


def test_deep_trees_end_in_a_limit_not_in_recursion(library, tmp_path):
    source = make_model(tmp_path / "m")
    deep = source
    for _ in range(400):
        deep = deep / "d"
    deep.mkdir(parents=True)
    (deep / "f").write_text("deep")
    add(library, source)
    for _ in range(200):
        deep = deep / "d"
    # mkdir by one path would exceed what the system takes in one call.
    subprocess.run(["mkdir", "-p", str(deep)], check=True)
    with pytest.raises(LimitError, match="longer than 1024"):
        add(library, source, update=True)


def test_an_index_with_odd_names_is_only_an_index(library, tmp_path):
    source = make_model(tmp_path / "m")
    write(source / "x.index.json", '{"weight_map": {"a": "\\ud800"}}')
    add(library, source)
    assert len(shown(library, "m")) == 5


def test_a_time_that_cannot_be_kept_is_refused_first(library, tmp_path):
    source = make_model(tmp_path / "m")
    os.utime(source / "config.json", (0, 13_000_000_000))
    if (source / "config.json").stat().st_mtime != 13_000_000_000:
        pytest.skip("this file system keeps no times after 2262")
    with pytest.raises(UsageError, match="modification time"):
        add(library, source)


def test_export_gives_out_no_special_rights(library, tmp_path):
    source = make_model(tmp_path / "m")
    (source / "config.json").chmod(0o4755)
    add(library, source)
    library.export("m", tmp_path / "out")
    assert (tmp_path / "out" / "config.json").stat().st_mode & 0o7777 == 0o755
