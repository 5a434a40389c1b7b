"""The benchmark's own parts, and one tiny run of it."""

import json
import subprocess
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from fragfs.types import Dtype
from tools.bench.codec import MemoryRecords, Rates, cut, measure_rates, store
from tools.bench.memory import watch_memory
from tools.bench.models import (
    cast_f32,
    make_normal_bf16,
    make_normal_f32,
    read_tensors,
    variants_of,
    write_safetensors,
)
from tools.bench.report import Table, Target, describe_machine, list_targets
from tools.bench.workplace import (
    BenchError,
    fragfs,
    new_library,
    run_timed,
    tree_size,
    workspace,
)

ROOT = Path(__file__).parents[2]


def test_a_table_becomes_markdown():
    table = Table("Title", ["", "one"], notes=["A note."])
    table.add("row", "1.00")
    table.add("short")
    assert table.markdown().splitlines() == [
        "### Title",
        "",
        "|       |  one |",
        "| :---- | ---: |",
        "| row   | 1.00 |",
        "| short |      |",
        "",
        "A note.",
    ]


def test_a_target_is_met_on_its_own_side_of_the_bound():
    assert Target("x", "", 1.0).is_met(1.0)
    assert not Target("x", "", 1.0).is_met(1.1)
    assert Target("x", "", 1.0, at_least=True).is_met(1.1)
    assert not Target("x", "", 1.0, at_least=True).is_met(0.9)


def test_targets_list_only_what_was_measured():
    table = list_targets({"storage.bf16.fragfs": 0.7, "limits.open_s": 0.004, "other": 1.0})
    assert [row[2:] for row in table.rows] == [["0.7", "NO"], ["4 ms", "yes"]]


def test_the_machine_is_described(tmp_path):
    machine = describe_machine(tmp_path)
    assert all(machine.values())
    assert {"date", "command", "processor", "kernel", "python", "packages"} <= machine.keys()


def test_written_tensors_are_read_back(tmp_path):
    specs = [("a", "F32", (2, 3), 24), ("empty", "U8", (0,), 0), ("b", "I64", (), 8)]
    raws = [bytes(range(24)), b"", bytes(8)]
    path = write_safetensors(tmp_path / "sub" / "x.safetensors", specs, raws)
    found = [(t.name, t.dtype, t.shape, len(t.raw)) for t in read_tensors(path)]
    assert sorted(found) == sorted(specs)
    assert {t.name: bytes(t.raw) for t in read_tensors(path)}["a"] == raws[0]


def test_casts_round_as_the_libraries_do():
    values = np.random.default_rng(1).standard_normal(4096, np.float32)
    values[:4] = [np.inf, -np.inf, 0.0, 1e30]
    ties = (np.arange(512, dtype=np.uint32) << 15 | 0x3F800000).view(np.float32)
    raw = memoryview(np.concatenate([values, ties]).tobytes())
    floats = np.frombuffer(raw, np.float32)
    assert cast_f32(raw, "BF16") == floats.astype(ml_dtypes.bfloat16).tobytes()
    with np.errstate(over="ignore"):
        assert cast_f32(raw, "F16") == floats.astype(np.float16).tobytes()


def test_a_nan_stays_one():
    raw = memoryview(np.array([0x7F800001, 0xFFFFFFFF], np.uint32).tobytes())
    cast = np.frombuffer(cast_f32(raw, "BF16"), ml_dtypes.bfloat16)
    assert np.isnan(cast.astype(np.float32)).all()


def test_variants_cast_what_is_f32_and_nothing_else(tmp_path):
    specs = [("w", "F32", (4,), 16), ("ids", "I64", (2,), 16)]
    path = write_safetensors(tmp_path / "m.safetensors", specs, [bytes(16), bytes(range(16))])
    variants = variants_of((path,), tmp_path / "variants")
    assert [variant.label for variant in variants] == ["f32", "bf16", "f16"]
    cast = {tensor.name: tensor for tensor in read_tensors(variants[1].files[0])}
    assert (cast["w"].dtype, len(cast["w"].raw)) == ("BF16", 8)
    assert bytes(cast["ids"].raw) == bytes(range(16))


def test_a_model_without_f32_is_measured_as_it_is(tmp_path):
    path = make_normal_bf16(tmp_path / "m.safetensors", 1 << 20)
    variants = variants_of((path,), tmp_path)
    assert [(variant.label, variant.files) for variant in variants] == [("as it is", (path,))]


def test_made_up_weights_are_of_the_size_asked_for_and_no_two_matrices_alike(tmp_path):
    path = make_normal_bf16(tmp_path / "m.safetensors", 70 << 20)
    first, second, third = read_tensors(path)
    assert len(first.raw) + len(second.raw) + len(third.raw) == 70 << 20
    assert bytes(first.raw[: 1 << 20]) != bytes(second.raw[: 1 << 20])
    values = np.frombuffer(first.raw, ml_dtypes.bfloat16)[:65536].astype(np.float32)
    assert 0.018 < values.std() < 0.026  # mantissas are evenly spread, those of 0.02 are not


