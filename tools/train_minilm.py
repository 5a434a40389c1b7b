"""Train all-MiniLM-L6-v2 for a few minutes on a CPU: what tools/make_family.py derives models by.

The forward pass is written out here over a dict of tensors named as in the model's file, so torch
is all that is needed. The text is Python's own standard library, which every machine has.
"""

from __future__ import annotations

import os
import re
import sysconfig
from collections.abc import Collection, Iterator, Mapping
from itertools import count
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from tools.family_weights import EMBEDDINGS, LINEAR, Recipe, Weights

__all__ = ["read_corpus", "train"]

Parameters = Mapping[str, torch.Tensor]
Corpus = NDArray[np.int64]

_HEADS = 12
_EPSILON = 1e-12
_CLS, _SEP, _UNKNOWN = 101, 102, 100
_CORPUS_TOKENS_MAX = 400_000
_BATCH = 4
_LENGTH = 64
_WARM_UP_STEPS = 10
_TEMPERATURE = 0.05


def read_corpus(vocabulary: Path) -> Corpus:
    """Token numbers of standard library modules, in the order of their names."""
    words = vocabulary.read_text(encoding="utf-8").splitlines()
    numbers = {word: number for number, word in enumerate(words)}
    tokens: list[int] = []
    known: dict[str, list[int]] = {}
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        text = path.read_text(encoding="utf-8", errors="ignore").lower()
        for word in re.findall(r"[^\W_]+|[^\s]", text):
            if word not in known:
                known[word] = _word_pieces(word, numbers)
            tokens += known[word]
        if len(tokens) >= _CORPUS_TOKENS_MAX:
            break
    return np.array(tokens[:_CORPUS_TOKENS_MAX], np.int64)


def _word_pieces(word: str, numbers: dict[str, int]) -> list[int]:
    """WordPiece: the longest known beginning, again and again."""
    pieces, start = [], 0
    while start < len(word):
        for end in range(len(word), start, -1):
            piece = word[start:end] if start == 0 else f"##{word[start:end]}"
            if piece in numbers:
                pieces.append(numbers[piece])
                start = end
                break
        else:
            return [_UNKNOWN]
    return pieces


def train(
    corpus: Corpus, base: Weights, recipe: Recipe, keep_steps: Collection[int] = ()
) -> dict[int, Weights]:
    """Train a copy of a model.

    The same on every run with as many threads of the same version of torch.

    Args:
        corpus: From `read_corpus`.
        base: The f32 tensors of the model.
        recipe: What to do.
        keep_steps: Steps after which to keep the weights, besides the last one.

    Returns:
        The tensors after these steps and the last one, as new arrays.
    """
    torch.manual_seed(recipe.seed)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    weights = {name: torch.from_numpy(array.copy()) for name, array in base.items()}
    adapters: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    trained: list[torch.Tensor] = []
    for name, weight in weights.items():
        if not re.fullmatch(recipe.trains, name):
            continue
        if not recipe.lora_rank:
            trained.append(weight.requires_grad_())
        elif LINEAR.fullmatch(name):
            down = torch.randn(recipe.lora_rank, weight.shape[1]) / weight.shape[1] ** 0.5
            adapters[name] = (torch.zeros(weight.shape[0], recipe.lora_rank), down)
            trained += [factor.requires_grad_() for factor in adapters[name]]
    optimizer = torch.optim.AdamW(trained, lr=recipe.learning_rate, weight_decay=0.01, fused=True)
    kept = {}
    for step, tokens in enumerate(_batches(corpus, recipe), 1):
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * min(1.0, step / _WARM_UP_STEPS)
        loss = _contrastive_loss(_merge(weights, adapters), tokens)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]  # torch has no annotation here
        optimizer.step()
        if step in keep_steps or step == recipe.steps:
            kept[step] = _arrays(_merge(weights, adapters))
    return kept


def _merge(
    weights: Parameters, adapters: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
) -> Parameters:
    merged = dict(weights)
    for name, (up, down) in adapters.items():
        merged[name] = weights[name] + up @ down
    return merged


def _arrays(weights: Parameters) -> Weights:
    return {name: weight.detach().numpy().copy() for name, weight in weights.items()}


def _batches(corpus: Corpus, recipe: Recipe) -> Iterator[torch.Tensor]:
    """Sequences of neighbouring tokens between [CLS] and [SEP]."""
    rng = np.random.default_rng(recipe.seed)
    offsets = np.arange(_LENGTH - 2)
    for _ in range(recipe.steps):
        starts = rng.integers(0, len(corpus) - _LENGTH, _BATCH)
        tokens = np.empty((_BATCH, _LENGTH), np.int64)
        tokens[:, 0], tokens[:, -1] = _CLS, _SEP
        tokens[:, 1:-1] = corpus[starts[:, None] + offsets]
        yield torch.from_numpy(tokens)


def _contrastive_loss(weights: Parameters, tokens: torch.Tensor) -> torch.Tensor:
    """Tell which second half belongs to a first half, among those of the batch.

    As sentence transformers are trained: only embeddings of tokens that occur have gradients.
    """
    halves = torch.cat(tokens.chunk(2, dim=1))
    means = functional.normalize(_forward(weights, halves).mean(dim=1), dim=1)
    first, second = means.chunk(2)
    return functional.cross_entropy(first @ second.T / _TEMPERATURE, torch.arange(len(first)))


def _forward(weights: Parameters, tokens: torch.Tensor) -> torch.Tensor:
    """Hidden states of BERT's last layer, shape (batch, length, width); no dropout."""
    states = functional.embedding(tokens, weights[EMBEDDINGS])
    states = states + weights["embeddings.position_embeddings.weight"][: tokens.shape[1]]
    states = states + weights["embeddings.token_type_embeddings.weight"][0]
    states = _norm(weights, "embeddings.LayerNorm", states)
    for layer in count():
        prefix = f"encoder.layer.{layer}"
        if f"{prefix}.output.dense.weight" not in weights:
            return states
        query, key, value = (
            _linear(weights, f"{prefix}.attention.self.{part}", states)
            .view(*tokens.shape, _HEADS, -1)
            .transpose(1, 2)
            for part in ("query", "key", "value")
        )
        mixed = functional.scaled_dot_product_attention(query, key, value)
        mixed = mixed.transpose(1, 2).flatten(2)
        attended = _linear(weights, f"{prefix}.attention.output.dense", mixed)
        states = _norm(weights, f"{prefix}.attention.output.LayerNorm", states + attended)
        inner = functional.gelu(_linear(weights, f"{prefix}.intermediate.dense", states))
        outer = _linear(weights, f"{prefix}.output.dense", inner)
        states = _norm(weights, f"{prefix}.output.LayerNorm", states + outer)
    raise AssertionError("unreachable: layers are numbered without end")


def _linear(weights: Parameters, name: str, states: torch.Tensor) -> torch.Tensor:
    return functional.linear(states, weights[f"{name}.weight"], weights[f"{name}.bias"])


def _norm(weights: Parameters, name: str, states: torch.Tensor) -> torch.Tensor:
    scale, shift = weights[f"{name}.weight"], weights[f"{name}.bias"]
    return functional.layer_norm(states, states.shape[-1:], scale, shift, _EPSILON)
