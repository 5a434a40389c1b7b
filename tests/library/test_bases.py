"""Libraries of families: what is predicted from what, and what damage to that does."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from fragfs.codec.predict import Prediction
from fragfs.codec.predicted import encode_predicted
from fragfs.errors import FormatError, IntegrityError, NotFoundError
from fragfs.library import ingest
from fragfs.library.add import AddOptions
from fragfs.library.decode import NO_SOURCE
from fragfs.library.library import FragmentLibrary
from fragfs.library.records import checksum, pack_fragment_record, parse_fragment_record
from fragfs.types import (
    LIBRARY_FORMAT_VERSION,
    Dtype,
    Fragment,
    FragmentId,
    LibraryConfig,
    Predictor,
)
from tests.models import digests, safetensors_bytes

ELEMENTS = 1 << 14
CONFIG = LibraryConfig(fragment_elements=ELEMENTS)
SHAPES = {
    "embed.weight": (300, 256),
    "layers.0.up.weight": (256, 256),
    "layers.1.up.weight": (256, 256),
    "norm.weight": (2048,),
}
KINDS = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "I8": np.dtype("i1"),
}
Weights = dict[str, np.ndarray]


def base_weights(seed: int = 0) -> Weights:
    rng = np.random.default_rng(seed)
    return {
        name: (rng.standard_normal(shape) * 0.02).astype(np.float32)
        for name, shape in SHAPES.items()
    }


def tuned(weights: Weights, seed: int, strength: float = 3e-5) -> Weights:
    rng = np.random.default_rng(seed)
    return {
        name: (value + rng.standard_normal(value.shape) * strength).astype(np.float32)
        for name, value in weights.items()
    }


def quantized(weights: Weights) -> Weights:
    """int8 with a scale for each row."""
    found: Weights = {}
    for name, value in weights.items():
        scale = np.abs(value).max(axis=-1, keepdims=True) / np.float32(127)
        found[name] = np.clip(np.rint(value / scale), -128, 127)
    return found


def tensors(weights: Weights, kind: str) -> dict:
    return {
        name: (kind, value.shape, value.astype(KINDS[kind]).tobytes())
        for name, value in weights.items()
    }


def write_model(directory: Path, weights: Weights, kind: str = "F32", *, rename=str) -> Path:
    directory.mkdir(parents=True)
    renamed = {rename(name): value for name, value in weights.items()}
    (directory / "model.safetensors").write_bytes(safetensors_bytes(tensors(renamed, kind)))
    return directory


def add(library: FragmentLibrary, *paths: Path, **options):
    return library.add(list(paths), AddOptions(**options))


def assert_good(library: FragmentLibrary, name=None):
    checked = list(library.verify(name))
    assert checked
    assert [item.error for item in checked] == [None] * len(checked)


def bad_models(library: FragmentLibrary) -> set[bytes]:
    return {
        model.name
        for model in library.models()
        if any(item.error for item in library.verify(model.name))
    }


def rows(library: FragmentLibrary, sql: str, *parameters) -> list[tuple]:
    """Asked of the database itself."""
    connection = sqlite3.connect(library.path / "catalog.sqlite")
    try:
        return connection.execute(sql, parameters).fetchall()
    finally:
        connection.close()


def execute(library: FragmentLibrary, *statements: tuple) -> None:
    connection = sqlite3.connect(library.path / "catalog.sqlite")
    with connection:
        for sql, *parameters in statements:
            connection.execute(sql, parameters)
    connection.close()


def record_of(library: FragmentLibrary, number: int) -> Fragment:
    """A fragment's record, read from its pack."""
    [(pack, offset, size)] = rows(
        library, "SELECT pack, offset, record_size FROM fragments WHERE number = ?", number
    )
    with (library.path / "packs" / f"{pack:010d}.pack").open("rb") as stream:
        stream.seek(offset)
        return parse_fragment_record(stream.read(size), "here", check_stored=False)


def bases_of(library: FragmentLibrary) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {
        n: [] for (n,) in rows(library, "SELECT number FROM fragments ORDER BY number")
    }
    for fragment, base in rows(
        library, "SELECT fragment, base FROM bases ORDER BY fragment, position"
    ):
        found[fragment].append(base)
    return found


def closure(bases: dict[int, list[int]], number: int, above: tuple[int, ...] = ()) -> set[int]:
    assert number not in above, f"fragment {number} is predicted from itself"
    parts = [closure(bases, base, (*above, number)) for base in bases[number]]
    return {number}.union(*parts)


def check_closures(library: FragmentLibrary) -> list[int]:
    """Every closure is within the limit, and the catalog says what the records say."""
    bases = bases_of(library)
    ids = dict(rows(library, "SELECT number, id FROM fragments"))
    for number, numbers in bases.items():
        assert [ids[base] for base in numbers] == list(record_of(library, number).bases)
    sizes = [len(closure(bases, number)) for number in bases]
    assert max(sizes) <= library.config.closure_max
    return sizes


