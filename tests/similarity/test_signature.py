import json
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fragfs.errors import UsageError
from fragfs.similarity.signature import (
    DEFAULT_SIGNATURE_CONFIG,
    SIGNATURE_VERSION,
    SignatureConfig,
    name_key,
    sign_fragment,
)
from fragfs.similarity.sketch import SKETCH_SIZE
from fragfs.types import Dtype

CONFIG = DEFAULT_SIGNATURE_CONFIG
BF16 = np.dtype(ml_dtypes.bfloat16)
NUMERIC = [
    dtype
    for dtype in Dtype
    if dtype not in (Dtype.BYTES, Dtype.QUANT, Dtype.BOOL) and dtype.bits % 8 == 0
]


def weights(seed, count=5000):
    return np.random.default_rng(seed).standard_normal(count).astype(np.float32) * np.float32(0.03)


def sign(values, dtype=Dtype.F32, config=CONFIG):
    return sign_fragment(values.tobytes(), dtype, config)


def shared_keys(a, b):
    return len(set(a.keys) & set(b.keys))


def test_a_signature_says_what_it_is_of():
    signature = sign(weights(1))
    assert signature.version == SIGNATURE_VERSION
    assert signature.element_count == 5000
    assert len(signature.sketch) == SKETCH_SIZE
    assert len(signature.keys) == CONFIG.bands + 2
    assert all(-(2**63) <= key < 2**63 for key in signature.keys)
    with pytest.raises(FrozenInstanceError):
        signature.version = 2


def test_element_counts_are_of_whole_elements():
    raw = weights(1).tobytes()
    assert sign_fragment(raw, Dtype.F32).element_count == 5000
    assert sign_fragment(raw, Dtype.C64).element_count == 2500
    assert sign_fragment(raw[:-1], Dtype.F32).element_count == 4999


@pytest.mark.parametrize(
    "wrap", [bytes, bytearray, memoryview, lambda raw: memoryview(raw).cast("f")]
)
def test_any_buffer_will_do(wrap):
    assert sign_fragment(wrap(weights(1).tobytes()), Dtype.F32) == sign(weights(1))


@pytest.mark.parametrize(
    "dtype", [Dtype.BYTES, Dtype.QUANT, Dtype.BOOL, Dtype.F4, Dtype.F6_E2M3, Dtype.F6_E3M2]
)
def test_what_is_no_number_has_no_signature(dtype):
    assert sign_fragment(weights(1).tobytes(), dtype) is None


@pytest.mark.parametrize("dtype", NUMERIC)
def test_every_numeric_dtype_has_one(dtype):
    assert sign_fragment(golden_raw(dtype, 1000), dtype) is not None


def test_few_numbers_have_no_signature():
    assert sign(weights(1, CONFIG.numbers_min - 1)) is None
    assert sign(weights(1, CONFIG.numbers_min)) is not None
    assert sign(weights(1, 0)) is None


@pytest.mark.parametrize(
    "values",
    [
        np.zeros(5000, np.float32),
        -np.zeros(5000, np.float32),
        np.full(5000, 0.02, np.float32),
        np.full(5000, np.nan, np.float32),
        np.tril(np.full((100, 100), -np.inf, np.float32)),
        np.eye(100, dtype=np.float32),
        np.where(np.arange(5000) % 100 == 0, weights(1), np.float32(0)),
    ],
    ids=["zero", "minus zero", "constant", "nan", "mask", "identity", "sparse"],
)
def test_hardly_any_variety_means_no_signature(values):
    assert sign(values) is None


def test_fragments_of_two_values_have_few_coarse_keys():
    """Mostly zero windows would put strangers under one key."""
    keep = np.random.default_rng(1).random(20_000) < 0.1
    signature = sign(np.where(keep, weights(1, 20_000), np.float32(0)))
    assert signature is None or len(signature.keys) < CONFIG.bands + 2


@pytest.mark.parametrize("noise", [0.001, 0.01, 0.03])
def test_fine_tunes_share_coarse_keys(noise):
    met = 0
    for seed in range(100):
        values = weights(seed)
        tuned = values + weights(seed + 1000) * np.float32(noise)
        met += shared_keys(sign(values), sign(tuned)) > 0
    assert met >= 99


