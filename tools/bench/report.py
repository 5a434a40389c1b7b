"""What a run prints: the machine, and tables in Markdown with their figures for programs."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["NOT_INSTALLED", "TARGETS", "Table", "Target", "describe_machine", "list_targets"]

NOT_INSTALLED = "not installed"

_PACKAGES = ("fragfs", "numpy", "zstandard", "pyfuse3", "safetensors", "zipnn")


@dataclass
class Table:
    """One table of a report.

    Attributes:
        title: Its heading.
        columns: Heads of the columns; the first column is text, the others are figures.
        rows: Cells, as printed.
        notes: What must be known to read it, one paragraph each.
        figures: The same for programs: name to value, in bytes, seconds, bytes per second or
            ratios.
    """

    title: str
    columns: list[str]
    rows: list[list[str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    figures: dict[str, float] = field(default_factory=dict)

    def add(self, *cells: str) -> None:
        """Append a row; missing cells at its end are empty."""
        self.rows.append([*cells, *[""] * (len(self.columns) - len(cells))])

    def markdown(self) -> str:
        """The table as it goes into a README."""
        widths = [
            max(3, *(len(cells[index]) for cells in [self.columns, *self.rows]))
            for index in range(len(self.columns))
        ]
        rule = [":" + "-" * (widths[0] - 1), *("-" * (width - 1) + ":" for width in widths[1:])]
        lines = [f"### {self.title}", ""]
        for cells in [self.columns, rule, *self.rows]:
            first = cells[0].ljust(widths[0])
            others = [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
            lines.append("| " + " | ".join([first, *others]) + " |")
        for note in self.notes:
            lines += ["", note]
        return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class Target:
    """What a figure is meant to be.

    Attributes:
        figure: Its name in the tables' figures.
        text: What it is, for the report.
        limit: The bound, in the figure's unit.
        at_least: True if more is better.
        scale: The figure is printed divided by this.
        unit: What then follows it.
    """

    figure: str
    text: str
    limit: float
    at_least: bool = False
    scale: float = 1
    unit: str = ""

    def is_met(self, value: float) -> bool:
        """Whether a measured value is within the bound."""
        return value >= self.limit if self.at_least else value <= self.limit


TARGETS = (
    Target("storage.bf16.fragfs", "bf16 weights, records / raw", 0.670),
    Target("storage.f32.fragfs", "f32 weights, records / raw", 0.835),
    Target("storage.f16.fragfs", "f16 weights, records / raw", 0.85),
    *(
        Target(
            f"codec.{dtype}.decode_ratio{key}",
            f"{dtype} decode with checks / zipnn's of {pieces}",
            0.85,
            at_least=True,
        )
        for dtype in ("bf16", "f32", "f16")
        for key, pieces in (("", "whole tensors"), ("_1m", "1 MiB pieces"))
    ),
    Target("large.add_peak_bytes", "memory of a large add", 1e9, scale=1e6, unit=" MB"),
    Target("large.daemon_anon_bytes", "RssAnon of the daemon", 300e6, scale=1e6, unit=" MB"),
    Target("limits.scalar_bytes", "disk per scalar tensor", 100, unit=" bytes"),
    Target("limits.open_s", "open a file of 28,000 fragments", 0.010, scale=1e-3, unit=" ms"),
    *(
        Target(f"read.{figure}", text, limit, at_least=True)
        for figure, text, limit in (
            ("mmap.warm_of_disk", "warm mmap / plain file", 0.97),
            ("read.warm_of_disk", "warm read() / plain file", 0.97),
            *(
                (f"{method}.a{wide}_of_c{wide}", f"switch A{setting}, {text} / C server", limit)
                for wide, setting in (("", ""), ("_wide", ", 512 KiB ahead"))
                for method, text, limit in (
                    ("mmap", "mmap front to back", 4.0),
                    ("sequential", "MADV_SEQUENTIAL", 15.0),
                    ("shuffled", "tensors at random", 2.0),
                    ("read", "read()", 1.0),
                    ("populate", "MAP_POPULATE", 1.0),
                    ("load", "safetensors", 1.15),
                )
            ),
            ("mmap.a_of_disk", "switch A, mmap front to back / plain file", 0.8),
            ("load.a_of_disk", "switch A, safetensors / plain file", 0.65),
            ("mmap.b_of_c", "switch B, mmap front to back / C server", 2.0),
            ("mmap.b_of_decode", "switch B, mmap front to back / decoding alone", 0.8),
            ("mmap.cold_of_decode", "cold mmap front to back / decoding alone", 0.8),
            ("read.cold_of_decode", "cold read() / decoding alone", 0.8),
            ("threads.cold_of_one", "cold, 4 threads / one", 1.0),
            ("threads.a_of_one", "switch A, 4 threads / one", 1.0),
            ("backwards.cold_of_forwards", "cold, last to first / first to last", 0.5),
        )
    ),
    *(
        Target(f"read.{method}.warm_reads", f"warm {text}, READs", 0)
        for method, text in (("load", "safetensors"), ("read", "read()"), ("mmap", "mmap"))
    ),
    *(
        Target(f"read.{method}.cold_decoded_of_returned", f"cold {text}, decoded / returned", 1.1)
        for method, text in (("read", "read()"), ("mmap", "mmap front to back"))
    ),
    Target("read.touch.a_of_c_p50", "switch A, touch p50 / C server", 0.1),
    *(
        Target(f"read.touch.{state}_p99_s", f"touch p99, {text}", limit, scale=1e-3, unit=" ms")
        for state, text, limit in (
            ("cold", "cold bf16", 0.005),
            ("cold_f32", "cold f32", 0.012),
            ("cold_small", "cold `small`", 0.012),
        )
    ),
    Target("read.processes.share_of_bound", "4 processes cold / (plain + 1.2 decodes)", 1.0),
    Target("read.processes.decodes_each", "4 processes cold, decodes / fragments", 1.0),
    Target("read_many.open.cold_s", "open 10,000 files, cold", 30, unit=" s"),
    Target("read_many.walk.cold_s", "walk 10,000 files, cold", 2, unit=" s"),
    Target("read_many.walk.again_s", "walk 10,000 files again", 0.3, unit=" s"),
)


def list_targets(figures: dict[str, float]) -> Table:
    """The targets that a run has figures for."""
    table = Table("Targets", ["figure", "target", "measured", "met"])
    for target in TARGETS:
        if target.figure in figures:
            value = figures[target.figure]
            bound = "at least" if target.at_least else "at most"
            table.add(
                target.text,
                f"{bound} {target.limit / target.scale:.4g}{target.unit}",
                f"{value / target.scale:.4g}{target.unit}",
                "yes" if target.is_met(value) else "NO",
            )
    return table


def describe_machine(place: Path) -> dict[str, str]:
    """What the figures depend on: machine, versions, date and command."""
    return {
        "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "command": shlex.join([Path(sys.executable).name, *sys.orig_argv[1:]]),
        "processor": f"{_processor()}, {len(os.sched_getaffinity(0))} cores used",
        "load before": f"{os.getloadavg()[0]:.1f} (other work on the machine makes figures worse)",
        "memory": f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 1e9:.1f} GB",
        "kernel": f"{platform.system()} {platform.release()} {platform.machine()}",
        "file system": _file_system(place),
        "python": platform.python_version(),
        "packages": ", ".join(f"{name} {_version(name)}" for name in _PACKAGES),
    }


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _file_system(place: Path) -> str:
    """Type of the file system that `place` is on."""
    best, kind = Path("/"), "unknown"
    for line in Path("/proc/mounts").read_text().splitlines():
        point, found = line.split()[1:3]
        mounted = Path(point.replace("\\040", " "))
        if place.is_relative_to(mounted) and len(mounted.parts) >= len(best.parts):
            best, kind = mounted, found
    return kind


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return NOT_INSTALLED
