"""Estimates against what an add then stores."""

from __future__ import annotations

import hashlib
import os

import numpy as np
import pytest

from fragfs.errors import FormatError, StorageError, UsageError
from fragfs.library.add import AddOptions
from fragfs.library.library import FragmentLibrary
from fragfs.library.sampling import Outcome, Stratum, StratumKey, form_strata, margin_of, pick
from fragfs.types import Dtype, LibraryConfig, SpanKind
from tests.library.families import ORDER, make_family
from tests.models import f32, safetensors_bytes

KEY = StratumKey(0, Dtype.BF16, SpanKind.TENSOR, "w")


@pytest.fixture
def library(tmp_path):
    config = LibraryConfig(fragment_elements=1 << 13)
    with FragmentLibrary.create(tmp_path / "lib", config) as library:
        yield library


def estimate(library, *paths, **options):
    return library.estimate(list(paths), AddOptions(**options))


def state_of(library):
    return {
        path.relative_to(library.path): hashlib.sha256(path.read_bytes()).digest()
        for path in library.path.rglob("*")
        if path.is_file()
    }


def test_it_is_close_to_what_an_add_stores(library, tmp_path):
    family = make_family(tmp_path / "sources", scale=2)
    for name in ORDER:
        before = state_of(library)
        report = estimate(library, family[name])
        assert state_of(library) == before, "an estimate wrote something"
        added = library.add([family[name]], AddOptions())
        assert report.logical_bytes == added.logical_bytes
        assert report.exact_bytes == added.reused_bytes
        assert report.stored_bytes == pytest.approx(added.new_bytes, rel=0.1), name
        assert report.sampled_bytes < 0.5 * report.logical_bytes, name
        new_bytes = sum(raw_bytes for raw_bytes, _ in report.mechanisms.values())
        assert new_bytes == report.logical_bytes - report.exact_bytes
        assert sum(stored for _, stored in report.mechanisms.values()) == report.stored_bytes
    names = {path for path in os.listdir(library.path / "packs")}
    assert names


def test_similarity_among_the_paths_counts(library, tmp_path):
    family = make_family(tmp_path / "sources", scale=2)
    paths = [family[name] for name in ("base", "copy", "tuned")]
    alone = estimate(library, family["tuned"])
    report = estimate(library, *paths)
    assert {"cast", "planes"} <= report.mechanisms.keys()
    added = sum(library.add([path], AddOptions()).new_bytes for path in paths)
    assert report.stored_bytes == pytest.approx(added, rel=0.1)
    assert report.stored_bytes < estimate_solo(alone) + added


def estimate_solo(report):
    """What the fine-tune would take by itself: far more than next to its base."""
    assert report.mechanisms.keys() <= {"planes", "raw", "zstd", "constant"}
    return report.stored_bytes


def test_equal_pieces_count_once(library, tmp_path):
    family = make_family(tmp_path / "sources")
    once = estimate(library, family["base"])
    os.link(family["base"] / "model.safetensors", family["copy"] / "again.safetensors")
    twice = estimate(library, family["base"], family["copy"] / "again.safetensors")
    size = (family["base"] / "model.safetensors").stat().st_size
    assert twice.exact_bytes == once.exact_bytes + size
    assert twice.stored_bytes == once.stored_bytes
    library.add([family["base"]], AddOptions())
    report = estimate(library, family["base"])
    assert (report.exact_bytes, report.stored_bytes) == (report.logical_bytes, 0)
    assert (report.mechanisms, report.margin_bytes) == ({}, 0)


def test_little_is_encoded_whole(library, tmp_path):
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "notes.txt").write_text("words and words " * 5_000)
    report = estimate(library, tmp_path / "small")
    added = library.add([tmp_path / "small"], AddOptions())
    assert report.stored_bytes == added.new_bytes
    assert report.sampled_bytes == report.logical_bytes - report.exact_bytes


