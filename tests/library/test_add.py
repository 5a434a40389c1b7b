from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from fragfs.errors import FormatError, FragmentError, NotFoundError, StorageError, UsageError
from fragfs.library.add import AddOptions
from fragfs.library.library import FragmentLibrary
from fragfs.types import LibraryConfig
from tests.models import bf16, digests, make_model, safetensors_bytes


@pytest.fixture
def library(tmp_path):
    with FragmentLibrary.create(tmp_path / "lib", LibraryConfig(fragment_elements=1 << 14)) as lib:
        yield lib


def add(library: FragmentLibrary, *paths: Path, **options):
    return library.add(list(paths), AddOptions(**options))


def assert_good(library: FragmentLibrary, name=None):
    checked = list(library.verify(name))
    assert checked
    assert [item.error for item in checked] == [None] * len(checked)


def test_what_is_added_is_exported_bit_exact(library, tmp_path):
    source = make_model(tmp_path / "source")
    report = add(library, source, name=b"org/name")
    assert report.models == (b"org/name",)
    assert report.file_count == 4
    assert report.logical_bytes == sum(p.stat().st_size for p in source.rglob("*") if p.is_file())
    assert 0 < report.new_bytes < report.logical_bytes
    library.export("org/name", tmp_path / "out")
    assert digests(tmp_path / "out") == digests(source)
    for path in source.rglob("*"):
        copy = tmp_path / "out" / path.relative_to(source)
        assert copy.stat().st_mtime_ns == path.stat().st_mtime_ns
        assert stat.S_IMODE(copy.stat().st_mode) == stat.S_IMODE(path.stat().st_mode)


def test_everything_is_there_after_opening_again(library, tmp_path):
    source = make_model(tmp_path / "source")
    add(library, source, name=b"org/name")
    with FragmentLibrary.open(library.path) as again:
        assert again.config == library.config
        assert [model.name for model in again.models()] == [b"org/name"]
        entries = {os.fsdecode(entry.path): entry.sha256.hex() for entry in again.files("org/name")}
        assert entries == digests(source)
        assert_good(again)


def test_equal_bytes_are_stored_once(library, tmp_path):
    add(library, make_model(tmp_path / "a"))
    packs = sum(p.stat().st_size for p in (library.path / "packs").iterdir())
    report = add(library, make_model(tmp_path / "b", seed=0))
    assert report.new_bytes == 0
    assert report.reused_bytes == report.logical_bytes
    grown = sum(p.stat().st_size for p in (library.path / "packs").iterdir()) - packs
    assert grown < 20_000
    stats = library.stats()
    assert stats.shared_fragment_count == stats.fragment_count
    assert stats.unique_bytes * 2 == stats.logical_bytes
    assert stats.saved_bytes["exact"] == stats.unique_bytes


def test_equal_files_share_a_content_only_if_large(library, tmp_path):
    add(library, make_model(tmp_path / "a"))
    add(library, make_model(tmp_path / "b"))
    a = {entry.path: entry for entry in library.files("a")}
    b = {entry.path: entry for entry in library.files("b")}
    assert a[b"model.safetensors"].content == b[b"model.safetensors"].content
    assert a[b"config.json"].content != b[b"config.json"].content


def test_the_tensors_of_a_model_are_named(library, tmp_path):
    add(library, make_model(tmp_path / "a"))
    manifest = library.manifest("a")
    layers = {layer.name: layer for layer in manifest.layers}
    assert layers["embed_tokens.weight"].dtype == "BF16"
    assert layers["embed_tokens.weight"].shape == (600, 512)
    assert layers["embed_tokens.weight"].total_size == 600 * 512 * 2
    assert layers["scalar"].total_size == 4
    assert layers["empty"].refs == ()
    raw = (tmp_path / "a" / "model.safetensors").read_bytes()
    layer = layers["layers.0.mlp.up_proj.weight"]
    numbers = {meta: number for number in range(1, 200) if (meta := _id(library, number))}
    from fragfs.library.decode import NO_SOURCE

    parts = [
        bytes(
            library.decode_fragment(numbers[ref.fragment], NO_SOURCE)[
                ref.offset : ref.offset + ref.size
            ]
        )
        for ref in layer.refs
    ]
    assert b"".join(parts) == raw[layer.offset : layer.offset + layer.total_size]


def _id(library, number):
    try:
        return library.fragment(number).id
    except NotFoundError:
        return None


