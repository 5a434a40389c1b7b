"""Every command against a real library: what it prints, in text and JSON, and what it does."""

import hashlib
import os
import re
import shutil
import subprocess
from contextlib import closing

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fragfs.library.library import FragmentLibrary

MODEL_KEYS = {"name", "file_count", "logical_bytes", "stored_bytes", "added_ns", "mtime_ns"}
FILE_KEYS = {"path", "size", "stored_bytes", "sha256", "mode", "mtime_ns", "verdict"}
ADD_KEYS = set(
    "models file_count logical_bytes new_bytes reused_bytes saved_bytes unchanged_count"
    " removed_count removed_source_count skipped verdicts healed warnings".split()
)
STATS_KEYS = set(
    "library model model_count file_count logical_bytes unique_bytes stored_bytes exclusive_bytes"
    " shared_bytes base_bytes fragment_count shared_fragment_count unreferenced_bytes disk_bytes"
    " saved_bytes predicted_bytes mounts".split()
)


def tree_of(directory):
    return {
        path.relative_to(directory): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in directory.rglob("*")
        if path.is_file()
    }


def damage_packs(library):
    """Flip a bit of every byte of the packs past their first 4 KiB and before their last."""
    for pack in (library / "packs").glob("*.pack"):
        data = bytearray(pack.read_bytes())
        middle = slice(len(data) // 3, len(data) // 2)
        data[middle] = bytes(byte ^ 1 for byte in data[middle])
        pack.chmod(0o644)
        pack.write_bytes(data)


# --- init


def test_init_says_where(run, tmp_path):
    result = run("init", tmp_path / "a" / "library")
    assert result.text == f"created library {tmp_path}/a/library\n"
    assert result.stderr == ""


def test_init_warns_on_a_network_file_system(run, tmp_path, monkeypatch):
    monkeypatch.setattr("fragfs.library.filesystem.network_kind", lambda path: "nfs4")
    result = run("init", tmp_path / "library")
    assert result.status == 0
    assert "is on a network file system (nfs4)" in result.stderr
    assert "keep the library on a local disk" in result.stderr


def test_init_keeps_its_settings(run, tmp_path):
    options = ["--fragment-elements", "4096", "--zstd-level", "3", "--closure-max", "1"]
    assert run("init", tmp_path / "library", *options).status == 0
    result = run("init", tmp_path / "other", "--fragment-elements", "5000")
    assert result.status == 2
    assert "power of two" in result.stderr
    assert not (tmp_path / "other").exists()


def test_init_never_touches_what_is_there(run, tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("mine")
    result = run("init", tmp_path / "taken")
    assert result.status == 2
    assert "is not empty" in result.stderr
    assert os.listdir(tmp_path / "taken") == ["file"]


# --- add


def test_add_reports_what_was_stored(fragfs, make_model):
    result = fragfs("add", make_model("one"))
    assert result.status == 0
    assert result.lines[0].startswith("added one: 2 files, 200 kB")
    assert result.lines[1].startswith("  stored    ")
    assert any("by byte planes" in line for line in result.lines)
    assert result.stderr == ""


def test_add_of_equal_bytes_stores_nothing(fragfs, make_model):
    fragfs("add", make_model("one"))
    report = fragfs("add", "--json", make_model("two")).json["added"][0]
    assert report.keys() == ADD_KEYS
    assert report["models"] == ["two"]
    assert report["file_count"] == 2
    assert report["reused_bytes"] == report["logical_bytes"] == report["saved_bytes"]["exact"]
    assert report["new_bytes"] < 500


def test_each_directory_becomes_a_model_with_a_report(fragfs, make_model):
    result = fragfs("add", make_model("one", 1), make_model("two", 2))
    assert [line.split(":")[0] for line in result.lines if line.startswith("added")] == [
        "added one",
        "added two",
    ]
    assert fragfs("ls").lines == ["one", "two"]


def test_names_of_models(fragfs, make_model, monkeypatch):
    directory = make_model("one")
    assert fragfs("add", directory, "--name", "org/name").status == 0
    monkeypatch.chdir(directory)
    assert fragfs("add", ".").status == 0
    assert fragfs("ls").lines == ["one", "org/name"]
    result = fragfs("add", directory, directory, "--name", "x")
    assert result.status == 2
    assert "--name goes with one path" in result.stderr


def test_add_into_a_model(fragfs, make_model, tmp_path):
    fragfs("add", make_model("one"))
    extra = tmp_path / "notes.txt"
    extra.write_text("hello")
    result = fragfs("add", extra, "--into", "one/docs/")
    assert result.status == 0
    assert fragfs("ls", "one").lines == ["config.json", "docs/notes.txt", "model.safetensors"]
    lost = fragfs("add", extra)
    assert lost.status == 2
    assert "--name" in lost.stderr


def test_update_reads_what_changed(fragfs, make_model):
    directory = make_model("one")
    fragfs("add", directory)
    assert fragfs("add", directory).status == 2
    (directory / "config.json").write_text("changed")
    result = fragfs("add", directory, "--update")
    assert result.status == 0
    assert any(line == "  unchanged 1 file, not read again" for line in result.lines)
    (directory / "config.json").unlink()
    result = fragfs("add", directory, "--update")
    assert any(line == "  removed   1 file gone from the source" for line in result.lines)
    assert fragfs("ls", "one").lines == ["model.safetensors"]


def test_remove_source(fragfs, make_model):
    directory = make_model("one")
    result = fragfs("add", directory, "--remove-source")
    assert result.status == 0
    assert "  deleted   2 source files" in result.lines
    assert not directory.exists()
    assert fragfs("verify").status == 0


def test_a_truncated_model_file_is_refused_or_forced(fragfs, make_model):
    directory = make_model("one")
    weights = directory / "model.safetensors"
    os.truncate(weights, weights.stat().st_size - 100)
    result = fragfs("add", directory)
    assert result.status == 1
    assert "model.safetensors" in result.stderr
    assert fragfs("ls").lines == []
    assert fragfs("add", directory, "--force").status == 0


def test_what_is_left_out_is_listed(fragfs, make_model):
    directory = make_model("one")
    (directory / ".git").mkdir()
    (directory / ".git" / "config").write_text("x")
    result = fragfs("add", directory)
    assert any(line.startswith("  skipped   .git") for line in result.lines)
    for number in range(30):
        (directory / f"{number}.lock").write_text("")
    result = fragfs("add", directory, "--name", "many")
    skipped = [line for line in result.lines if line.startswith("  skipped ")]
    assert len(skipped) == 21
    assert skipped[-1] == "  skipped   and 11 more; --json lists them all"
    report = fragfs("add", directory, "--name", "more", "--json").json["added"][0]
    assert len(report["skipped"]) == 31


def test_add_needs_a_library_that_exists(run, make_model, tmp_path):
    result = run("--library", tmp_path / "none", "add", make_model("one"))
    assert result.status == 1
    assert "create one with: fragfs init" in result.stderr


def test_add_of_what_is_not_there(fragfs, tmp_path):
    result = fragfs("add", tmp_path / "nothing")
    assert result.status in (1, 2)
    assert str(tmp_path / "nothing") in result.stderr


# --- ls


def test_ls_lists_models_files_and_folders(fragfs, make_model):
    fragfs("add", make_model("one"))
    fragfs("add", make_model("two", 2), "--name", "org/two")
    assert fragfs("ls").lines == ["one", "org/two"]
    assert fragfs("ls", "org").lines == ["org/two"]
    assert fragfs("ls", "org/two").lines == ["config.json", "model.safetensors"]
    assert fragfs("ls", "org/two/config.json").lines == ["config.json"]


def test_ls_long_shows_sizes(fragfs, make_model):
    fragfs("add", make_model("one"))
    header, line = fragfs("ls", "-l").lines
    assert header.split() == ["files", "logical", "stored", "added", "model"]
    assert line.split()[:3] == ["2", "200", "kB"]
    assert line.endswith("  one")
    header, config, weights = fragfs("ls", "-l", "one").lines
    assert header.split() == ["size", "stored", "modified", "file"]
    assert config.endswith("config.json")
    assert weights.split()[:2] == ["200", "kB"]


def test_ls_json(fragfs, make_model):
    directory = make_model("one")
    fragfs("add", directory)
    listing = fragfs("ls", "--json").json
    assert listing["library"] == str(fragfs.library)
    assert [model.keys() for model in listing["models"]] == [MODEL_KEYS]
    listing = fragfs("ls", "--json", "one").json
    assert listing["model"] == "one"
    assert [file.keys() for file in listing["files"]] == [FILE_KEYS, FILE_KEYS]
    for file in listing["files"]:
        source = directory / file["path"]
        assert file["sha256"] == hashlib.sha256(source.read_bytes()).hexdigest()
        assert file["mtime_ns"] == source.stat().st_mtime_ns
        assert file["size"] == source.stat().st_size


def test_ls_of_an_empty_library(fragfs):
    assert fragfs("ls").stdout == b""
    assert fragfs("ls", "--json").json["models"] == []


@pytest.mark.parametrize("command", [["ls"], ["stats"], ["verify"], ["rm"], ["export"], ["mv"]])
def test_a_name_that_is_not_there_gets_a_suggestion(
    fragfs, make_model, tmp_path, monkeypatch, command
):
    monkeypatch.chdir(tmp_path)
    fragfs("add", make_model("minilm"))
    extra = ["new"] if command[0] in ("export", "mv") else []
    result = fragfs(*command, "minlm", *extra)
    assert result.status == 1
    assert "no model named minlm" in result.stderr
    if command[0] != "mv":
        assert "did you mean minilm?" in result.stderr


def test_names_are_bytes(fragfs, make_model):
    directory = make_model("one")
    odd = b"caf\xe9 \xf0\x9f\xa6\x99"
    (directory / os.fsdecode(odd)).write_text("x")
    fragfs("add", directory, "--name", os.fsdecode(b"m\xff"))
    assert fragfs("ls").stdout == b"m\xff\n"
    assert odd in fragfs("ls", os.fsdecode(b"m\xff")).stdout.split(b"\n")
    assert fragfs("rm", os.fsdecode(b"m\xff/" + odd)).status == 0
    assert odd not in fragfs("ls", os.fsdecode(b"m\xff")).stdout


# --- stats


def test_stats(fragfs, make_model):
    fragfs("add", make_model("one"), make_model("two"))
    stats = fragfs("stats", "--json").json
    assert stats.keys() == STATS_KEYS
    assert (stats["model_count"], stats["file_count"], stats["model"]) == (2, 4, None)
    assert stats["saved_bytes"]["exact"] == stats["logical_bytes"] - stats["unique_bytes"]
    assert fragfs("stats", "--json", "two").json["exclusive_bytes"] == 0
    text = fragfs("stats").text
    for word in ("library", "logical", "unique", "stored", "fragments", "on disk"):
        assert f"\n{word} " in f"\n{text}"
    assert "2 models, 4 files" in text
    assert "model      two" in fragfs("stats", "two").text


# --- export, verify


def test_export_gives_back_the_same_files(fragfs, make_model, tmp_path):
    directory = make_model("one")
    fragfs("add", directory)
    result = fragfs("export", "one", tmp_path / "back")
    assert result.status == 0
    assert result.text.startswith("exported one to ")
    assert tree_of(tmp_path / "back") == tree_of(directory)
    again = fragfs("export", "one", tmp_path / "back")
    assert again.status == 2
    assert "not an empty directory" in again.stderr


def test_verify_says_so(fragfs, make_model):
    fragfs("add", make_model("one"), make_model("two", 2))
    assert fragfs("verify").text == "verified 4 files, 400 kB: all as they were added\n"
    assert fragfs("verify", "one", "--quiet").stdout == b""
    report = fragfs("verify", "--json").json
    assert (report["file_count"], report["failed_count"]) == (4, 0)
    assert all(file["ok"] and file["error"] is None for file in report["files"])


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="sha256sum is not installed")
def test_sums_are_what_sha256sum_reads(fragfs, make_model, tmp_path):
    directory = make_model("one")
    (directory / "new\nline\\").write_text("x")
    (directory / "return\r").write_text("y")
    fragfs("add", directory)
    sums = fragfs("verify", "one", "--sha256sum").stdout
    for where, model in ((directory, "one"), (directory.parent, None)):
        sums = fragfs("verify", *([model] if model else []), "--sha256sum").stdout
        done = subprocess.run(["sha256sum", "-c", "--strict"], input=sums, cwd=where, check=False)
        assert done.returncode == 0
        assert sums.count(b"\n") == 4


def test_verify_goes_on_after_an_interruption(fragfs, make_model, monkeypatch):
    fragfs("add", make_model("one"), make_model("two", 2))
    result = fragfs("verify", "--resume")
    assert result.status == 0
    assert "nothing to resume" in result.stderr
    real = FragmentLibrary.verify

    def interrupted(self, *arguments):
        with closing(real(self, *arguments)) as verified:
            yield next(verified)
            raise KeyboardInterrupt

    monkeypatch.setattr(FragmentLibrary, "verify", interrupted)
    assert fragfs("verify", "--workers", "1").status == 130
    monkeypatch.setattr(FragmentLibrary, "verify", real)
    report = fragfs("verify", "--resume", "--json").json
    assert (report["file_count"], report["resumed_count"]) == (4, 1)
    assert fragfs("verify", "--resume", "--json").json["resumed_count"] == 0


def test_verify_names_what_is_damaged(fragfs, make_model):
    fragfs("add", make_model("one"))
    damage_packs(fragfs.library)
    result = fragfs("verify")
    assert result.status == 1
    assert "fragfs: one/model.safetensors: " in result.stderr
    assert "pack" in result.stderr
    assert "FAILED" in result.text
    report = fragfs("verify", "--json").json
    (failed,) = [file for file in report["files"] if not file["ok"]]
    assert failed["path"] == "model.safetensors"
    assert failed["error"]["remedy"]
    assert len(failed["error"]["fragment"]) == 64
    sums = fragfs("verify", "--sha256sum")
    assert sums.status == 1
    assert b"config.json" in sums.stdout
    assert b"model.safetensors" not in sums.stdout


def test_json_and_sums_exclude_each_other(fragfs):
    assert fragfs("verify", "--json", "--sha256sum").status == 2


# --- rm, mv


def test_rm_of_a_model_says_what_stays(fragfs, make_model):
    directory = make_model("two")
    fragfs("add", make_model("one"), directory)
    result = fragfs("rm", "one")
    assert result.status == 0
    assert result.lines[0] == "removed one: 2 files, 200 kB"
    assert result.lines[1] == "0 B are needed by no model any more"
    assert fragfs("ls").lines == ["two"]
    report = fragfs("rm", "two", "--json").json
    size = sum(len(data) for data, _ in tree_of(directory).values())
    assert report["removed"] == [
        {
            "model": "two",
            "file_count": 2,
            "removed_bytes": size,
            "kept_bytes": 0,
            "kept_for": [],
        }
    ]
    assert report["unreferenced_bytes"] > 10_000


def test_rm_names_the_command_that_frees_space(fragfs, make_model):
    fragfs("add", make_model("one"))
    result = fragfs("rm", "one")
    assert len(result.lines) == 2
    assert result.lines[1].endswith(" are needed by no model any more; free them with: fragfs gc")


def test_rm_says_who_is_predicted_from_what_is_removed(fragfs, make_model, tmp_path):
    directory = make_model("base")
    fragfs("add", directory)
    weights = load_file(directory / "model.safetensors")["layer.weight"]
    rng = np.random.default_rng(9)
    for number in range(7):
        tuned = tmp_path / "sources" / f"tuned-{number}"
        tuned.mkdir()
        noise = rng.standard_normal(weights.size, dtype=np.float32) * np.float32(1e-5)
        save_file({"layer.weight": weights + noise}, tuned / "model.safetensors")
        fragfs("add", tuned)
    result = fragfs("rm", "base")
    assert result.status == 0
    removed, stays, freed = result.lines
    assert removed == "removed base: 2 files, 200 kB"
    assert re.match(
        r"  stays     \d+ kB that others are predicted from: tuned-\d \(\d+ kB\), ", stays
    )
    assert stays.count("tuned-") == 5
    assert stays.endswith(
        " and 2 more; it goes when they do, or when fragfs optimize finds other bases"
    )
    assert "are needed by no model any more; free them with: fragfs gc" in freed
    assert fragfs("verify").status == 0
    report = fragfs("rm", "tuned-0", "--json").json["removed"][0]
    assert report["kept_bytes"] == sum(user["stored_bytes"] for user in report["kept_for"]) == 0


def test_rm_of_files_and_directories(fragfs, make_model):
    directory = make_model("one")
    (directory / "onnx").mkdir()
    (directory / "onnx" / "a").write_text("a")
    (directory / "onnx" / "b").write_text("b")
    fragfs("add", directory)
    result = fragfs("rm", "one/onnx", "one/config.json")
    assert result.lines[0].startswith("removed from one: 3 files")
    assert fragfs("ls", "one").lines == ["model.safetensors"]


def test_rm_looks_everything_up_first(fragfs, make_model):
    fragfs("add", make_model("one"))
    for missing in ("two", "one/missing", "one/config.json/x"):
        result = fragfs("rm", "one", missing)
        assert result.status == 1
        assert "fragfs: " in result.stderr
        assert fragfs("ls").lines == ["one"]
    assert "model one has no file missing" in fragfs("rm", "one/missing").stderr


def test_mv(fragfs, make_model):
    fragfs("add", make_model("one"))
    assert fragfs("mv", "one", "org/new").text == "renamed one to org/new\n"
    assert fragfs("ls").lines == ["org/new"]
    fragfs("add", make_model("two", 2))
    assert fragfs("mv", "two", "org/new").status == 2
    assert fragfs("mv", "two", "org").status == 2
    assert fragfs("mv", "two", "../x").status == 2
    assert fragfs("ls").lines == ["org/new", "two"]


# --- quiet


@pytest.mark.parametrize(
    "command", [["mv", "one", "two"], ["rm", "one"], ["verify"], ["export", "one", "back"]]
)
def test_quiet_commands_say_nothing(fragfs, make_model, tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    fragfs("add", make_model("one"))
    result = fragfs("-q", *command)
    assert (result.status, result.stdout, result.stderr) == (0, b"", "")


def test_quiet_add(fragfs, make_model):
    result = fragfs("add", "--quiet", make_model("one"))
    assert (result.status, result.stdout, result.stderr) == (0, b"", "")
