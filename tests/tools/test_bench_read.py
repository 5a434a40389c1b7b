"""The pure parts of the section "read", its readers, and its servers."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tools.bench import read, servers
from tools.bench.models import read_tensors, write_safetensors
from tools.bench.pages import drop_pages, resident_share
from tools.bench.processes import MARK, anon_bytes, cpu_seconds, end, marked
from tools.bench.read_models import make_fine_tune, make_transformer, transformer_specs
from tools.bench.read_report import READ_METHODS, ReadFacts, report
from tools.bench.reader import METHODS, natural_key
from tools.bench.reader_host import reader_host
from tools.bench.samples import Sample, Samples
from tools.bench.setting import Setting
from tools.bench.touches import percentile, touch_count
from tools.bench.workplace import BenchError, has_fuse

FACTS = ReadFacts(100, 4, "torch", 128, 1024, ("A note.",))
WHOLE = sorted(METHODS.keys() - {"load", "processes", "walk", "open"})


def filled(**rates):
    """Samples of one round each: state_method=seconds for 100 bytes."""
    samples = Samples()
    for name, seconds in rates.items():
        state, _, method = name.rpartition("_")
        samples.add(state, method, 0, Sample(seconds, 100))
    return samples


# --- samples


def test_ratios_are_of_the_same_round():
    samples = Samples()
    for number, (ours, theirs) in enumerate([(1.0, 2.0), (10.0, 20.0), (5.0, 2.5)]):
        samples.add("a", "read", number, Sample(ours, 100))
        samples.add("c", "read", number, Sample(theirs, 100))
    samples.add("a", "read", 3, Sample(1e-9, 100))  # nothing to compare it with
    assert samples.ratio(("a", "read"), ("c", "read")) == 2.0
    assert samples.ratio(("a", "read"), ("c", "mmap")) is None
    assert samples.rate("c", "read") == 40.0
    assert samples.rate("c", "mmap") is None


def test_touches_are_compared_by_their_medians():
    samples = Samples()
    samples.add("a", "touch", 0, Sample(1, 1, p50=1e-6, p99=1e-5))
    samples.add("c", "touch", 0, Sample(1, 1, p50=1e-5, p99=1e-4))
    assert samples.ratio_of_p50(("a", "touch"), ("c", "touch")) == pytest.approx(0.1)
    assert samples.p99("c", "touch") == 1e-4


def test_a_bound_is_the_sum_of_what_else_was_measured():
    samples = filled(cold_processes=5.0, disk_processes=2.0, decode_decode=2.5)
    parts = [(1.0, ("disk", "processes")), (1.2, ("decode", "decode"))]
    assert samples.share_of_bound(("cold", "processes"), parts) == 1.0
    parts.append((1.0, ("none", "none")))
    assert samples.share_of_bound(("cold", "processes"), parts) is None


def test_percentiles_are_values_that_occurred():
    values = list(range(1, 101))
    assert percentile(values, 0.5) == 50
    assert percentile(values, 0.99) == 99
    assert percentile([7.0], 0.99) == 7.0
    assert touch_count(0) == 1024
    assert touch_count(1 << 30) == 8192


# --- tables


def test_the_report_names_what_is_measured_and_what_is_not():
    samples = filled(disk_read=1.0, c_read=4.0, a_read=2.0, decode_decode=1.0, c_wide_read=4.0)
    samples.add("a_wide", "read", 0, Sample(1.0, 100))
    samples.add("a", "touch", 0, Sample(1, 1, p50=1e-6, p99=1e-5))
    tables = {table.title.partition(":")[2].strip(): table for table in report(samples, FACTS)}
    figures = {name: value for table in tables.values() for name, value in table.figures.items()}
    assert figures["read.read.a_of_c"] == 2.0
    assert figures["read.read.a_of_disk"] == 0.5
    assert figures["read.read.a_wide_of_c_wide"] == 4.0
    assert figures["read.touch.a_p99_s"] == 1e-5
    assert "read.read.warm_of_disk" not in figures
    assert any("A note." in table.notes for table in tables.values())
    for table in tables.values():
        assert table.markdown().count("\n| ") > 1


def test_counters_become_costs():
    samples = Samples()
    counters = {"reads": 3, "decodes": 4, "bytes_decoded": 110, "pushed_bytes": 50}
    sample = Sample(1.0, 100, cpu_s=2.0, anon_bytes=7_000_000, counters=counters)
    samples.add("cold", "processes", 0, sample)
    figures = {}
    for table in report(samples, FACTS):
        figures |= table.figures
    assert figures["read.processes.cold_reads"] == 3
    assert figures["read.processes.cold_decoded_of_returned"] == 1.1
    assert figures["read.processes.cold_cpu_s_per_byte"] == 0.02
    assert figures["read.processes.cold_anon_bytes"] == 7_000_000
    assert figures["read.processes.decodes_each"] == 1


def test_every_reader_has_a_row():
    assert METHODS.keys() - READ_METHODS.keys() == {"walk", "open"}
    assert READ_METHODS.keys() <= METHODS.keys()


# --- models


def test_the_model_has_the_size_asked_for_and_layers_enough_to_be_out_of_order():
    specs = transformer_specs(512 << 20)
    assert sum(spec[3] for spec in specs) == pytest.approx(512 << 20, rel=0.05)
    names = [spec[0] for spec in specs]
    assert names == sorted(names)
    assert names != sorted(names, key=natural_key)


def test_natural_order_counts():
    assert sorted(["l.10.w", "l.2.w", "l.2.b"], key=natural_key) == ["l.2.b", "l.2.w", "l.10.w"]


def test_a_fine_tune_moves_most_weights_a_little(tmp_path):
    base = make_transformer(tmp_path / "base.safetensors", 4 << 20)
    tuned = make_fine_tune(base, tmp_path / "tuned.safetensors")
    assert tuned.stat().st_size == base.stat().st_size
    for one, other in zip(read_tensors(base), read_tensors(tuned), strict=True):
        assert (one.name, one.shape) == (other.name, other.shape)
    wide = [
        (np.frombuffer(max(read_tensors(path), key=lambda t: len(t.raw)).raw, "<u2").astype("<u4"))
        << 16
        for path in (base, tuned)
    ]
    first, second = (values.view("<f4") for values in wide)
    assert 0.01 < np.mean(first != second) < 0.99
    assert np.abs(first - second).max() < 0.02


# --- readers


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    specs = [(f"l.{i}.w", "BF16", (300_000,), 600_000) for i in range(12)]
    rng = np.random.default_rng(1)
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    return write_safetensors(path, specs, (rng.bytes(600_000) for _ in specs))


@pytest.mark.parametrize("method", WHOLE)
def test_a_reader_reads_everything(model, method):
    in_tensors = method in ("names", "natural", "shuffled")
    assert METHODS[method](model) == (7_200_000 if in_tensors else model.stat().st_size)


@pytest.mark.slow
def test_a_host_forks_readers_and_says_what_failed(model):
    with reader_host() as host:
        result = host.run("touch", model, 0)
        assert 0 < result["p50"] <= result["p99"]
        assert result["size"] == 4096 * 1024
        with pytest.raises(BenchError, match="FileNotFoundError"):
            host.run("read", model.with_name("none"), 0)
        assert host.run("read", model, 0)["size"] == model.stat().st_size
        if host.loader is not None:
            assert host.run("processes", model, 0)["size"] == 4 * model.stat().st_size


def test_small_files_are_counted(tmp_path):
    for name in "ab":
        write_safetensors(tmp_path / name / "m.safetensors", [("w", "U8", (2,), 2)], [b"12"])
    assert METHODS["walk"](tmp_path) == METHODS["open"](tmp_path) == 2


# --- processes and pages


def test_processes_are_found_by_their_environment():
    code = "import os, time; os.fork(); print(flush=True); time.sleep(60)"
    value = f"test-{os.getpid()}"
    words = [sys.executable, "-S", "-c", code]
    process = subprocess.Popen(words, env={MARK: value}, stdout=subprocess.PIPE)
    assert process.stdout.read(2) == b"\n\n"
    found = marked(value)
    assert len(found) == 2
    assert process.pid in found
    assert anon_bytes(found) > 0
    assert cpu_seconds(found) >= 0
    end(found, wait_s=0)
    process.communicate()
    assert marked(value) == []
    assert (cpu_seconds(found), anon_bytes(found)) == (0, 0)


def test_pages_of_a_file_are_seen_and_dropped(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(4 << 20))
    assert resident_share(path) == 1.0
    with path.open("rb") as file:
        os.fsync(file.fileno())
    assert drop_pages(path) == resident_share(path) < 0.01


# --- servers


def test_numbers_are_found_in_a_status_of_any_depth():
    status = {"pid": 5, "reads": 2, "library": "/l", "cache": None}
    status["prefill"] = {"pid": 6, "pushed_bytes": 7, "in_memory": True}
    assert servers.flat_numbers(status) == {"pid": 5, "reads": 2, "pushed_bytes": 7}


@pytest.mark.slow
@pytest.mark.mount
@pytest.mark.skipif(not has_fuse(), reason="no /dev/fuse or no fusermount3")
def test_the_server_in_c_shows_the_file_and_counts(tmp_path, model):
    program = servers.build_c_server(tmp_path)
    if not isinstance(program, Path):
        pytest.skip(program)
    with servers.serve_with_c(program, model) as server:
        shown = server.mountpoint / "file"
        assert shown.read_bytes() == model.read_bytes()
        status = server.status()
        assert status["pid"] in server.processes()
        assert status["bytes_returned"] == model.stat().st_size
        assert shown.read_bytes() == model.read_bytes()
        assert server.status() == status  # pages are kept over opens
        assert drop_pages(shown) < 0.01
        with pytest.raises(FileNotFoundError):
            (server.mountpoint / "other").stat()
        with pytest.raises(OSError, match="Read-only"):
            shown.open("r+b")
    assert not os.path.ismount(server.mountpoint)
    assert not Path(f"/proc/{status['pid']}").exists()


def test_a_server_that_does_not_mount_says_why(tmp_path):
    with (
        pytest.raises(BenchError, match="usage"),
        servers.serve_with_c(servers.build_c_server(tmp_path), tmp_path / "none"),
    ):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["c_server"]


@pytest.mark.slow
@pytest.mark.mount
@pytest.mark.skipif(not has_fuse(), reason="no /dev/fuse or no fusermount3")
def test_a_tiny_run_reads_through_mounts_and_leaves_none(tmp_path, monkeypatch):
    states = frozenset({"disk", "c", "a", "b", "warm"})
    monkeypatch.setattr(read, "METHODS", {"read": states, "touch": frozenset({"a"})})
    monkeypatch.setattr(read, "WIDE_METHODS", ("read",))
    monkeypatch.setattr(servers, "_SETTLE_S", 0)  # nobody looks at the figures
    before = set(servers.SHARED_MEMORY.glob("fragfs-bench-*"))
    tables = read.measure_read(Setting(tmp_path, rounds=1, read_bytes=8 << 20))
    figures = {name: value for table in tables for name, value in table.figures.items()}
    assert figures["read.read.warm_of_disk"] > 0
    assert figures["read.read.b_of_decode"] > 0
    assert figures["read.touch.cold_small_p99_s"] > 0
    assert list(tmp_path.iterdir()) == []
    assert str(tmp_path) not in Path("/proc/mounts").read_text()
    assert set(servers.SHARED_MEMORY.glob("fragfs-bench-*")) <= before