def test_a_siblings_tensors_are_shared_although_its_header_differs(library, tmp_path, rng):
    tensors = {"weight": bf16(rng, 500, 512)}
    for name, metadata in (("a", {"format": "pt"}), ("b", {"format": "pt", "note": "longer" * 9})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(safetensors_bytes(tensors, metadata))
    add(library, tmp_path / "a")
    report = add(library, tmp_path / "b")
    assert report.reused_bytes == 500 * 512 * 2
    assert report.new_bytes < 1000


def test_a_file_is_opened_like_any_file(library, tmp_path):
    source = make_model(tmp_path / "a")
    add(library, source, name=b"org/a")
    expected = (source / "model.safetensors").read_bytes()
    with library.open_file("org/a", "model.safetensors") as stream:
        assert stream.read() == expected
        assert stream.read() == b""
        for offset in (0, 1, len(expected) // 2, len(expected) - 3):
            stream.seek(offset)
            assert stream.read(70_000) == expected[offset : offset + 70_000]
        assert stream.seek(-10, os.SEEK_END) == len(expected) - 10
        assert stream.read(100) == expected[-10:]
        stream.seek(len(expected) + 5)
        assert stream.read(1) == b""
    with library.open_file("org/a", "empty.txt") as stream:
        assert stream.read() == b""
    for path in ("nosuch", "tokenizer"):
        with pytest.raises(NotFoundError):
            library.open_file("org/a", path)


# --- names


@pytest.mark.parametrize(
    "name", [b"../x", b"/x", b"a/../b", b"a//b", b"", b"a/", b".", b"a\0b", b"x" * 256]
)
def test_names_that_escape_are_refused(library, tmp_path, name):
    source = make_model(tmp_path / "source")
    with pytest.raises(FragmentError):
        add(library, source, name=name)
    assert library.models() == []


def test_a_taken_name_is_refused_with_the_remedy(library, tmp_path):
    source = make_model(tmp_path / "a")
    add(library, source)
    with pytest.raises(UsageError, match=r"already.*--update"):
        add(library, source)


@pytest.mark.parametrize(("first", "second"), [(b"org", b"org/name"), (b"org/name", b"org")])
def test_no_model_lies_inside_another(library, tmp_path, first, second):
    source = make_model(tmp_path / "source")
    add(library, source, name=first)
    with pytest.raises(UsageError):
        add(library, source, name=second)
    assert [model.name for model in library.models()] == [first]


def test_a_near_name_is_suggested(library, tmp_path):
    add(library, make_model(tmp_path / "source"), name=b"org/llama-base")
    with pytest.raises(NotFoundError, match="did you mean org/llama-base"):
        library.model("org/lama-base")


def test_odd_file_names_survive(library, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    names = [b"new\nline", b"bad\xff\xfeutf8", "schön".encode(), b"x" * 255]
    for name in names:
        (source / os.fsdecode(name)).write_bytes(name)
    add(library, source)
    assert [entry.path for entry in library.files("source")] == sorted(names)
    library.export("source", tmp_path / "out")
    assert digests(tmp_path / "out") == digests(source)


# --- sources that are refused


def test_a_truncated_file_is_refused_and_stored_by_force(library, tmp_path):
    source = make_model(tmp_path / "source")
    path = source / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(FormatError, match=r"model\.safetensors.*truncated"):
        add(library, source)
    assert library.models() == []
    add(library, source, force=True)
    assert_good(library)


def test_an_lfs_pointer_is_refused(library, tmp_path):
    source = make_model(tmp_path / "source")
    (source / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid x\n")
    with pytest.raises(FormatError, match="git lfs pull"):
        add(library, source)


def test_a_link_out_of_the_source_is_refused_by_name(library, tmp_path):
    source = make_model(tmp_path / "source")
    (tmp_path / "secret").write_text("secret")
    (source / "leak").symlink_to(tmp_path / "secret")
    with pytest.raises(UsageError, match=r"leak.*--follow-links"):
        add(library, source)
    add(library, source, follow_links=True)
    assert b"leak" in [entry.path for entry in library.files("source")]


def test_a_hub_snapshot_is_followed_into_its_blobs(library, tmp_path):
    blobs = make_model(tmp_path / "models--org--name" / "blobs")
    snapshot = tmp_path / "models--org--name" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").symlink_to("../../blobs/model.safetensors")
    add(library, snapshot, name=b"org/name")
    [entry] = library.files("org/name")
    assert entry.sha256.hex() == digests(blobs)["model.safetensors"]


def test_a_link_to_nothing_is_named(library, tmp_path):
    source = make_model(tmp_path / "source")
    (source / "gone").symlink_to("nowhere")
    with pytest.raises(UsageError, match="gone is a link to nothing"):
        add(library, source)


def test_tools_own_state_is_left_out_and_listed(library, tmp_path):
    source = make_model(tmp_path / "source")
    (source / ".git").mkdir()
    (source / ".git" / "config").write_text("x")
    (source / "model.lock").write_text("x")
    (source / "part.incomplete").write_text("x")
    report = add(library, source)
    assert sorted(path for path, _ in report.skipped) == [
        b".git",
        b"model.lock",
        b"part.incomplete",
    ]
    assert report.file_count == 4


def test_a_missing_shard_is_warned_about(library, tmp_path):
    source = make_model(tmp_path / "source")
    (source / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "gone.safetensors"}}'
    )
    assert "gone.safetensors" in add(library, source).warnings[0]


def test_an_unreadable_file_is_named(library, tmp_path, monkeypatch):
    source = make_model(tmp_path / "source")
    real_open = os.open

    def refusing(path, *args, **kwargs):
        if str(path).endswith("model.safetensors"):
            raise PermissionError(13, "Permission denied", str(path))
        return real_open(path, *args, **kwargs)

    # Root may read everything, so the refusal of the operating system is played here.
    monkeypatch.setattr(os, "open", refusing)
    with pytest.raises(StorageError, match=r"cannot read .*model\.safetensors: Permission denied"):
        add(library, source)
    monkeypatch.undo()
    assert library.models() == []


def test_a_file_that_changes_while_it_is_read_is_refused(library, tmp_path):
    source = make_model(tmp_path / "source")

    class Meddler:
        def start(self, what, total_bytes):
            return None

        def advance(self, size):
            return None

        def note(self, text):
            if text == "model.safetensors":
                with (source / text).open("ab") as stream:
                    stream.write(b"more")

    with pytest.raises(StorageError, match="changed"):
        library.add([source], AddOptions(), Meddler())
    assert library.models() == []
    add(library, source, force=True)
    assert_good(library)


def test_the_library_is_no_source_of_its_own(library, tmp_path):
    for source in (tmp_path, library.path, library.path / "packs"):
        with pytest.raises(UsageError, match="contain one another"):
            add(library, source)


def test_a_disk_that_is_too_small_is_noticed_first(library, tmp_path, monkeypatch):
    source = make_model(tmp_path / "source")
    real = os.statvfs(tmp_path)

    class Small:
        f_bavail, f_frsize = 10, real.f_frsize

    monkeypatch.setattr(os, "statvfs", lambda _: Small)
    with pytest.raises(StorageError, match="--no-space-check"):
        add(library, source)
    add(library, source, space_check=False)
    assert_good(library)


# --- into, update, remove_source


def test_files_are_added_into_a_model(library, tmp_path):
    add(library, make_model(tmp_path / "base"))
    extra = tmp_path / "adapter.bin"
    extra.write_bytes(b"adapter" * 1000)
    add(library, extra, into=b"base/adapters")
    paths = [entry.path for entry in library.files("base")]
    assert b"adapters/adapter.bin" in paths
    assert len(paths) == 5
    with pytest.raises(UsageError, match="--update"):
        add(library, extra, into=b"base/adapters")
    extra.write_bytes(b"new")
    add(library, extra, into=b"base/adapters", update=True)
    assert_good(library)
    with pytest.raises(NotFoundError):
        add(library, extra, into=b"nosuch")


def test_update_reads_what_changed_and_keeps_the_rest(library, tmp_path):
    source = make_model(tmp_path / "source")
    add(library, source)
    before = {entry.path: entry for entry in library.files("source")}
    (source / "config.json").write_text('{"changed": true}')
    (source / "empty.txt").unlink()
    (source / "new.txt").write_text("new")
    report = add(library, source, update=True)
    assert report.unchanged_count == 2
    assert report.removed_count == 1
    after = {entry.path: entry for entry in library.files("source")}
    assert {os.fsdecode(p): e.sha256.hex() for p, e in after.items()} == digests(source)
    assert after[b"model.safetensors"].content == before[b"model.safetensors"].content
    assert after[b"config.json"].content != before[b"config.json"].content
    assert library.model("source").number == 1


def test_sources_are_removed_only_after_reading_back(library, tmp_path):
    source = make_model(tmp_path / "source")
    expected = digests(source)
    report = add(library, source, remove_source=True)
    assert report.removed_source_count == 4
    assert not source.exists()
    library.export("source", tmp_path / "out")
    assert digests(tmp_path / "out") == expected


def test_sources_behind_links_are_not_removed(library, tmp_path):
    source = make_model(tmp_path / "source")
    (source / "again").symlink_to("config.json")
    with pytest.raises(UsageError, match="is a link"):
        add(library, source, remove_source=True)
    assert (source / "model.safetensors").exists()


# --- removing, moving


def test_a_removed_model_is_gone_and_its_siblings_are_whole(library, tmp_path):
    add(library, make_model(tmp_path / "a"), name=b"org/a")
    add(library, make_model(tmp_path / "b", seed=5), name=b"org/b")
    report = library.remove("org/a")
    assert report.file_count == 4
    assert report.unreferenced_bytes > 1_000_000
    assert [model.name for model in library.models()] == [b"org/b"]
    assert library.lookup(b"org/a") is None
    assert_good(library)
    library.remove("org/b")
    assert library.lookup(b"org") is None
    assert library.list_directory(b"") == []


def test_a_file_of_a_model_is_removed(library, tmp_path):
    add(library, make_model(tmp_path / "a"))
    library.remove("a", [b"tokenizer", b"empty.txt"])
    assert [e.path for e in library.files("a")] == [b"config.json", b"model.safetensors"]
    with pytest.raises(NotFoundError):
        library.remove("a", [b"nosuch"])


def test_a_content_number_is_never_used_again(library, tmp_path):
    source = make_model(tmp_path / "a")
    add(library, source)
    old = {entry.content for entry in library.files("a")}
    library.remove("a")
    add(library, source)
    assert old.isdisjoint(entry.content for entry in library.files("a"))


@pytest.mark.parametrize(
    ("old", "new"), [(b"a", b"b"), (b"org/a", b"a"), (b"a", b"a/b"), (b"a/b", b"a")]
)
def test_a_model_is_renamed_with_its_inodes(library, tmp_path, old, new):
    add(library, make_model(tmp_path / "source"), name=old)
    contents = [entry.content for entry in library.files(old)]
    library.move(old, new)
    assert [model.name for model in library.models()] == [new]
    assert [entry.content for entry in library.files(new)] == contents
    assert_good(library)


def test_a_rename_does_not_overwrite(library, tmp_path):
    add(library, make_model(tmp_path / "a"))
    add(library, make_model(tmp_path / "b"))
    with pytest.raises(UsageError):
        library.move("a", "b")
    with pytest.raises(UsageError):
        library.move("a", "b/c")


# --- the tree


def test_the_tree_lists_folders_models_and_files(library, tmp_path):
    add(library, make_model(tmp_path / "a"), name=b"org/a")
    add(library, make_model(tmp_path / "b"), name=b"b")
    assert [name for name, _ in library.list_directory(b"")] == [b"b", b"org"]
    assert [name for name, _ in library.list_directory(b"org")] == [b"a"]
    listing = dict(library.list_directory(b"org/a"))
    assert sorted(listing) == [b"config.json", b"empty.txt", b"model.safetensors", b"tokenizer"]
    for name, node in listing.items():
        assert library.lookup(b"org/a/" + name) == node
    assert library.list_directory(b"org/a/config.json") is None
    assert library.lookup(b"org/nosuch") is None
    assert library.lookup(b"org/a/nosuch/deep") is None


def test_a_shared_content_keeps_the_first_mtime(library, tmp_path):
    first, second = make_model(tmp_path / "a"), make_model(tmp_path / "b")
    path = second / "model.safetensors"
    os.utime(path, ns=(5, 5))
    add(library, first)
    add(library, second)
    expected = (first / "model.safetensors").stat().st_mtime_ns
    assert library.lookup(b"b/model.safetensors").mtime_ns == expected
    [entry] = [e for e in library.files("b") if e.path == b"model.safetensors"]
    assert entry.mtime_ns == 5


def test_folder_mtimes_change_exactly_when_entries_change(tmp_path):
    clock = iter(range(1000, 2000))
    library = FragmentLibrary.create(tmp_path / "lib", now_ns=lambda: next(clock))
    source = make_model(tmp_path / "a")

    def mtimes():
        return [library.lookup(path).mtime_ns for path in (b"", b"org")]

    library.add([source], AddOptions(name=b"org/a"))
    first = mtimes()
    library.add([source], AddOptions(name=b"org/b"))
    second = mtimes()
    assert second[0] == first[0]
    assert second[1] > first[1]
    library.add([source], AddOptions(name=b"org/b", update=True))
    assert mtimes() == second
    library.remove("org/b")
    assert mtimes()[1] > second[1]
    library.close()
