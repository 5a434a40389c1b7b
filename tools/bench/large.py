"""Section "large": memory while a large model is added, and while it is served."""

from __future__ import annotations

import shutil
from pathlib import Path

from tools.bench.memory import drop_caches, watch_memory
from tools.bench.models import make_normal_bf16
from tools.bench.report import Table
from tools.bench.setting import Setting
from tools.bench.workplace import fragfs, has_fuse, mounted, new_library, run_child

__all__ = ["measure_large"]


def measure_large(setting: Setting) -> list[Table]:
    """Add a bf16 model of many GB, and read all of it twice through mounts."""
    path = make_normal_bf16(setting.place / "large" / "model.safetensors", setting.large_bytes)
    size = path.stat().st_size
    library = new_library(setting.place / "large.fragfs")
    table = Table(
        f"Large: a bf16 file of {size / 1e9:.1f} GB",
        ["", "GB/s", "most memory"],
        notes=[
            "Memory of `add` is all that is resident; of the daemon, RssAnon, looked at every"
            " 10 ms while everything is read through a new mount. Nothing is cached beforehand."
        ],
    )
    drop_caches()
    run = fragfs("add", path, "--name", "model", library=library)
    table.figures["large.add_rate"] = size / run.seconds
    table.figures["large.add_peak_bytes"] = run.peak_bytes
    table.add("fragfs add", f"{size / run.seconds / 1e9:.2f}", f"{run.peak_bytes / 1e6:.0f} MB")
    if has_fuse():
        _add_reads(table, library, path.name)
    else:
        table.notes.append("This machine cannot mount: /dev/fuse or fusermount3 is missing.")
    shutil.rmtree(library)
    path.unlink()
    return [table]


def _add_reads(table: Table, library: Path, name: str) -> None:
    peaks = []
    for method, text in (("mmap", "mmap, front to back"), ("read", "read(), 1 MiB")):
        drop_caches()
        with mounted(library) as mount:
            shown = mount.mountpoint / "model" / name
            with watch_memory(mount.pid) as peak:
                result = run_child("reader", method, shown)
        rate = result["size"] / result["seconds"]
        peaks.append(peak.anon)
        table.figures[f"large.{method}_rate"] = rate
        table.add(text, f"{rate / 1e9:.2f}", f"{peak.anon / 1e6:.0f} MB")
    table.figures["large.daemon_anon_bytes"] = max(peaks)
