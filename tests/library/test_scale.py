"""What large inputs may cost: bytes on disk, memory, extents per file."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest

from fragfs.library.add import AddOptions
from fragfs.library.library import FragmentLibrary


def library_bytes(path) -> int:
    return sum(p.stat().st_size for p in path.rglob("*") if p.is_file())


@pytest.mark.slow
def test_a_hundred_thousand_scalars_cost_at_most_a_hundred_bytes_each(tmp_path):
    count = 100_000
    rng = np.random.default_rng(3)
    header = {
        f"model.layers.{i % 64}.block{i}.scale": {
            "dtype": "F32",
            "shape": [],
            "data_offsets": [4 * i, 4 * i + 4],
        }
        for i in range(count)
    }
    text = json.dumps(header).encode()
    source = tmp_path / "scalars"
    source.mkdir()
    (source / "model.safetensors").write_bytes(
        len(text).to_bytes(8, "little") + text + rng.standard_normal(count, np.float32).tobytes()
    )
    path = tmp_path / "lib"
    FragmentLibrary.create(path).close()
    before = library_bytes(path)
    with FragmentLibrary.open(path) as library:
        library.add([source], AddOptions())
        assert not [item for item in library.verify() if item.error]
    assert library_bytes(path) - before <= 100 * count


@pytest.mark.slow
def test_the_memory_of_an_add_does_not_depend_on_the_size_of_files(tmp_path):
    source = tmp_path / "large"
    source.mkdir()
    rng = np.random.default_rng(4)
    block = (rng.standard_normal(8 << 20, np.float32) * 0.02).view(np.uint32)
    elements = 40 * block.size
    header = {"w": {"dtype": "BF16", "shape": [elements], "data_offsets": [0, 2 * elements]}}
    text = json.dumps(header).encode()
    with (source / "model.safetensors").open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for step in range(40):
            stream.write(((block >> 16).astype("<u2") ^ np.uint16(step)).tobytes())
    FragmentLibrary.create(tmp_path / "lib").close()
    program = (
        "import sys; from pathlib import Path\n"
        "from fragfs.library.library import FragmentLibrary\n"
        "from fragfs.library.add import AddOptions\n"
        "with FragmentLibrary.open(sys.argv[1]) as library:\n"
        "    library.add([Path(sys.argv[2])], AddOptions())\n"
        # Not ru_maxrss: that one starts at what the parent had when it forked.
        "print(next(line.split()[1] for line in open('/proc/self/status') if 'VmHWM' in line))\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "lib"), str(source)],
        capture_output=True,
        text=True,
        check=True,
    )
    # 670 MB of weights; imports take 60 MB, bytes in flight 16 MB a worker and their encodings.
    assert int(result.stdout) < 400 * 1024
