from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from fragfs.formats.detect import parse_layout
from fragfs.formats.layout import FileFormat
from fragfs.formats.safetensors import HEADER_SIZE_MAX
from fragfs.formats.safetensors_header import ENTRIES_MAX
from fragfs.types import DTYPES_BY_NAME, Dtype, SpanKind
from tests.formats.format_samples import (
    ELEMENTS,
    Source,
    cuts_of,
    entry,
    layout_of,
    pairs_json,
    safetensors_bytes,
)

A4 = entry("F32", [1], 0, 4)
BIG = 80_000  # bytes of an f32 tensor that alone takes a file past the whole-file limit


def nested(depth: int) -> object:
    value: object = 1
    for _ in range(depth):
        value = [value]
    return value


def zeros(count: int) -> bytes:
    return bytes(count)


Z4 = zeros(4)

STRUCTURED_ACCEPTED = {
    "plain": safetensors_bytes({"a": A4}, Z4),
    "header keys in any order": safetensors_bytes(
        {"b": entry("F32", [1], 4, 8), "a": A4}, zeros(8)
    ),
    "metadata last": safetensors_bytes({"a": A4, "__metadata__": {"k": "v"}}, Z4),
    "field order changed": safetensors_bytes(
        {"a": {"data_offsets": [0, 4], "shape": [1], "dtype": "F32"}}, Z4
    ),
    "leading whitespace": safetensors_bytes(b" \n\t\r" * 2000 + json.dumps({"a": A4}).encode(), Z4),
    "window of whitespace": safetensors_bytes(b" " * 1020 + b"{}"),
    "trailing whitespace": safetensors_bytes(json.dumps({"a": A4}).encode() + b" \n" * 9, Z4),
    "metadata null": safetensors_bytes({"__metadata__": None, "a": A4}, Z4),
    "metadata repeats a key": safetensors_bytes(
        b'{"__metadata__":{"k":"1","k":"2"},"a":%s}' % json.dumps(A4).encode(), Z4
    ),
    "metadata key escaped": safetensors_bytes(
        b'{"\\u005f_metadata__":{"k":"1"},"a":%s}' % json.dumps(A4).encode(), Z4
    ),
    "unknown extra field": safetensors_bytes({"a": {**A4, "x": {"y": [1, None, 1.5]}}}, Z4),
    "deepest nesting that serde reads": safetensors_bytes({"a": {**A4, "x": nested(125)}}, Z4),
    "huge integer in an extra field": safetensors_bytes({"a": {**A4, "x": 10**300}}, Z4),
    "escaped name": safetensors_bytes(
        b'{"\\u0000\\"\\ud83d\\ude00":%s}' % json.dumps(A4).encode(), Z4
    ),
    "non-ASCII name": safetensors_bytes('{"été":%s}'.encode() % json.dumps(A4).encode(), Z4),
    "empty name": safetensors_bytes({"": A4}, Z4),
    "scalar": safetensors_bytes({"a": entry("F64", [], 0, 8)}, zeros(8)),
    "zero-size": safetensors_bytes({"a": A4, "z": entry("I64", [0, 7], 4, 4)}, Z4),
    "zero-size first": safetensors_bytes({"z": entry("I64", [0], 0, 0), "a": A4}, Z4),
    "zero-size before an overflow": safetensors_bytes(
        {"z": entry("U8", [0, 2**63, 2**63], 0, 0), "a": A4}, Z4
    ),
    "empty object": safetensors_bytes(b"{}"),
    "empty object in spaces": safetensors_bytes(b"  {  }  "),
    "only metadata": safetensors_bytes({"__metadata__": {"k": "v"}}),
    "entry as an array": safetensors_bytes({"a": ["F32", [1], [0, 4]]}, Z4),
    "dtype as a unit variant": safetensors_bytes({"a": entry({"F32": None}, [1], 0, 4)}, Z4),
    "4-bit": safetensors_bytes({"a": entry("F4", [3, 2], 0, 3)}, zeros(3)),
    "6-bit": safetensors_bytes({"a": entry("F6_E2M3", [4], 0, 3)}, zeros(3)),
}

STRUCTURED_REJECTED = {
    "metadata value a number": safetensors_bytes({"__metadata__": {"k": 1}, "a": A4}, Z4),
    "metadata nested": safetensors_bytes({"__metadata__": {"k": {}}, "a": A4}, Z4),
    "metadata an array": safetensors_bytes({"__metadata__": [], "a": A4}, Z4),
    "metadata twice": safetensors_bytes(
        pairs_json(("__metadata__", {}), ("__metadata__", {}), ("a", A4)), Z4
    ),
    "tensor called __metadata__": safetensors_bytes({"__metadata__": A4, "b": A4}, Z4),
    "duplicate that leaves a gap": safetensors_bytes(
        pairs_json(("a", A4), ("a", entry("F32", [1], 4, 8))), zeros(8)
    ),
    "duplicate whose first is malformed": safetensors_bytes(
        pairs_json(("a", {"dtype": "F32"}), ("a", A4)), Z4
    ),
    "tied": safetensors_bytes({"a": A4, "b": A4}, Z4),
    "first tensor not at 0": safetensors_bytes({"a": entry("F32", [1], 4, 8)}, zeros(8)),
    "gap": safetensors_bytes({"a": A4, "b": entry("F32", [1], 8, 12)}, zeros(12)),
    "overlap": safetensors_bytes(
        {"a": entry("F32", [2], 0, 8), "b": entry("F32", [2], 4, 12)}, zeros(12)
    ),
    "trailing bytes": safetensors_bytes({"a": A4}, zeros(16)),
    "trailing bytes without tensors": safetensors_bytes(b"{}", Z4),
    "zero-size after a hole": safetensors_bytes({"a": A4, "z": entry("U8", [0], 5, 5)}, zeros(8)),
    "length and dtype disagree": safetensors_bytes({"a": entry("F32", [2], 0, 4)}, Z4),
    "4-bit of an odd count": safetensors_bytes({"a": entry("F4", [7], 0, 4)}, Z4),
    "6-bit of a broken byte": safetensors_bytes({"a": entry("F6_E3M2", [5], 0, 4)}, Z4),
    "unknown dtype": safetensors_bytes({"a": entry("C128", [1], 0, 16)}, zeros(16)),
    "lower-case dtype": safetensors_bytes({"a": entry("f32", [1], 0, 4)}, Z4),
    "dtype a number": safetensors_bytes({"a": entry(7, [1], 0, 4)}, Z4),
    "dtype a unit variant of zero": safetensors_bytes({"a": entry({"F32": 0}, [1], 0, 4)}, Z4),
    "negative offset": safetensors_bytes({"a": entry("F32", [1], -4, 0)}, Z4),
    "minus zero": safetensors_bytes(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[-0,4]}}', Z4),
    "float offsets": safetensors_bytes({"a": entry("F32", [1], 0.0, 4.0)}, Z4),
    "float shape": safetensors_bytes({"a": entry("F32", [1.0], 0, 4)}, Z4),
    "shape of a truth value": safetensors_bytes({"a": entry("F32", [True], 0, 4)}, Z4),
    "shape null": safetensors_bytes({"a": entry("F32", None, 0, 4)}, Z4),
    "negative shape": safetensors_bytes({"a": entry("F32", [-1, -1], 0, 4)}, Z4),
    "overflowing shape": safetensors_bytes({"a": entry("U8", [2**63, 2, 0], 0, 0), "b": A4}, Z4),
    "overflowing bits": safetensors_bytes({"a": entry("F64", [2**60], 0, 4)}, Z4),
    "shape beyond 64 bits": safetensors_bytes({"a": entry("F32", [2**64], 0, 4)}, Z4),
    "zero before a length beyond 64 bits": safetensors_bytes(
        {"a": entry("F32", [0, 2**64], 0, 0), "b": A4}, Z4
    ),
    "offsets reversed": safetensors_bytes({"a": entry("F32", [1], 4, 0)}, Z4),
    "three offsets": safetensors_bytes({"a": entry("F32", [1], 0, 4, 4)}, Z4),
    "no offsets": safetensors_bytes({"a": {"dtype": "F32", "shape": [1]}}, Z4),
    "field twice": safetensors_bytes(
        b'{"a":{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}}', Z4
    ),
    "entry a number": safetensors_bytes({"a": A4, "b": 3}, Z4),
    "entry null": safetensors_bytes({"a": A4, "b": None}, Z4),
    "entry an array of four": safetensors_bytes({"a": ["F32", [1], [0, 4], 0]}, Z4),
    "lone surrogate name": safetensors_bytes({"\ud800": A4}, Z4),
    "lone surrogate in an extra field": safetensors_bytes({"a": {**A4, "x": "\udc00"}}, Z4),
    "reversed surrogates": safetensors_bytes({"\udc00\ud800": A4}, Z4),
}

