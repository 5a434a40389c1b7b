"""Runs the real command in this process, against real libraries in temporary directories."""

import json
import os
from dataclasses import dataclass

import numpy as np
import pytest
from safetensors.numpy import save_file

from fragfs.cli.main import main


@dataclass
class Result:
    """How a command ended."""

    status: int
    stdout: bytes
    stderr: str

    @property
    def text(self):
        return self.stdout.decode()

    @property
    def lines(self):
        return self.text.splitlines()

    @property
    def json(self):
        return json.loads(self.stdout)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """No test may meet the library of the person who runs it."""
    home = tmp_path / "home"
    home.mkdir()
    for name in [name for name in os.environ if name.startswith(("FRAGFS_", "XDG_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(home))
    return home


@pytest.fixture
def run(capfdbinary):
    """Call it like the command: run("ls", "-l")."""

    def call(*arguments):
        capfdbinary.readouterr()
        status = main([os.fspath(argument) for argument in arguments])
        out, err = capfdbinary.readouterr()
        return Result(status, out, err.decode())

    return call


@pytest.fixture
def fragfs(run, tmp_path):
    """Like `run`, with a library of its own."""
    library = tmp_path / "library"
    assert run("init", library).status == 0

    def call(*arguments):
        return run("--library", library, *arguments)

    call.library = library
    return call


@pytest.fixture
def make_model(tmp_path):
    """Writes a model of two files; `seed` decides its weights."""

    def make(name, seed=1):
        directory = tmp_path / "sources" / name
        directory.mkdir(parents=True)
        rng = np.random.default_rng(seed)
        weights = {"layer.weight": rng.standard_normal(50_000, dtype=np.float32) * 0.02}
        save_file(weights, directory / "model.safetensors")
        (directory / "config.json").write_text(f'{{"seed": {seed}}}')
        return directory

    return make
