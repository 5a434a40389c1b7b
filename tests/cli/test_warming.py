"""`warm`, and what `mount`, `stats` and `doctor` say of one mount; most of it needs a real one."""

import json
import os
import subprocess

import pytest

from fragfs.cli import warming
from fragfs.mount.table import find_mount
from fragfs.mount.warm import WarmReport
from tests.cli.test_mounting import mountpoint, mounts  # noqa: F401 - a fixture

# --- without a mount


def test_without_a_mount_the_error_has_the_remedy(fragfs, make_model, tmp_path):
    fragfs("add", make_model("one"))
    result = fragfs("warm", "one")
    assert result.status == 1
    assert "is mounted nowhere, or not for you; mount it: fragfs mount" in result.stderr
    result = fragfs("warm", "one", "--mountpoint", tmp_path)
    assert result.status == 1
    assert f"no fragfs library is mounted on {tmp_path}; mount it: fragfs mount" in result.stderr


def test_what_is_to_be_warmed_has_to_be_there(fragfs, make_model):
    fragfs("add", make_model("one"))
    assert "has no file none" in fragfs("warm", "one/none").stderr
    assert "no model named two" in fragfs("warm", "two").stderr
    result = fragfs("warm", "one", "--check", "--evict")
    assert result.status == 2
    assert "exclude each other" in result.stderr


def test_what_memory_cannot_hold_is_said_before_and_after(capfd, monkeypatch):
    report = WarmReport(1, 900, 400, 500)
    monkeypatch.setattr("fragfs.mount.warm.measure_need", lambda _: (900, 400))
    monkeypatch.setattr("fragfs.mount.warm.warm_files", lambda *_: report)
    assert warming._warm(warming.Session(quiet=True), []) is report
    lines = capfd.readouterr().err.splitlines()
    assert lines[0].startswith("fragfs: warning: 900 B are to be read and memory has room for 400")
    assert lines[1].startswith("fragfs: 500 B are left out")


# --- with one


@mounts
def test_a_model_is_warmed_checked_and_evicted(fragfs, make_model, mountpoint):  # noqa: F811
    fragfs("add", make_model("one"), make_model("two", 2))
    options = ["--model", "one", "--cache", "64M"]
    said = fragfs("mount", mountpoint, "--json", *options)
    assert (said.status, said.stderr) == (0, "")
    assert said.json["mountpoint"] == os.fspath(mountpoint)
    assert said.json["read_ahead_kb"] == find_mount(mountpoint).read_ahead_kb
    assert os.path.isdir(said.json["cache_directory"])
    assert os.path.isdir(f"/proc/{said.json['pid']}")

    cold = fragfs("warm", "--check", "one")
    assert cold.status == 1
    assert cold.lines[0].split() == ["in", "memory", "size", "file"]
    assert [line.split()[-1] for line in cold.lines[1:]] == [
        "one/config.json",
        "one/model.safetensors",
    ]

    warmed = fragfs("warm", "one", "--mountpoint", mountpoint)
    assert (warmed.status, warmed.stderr) == (0, "")
    assert warmed.text == f"warmed 2 files, 200 kB, on {mountpoint}\n"
    result = fragfs("warm", "--check", "--json", "one/model.safetensors")
    assert result.status == 0
    assert result.json["complete"] is True
    (found,) = result.json["mounts"]
    (file,) = found["files"]
    assert (file["name"], file["error"]) == ("one/model.safetensors", None)
    assert file["pages"] == file["resident_pages"] == 49
    assert fragfs("warm", "--json", "one").json["mounts"][0]["read_bytes"] > 200_000

    evicted = fragfs("warm", "--evict", "one")
    assert evicted.status == 0
    assert evicted.lines[-1].startswith("    0.0 %") or "0.0 %" in evicted.lines[-1]
    assert fragfs("warm", "--check", "one").status == 1

    hidden = fragfs("warm", "two")
    assert hidden.status == 1
    assert "does not show two/config.json" in hidden.stderr
    partly = fragfs("warm", "one", "two")
    assert partly.status == 0
    assert "warning: " in partly.stderr

    (seen,) = fragfs("stats", "--json").json["mounts"]
    assert seen["mountpoint"] == os.fspath(mountpoint)
    assert seen["cache"]["bytes_held"] > 200_000
    assert any(line.startswith("cached ") for line in fragfs("stats").lines)
    assert fragfs("stats", "--json", "one").json["mounts"] == []

    result = fragfs("doctor", mountpoint, "--json")
    assert result.status == 0, result.text
    severities = {f["topic"]: f["severity"] for f in result.json["findings"] if f["mountpoint"]}
    assert severities["answers"] == severities["cache"] == severities["decoders"] == "ok"
    assert result.json["mounts"][0]["status"]["pid"] == said.json["pid"]
    shown = fragfs("doctor", mountpoint)
    assert shown.lines[0] == "this machine"
    assert os.fspath(mountpoint) in shown.lines
    assert "fragfs doctor --loaders" in shown.lines[-1]
    assert fragfs("umount", mountpoint).status == 0


@mounts
def test_a_dead_mount_is_found_and_cleared(fragfs, make_model, mountpoint):  # noqa: F811
    fragfs("add", make_model("one"))
    said = fragfs("mount", mountpoint, "--json", "--cache", "0")
    assert said.json["cache_directory"] is None
    subprocess.run(["kill", "-KILL", str(said.json["pid"])], check=True)
    result = fragfs("doctor", mountpoint, "--quiet")
    assert result.status == 1
    assert "problem  answers  no: its process is gone" in result.text
    fixed = fragfs("doctor", mountpoint, "--fix")
    assert (fixed.status, fixed.stderr) == (0, "")
    assert fixed.lines[0] == f"fixed: cleared the dead mount on {mountpoint}"
    assert find_mount(mountpoint) is None
    gone = fragfs("doctor", mountpoint)
    assert gone.status == 1
    assert f"no fragfs library is mounted on {mountpoint}" in gone.stderr


# --- doctor, rendered


@pytest.fixture
def nothing_mounted(monkeypatch):
    monkeypatch.setattr("fragfs.mount.doctor.reachable_mounts", list)


@pytest.mark.usefixtures("nothing_mounted")
def test_doctor_without_mounts(run):
    result = run("doctor")
    assert "no fragfs library is mounted; mount one: fragfs mount MOUNTPOINT" in result.text
    result = run("doctor", "--loaders", "--quiet")
    for loader in ("vLLM", "SGLang", "transformers", "llama.cpp", "ComfyUI", "fastsafetensors"):
        assert loader in result.text
    shown = json.loads(run("doctor", "--json").stdout)
    assert shown.keys() == {"has_problem", "findings", "repairs", "system", "mounts", "loaders"}
    assert shown["mounts"] == []
    assert shown["system"]["memory_bytes"] > 0
