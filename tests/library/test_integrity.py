from __future__ import annotations

import os
import sqlite3

import pytest

from fragfs.errors import FormatError, IntegrityError, NotFoundError, StorageError, UsageError
from fragfs.library.add import AddOptions
from fragfs.library.decode import NO_SOURCE
from fragfs.library.files import OsFiles
from fragfs.library.library import FragmentLibrary
from fragfs.library.manifests import parse_manifest
from fragfs.library.packs import scan_records
from fragfs.library.records import PACK_FOOTER, PACK_HEADER, RecordKind, parse_index
from fragfs.types import LibraryConfig
from tests.models import digests, make_model

SMALL = LibraryConfig(fragment_elements=1 << 14, pack_bytes_max=1 << 20)


@pytest.fixture
def filled(tmp_path):
    with FragmentLibrary.create(tmp_path / "lib", SMALL) as library:
        library.add([make_model(tmp_path / "a")], AddOptions())
        yield library


def damage(library: FragmentLibrary, number: int, *, at: int = 100) -> None:
    meta = library.fragment(number)
    path = library.path / "packs" / f"{meta.pack:010d}.pack"
    with path.open("r+b") as stream:
        stream.seek(meta.offset + min(at, meta.record_size - 1))
        byte = stream.read(1)[0]
        stream.seek(-1, os.SEEK_CUR)
        stream.write(bytes([byte ^ 0x10]))


def largest(library: FragmentLibrary) -> int:
    fragments = [library.fragment(n) for n in range(1, library.stats().fragment_count + 1)]
    return max(fragments, key=lambda meta: meta.record_size).number


@pytest.mark.parametrize("at", [0, 5, 40, 90, 200, 10_000])
def test_a_flipped_bit_is_an_error_that_names_everything(filled, at):
    number = largest(filled)
    meta = filled.fragment(number)
    damage(filled, number, at=at)
    with pytest.raises(IntegrityError) as caught:
        filled.decode_fragment(number, NO_SOURCE)
    text = str(caught.value)
    assert meta.id.short in text
    assert f"pack {meta.pack}" in text
    assert f"offset {meta.offset}" in text
    assert "restore the pack" in text
    assert caught.value.fragment == meta.id.hex()
    bad = [item for item in filled.verify() if item.error]
    assert [item.path for item in bad] == [b"model.safetensors"]


def test_adding_good_bytes_again_heals_a_damaged_record(filled, tmp_path):
    number = largest(filled)
    damage(filled, number)
    report = filled.add([make_model(tmp_path / "b")], AddOptions())
    assert len(report.healed) == 1
    assert filled.fragment(number).id.short in report.healed[0]
    assert not [item for item in filled.verify() if item.error]


def test_a_missing_pack_is_named_and_healed(filled, tmp_path):
    (filled.path / "packs" / "0000000001.pack").unlink()
    again = FragmentLibrary.open(filled.path)
    errors = [item.error for item in again.verify() if item.error]
    assert "pack 1: cannot open" in str(errors[0])
    again.add([make_model(tmp_path / "b")], AddOptions())
    assert not [item for item in again.verify() if item.error]
    again.close()


def test_a_pack_of_another_library_is_refused(filled, tmp_path):
    with FragmentLibrary.create(tmp_path / "other", SMALL) as other:
        other.add([make_model(tmp_path / "x", seed=3)], AddOptions())
        stolen = (other.path / "packs" / "0000000001.pack").read_bytes()
    (filled.path / "packs" / "0000000001.pack").write_bytes(stolen)
    with (
        FragmentLibrary.open(filled.path) as again,
        pytest.raises(IntegrityError, match="of library"),
    ):
        again.decode_fragment(1, NO_SOURCE)


def test_full_packs_are_sealed_with_an_index_of_their_records(filled):
    files = OsFiles()
    sealed = 0
    for path in sorted((filled.path / "packs").iterdir()):
        data = path.read_bytes()
        index_offset, magic = PACK_FOOTER.unpack(data, len(data) - PACK_FOOTER.size)
        if magic != b"FRAGEND\n":
            continue
        sealed += 1
        entries = parse_index(data[index_offset : -PACK_FOOTER.size], "index")
        descriptor = files.open_read(path)
        walked = list(scan_records(files, descriptor, PACK_HEADER.size, index_offset))
        files.close(descriptor)
        assert [entry.offset for entry in entries] == [record.offset for record in walked]
        for entry in entries:
            if entry.kind is RecordKind.FRAGMENT:
                assert entry.id in data[entry.offset : entry.offset + 60]
    assert sealed