def test_what_an_add_refuses_is_refused(library, tmp_path):
    with pytest.raises(UsageError, match="nothing to look at"):
        estimate(library)
    with pytest.raises(UsageError, match="contain one another"):
        estimate(library, library.path)
    source = tmp_path / "cut"
    source.mkdir()
    rng = np.random.default_rng(1)
    whole = safetensors_bytes({"w": f32(rng, 300, 300)})
    (source / "model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(FormatError, match=r"model\.safetensors"):
        estimate(library, source)
    assert estimate(library, source, force=True).logical_bytes == len(whole) - 100


def test_a_file_that_shrinks_meanwhile_is_named(library, tmp_path):
    source = tmp_path / "model"
    source.mkdir()
    rng = np.random.default_rng(1)
    weights = source / "model.safetensors"
    weights.write_bytes(safetensors_bytes({"w": f32(rng, 1000, 1000)}))

    class Shrink:
        """Cuts the file as soon as it has been read once."""

        def start(self, what, total_bytes):
            if what != "reading":
                os.truncate(weights, 10_000)

        def advance(self, size):
            return None

        def note(self, text):
            return None

    with pytest.raises(StorageError, match=r"model\.safetensors changed while it was read"):
        library.estimate([source], AddOptions(), Shrink())


# --- samples


def stratum_of(sizes):
    stratum = Stratum(KEY)
    for number, size in enumerate(sizes):
        stratum.add(number, size)
    return stratum


def test_samples_lie_evenly_and_are_not_taken_twice():
    stratum = stratum_of([100] * 30)
    assert stratum.spread(3) == [5, 15, 25]
    stratum.outcomes[15] = Outcome(50, "delta")
    assert stratum.spread(3) == [5, 25]
    assert stratum.spread(50) == [at for at in range(30) if at != 15]
    # The short last pieces of tensors are not all that is looked at.
    assert all(at % 2 == 0 for at in stratum_of([1000, 10] * 6).spread(2))


def test_what_lies_between_samples_is_interpolated():
    stratum = stratum_of([1_000_000] * 5)
    stratum.outcomes[0] = Outcome(100_000, "delta")
    stratum.outcomes[4] = Outcome(300_000, "cast")
    found = stratum.estimate()
    assert [round(stored, -3) for _, _, stored in found] == [1e5, 1.5e5, 2e5, 2.5e5, 3e5]
    assert [name for name, _, _ in found] == ["delta", "delta", "delta", "cast", "cast"]


def test_sampling_stops_early_where_all_is_alike_and_goes_on_where_it_is_not():
    def run(share_of):
        sizes = [1 << 20] * 120
        strata = form_strata([(KEY, size) for size in sizes])
        while picked := pick(strata):
            for stratum, at in picked:
                stored = round(share_of(stratum.pieces[at]) * stratum.sizes[at])
                stratum.outcomes[at] = Outcome(stored, "delta")
        true = sum(share_of(number) * size for number, size in enumerate(sizes))
        (stratum,) = strata
        estimated = sum(stored for _, _, stored in stratum.estimate())
        return len(stratum.outcomes), estimated / true - 1, margin_of(strata) / estimated

    count, error, margin = run(lambda number: 0.2 + 0.1 * number / 120)
    assert count == 10
    assert abs(error) < 0.01
    assert margin < 0.05
    draws = np.random.default_rng(3).random(120)
    count, error, margin = run(lambda number: 0.4 if draws[number] < 0.5 else 0.05)
    assert 30 <= count <= 36
    assert abs(error) < 2 * margin
    assert margin > 0.05


def test_strata_are_tensors_of_one_name_and_small_ones_are_joined():
    def key(name, source=0, dtype=Dtype.BF16):
        return StratumKey.of(source, dtype, SpanKind.TENSOR, name)

    pieces = [(key(f"layers.{i}.up.weight"), 1_000_000) for i in range(10)]
    pieces += [(key(f"layers.{i}.bias"), 100) for i in range(10)]
    pieces += [(key(f"layers.{i}.scale"), 100) for i in range(10)]
    pieces += [(key("layers.0.up.weight", source=1), 1_000_000)]
    strata = form_strata(pieces)
    assert sorted(stratum.pieces for stratum in strata) == [
        list(range(10)),
        list(range(10, 30)),
        [30],
    ]
