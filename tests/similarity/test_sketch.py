import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fragfs.similarity.positions import SAMPLES, sample_places, shared_samples
from fragfs.similarity.signature import sign_fragment
from fragfs.similarity.sketch import (
    SKETCH_SIZE,
    pack_sketch,
    sketch_distance,
    sketch_distances,
    sketch_dtype,
)
from fragfs.types import Dtype

CASTS = {
    Dtype.F32: np.dtype("<f4"),
    Dtype.F64: np.dtype("<f8"),
    Dtype.F16: np.dtype("<f2"),
    Dtype.BF16: np.dtype(ml_dtypes.bfloat16),
    Dtype.F8_E4M3: np.dtype(ml_dtypes.float8_e4m3fn),
    Dtype.F8_E5M2: np.dtype(ml_dtypes.float8_e5m2),
    Dtype.F8_E4M3FNUZ: np.dtype(ml_dtypes.float8_e4m3fnuz),
    Dtype.F8_E5M2FNUZ: np.dtype(ml_dtypes.float8_e5m2fnuz),
}


def weights(seed, count=5000):
    return np.random.default_rng(seed).standard_normal(count).astype(np.float32) * np.float32(0.03)


def sketch(values, dtype=Dtype.F32):
    signature = sign_fragment(values.astype(CASTS.get(dtype, "<i1")).tobytes(), dtype)
    assert signature is not None
    return signature.sketch


def unpack(data):
    """Numbers of a sketch, bit by bit from the table in the module's docstring."""
    bits = "".join(f"{byte:08b}" for byte in data[4:])
    zero = max((data[3] + 1) * 64 - 1024, 63)
    values = []
    for index in range(SAMPLES):
        code = bits[11 * index : 11 * index + 11]
        magnitude = int(code[1:], 2)
        exponent, mantissa = divmod(magnitude + zero, 64)
        value = 2.0 ** (exponent - 127) * (1 + mantissa / 64) if magnitude else 0.0
        values.append(-value if code[0] == "1" else value)
    return np.array(values)


def test_a_sketch_holds_the_numbers_at_its_places():
    values = weights(1)
    data = sketch(values)
    assert (len(data), data[0], data[1], data[2]) == (SKETCH_SIZE, 1, Dtype.F32.code, 12)
    at_places = values[sample_places(12)].astype(np.float64)
    assert unpack(data) == pytest.approx(at_places, rel=2**-7, abs=2**-24)


def test_a_sketch_tells_its_dtype():
    assert sketch_dtype(sketch(weights(1), Dtype.BF16)) is Dtype.BF16
    assert sketch_dtype(b"") is None
    assert sketch_dtype(bytes([1, 255, 9]) + bytes(SKETCH_SIZE - 3)) is None


def test_numbers_far_below_the_largest_count_as_zero():
    values = weights(1)
    places = sample_places(12)
    values[places[:4]] = [1e9, -2e9, 3e9, 1e5]
    data = unpack(sketch(values))
    assert data[:4] == pytest.approx([1e9, -2e9, 3e9, 1e5], rel=2**-7)
    assert not data[4:].any()


@pytest.mark.parametrize("level", range(3, 22))
def test_half_of_the_places_are_those_of_the_level_below(level):
    mine, below = sample_places(level), sample_places(level - 1)
    assert mine.max() < 1 << level
    shared = shared_samples(level, level - 1)
    assert np.count_nonzero(shared) == SAMPLES // 2
    assert (mine[shared] == below[shared]).all()
    assert (mine[~shared] >= 1 << (level - 1)).all()
    assert shared_samples(level, level).all()
    assert (shared_samples(level - 1, level) == shared).all()


def test_distances_grow_with_the_noise():
    values = weights(2)
    noise = weights(3)
    distances = sketch_distances(
        sketch(values),
        [sketch(values + noise * np.float32(e)) for e in (0, 0.002, 0.01, 0.05, 0.2, 0.5)],
    )
    assert distances[0] == 0
    assert (np.diff(distances) > 0).all()
    assert distances[2] == pytest.approx(0.0075, rel=0.6)
    assert distances[5] < 0.6


def test_strangers_are_far():
    sketches = [sketch(weights(seed)) for seed in range(300)]
    distances = np.array([sketch_distances(data, sketches) for data in sketches])
    others = distances[~np.eye(300, dtype=bool)]
    assert np.count_nonzero(others < 0.6) <= len(others) * 1e-3
    assert others.mean() > 0.9


def test_strangers_with_a_common_mean_are_far():
    """Norm weights are all near 1: what is common to all of them is no likeness."""
    sketches = [sketch(1 + weights(seed)) for seed in range(50)]
    distances = np.array([sketch_distances(data, sketches) for data in sketches])
    assert distances[~np.eye(50, dtype=bool)].min() > 0.5


