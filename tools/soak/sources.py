"""Models to add: a few families with the statistics of real weights, and files of every odd kind.

A `Version` is what one model is at one time: a directory that never changes again, and the SHA-256
of each of its files. Files that two versions have in common are hard links.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import shutil
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

__all__ = ["KINDS", "SourceMaker", "Version"]

_PAGE = 4096
_FAMILIES = 3
_GGUF_F16, _GGUF_Q8_0 = 1, 8
_GGUF_ALIGN = 32
_GGUF_UINT32, _GGUF_STRING = 4, 8

_Floats = dict[str, NDArray[np.float32]]

KINDS = ("tune", "base", "cast", "merge", "copy", "gguf", "odd", "tune", "merge")
"""What is made, as often as it stands here."""


@dataclass(eq=False)
class Version:
    """What a model is.

    Attributes:
        directory: Its files; nobody changes them.
        sums: SHA-256 in hex of each file, by path.
        size: Bytes of all files.
        users: Who still needs the directory; counted by the shelf.
    """

    directory: Path
    sums: dict[bytes, str] = field(default_factory=dict)
    size: int = 0
    users: int = 0

    @classmethod
    def of(cls, directory: Path) -> Version:
        """The version that a directory holds."""
        version = cls(directory)
        for parent, _, names in os.walk(os.fsencode(directory)):
            for name in names:
                path = os.path.join(parent, name)
                with open(path, "rb") as file:
                    digest = hashlib.file_digest(file, "sha256").hexdigest()
                version.sums[os.path.relpath(path, os.fsencode(directory))] = digest
                version.size += os.stat(path).st_size
        return version

    def remove(self) -> None:
        """Delete the directory."""
        shutil.rmtree(self.directory, ignore_errors=True)


class SourceMaker:
    """Makes versions below a directory; used by several threads.

    Args:
        directory: Where.
        seed: Of the families.
    """

    def __init__(self, directory: Path, seed: int) -> None:
        self._directory = directory
        self._count = 0
        self._families = [_make_base(seed * 10 + number) for number in range(_FAMILIES)]

    def make(self, kind: str, chosen: random.Random, other: Version | None) -> Version:
        """A new model of a kind; `other` is one that "copy" copies."""
        directory = self._new_directory(chosen)
        if kind == "copy" and other is not None:
            shutil.copytree(other.directory, directory, copy_function=os.link, dirs_exist_ok=True)
        else:
            self._write(kind, directory, chosen)
        return Version.of(directory)

    def change(self, old: Version, chosen: random.Random) -> Version:
        """A later state of a model: a file rewritten, perhaps one gone, perhaps a new one."""
        directory = self._new_directory(chosen)
        shutil.copytree(old.directory, directory, copy_function=os.link, dirs_exist_ok=True)
        paths = sorted(old.sums)
        changed = os.path.join(os.fsencode(directory), chosen.choice(paths))
        os.unlink(changed)
        if len(paths) == 1 or chosen.random() < 0.7:
            _write(Path(os.fsdecode(changed)), _rewritten(chosen))
        if chosen.random() < 0.5:
            self._write_one(directory / f"more{self._count}", chosen)
        return Version.of(directory)

    def grow(self, old: Version, chosen: random.Random) -> tuple[Version, str, list[Path]]:
        """A model with files added; also the folder they are in, and their paths."""
        directory = self._new_directory(chosen)
        shutil.copytree(old.directory, directory, copy_function=os.link, dirs_exist_ok=True)
        folder = chosen.choice(("", f"folder{self._count}", "shared/deep"))
        (directory / folder).mkdir(parents=True, exist_ok=True)
        paths = []
        for number in range(chosen.randint(1, 2)):
            path = directory / folder / f"into{self._count}-{number}.bin"
            self._write_one(path, chosen)
            paths.append(path)
        return Version.of(directory), folder, paths

    def shrink(self, old: Version, gone: set[bytes], chosen: random.Random) -> Version:
        """A model without some of its files."""
        directory = self._new_directory(chosen)
        shutil.copytree(old.directory, directory, copy_function=os.link, dirs_exist_ok=True)
        for path in gone:
            os.unlink(os.path.join(os.fsencode(directory), path))
        return Version.of(directory)

    def _new_directory(self, chosen: random.Random) -> Path:
        self._count += 1
        # Threads may meet at a count: the random part tells them apart.
        directory = self._directory / f"v{self._count}-{chosen.getrandbits(48):012x}"
        directory.mkdir(parents=True)
        return directory

    def _write(self, kind: str, directory: Path, chosen: random.Random) -> None:
        if kind == "odd":
            _write_odd_files(directory, chosen)
            return
        family = chosen.choice(self._families)
        _write(
            directory / "config.json", json.dumps({"made": kind, "by": chosen.random()}).encode()
        )
        values = family if kind in ("base", "cast") else _tuned(family, chosen)
        if kind == "merge":
            other = _tuned(family, chosen)
            values = {name: (value + other[name]) / np.float32(2) for name, value in values.items()}
        if kind == "gguf":
            _write(directory / "model.gguf", _gguf(values))
            return
        dtype = {"base": "F32", "cast": "BF16"}.get(kind) or chosen.choice(("BF16", "F16", "F32"))
        names = sorted(values)
        half = len(names) // 2
        shards = [names[:half], names[half:]] if chosen.random() < 0.3 else [names]
        for number, shard in enumerate(shards, 1):
            data = _safetensors({name: values[name] for name in shard}, dtype)
            name = f"model-{number:05}-of-{len(shards):05}.safetensors"
            _write(directory / name, data)
        if chosen.random() < 0.3:
            _write_odd_files(directory / "odd files", chosen)

    def _write_one(self, path: Path, chosen: random.Random) -> None:
        if chosen.random() < 0.5:
            values = _tuned(chosen.choice(self._families), chosen)
            name = chosen.choice(sorted(values))
            _write(path, _safetensors({name: values[name]}, "BF16"))
        else:
            _write(path, chosen.randbytes(chosen.randrange(1, 400_000)))


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def _rewritten(chosen: random.Random) -> bytes:
    return chosen.choice(
        (b"", chosen.randbytes(chosen.randrange(1, 2_000_000)), b"rewritten\n" * 5000)
    )


def _make_base(seed: int) -> _Floats:
    """Matrices of normal numbers whose rows differ in size, and norms around one."""
    rng = np.random.default_rng(seed)
    values: _Floats = {}
    for layer in range(3):
        for name, rows, columns in (("up", 384, 256), ("down", 256, 384), ("attention", 300, 256)):
            scale = np.exp(rng.normal(-4, 0.4, (rows, 1)))
            matrix = rng.standard_normal((rows, columns)) * scale
            values[f"layers.{layer}.{name}.weight"] = matrix.astype(np.float32)
        values[f"layers.{layer}.norm.weight"] = (1 + rng.normal(0, 0.1, 256)).astype(np.float32)
    return values


def _tuned(base: _Floats, chosen: random.Random) -> _Floats:
    """Some tensors moved a little, the others as they were."""
    rng = np.random.default_rng(chosen.getrandbits(64))
    strength = 10 ** chosen.uniform(-4.5, -2.5)
    return {
        name: (value + rng.standard_normal(value.shape, np.float32) * np.float32(strength))
        if chosen.random() < 0.6
        else value
        for name, value in base.items()
    }


def _words(value: NDArray[np.float32], dtype: str) -> bytes:
    if dtype == "F32":
        return value.astype("<f4").tobytes()
    if dtype == "F16":
        return value.astype("<f2").tobytes()
    bits = value.astype("<f4").view("<u4")
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype("<u2").tobytes()


def _safetensors(values: Mapping[str, NDArray[np.float32]], dtype: str) -> bytes:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    parts: list[bytes] = []
    at = 0
    for name, value in values.items():
        raw = _words(value, dtype)
        header[name] = {
            "dtype": dtype,
            "shape": value.shape,
            "data_offsets": [at, at + len(raw)],
        }
        parts.append(raw)
        at += len(raw)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + b"".join(parts)


def _gguf(values: _Floats) -> bytes:
    def string(text: str) -> bytes:
        return struct.pack("<Q", len(text)) + text.encode()

    infos, data = b"", b""
    for name, value in values.items():
        quantized = value.ndim == 2
        raw = _q8_0(value) if quantized else value.astype("<f2").tobytes()
        infos += string(name) + struct.pack("<I", value.ndim)
        infos += b"".join(struct.pack("<Q", size) for size in reversed(value.shape))
        infos += struct.pack("<IQ", _GGUF_Q8_0 if quantized else _GGUF_F16, len(data))
        data += raw + bytes(-len(raw) % _GGUF_ALIGN)
    head = b"GGUF" + struct.pack("<IQQ", 3, len(values), 2)
    head += string("general.architecture") + struct.pack("<I", _GGUF_STRING) + string("llama")
    head += string("general.alignment") + struct.pack("<II", _GGUF_UINT32, _GGUF_ALIGN)
    head += infos
    return head + bytes(-len(head) % _GGUF_ALIGN) + data


def _q8_0(value: NDArray[np.float32]) -> bytes:
    blocks = value.reshape(-1, 32)
    scales = np.maximum(np.abs(blocks).max(axis=1, keepdims=True) / 127, np.float32(1e-8))
    packed = np.empty(len(blocks), np.dtype([("scale", "<f2"), ("codes", "i1", (32,))]))
    packed["scale"] = scales[:, 0]
    packed["codes"] = np.rint(blocks / scales)
    return packed.tobytes()


def _write_odd_files(directory: Path, chosen: random.Random) -> None:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("archive/data.pkl", b"\x80\x02.")
        for number in range(3):
            file.writestr(f"archive/data/{number}", chosen.randbytes(chosen.randrange(200_000)))
    stamp = chosen.randbytes(8)
    _write(directory / "weights.pt", archive.getvalue())
    _write(directory / "empty", b"")
    _write(directory / "one", stamp[:1])
    for size in (_PAGE - 1, _PAGE, _PAGE + 1):
        _write(directory / "edges" / str(size), chosen.randbytes(size))
    _write(
        directory / "vocab.txt",
        b"".join(b"%d %s\n" % (n, stamp.hex().encode()) for n in range(30_000)),
    )
    _write(directory / "zeros", bytes(1_500_000) + stamp)
    _write(directory / os.fsdecode(b"na\xffme\nof lines"), stamp)
    _write(directory / "cut.safetensors.json", stamp)