OPAQUE = {
    "empty file": b"",
    "shorter than 8 bytes": b"1234567",
    "only a length": struct.pack("<Q", 0),
    "N = 0": safetensors_bytes(b"", Z4),
    "N above the limit": safetensors_bytes(b"{}", zeros(99), HEADER_SIZE_MAX + 1),
    "N = 2**64 - 1": safetensors_bytes(b"{}", zeros(99), 2**64 - 1),
    "NUL padding": safetensors_bytes(b"{}\0\0"),
    "BOM": safetensors_bytes(b"\xef\xbb\xbf{}"),
    "text after the JSON": safetensors_bytes(b"{} {}"),
    "invalid UTF-8": safetensors_bytes(b'{"\xff":1}'),
    "encoded surrogate": safetensors_bytes(b'{"\xed\xa0\x80":1}'),
    "array on top": safetensors_bytes([{"a": A4}], Z4),
    "spaces only": safetensors_bytes(b" " * 5000),
    "spaces up to the first look": safetensors_bytes(b" " * 1020),
    "unclosed": safetensors_bytes(b'{"a":'),
    "control character": safetensors_bytes(b'{"__metadata__":{"a":"\x1f"}}'),
    "form feed": safetensors_bytes(b"{}\x0c"),
    "NaN": safetensors_bytes({"a": {**A4, "x": float("nan")}}, Z4),
    "number out of range": safetensors_bytes(
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4],"x":1e999}}', Z4
    ),
    "integer out of range": safetensors_bytes(
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4],"x":%s}}' % (b"9" * 5000), Z4
    ),
    "leading zero": safetensors_bytes(
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,04]}}', Z4
    ),
    "nested too deeply": safetensors_bytes({"a": {**A4, "x": nested(126)}}, Z4),
    "nested in objects": safetensors_bytes(b'{"a":' * 128 + b"1" + b"}" * 128),
    "nested beyond the stack": safetensors_bytes(b'{"a":' + b"[" * 100_000),
    "top level looks like a tensor": safetensors_bytes(A4, Z4),
}

TRUNCATED = {
    "data cut off": safetensors_bytes({"a": entry("F32", [1000], 0, 4000)}, zeros(3999)),
    "no data": safetensors_bytes({"a": entry("F32", [1000], 0, 4000)}),
    "second tensor absent": safetensors_bytes({"a": A4, "b": entry("F64", [9], 4, 76)}, Z4),
    "header cut off": safetensors_bytes(b'{"a":{"dty', b"", 4000),
}

ACCEPTED_DUPLICATES = {
    "duplicate that covers": safetensors_bytes(pairs_json(("a", A4), ("a", A4)), Z4),
    "duplicate of other size": safetensors_bytes(
        pairs_json(("a", entry("U8", [2], 0, 2)), ("a", A4)), Z4
    ),
}

CORPUS = {
    **STRUCTURED_ACCEPTED,
    **STRUCTURED_REJECTED,
    **OPAQUE,
    **TRUNCATED,
    **ACCEPTED_DUPLICATES,
}


def safe_open_accepts(path: Path, data: bytes) -> bool:
    path.write_bytes(data)
    try:
        with safe_open(path, framework="np"):
            return True
    except (SafetensorError, OSError, ValueError):  # ValueError: an empty file cannot be mapped
        return False


def check_agreement(path: Path, data: bytes) -> None:
    verdict = layout_of(data).verdict
    if safe_open_accepts(path, data):
        assert verdict == "" or "occurs twice" in verdict
    else:
        assert verdict.startswith("safe_open rejects it: ")


@pytest.mark.parametrize("case", CORPUS)
def test_verdict_agrees_with_safetensors(case, tmp_path):
    check_agreement(tmp_path / "x.safetensors", CORPUS[case])


@pytest.mark.parametrize("case", STRUCTURED_ACCEPTED)
def test_accepted_files_are_structured_without_remark(case):
    layout = layout_of(STRUCTURED_ACCEPTED[case])
    assert layout.format is FileFormat.SAFETENSORS
    assert (layout.verdict, layout.refusal) == ("", None)
    assert layout.spans[0].kind is SpanKind.HEADER


@pytest.mark.parametrize("case", STRUCTURED_REJECTED)
def test_rejected_files_stay_structured(case):
    layout = layout_of(STRUCTURED_REJECTED[case])
    assert layout.format is FileFormat.SAFETENSORS
    assert layout.verdict.startswith("safe_open rejects it: ")
    assert layout.refusal is None
    assert layout_of(STRUCTURED_REJECTED[case], "other.sft") == layout


