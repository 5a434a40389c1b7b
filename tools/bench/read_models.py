"""Models that the section "read" reads: a made-up transformer in bf16 and a fine-tune of it.

Tensors have the shapes of a real one: layers of an attention, an MLP and norms, an embedding; and
the order that the safetensors library writes, which is that of their names: layer 10 before 2.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tools.bench.models import Spec, cast_f32, read_tensors, write_safetensors

__all__ = ["make_fine_tune", "make_transformer", "transformer_specs"]

_LAYERS = 12
_EMBEDDING_SHARE = 0.1
_SCALE = 0.02
_NOISE = 0.003
"""The fine-tune's noise, as a share of a tensor's standard deviation: stores 0.14, a usual one."""
_NOISE_WORDS = 1 << 22
_CHUNK = 1 << 20


def transformer_specs(size: int) -> list[Spec]:
    """Tensors of a model of about `size` bytes, in file order."""
    # Elements of a layer in units of width squared: q and o, k and v (a quarter), three of the MLP.
    in_layer = 2 + 2 * 0.25 + 3 * 2.75
    width = math.sqrt(size / 2 * (1 - _EMBEDDING_SHARE) / (_LAYERS * in_layer))
    width = max(64, round(width / 64) * 64)
    hidden = width * 11 // 4
    vocabulary = max(64, int(size / 2 * _EMBEDDING_SHARE / width))
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, width)}
    for layer in range(_LAYERS):
        name = f"model.layers.{layer}."
        for part in "qo":
            shapes[f"{name}self_attn.{part}_proj.weight"] = (width, width)
        for part in "kv":
            shapes[f"{name}self_attn.{part}_proj.weight"] = (width // 4, width)
        for part in ("gate", "up"):
            shapes[f"{name}mlp.{part}_proj.weight"] = (hidden, width)
        shapes[f"{name}mlp.down_proj.weight"] = (width, hidden)
        shapes[f"{name}input_layernorm.weight"] = (width,)
        shapes[f"{name}post_attention_layernorm.weight"] = (width,)
    shapes["model.norm.weight"] = (width,)
    return [(name, "BF16", shape, 2 * math.prod(shape)) for name, shape in sorted(shapes.items())]


def make_transformer(path: Path, size: int, seed: int = 5) -> Path:
    """A model with normally distributed weights; no two of its fragments are alike."""
    specs = transformer_specs(size)
    rng = np.random.Generator(np.random.SFC64(seed))
    return write_safetensors(path, specs, (_weights(rng, spec[3] // 2) for spec in specs))


def make_fine_tune(base: Path, path: Path, seed: int = 6) -> Path:
    """The same model, every weight moved a little."""
    rng = np.random.Generator(np.random.SFC64(seed))
    noise = rng.standard_normal(_NOISE_WORDS, np.float32) * np.float32(_NOISE * _SCALE)
    tensors = read_tensors(base)
    specs: list[Spec] = [(t.name, t.dtype, t.shape, len(t.raw)) for t in tensors]
    return write_safetensors(path, specs, (_moved(t.raw, noise, rng) for t in tensors))


def _weights(rng: np.random.Generator, count: int) -> bytes:
    scale = np.float32(_SCALE)
    return b"".join(
        cast_f32((rng.standard_normal(size, np.float32) * scale).data, "BF16")
        for size in _chunks(count)
    )


def _moved(raw: memoryview, noise: NDArray[np.float32], rng: np.random.Generator) -> bytes:
    """Weights plus noise, which is taken from another place of the same block each time."""
    weights = np.frombuffer(raw, "<u2")
    pieces = []
    start = 0
    for size in _chunks(weights.size):
        wide = (weights[start : start + size].astype("<u4") << 16).view("<f4")
        first = int(rng.integers(0, noise.size - size + 1))
        pieces.append(cast_f32((wide + noise[first : first + size]).data, "BF16"))
        start += size
    return b"".join(pieces)


def _chunks(count: int) -> Iterator[int]:
    """Sizes that fit into the processor's cache and sum up to `count`."""
    for start in range(0, count, _CHUNK):
        yield min(_CHUNK, count - start)
