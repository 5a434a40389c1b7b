"""`fragfs explain` and `fragfs estimate`: what they print, in text and JSON."""

import re

import numpy as np
import pytest
from safetensors.numpy import save_file

EXPLAIN_KEYS = set(
    "model path file_count logical_bytes unique_bytes stored_bytes exclusive_bytes shared_bytes"
    " base_bytes mechanisms bases dependents sharers closure_sizes packs tensors".split()
)
TENSOR_KEYS = set("file name kind dtype shape offset size stored_bytes mechanisms bases".split())
FRAGMENT_KEYS = set(
    "id index size raw_size stored_bytes mechanism pack offset closure_size model_count"
    " bases".split()
)
SHARE_KEYS = {"model", "fragment_count", "raw_bytes", "stored_bytes"}
ESTIMATE_KEYS = set(
    "file_count logical_bytes exact_bytes stored_bytes margin_bytes sampled_bytes mechanisms"
    " skipped warnings".split()
)


@pytest.fixture
def family(tmp_path):
    """A model and a fine-tune of it, in which the last tensor has another name."""
    rng = np.random.default_rng(1)
    base = {
        name: rng.standard_normal((200, 300), dtype=np.float32) * np.float32(0.02)
        for name in ("layers.0.up", "layers.1.up", "head")
    }
    tuned = {
        name: value + rng.standard_normal(value.shape, dtype=np.float32) * np.float32(1e-5)
        for name, value in base.items()
    }
    tuned["tail"] = tuned.pop("head")
    paths = []
    for name, tensors in (("base", base), ("tuned", tuned)):
        directory = tmp_path / "sources" / name
        directory.mkdir(parents=True)
        save_file(tensors, directory / "model.safetensors")
        (directory / "config.json").write_text("{}")
        paths.append(directory)
    return paths


def section(lines, title):
    """The rows below a title, without their head."""
    start = lines.index(title) + 2
    rows = []
    for line in lines[start:]:
        if not line.startswith("  "):
            break
        rows.append(line.strip())
    return rows


def test_a_model_is_explained(fragfs, family):
    fragfs("add", *family)
    result = fragfs("explain", "tuned")
    assert result.status == 0
    lines = result.lines
    assert lines[0] == "model  tuned"
    for word in ("holds", "logical", "unique", "stored", "exclusive", "shared", "bases"):
        assert any(line.startswith(f"{word} ") for line in lines), word
    (row,) = section(lines, "predicted from")
    assert row.endswith("  base")
    assert section(lines, "shared with")[0].endswith("  base")
    assert any("differences to similar pieces" in row for row in section(lines, "how it is stored"))
    assert [row.split()[0] for row in section(lines, "fragments that a read decodes")] == ["1", "2"]
    assert section(lines, "where it is")[0].endswith("  1")
    assert "base of" not in lines
    assert section(fragfs("explain", "base").lines, "base of")[0].endswith("  tuned")


def test_a_file_lists_its_tensors(fragfs, family):
    fragfs("add", *family)
    lines = fragfs("explain", "tuned/model.safetensors").lines
    assert lines[0] == "file  tuned/model.safetensors"
    rows = {line.split("  ")[-2].strip(): line for line in lines if line.endswith("  base")}
    assert any("layers.0.up F32 [200, 300]" in name for name in rows)
    # What another name has in the base says so.
    assert any(line.endswith("  base: head") and "tail F32 [200, 300]" in line for line in lines)
    assert any("(header)" in line for line in lines)


def test_fragments_are_listed_on_request(fragfs, family):
    fragfs("add", *family)
    lines = fragfs("explain", "tuned", "--fragments").lines
    assert "config.json" in lines
    assert "model.safetensors" in lines
    assert any("pack:offset" in line for line in lines)
    found = fragfs("explain", "tuned", "--fragments", "--json").json
    pieces = [piece for tensor in found["tensors"] for piece in tensor["fragments"]]
    assert {frozenset(piece) for piece in pieces} == {frozenset(FRAGMENT_KEYS)}
    assert sum(piece["stored_bytes"] for piece in pieces) == found["stored_bytes"]


def test_an_explanation_as_json(fragfs, family):
    fragfs("add", *family)
    found = fragfs("explain", "tuned", "--json").json
    assert found.keys() == EXPLAIN_KEYS
    assert (found["model"], found["path"], found["tensors"]) == ("tuned", None, [])
    assert [share.keys() for share in found["bases"]] == [SHARE_KEYS]
    stats = fragfs("stats", "tuned", "--json").json
    for key in ("stored_bytes", "exclusive_bytes", "shared_bytes", "base_bytes", "unique_bytes"):
        assert found[key] == stats[key], key
    assert stats["predicted_bytes"] == {"base": found["bases"][0]["raw_bytes"]}
    found = fragfs("explain", "tuned/model.safetensors", "--json").json
    assert found["path"] == "model.safetensors"
    assert all(tensor.keys() == TENSOR_KEYS for tensor in found["tensors"])
    (tail,) = [tensor for tensor in found["tensors"] if tensor["name"] == "tail"]
    assert (tail["dtype"], tail["shape"], tail["size"]) == ("F32", [200, 300], 240_000)
    assert [(base["model"], base["tensor"]) for base in tail["bases"]] == [("base", "head")]


def test_what_is_gone_is_named_as_such(fragfs, family):
    fragfs("add", *family)
    fragfs("rm", "base")
    lines = fragfs("explain", "tuned").lines
    assert section(lines, "predicted from")[0].endswith("  (no model any more)")
    found = fragfs("explain", "tuned", "--json").json
    assert [share["model"] for share in found["bases"]] == [None]
    assert found["exclusive_bytes"] == found["stored_bytes"] + found["base_bytes"]
    assert "(no model any more)" in fragfs("explain", "tuned/model.safetensors").text


def test_long_lists_are_cut_and_say_so(fragfs, make_model):
    for number in range(13):
        fragfs("add", make_model(f"m{number:02}"))
    lines = fragfs("explain", "m00").lines
    assert "  and 2 more; --json lists them all" in lines
    assert len(fragfs("explain", "m00", "--json").json["sharers"]) == 12


def test_explaining_what_is_not_there(fragfs, make_model):
    fragfs("add", make_model("minilm"))
    result = fragfs("explain", "minlm")
    assert (result.status, result.stdout) == (1, b"")
    assert "did you mean minilm?" in result.stderr
    assert "has no file x" in fragfs("explain", "minilm/x").stderr


# --- estimate


def test_an_estimate_says_what_it_is(run, fragfs, family, tmp_path):
    assert run("init", tmp_path / "fine", "--fragment-elements", "4096").status == 0
    result = run("--library", tmp_path / "fine", "estimate", *family)
    assert result.status == 0
    assert result.stderr == ""
    words = [line.split("  ")[0].rstrip() for line in result.lines[:4]]
    assert words == ["logical", "equal", "new", "to store"]
    assert ", estimated, ± " in result.lines[3]
    assert result.lines[5].split() == ["new", "to", "store", "by"]
    assert any("differences to similar pieces" in line for line in result.lines)
    assert re.match(r"from a sample of \d+ kB, \d+\.\d % of the new", result.lines[-1])
    assert run("--library", tmp_path / "fine", "ls").lines == []
    small = fragfs("estimate", family[0])
    assert small.lines[3].endswith(" of logical; all that is new was encoded")
    assert "from a sample" not in small.text


def test_an_estimate_as_json(fragfs, family):
    found = fragfs("estimate", "--json", *family).json
    assert found.keys() == ESTIMATE_KEYS
    assert found["file_count"] == 4
    assert found["exact_bytes"] == 2
    (library,) = [m for m in found["mechanisms"] if m["mechanism"] == "delta"]
    assert library["raw_bytes"] > 700_000
    reports = fragfs("add", "--json", *family).json["added"]
    new_bytes = sum(report["new_bytes"] for report in reports)
    assert found["stored_bytes"] == pytest.approx(new_bytes, rel=0.1)
    again = fragfs("estimate", "--json", *family).json
    assert again["exact_bytes"] == again["logical_bytes"]
    assert (again["stored_bytes"], again["mechanisms"]) == (0, [])
    assert re.search(r"^to store +0 B ", fragfs("estimate", *family).text, re.MULTILINE)


def test_an_estimate_mentions_what_an_add_would_leave_out(fragfs, make_model):
    directory = make_model("one")
    (directory / ".git").mkdir()
    (directory / "model.safetensors.index.json").write_text('{"weight_map": {"w": "gone"}}')
    result = fragfs("estimate", directory)
    assert "left out: 1 file; --json lists them" in result.lines
    assert "warning: model.safetensors.index.json names 1 file(s) that are not there" in (
        result.stderr
    )
    assert fragfs("estimate", "--json", directory).json["skipped"][0]["path"] == ".git"


def test_an_estimate_of_what_is_not_there(fragfs, tmp_path):
    result = fragfs("estimate", tmp_path / "nothing")
    assert result.status == 2
    assert "does not exist" in result.stderr
    assert fragfs("estimate").status == 2
