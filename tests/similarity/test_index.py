import numpy as np
import pytest

from fragfs.errors import UsageError
from fragfs.similarity.index import (
    DEFAULT_SIMILARITY_THRESHOLD,
    MemorySignatureRows,
    SimilarityIndex,
    SimilarityMatch,
    SimilarityThreshold,
    split_limit,
)
from fragfs.similarity.signature import SignatureConfig, name_key, sign_fragment
from fragfs.types import Dtype
from tests.similarity.measure_recall import SqliteSignatureRows
from tests.similarity.rows_suite import ROWS_CHECKS


@pytest.mark.parametrize("rows_class", [MemorySignatureRows, SqliteSignatureRows])
@pytest.mark.parametrize("check", ROWS_CHECKS)
def test_rows(check, rows_class):
    check(rows_class())


def weights(seed, count=4096):
    return np.random.default_rng(seed).standard_normal(count).astype(np.float32)


def sign(values):
    return sign_fragment(values.astype("<f4").tobytes(), Dtype.F32)


@pytest.fixture
def rows():
    rows = MemorySignatureRows()
    for number in range(100):
        rows.add(number, sign(weights(number)))
    return rows


def test_the_closest_come_first(rows):
    base = weights(7)
    for number, noise in ((200, 0.001), (201, 0.05), (202, 0.01)):
        rows.add(number, sign(base + weights(number) * np.float32(noise)))
    found = SimilarityIndex(rows).query(sign(base))
    assert [match.fragment for match in found] == [7, 200, 202, 201]
    assert found[0] == SimilarityMatch(7, 0.0, Dtype.F32)
    distances = [match.distance for match in found]
    assert distances == sorted(distances)
    assert all(map(DEFAULT_SIMILARITY_THRESHOLD.admits, distances))


def test_count_bounds_the_matches(rows):
    for number in range(100, 110):
        rows.add(number, sign(weights(7)))
    index = SimilarityIndex(rows)
    assert [match.fragment for match in index.query(sign(weights(7)), count=2)] == [7, 100]
    assert len(index.query(sign(weights(7)), count=100)) == 11


def test_strangers_are_no_matches_even_under_a_hint(rows):
    key = name_key("layers.0.weight", 0)
    rows.add(500, sign(weights(500)), [key])
    assert SimilarityIndex(rows).query(sign(weights(1000)), [key]) == []


def test_a_hint_finds_what_keys_do_not(rows):
    base = weights(7)
    far = base + weights(501) * np.float32(0.5)
    key = name_key("layers.0.weight", 3)
    rows.add(501, sign(far), [key])
    rows.add(502, sign(base), [name_key("layers.0.weight", 4)])
    target = sign(base)
    assert 501 not in {match.fragment for match in SimilarityIndex(rows).query(target)}
    assert 501 in {match.fragment for match in SimilarityIndex(rows).query(target, [key])}


def test_excluded_fragments_are_not_returned(rows):
    target = sign(weights(7))
    assert SimilarityIndex(rows).query(target, exclude=[7]) == []
    assert len(SimilarityIndex(rows).query(target, exclude=[8, 9])) == 1


def test_many_rows_are_merged(rows):
    more = MemorySignatureRows()
    more.add(7, sign(weights(7)))
    more.add(300, sign(weights(7)))
    found = SimilarityIndex(rows, more).query(sign(weights(7)))
    assert [match.fragment for match in found] == [7, 300]
    assert SimilarityIndex().query(sign(weights(7))) == []


def test_the_threshold_is_honoured(rows):
    rows.add(200, sign(weights(7) + weights(200) * np.float32(0.05)))
    strict = SimilarityIndex(rows, threshold=SimilarityThreshold(0.01))
    assert [match.fragment for match in strict.query(sign(weights(7)))] == [7]


def test_rows_per_key_is_honoured():
    rows = MemorySignatureRows()
    for number in range(50):
        rows.add(number, sign(weights(7)))
    index = SimilarityIndex(rows, config=SignatureConfig(rows_per_key=30))
    found = index.query(index.sign(weights(7).tobytes(), Dtype.F32), count=100)
    assert [match.fragment for match in found] == [0, 1, 49]


def test_the_index_signs_as_it_is_configured():
    config = SignatureConfig(bands=2)
    raw = weights(1).tobytes()
    assert SimilarityIndex(config=config).sign(raw, Dtype.F32) == sign_fragment(
        raw, Dtype.F32, config
    )


@pytest.mark.parametrize("distance", [0.0, 1.0, -0.5, 2.0, float("nan")])
def test_thresholds_are_checked(distance):
    with pytest.raises(UsageError, match="threshold"):
        SimilarityThreshold(distance)


def test_split_limit_prefers_the_oldest():
    limits = [split_limit(limit) for limit in (1, 19, 20, 30, 40)]
    assert limits == [(1, 0), (1, 0), (1, 1), (2, 1), (2, 2)]


def test_a_large_family_stays_searchable():
    """The next checkpoint of one of 400 siblings is found although coarse keys are capped."""
    rows = MemorySignatureRows()
    base = weights(0)
    members = [base + weights(n) * np.float32(0.03) for n in range(1, 401)]
    for number, member in enumerate(members):
        rows.add(number, sign(member))
    index = SimilarityIndex(rows)
    hits = 0
    for number in range(100, 300, 4):
        near = members[number] + weights(1000 + number) * np.float32(0.001)
        found = index.query(sign(near))
        hits += bool(found) and found[0].fragment == number
    assert hits >= 45
