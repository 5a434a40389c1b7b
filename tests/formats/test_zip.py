from __future__ import annotations

import io
import struct
import zipfile

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fragfs.formats.detect import parse_layout
from fragfs.formats.layout import FileFormat
from fragfs.formats.probe import guess_dtype
from fragfs.types import Dtype, SpanKind
from tests.formats.format_samples import Source, cuts_of, layout_of, zip_bytes

RNG_SEED = 7


def weights(dtype: object, count: int = 60_000, scale: float = 0.02) -> bytes:
    return np.random.default_rng(RNG_SEED).normal(0, scale, count).astype(dtype).tobytes()


def member_spans(data: bytes) -> list[tuple[int, int, Dtype]]:
    layout = layout_of(data, "pytorch_model.bin")
    return [
        (span.offset, span.size, span.dtype)
        for span in layout.spans
        if span.kind is SpanKind.MEMBER
    ]


def expected_range(data: bytes, content: bytes) -> tuple[int, int]:
    assert data.count(content) == 1
    return data.index(content), len(content)


def test_stored_members_are_spans_with_their_guessed_dtype():
    contents = [weights(ml_dtypes.bfloat16), weights(np.float32), weights(np.float16)]
    data = zip_bytes(
        {
            "archive/data.pkl": b"\x80\x02small",
            "archive/data/0": contents[0],
            "archive/data/1": contents[1],
            "archive/data/2": contents[2],
            "archive/version": b"3\n",
        }
    )
    layout = layout_of(data, "pytorch_model.bin")
    assert (layout.format, layout.verdict, layout.tensors) == (FileFormat.ZIP, "", ())
    assert member_spans(data) == [
        (*expected_range(data, content), dtype)
        for content, dtype in zip(contents, (Dtype.BF16, Dtype.F32, Dtype.F16), strict=True)
    ]
    assert [span.kind for span in layout.spans] == [
        SpanKind.OPAQUE,
        SpanKind.MEMBER,
    ] * 3 + [SpanKind.OPAQUE]


def test_members_are_cut_by_elements_from_their_own_start():
    first = zip_bytes({"pad": b"x" * 100, "data/0": weights(np.float32)})
    second = zip_bytes({"pad": b"x" * 3001, "data/0": weights(np.float32)})
    sizes = []
    for data in (first, second):
        cuts = [cut for cut in cuts_of(layout_of(data, "m.pt")) if cut.kind is SpanKind.MEMBER]
        sizes.append([cut.size for cut in cuts])
        assert [cut.size for cut in cuts[:-1]] == [4096 * 4] * (len(cuts) - 1)
    assert sizes[0] == sizes[1]


@pytest.mark.slow
def test_torch_files_give_their_storages(tmp_path):
    torch = pytest.importorskip("torch")
    generator = torch.Generator().manual_seed(RNG_SEED)
    tensor = torch.randn(200, 300, generator=generator)
    path = tmp_path / "m.pt"
    torch.save({"w": tensor, "h": tensor.bfloat16(), "small": torch.zeros(3)}, path)
    assert [(size, dtype) for _, size, dtype in member_spans(path.read_bytes())] == [
        (240_000, Dtype.F32),
        (120_000, Dtype.BF16),
    ]


def test_compressed_and_small_members_stay_opaque():
    data = zip_bytes({"a": weights(np.float32)}, zipfile.ZIP_DEFLATED)
    assert member_spans(data) == []
    data = zip_bytes({f"m{i}": b"y" * 4095 for i in range(40)})
    layout = layout_of(data, "m.zip")
    assert [span.kind for span in layout.spans] == [SpanKind.OPAQUE]
    assert layout.format is FileFormat.ZIP


def test_streamed_archives_with_data_descriptors():
    class Pipe(io.RawIOBase):
        def __init__(self):
            self.parts = []

        def writable(self):
            return True

        def write(self, data):
            self.parts.append(bytes(data))
            return len(data)

    pipe = Pipe()
    content = weights(np.float16)
    with zipfile.ZipFile(pipe, "w") as archive:
        archive.writestr("data/0", content)
    data = b"".join(pipe.parts)
    assert member_spans(data) == [(*expected_range(data, content), Dtype.F16)]


def test_zip64_sizes_and_offsets_are_read_from_the_extra_field():
    content = weights(np.float32)
    buffer = io.BytesIO()
    with (
        zipfile.ZipFile(buffer, "w") as archive,
        archive.open("data/0", "w", force_zip64=True) as f,
    ):
        f.write(content)
    data = bytearray(buffer.getvalue())
    directory = data.rindex(b"PK\x01\x02")
    end = data.rindex(b"PK\x05\x06")
    central = data[directory:end]
    name_size = struct.unpack_from("<H", central, 28)[0]
    extra = struct.pack("<HHHHQQQ", 0xCAFE, 0, 1, 24, len(content), len(content), 0)
    struct.pack_into("<II", central, 20, 2**32 - 1, 2**32 - 1)
    struct.pack_into("<H", central, 30, len(extra))
    struct.pack_into("<I", central, 42, 2**32 - 1)
    central = central[: 46 + name_size] + extra
    end64 = struct.pack("<4sQHHIIQQQQ", b"PK\6\6", 44, 45, 45, 0, 0, 1, 1, len(central), directory)
    locator = struct.pack("<4sIQI", b"PK\6\7", 0, directory + len(central), 1)
    end32 = struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, 2**32 - 1, 2**32 - 1, 0)
    wide = bytes(data[:directory] + central + end64 + locator + end32)
    with zipfile.ZipFile(io.BytesIO(wide)) as archive:
        assert archive.read("data/0") == content
    assert member_spans(wide) == [(*expected_range(wide, content), Dtype.F32)]


