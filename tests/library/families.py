"""A small model family: a base, its copy in another precision, two fine-tunes and their merge."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fragfs.library.add import AddOptions
from fragfs.library.library import FragmentLibrary
from fragfs.types import LibraryConfig
from tests.models import safetensors_bytes

SHAPES = {
    "embed.weight": (600, 256),
    "layers.0.up.weight": (512, 256),
    "layers.1.up.weight": (512, 256),
    "layers.0.norm.weight": (700,),
    "layers.1.norm.weight": (700,),
}
ORDER = ("base", "copy", "tuned", "other", "merge")


def _f32(values: dict[str, np.ndarray]) -> bytes:
    return safetensors_bytes(
        {
            name: ("F32", value.shape, value.astype("<f4").tobytes())
            for name, value in values.items()
        }
    )


def _bf16_words(value: np.ndarray) -> np.ndarray:
    bits = value.astype("<f4").view("<u4")
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype("<u2")


def _bf16(values: dict[str, np.ndarray]) -> bytes:
    return safetensors_bytes(
        {
            name: ("BF16", value.shape, _bf16_words(value).tobytes())
            for name, value in values.items()
        }
    )


def make_family(directory: Path, *, scale: int = 1) -> dict[str, Path]:
    """Write the models; `scale` multiplies the rows of the matrices."""
    rng = np.random.default_rng(5)
    base = {
        name: (rng.standard_normal((shape[0] * scale, *shape[1:])) * 0.02).astype(np.float32)
        for name, shape in SHAPES.items()
    }

    def tune(seed: int, strength: float) -> dict[str, np.ndarray]:
        noise = np.random.default_rng(seed)
        return {
            name: (value + noise.standard_normal(value.shape) * strength).astype(np.float32)
            for name, value in base.items()
        }

    tuned, other = tune(6, 2e-4), tune(7, 6e-4)
    merge = {name: (tuned[name] + other[name]) / 2 for name in base}
    contents = {
        "base": _f32(base),
        "copy": _bf16(base),
        "tuned": _bf16(tuned),
        "other": _bf16(other),
        "merge": _bf16(merge),
    }
    paths = {}
    for name in ORDER:
        paths[name] = directory / name
        paths[name].mkdir(parents=True)
        (paths[name] / "model.safetensors").write_bytes(contents[name])
        (paths[name] / "config.json").write_text('{"model_type": "test"}')
    return paths


def make_library(directory: Path, fragment_elements: int) -> tuple[dict[str, Path], Path]:
    """A library that holds the family, each model added by itself; also where the models are."""
    family = make_family(directory / "sources")
    config = LibraryConfig(fragment_elements=fragment_elements)
    with FragmentLibrary.create(directory / "lib", config) as library:
        for name in ORDER:
            library.add([family[name]], AddOptions())
    return family, directory / "lib"
