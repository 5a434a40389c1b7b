import ml_dtypes
import numpy as np
import pytest

from fragfs.similarity.numbers import find_reader, has_numbers
from fragfs.types import Dtype

ORACLES = {
    Dtype.F16: np.dtype("<f2"),
    Dtype.BF16: np.dtype(ml_dtypes.bfloat16),
    Dtype.F8_E4M3: np.dtype(ml_dtypes.float8_e4m3fn),
    Dtype.F8_E5M2: np.dtype(ml_dtypes.float8_e5m2),
    Dtype.F8_E4M3FNUZ: np.dtype(ml_dtypes.float8_e4m3fnuz),
    Dtype.F8_E5M2FNUZ: np.dtype(ml_dtypes.float8_e5m2fnuz),
    Dtype.F8_E8M0: np.dtype(ml_dtypes.float8_e8m0fnu),
}


@pytest.mark.parametrize("dtype", list(ORACLES))
def test_every_narrow_float_is_read_exactly(dtype):
    reader = find_reader(dtype)
    words = np.arange(1 << dtype.bits, dtype=reader.word)
    with np.errstate(all="ignore"):
        expected = words.view(ORACLES[dtype]).astype(np.float32)
    expected = np.where(np.isfinite(expected), expected, np.float32(0)).view(np.uint32)
    if dtype is Dtype.F8_E8M0:
        expected[0] = 0  # 2**-127, the one number that is a denormal binary32
    patterns = reader.to_patterns(words)
    same = patterns == expected
    assert same[(expected & 0x7FFFFFFF) > 0].all()
    assert not (patterns & 0x7FFFFFFF)[(expected & 0x7FFFFFFF) == 0].any()


def test_binary64_is_cut_to_what_binary32_holds():
    reader = find_reader(Dtype.F64)
    values = np.array(
        [0.0, -0.0, 1.0, -1.5, 1 + 2**-30, 1e300, -1e300, 1e-300, 5e-324, np.inf, np.nan], "<f8"
    )
    patterns = reader.to_patterns(values.view("<u8")).tolist()
    assert patterns == [
        0, 0x80000000, 0x3F800000, 0xBFC00000, 0x3F800000, 0x7F7FFFFF, 0xFF7FFFFF, 0, 0, 0, 0,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("dtype", "values", "expected"),
    [
        (Dtype.I8, [-128, -1, 0, 127], [-128, -1, 0, 127]),
        (Dtype.U8, [0, 127, 128, 255], [-128, -1, 0, 127]),
        (Dtype.U16, [0, 65535], [0, 65535]),
        (Dtype.I64, [-(2**62), 2**40], [-(2.0**62), 2.0**40]),
        (Dtype.U64, [2**64 - 1], [2.0**64]),
    ],
)
def test_integers_are_read_as_numbers(dtype, values, expected):
    reader = find_reader(dtype)
    patterns = reader.to_patterns(np.array(values, reader.word))
    assert patterns.view(np.float32).tolist() == expected


def test_what_has_numbers():
    without = {dtype for dtype in Dtype if not has_numbers(dtype)}
    packed = {Dtype.F4, Dtype.F6_E2M3, Dtype.F6_E3M2}
    assert without == {Dtype.BYTES, Dtype.QUANT, Dtype.BOOL} | packed


def test_words_are_little_endian_on_every_machine():
    for dtype in Dtype:
        if reader := find_reader(dtype):
            assert reader.word == reader.word.newbyteorder("<")
