"""Residual words: every form, alone and mixed, and streams of whole words."""

import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fragfs.codec.groups import GROUPS_MAX
from fragfs.codec.residual import (
    decode_residual,
    encode_residual,
    estimate_residual,
    parse_streams,
    store_streams,
)
from fragfs.errors import FormatError
from fragfs.types import Dtype
from tests.codec import reference
from tests.codec.families import EVERY_KIND, as_dtype, nudged, numbers, unit_of, words_of

WIDTHS = {1: Dtype.U8, 2: Dtype.BF16, 4: Dtype.F32, 8: Dtype.F64}
EVERY_WIDTH = pytest.mark.parametrize("unit", WIDTHS)


def names(value):
    return getattr(value, "name", value)


def round_trip(words, prediction, dtype, *, grouped):
    params, payload = encode_residual(words, prediction, dtype, grouped=grouped, level=3)
    stored = b"".join(bytes(part) for part in payload)
    back, rest_params, rest_payload = decode_residual(
        memoryview(params + b"after"), memoryview(stored + b"behind"), prediction, dtype
    )
    assert np.array_equal(back, words)
    assert (bytes(rest_params), bytes(rest_payload)) == (b"after", b"behind")
    return params, stored


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("dtype", EVERY_KIND, ids=names)
def test_round_trips(dtype, grouped, kernels):
    prediction = words_of(as_dtype(numbers(), dtype), dtype)
    for share, step in ((0, 1), (0.02, 1), (0.2, 1), (0.9, 2), (1, 7), (1, 120), (1, 30_000)):
        words = words_of(nudged(prediction.tobytes(), dtype, 3, share, step), dtype)
        round_trip(words, prediction, dtype, grouped=grouped)


@EVERY_WIDTH
@pytest.mark.parametrize("count", [1, 2, 3, 7, 8, 9, 63, 4095, 4096, 4097, 16_385])
def test_sizes(unit, count, kernels):
    dtype = WIDTHS[unit]
    prediction = words_of(as_dtype(numbers(count), dtype), dtype)
    for step in (0, 1, 3, 200):
        words = words_of(nudged(prediction.tobytes(), dtype, 3, 0.5, step), dtype)
        for grouped in (False, True):
            round_trip(words, prediction, dtype, grouped=grouped)


@EVERY_WIDTH
def test_extreme_residuals(unit):
    dtype = WIDTHS[unit]
    top = (1 << 8 * unit) - 1
    prediction = np.array([0, top, 0, top, top >> 1, 1] * 500, f"<u{unit}")
    words = np.array([top, 0, 0, top, (top >> 1) + 1, 0] * 500, f"<u{unit}")
    round_trip(words, prediction, dtype, grouped=True)


@given(
    data=st.data(),
    unit=st.sampled_from(list(WIDTHS)),
    grouped=st.booleans(),
)
def test_any_words_round_trip(data, unit, grouped):
    count = data.draw(st.integers(1, 50))
    raw = [data.draw(st.binary(min_size=count * unit, max_size=count * unit)) for _ in range(2)]
    words, prediction = (np.frombuffer(part, f"<u{unit}") for part in raw)
    round_trip(words, prediction, WIDTHS[unit], grouped=grouped)