CASTS = [
    (Dtype.BF16, BF16, 1.0),
    (Dtype.F16, np.dtype("<f2"), 1.0),
    (Dtype.F64, np.dtype("<f8"), 1.0),
    (Dtype.F8_E4M3, np.dtype(ml_dtypes.float8_e4m3fn), 1.0),
    (Dtype.F8_E4M3, np.dtype(ml_dtypes.float8_e4m3fn), 700.0),
    (Dtype.F8_E5M2, np.dtype(ml_dtypes.float8_e5m2), 1.0),
    (Dtype.I8, np.dtype("<i1"), 900.0),
]


@pytest.mark.parametrize(("dtype", "numpy_dtype", "scale"), CASTS)
def test_casts_share_coarse_keys(dtype, numpy_dtype, scale):
    met = 0
    for seed in range(100):
        values = weights(seed)
        scaled = values * np.float32(scale)
        cast = (np.rint(scaled) if dtype is Dtype.I8 else scaled).astype(numpy_dtype)
        met += shared_keys(sign(values), sign(cast, dtype)) > 0
    assert met >= 97


def test_strangers_share_no_keys():
    owners = {}
    for seed in range(500):
        for key in sign(weights(seed)).keys:
            owners.setdefault(key, []).append(seed)
    assert sum(len(seeds) > 1 for seeds in owners.values()) <= 2


def test_fine_keys_are_for_close_siblings():
    near = far = 0
    for seed in range(100):
        values = weights(seed)
        fine = set(sign(values).keys[CONFIG.bands :])
        for noise, count in ((0.001, "near"), (0.05, "far")):
            tuned = sign(values + weights(seed + 1000) * np.float32(noise))
            hit = bool(fine & set(tuned.keys[CONFIG.bands :]))
            if count == "near":
                near += hit
            else:
                far += hit
    assert near >= 85
    assert far <= 10


@pytest.mark.parametrize(
    ("count", "other"), [(5000, 4500), (4100, 4090), (4095, 2100), (512, 1000)]
)
def test_longer_and_shorter_siblings_share_keys(count, other):
    met = 0
    for seed in range(50):
        values = weights(seed, max(count, other))
        met += shared_keys(sign(values[:count]), sign(values[:other])) > 0
    assert met == 50


def test_places_are_read_alike_wherever_a_tensor_was_cut():
    values = weights(1, 3 << 19)
    cut = [sign(part) for part in np.split(values, 3)]
    assert len({signature.sketch for signature in cut}) == 3
    assert shared_keys(cut[0], cut[1]) == 0


def test_denormals_nan_and_infinity_are_read_quietly():
    values = weights(1)
    values[::7] = np.nan
    values[1::7] = np.inf
    values[2::7] = -0.0
    values[3::7] = np.float32(1e-42)
    assert sign(values) is not None
    assert sign((weights(1).astype(np.float64) * 1e-38).astype(np.float32)) is None


def test_numbers_that_are_not_finite_count_as_zero():
    values = weights(1)
    plain, strange = values.copy(), values.copy()
    plain[::3] = 0
    strange[::3] = np.resize(np.array([np.nan, np.inf, -np.inf], np.float32), plain[::3].size)
    assert sign(plain) == sign(strange)


@pytest.mark.slow
def test_flushed_denormals_change_nothing():
    torch = pytest.importorskip("torch")
    raws = {dtype: np.random.default_rng(1).bytes(40_000) for dtype in NUMERIC}
    tiny = (weights(2).astype(np.float64) * 1e-37).astype(np.float32).tobytes()
    before = [sign_fragment(raw, dtype) for dtype, raw in raws.items()]
    before.append(sign_fragment(tiny, Dtype.F32))
    try:
        if not torch.set_flush_denormal(True):
            pytest.skip("this processor cannot flush denormals")
        after = [sign_fragment(raw, dtype) for dtype, raw in raws.items()]
        after.append(sign_fragment(tiny, Dtype.F32))
    finally:
        torch.set_flush_denormal(False)
    assert after == before


