"""What the sections of one run share."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from tools.bench.models import (
    Variant,
    find_weights,
    make_normal_bf16,
    make_normal_f32,
    variants_of,
)
from tools.minilm import fetch_minilm

__all__ = ["Setting"]


@dataclass
class Setting:
    """Where and with what to measure.

    Attributes:
        place: A directory for everything that is written.
        model: Directory of the model to use; None for the published one.
        rounds: How often each timing is repeated.
        transfer_bytes: Size of the model that is added.
        read_bytes: Size of the model that is read.
        large_bytes: Size of the model of the section "large".
        synthetic_bytes: Size of the model made up where no package index answers.
    """

    place: Path
    model: Path | None = None
    rounds: int = 5
    transfer_bytes: int = 256 << 20
    read_bytes: int = 512 << 20
    large_bytes: int = 4_000_000_000
    synthetic_bytes: int = 64 << 20
    model_name: str = ""

    @cached_property
    def variants(self) -> list[Variant]:
        """The model, in each precision."""
        if self.model is not None:
            self.model_name, directory = self.model.name, self.model
        elif fetch_minilm(directory := self.place / "published"):
            self.model_name = "all-MiniLM-L6-v2"
        else:
            self.model_name = "normally distributed weights"
            make_normal_f32(directory / "model.safetensors", self.synthetic_bytes)
        return variants_of(find_weights(directory), self.place / "variants")

    @cached_property
    def transfer_model(self) -> Variant:
        """A bf16 model, made up, that is large enough for rates to settle."""
        path = self.place / "transfer" / "model.safetensors"
        return Variant("bf16", (make_normal_bf16(path, self.transfer_bytes),))