@EVERY_WIDTH
@pytest.mark.parametrize("form", [1, 2, 4, 8])
@pytest.mark.parametrize("method", [reference.RAW, reference.ZSTD])
def test_every_form_decodes(unit, form, method):
    rng = np.random.default_rng(form)
    dtype = WIDTHS[unit]
    for count in (1, 5, 77, 300):
        values = rng.integers(-2, 3, count).tolist()
        values[count // 2] = 100
        params, payload = reference.residual_of([(255, form, values)], unit, method)
        prediction = np.frombuffer(rng.bytes(count * unit), f"<u{unit}")
        back, _, _ = decode_residual(memoryview(params), memoryview(payload), prediction, dtype)
        expected = prediction + np.array(values).astype(prediction.dtype)
        assert np.array_equal(back, expected)


def test_forms_may_change_from_group_to_group(kernels):
    prediction = np.arange(0, 1 << 15, 41, dtype=np.uint32).astype("<u2")
    keys = (prediction >> 7).tolist()
    groups = []
    first = 0
    rng = np.random.default_rng(1)
    for last, form in zip((40, 41, 80, 120, 200, 255), (1, 0, 8, 4, 2, 8), strict=True):
        size = sum(first <= key <= last for key in keys)
        near = {0: 1, 1: 2, 2: 3, 4: 12, 8: 1000}[form]
        values = rng.integers(-near, near, size) * (form > 0)
        groups.append((last, form, values.tolist()))
        first = last + 1
    params, payload = reference.residual_of(groups, 2)
    back, _, _ = decode_residual(memoryview(params), memoryview(payload), prediction, Dtype.BF16)
    queues = [iter(values) for _, _, values in groups]
    expected = [
        (word + next(queues[next(g for g, (last, _, _) in enumerate(groups) if key <= last)]))
        % (1 << 16)
        for word, key in zip(prediction.tolist(), keys, strict=True)
    ]
    assert back.tolist() == expected


def test_right_throughout_is_the_prediction_itself():
    prediction = np.arange(100, dtype="<u4")
    assert encode_residual(prediction, prediction, Dtype.F32, grouped=True, level=3) == (b"\0", [])
    back, params, payload = decode_residual(
        memoryview(b"\0more"), memoryview(b"stored"), prediction, Dtype.F32
    )
    assert back is prediction
    assert (bytes(params), bytes(payload)) == (b"more", b"stored")


def test_decoded_words_outlive_the_next_decode():
    prediction = np.zeros(5000, "<u2")
    backs = []
    for step in (1, 2):
        words = np.full(5000, step, "<u2")
        words[::3] = 40_000 + step
        params, payload = encode_residual(words, prediction, Dtype.BF16, grouped=True, level=3)
        backs.append(
            decode_residual(
                memoryview(params), memoryview(b"".join(payload)), prediction, Dtype.BF16
            )[0]
        )
    assert [back[1] for back in backs] == [1, 2]
    assert [back[0] for back in backs] == [40_001, 40_002]


@pytest.mark.parametrize("dtype", [Dtype.BF16, Dtype.F32, Dtype.F16, Dtype.U8], ids=names)
@pytest.mark.parametrize(("share", "step"), [(0, 1), (0.05, 1), (0.5, 3), (1, 20), (1, 120)])
def test_estimates_are_near_what_is_stored(dtype, share, step):
    prediction = words_of(as_dtype(numbers(100_000), dtype), dtype)
    words = words_of(nudged(prediction.tobytes(), dtype, 3, share, step), dtype)
    for grouped in (False, True):
        params, payload = encode_residual(words, prediction, dtype, grouped=grouped, level=3)
        stored = len(params) + sum(map(len, payload))
        guess = estimate_residual(words, prediction, dtype, grouped=grouped)
        assert abs(guess - stored) <= 0.12 * stored + 0.01 * words.nbytes


@EVERY_WIDTH
@pytest.mark.parametrize("count", [1, 2, 1000, 70_000])
def test_streams(unit, count):
    for words in (
        np.arange(count, dtype=np.uint64).astype(f"<u{unit}"),
        np.full(count, (1 << 8 * unit) - 1, f"<u{unit}"),
        np.frombuffer(np.random.default_rng(1).bytes(count * unit), f"<u{unit}"),
    ):
        params, payload = [], []
        store_streams(words, 3, params, payload)
        back, rest, behind = parse_streams(
            memoryview(b"".join(params) + b"p"),
            memoryview(b"".join(payload) + b"q"),
            count,
            np.dtype(f"<u{unit}"),
        )
        assert np.array_equal(back, words)
        assert (bytes(rest), bytes(behind)) == (b"p", b"q")


# --- refusals

TEN = np.arange(10, dtype="<u2")


def group(last, size, form):
    return struct.pack("<BIB", last, size, form)


def plane(method, size):
    return struct.pack("<BI", method, size)


PLANES = plane(0, 10) * 2


@pytest.mark.parametrize(
    ("params", "payload"),
    [
        pytest.param(b"", b"", id="nothing"),
        pytest.param(b"\1", b"", id="no group"),
        pytest.param(b"\1" + group(255, 10, 8)[:-1], b"", id="half a group"),
        pytest.param(b"\1" + group(255, 10, 8), b"", id="no planes"),
        pytest.param(b"\1" + group(255, 10, 8) + plane(0, 10), bytes(10), id="one plane"),
        pytest.param(b"\1" + group(255, 10, 8) + PLANES, bytes(19), id="payload ends early"),
        pytest.param(b"\1" + group(255, 9, 8) + plane(0, 9) * 2, bytes(18), id="too few words"),
        pytest.param(b"\1" + group(255, 11, 8) + plane(0, 11) * 2, bytes(22), id="too many words"),
        pytest.param(b"\1" + group(255, 0, 8) + PLANES, bytes(20), id="no words"),
        pytest.param(b"\1" + group(255, 0xFFFFFFFF, 0), b"", id="very many words"),
        pytest.param(b"\1" + group(254, 10, 8) + PLANES, bytes(20), id="keys without group"),
        pytest.param(b"\2" + group(255, 5, 0) * 2, b"", id="group twice"),
        pytest.param(b"\2" + group(255, 5, 0) + group(1, 5, 0), b"", id="groups out of order"),
        pytest.param(b"\2" + group(9, 5, 0) + group(255, 5, 0), b"", id="sizes of other words"),
        pytest.param(
            bytes([GROUPS_MAX + 1])
            + b"".join(group(i, 1, 0) for i in range(GROUPS_MAX))
            + group(255, 1, 0),
            b"",
            id="too many groups",
        ),
        pytest.param(b"\1" + group(255, 10, 3), bytes(20), id="unknown form"),
        pytest.param(b"\1" + group(255, 10, 8) + plane(3, 10) * 2, bytes(20), id="unknown method"),
        pytest.param(b"\1" + group(255, 10, 8) + plane(1, 0) * 2, b"", id="constant of no byte"),
        pytest.param(b"\1" + group(255, 10, 8) + plane(1, 2) * 2, bytes(4), id="constant of two"),
        pytest.param(b"\1" + group(255, 10, 8) + plane(2, 10) * 2, bytes(20), id="no frame"),
        pytest.param(b"\1" + group(255, 10, 8) + plane(0, 1 << 31) * 2, bytes(20), id="huge plane"),
        pytest.param(b"\1" + group(255, 10, 4) + bytes(4), b"", id="codes without a stream"),
        pytest.param(b"\1" + group(255, 10, 4) + bytes(4) + plane(0, 4), bytes(4), id="few codes"),
        pytest.param(b"\1" + group(255, 10, 4) + bytes(4) + plane(0, 6), bytes(6), id="many codes"),
        pytest.param(
            b"\1" + group(255, 10, 4) + b"\1\0\0\0" + plane(0, 5), bytes(5), id="escapes missing"
        ),
        pytest.param(
            b"\1" + group(255, 10, 4) + b"\xff\0\0\0" + plane(1, 1), b"\xff", id="too many escapes"
        ),
        pytest.param(
            b"\1" + group(255, 10, 4) + b"\x0a\0\0\0" + plane(1, 1), b"\xff", id="escapes unstored"
        ),
    ],
)
def test_malformed(params, payload, kernels):
    with pytest.raises(FormatError):
        decode_residual(memoryview(params), memoryview(payload), TEN, Dtype.BF16)


@pytest.mark.parametrize(
    "params",
    [
        pytest.param(bytes([GROUPS_MAX + 1]), id="groups"),
        pytest.param(b"\1" + group(255, 10, 16), id="form"),
        pytest.param(b"\1" + group(255, 10, 8) + plane(3, 0), id="method"),
    ],
)
def test_what_a_newer_version_may_write_names_the_remedy(params):
    with pytest.raises(FormatError) as caught:
        decode_residual(memoryview(params), memoryview(b""), TEN, Dtype.BF16)
    assert caught.value.remedy == "upgrade fragfs"


def test_words_of_every_width_are_little_endian():
    assert [unit_of(dtype) for dtype in WIDTHS.values()] == [1, 2, 4, 8]
