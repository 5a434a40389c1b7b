from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fragfs.formats.detect import parse_layout
from fragfs.formats.layout import FileFormat
from fragfs.types import Dtype, SpanKind
from tests.formats.format_samples import (
    GGUF_ARRAY,
    GGUF_STRING,
    GGUF_UINT32,
    Source,
    cuts_of,
    gguf_bytes,
    gguf_pair,
    gguf_string,
    gguf_tensor,
    layout_of,
)

# name, elements per block, bytes per block: ggml's own table, written down independently by summing
# the fields of each block (scales, mins, high bits, quants) as ggml-common.h declares them.
BLOCKS = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 2 + 16),
    3: ("Q4_1", 32, 2 + 2 + 16),
    6: ("Q5_0", 32, 2 + 4 + 16),
    7: ("Q5_1", 32, 2 + 2 + 4 + 16),
    8: ("Q8_0", 32, 2 + 32),
    9: ("Q8_1", 32, 4 + 4 + 32),
    10: ("Q2_K", 256, 16 + 64 + 2 + 2),
    11: ("Q3_K", 256, 32 + 64 + 12 + 2),
    12: ("Q4_K", 256, 2 + 2 + 12 + 128),
    13: ("Q5_K", 256, 2 + 2 + 12 + 32 + 128),
    14: ("Q6_K", 256, 128 + 64 + 16 + 2),
    15: ("Q8_K", 256, 4 + 256 + 2 * 16),
    16: ("IQ2_XXS", 256, 2 + 2 * 32),
    17: ("IQ2_XS", 256, 2 + 2 * 32 + 8),
    18: ("IQ3_XXS", 256, 2 + 3 * 32),
    19: ("IQ1_S", 256, 2 + 32 + 2 * 8),
    20: ("IQ4_NL", 32, 2 + 16),
    21: ("IQ3_S", 256, 2 + 64 + 8 + 32 + 4),
    22: ("IQ2_S", 256, 2 + 64 + 8 + 8),
    23: ("IQ4_XS", 256, 2 + 2 + 4 + 128),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 32 + 16 + 8),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 48 + 4 + 2),
    35: ("TQ2_0", 256, 64 + 2),
    39: ("MXFP4", 32, 1 + 16),
    40: ("NVFP4", 64, 4 + 32),
    41: ("Q1_0", 128, 2 + 16),
}

PAIRS = [
    gguf_pair("general.architecture", GGUF_STRING, gguf_string("llama")),
    gguf_pair("u8", 0, b"\1"),
    gguf_pair("i16", 3, b"\1\0"),
    gguf_pair("f32", 6, bytes(4)),
    gguf_pair("bool", 7, b"\1"),
    gguf_pair("f64", 12, bytes(8)),
    gguf_pair("numbers", GGUF_ARRAY, struct.pack("<IQ", 5, 3) + bytes(12)),
    gguf_pair(
        "tokens",
        GGUF_ARRAY,
        struct.pack("<IQ", GGUF_STRING, 2) + gguf_string("a") + gguf_string(b"\xff" * 100),
    ),
    gguf_pair(
        "nested",
        GGUF_ARRAY,
        struct.pack("<IQ", GGUF_ARRAY, 2)
        + struct.pack("<IQ", 0, 3)
        + bytes(3)
        + struct.pack("<IQ", GGUF_STRING, 1)
        + gguf_string("x"),
    ),
]


