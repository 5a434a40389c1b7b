"""Explanations of models, files and tensors."""

from __future__ import annotations

import shutil

import pytest

from fragfs.errors import NotFoundError
from fragfs.library.add import AddOptions
from fragfs.library.library import FragmentLibrary
from fragfs.types import SpanKind
from tests.library.families import ORDER, SHAPES, make_library
from tests.models import safetensors_bytes


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_library(tmp_path_factory.mktemp("family"), 1 << 16)


@pytest.fixture
def family(made):
    return made[0]


@pytest.fixture
def library(made, tmp_path):
    shutil.copytree(made[1], tmp_path / "lib")
    with FragmentLibrary.open(tmp_path / "lib") as library:
        yield library


@pytest.mark.parametrize("name", ORDER)
def test_the_parts_add_up(library, name):
    explanation = library.explain(name)
    stats = library.stats(name)
    for field in ("logical", "unique", "stored", "exclusive", "shared", "base"):
        assert getattr(explanation, f"{field}_bytes") == getattr(stats, f"{field}_bytes"), field
    assert sum(m.raw_bytes for m in explanation.mechanisms) == stats.logical_bytes
    assert sum(m.stored_bytes for m in explanation.mechanisms) == stats.stored_bytes
    assert sum(pack.stored_bytes for pack in explanation.packs) == stats.stored_bytes
    assert sum(explanation.closure_sizes.values()) == stats.unique_bytes
    assert max(explanation.closure_sizes) <= library.config.closure_max
    assert {
        (share.model or b"").decode(): share.raw_bytes for share in explanation.bases
    } == stats.predicted_bytes


def test_bases_and_dependents_are_two_views_of_one_thing(library):
    (base,) = library.explain("copy").bases
    assert base.model == b"base"
    dependents = {share.model: share for share in library.explain("base").dependents}
    assert dependents[b"copy"].raw_bytes == base.raw_bytes
    assert dependents[b"copy"].fragment_count == base.fragment_count
    assert library.explain("base").bases == ()
    assert library.explain("merge").dependents == ()


def test_sharers_have_the_same_fragments(library, family):
    library.add([family["base"]], AddOptions(name=b"again"))
    shares = {share.model: share for share in library.explain("again").sharers}
    assert shares[b"base"].stored_bytes == library.stats("again").stored_bytes
    assert shares[b"merge"].raw_bytes == len('{"model_type": "test"}')
    assert library.explain("again").exclusive_bytes == 0


def test_repeated_pieces_are_a_mechanism_of_their_own(library, tmp_path):
    source = tmp_path / "twice"
    source.mkdir()
    for name in ("a", "b"):
        (source / name).write_bytes(b"text" * 100_000)
    library.add([source], AddOptions())
    mechanisms = {m.name: m for m in library.explain("twice").mechanisms}
    assert mechanisms["exact"].raw_bytes == 400_000
    assert mechanisms["exact"].fragment_count == 1
    assert mechanisms["exact"].stored_bytes == 0


def test_the_tensors_of_a_file_cover_it(library):
    explanation = library.explain("tuned", "model.safetensors", tensors=True)
    (file,) = [f for f in library.files("tuned") if f.path == b"model.safetensors"]
    assert explanation.file_count == 1
    position = 0
    for tensor in explanation.tensors:
        assert tensor.offset == position
        assert sum(piece.size for piece in tensor.fragments) == tensor.size
        assert [piece.index for piece in tensor.fragments] == list(range(len(tensor.fragments)))
        position += tensor.size
    assert position == file.size
    named = {tensor.name: tensor for tensor in explanation.tensors if tensor.dtype}
    assert {name: tensor.shape for name, tensor in named.items()} == SHAPES
    assert explanation.tensors[0].kind is SpanKind.HEADER
    total = sum(tensor.stored_bytes for tensor in explanation.tensors)
    assert abs(total - file.stored_bytes) <= len(explanation.tensors)


def test_bases_are_named_by_model_tensor_and_index(library):
    explanation = library.explain("copy", "model.safetensors", tensors=True)
    for tensor in explanation.tensors:
        if len(tensor.shape) < 2:
            continue
        assert len(tensor.fragments) >= 2
        for piece in tensor.fragments:
            (base,) = piece.bases
            assert piece.mechanism == "cast"
            assert piece.closure_size == 2
            assert (base.model, base.file) == (b"base", b"model.safetensors")
            assert (base.tensor, base.index) == (tensor.name, piece.index)
    library.remove("base")
    explanation = library.explain("copy", "model.safetensors", tensors=True)
    bases = [base for t in explanation.tensors for piece in t.fragments for base in piece.bases]
    assert bases
    assert {(base.model, base.file, base.tensor) for base in bases} == {(None, b"", "")}


def test_small_tensors_share_a_fragment_and_what_it_takes(library, tmp_path):
    source = tmp_path / "small"
    source.mkdir()
    tensors = {f"t{i}": ("F32", (64,), bytes(range(256))) for i in range(400)}
    (source / "model.safetensors").write_bytes(safetensors_bytes(tensors))
    library.add([source], AddOptions())
    explanation = library.explain("small", "model.safetensors", tensors=True)
    named = [tensor for tensor in explanation.tensors if tensor.dtype]
    assert len(named) == 400
    assert len({piece.id for tensor in named for piece in tensor.fragments}) == 1
    assert all(tensor.kind is SpanKind.BUNDLE for tensor in named)
    assert sum(tensor.stored_bytes for tensor in named) <= explanation.stored_bytes


def test_a_directory_is_explained_and_a_missing_file_is_not(library, tmp_path):
    source = tmp_path / "deep"
    (source / "sub").mkdir(parents=True)
    (source / "sub" / "a").write_text("a" * 100)
    (source / "sub" / "b").write_text("b" * 100)
    (source / "subtle").write_text("c" * 100)
    library.add([source], AddOptions())
    explanation = library.explain("deep", "sub", tensors=True)
    assert explanation.file_count == 2
    assert [tensor.file for tensor in explanation.tensors] == [b"sub/a", b"sub/b"]
    with pytest.raises(NotFoundError, match="has no file missing"):
        library.explain("deep", "missing")
    with pytest.raises(NotFoundError, match="no model named"):
        library.explain("nothing")
