import json
import random
import struct
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fragfs.codec.encoding import decode
from fragfs.codec.solo import encode_solo
from fragfs.errors import FormatError, LimitError, UsageError
from fragfs.types import FRAGMENT_BYTES_MAX, PREDICTORS_FROM_BASES, Dtype, Predictor

LEVEL = 3
GOLDEN = json.loads(Path(__file__).with_name("golden_planes.json").read_text())

# Bytes of the words that planes are cut from, written out apart from the code under test.
UNIT = {
    **dict.fromkeys([Dtype.F16, Dtype.BF16, Dtype.I16, Dtype.U16], 2),
    **dict.fromkeys([Dtype.F32, Dtype.I32, Dtype.U32, Dtype.C64], 4),
    **dict.fromkeys([Dtype.F64, Dtype.I64, Dtype.U64, Dtype.C128], 8),
}
FLOATS = [Dtype.BF16, Dtype.F16, Dtype.F32, Dtype.F64, Dtype.C64, Dtype.C128]
EVERY_DTYPE = pytest.mark.parametrize("dtype", list(Dtype), ids=lambda dtype: dtype.name)


def weights(dtype, size, seed=0):
    """Bytes of normally distributed weights, as `dtype` where it is a wide float."""
    values = np.random.default_rng(seed).standard_normal(size // 2 + 1) * 0.02
    if dtype is Dtype.BF16:
        raw = (values.astype("<f4").view("<u4") >> 16).astype("<u2").tobytes()
    elif dtype is Dtype.F16:
        raw = values.astype("<f2").tobytes()
    elif dtype in (Dtype.F64, Dtype.C128):
        raw = values.astype("<f8").tobytes()
    else:
        raw = values.astype("<f4").tobytes()
    return raw[:size]


def special_values(dtype, size):
    """Every exponent at its extremes with every kind of mantissa: NaN payloads, -0.0, denormals."""
    unit = UNIT.get(dtype, 1)
    bits = 8 * unit
    words = [0, 1 << (bits - 1), (1 << bits) - 1, 1, (1 << (bits - 1)) + 1]
    for exponent_bits, mantissa_bits in ((5, 10), (8, 7), (8, 23), (11, 52)):
        if 1 + exponent_bits + mantissa_bits == bits:
            infinity = ((1 << exponent_bits) - 1) << mantissa_bits
            one = (infinity >> (mantissa_bits + 1)) << mantissa_bits
            words += [infinity, infinity | 1, infinity | 1 << (mantissa_bits - 1), infinity - 1]
            words += [word | 1 << (bits - 1) for word in words] + [one, (1 << mantissa_bits) - 1]
    packed = b"".join(word.to_bytes(unit, "little") for word in words)
    return (packed * (size // len(packed) + 1))[:size]


def noise(dtype, size):
    return random.Random(size).randbytes(size)


def constant(dtype, size):
    return (bytes(range(1, 17))[: max(dtype.bits // 8, 1)] * (size + 1))[:size]


def few_values(dtype, size):
    return bytes(random.Random(size).choices(b"\0\0\0\1\x80", k=size))


KINDS = [weights, special_values, noise, constant, few_values]


def check_round_trip(raw, dtype, level=LEVEL):
    encoding = encode_solo(raw, dtype, zstd_level=level)
    assert len(encoding.params) + len(encoding.payload) == encoding.size <= len(raw)
    back = decode(
        encoding.predictor, dtype, encoding.params, memoryview(encoding.payload), len(raw)
    )
    assert back.readonly
    assert back == raw
    return encoding


@EVERY_DTYPE
def test_every_small_size_round_trips(dtype):
    for kind in KINDS:
        for size in range(71):
            check_round_trip(kind(dtype, size), dtype)


@EVERY_DTYPE
def test_sizes_around_block_edges_round_trip(dtype):
    for kind in KINDS:
        for size in (16383, 16384, 16389, (1 << 17) - 1, (1 << 17) + 9):
            check_round_trip(kind(dtype, size), dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", UNIT, ids=lambda dtype: dtype.name)
def test_more_elements_than_are_merged_at_a_time(dtype):
    for extra in (-1, 0, 1, 5):
        check_round_trip(weights(dtype, (1 << 18) * UNIT[dtype] + extra), dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [Dtype.BF16, Dtype.F64, Dtype.U8, Dtype.BYTES])
def test_the_largest_fragment(dtype):
    check_round_trip(weights(dtype, FRAGMENT_BYTES_MAX), dtype, level=1)


@given(raw=st.binary(max_size=400), repeat=st.integers(1, 40), dtype=st.sampled_from(list(Dtype)))
def test_any_bytes_round_trip(raw, repeat, dtype):
    check_round_trip(raw * repeat, dtype)


@pytest.mark.parametrize("level", [1, 12, 19])
def test_every_level_round_trips(level):
    for dtype in (Dtype.BYTES, Dtype.BOOL, Dtype.F32):
        check_round_trip(few_values(dtype, 30_000), dtype, level)


@pytest.mark.parametrize("wrap", [bytes, bytearray, memoryview, lambda raw: memoryview(raw)[3:]])
def test_every_kind_of_buffer(wrap):
    check_round_trip(wrap(weights(Dtype.F32, 4096)), Dtype.F32)


def test_a_view_of_wider_items():
    words = memoryview(np.arange(3000, dtype="<u4"))
    encoding = encode_solo(words, Dtype.U32, zstd_level=LEVEL)
    back = decode(encoding.predictor, Dtype.U32, encoding.params, encoding.payload, 12000)
    assert bytes(back) == words.tobytes()


class TestSizes:
    """Stored sizes that the choice of encodings must reach."""

    @pytest.mark.parametrize(
        ("dtype", "share_max"),
        [(Dtype.BF16, 0.68), (Dtype.F16, 0.86), (Dtype.F32, 0.84), (Dtype.F64, 0.88)],
        ids=lambda value: getattr(value, "name", value),
    )
    def test_weights(self, dtype, share_max):
        raw = weights(dtype, 1 << 18)
        assert check_round_trip(raw, dtype).size <= share_max * len(raw)

    def test_complex_numbers_store_like_their_parts(self):
        raw = weights(Dtype.F32, 1 << 17)
        assert encode_solo(raw, Dtype.C64, zstd_level=LEVEL) == encode_solo(
            raw, Dtype.F32, zstd_level=LEVEL
        )

    def test_f32_that_was_bf16(self):
        narrow = np.frombuffer(weights(Dtype.BF16, 1 << 17), "<u2")
        encoding = check_round_trip((narrow.astype("<u4") << 16).tobytes(), Dtype.F32)
        assert encoding.size <= 0.34 * 4 * narrow.size

    def test_f64_that_was_f32(self):
        narrow = np.frombuffer(weights(Dtype.F32, 1 << 17), "<f4")
        encoding = check_round_trip(narrow.astype("<f8").tobytes(), Dtype.F64)
        assert encoding.size <= 0.43 * 8 * narrow.size

    def test_f32_of_few_distinct_values(self):
        values = np.frombuffer(weights(Dtype.F32, 64), "<f4")
        raw = np.random.default_rng(1).choice(values, 1 << 15).tobytes()
        assert check_round_trip(raw, Dtype.F32).size <= 0.25 * len(raw)

    def test_sparse_f32(self):
        values = np.frombuffer(weights(Dtype.F32, 1 << 17), "<f4").copy()
        values[np.random.default_rng(1).random(values.size) < 0.9] = 0
        assert check_round_trip(values.tobytes(), Dtype.F32).size <= 0.16 * values.nbytes

    def test_repeated_rows(self):
        raw = weights(Dtype.BF16, 3000) * 50
        assert check_round_trip(raw, Dtype.BF16).size <= 0.05 * len(raw)

    def test_sparse_bool(self):
        raw = (np.random.default_rng(1).random(1 << 17) < 0.01).tobytes()
        assert check_round_trip(raw, Dtype.BOOL).size <= 0.04 * len(raw)

    def test_small_integers(self):
        raw = np.random.default_rng(1).integers(-100, 100, 1 << 15).astype("<i8").tobytes()
        assert check_round_trip(raw, Dtype.I64).size <= 0.25 * len(raw)

    def test_text(self):
        raw = b"".join(b'"layers.%d.weight":{"dtype":"BF16"},' % index for index in range(5000))
        encoding = check_round_trip(raw, Dtype.BYTES, level=12)
        assert encoding.predictor is Predictor.ZSTD
        assert encoding.size <= 0.1 * len(raw)

    def test_one_repeated_element_is_constant(self):
        for dtype in Dtype:
            encoding = check_round_trip(constant(dtype, 4096 + 5), dtype)
            assert encoding.predictor is Predictor.CONSTANT, dtype
            assert encoding.size == max(dtype.bits // 8, 1), dtype

    def test_noise_is_a_view_of_the_callers_bytes(self):
        for dtype in Dtype:
            raw = bytearray(noise(dtype, 40_000))
            encoding = encode_solo(raw, dtype, zstd_level=LEVEL)
            assert (encoding.predictor, encoding.params) == (Predictor.RAW, b""), dtype
            raw[0] ^= 0xFF
            assert encoding.payload == raw, dtype


class TestRefusals:
    def test_too_large_to_encode(self):
        with pytest.raises(LimitError):
            encode_solo(bytes(FRAGMENT_BYTES_MAX + 1), Dtype.U8, zstd_level=LEVEL)

    @pytest.mark.parametrize("level", [-1, 0, 20])
    def test_level_out_of_range(self, level):
        with pytest.raises(UsageError):
            encode_solo(b"x", Dtype.U8, zstd_level=level)

    @pytest.mark.parametrize("predictor", [10, 255, -1])
    def test_unknown_predictor_names_the_remedy(self, predictor):
        with pytest.raises(FormatError) as caught:
            decode(predictor, Dtype.BF16, b"", memoryview(b""), 4)
        assert caught.value.remedy == "upgrade fragfs"

    @pytest.mark.parametrize("predictor", Predictor)
    def test_impossible_raw_size(self, predictor):
        for raw_size in (-1, FRAGMENT_BYTES_MAX + 1, 1 << 60):
            with pytest.raises(FormatError):
                decode(predictor, Dtype.BF16, b"\0", memoryview(b""), raw_size)

    @pytest.mark.parametrize(
        ("predictor", "dtype", "params", "payload", "raw_size"),
        [
            (Predictor.RAW, Dtype.U8, b"", b"abc", 4),
            (Predictor.RAW, Dtype.U8, b"", b"abc", 2),
            (Predictor.RAW, Dtype.U8, b"x", b"abc", 3),
            (Predictor.CONSTANT, Dtype.U8, b"", b"", 3),
            (Predictor.CONSTANT, Dtype.U8, bytes(17), b"", 3),
            (Predictor.CONSTANT, Dtype.U8, b"x", b"y", 3),
            (Predictor.ZSTD, Dtype.BYTES, b"", b"", 3),
            (Predictor.ZSTD, Dtype.BYTES, b"", b"", 0),
            (Predictor.ZSTD, Dtype.BYTES, b"", b"not a frame", 3),
            (Predictor.PLANES, Dtype.BF16, b"", b"", 2),
            (Predictor.PLANES, Dtype.BF16, b"\0\0", b"\0", 1),
            (Predictor.PLANES, Dtype.U8, b"\0\0", b"", 2),
        ],
    )
    def test_malformed(self, predictor, dtype, params, payload, raw_size):
        with pytest.raises(FormatError):
            decode(predictor, dtype, params, memoryview(payload), raw_size)

    def test_zstd_frame_with_more_behind_it(self):
        raw = b"layers.weight" * 100
        encoding = encode_solo(raw, Dtype.BYTES, zstd_level=LEVEL)
        for stored in (encoding.payload + b"\0", encoding.payload * 2, encoding.payload[:-1]):
            with pytest.raises(FormatError):
                decode(encoding.predictor, Dtype.BYTES, b"", memoryview(stored), len(raw))


def golden_arguments(vector):
    return (
        vector["predictor"],
        Dtype[vector["dtype"]],
        bytes.fromhex(vector["params"]),
        memoryview(bytes.fromhex(vector["payload"])),
        vector["raw_size"],
    )


def test_golden_vectors_decode_forever():
    wrong = [v["name"] for v in GOLDEN if decode(*golden_arguments(v)).hex() != v["raw"]]
    assert wrong == []


def test_golden_vectors_cover_every_predictor_from_nothing():
    from_nothing = set(Predictor) - PREDICTORS_FROM_BASES
    assert {vector["predictor"] for vector in GOLDEN} == from_nothing


def kind_of(vector):
    return vector["predictor"], Dtype[vector["dtype"]].bits


@pytest.mark.parametrize("kind", sorted({kind_of(vector) for vector in GOLDEN}), ids=str)
def test_damage_raises_only_format_error(kind):
    for vector in (v for v in GOLDEN if kind_of(v) == kind):
        predictor, dtype, params, payload, raw_size = golden_arguments(vector)
        for damaged_params, damaged_payload in damages(params, payload.tobytes()):
            for size in (raw_size, raw_size + 1, max(raw_size - dtype.bits, 0)):
                stored = damaged_params, memoryview(damaged_payload)
                try:
                    back = decode(predictor, dtype, *stored, size)
                except FormatError:
                    continue
                assert len(back) == size, vector["name"]


def damages(params, payload):
    """Truncations, extensions, single flipped bits, wrong bytes."""
    rng = random.Random(len(payload))
    for cut in range(len(params)):
        yield params[:cut], payload
    yield params + b"\0", payload
    yield params, payload[:-1]
    yield params, payload + b"\0"
    for index in range(len(params)):
        for value in (0, 1, 2, 3, 0x10, 0x13, 0x20, 0x30, 0x7F, 0xFF, params[index] ^ 1):
            yield params[:index] + bytes([value]) + params[index + 1 :], payload
    for _ in range(100 if payload else 0):
        index = rng.randrange(len(payload))
        flipped = payload[index] ^ 1 << rng.randrange(8)
        yield params, payload[:index] + bytes([flipped]) + payload[index + 1 :]


@given(
    predictor=st.integers(0, 4),
    dtype=st.sampled_from(list(Dtype)),
    params=st.binary(max_size=50),
    payload=st.binary(max_size=100),
    raw_size=st.integers(0, 200),
)
def test_arbitrary_bytes_raise_only_format_error(predictor, dtype, params, payload, raw_size):
    try:
        back = decode(predictor, dtype, params, memoryview(payload), raw_size)
    except FormatError:
        return
    assert len(back) == raw_size


def frame_header(content_size, window_descriptor):
    """The start of a zstd frame (RFC 8878, 3.1.1.1): 8-byte content size, explicit window."""
    return struct.pack("<IBBQ", 0xFD2FB528, 0b11000000, window_descriptor, content_size)


@pytest.mark.parametrize("content_size", [1 << 20, 1 << 40, (1 << 64) - 2])
@pytest.mark.parametrize("window_descriptor", [0x00, 0x50, 0x88, 0xFF])
def test_hostile_frames_ask_for_memory_in_vain(content_size, window_descriptor):
    block_of_zeros = (1 | 1 << 1 | (1 << 17) << 3).to_bytes(3, "little") + b"\0"
    frame = frame_header(content_size, window_descriptor) + block_of_zeros
    params = bytes([1, 2]) + struct.pack("<BIBI", 2, len(frame), 1, 1)
    for predictor, given_params, payload in (
        (Predictor.ZSTD, b"", frame),
        (Predictor.PLANES, params, frame + b"\0"),
    ):
        for raw_size in (2 << 10, 1 << 20, 2 << 20):
            with pytest.raises(FormatError):
                decode(predictor, Dtype.BF16, given_params, memoryview(payload), raw_size)


def test_threads_do_not_disturb_each_other():
    raws = [(dtype, weights(dtype, 60_000 + 1000 * i, seed=i)) for i, dtype in enumerate(FLOATS)]
    raws += [(Dtype.BYTES, few_values(Dtype.BYTES, 50_000)), (Dtype.U8, noise(Dtype.U8, 9000))]
    failures = []
    start = threading.Barrier(4)

    def work(offset):
        start.wait()
        for round_index in range(24):
            dtype, raw = raws[(offset + round_index) % len(raws)]
            try:
                check_round_trip(raw, dtype)
            except Exception as error:  # every thread's failure must reach the test
                failures.append(error)

    threads = [threading.Thread(target=work, args=(2 * index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_results_survive_later_decodes():
    first, second = weights(Dtype.F32, 40_000, seed=1), weights(Dtype.F32, 40_000, seed=2)
    encodings = [encode_solo(raw, Dtype.F32, zstd_level=LEVEL) for raw in (first, second)]
    backs = [
        decode(found.predictor, Dtype.F32, found.params, memoryview(found.payload), 40_000)
        for found in encodings
    ]
    assert backs == [first, second]


FLUSHED = """
import json, sys
import numpy as np
import torch
if not torch.set_flush_denormal(True):
    sys.exit(77)
assert (np.full(8, 1e-40, np.float32) * np.float32(1)).max() == 0, "denormals are not flushed"
from fragfs.codec.encoding import decode
from fragfs.codec.solo import encode_solo
from fragfs.types import Dtype
for vector in json.load(open(sys.argv[1])):
    dtype, raw = Dtype[vector["dtype"]], bytes.fromhex(vector["raw"])
    stored = bytes.fromhex(vector["params"]), memoryview(bytes.fromhex(vector["payload"]))
    assert decode(vector["predictor"], dtype, *stored, len(raw)) == raw, vector["name"]
    again = encode_solo(raw, dtype, zstd_level=3)
    back = decode(again.predictor, dtype, again.params, memoryview(again.payload), len(raw))
    assert back == raw, vector["name"]
"""


@pytest.mark.slow
def test_flushing_denormals_changes_nothing():
    pytest.importorskip("torch")
    golden = Path(__file__).with_name("golden_planes.json")
    done = subprocess.run(
        [sys.executable, "-c", FLUSHED, str(golden)], capture_output=True, text=True, check=False
    )
    if done.returncode == 77:
        pytest.skip("this processor cannot flush denormals")
    assert done.returncode == 0, done.stderr
