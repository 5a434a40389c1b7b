"""Sections "add" and "read": into a library, and out of it through a mount."""

from __future__ import annotations

import filecmp
import os
import shutil
import statistics
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from fragfs.library.library import FragmentLibrary
from tools.bench.memory import drop_caches, pretouch, warm_cache
from tools.bench.models import Variant
from tools.bench.report import NOT_INSTALLED, Table
from tools.bench.setting import Setting
from tools.bench.workplace import (
    BenchError,
    Run,
    fragfs,
    has_fuse,
    mounted,
    new_library,
    run_child,
    run_timed,
)

__all__ = ["measure_add", "measure_read"]

_METHODS = {
    "read": "read(), 1 MiB",
    "mmap": "mmap, front to back",
    "load_file": "safetensors load_file",
}


# --- add


def measure_add(setting: Setting) -> list[Table]:
    """GB/s of the command `add`, beside sha256sum and cp."""
    models = [setting.variants[0], setting.transfer_model]
    names = [f"{setting.model_name}, {models[0].label}", "made up, bf16"]
    table = Table(
        "Add: GB/s of the whole command",
        ["", *(f"{n} ({m.size / 1e6:.0f} MB)" for n, m in zip(names, models, strict=True))],
        notes=[
            "Wall time from start to end of each process, medians. The source is in the page cache;"
            " a new model goes into an empty library, the copy into the library that has it. `add`"
            " ends when everything is on the disk (fsync); `cp` does not wait for that."
        ],
    )
    results = [_time_commands(model, setting) for model in models]
    for name, text in (
        ("new", "**fragfs add**, new model"),
        ("copy", "fragfs add, exact copy"),
        ("sha256sum", "sha256sum"),
        ("cp", "cp"),
    ):
        cells = []
        for model, runs, label in zip(models, results, ("model", "bf16"), strict=True):
            rate = model.size / statistics.median(run.seconds for run in runs[name])
            table.figures[f"add.{label}.{name}_rate"] = rate
            cells.append(f"{rate / 1e9:.2f}")
        table.add(text, *cells)
    peaks = []
    for runs, label in zip(results, ("model", "bf16"), strict=True):
        peak = max(run.peak_bytes for run in runs["new"])
        table.figures[f"add.{label}.peak_bytes"] = peak
        peaks.append(f"{peak / 1e6:.0f} MB")
    table.add("fragfs add, most resident memory", *peaks)
    return [table]


def _time_commands(model: Variant, setting: Setting) -> dict[str, list[Run]]:
    library = setting.place / "add.fragfs"
    target = setting.place / "copied"
    files = model.files

    def add(name: str) -> Run:
        return fragfs("add", *files, "--name", name, library=library)

    commands: dict[str, Callable[[], Run]] = {
        "new": lambda: add("model"),
        "copy": lambda: add("copy"),
        "sha256sum": lambda: run_timed("sha256sum", *files),
        "cp": lambda: run_timed("cp", *files, target),
    }
    # A copy can only follow its model; the others change places around the two.
    orders = (["sha256sum", "new", "copy", "cp"], ["cp", "new", "copy", "sha256sum"])
    runs: dict[str, list[Run]] = {name: [] for name in commands}
    for number in range(min(3, setting.rounds)):
        new_library(library)
        target.mkdir()
        for path in files:
            warm_cache(path)
        for name in orders[number % 2]:
            os.sync()
            pretouch(2 * model.size)
            runs[name].append(commands[name]())
        shutil.rmtree(target)
    shutil.rmtree(library)
    return runs


# --- read


def measure_read(setting: Setting) -> list[Table]:
    """GB/s of reading a file through a mount, beside the plain file."""
    if not has_fuse():
        return [
            Table("Read: this machine cannot mount (/dev/fuse or fusermount3 is missing)", [""])
        ]
    plain = setting.transfer_model.files[0]
    library = new_library(setting.place / "read.fragfs")
    fragfs("add", plain, "--name", "model", library=library)
    size = plain.stat().st_size
    table = Table(
        f"Read: GB/s of a bf16 file of {size / 1e6:.0f} MB",
        [
            "",
            "plain file, cached",
            "mount, first read",
            "of plain",
            "mount, second read",
            "of plain",
        ],
        notes=[
            "Each read is a new process; medians, and medians of the ratios within a round. First"
            " read: a mount started for it, so that every fragment is decoded, from packs in the"
            " page cache. Second read: the same mount again. The rates of decoding are of one"
            " process without a mount, all checks included."
        ],
    )
    for method, text in _METHODS.items():
        if method == "load_file" and (
            find_spec("safetensors") is None or find_spec("ml_dtypes") is None
        ):
            table.add(text, NOT_INSTALLED)
            continue
        _add_read_row(table, text, method, _time_reads(plain, library, method, setting.rounds))
    _add_decode_rows(table, library, size, setting.rounds)
    _compare(plain, library)
    shutil.rmtree(library)
    return [table]


def _time_reads(
    plain: Path, library: Path, method: str, rounds: int
) -> list[tuple[float, float, float]]:
    """(plain, first, second): bytes per second in each round."""
    found = []
    for number in range(min(3, rounds)):
        drop_caches()  # frees what the mounts before filled; what is read is cached again below
        warm_cache(plain)
        warm_cache(library)
        before = _rate(method, plain)
        with mounted(library) as mount:
            shown = mount.mountpoint / "model" / plain.name
            first = _rate(method, shown)
            second = _rate(method, shown)
        after = _rate(method, plain)
        found.append((after if number % 2 else before, first, second))
    return found


def _rate(method: str, *arguments: str | Path | int) -> float:
    result = run_child("reader", method, *arguments)
    return result["size"] / result["seconds"]


def _add_read_row(
    table: Table, text: str, method: str, rounds: list[tuple[float, float, float]]
) -> None:
    plain, first, second = (statistics.median(rates) for rates in zip(*rounds, strict=True))
    first_ratio = statistics.median(r[1] / r[0] for r in rounds)
    second_ratio = statistics.median(r[2] / r[0] for r in rounds)
    for key, value in (
        ("plain_rate", plain),
        ("first_rate", first),
        ("second_rate", second),
        ("first_ratio", first_ratio),
        ("second_ratio", second_ratio),
    ):
        table.figures[f"read.{method}.{key}"] = value
    table.add(
        text,
        f"{plain / 1e9:.2f}",
        f"{first / 1e9:.2f}",
        f"{first_ratio:.2f}",
        f"{second / 1e9:.2f}",
        f"{second_ratio:.2f}",
    )


def _add_decode_rows(table: Table, library: Path, size: int, rounds: int) -> None:
    with FragmentLibrary.open(library) as opened:
        content = opened.files("model")[0].content
    for threads in sorted({1, len(os.sched_getaffinity(0))}):
        rates = [_rate("decode", library, content, threads) for _ in range(min(3, rounds))]
        rate = statistics.median(rates)
        table.figures[f"read.decode.{threads}_rate"] = rate
        table.add(f"decoding alone, {threads} thread{'s' * (threads > 1)}", "", f"{rate / 1e9:.2f}")


def _compare(plain: Path, library: Path) -> None:
    with mounted(library) as mount:
        if not filecmp.cmp(plain, mount.mountpoint / "model" / plain.name, shallow=False):
            raise BenchError("the mounted file differs from the one that was added")
