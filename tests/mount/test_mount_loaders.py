"""The loaders people use, through the mount."""

import importlib.util

import numpy as np
import pytest
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file

from tests.mount.support import drop_pages, run_reader

pytestmark = [pytest.mark.mount, pytest.mark.slow]

SHARDS = [f"model-{number:05}-of-00004.safetensors" for number in range(1, 5)]


@pytest.mark.parametrize("shard", SHARDS)
def test_safetensors_loads_the_same_tensors(model, source, shard):
    drop_pages(model)
    mounted, original = load_file(model / shard), load_file(source / shard)
    assert mounted.keys() == original.keys()
    for name, tensor in original.items():
        np.testing.assert_array_equal(mounted[name], tensor)
        assert mounted[name].dtype == tensor.dtype


def test_safetensors_slices_and_metadata(model, source):
    with (
        safe_open(model / SHARDS[0], framework="np") as mounted,
        safe_open(source / SHARDS[0], framework="np") as original,
    ):
        assert mounted.metadata() == original.metadata() == {"format": "pt"}
        for name in original.keys():  # noqa: SIM118  # not a mapping
            np.testing.assert_array_equal(
                mounted.get_slice(name)[10:20, 3:9], original.get_slice(name)[10:20, 3:9]
            )


def test_a_file_that_safetensors_rejects_is_rejected_the_same_way(model, source):
    said = []
    for directory in (model, source):
        with pytest.raises(SafetensorError) as caught:
            load_file(directory / "trailing.safetensors")
        said.append(str(caught.value))
    assert said[0] == said[1]


def test_h05_all_shards_open_and_four_threads_in_natural_order(mounts, library_path, source):
    """What transformers 5 does, and what hung another FUSE file system."""
    report = mounts(library_path, cache_bytes_max=2 << 20)
    program = """
import os, sys
from concurrent.futures import ThreadPoolExecutor
import numpy as np
from safetensors import safe_open
root, source = sys.argv[1:]
names = sorted(n for n in os.listdir(root) if n.startswith("model-"))
files = [safe_open(os.path.join(root, n), framework="np") for n in names]
truth = [safe_open(os.path.join(source, n), framework="np") for n in names]
work = [(f, t, key) for f, t in zip(files, truth) for key in f.keys()]
work.sort(key=lambda item: [int(p) if p.isdigit() else p for p in item[2].split(".")])
def load(item):
    file, original, key = item
    return np.array_equal(file.get_slice(key)[:], original.get_slice(key)[:])
with ThreadPoolExecutor(4) as pool:
    sys.exit(0 if all(pool.map(load, work)) else "differs")
"""
    for _ in range(3):
        drop_pages(report.mountpoint / "org" / "model")
        run_reader(program, report.mountpoint / "org" / "model", source)


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")
def test_torch_loads_the_same_tensors(model, source):
    program = """
import sys, torch
from safetensors.torch import load_file
a, b = (load_file(path) for path in sys.argv[1:])
assert a.keys() == b.keys()
assert all(torch.equal(a[k], b[k]) for k in a)
"""
    run_reader(program, model / SHARDS[1], source / SHARDS[1])


def test_numpy_maps_a_file_shared(model, source):
    """As gguf-py and llama.cpp do."""
    mounted = np.memmap(model / SHARDS[2], mode="r")
    np.testing.assert_array_equal(mounted, np.memmap(source / SHARDS[2], mode="r"))