def patched(data: bytes, magic: bytes, position: int, form: str, value: int) -> bytes:
    raw = bytearray(data)
    struct.pack_into(form, raw, raw.rindex(magic) + position, value)
    return bytes(raw)


ONE = zip_bytes({"data/0": weights(np.float32)})
TWO = zip_bytes({"data/0": weights(np.float32), "data/1": weights(np.float32)})


@pytest.mark.parametrize(
    "data",
    [
        patched(ONE, b"PK\1\2", 42, "<I", 99),
        patched(ONE, b"PK\1\2", 42, "<I", 2**31),
        patched(ONE, b"PK\1\2", 24, "<I", 2**31),
        patched(ONE, b"PK\1\2", 24, "<I", 5000),
        patched(patched(ONE, b"PK\1\2", 20, "<I", 2**31), b"PK\1\2", 24, "<I", 2**31),
        patched(ONE, b"PK\1\2", 8, "<H", 1),
        patched(ONE, b"PK\3\4", 28, "<H", 2**16 - 1),
    ],
    ids=[
        "offset",
        "offset past the end",
        "size",
        "sizes differ",
        "both sizes",
        "encrypted",
        "local extra",
    ],
)
def test_bogus_members_are_left_out(data):
    layout = layout_of(data, "m.pt")
    assert layout.format is FileFormat.ZIP
    assert [span.kind for span in layout.spans] == [SpanKind.OPAQUE]


def test_overlapping_members_are_left_out():
    data = patched(TWO, b"PK\1\2", 42, "<I", 0)
    assert len(member_spans(TWO)) == 2
    assert len(member_spans(data)) == 1


@pytest.mark.parametrize(
    "data",
    [
        ONE[:-1],
        patched(ONE, b"PK\5\6", 12, "<I", 2**31),
        patched(ONE, b"PK\5\6", 16, "<I", 2**31),
        patched(ONE, b"PK\5\6", 10, "<H", 2),
        patched(ONE, b"PK\5\6", 10, "<H", 0xFFFF),
        patched(ONE, b"PK\5\6", 16, "<I", 0),
    ],
    ids=[
        "cut off",
        "directory size",
        "directory offset",
        "count",
        "zip64 without its record",
        "directory elsewhere",
    ],
)
def test_unreadable_archives_are_opaque(data):
    layout = layout_of(data, "m.pt")
    assert (layout.format, layout.verdict, layout.refusal) == (FileFormat.OPAQUE, "", None)


@pytest.mark.parametrize("data", [ONE[:-30], ONE[:5000], b"PK\3\4" + bytes(100_000)])
def test_a_checkpoint_without_its_end_is_truncated(data):
    layout = layout_of(data, "m.pt")
    assert layout.format is FileFormat.OPAQUE
    assert "truncated" in (layout.refusal or "")
    assert layout_of(data, "notes.zip").refusal is None


def test_only_directory_headers_and_samples_are_read():
    content = weights(np.float32, 2_000_000)
    source = Source(zip_bytes({"data/0": content}))
    parse_layout("m.pt", source.size, source.read_at)
    assert source.read_bytes < 150_000


SAMPLE = zip_bytes({"a": b"1234" * 5000, "b": weights(np.float16, 30_000), "c": b"x"})


@pytest.mark.slow
@settings(deadline=None, derandomize=True, max_examples=300)
@given(st.data())
def test_mutated_archives_never_fail(data):
    mutated = bytearray(SAMPLE)
    directory = mutated.index(b"PK\1\2")
    for _ in range(data.draw(st.integers(1, 5))):
        index = data.draw(st.integers(0, 30) | st.integers(directory, len(mutated) - 1))
        mutated[index] = data.draw(st.integers(0, 255))
    layout_of(bytes(mutated), "m.pt")


def guess(data: bytes) -> Dtype:
    return guess_dtype(0, len(data), Source(data).read_at)


@pytest.mark.parametrize("scale", [1e-4, 0.02, 1.0])
@pytest.mark.parametrize("count", [2048, 60_000])
def test_probe_tells_float_types_apart(scale, count):
    assert guess(weights(ml_dtypes.bfloat16, count, scale)) is Dtype.BF16
    assert guess(weights(np.float16, count, scale)) is Dtype.F16
    assert guess(weights(np.float32, count, scale)) is Dtype.F32


def test_probe_sees_upcast_floats_as_what_they_are_stored_as():
    narrow = np.frombuffer(weights(np.float32), np.float32).astype(ml_dtypes.bfloat16)
    assert guess(narrow.astype(np.float32).tobytes()) is Dtype.F32


@pytest.mark.parametrize(
    "data",
    [
        np.random.default_rng(RNG_SEED).bytes(100_000),
        bytes(100_000),
        b"the quick brown fox jumps over the lazy dog. " * 2000,
        np.arange(20_000).tobytes(),
        np.random.default_rng(RNG_SEED).integers(0, 50_000, 20_000, dtype=np.int32).tobytes(),
        np.random.default_rng(RNG_SEED).integers(0, 2, 80_000, dtype=np.uint8).tobytes(),
        weights(np.float64),
        weights(np.float32)[:-3],
    ],
    ids=["random", "zeros", "text", "indices", "tokens", "bools", "f64", "ragged"],
)
def test_probe_leaves_other_bytes_alone(data):
    assert guess(data) is Dtype.BYTES


def test_probe_reads_at_most_64_kib_inside_the_member():
    source = Source(bytes(10) + weights(np.float32, 1_000_000) + bytes(10))
    assert guess_dtype(10, source.size - 20, source.read_at) is Dtype.F32
    assert source.read_bytes <= 64 << 10