@given(raw=st.binary(max_size=200), repeats=st.integers(1, 100), dtype=st.sampled_from(list(Dtype)))
def test_any_bytes_are_signed_the_same_twice(raw, repeats, dtype):
    # Hypothesis draws short strings only, so they are repeated, each time changed a little.
    grown = b"".join(bytes((byte + n) & 0xFF for byte in raw) for n in range(repeats))
    signature = sign_fragment(grown, dtype)
    assert signature == sign_fragment(bytearray(grown), dtype)
    if signature:
        assert len(signature.sketch) == SKETCH_SIZE
        assert 0 < len(signature.keys) == len(set(signature.keys))


@given(seed=st.integers(0, 2**32 - 1), dtype=st.sampled_from(NUMERIC))
def test_random_bits_are_signed(seed, dtype):
    raw = np.random.default_rng(seed).bytes(700 * dtype.bits // 8)
    assert sign_fragment(raw, dtype) == sign_fragment(memoryview(raw), dtype)


@pytest.mark.parametrize(
    "fields",
    [
        {"bands": 0},
        {"bands": 3},
        {"bands": 18},
        {"band_windows": 0},
        {"band_windows": 65},
        {"window_size": 5},
        {"window_size": 256},
        {"numbers_min": 31},
        {"rows_per_key": 0},
    ],
)
def test_configurations_are_checked(fields):
    with pytest.raises(UsageError):
        replace(CONFIG, **fields)


def test_the_configuration_is_honoured():
    values = weights(1)
    assert len(sign(values, config=SignatureConfig(bands=8)).keys) == 10
    assert sign(values, config=SignatureConfig(numbers_min=5001)) is None
    for other in (SignatureConfig(band_windows=5), SignatureConfig(window_size=32)):
        coarse = set(sign(values, config=other).keys[:5])
        assert not coarse & set(sign(values).keys[:5])


def test_small_configurations_work():
    config = SignatureConfig(bands=2, band_windows=1, window_size=4, numbers_min=8)
    for count in range(8, 70):
        sign(weights(count, count), config=config)


def test_names_have_keys():
    keys = {name_key(name, index) for name in ("a", "b", "a.weight", "") for index in range(9)}
    assert len(keys) == 36
    assert all(-(2**63) <= key < 2**63 for key in keys)
    assert name_key("\udcff\u00e9", 1) != name_key("\u00e9", 1)


GOLDEN = json.loads(Path(__file__).with_name("golden_signatures.json").read_text())


def golden_raw(dtype, count):
    """Numbers of eight octaves from a generator of our own: the same with any numpy."""
    parts = 2 if dtype in (Dtype.C64, Dtype.C128) else 1
    bits, exponent_bits, mantissa_bits = (
        dtype.bits // parts,
        dtype.exponent_bits,
        dtype.mantissa_bits,
    )
    state, raw = 1, bytearray()
    for _ in range(count * parts):
        state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
        word = (state ^ state >> 33) & ((1 << bits) - 1)
        if exponent_bits:
            middle = max((1 << (exponent_bits - 1)) - 5, 0)
            exponent = middle + (state >> 40 & 7)
            word &= ~(((1 << exponent_bits) - 1) << mantissa_bits)
            word |= exponent << mantissa_bits
        raw += word.to_bytes(bits // 8, "little")
    return bytes(raw)


def test_golden_file_is_complete():
    assert GOLDEN["version"] == SIGNATURE_VERSION, "a new version needs golden values of its own"
    assert set(GOLDEN["signatures"]) == {dtype.name for dtype in NUMERIC}


@pytest.mark.parametrize("dtype", NUMERIC)
def test_signatures_never_change_within_a_version(dtype):
    """If this fails, stored signatures no longer meet new ones: bump SIGNATURE_VERSION."""
    signature = sign_fragment(golden_raw(dtype, 3000), dtype)
    golden = GOLDEN["signatures"][dtype.name]
    assert signature.sketch.hex() == golden["sketch"]
    assert list(signature.keys) == golden["keys"]


def test_name_keys_never_change():
    assert {name: name_key(name, 7) for name in GOLDEN["names"]} == GOLDEN["names"]