def predictors(library: FragmentLibrary, model: str) -> set[str]:
    """Predictors of a model's fragments of at least 4 KiB: headers do not count."""
    [entry] = [e for e in library.files(model) if e.path.endswith(b".safetensors")]
    numbers = {extent.fragment for extent in library.open_content(entry.content).extents}
    found = (library.fragment(number) for number in numbers)
    return {Predictor(m.predictor).name for m in found if m.raw_size >= 4096}


@pytest.fixture
def library(tmp_path):
    with FragmentLibrary.create(tmp_path / "lib", CONFIG) as found:
        yield found


@pytest.fixture
def family(library, tmp_path):
    """A library with a base and its fine-tune."""
    weights = base_weights()
    add(library, write_model(tmp_path / "base", weights))
    add(library, write_model(tmp_path / "tuned", tuned(weights, 1)))
    return library


# --- what families cost


def test_a_fine_tune_is_stored_as_a_delta(family, tmp_path):
    assert predictors(family, "base") == {"PLANES"}
    assert predictors(family, "tuned") == {"DELTA"}
    assert family.model("tuned").stored_bytes < 0.75 * family.model("base").stored_bytes
    assert_good(family)
    check_closures(family)
    family.export("tuned", tmp_path / "out")
    assert digests(tmp_path / "out") == digests(tmp_path / "tuned")


@pytest.mark.parametrize("kind", ["BF16", "F16", "F8_E4M3", "F8_E5M2"])
def test_a_narrower_copy_costs_nearly_nothing(library, tmp_path, kind):
    weights = base_weights()
    add(library, write_model(tmp_path / "base", weights))
    report = add(library, write_model(tmp_path / "copy", weights, kind))
    assert predictors(library, "copy") == {"CAST"}
    assert report.new_bytes < 0.01 * report.logical_bytes + 4000
    assert_good(library)
    check_closures(library)


@pytest.mark.parametrize("kind", ["BF16", "F16"])
def test_a_wider_copy_costs_nearly_nothing(library, tmp_path, kind):
    weights = base_weights()
    add(library, write_model(tmp_path / "narrow", weights, kind))
    exact = {name: value.astype(KINDS[kind]).astype("<f4") for name, value in weights.items()}
    report = add(library, write_model(tmp_path / "wide", exact))
    assert predictors(library, "wide") == {"CAST"}
    assert report.new_bytes < 0.01 * report.logical_bytes + 4000
    assert_good(library)


def test_a_merge_is_blended(family, tmp_path):
    weights = base_weights()
    others = [tuned(weights, 1), tuned(weights, 2)]
    add(family, write_model(tmp_path / "other", others[1]))
    half = np.float32(0.5)
    merge = {name: others[0][name] * half + others[1][name] * half for name in weights}
    report = add(family, write_model(tmp_path / "merge", merge))
    assert "BLEND" in predictors(family, "merge")
    assert report.new_bytes < 0.1 * report.logical_bytes
    assert_good(family)
    check_closures(family)


def test_an_extrapolation_is_blended(family, tmp_path):
    weights = base_weights()
    beyond = {
        name: value * np.float32(2) - weights[name] for name, value in tuned(weights, 1).items()
    }
    report = add(family, write_model(tmp_path / "beyond", beyond))
    assert "BLEND" in predictors(family, "beyond")
    assert report.new_bytes < 0.1 * report.logical_bytes
    assert_good(family)


def test_names_do_not_matter(family, tmp_path):
    other = tuned(base_weights(), 3)
    report = add(
        family, write_model(tmp_path / "renamed", other, rename=lambda name: f"model.x.{name}")
    )
    assert predictors(family, "renamed") == {"DELTA"}
    assert report.new_bytes < 0.6 * report.logical_bytes
    assert_good(family)


def test_shards_do_not_matter(family, tmp_path):
    other = tuned(base_weights(), 3)
    directory = tmp_path / "sharded"
    directory.mkdir()
    for number, (name, value) in enumerate(other.items()):
        path = directory / f"model-{number}.safetensors"
        path.write_bytes(safetensors_bytes(tensors({name: value}, "F32")))
    report = add(family, directory)
    assert report.new_bytes < 0.6 * report.logical_bytes
    assert_good(family)


def test_a_vocabulary_that_has_grown(family, tmp_path):
    weights = base_weights()
    more = np.random.default_rng(9).standard_normal((20, 256)).astype(np.float32) * 0.02
    weights["embed.weight"] = np.concatenate([weights["embed.weight"], more])
    report = add(family, write_model(tmp_path / "grown", weights))
    # Whole fragments are known; the last one of the embedding is a delta with a tail.
    assert report.reused_bytes > 0.8 * report.logical_bytes
    assert report.new_bytes < 1.2 * more.nbytes
    assert_good(family)
    check_closures(family)