@pytest.mark.parametrize("case", OPAQUE)
def test_unreadable_headers_are_opaque_and_remarked_only_under_the_name(case):
    layout = layout_of(OPAQUE[case])
    assert layout.format is FileFormat.OPAQUE
    assert layout.verdict.startswith("safe_open rejects it: ")
    assert layout.refusal is None
    assert layout_of(OPAQUE[case], "model.bin").verdict == ""


@pytest.mark.parametrize("case", TRUNCATED)
def test_truncated_files_are_refused_but_covered(case):
    data = TRUNCATED[case]
    layout = layout_of(data)
    assert layout.refusal is not None
    assert layout.refusal.startswith("truncated: the header promises ")
    assert layout.refusal.endswith(f" bytes, the file has {len(data)}")
    assert layout.refusal in layout.verdict
    assert "--force" in layout.refusal_remedy


@pytest.mark.parametrize("case", ACCEPTED_DUPLICATES)
def test_accepted_duplicates_are_flagged_and_both_labelled(case):
    layout = layout_of(ACCEPTED_DUPLICATES[case])
    assert "'a' occurs twice" in layout.verdict
    assert [label.name for label in layout.tensors] == ["a", "a"]


def test_truncated_header_under_another_name_is_just_opaque():
    layout = layout_of(TRUNCATED["header cut off"], "model.bin")
    assert (layout.format, layout.verdict, layout.refusal) == (FileFormat.OPAQUE, "", None)


def test_truncated_tensor_keeps_the_cuts_of_the_whole_one():
    header = {"a": entry("F32", [50_000], 0, 200_000)}
    whole = safetensors_bytes(header, zeros(200_000))
    part = layout_of(whole[:-70_001])
    whole_cuts = cuts_of(layout_of(whole))
    assert cuts_of(part)[:-2] == whole_cuts[: len(cuts_of(part)) - 2]
    assert [span.kind for span in part.spans] == [
        SpanKind.HEADER,
        SpanKind.TENSOR,
        SpanKind.TAIL,
    ]
    assert part.tensors == ()


def test_promised_size_is_exact():
    data = safetensors_bytes({"a": entry("F32", [1000], 0, 4000)}, zeros(3999))
    assert f"promises {len(data) + 1} bytes" in layout_of(data).refusal


def test_malformed_entries_past_the_end_do_not_make_a_file_truncated():
    layout = layout_of(safetensors_bytes({"a": A4, "b": entry("F32", [1], 0, 4000)}, Z4))
    assert layout.refusal is None
    assert layout.verdict.startswith("safe_open rejects it: ")


def test_header_and_labels_of_an_ordinary_file():
    data = save(
        {"w": np.zeros((100, 300), np.float32), "n": np.zeros((), np.int64)}, {"format": "pt"}
    )
    layout = layout_of(data)
    header_size = 8 + int.from_bytes(data[:8], "little")
    assert layout.spans[0].size == header_size
    assert [(label.name, label.dtype, label.shape) for label in layout.tensors] == [
        ("n", "I64", ()),
        ("w", "F32", (100, 300)),
    ]
    assert layout.tensors[1].offset + layout.tensors[1].size == len(data)


def test_tied_tensors_are_one_span_with_two_labels():
    tied = entry("F32", [20_000], 0, BIG)
    layout = layout_of(safetensors_bytes({"a": tied, "b": tied}, zeros(BIG)))
    assert [span.kind for span in layout.spans] == [SpanKind.HEADER, SpanKind.TENSOR]
    assert layout.spans[1].dtype is Dtype.F32
    assert layout.tensors[0].offset == layout.tensors[1].offset
    assert "'b' shares bytes" in layout.verdict


def test_tied_tensors_of_different_dtype_are_plain_bytes():
    layout = layout_of(
        safetensors_bytes(
            {"a": entry("F32", [20_000], 0, BIG), "b": entry("F16", [40_000], 0, BIG)}, zeros(BIG)
        )
    )
    assert [span.dtype for span in layout.spans] == [Dtype.BYTES, Dtype.BYTES]


