"""`fragfs gc`: what it does, prints and keeps."""

import os
import re

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fragfs.library.library import FragmentLibrary

KEYS = {
    "dry_run",
    "dropped_count",
    "dropped_bytes",
    "freed_bytes",
    "leased_bytes",
    "leases",
    "recent_bytes",
    "base_bytes",
    "base_users",
    "kept_packs",
}


@pytest.fixture
def filled(fragfs, make_model, tmp_path):
    """A library that a model and a base were removed from."""
    gone, base = make_model("gone", seed=9), make_model("base")
    weights = load_file(base / "model.safetensors")["layer.weight"]
    noise = np.random.default_rng(9).standard_normal(weights.size, dtype=np.float32)
    tuned = tmp_path / "sources" / "tuned"
    tuned.mkdir()
    save_file({"layer.weight": weights + noise * np.float32(1e-5)}, tuned / "model.safetensors")
    for path in (gone, base, tuned):
        assert fragfs("add", path).status == 0
    assert fragfs("rm", "gone", "base").status == 0
    return fragfs


def pack_bytes(fragfs):
    return sum(path.stat().st_size for path in (fragfs.library / "packs").iterdir())


def test_it_says_what_went_and_what_stays(filled):
    before = pack_bytes(filled)
    result = filled("gc")
    assert (result.status, result.stderr) == (0, "")
    dropped, disk, stays = result.lines
    assert re.fullmatch(r"dropped \d+ fragments that nothing needs: \d+ kB", dropped)
    assert re.fullmatch(r"  on disk   \d+ kB less", disk)
    assert re.fullmatch(
        r"  stays     \d+ kB of removed models that others are predicted from: tuned \(\d+ kB\);"
        r" it goes when they do, or when fragfs optimize finds other bases",
        stays,
    )
    assert pack_bytes(filled) < before - 100_000
    assert filled("verify").status == 0
    assert filled("gc").lines[:2] == [
        "dropped 0 fragments that nothing needs: 0 B",
        "  on disk   no change",
    ]


def test_a_dry_run_says_what_would_go(filled):
    before = pack_bytes(filled)
    dropped, disk, stays = filled("gc", "--dry-run").lines
    assert dropped.startswith("would drop ")
    assert re.fullmatch(r"  on disk   about \d+ kB less", disk)
    assert pack_bytes(filled) == before
    assert filled("gc").lines[0] == dropped.replace("would drop", "dropped")
    assert "predicted from: tuned" in stays


def test_as_json(filled):
    before = pack_bytes(filled)
    found = filled("gc", "--json").json
    assert found.keys() == KEYS
    assert found["freed_bytes"] == before - pack_bytes(filled) > 0
    assert found["base_users"] == [{"model": "tuned", "stored_bytes": found["base_bytes"]}]
    assert (found["leases"], found["kept_packs"], found["dry_run"]) == ([], [], False)
    assert filled("gc", "--dry-run", "--json").json["dry_run"] is True


def test_quiet(filled):
    result = filled("--quiet", "gc")
    assert (result.status, result.stdout) == (0, b"")


def test_it_names_who_keeps_what(filled):
    with FragmentLibrary.open(filled.library) as library, library.hold_lease("nightly job"):
        result = filled("gc", "--json")
        [lease] = result.json["leases"]
        assert (lease["process"], lease["what"]) == (os.getpid(), "nightly job")
        assert lease["kept_bytes"] == result.json["leased_bytes"] > 100_000
        assert result.json["dropped_count"] == 0
        lines = filled("gc").lines
    expected = f" for process {os.getpid()} (nightly job), which may need anything while it lasts"
    assert lines[2].startswith("  stays     ")
    assert lines[2].endswith(expected)
    assert filled("gc", "--json").json["leases"] == []


def test_an_open_file_is_named(filled, make_model):
    assert filled("add", make_model("open", seed=4)).status == 0
    with (
        FragmentLibrary.open(filled.library) as library,
        library.open_file("open", "model.safetensors") as stream,
    ):
        assert filled("rm", "open").status == 0
        lines = filled("gc").lines
        assert any(
            line.endswith(f" for process {os.getpid()} (program reading a file), which has it open")
            for line in lines
        )
        assert len(stream.read()) > 100_000


def test_what_an_interrupted_add_stored(filled, make_model):
    source = make_model("late", seed=5)
    assert filled("add", source).status == 0
    assert filled("rm", "late").status == 0
    with FragmentLibrary.open(filled.library) as library:
        last = library._catalog.next_number("fragments") - 1
        with library._writer.batch() as batch:
            batch.commit(
                lambda connection: connection.execute(
                    "INSERT INTO unpublished VALUES (?, ?, ?)", (last, last, 1 << 62)
                )
            )
    lines = filled("gc").lines
    assert any(
        "of an add that was interrupted" in line and line.endswith("fragfs gc --grace 0")
        for line in lines
    )
    assert filled("gc", "--json").json["recent_bytes"] > 0
    assert filled("gc", "--grace", "0", "--json").json["recent_bytes"] == 0


@pytest.mark.parametrize("arguments", [["--grace", "-1"], ["--grace", "soon"], ["extra"]])
def test_wrong_arguments(fragfs, arguments):
    assert fragfs("gc", *arguments).status == 2


def test_no_library(run, tmp_path):
    result = run("--library", tmp_path / "none", "gc")
    assert result.status != 0
    assert "no fragfs library" in result.stderr
