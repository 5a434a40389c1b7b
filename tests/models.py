"""Small model directories for tests, written without the code under test."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import numpy as np

Tensor = tuple[str, tuple[int, ...], bytes]


def bf16(rng: np.random.Generator, *shape: int, scale: float = 0.02) -> Tensor:
    values = (rng.standard_normal(shape, np.float32) * scale).view(np.uint32) >> 16
    return "BF16", shape, values.astype("<u2").tobytes()


def f32(rng: np.random.Generator, *shape: int, scale: float = 0.02) -> Tensor:
    return "F32", shape, (rng.standard_normal(shape, np.float32) * scale).astype("<f4").tobytes()


def safetensors_bytes(tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> bytes:
    header: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    offset = 0
    for name, (dtype, shape, raw) in tensors.items():
        header[name] = {
            "dtype": dtype,
            "shape": list(shape),
            "data_offsets": [offset, offset + len(raw)],
        }
        offset += len(raw)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + b"".join(raw for _, _, raw in tensors.values())


def make_model(directory: Path, seed: int = 0, *, rows: int = 600, cols: int = 512) -> Path:
    """A model of about 2.5 MB: two matrices, norms, an index-free config and a sub-directory."""
    rng = np.random.default_rng(seed)
    directory.mkdir(parents=True)
    tensors = {
        "embed_tokens.weight": bf16(rng, rows, cols),
        "layers.0.mlp.up_proj.weight": f32(rng, rows, cols),
        "layers.0.input_layernorm.weight": f32(rng, cols),
        "scalar": f32(rng),
        "empty": ("F32", (0, 4), b""),
    }
    (directory / "model.safetensors").write_bytes(safetensors_bytes(tensors, {"format": "pt"}))
    (directory / "config.json").write_text(json.dumps({"model_type": "test", "seed": seed}))
    (directory / "tokenizer").mkdir()
    (directory / "tokenizer" / "vocab.txt").write_text("\n".join(f"token{i}" for i in range(9000)))
    (directory / "empty.txt").write_bytes(b"")
    for number, path in enumerate(sorted(directory.rglob("*"))):
        os.utime(path, ns=(1, 1_600_000_000_123_456_789 + number))
    return directory


def digests(directory: Path) -> dict[str, str]:
    """SHA-256 of every file, by relative path."""
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }
