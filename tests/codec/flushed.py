"""A program: does everything that reads numbers with denormals flushed to zero, and tells.

`python -m tests.codec.flushed PICKLE` with a list of (case, encodings) pairs. It checks the
digests of all conversions and decodes what was encoded without flushing; it encodes every case
anew, and writes those encodings to standard output, for its caller to decode. Exit code 77: not
here.
"""

from __future__ import annotations

import ctypes
import pickle
import platform
import sys
from dataclasses import replace

import numpy as np

FLUSH_TO_ZERO, DENORMALS_ARE_ZERO = 1 << 15, 1 << 6
_MXCSR = slice(28, 32)
"""Where glibc's fenv_t for x86-64 keeps the control word of SSE arithmetic."""


def why_not() -> str:
    """Why this machine cannot be told to flush denormals this way; empty if it can."""
    if platform.machine() != "x86_64":
        return f"flushing denormals is switched on for x86-64 only, not for {platform.machine()}"
    if platform.libc_ver()[0] != "glibc":
        return "flushing denormals is switched on with glibc's fenv_t only"
    return ""


def flush_denormals() -> None:
    """For the calling thread, until it ends."""
    library = ctypes.CDLL("libm.so.6")
    environment = (ctypes.c_ubyte * 32)()
    assert library.fegetenv(environment) == 0
    control = int.from_bytes(bytes(environment[_MXCSR]), "little")
    control |= FLUSH_TO_ZERO | DENORMALS_ARE_ZERO
    environment[_MXCSR] = list(control.to_bytes(4, "little"))
    assert library.fesetenv(environment) == 0


def is_flushing() -> bool:
    """Denormal inputs count as zero, and denormal results become zero, in scalars and vectors."""
    tiny, small = np.uint32(0x000116C2).view(np.float32), np.float32(2.0**-70)
    many = np.full(100, tiny, np.float32)
    return bool(
        tiny * np.float32(2.0**60) == 0
        and not (many * np.float32(2.0**60)).any()
        and small * small == 0
        and not (np.full(100, small) * small).any()
    )


def main() -> None:
    from fragfs.codec import floats, forms, groups, planes, rebuild, residual, steps
    from fragfs.codec.choose import encode_best
    from fragfs.codec.selftest import check_decoder
    from fragfs.codec.trials import Candidate
    from fragfs.types import Level
    from tests.codec.tables import DIGESTS, digest

    with open(sys.argv[1], "rb") as stream:
        work = pickle.load(stream)
    assert not is_flushing()
    flush_denormals()
    assert is_flushing(), "denormals are not flushed"
    found = []
    # With the compiled loops, and with what stands in for them.
    for module_kernels in dict.fromkeys((groups._kernels, None)):
        for module in (floats, forms, groups, planes, rebuild, residual, steps):
            module._kernels = module_kernels
        for name, expected in DIGESTS.items():
            assert digest(name) == expected, name
        check_decoder()
        for case, encodings in work:
            for encoding in encodings:
                assert case.decode(encoding) == case.raw, case.name
    for case, _ in work:
        found.append([case.check(grouped=grouped) for grouped in (False, True)])
        candidates = [
            Candidate(memoryview(base), dtype)
            for base, dtype in zip(case.bases, case.prediction.dtypes, strict=True)
        ]
        choice = encode_best(case.raw, case.dtype, candidates, level=Level.BALANCED, zstd_level=3)
        chosen = [candidates[index].raw for index in choice.bases]
        # What is stored as it is comes as a view.
        encoding = replace(choice.encoding, payload=bytes(choice.encoding.payload))
        found[-1].append((encoding, [bytes(raw) for raw in chosen]))
    assert is_flushing(), "something has switched flushing off again"
    sys.stdout.buffer.write(pickle.dumps(found))


if __name__ == "__main__":
    if why_not():
        print(why_not(), file=sys.stderr)
        sys.exit(77)
    main()