def test_a_manifest_record_holds_the_whole_model(filled, tmp_path):
    files = OsFiles()
    found = []
    for path in sorted((filled.path / "packs").iterdir()):
        descriptor = files.open_read(path)
        for record in scan_records(files, descriptor, PACK_HEADER.size, path.stat().st_size):
            if record.header.kind is RecordKind.MANIFEST:
                start = record.offset + record.header.header_size
                payload = path.read_bytes()[start : start + record.header.payload_size]
                found.append(parse_manifest(payload, "here"))
        files.close(descriptor)
    [manifest] = found
    assert manifest.name == b"a"
    contents = {content.number: content for content in manifest.contents}
    expected = digests(tmp_path / "a")
    shown = {
        os.fsdecode(file.path): contents[file.content].sha256.hex()
        for file in manifest.files
        if file.content is not None
    }
    assert shown == expected
    model_file = next(file for file in manifest.files if file.path == b"model.safetensors")
    content = contents[model_file.content]
    assert sum(content.sizes) == (tmp_path / "a" / "model.safetensors").stat().st_size
    first = filled.open_content(content.number).extents[0]
    assert content.ids[:32] == filled.fragment(first.fragment).id


def test_a_catalog_older_than_its_packs_is_refused(filled, tmp_path):
    filled.close()
    backup = (filled.path / "catalog.sqlite").read_bytes()
    with FragmentLibrary.open(filled.path) as library:
        library.add([make_model(tmp_path / "b", seed=2)], AddOptions())
    for name in ("catalog.sqlite-wal", "catalog.sqlite-shm"):
        (filled.path / name).unlink(missing_ok=True)
    (filled.path / "catalog.sqlite").write_bytes(backup)
    with FragmentLibrary.open(filled.path) as library:
        assert [model.name for model in library.models()] == [b"a"]
        with pytest.raises(FormatError, match=r"older than its packs.*backup"):
            library.add([make_model(tmp_path / "c", seed=3)], AddOptions())


def test_a_newer_library_is_refused_with_the_remedy(filled):
    filled.close()
    connection = sqlite3.connect(filled.path / "catalog.sqlite")
    connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(FormatError, match="upgrade fragfs"):
        FragmentLibrary.open(filled.path)


def test_other_databases_and_directories_are_refused(tmp_path):
    with pytest.raises(NotFoundError, match="fragfs init"):
        FragmentLibrary.open(tmp_path)
    sqlite3.connect(tmp_path / "catalog.sqlite").execute("CREATE TABLE t (x)").connection.close()
    with pytest.raises(FormatError, match="not the catalog"):
        FragmentLibrary.open(tmp_path)
    (tmp_path / "catalog.sqlite").write_bytes(b"garbage" * 1000)
    with pytest.raises(FormatError, match="damaged"):
        FragmentLibrary.open(tmp_path)


def test_a_library_is_not_created_over_something(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="not empty"):
        FragmentLibrary.create(tmp_path)
    FragmentLibrary.create(tmp_path / "lib").close()
    with pytest.raises(UsageError, match="already"):
        FragmentLibrary.create(tmp_path / "lib")


def test_a_forked_child_must_not_use_the_library(filled):
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            filled.models()
            os.write(write, b"worked")
        except StorageError as error:
            os.write(write, str(error).encode())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    os.close(write)
    text = os.read(read, 1000).decode()
    os.close(read)
    assert "fork" in text


def test_the_snapshot_serves_whoever_cannot_open_the_catalog(filled, monkeypatch):
    filled.close()
    path = filled.path / "catalog.sqlite"
    real_connect = sqlite3.connect

    def refusing(target, *args, **kwargs):
        if "catalog.sqlite" in str(target):
            raise sqlite3.OperationalError("unable to open database file")
        return real_connect(target, *args, **kwargs)

    # Root may open everything: another user's refusal is played here.
    monkeypatch.setattr(sqlite3, "connect", refusing)
    monkeypatch.setattr(os, "access", lambda *_: False)
    with FragmentLibrary.open(path.parent) as library:
        assert [model.name for model in library.models()] == [b"a"]
        assert not [item for item in library.verify() if item.error]
        with pytest.raises(StorageError, match="cannot change"):
            library.remove("a")