@pytest.mark.parametrize("type_number", BLOCKS)
def test_every_type_is_cut_at_whole_blocks(type_number):
    name, elements, block = BLOCKS[type_number]
    blocks = 3 * 2**20 // block
    data = gguf_bytes(PAIRS, [gguf_tensor("w", (elements, blocks), type_number, 0)])
    layout = layout_of(data, "m.gguf", len(data) + blocks * block)
    assert (layout.format, layout.verdict) == (FileFormat.GGUF, "")
    assert [(label.name, label.dtype, label.size) for label in layout.tensors] == [
        ("w", name, blocks * block)
    ]
    cuts = [cut for cut in cuts_of(layout) if cut.kind is SpanKind.TENSOR]
    assert all(cut.size % block == 0 for cut in cuts)
    if elements > 1:
        assert {cut.dtype for cut in cuts} == {Dtype.QUANT}
        assert {cut.size for cut in cuts[:-1]} == {2**20 // block * block}
    else:
        assert {cut.dtype for cut in cuts} == {Dtype[name]}


@pytest.mark.parametrize("version", [2, 3])
def test_metadata_of_every_kind_is_stepped_over(version):
    tensors = [gguf_tensor("w", (100, 10), 0, 0), gguf_tensor("v", (7,), 1, 4000)]
    data = gguf_bytes(PAIRS, tensors, bytes(4014), version=version)
    layout = layout_of(data, "m.gguf")
    assert layout.format is FileFormat.GGUF
    assert layout.spans[0].kind is SpanKind.HEADER
    assert [(label.shape, label.offset - layout.spans[0].size) for label in layout.tensors] == [
        ((100, 10), 0),
        ((7,), 4000),
    ]


def test_alignment_comes_from_the_metadata_and_padding_is_a_gap():
    pairs = [*PAIRS, gguf_pair("general.alignment", GGUF_UINT32, struct.pack("<I", 256))]
    tensors = [gguf_tensor("a", (5001,), 0, 0), gguf_tensor("b", (20_000,), 0, 20_224)]
    data = gguf_bytes(pairs, tensors, bytes(20_224 + 80_000 + 176), alignment=256)
    layout = layout_of(data, "m.gguf")
    assert layout.spans[0].size % 256 == 0
    assert [(span.kind, span.size) for span in layout.spans[1:]] == [
        (SpanKind.TENSOR, 20_004),
        (SpanKind.GAP, 220),
        (SpanKind.TENSOR, 80_000),
        (SpanKind.TAIL, 176),
    ]


@pytest.mark.parametrize("alignment", [0, 3, 1 << 21])
def test_impossible_alignment_is_opaque(alignment):
    pairs = [gguf_pair("general.alignment", GGUF_UINT32, struct.pack("<I", alignment))]
    assert layout_of(gguf_bytes(pairs, []), "m.gguf").format is FileFormat.OPAQUE


@pytest.mark.parametrize(
    "data",
    [
        gguf_bytes(PAIRS, [], version=1),
        gguf_bytes(PAIRS, [], version=4),
        gguf_bytes([], [], version=3, order=">"),
        gguf_bytes([gguf_pair("k", 99, b"")], [], bytes(100)),
        gguf_bytes([], [gguf_tensor("w", (1,) * 9, 0, 0)], bytes(100)),
        b"GGUF" + struct.pack("<IQQ", 3, 2**63, 0) + bytes(100),
        b"GGUF" + struct.pack("<IQQ", 3, 0, 2**63) + bytes(100),
        b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 2**40) + bytes(100),
        gguf_bytes(
            [gguf_pair("k", GGUF_ARRAY, struct.pack("<IQ", GGUF_ARRAY, 1) * 20)], [], bytes(100)
        ),
        b"GGUF",
    ],
    ids=[
        "v1",
        "v4",
        "big-endian",
        "value type",
        "dimensions",
        "tensor count",
        "pair count",
        "string length",
        "nesting",
        "magic only",
    ],
)
def test_unknown_or_hostile_headers_are_opaque(data):
    layout = layout_of(data, "m.gguf")
    assert (layout.format, layout.verdict, layout.refusal) == (FileFormat.OPAQUE, "", None)


def test_hostile_counts_end_after_a_bounded_number_of_reads():
    empty_arrays = struct.pack("<IQ", GGUF_STRING, 2**62)
    data = gguf_bytes([gguf_pair("k", GGUF_ARRAY, empty_arrays)], [])
    source = Source(data, 1 << 40)
    layout = parse_layout("m.gguf", source.size, source.read_at)
    assert layout.format is FileFormat.OPAQUE
    assert source.read_count < 20


def test_long_vocabularies_cost_few_reads():
    tokens = b"".join(gguf_string(f"token{i}") for i in range(50_000))
    pair = gguf_pair("t", GGUF_ARRAY, struct.pack("<IQ", GGUF_STRING, 50_000) + tokens)
    data = gguf_bytes([pair], [gguf_tensor("w", (100,), 0, 0)], bytes(400))
    source = Source(data)
    layout = parse_layout("m.gguf", source.size, source.read_at)
    assert len(layout.tensors) == 1
    assert source.read_count < 10


def test_unknown_types_reach_to_the_next_tensor_and_ragged_rows_count_as_unknown():
    tensors = [
        gguf_tensor("new", (64,), 99, 0),
        gguf_tensor("ragged", (31, 2), 2, 40_000),
        gguf_tensor("w", (20_000,), 0, 80_000),
        gguf_tensor("last", (64,), 99, 160_000),
    ]
    layout = layout_of(gguf_bytes([], tensors, bytes(200_000)), "m.gguf")
    assert [(span.kind, span.dtype, span.size) for span in layout.spans[1:]] == [
        (SpanKind.TENSOR, Dtype.BYTES, 40_000),
        (SpanKind.TENSOR, Dtype.BYTES, 40_000),
        (SpanKind.TENSOR, Dtype.F32, 80_000),
        (SpanKind.TENSOR, Dtype.BYTES, 40_000),
    ]
    assert [label.dtype for label in layout.tensors] == ["TYPE_99", "TYPE_2", "F32", "TYPE_99"]


