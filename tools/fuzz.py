"""Fuzz the parsers and readers with atheris (libFuzzer), from the samples of the tests.

    python -m tools.fuzz [TARGET...] [--minutes 2] [--corpus build/fuzz]
    python -m tools.fuzz TARGET --replay FILE

Each target runs in a process of its own for so many minutes. The corpus is kept below `--corpus`
and grows from run to run. An input that makes a target fail is kept beside it; the last lines say
how to run it again. Needs the extra `fuzz`: pip install -e '.[fuzz,test]'.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

_TIMEOUT_S = 30
_RSS_MIB = 3000
_INPUT_BYTES_MAX = 1 << 17
_EXECUTED = "stat::number_of_executed_units"


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.fuzz", description=__doc__.split("\n")[0]
    )
    parser.add_argument("targets", nargs="*", metavar="TARGET", help="all by default")
    parser.add_argument("--minutes", type=float, default=2.0, help="for each target")
    parser.add_argument("--corpus", type=Path, default=Path("build/fuzz"))
    parser.add_argument("--replay", type=Path, help="run one input, to see how it fails")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.replay is not None:
        from tests.fuzz.targets import TARGETS

        TARGETS[options.targets[0]].run(options.replay.read_bytes())
        print("it does not fail (any more)")
        return 0
    if importlib.util.find_spec("atheris") is None:
        print("atheris is not installed: pip install -e '.[fuzz,test]'", file=sys.stderr)
        print("without it: python -m pytest tests/fuzz --hypothesis-profile=deep", file=sys.stderr)
        return 2
    if options.inside:
        _fuzz(options.targets[0], options.corpus, options.minutes)
        return 0
    return _all(options.targets, options.minutes, options.corpus)


def _all(targets: list[str], minutes: float, corpus: Path) -> int:
    from tests.fuzz.targets import TARGETS

    unknown = set(targets) - TARGETS.keys()
    if unknown:
        print(f"no target {', '.join(sorted(unknown))}; there are {', '.join(TARGETS)}")
        return 2
    failed = []
    for name in targets or TARGETS:
        _write_samples(corpus / name, TARGETS[name].samples())
        started = time.monotonic()
        command = [sys.executable, "-m", "tools.fuzz", name, "--inside"]
        command += ["--minutes", str(minutes), "--corpus", os.fspath(corpus)]
        # The fuzzer ends its process without a chance to clean up.
        with tempfile.TemporaryDirectory() as temporary:
            done = subprocess.run(
                command,
                capture_output=True,
                text=True,
                errors="replace",
                env=os.environ | {"TMPDIR": temporary},
            )
        seconds = time.monotonic() - started
        lines = done.stderr.splitlines()
        figures = [line.split(":")[-1].strip() for line in lines if _EXECUTED in line]
        tried = f"{figures[-1]} inputs" if figures else "see the log"
        print(f"{name}: {'FAILED' if done.returncode else 'ok'}, {seconds:.0f} s, {tried}")
        if done.returncode:
            failed.append(name)
            (corpus / f"{name}.log").write_text(done.stdout + done.stderr)
            found = max(corpus.glob(f"{name}-*"), key=os.path.getmtime, default=None)
            print(f"  log: {corpus / name}.log")
            print(f"  again: python -m tools.fuzz {name} --replay {found}")
    return 1 if failed else 0


def _write_samples(directory: Path, samples: list[bytes]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for sample in samples:
        (directory / hashlib.sha1(sample).hexdigest()).write_bytes(sample)


def _fuzz(name: str, corpus: Path, minutes: float) -> None:
    """Run one target under libFuzzer, which ends this process."""
    import atheris

    with atheris.instrument_imports(include=["fragfs"]):
        from tests.fuzz.targets import TARGETS

    arguments = [
        sys.argv[0],
        f"-max_total_time={int(60 * minutes)}",
        f"-timeout={_TIMEOUT_S}",
        f"-rss_limit_mb={_RSS_MIB}",
        f"-max_len={_INPUT_BYTES_MAX}",
        f"-artifact_prefix={corpus}/{name}-",
        "-print_final_stats=1",
        os.fspath(corpus / name),
    ]
    atheris.Setup(arguments, TARGETS[name].run)
    atheris.Fuzz()


if __name__ == "__main__":
    sys.exit(main())