def test_strangers_with_common_outliers_are_far():
    columns = np.ones(5000, np.float32)
    columns[::5] = 30
    sketches = [sketch(np.abs(weights(seed)) * np.sign(columns) * columns) for seed in range(50)]
    distances = np.array([sketch_distances(data, sketches) for data in sketches])
    assert np.median(distances[~np.eye(50, dtype=bool)]) > 0.4


@pytest.mark.parametrize("dtype", list(CASTS))
def test_casts_are_near_and_their_source_is_the_nearest(dtype):
    values = weights(4)
    target = sketch(values, dtype)
    sibling = values + weights(5) * np.float32(0.05)
    distances = sketch_distances(target, [sketch(values), sketch(sibling)])
    assert distances[0] <= 0.005
    assert distances[0] < distances[1]


def test_a_source_is_not_zero_from_its_coarse_cast():
    values = weights(4)
    assert sketch_distance(sketch(values), sketch(values, Dtype.F8_E4M3)) > 0.005
    assert sketch_distance(sketch(values, Dtype.F8_E4M3), sketch(values)) == 0


@pytest.mark.parametrize("scale", [1e-3, 700.0])
def test_quantized_copies_are_near_at_any_scale(scale):
    values = weights(6)
    quantized = np.rint(values * (127 / np.abs(values).max()))
    target = sketch(quantized, Dtype.I8)
    source = sketch(values * np.float32(scale))
    stranger = sketch(weights(7) * np.float32(scale))
    assert sketch_distance(target, source) < 0.002
    assert sketch_distance(source, target) < 0.05
    assert sketch_distance(target, stranger) > 0.6


def test_quantized_copies_of_two_kinds_are_near():
    values = weights(6)
    whole = sketch(np.rint(values * (127 / np.abs(values).max())), Dtype.I8)
    small = sketch(values, Dtype.F8_E4M3)
    assert sketch_distance(whole, small) < 0.1
    assert sketch_distance(small, whole) < 0.1


def test_a_scaled_copy_in_a_wide_dtype_is_another_fragment():
    values = weights(6)
    assert sketch_distance(sketch(values), sketch(values * np.float32(100))) > 0.9


@pytest.mark.parametrize(
    ("count", "near"), [(4000, True), (2047, True), (1100, True), (900, False)]
)
def test_lengths_may_differ(count, near):
    values = weights(8, 4500)
    noisy = values + weights(9, 4500) * np.float32(0.01)
    for a, b in ((values, noisy[:count]), (noisy[:count], values)):
        distance = sketch_distance(sketch(a), sketch(b))
        assert (distance < 0.05) if near else (distance == 1)


def test_many_to_one_equals_one_to_one():
    target = sketch(weights(1))
    bases = [
        sketch(weights(1, count) + weights(seed, count), dtype)
        for seed, (count, dtype) in enumerate(
            [(5000, Dtype.F32), (3000, Dtype.BF16), (9000, Dtype.F8_E4M3), (5000, Dtype.F16)] * 3
        )
    ]
    each = [sketch_distance(target, base) for base in bases]
    assert sketch_distances(target, bases).tolist() == pytest.approx(each, abs=1e-12)
    assert sketch_distances(target, []).tolist() == []


def test_malformed_sketches_are_far_from_everything():
    good = sketch(weights(1))
    broken = [
        b"",
        good[:-1],
        good + b"\0",
        b"\2" + good[1:],
        good[:1] + bytes([Dtype.BYTES.code]) + good[2:],
        good[:1] + b"\xff" + good[2:],
        good[:2] + b"\xff" + good[3:],
    ]
    assert sketch_distances(good, [*broken, good]).tolist() == [1.0] * len(broken) + [0.0]
    for sketch_ in broken:
        assert sketch_distance(sketch_, good) == 1


@given(st.binary(min_size=SKETCH_SIZE, max_size=SKETCH_SIZE), st.data())
def test_any_bytes_are_compared_quietly(first, data):
    second = data.draw(st.binary(min_size=SKETCH_SIZE, max_size=SKETCH_SIZE))
    code = data.draw(st.sampled_from([dtype.code for dtype in CASTS]))
    for a, b in ((first, second), (second, first)):
        a, b = (bytes((1, code, 9)) + x[3:] for x in (a, b))
        assert 0 <= sketch_distance(a, b) <= 1
        assert 0 <= sketch_distance(a, first) <= 1


def test_sketches_of_hardly_any_variety_are_refused():
    patterns = np.zeros(SAMPLES, np.uint32)
    assert pack_sketch(patterns, Dtype.F32, 10) is None
    patterns[:3] = [0x3F800000, 0x40000000, 0x40400000]
    assert pack_sketch(patterns, Dtype.F32, 10) is None
    patterns[3] = 0xBF800000
    assert pack_sketch(patterns, Dtype.F32, 10) is not None
