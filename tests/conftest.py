"""Settings of the whole suite: the report's header and hypothesis profiles."""

import importlib.util
import os
import shutil
import signal

from hypothesis import HealthCheck, settings

# The same examples on every run and machine; look for new ones with --hypothesis-profile=deep.
settings.register_profile("default", derandomize=True, deadline=None)
settings.register_profile(
    "deep", max_examples=2000, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("default")


# Started in the background, this process ignores Ctrl-C, and so would all that tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_report_header():
    enabled = {
        name: importlib.util.find_spec(name) is not None
        for name in ("safetensors", "ml_dtypes", "torch", "transformers")
    }
    device = os.access("/dev/fuse", os.R_OK | os.W_OK)
    enabled["fuse"] = device and shutil.which("fusermount3") is not None
    words = (f"{name} {'on' if found else 'OFF'}" for name, found in enabled.items())
    return f"fragfs: {', '.join(words)}"