def test_a_tensor_past_the_end_refuses_the_file():
    tensors = [gguf_tensor("a", (20_000,), 0, 0), gguf_tensor("b", (256, 100), 12, 80_000)]
    data = gguf_bytes(PAIRS, tensors, bytes(80_000 + 14_400))
    assert layout_of(data, "m.gguf").refusal is None
    layout = layout_of(data[:-1], "m.gguf")
    assert layout.refusal == (
        f"truncated: the header promises {len(data)} bytes, the file has {len(data) - 1}"
    )
    assert [label.name for label in layout.tensors] == ["a"]
    assert layout.spans[2].size == 14_400 - 144


@pytest.mark.parametrize("type_number", [0, 99])
def test_a_tensor_that_starts_past_the_end_refuses_the_file(type_number):
    data = gguf_bytes([], [gguf_tensor("a", (1,), type_number, 2**40)], bytes(64))
    assert "truncated" in layout_of(data, "m.gguf").refusal


def test_a_header_cut_off_refuses_the_file():
    data = gguf_bytes(PAIRS, [gguf_tensor("a", (1,), 0, 0)])
    layout = layout_of(data[:150], "m.gguf")
    assert layout.refusal == "truncated: the file ends inside its gguf header"
    assert layout.format is FileFormat.OPAQUE


def test_zero_size_tensors_past_unpadded_ends_are_harmless():
    data = gguf_bytes([], [gguf_tensor("a", (0,), 0, 32)], bytes(4))
    layout = layout_of(data, "m.gguf")
    assert layout.refusal is None


def test_names_that_are_not_utf8_are_labels_all_the_same():
    raw = gguf_string(b"\xff\xfe") + struct.pack("<IQIQ", 1, 1, 0, 0)
    layout = layout_of(gguf_bytes([], [raw], bytes(4)), "m.gguf")
    assert layout.tensors[0].name == "\udcff\udcfe"


def test_padded_small_tensors_are_bundled():
    count = 5000
    tensors = [gguf_tensor(f"norm{i}", (5,), 0, 32 * i) for i in range(count)]
    layout = layout_of(gguf_bytes([], tensors, bytes(32 * count)), "m.gguf")
    assert [(span.kind, span.dtype) for span in layout.spans] == [
        (SpanKind.HEADER, Dtype.BYTES),
        (SpanKind.BUNDLE, Dtype.F32),
        (SpanKind.TAIL, Dtype.BYTES),
    ]


SAMPLE = gguf_bytes(
    PAIRS,
    [
        gguf_tensor("a", (10, 10), 0, 0),
        gguf_tensor("b", (64,), 2, 416),
        gguf_tensor("c", (), 0, 480),
    ],
    bytes(70_000),
)
SAMPLE_HEADER_SIZE = len(SAMPLE) - 70_000


@pytest.mark.slow
@settings(deadline=None, derandomize=True, max_examples=500)
@given(st.data())
def test_mutated_files_never_fail(data):
    mutated = bytearray(SAMPLE)
    for _ in range(data.draw(st.integers(1, 4))):
        index = data.draw(st.integers(0, SAMPLE_HEADER_SIZE - 1))
        mutated[index] = data.draw(st.integers(0, 255))
    layout_of(bytes(mutated), "m.gguf")


@settings(deadline=None, derandomize=True, max_examples=200)
@given(st.integers(0, len(SAMPLE)))
def test_every_truncation_is_refused_once_the_magic_is_whole(size):
    layout = layout_of(SAMPLE[:size], "m.gguf")
    assert (layout.refusal is not None) == (8 <= size < SAMPLE_HEADER_SIZE + 484)


@settings(deadline=None, derandomize=True, max_examples=200)
@given(
    st.lists(
        st.tuples(
            st.lists(st.integers(0, 300), max_size=4),
            st.sampled_from([*BLOCKS, 5, 77]),
            st.integers(0, 90_000),
        ),
        max_size=6,
    )
)
def test_generated_tensor_lists_are_covered(specs):
    tensors = [
        gguf_tensor(f"t{index}", tuple(shape), type_number, offset)
        for index, (shape, type_number, offset) in enumerate(specs)
    ]
    layout = layout_of(gguf_bytes(PAIRS, tensors, bytes(100_000)), "m.gguf")
    assert layout.format is FileFormat.GGUF