def test_overlapping_tensors_are_cut_at_all_boundaries():
    layout = layout_of(
        safetensors_bytes(
            {
                "a": entry("F32", [20_000], 0, BIG),
                "aligned": entry("F32", [20_000], 40_000, 120_000),
                "other": entry("BF16", [20_000], 120_000, 160_000),
                "odd": entry("BF16", [10_000], 150_001, 170_001),
            },
            zeros(170_001),
        )
    )
    start = layout.spans[0].size
    assert [(span.offset - start, span.dtype) for span in layout.spans[1:]] == [
        (0, Dtype.F32),
        (40_000, Dtype.F32),
        (80_000, Dtype.F32),
        (120_000, Dtype.BYTES),
        (150_001, Dtype.BYTES),
        (160_000, Dtype.BYTES),
    ]
    assert len(layout.tensors) == 4


def test_pieces_between_element_boundaries_are_plain_bytes():
    header = {
        "a": entry("F32", [30_000], 0, 120_000),
        "b": entry("U8", [4], 1, 5),
        "c": entry("U8", [4], 60_001, 60_005),
    }
    layout = layout_of(safetensors_bytes(header, zeros(120_000)))
    inner = next(span for span in layout.spans if span.size == 59_996)
    assert inner.dtype is Dtype.BYTES


def test_many_overlaps_are_swept_once():
    count = 5_000
    header = {f"t{i}": entry("U8", [count], i, count + i) for i in range(count)}
    layout = layout_of(safetensors_bytes(header, zeros(2 * count - 1)))
    assert [(span.kind, span.dtype) for span in layout.spans[1:]] == [(SpanKind.BUNDLE, Dtype.U8)]


def test_gap_and_tail_are_spans_of_plain_bytes():
    layout = layout_of(
        safetensors_bytes(
            {
                "a": entry("F32", [20_000], 5000, 5000 + BIG),
                "b": entry("F32", [20_000], 90_000, 170_000),
            },
            zeros(170_012),
        )
    )
    assert [span.kind for span in layout.spans] == [
        SpanKind.HEADER,
        SpanKind.GAP,
        SpanKind.TENSOR,
        SpanKind.GAP,
        SpanKind.TENSOR,
        SpanKind.TAIL,
    ]
    assert "a gap of 5000 bytes before tensor 'a'" in layout.verdict


def test_trailing_bytes_are_counted():
    layout = layout_of(safetensors_bytes({"a": A4}, zeros(16)))
    assert layout.verdict == "safe_open rejects it: 12 trailing bytes after the last tensor"


def test_unsound_entries_become_plain_bytes_at_their_offsets():
    layout = layout_of(
        safetensors_bytes(
            {
                "unknown": entry("Q9", [5], 0, BIG),
                "mismatch": entry("F32", [3], BIG, 2 * BIG),
                "good": entry("F32", [20_000], 2 * BIG, 3 * BIG),
            },
            zeros(3 * BIG),
        )
    )
    assert [(span.kind, span.dtype, span.size) for span in layout.spans[1:]] == [
        (SpanKind.TENSOR, Dtype.BYTES, BIG),
        (SpanKind.TENSOR, Dtype.BYTES, BIG),
        (SpanKind.TENSOR, Dtype.F32, BIG),
    ]
    assert [label.dtype for label in layout.tensors] == ["Q9", "F32", "F32"]


@pytest.mark.parametrize("name", sorted(set(DTYPES_BY_NAME) - {"C128"}))
def test_every_dtype_is_cut_at_whole_fragments_of_elements(name, tmp_path):
    dtype = DTYPES_BY_NAME[name]
    count = 9 * 2**14 + 4
    size = count * dtype.bits // 8
    data = safetensors_bytes({"a": entry(name, [count], 0, size)}, zeros(size))
    check_agreement(tmp_path / "x.safetensors", data)
    layout = layout_of(data)
    assert layout.verdict == ""
    cuts = [cut for cut in cuts_of(layout) if cut.kind is SpanKind.TENSOR]
    assert {cut.dtype for cut in cuts} == {dtype}
    assert [cut.size * 8 for cut in cuts] == [ELEMENTS * dtype.bits] * 36 + [4 * dtype.bits]


def test_siblings_with_other_headers_cut_tensors_alike():
    tensors = {
        "embed": np.zeros((4000, 30), np.float32),
        "norm": np.zeros(40, np.float32),
        "norm2": np.zeros(50, np.float32),
        "proj": np.zeros((500, 300), np.float16),
    }
    plain, tagged = save(tensors), save(tensors, {"note": "x" * 5000})
    first, second = (
        [
            (cut.offset - layout.spans[0].size, cut.size, cut.dtype, cut.kind, cut.first)
            for cut in cuts_of(layout)
            if cut.kind is not SpanKind.HEADER
        ]
        for layout in (layout_of(plain), layout_of(tagged))
    )
    assert len(plain) != len(tagged)
    assert first == second