def test_pieces_are_cut_as_a_library_cuts_them():
    pieces = cut([(bytes(5 << 20), Dtype.F32)])
    assert [len(raw) for raw, _ in pieces] == [2 << 20, 2 << 20, 1 << 20]
    assert [len(raw) for raw, _ in cut([(bytes(10), Dtype.BF16)], 4)] == [4, 4, 2]


def test_records_in_memory_are_checked_as_in_a_library():
    from fragfs.errors import IntegrityError
    from fragfs.library.decode import NO_SOURCE

    raw = cast_f32(memoryview(np.linspace(1, 2, 9000, dtype=np.float32).tobytes()), "BF16")
    memory = MemoryRecords()
    memory.append(store(raw, Dtype.BF16))
    assert memory.decoder().decode(0, NO_SOURCE) == raw
    damaged = bytearray(memory.records[0])
    damaged[-1] ^= 1
    memory.records[0] = bytes(damaged)
    with pytest.raises(IntegrityError):
        memory.decoder().decode(0, NO_SOURCE)


def test_rates_are_medians_and_ratios_belong_to_rounds():
    rates = Rates(100, {"a": [1.0, 2.0, 4.0], "b": [2.0, 2.0, 2.0], "none": []})
    assert rates.rate("a") == 50
    assert rates.ratio("a", "b") == 1
    assert rates.rate("missing") is None
    assert rates.ratio("a", "missing") is None


@pytest.mark.slow
def test_everything_that_is_compared_is_timed_in_every_round():
    raw = np.random.default_rng(1).standard_normal(1 << 16, np.float32).tobytes()
    rates = measure_rates([raw], "F32", rounds=2)
    assert {"add", "encode", "read", "decode"} <= rates.seconds.keys()
    assert all(len(seconds) == 2 for seconds in rates.seconds.values())
    assert rates.rate("read") > 0


def test_the_workspace_is_gone_after_an_error(tmp_path):
    def fail():
        with workspace(tmp_path) as place:
            (place / "file").write_bytes(b"x")
            raise BenchError

    with pytest.raises(BenchError):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_a_command_is_timed_and_its_own_memory_counted():
    code = "import sys; x = bytearray(200_000_000); sys.stdout.write('no JSON')"
    run = run_timed(sys.executable, "-S", "-c", code)
    assert 200e6 < run.peak_bytes < 260e6
    assert run.seconds > 0
    # What this process has must not count: it has more than an idle interpreter.
    held = bytearray(100_000_000)
    assert run_timed(sys.executable, "-S", "-c", "pass").peak_bytes < 60e6
    assert len(held) == 100_000_000


def test_a_failed_command_says_why():
    with pytest.raises(BenchError, match="it broke"):
        run_timed(sys.executable, "-c", "raise SystemExit('it broke')")


def test_the_peak_of_a_process_is_seen():
    code = "import time; x = bytearray(100_000_000); print(flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-S", "-c", code], stdout=subprocess.PIPE)
    try:
        assert process.stdout.readline()
        with watch_memory(process.pid) as peak:
            deadline = time.monotonic() + 20
            while not peak.samples and time.monotonic() < deadline:
                time.sleep(0.001)
        assert 100e6 < peak.anon <= peak.resident < 200e6
    finally:
        process.kill()
        process.communicate()


@pytest.mark.slow
def test_a_library_is_made_and_filled_by_the_real_command(tmp_path):
    path = make_normal_f32(tmp_path / "m.safetensors", 4 << 20)
    library = new_library(tmp_path / "library")
    empty = tree_size(library)
    assert fragfs("add", path, "--name", "m", library=library).peak_bytes > 0
    assert 2 << 20 < tree_size(library) - empty < 4 << 20


@pytest.mark.slow
def test_a_tiny_run_prints_tables_and_leaves_nothing(tmp_path):
    make_normal_f32(tmp_path / "model" / "m.safetensors", 4 << 20)
    place = tmp_path / "work"
    place.mkdir()
    options = ["--model", tmp_path / "model", "--directory", place, "--json", tmp_path / "json"]
    options += ["--rounds", "1", "--section", "storage", "--section", "codec"]
    words = [sys.executable, "-m", "tools.bench", *map(str, options)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "### Storage" in done.stdout
    assert "### Codec" in done.stdout
    assert "| **fragfs**, records" in done.stdout
    document = json.loads((tmp_path / "json").read_text())
    assert 0.5 < document["figures"]["storage.bf16.fragfs"] < 0.72
    assert document["figures"]["codec.bf16.read_rate"] > 0
    assert list(place.iterdir()) == []
