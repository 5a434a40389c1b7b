"""`fragfs check`, as people and scripts see it."""

import shutil

from fragfs.library.library import FragmentLibrary
from tests.library.checks import flip_fragment, write_catalog


def damage(path):
    with FragmentLibrary.open(path) as library:
        entry = library.files("one")[1]
        number = library.open_content(entry.content).extents[1].fragment
        flip_fragment(library, number)
        return library.fragment(number)


def test_a_sound_library(fragfs, make_model):
    fragfs("add", make_model("one"))
    result = fragfs("check")
    assert (result.status, result.stderr) == (0, "")
    assert result.text.startswith("checked 1 pack, ")
    assert result.text.endswith(", 2 files: sound\n")
    assert "decoded: sound" in fragfs("check", "--data").text
    assert fragfs("check", "--quiet").stdout == b""
    report = fragfs("check", "--json", "--data").json
    assert report["ok"] is True
    assert (report["problems"], report["notes"], report["repaired"]) == ([], [], [])
    assert report["rebuilt"] is None
    assert report["decoded_count"] == report["fragment_count"]


def test_damage_is_said_with_file_place_and_remedy(fragfs, make_model):
    fragfs("add", make_model("one"))
    meta = damage(fragfs.library)
    result = fragfs("check")
    assert result.status == 1
    first, file, remedy, closing = result.lines
    assert first.startswith(f"lost: fragment {meta.id.short} in pack 1 at offset {meta.offset}: ")
    assert file == "  file    one/model.safetensors"
    assert remedy.startswith("  to do   restore the pack from a backup, or add a model")
    assert closing.endswith("1 PROBLEM")
    assert fragfs("check", "--quiet").lines == result.lines[:3]
    (problem,) = fragfs("check", "--json").json["problems"]
    assert problem["kind"] == "lost"
    assert problem["files"] == [{"model": "one", "path": "model.safetensors"}]
    assert problem["fragments"] == [meta.id.hex()]
    assert problem["offset"] == meta.offset
    assert problem["path"].endswith("packs/0000000001.pack")


def test_repair_and_adding_again(fragfs, make_model):
    source = make_model("one")
    fragfs("add", source)
    damage(fragfs.library)
    result = fragfs("check", "--repair")
    assert result.status == 1
    assert "repaired: 1 damaged fragments are in quarantine now\n" in result.text
    assert fragfs("add", source, "--update", "--checksum").status == 0
    assert fragfs("check", "--data").status == 0
    assert fragfs("verify").status == 0


def test_rebuild(fragfs, make_model):
    fragfs("add", make_model("one"), make_model("two", 2))
    listing = fragfs("ls", "-l").stdout
    write_catalog(fragfs.library, "UPDATE contents SET size = 1")
    result = fragfs("check")
    assert result.status == 1
    assert result.text.startswith("catalog: ")
    assert "fragfs check --rebuild" in result.text
    result = fragfs("check", "--rebuild", "--data")
    assert result.status == 0
    assert result.text.startswith("rebuilt the catalog: 2 models, 4 files, ")
    assert "catalog.old-1.sqlite" in result.text
    assert fragfs("ls", "-l").stdout == listing
    (fragfs.library / "catalog.sqlite").unlink()
    result = fragfs("ls")
    assert result.status == 1
    assert "check --rebuild" in result.stderr
    report = fragfs("check", "--rebuild", "--json").json
    assert report["ok"] is True
    assert report["rebuilt"]["model_count"] == 2
    assert report["rebuilt"]["kept"] == []
    assert fragfs("verify").status == 0


def test_rebuild_and_repair_exclude_each_other(fragfs):
    assert fragfs("check", "--repair", "--rebuild").status == 2


def test_a_library_that_is_not_there(run, tmp_path):
    result = run("--library", tmp_path / "none", "check", "--rebuild")
    assert result.status == 1
    assert "no packs" in result.stderr
    shutil.rmtree(tmp_path / "none", ignore_errors=True)