def test_casts_cut_at_the_same_elements():
    wide = layout_of(save({"w": np.zeros(100_000, np.float32)}))
    narrow = layout_of(save({"w": np.zeros(100_000, np.float16)}))
    wide_counts, narrow_counts = (
        [cut.size * 8 // cut.dtype.bits for cut in cuts_of(layout) if cut.kind is SpanKind.TENSOR]
        for layout in (wide, narrow)
    )
    assert wide_counts == narrow_counts


def test_header_above_the_limit_is_not_read():
    source = Source(struct.pack("<Q", HEADER_SIZE_MAX + 1) + b"{", HEADER_SIZE_MAX + 100)
    assert parse_layout("m.safetensors", source.size, source.read_at).format is FileFormat.OPAQUE
    assert source.read_bytes < 100_000


def test_tensor_data_is_never_read():
    header = {"a": entry("F32", [10**9], 0, 4 * 10**9)}
    data = safetensors_bytes(header)
    source = Source(data, len(data) + 4 * 10**9)
    layout = parse_layout("m.safetensors", source.size, source.read_at)
    assert layout.verdict == ""
    assert source.read_bytes < 200_000


@pytest.mark.parametrize("part", [b"[", b"{", b","])
def test_headers_with_too_many_parts_are_not_parsed(part):
    layout = layout_of(safetensors_bytes(b'{"a":' + part * (8 * ENTRIES_MAX)))
    assert layout.verdict == "safe_open rejects it: its header has too many parts"


JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(st.characters(), max_size=3)
    | st.sampled_from(["F32", "BF16", "F4", "f32"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["dtype", "shape", "data_offsets", "__metadata__", "a", ""]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@st.composite
def tensor_entries(draw):
    name = draw(st.sampled_from(["F32", "BF16", "I64", "F4", "F6_E2M3", "BOOL", "U8"]))
    shape = draw(st.lists(st.integers(0, 5), max_size=3))
    count = int(np.prod(shape, dtype=int))
    size = -(-count * DTYPES_BY_NAME[name].bits // 8)
    return name, shape, size


@st.composite
def odd_files(draw):
    """Files that are nearly right: packed tensors, then a few things broken."""
    position, pairs = 0, []
    for index, (name, shape, size) in enumerate(draw(st.lists(tensor_entries(), max_size=5))):
        begin = position + draw(st.sampled_from([0] * 20 + [1, -1, 4]))
        pairs.append(
            (
                draw(st.sampled_from([f"t{index}"] * 6 + ["t0"])),
                entry(name, shape, begin, begin + size),
            )
        )
        position = begin + size
    if pairs and draw(st.integers(0, 4)) == 4:
        index = draw(st.integers(0, len(pairs) - 1))
        field = draw(st.sampled_from(["dtype", "shape", "data_offsets", "x"]))
        pairs[index][1][field] = draw(JSON_VALUES)
    if draw(st.integers(0, 4)) == 4:
        pairs.insert(
            draw(st.integers(0, len(pairs))),
            (draw(st.sampled_from(["__metadata__", "b"])), draw(JSON_VALUES)),
        )
    tail = draw(st.sampled_from([0] * 8 + [1, 70_000]))
    return safetensors_bytes(pairs_json(*pairs), zeros(max(0, position) + tail))


@pytest.mark.slow
@settings(deadline=None, derandomize=True, max_examples=600)
@given(odd_files())
def test_generated_files_agree_with_safetensors(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "generated.safetensors"
    check_agreement(path, data)


@pytest.mark.slow
@settings(deadline=None, derandomize=True, max_examples=300)
@given(odd_files(), st.data())
def test_mutated_files_agree_with_safetensors(tmp_path_factory, data, draw):
    mutated = bytearray(data)
    for _ in range(draw.draw(st.integers(1, 3))):
        index = draw.draw(st.integers(0, min(len(mutated), 300) - 1))
        mutated[index] = draw.draw(st.sampled_from(b'{}[]",:0019 -.e\\\x00\xff\n'))
    path = tmp_path_factory.getbasetemp() / "mutated.safetensors"
    check_agreement(path, bytes(mutated))


def test_what_a_duplicate_overrides_promises_nothing():
    """safe_open reads the last entry of a name and accepts a first that lies out of bounds."""
    beyond = {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}
    layout = layout_of(safetensors_bytes(pairs_json(("a", beyond), ("a", A4)), Z4))
    assert layout.refusal is None
    assert "occurs twice" in layout.verdict
