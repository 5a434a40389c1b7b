"""What happens to weights in a model family, in numpy: casts, merges, quantizing, made-up training.

Used by tools/make_family.py. All of it is deterministic.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike, NDArray

__all__ = [
    "EMBEDDINGS",
    "LINEAR",
    "Derive",
    "Recipe",
    "Tensors",
    "Weights",
    "cast",
    "grow",
    "make_base",
    "merge_linear",
    "merge_slerp",
    "merge_ties",
    "pretend_to_train",
    "quantize_fp8",
    "quantize_int8",
    "rename",
    "top_layers",
]

Weights = dict[str, NDArray[np.float32]]
Tensors = dict[str, NDArray[Any]]
"""Of any dtype, by name."""

EMBEDDINGS = "embeddings.word_embeddings.weight"
LINEAR = re.compile(
    r"encoder\.layer\.\d+\.(attention\.(self\.(query|key|value)|output\.dense)"
    r"|intermediate\.dense|output\.dense)\.weight"
)
"""Names of the layers that get adapters."""

_WIDTH, _LAYERS, _VOCABULARY, _POSITIONS = 384, 6, 30522, 512
_WEIGHT_DECAY = 0.01
_TOUCHED_SHARE = 0.06
_DRIFT = 1.4
_TIES_DENSITY = 0.5


@dataclass(frozen=True)
class Recipe:
    """How a model is trained.

    Attributes:
        steps: Optimizer steps.
        learning_rate: Reached after a short warm-up, then constant.
        seed: Chooses the text.
        trains: Which parameters move, as a regular expression that matches whole names.
        lora_rank: If not 0, the linear layers get trained adapters of this rank, merged at the end.
    """

    steps: int
    learning_rate: float
    seed: int
    trains: str = ".*"
    lora_rank: int = 0


Derive = Callable[[Weights, Recipe, Collection[int]], dict[int, Weights]]
"""Trains a copy of a model; gives the weights after the last step and after those asked for."""


# --- without training


def make_base(scale: float) -> Tensors:
    """A model like all-MiniLM-L6-v2 of random weights, `scale` times as wide and deep."""
    rng = np.random.default_rng(1)
    width = max(16, round(_WIDTH * scale / 8) * 8)
    spread = rng.gamma(4, 0.25, (width,)).astype(np.float32)  # columns are not all alike

    def matrix(rows: int, columns: int, size: float = 0.05) -> NDArray[np.float32]:
        values = rng.standard_normal((rows, columns), np.float32) * np.float32(size)
        return values * np.resize(spread, columns)

    tensors: Tensors = {
        EMBEDDINGS: matrix(max(200, round(_VOCABULARY * scale)), width),
        "embeddings.position_embeddings.weight": matrix(_POSITIONS, width, 0.02),
        "embeddings.token_type_embeddings.weight": matrix(2, width, 0.02),
        "embeddings.LayerNorm.weight": 1 + matrix(1, width)[0],
        "embeddings.LayerNorm.bias": matrix(1, width)[0],
        "embeddings.position_ids": np.arange(_POSITIONS, dtype=np.int64)[None],
    }
    for layer in range(max(2, round(_LAYERS * scale))):
        prefix = f"encoder.layer.{layer}"
        for part, rows, columns in (
            *((f"attention.self.{part}", width, width) for part in ("query", "key", "value")),
            ("attention.output.dense", width, width),
            ("intermediate.dense", 4 * width, width),
            ("output.dense", width, 4 * width),
        ):
            tensors[f"{prefix}.{part}.weight"] = matrix(rows, columns)
            tensors[f"{prefix}.{part}.bias"] = matrix(1, rows)[0]
        for part in ("attention.output", "output"):
            tensors[f"{prefix}.{part}.LayerNorm.weight"] = 1 + matrix(1, width)[0]
            tensors[f"{prefix}.{part}.LayerNorm.bias"] = matrix(1, width)[0]
    return tensors


def pretend_to_train(
    base: Weights, recipe: Recipe, keep_steps: Collection[int] = ()
) -> dict[int, Weights]:
    """Noise with the statistics of AdamW in place of training.

    Adam divides by the size of the gradients, so the weights of a tensor move by about the same
    distance whatever their own size; rows of tokens that do not occur only decay.
    """
    rng = np.random.default_rng(recipe.seed)
    now = {name: array.copy() for name, array in base.items()}
    occurring = rng.random(len(base[EMBEDDINGS])) < _TOUCHED_SHARE
    kept, done = {}, 0
    for step in sorted({*keep_steps, recipe.steps}):
        taken, done = step - done, step
        distance = np.float32(recipe.learning_rate * _DRIFT * taken**0.5)
        for name, array in now.items():
            if not re.fullmatch(recipe.trains, name):
                continue
            if recipe.lora_rank:
                if LINEAR.fullmatch(name):
                    now[name] = array + _low_rank(rng, array, recipe.lora_rank, distance)
                continue
            moved = rng.standard_normal(array.shape, np.float32) * distance
            # Some weights of a tensor have steadier gradients than others.
            moved *= rng.gamma(2, 0.5, (array.shape[-1],)).astype(np.float32)
            if name == EMBEDDINGS:
                moved[~occurring] = 0
            decay = np.float32(1 - recipe.learning_rate * _WEIGHT_DECAY * taken)
            now[name] = array * decay + moved
        kept[step] = dict(now)
    return kept


def top_layers(names: Iterable[str], count: int) -> str:
    """A regular expression for the parameters of the last layers and of what follows them."""
    numbers = [
        int(found[1]) for name in names if (found := re.match(r"encoder\.layer\.(\d+)", name))
    ]
    last = max(numbers)
    chosen = "|".join(str(number) for number in range(last - count + 1, last + 1))
    return rf"(encoder\.layer\.({chosen})|pooler)\..*"


def _low_rank(
    rng: np.random.Generator, like: NDArray[np.float32], rank: int, size: np.float32
) -> NDArray[np.float32]:
    up = rng.standard_normal((like.shape[0], rank), np.float32)
    down = rng.standard_normal((rank, like.shape[1]), np.float32)
    return up @ down * (size / np.float32(rank**0.5))


# --- merges


def merge_linear(first: Weights, second: Weights, share: float = 0.5) -> Weights:
    """The weighted mean; `share` is that of the second."""
    return {
        name: first[name] * np.float32(1 - share) + second[name] * np.float32(share)
        for name in first
    }


def merge_slerp(first: Weights, second: Weights, share: float = 0.5) -> Weights:
    """Interpolation on the arc between two tensors."""
    merged = {}
    for name, one in first.items():
        other = second[name]
        lengths = np.linalg.norm(one) * np.linalg.norm(other)
        cosine = float(np.vdot(one, other) / lengths) if lengths else 1.0
        if cosine > 0.9999995:  # so close that the arc is a line
            merged[name] = one * np.float32(1 - share) + other * np.float32(share)
            continue
        angle = np.arccos(max(cosine, -1.0))
        left, right = np.sin((1 - share) * angle), np.sin(share * angle)
        merged[name] = (one * np.float32(left) + other * np.float32(right)) / np.float32(
            np.sin(angle)
        )
    return merged


def merge_ties(base: Weights, models: Sequence[Weights], density: float = _TIES_DENSITY) -> Weights:
    """TIES: of each model's change keep the largest part; per weight, the sign with more weight.

    Source: Yadav et al. 2023, "TIES-Merging", section 3.
    """
    merged = {}
    for name, start in base.items():
        changes = np.stack([model[name] - start for model in models])
        for change in changes:
            flat = np.abs(change).ravel()
            cut = flat.size - max(1, round(density * flat.size))
            change[np.abs(change) < np.partition(flat, cut)[cut]] = 0
        agreeing = np.sign(changes) == np.sign(changes.sum(axis=0))
        agreeing &= changes != 0
        count = np.maximum(agreeing.sum(axis=0), 1).astype(np.float32)
        merged[name] = start + (changes * agreeing).sum(axis=0, dtype=np.float32) / count
    return merged


# --- other precisions, names and sizes


def cast(tensors: Tensors, dtype: DTypeLike) -> Tensors:
    """Every float tensor in another precision, as `Tensor.to` does it; others as they are."""
    return {name: a if a.dtype == np.int64 else a.astype(dtype) for name, a in tensors.items()}


def quantize_fp8(tensors: Tensors) -> Tensors:
    """Matrices cast to float8_e4m3fn, vectors to bf16."""
    vectors = cast(tensors, ml_dtypes.bfloat16)
    return {
        name: a.astype(ml_dtypes.float8_e4m3fn) if a.ndim == 2 and a.dtype == np.float32 else vector
        for (name, a), vector in zip(tensors.items(), vectors.values(), strict=True)
    }


def quantize_int8(tensors: Tensors) -> Tensors:
    """Matrices as int8, symmetric, one f32 scale per row (output channel), which maps its maximum.

    Vectors become bf16.
    """
    quantized = cast(tensors, ml_dtypes.bfloat16)
    for name, a in tensors.items():
        if a.ndim == 2 and a.dtype == np.float32:
            scale = np.abs(a).max(axis=1, keepdims=True) / np.float32(127)
            scale[scale == 0] = 1
            quantized[name] = np.clip(np.rint(a / scale), -127, 127).astype(np.int8)
            quantized[f"{name}_scale"] = scale
    return quantized


def rename(tensors: Tensors) -> Tensors:
    """The names that older BERT checkpoints have: another prefix, gamma and beta."""
    norms = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    renamed = {}
    for name, tensor in tensors.items():
        for new, old in norms.items():
            name = name.replace(new, old)
        renamed[f"bert.{name}"] = tensor
    return renamed


def grow(weights: Weights, rows: int) -> Weights:
    """More tokens: rows near the mean of the others, as transformers initializes them."""
    embeddings = weights[EMBEDDINGS]
    rng = np.random.default_rng(2)
    noise = rng.standard_normal((rows, embeddings.shape[1]), np.float32)
    added = embeddings.mean(axis=0) + noise * embeddings.std(axis=0) * np.float32(1e-2)
    return weights | {EMBEDDINGS: np.concatenate([embeddings, added])}
