"""Run a command and print what it took, as JSON: seconds and most resident memory in bytes.

A process inherits its parent's peak across fork and exec, so a command whose memory is to be known
is started by this one, which is small. Its output goes to stderr.
"""

import json
import resource
import subprocess
import sys
import time


def main() -> int:
    start = time.perf_counter()
    status = subprocess.call(sys.argv[1:], stdout=sys.stderr)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    print(json.dumps({"status": status, "seconds": seconds, "peak_bytes": peak}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
