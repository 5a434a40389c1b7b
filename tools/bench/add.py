"""Section "add": into a library."""

from __future__ import annotations

import os
import shutil
import statistics
from collections.abc import Callable

from tools.bench.memory import pretouch, warm_cache
from tools.bench.models import Variant
from tools.bench.report import Table
from tools.bench.setting import Setting
from tools.bench.workplace import Run, fragfs, new_library, run_timed

__all__ = ["measure_add"]


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