def test_an_int8_copy(family, tmp_path):
    report = add(family, write_model(tmp_path / "int8", quantized(base_weights()), "I8"))
    assert "QUANTIZE" in predictors(family, "int8")
    assert report.new_bytes < 0.2 * report.logical_bytes
    assert_good(family)
    check_closures(family)


def test_a_checkpoint_whose_weights_decay(family, tmp_path):
    def decay(value: np.ndarray) -> np.ndarray:
        value = value.copy()
        for _ in range(100):
            value *= np.float32(1 - 5e-7)
        return value

    trained = tuned(base_weights(), 3)
    weights = {name: decay(value) for name, value in base_weights().items()}
    for name, value in weights.items():
        value[: len(value) // 4] = trained[name][: len(value) // 4]
    report = add(family, write_model(tmp_path / "later", weights))
    assert "DECAY" in predictors(family, "later")
    assert report.new_bytes < 0.25 * report.logical_bytes
    assert family.stats(b"later").saved_bytes["decay"] > 0.5 * report.logical_bytes
    assert_good(family)
    check_closures(family)


def test_strangers_share_nothing(family, tmp_path):
    add(family, write_model(tmp_path / "stranger", base_weights(seed=77)))
    assert predictors(family, "stranger") == {"PLANES"}
    assert_good(family)


def test_a_model_twice_at_once(library, tmp_path):
    weights = base_weights()
    first = write_model(tmp_path / "a", weights)
    second = write_model(tmp_path / "b", weights)
    report = add(library, first, second)
    assert report.reused_bytes >= report.logical_bytes // 2
    assert_good(library)
    assert predictors(library, "b") == {"PLANES"}


def test_fragments_of_one_batch_use_each_other(library, tmp_path):
    weights = base_weights()
    directory = write_model(tmp_path / "both", weights)
    (directory / "model.bf16.safetensors").write_bytes(safetensors_bytes(tensors(weights, "BF16")))
    report = add(library, directory)
    # How many do depends on which is appended before another one is encoded: all of a small model
    # is under way at once.
    assert report.saved_bytes["cast"] > 0
    assert rows(library, "SELECT generation FROM library") == [(2,)]
    assert any(numbers for numbers in bases_of(library).values())
    assert_good(library)
    check_closures(library)


@pytest.mark.slow
@pytest.mark.parametrize("closure_max", [1, 2, 3, 4, 8])
def test_closures_stay_within_the_limit(tmp_path, closure_max):
    config = LibraryConfig(fragment_elements=ELEMENTS, closure_max=closure_max)
    weights = base_weights()
    chain = weights
    with FragmentLibrary.create(tmp_path / "lib", config) as library:
        for step in range(5):
            add(library, write_model(tmp_path / f"step{step}", chain))
            chain = tuned(chain, 10 + step)
        add(library, write_model(tmp_path / "copy", chain, "BF16"))
        half = np.float32(0.5)
        merge = {name: chain[name] * half + weights[name] * half for name in weights}
        add(library, write_model(tmp_path / "merge", merge))
        sizes = check_closures(library)
        if closure_max == 1:
            assert set(sizes) == {1}
        else:
            assert max(sizes) > 1
        assert_good(library)


@pytest.mark.slow
def test_the_order_of_adding_may_be_reversed(tmp_path):
    weights = base_weights()
    members = {
        "base": (weights, "F32"),
        "tuned": (tuned(weights, 1), "F32"),
        "copy": (weights, "BF16"),
        "tuned copy": (tuned(weights, 1), "BF16"),
        "int8": (quantized(weights), "I8"),
    }
    sources = {
        name: write_model(tmp_path / "sources" / name, *member) for name, member in members.items()
    }
    total = sum((p / "model.safetensors").stat().st_size for p in sources.values())
    for order in (list(sources), list(sources)[::-1]):
        with FragmentLibrary.create(tmp_path / order[0], CONFIG) as library:
            for name in order:
                add(library, sources[name])
            assert_good(library)
            check_closures(library)
            assert library.stats().stored_bytes < 0.65 * total


# --- damage


def base_fragment(library: FragmentLibrary) -> tuple[int, int]:
    """A fragment of the base that a fragment of the fine-tune is predicted from: (base, other)."""
    found = [(numbers[0], number) for number, numbers in bases_of(library).items() if numbers]
    return max(found, key=lambda pair: library.fragment(pair[0]).record_size)


def another(library: FragmentLibrary, base: int) -> int:
    """A fragment of the same size that is predicted from nothing, the first there is."""
    size = library.fragment(base).raw_size
    plain = [number for number, bases in bases_of(library).items() if not bases]
    return next(n for n in plain if n != base and library.fragment(n).raw_size == size)


def flip(library: FragmentLibrary, number: int, at: int = 300) -> None:
    meta = library.fragment(number)
    path = library.path / "packs" / f"{meta.pack:010d}.pack"
    with path.open("r+b") as stream:
        stream.seek(meta.offset + at)
        byte = stream.read(1)[0]
        stream.seek(-1, os.SEEK_CUR)
        stream.write(bytes([byte ^ 0x10]))


@pytest.mark.parametrize("at", [0, 5, 30, 60, 300, 20_000])
def test_a_damaged_base_is_named(family, tmp_path, at):
    add(family, write_model(tmp_path / "stranger", base_weights(seed=77)))
    base, dependent = base_fragment(family)
    name = family.fragment(base).id
    flip(family, base, at)
    for number in (base, dependent):
        with pytest.raises(IntegrityError) as caught:
            family.decode_fragment(number, NO_SOURCE)
        assert name.short in str(caught.value)
        assert caught.value.fragment == name.hex()
        assert "restore the pack" in str(caught.value)
    assert bad_models(family) == {b"base", b"tuned"}


def test_a_damaged_dependent_leaves_its_base_alone(family):
    base, dependent = base_fragment(family)
    flip(family, dependent, 400)
    family.decode_fragment(base, NO_SOURCE)
    with pytest.raises(IntegrityError) as caught:
        family.decode_fragment(dependent, NO_SOURCE)
    assert caught.value.fragment == family.fragment(dependent).id.hex()
    assert bad_models(family) == {b"tuned"}


def test_a_missing_base_is_named(family, tmp_path):
    add(family, write_model(tmp_path / "stranger", base_weights(seed=77)))
    base, dependent = base_fragment(family)
    meta = family.fragment(base)
    execute(family, ("DELETE FROM fragments WHERE number = ?", base))
    with pytest.raises(IntegrityError, match="not in the library") as caught:
        family.decode_fragment(dependent, NO_SOURCE)
    assert meta.id.short in str(caught.value)
    assert caught.value.fragment == family.fragment(dependent).id.hex()
    assert caught.value.expected == meta.id.hex()
    assert_good(family, "stranger")


def test_records_that_changed_places_are_noticed(family, tmp_path):
    add(family, write_model(tmp_path / "stranger", base_weights(seed=77)))
    base, dependent = base_fragment(family)
    other = another(family, base)
    columns = "pack, offset, record_size, raw_size, predictor"
    places = {
        number: rows(family, f"SELECT {columns} FROM fragments WHERE number = ?", number)[0]
        for number in (base, other)
    }
    update = (
        "UPDATE fragments SET pack = ?, offset = ?, record_size = ?, raw_size = ?, predictor = ?"
        " WHERE number = ?"
    )
    execute(family, (update, *places[other], base), (update, *places[base], other))
    name = family.fragment(base).id
    for number in (base, dependent):
        with pytest.raises(IntegrityError) as caught:
            family.decode_fragment(number, NO_SOURCE)
        assert name.short in str(caught.value)
    assert_good(family, "stranger")


def test_fragments_are_identified_together(family):
    base, dependent = base_fragment(family)
    numbers = [dependent, another(family, base), base, dependent]
    found = family.identities(numbers)
    assert [identity.number for identity in found] == numbers
    for identity in found:
        metadata = family.fragment(identity.number)
        assert (identity.id, identity.raw_size) == (metadata.id, metadata.raw_size)
        assert identity == family.identities([identity.number])[0]
    assert (found[0].has_bases, found[0].is_base) == (True, False)
    assert (found[2].has_bases, found[2].is_base) == (False, True)
    assert family.identities([]) == []
    with pytest.raises(NotFoundError, match="999999"):
        family.identities([base, 999_999, dependent])


@pytest.mark.parametrize(
    ("column", "value"),
    [("id", bytes(31)), ("id", "text"), ("raw_size", -1), ("raw_size", 1 << 40)],
)
def test_a_fragment_that_cannot_be_is_not_identified(family, column, value):
    base, dependent = base_fragment(family)
    execute(family, (f"UPDATE fragments SET {column} = ? WHERE number = ?", value, base))
    with pytest.raises(FormatError, match="damaged"):
        family.identities([dependent, base])
    assert family.identities([dependent])[0].number == dependent


def test_a_row_that_has_another_ones_number_is_not_identified(family):
    """Two rows exchanged their ids on a damaged page: only the index of ids knows better."""
    base, dependent = base_fragment(family)
    ids = [family.fragment(number).id for number in (base, dependent)]
    path = family.path / "catalog.sqlite"
    execute(family, ("PRAGMA wal_checkpoint(TRUNCATE)",))
    data = bytearray(path.read_bytes())
    page_bytes = int.from_bytes(data[16:18], "big")
    tables = [at for at in range(0, len(data), page_bytes) if data[at] == 0x0D]
    for at in tables:
        page = bytes(data[at : at + page_bytes])
        for one, other in (ids, ids[::-1]):
            if (found := page.find(one)) >= 0:
                data[at + found : at + found + 32] = other
    path.write_bytes(data)
    with FragmentLibrary.open(family.path) as damaged:
        for numbers in ([base], [dependent], [dependent, base]):
            with pytest.raises(FormatError, match="index of ids"):
                damaged.identities(numbers)


def test_ids_that_changed_places_are_noticed(family):
    """The catalog finds the base's id at another fragment's record."""
    base, dependent = base_fragment(family)
    other = another(family, base)
    ids = {n: family.fragment(n).id for n in (base, other)}
    update = "UPDATE fragments SET id = ? WHERE number = ?"
    execute(
        family, (update, bytes(32), base), (update, ids[base], other), (update, ids[other], base)
    )
    with pytest.raises(IntegrityError) as caught:
        family.decode_fragment(dependent, NO_SOURCE)
    assert ids[base].short in str(caught.value)


def forge(library: FragmentLibrary, number: int, fragment: Fragment) -> None:
    """Give a fragment another record, behind everything else in its pack."""
    header, payload = pack_fragment_record(fragment)
    meta = library.fragment(number)
    path = library.path / "packs" / f"{meta.pack:010d}.pack"
    offset = path.stat().st_size
    with path.open("ab") as stream:
        stream.write(header + bytes(payload))
    size = len(header) + len(payload)
    execute(
        library,
        (
            "UPDATE fragments SET offset = ?, record_size = ?, predictor = ? WHERE number = ?",
            *(offset, size, fragment.predictor, number),
        ),
        (
            "UPDATE packs SET committed_size = ?, file_size = ? WHERE number = ?",
            *(offset + size, offset + size, meta.pack),
        ),
        ("DELETE FROM bases WHERE fragment = ?", number),
    )
    for position, base in enumerate(fragment.bases):
        execute(
            library,
            (
                "INSERT INTO bases SELECT ?, ?, number FROM fragments WHERE id = ?",
                *(number, position, bytes(base)),
            ),
        )


def delta_record(fragment_id: bytes, raw: bytes, base_id: bytes, base: bytes) -> Fragment:
    encoding = encode_predicted(
        raw,
        Dtype.F32,
        Prediction(Predictor.DELTA, (Dtype.F32,)),
        [memoryview(base)],
        grouped=True,
        zstd_level=3,
    )
    return Fragment(
        FragmentId(fragment_id),
        Dtype.F32,
        len(raw),
        checksum(raw),
        encoding.predictor,
        encoding.params,
        encoding.payload,
        (FragmentId(base_id),),
    )


@pytest.fixture
def cyclic(family, tmp_path):
    """Two fragments that are each predicted from the other: (library, base, dependent)."""
    add(family, write_model(tmp_path / "stranger", base_weights(seed=77)))
    base, dependent = base_fragment(family)
    raws = {n: bytes(family.decode_fragment(n, NO_SOURCE)) for n in (base, dependent)}
    forged = delta_record(
        family.fragment(base).id, raws[base], family.fragment(dependent).id, raws[dependent]
    )
    forge(family, base, forged)
    return family, base, dependent


def test_a_cycle_is_named(cyclic):
    library, base, dependent = cyclic
    for number in (base, dependent):
        with pytest.raises(IntegrityError, match="predicted from it") as caught:
            library.decode_fragment(number, NO_SOURCE)
        assert library.fragment(base).id.short in str(caught.value)
        assert library.fragment(dependent).id.short in str(caught.value)
    assert bad_models(library) == {b"base", b"tuned"}


def test_a_cycle_is_healed_by_adding_again(cyclic, tmp_path):
    library, _, _ = cyclic
    report = add(library, write_model(tmp_path / "again", base_weights()))
    assert report.healed
    assert_good(library)
    check_closures(library)


@pytest.mark.slow
def test_a_cycle_of_copies_does_not_hang_an_add(library, tmp_path):
    """Both records take a hundredth of their bytes: what planning takes for copies."""
    weights = base_weights()
    add(library, write_model(tmp_path / "base", weights))
    close = {name: value.copy() for name, value in weights.items()}
    for value in close.values():
        value.reshape(-1)[::5000] += np.float32(1e-3)
    add(library, write_model(tmp_path / "copy", close))
    for number, numbers in bases_of(library).items():
        if len(numbers) == 1:
            raws = {n: bytes(library.decode_fragment(n, NO_SOURCE)) for n in (number, *numbers)}
            ids = {n: library.fragment(n).id for n in raws}
            forged = delta_record(ids[numbers[0]], raws[numbers[0]], ids[number], raws[number])
            assert len(forged.payload) < 0.005 * forged.raw_size
            forge(library, numbers[0], forged)
    source = write_model(tmp_path / "other", tuned(weights, 5))
    program = (
        "import sys; from pathlib import Path; from fragfs.library.add import AddOptions;"
        " from fragfs.library.library import FragmentLibrary;"
        " FragmentLibrary.open(sys.argv[1]).add([Path(sys.argv[2])], AddOptions())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(library.path), str(source)],
        timeout=20,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    assert_good(library, "other")


def test_a_chain_that_is_too_long_ends(family):
    """A catalog says that every fragment is predicted from the next: no recursion without end."""
    plain = [n for n, bases in bases_of(family).items() if not bases]
    large = [n for n in plain if family.fragment(n).raw_size == 4 * ELEMENTS]
    raws = {n: bytes(family.decode_fragment(n, NO_SOURCE)) for n in large}
    ids = {n: family.fragment(n).id for n in large}
    for number, base in pairwise(large):
        forge(family, number, delta_record(ids[number], raws[number], ids[base], raws[base]))
    assert len(large) > 9
    with pytest.raises(IntegrityError, match="further than any"):
        family.decode_fragment(large[0], NO_SOURCE)
    assert family.decode_fragment(large[-2], NO_SOURCE) == raws[large[-2]]


@pytest.mark.parametrize("at", [30, 60, 300])
def test_adding_the_base_again_heals_what_is_predicted_from_it(family, tmp_path, at):
    base, _ = base_fragment(family)
    flip(family, base, at)
    assert bad_models(family) == {b"base", b"tuned"}
    report = add(family, write_model(tmp_path / "again", base_weights()))
    assert len(report.healed) == 1
    assert family.fragment(base).id.short in report.healed[0]
    assert_good(family)
    check_closures(family)


def test_adding_a_dependent_again_heals_only_itself(family, tmp_path):
    base, dependent = base_fragment(family)
    flip(family, base)
    report = add(family, write_model(tmp_path / "again", tuned(base_weights(), 1)))
    assert report.healed
    assert_good(family, "tuned")
    assert bad_models(family) == {b"base"}
    assert bases_of(family)[dependent] == []
    check_closures(family)


def test_nothing_new_rests_on_a_damaged_base(family, tmp_path):
    base, _ = base_fragment(family)
    flip(family, base)
    add(family, write_model(tmp_path / "third", tuned(base_weights(), 8)))
    assert_good(family, "third")
    assert bad_models(family) == {b"base", b"tuned"}
    check_closures(family)


@pytest.mark.slow
def test_a_pack_that_is_gone_is_healed_with_its_dependents(family, tmp_path):
    for path in (family.path / "packs").iterdir():
        path.unlink()
    with FragmentLibrary.open(family.path) as again:
        assert bad_models(again) == {b"base", b"tuned"}
        add(again, write_model(tmp_path / "again", base_weights()))
        add(again, write_model(tmp_path / "tuned again", tuned(base_weights(), 1)))
        assert_good(again)
        check_closures(again)


def test_removing_the_base_keeps_what_its_dependents_need(family):
    family.remove("base")
    assert_good(family, "tuned")


# --- crashes

ABORTED = """
import os, sys
from pathlib import Path
from fragfs.library import ingest
from fragfs.library.add import AddOptions
from fragfs.library.library import FragmentLibrary

ingest._BATCH_S = 0.0  # a batch for every fragment
left = int(sys.argv[3])
commit = ingest.Ingester.commit

def counted(self):
    global left
    commit(self)
    left -= 1
    if left == 0:
        os._exit(9)

ingest.Ingester.commit = counted
FragmentLibrary.open(sys.argv[1]).add([Path(p) for p in sys.argv[4:]], AddOptions())
"""


@pytest.mark.slow
@pytest.mark.parametrize("commits", [1, 5, 17])
def test_a_kill_between_batches(family, tmp_path, commits):
    weights = base_weights()
    sources = [
        write_model(tmp_path / "more" / "other", tuned(weights, 2)),
        write_model(tmp_path / "more" / "copy", weights, "BF16"),
    ]
    done = subprocess.run(
        [sys.executable, "-c", ABORTED, str(family.path), "", str(commits), *map(str, sources)],
        check=False,
    )
    assert done.returncode == 9
    assert_good(family)
    check_closures(family)
    known = {model.name for model in family.models()}
    report = add(family, *(path for path in sources if path.name.encode() not in known))
    assert report.reused_bytes
    assert_good(family)
    check_closures(family)


@pytest.mark.slow
def test_an_error_between_batches(family, tmp_path, monkeypatch):
    monkeypatch.setattr(ingest, "_BATCH_S", 0.0)
    commits = []
    commit = ingest.Ingester.commit

    def failing(self):
        commit(self)
        commits.append(1)
        if len(commits) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(ingest.Ingester, "commit", failing)
    source = write_model(tmp_path / "other", tuned(base_weights(), 2))
    with pytest.raises(KeyboardInterrupt):
        add(family, source)
    monkeypatch.undo()
    assert_good(family)
    check_closures(family)
    add(family, source)
    assert_good(family)
    check_closures(family)


@pytest.mark.slow
def test_small_batches_use_each_other(library, tmp_path, monkeypatch):
    monkeypatch.setattr(ingest, "_BATCH_S", 0.0)
    weights = base_weights()
    sources = [write_model(tmp_path / "a", weights), write_model(tmp_path / "b", weights, "BF16")]
    add(library, *sources)
    assert predictors(library, "b") == {"CAST"}
    assert_good(library)
    check_closures(library)


# --- libraries of format 1

SCHEMA_1 = """
CREATE TABLE library (
    only INTEGER PRIMARY KEY CHECK (only = 1),
    uuid BLOB NOT NULL,
    fragment_elements INTEGER NOT NULL,
    closure_max INTEGER NOT NULL,
    zstd_level INTEGER NOT NULL,
    pack_bytes_max INTEGER NOT NULL,
    generation INTEGER NOT NULL,
    batch BLOB NOT NULL
);
CREATE TABLE packs (
    number INTEGER PRIMARY KEY,
    committed_size INTEGER NOT NULL,
    file_size INTEGER NOT NULL,
    state INTEGER NOT NULL
);
CREATE TABLE fragments (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    id BLOB NOT NULL UNIQUE,
    pack INTEGER NOT NULL,
    offset INTEGER NOT NULL,
    record_size INTEGER NOT NULL,
    raw_size INTEGER NOT NULL,
    predictor INTEGER NOT NULL
);
CREATE TABLE models (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    name BLOB NOT NULL UNIQUE,
    parent BLOB NOT NULL,
    added_ns INTEGER NOT NULL,
    mtime_ns INTEGER NOT NULL,
    mode INTEGER NOT NULL
);
CREATE INDEX models_parent ON models (parent);
CREATE TABLE folders (
    path BLOB PRIMARY KEY,
    parent BLOB NOT NULL,
    mtime_ns INTEGER NOT NULL
) WITHOUT ROWID;
CREATE INDEX folders_parent ON folders (parent);
CREATE TABLE contents (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    sha256 BLOB NOT NULL,
    size INTEGER NOT NULL,
    mtime_ns INTEGER NOT NULL,
    stored_bytes INTEGER NOT NULL,
    verdict TEXT NOT NULL,
    extents BLOB NOT NULL
);
CREATE INDEX contents_shared ON contents (sha256) WHERE size >= 1048576;
CREATE TABLE files (
    model INTEGER NOT NULL,
    directory BLOB NOT NULL,
    name BLOB NOT NULL,
    content INTEGER,
    mode INTEGER NOT NULL,
    mtime_ns INTEGER NOT NULL,
    PRIMARY KEY (model, directory, name)
) WITHOUT ROWID;
CREATE INDEX files_content ON files (content) WHERE content IS NOT NULL;
"""
"""The catalog as version 1 of the format had it."""


def make_old(path: Path) -> Path:
    """Turn a library of fragments that are predicted from nothing into one of format 1."""
    new, old = path / "catalog.sqlite", path / "old.sqlite"
    source = sqlite3.connect(new)
    assert source.execute("SELECT count(*) FROM bases").fetchone() == (0,)
    target = sqlite3.connect(old)
    target.executescript("PRAGMA application_id = 0x46524147; PRAGMA user_version = 1;" + SCHEMA_1)
    for table in ("library", "packs", "fragments", "models", "folders", "contents", "files"):
        columns = [row[1] for row in target.execute(f"PRAGMA table_info({table})")]
        found = source.execute(f"SELECT {', '.join(columns)} FROM {table}").fetchall()
        marks = ", ".join("?" * len(columns))
        target.executemany(f"INSERT INTO {table} VALUES ({marks})", found)
    target.execute("DELETE FROM sqlite_sequence")
    target.executemany(
        "INSERT INTO sqlite_sequence VALUES (?, ?)",
        [r for r in source.execute("SELECT name, seq FROM sqlite_sequence")],
    )
    target.commit()
    target.execute("PRAGMA journal_mode = WAL")
    target.close()
    source.close()
    for leftover in path.glob("catalog.*"):
        leftover.unlink()
    old.rename(new)
    for pack in (path / "packs").iterdir():
        data = bytearray(pack.read_bytes())
        # Version in the header; its checksum covers all but the last 8 of its 64 bytes.
        assert data[8] == LIBRARY_FORMAT_VERSION
        data[8] = 1
        size = int.from_bytes(data[12:16], "little")
        data[size - 8 : size] = checksum(bytes(data[: size - 8])).to_bytes(8, "little")
        pack.write_bytes(data)
    return path


@pytest.fixture
def old(tmp_path):
    """A library of format 1 with a base in it."""
    with FragmentLibrary.create(tmp_path / "lib", CONFIG) as library:
        add(library, write_model(tmp_path / "base", base_weights()))
    return make_old(tmp_path / "lib")


def version(path: Path) -> int:
    connection = sqlite3.connect(path / "catalog.sqlite")
    try:
        return connection.execute("PRAGMA user_version").fetchone()[0]
    finally:
        connection.close()


def test_a_library_of_format_1_is_migrated(old, tmp_path):
    assert version(old) == 1
    with FragmentLibrary.open(old) as library:
        assert version(old) == LIBRARY_FORMAT_VERSION
        assert library.config == CONFIG
        assert_good(library)
        # Nothing in it has a signature yet: a fine-tune is stored from nothing, and found later.
        add(library, write_model(tmp_path / "tuned", tuned(base_weights(), 1)))
        report = add(library, write_model(tmp_path / "copy", tuned(base_weights(), 1), "BF16"))
        assert report.new_bytes < 0.02 * report.logical_bytes + 4000
        assert_good(library)
        check_closures(library)
        library.export("base", tmp_path / "out")
        assert digests(tmp_path / "out") == digests(tmp_path / "base")
    with FragmentLibrary.open(old) as again:
        assert_good(again)


@pytest.mark.slow
def test_two_processes_migrate_at_once(old):
    program = (
        "import sys; from fragfs.library.library import FragmentLibrary;"
        " library = FragmentLibrary.open(sys.argv[1]);"
        " assert not [x for x in library.verify() if x.error]"
    )
    processes = [subprocess.Popen([sys.executable, "-c", program, str(old)]) for _ in range(4)]
    assert [process.wait(timeout=60) for process in processes] == [0] * 4
    assert version(old) == LIBRARY_FORMAT_VERSION


def test_a_migrated_catalog_has_the_tables_of_a_new_one(old, tmp_path):
    FragmentLibrary.open(old).close()
    with FragmentLibrary.create(tmp_path / "new", CONFIG) as new:
        tables = "SELECT name FROM sqlite_master ORDER BY name"
        with FragmentLibrary.open(old) as library:
            assert rows(library, tables) == rows(new, tables)
            for (table,) in rows(new, "SELECT name FROM sqlite_master WHERE type = 'table'"):
                columns = f"PRAGMA table_info({table})"
                assert [r[1:] for r in rows(library, columns)] == [
                    r[1:] for r in rows(new, columns)
                ], table


def test_a_reader_of_a_snapshot_of_format_1_is_told_what_to_do(old, monkeypatch):
    shutil.copy(old / "catalog.sqlite", old / "catalog.snapshot")
    connection = sqlite3.connect(old / "catalog.snapshot")
    connection.execute("PRAGMA journal_mode = DELETE")
    connection.close()
    for extra in ("-wal", "-shm"):
        (old / f"catalog.snapshot{extra}").unlink(missing_ok=True)
    # As for a user who may not open the catalog nor write beside it; root may do everything.
    connect = sqlite3.connect

    def refuse(database, *arguments, **options):
        if "catalog.sqlite" in str(database):
            raise sqlite3.OperationalError("unable to open database file")
        return connect(database, *arguments, **options)

    monkeypatch.setattr(sqlite3, "connect", refuse)
    monkeypatch.setattr(os, "access", lambda *arguments, **options: False)
    with pytest.raises(FormatError) as caught:
        FragmentLibrary.open(old)
    assert "owner" in str(caught.value.remedy)
    assert (caught.value.expected, caught.value.actual) == (LIBRARY_FORMAT_VERSION, 1)


def test_a_newer_format_is_refused(family):
    execute(family, (f"PRAGMA user_version = {LIBRARY_FORMAT_VERSION + 1}",))
    with pytest.raises(FormatError, match="upgrade fragfs"):
        FragmentLibrary.open(family.path)


# --- the same whatever happens in between


@pytest.mark.slow
def test_many_adders_at_one_family(tmp_path):
    """Bases chosen while others commit: closures are checked again under the lock."""
    config = LibraryConfig(fragment_elements=ELEMENTS, closure_max=2)
    weights = base_weights()
    with FragmentLibrary.create(tmp_path / "lib", config) as library:
        add(library, write_model(tmp_path / "base", weights))
    program = (
        "import sys; from pathlib import Path; from fragfs.library import ingest;"
        " ingest._BATCH_S = 0.0; from fragfs.library.add import AddOptions;"
        " from fragfs.library.library import FragmentLibrary;"
        " FragmentLibrary.open(sys.argv[1]).add([Path(sys.argv[2])], AddOptions())"
    )
    sources = [write_model(tmp_path / f"tuned{n}", tuned(weights, n)) for n in range(3)]
    processes = [
        subprocess.Popen([sys.executable, "-c", program, str(tmp_path / "lib"), str(source)])
        for source in sources
    ]
    assert [process.wait(timeout=120) for process in processes] == [0] * 3
    with FragmentLibrary.open(tmp_path / "lib") as library:
        assert_good(library)
        check_closures(library)