def test_one_damaged_fragment_is_replaced_once(tmp_path, filled):
    number = largest(filled)
    damage(filled, number)
    source = make_model(tmp_path / "b")
    twice = source / "again.safetensors"
    twice.write_bytes((source / "model.safetensors").read_bytes() + b"x")
    report = filled.add([source], AddOptions(force=True))
    assert len(report.healed) == 1


@pytest.mark.parametrize("content", [b"", b"x", b"garbage" * 100])
def test_a_pack_without_a_header_is_healed(filled, tmp_path, content):
    (filled.path / "packs" / "0000000001.pack").write_bytes(content)
    with FragmentLibrary.open(filled.path) as again:
        assert [item for item in again.verify() if item.error]
        assert again.add([make_model(tmp_path / "b")], AddOptions()).healed
        assert not [item for item in again.verify() if item.error]


def test_nothing_is_appended_to_a_pack_that_readers_refuse(tmp_path):
    path = tmp_path / "lib"
    with FragmentLibrary.create(path) as library:
        library.add([make_model(tmp_path / "a")], AddOptions())
        pack = path / "packs" / "0000000001.pack"
        data = bytearray(pack.read_bytes())
        data[20] ^= 1
        pack.write_bytes(data)
        library.add([make_model(tmp_path / "b", seed=4)], AddOptions())
        assert pack.read_bytes() == data
    with FragmentLibrary.open(path) as library:
        assert {item.model for item in library.verify() if item.error} == {b"a"}


def test_a_missing_open_pack_does_not_stop_writers(tmp_path):
    path = tmp_path / "lib"
    with FragmentLibrary.create(path) as library:
        library.add([make_model(tmp_path / "a")], AddOptions())
        library.add([make_model(tmp_path / "b", seed=4)], AddOptions())
    (path / "packs" / "0000000001.pack").unlink()
    with FragmentLibrary.open(path) as library:
        library.remove("b")
        assert [model.name for model in library.models()] == [b"a"]


def test_a_library_that_was_replaced_is_not_read_on(filled, tmp_path):
    import shutil
    import threading

    copy = tmp_path / "copy"
    shutil.copytree(filled.path, copy)
    filled.path.rename(tmp_path / "old")
    copy.rename(filled.path)
    errors = []

    def read():
        try:
            filled.decode_fragment(1, NO_SOURCE)
        except StorageError as error:
            errors.append(str(error))

    # Another thread opens its own connection: by path, hence to another catalog.
    thread = threading.Thread(target=read)
    thread.start()
    thread.join()
    assert "moved away or replaced" in errors[0]


def test_leavings_in_staging_are_removed_by_the_next_writer(filled, tmp_path):
    staging = filled.path / "staging"
    for name in ("catalog.snapshot.999999", "batch.intent.999999"):
        (staging / name).write_bytes(b"left by a killed process")
    filled.add([make_model(tmp_path / "b")], AddOptions())
    assert list(staging.iterdir()) == []


def test_the_snapshot_is_as_new_as_the_catalog_whoever_writes_last(filled, tmp_path):
    for seed in range(3):
        source = make_model(tmp_path / f"s{seed}", seed=seed, rows=20)
        with FragmentLibrary.open(filled.path) as other:
            other.add([source], AddOptions())
    snapshot = sqlite3.connect(filled.path / "catalog.snapshot")
    names = {row[0] for row in snapshot.execute("SELECT name FROM models")}
    snapshot.close()
    assert names == {model.name for model in filled.models()}


def test_a_damaged_file_does_not_cost_an_export_the_others(filled, tmp_path):
    damage(filled, largest(filled))
    report = filled.export("a", tmp_path / "out")
    assert [path for path, _ in report.failed] == [b"model.safetensors"]
    expected = digests(tmp_path / "a")
    del expected["model.safetensors"]
    assert digests(tmp_path / "out") == expected
