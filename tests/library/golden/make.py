"""Makes a golden library of the format that the imported fragfs writes: `make.py DIRECTORY`.

It was run once for each version of the format, with the fragfs of that version, and what it wrote
is never made again: libraries of every version must stay readable. Everything here runs with every
fragfs there ever was. `library.tar.gz` is the library, `expected.json` what its files are.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import sqlite3
import sys
import tarfile
import tempfile
from pathlib import Path

import numpy as np

from fragfs.library.add import AddOptions
from fragfs.library.library import FragmentLibrary
from fragfs.types import LIBRARY_FORMAT_VERSION, LibraryConfig

ADDED_NS = 1_700_000_000_000_000_000
Weights = dict[str, np.ndarray]


def safetensors(weights: Weights, kind: str) -> bytes:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    raws = [encoded(value, kind) for value in weights.values()]
    offset = 0
    for (name, value), raw in zip(weights.items(), raws, strict=True):
        header[name] = {
            "dtype": kind,
            "shape": list(value.shape),
            "data_offsets": [offset, offset + len(raw)],
        }
        offset += len(raw)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + b"".join(raws)


def encoded(value: np.ndarray, kind: str) -> bytes:
    if kind == "I8":
        scale = np.maximum(np.abs(value).max(axis=-1, keepdims=True), 1e-9) / np.float32(127)
        return np.clip(np.rint(value / scale), -128, 127).astype("i1").tobytes()
    bits = value.astype("<f4").view("<u4")
    if kind == "F32":
        return bits.tobytes()
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype("<u2").tobytes()


def sources() -> dict[str, dict[str, bytes]]:
    """Models by name, in the order of adding: their files by path."""
    rng = np.random.default_rng(1)
    base = {
        "embed.weight": (rng.standard_normal((80, 64)) * 0.02).astype(np.float32),
        "layers.0.up.weight": (rng.standard_normal((64, 64)) * 0.02).astype(np.float32),
        "norm.weight": (rng.standard_normal(300) * 0.02).astype(np.float32),
        # Files of less than 64 KiB are not cut at all.
        "pad.weight": np.zeros((80, 1000), np.float32),
    }

    def tuned(strength: float) -> Weights:
        return {
            name: value + (rng.standard_normal(value.shape) * strength).astype(np.float32)
            if value.any()
            else value
            for name, value in base.items()
        }

    one, other = tuned(2e-5), tuned(2e-5)
    patched = {name: value.copy() for name, value in base.items()}
    patched["embed.weight"].reshape(-1)[::997] += np.float32(1e-3)
    half = np.float32(0.5)
    merge = {name: one[name] * half + other[name] * half for name in base}
    kind = "F32" if LIBRARY_FORMAT_VERSION > 1 else "BF16"
    models = {
        "base": {
            "model.safetensors": safetensors(base, kind),
            "config.json": b'{"model_type": "golden"}',
            "empty.txt": b"",
            "tokenizer/vocab.txt": b"\n".join(b"token%d" % number for number in range(500)),
            "zeros.bin": bytes(5000),
            "noise.bin": rng.bytes(600),
        },
        "tuned": {"model.safetensors": safetensors(one, kind)},
        "gone": {
            "model.safetensors": safetensors({"norm.weight": base["norm.weight"][::-1]}, kind)
        },
    }
    if LIBRARY_FORMAT_VERSION > 1:
        models |= {
            "other": {"model.safetensors": safetensors(other, "F32")},
            "merge": {"model.safetensors": safetensors(merge, "F32")},
            "copy": {"model.safetensors": safetensors(base, "BF16")},
            "patched": {"model.safetensors": safetensors(patched, "F32")},
            "int8": {"model.safetensors": safetensors(base, "I8")},
        }
    if LIBRARY_FORMAT_VERSION > 2:
        decayed = {name: decay(value) for name, value in base.items()}
        models["decayed"] = {"model.safetensors": safetensors(decayed, "F32")}
    return models


def decay(value: np.ndarray) -> np.ndarray:
    """Weights after a thousand updates that only decay touched, as optimizers do it in f32."""
    for _ in range(1000):
        value = value * np.float32(1 - 1e-6)
    return value


def add_marks(library: FragmentLibrary) -> None:
    """Leave what version 3 keeps track of: garbage given back, quarantine, an unfinished add."""
    library.collect(grace_s=0, wait_s=0.1)
    database = sqlite3.connect(library.path / "catalog.sqlite")
    with contextlib.closing(database), database:
        (last,) = database.execute("SELECT max(number) FROM fragments").fetchone()
        database.execute(
            "INSERT INTO quarantine SELECT min(number), ?, 'flipped on purpose' FROM fragments",
            (ADDED_NS,),
        )
        database.execute("INSERT INTO unpublished VALUES (?, ?, ?)", (last, last, ADDED_NS))


def make(directory: Path) -> None:
    directory.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        config = LibraryConfig(fragment_elements=4096)
        with FragmentLibrary.create(place / "library", config, now_ns=lambda: ADDED_NS) as library:
            for name, files in sources().items():
                for path, data in files.items():
                    file = place / "sources" / name / path
                    file.parent.mkdir(parents=True, exist_ok=True)
                    file.write_bytes(data)
                library.add([place / "sources" / name], AddOptions(name=f"org/{name}".encode()))
            library.remove("org/gone")
            library.move("org/tuned", "org/fine-tuned")
            assert not [item for item in library.verify() if item.error]
            if LIBRARY_FORMAT_VERSION > 2:
                add_marks(library)
        for name in ("lock", "lock.next", "leases"):
            path = place / "library" / name
            if path.is_dir():
                for inside in path.iterdir():
                    inside.unlink()
                path.rmdir()
            else:
                path.unlink(missing_ok=True)
        with tarfile.open(directory / "library.tar.gz", "w:gz") as archive:
            archive.add(place / "library", "library", filter=anonymous)
    expected = {
        f"org/{'fine-tuned' if name == 'tuned' else name}": {
            path: hashlib.sha256(data).hexdigest() for path, data in files.items()
        }
        for name, files in sources().items()
        if name != "gone"
    }
    text = io.StringIO()
    json.dump({"format": LIBRARY_FORMAT_VERSION, "models": expected}, text, indent=1)
    (directory / "expected.json").write_text(text.getvalue() + "\n")


def anonymous(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    member.mtime = ADDED_NS // 10**9
    member.mode = 0o755 if member.isdir() else 0o644
    return member


if __name__ == "__main__":
    make(Path(sys.argv[1]))
