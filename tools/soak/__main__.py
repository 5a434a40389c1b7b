"""Run everything at once for some minutes, with random kills: `python -m tools.soak --minutes 3`.

Several processes add, update, remove and rename models of one library, others optimize it, collect
garbage, check, verify and export, mounts come and go, and readers compare every byte with the
sources, while commands, daemons and helpers are killed or stopped at random moments. Prints what it
did, and PASS or FAIL; a failure keeps the directory, with its log.
"""

from __future__ import annotations

import argparse
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tools.soak.soak import Soak

_FAILED, _INTERRUPTED = 1, 130


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=3.0, help="how long [default: 3]")
    parser.add_argument("--seed", type=int, help="what is chosen [default: another each time]")
    parser.add_argument(
        "--directory", type=Path, help="where to work, new or empty [default: a temporary one]"
    )
    arguments = parser.parse_args()
    seed = random.SystemRandom().getrandbits(32) if arguments.seed is None else arguments.seed
    if arguments.directory is None:
        directory = Path(tempfile.mkdtemp(prefix="fragfs-soak-")).resolve()
    else:
        directory = arguments.directory.resolve()
        directory.mkdir(parents=True, exist_ok=True)
        if any(directory.iterdir()):
            parser.error(f"{directory} is not empty")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    print(f"soak of {arguments.minutes:g} minutes, seed {seed}, in {directory}", flush=True)
    started = time.monotonic()
    soak = Soak(directory, seed)
    status = _FAILED
    try:
        soak.run(arguments.minutes * 60)
        status = _FAILED if soak.runner.failures else 0
    except KeyboardInterrupt:
        status = _INTERRUPTED
    finally:
        soak.close()
        # Of an interrupted one, errors say only that its children were killed.
        _report(soak, time.monotonic() - started, failures=status == _FAILED)
        if status == _FAILED:
            print(f"FAIL, seed {seed}; the log and everything else is kept in {directory}")
        else:
            shutil.rmtree(directory)
            print("PASS" if status == 0 else "interrupted; everything was removed")
    return status


def _report(soak: Soak, seconds: float, *, failures: bool) -> None:
    for failure in soak.runner.failures if failures else ():
        print(f"\n{failure.encode(errors='backslashreplace').decode()}\n")
    counts = Counter(soak.runner.counts)
    read = counts.pop("bytes read", 0)
    signals = {name: n for name, n in counts.items() if name.startswith("SIG")}
    others = {name: n for name, n in counts.items() if name not in signals}
    print(f"{seconds / 60:.1f} minutes; {read:,} bytes read through mounts and compared")
    for title, chosen in (("done", others), ("signals", signals)):
        print(f"{title}:")
        for name, number in sorted(chosen.items()):
            print(f"  {number:7,}  {name}")
    for kind, (memory, files) in soak.peaks().items():
        print(f"peak of the steady mount's {kind}: {memory:,} bytes, {files} descriptors")
    if soak.sizes:
        print(", ".join(f"{name} {size:,} bytes" for name, size in soak.sizes.items()))


if __name__ == "__main__":
    sys.exit(main())
