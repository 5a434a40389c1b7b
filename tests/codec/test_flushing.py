"""A process that flushes denormals to zero, as torch can, reads and writes the same bytes."""

import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from fragfs.codec.encoding import decode
from tests.codec.families import (
    FLOATS,
    blend_cases,
    cast_cases,
    decay_cases,
    delta,
    nudged,
    quantize_cases,
    specials,
    unit_of,
)
from tests.codec.flushed import is_flushing, why_not

ROOT = Path(__file__).parents[2]


def denormal_cases():
    """Bases and targets that are mostly denormals."""
    for dtype in FLOATS:
        tiny = [word for word in specials(dtype) if word & (1 << dtype.bits - 1) - 1 < 1 << 8]
        base = b"".join(word.to_bytes(unit_of(dtype), "little") for word in tiny * 900)
        yield delta("denormals", dtype, nudged(base, dtype), base)


@pytest.mark.slow
@pytest.mark.skipif(bool(why_not()), reason=why_not() or "it can")
def test_flushing_denormals_changes_no_byte(tmp_path):
    assert not is_flushing()
    cases = [*cast_cases(), *blend_cases(), *quantize_cases(), *decay_cases(), *denormal_cases()]
    work = [(case, [case.check(grouped=grouped) for grouped in (False, True)]) for case in cases]
    path = tmp_path / "work"
    path.write_bytes(pickle.dumps(work))
    done = subprocess.run(
        [sys.executable, "-m", "tests.codec.flushed", str(path)],
        capture_output=True,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    answers = pickle.loads(done.stdout)
    for (case, encodings), (plain, grouped, (chosen, bases)) in zip(work, answers, strict=True):
        assert [plain, grouped] == encodings, case.name
        back = decode(
            chosen.predictor,
            case.dtype,
            chosen.params,
            memoryview(chosen.payload),
            len(case.raw),
            [memoryview(base) for base in bases],
        )
        assert back == case.raw, case.name
