"""`fragfs optimize`: what it prints."""

import os

import numpy as np
import pytest
from safetensors.numpy import save_file

from fragfs.library.library import FragmentLibrary

KEYS = {
    "examined_count",
    "changed_count",
    "before_bytes",
    "after_bytes",
    "freed_bytes",
    "leased_bytes",
    "kept_packs",
}


@pytest.fixture
def filled(fragfs, make_model):
    """A library whose base came after its narrow copy, and that a model was removed from."""
    gone = make_model("gone", seed=9)
    narrow, base = make_model("narrow"), make_model("base")
    rng = np.random.default_rng(1)
    weights = {"layer.weight": rng.standard_normal(50_000, dtype=np.float32) * 0.02}
    save_file(
        {name: value.astype(np.float16) for name, value in weights.items()},
        narrow / "model.safetensors",
    )
    assert fragfs("add", gone, narrow, base).status == 0
    assert fragfs("rm", "gone").status == 0
    return fragfs


def pack_bytes(fragfs):
    return sum(path.stat().st_size for path in (fragfs.library / "packs").iterdir())


def test_it_says_what_it_did(filled):
    before = pack_bytes(filled)
    result = filled("optimize")
    assert result.status == 0
    assert result.stderr == ""
    lines = result.lines
    assert lines[0].startswith("examined ")
    assert ", changed " in lines[0]
    assert lines[1].split()[0] == "before"
    assert lines[2].split()[0] == "after"
    assert lines[3].split()[:2] == ["on", "disk"]
    assert lines[3].endswith(" less")
    assert pack_bytes(filled) < before - 100_000
    assert filled("verify").status == 0


def test_as_json(filled):
    before = pack_bytes(filled)
    result = filled("optimize", "--json")
    assert result.status == 0
    found = result.json
    assert found.keys() == KEYS
    assert found["freed_bytes"] == before - pack_bytes(filled) > 0
    assert found["after_bytes"] <= found["before_bytes"]
    assert (found["leased_bytes"], found["kept_packs"]) == (0, [])
    again = filled("optimize", "--json").json
    assert (again["changed_count"], again["freed_bytes"]) == (0, 0)


@pytest.mark.parametrize("level", ["fast", "balanced", "small"])
def test_levels(filled, level):
    assert filled("optimize", "--level", level, "--workers", "1").status == 0
    assert filled("verify").status == 0


@pytest.mark.parametrize(
    "arguments", [["--level", "tiny"], ["--workers", "0"], ["--workers", "x"], ["model"]]
)
def test_wrong_arguments(fragfs, arguments):
    result = fragfs("optimize", *arguments)
    assert result.status == 2
    assert result.stdout == b""


def test_quiet(filled):
    result = filled("--quiet", "optimize")
    assert (result.status, result.stdout, result.stderr) == (0, b"", "")


def test_an_empty_library(fragfs):
    result = fragfs("optimize")
    assert result.status == 0
    assert result.lines[0] == "examined 0 fragments, changed 0"


def test_no_library(run, tmp_path):
    result = run("--library", tmp_path / "none", "optimize")
    assert result.status != 0
    assert "no fragfs library" in result.stderr


def test_what_a_lease_keeps_is_a_warning(filled):
    with FragmentLibrary.open(filled.library) as library, library.hold_lease():
        result = filled("optimize", "--json")
    assert result.status == 0
    assert result.json["leased_bytes"] > 100_000
    assert "warning" in result.stderr
    assert "see who with: fragfs gc --dry-run" in result.stderr
    assert filled("optimize", "--json").json["leased_bytes"] == 0


def test_a_damaged_pack_is_a_warning(filled):
    with FragmentLibrary.open(filled.library) as library:
        [entry] = [e for e in library.files("base") if e.path == b"model.safetensors"]
        extents = library.open_content(entry.content).extents
        metadata = library.fragment(extents[len(extents) - 1].fragment)
    path = filled.library / "packs" / f"{metadata.pack:010d}.pack"
    with path.open("r+b") as stream:
        stream.seek(metadata.offset + metadata.record_size - 40)
        byte = stream.read(1)[0]
        stream.seek(-1, os.SEEK_CUR)
        stream.write(bytes([byte ^ 1]))
    result = filled("optimize", "--json")
    assert result.status == 0
    [kept] = result.json["kept_packs"]
    assert kept["pack"] == metadata.pack
    assert f"offset {metadata.offset}" in kept["why"]
    assert f"pack {metadata.pack} was left as it is" in result.stderr
    assert filled("verify").status != 0
