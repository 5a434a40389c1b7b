from __future__ import annotations

import json
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fragfs.formats.bundle import SMALL_TENSOR_SIZE, bundle_small
from fragfs.formats.cut import BYTES_CUT_SIZE, WHOLE_FILE_SIZE_MAX, plan_cuts
from fragfs.formats.layout import FileFormat, Layout, Span, element_unit, opaque_layout
from fragfs.types import FRAGMENT_BYTES_MAX, Dtype, SpanKind
from tests.formats.format_samples import (
    check_layout,
    cuts_of,
    entry,
    layout_of,
    safetensors_bytes,
)

ELEMENT_DTYPES = [dtype for dtype in Dtype if dtype not in (Dtype.BYTES, Dtype.QUANT)]


def packed(*parts: tuple[str, int], size_of: dict[str, int]) -> bytes:
    """A safetensors file whose tensors lie back to back."""
    header, position = {}, 0
    for index, (dtype, count) in enumerate(parts):
        size = count * size_of[dtype]
        header[f"t{index}"] = entry(dtype, [count], position, position + size)
        position += size
    return safetensors_bytes(header, bytes(position))


SIZES = {"F32": 4, "BF16": 2, "I64": 8, "U8": 1}


def kinds(data: bytes) -> list[tuple[SpanKind, Dtype, int]]:
    return [(span.kind, span.dtype, span.size) for span in layout_of(data).spans[1:]]


# --- cuts


@pytest.mark.parametrize("size", [1, 1000, WHOLE_FILE_SIZE_MAX])
def test_small_files_are_one_cut_of_plain_bytes(size):
    (cut,) = cuts_of(opaque_layout(size))
    assert (cut.offset, cut.size, cut.dtype, cut.kind, cut.first) == (
        0,
        size,
        Dtype.BYTES,
        SpanKind.OPAQUE,
        True,
    )


def test_small_structured_files_are_one_cut_but_keep_their_labels():
    layout = layout_of(packed(("F32", 9000), ("BF16", 9000), size_of=SIZES))
    assert len(layout.tensors) == 2
    assert [(cut.kind, cut.dtype) for cut in cuts_of(layout)] == [(SpanKind.OPAQUE, Dtype.BYTES)]


def test_empty_files_have_no_cuts():
    layout = layout_of(b"", "empty.bin")
    assert layout.spans == ()
    assert cuts_of(layout) == []


def test_opaque_files_are_cut_every_mebibyte():
    cuts = cuts_of(opaque_layout(5 * BYTES_CUT_SIZE // 2))
    assert [cut.size for cut in cuts] == [1 << 20, 1 << 20, 1 << 19]
    assert [cut.first for cut in cuts] == [True, False, False]


def test_cuts_are_planned_lazily():
    cuts = plan_cuts(opaque_layout(1 << 60), 1 << 12)
    assert next(cuts).size == BYTES_CUT_SIZE


@pytest.mark.parametrize("dtype", ELEMENT_DTYPES)
@pytest.mark.parametrize("fragment_elements", [1 << 12, 1 << 19, 1 << 21])
def test_tensor_cuts_hold_whole_elements_and_keep_the_limit(dtype, fragment_elements):
    unit = element_unit(dtype)
    size = (FRAGMENT_BYTES_MAX * 3 // unit + 1) * unit
    layout = Layout(FileFormat.SAFETENSORS, size, (Span(0, size, SpanKind.TENSOR, dtype, unit),))
    check_layout(layout, size)
    steps = {cut.size for cut in list(plan_cuts(layout, fragment_elements))[:-1]}
    assert steps == {min(fragment_elements * dtype.bits // 8, FRAGMENT_BYTES_MAX)}


def test_element_units():
    assert {dtype.name: element_unit(dtype) for dtype in (Dtype.F4, Dtype.F6_E2M3, Dtype.C128)} == {
        "F4": 1,
        "F6_E2M3": 3,
        "C128": 16,
    }


def test_header_is_never_joined_with_tensors():
    data = packed(("F32", 10), ("F32", 30_000), size_of=SIZES)
    header_size = 8 + int.from_bytes(data[:8], "little")
    first, second, *_ = cuts_of(layout_of(data))
    assert (first.size, first.kind) == (header_size, SpanKind.HEADER)
    assert (second.offset, second.kind) == (header_size, SpanKind.BUNDLE)


@settings(deadline=None, derandomize=True, max_examples=300)
@given(
    st.binary(max_size=300), st.integers(0, 1 << 22), st.sampled_from(["a.bin", "a.safetensors"])
)
def test_arbitrary_bytes_are_covered(data, padding, name):
    layout_of(data, name, len(data) + padding)


# --- bundles


@pytest.mark.slow
def test_hundred_thousand_scalars_give_few_cuts():
    count = 100_000
    header = {f"s{i}": entry("F32", [], 4 * i, 4 * i + 4) for i in range(count)}
    raw = json.dumps(header).encode()
    layout = layout_of(safetensors_bytes(raw, bytes(4 * count)))
    assert len(layout.tensors) == count
    cuts = [cut for cut in cuts_of(layout) if cut.kind is not SpanKind.HEADER]
    assert [(cut.kind, cut.dtype, cut.size) for cut in cuts] == [
        (SpanKind.BUNDLE, Dtype.F32, 4 * count)
    ]


def test_a_lone_small_tensor_is_a_bundle_of_one():
    assert kinds(packed(("F32", 20_000), ("F32", 7), ("F32", 20_000), size_of=SIZES)) == [
        (SpanKind.TENSOR, Dtype.F32, 80_000),
        (SpanKind.BUNDLE, Dtype.F32, 28),
        (SpanKind.TENSOR, Dtype.F32, 80_000),
    ]


def test_the_size_limit_of_small_is_exclusive():
    count = SMALL_TENSOR_SIZE // 4
    assert kinds(packed(("F32", count), ("F32", count - 1), ("F32", 20_000), size_of=SIZES)) == [
        (SpanKind.TENSOR, Dtype.F32, 4096),
        (SpanKind.BUNDLE, Dtype.F32, 4092),
        (SpanKind.TENSOR, Dtype.F32, 80_000),
    ]


def test_zero_size_tensors_do_not_interrupt_a_run():
    data = packed(("F32", 500), ("I64", 0), ("F32", 500), ("BF16", 50_000), size_of=SIZES)
    assert kinds(data)[0] == (SpanKind.BUNDLE, Dtype.F32, 4000)


def test_long_stretches_of_a_run_keep_their_dtype():
    data = packed(
        *[("I64", 1)] * 50,
        *[("F32", 600)] * 40,
        *[("BF16", 1500)] * 30,
        ("U8", 70_000),
        size_of=SIZES,
    )
    assert kinds(data)[:3] == [
        (SpanKind.BUNDLE, Dtype.I64, 400),
        (SpanKind.BUNDLE, Dtype.F32, 96_000),
        (SpanKind.BUNDLE, Dtype.BF16, 90_000),
    ]


def test_short_stretches_of_a_run_are_joined_as_plain_bytes():
    data = packed(
        *[("F32", 600)] * 2, ("I64", 1), *[("F32", 600)] * 2, ("U8", 70_000), size_of=SIZES
    )
    assert kinds(data)[0] == (SpanKind.BUNDLE, Dtype.BYTES, 4 * 2400 + 8)


def test_gaps_inside_a_run_join_it_and_gaps_around_it_do_not():
    header = {
        "large": entry("U8", [70_000], 0, 70_000),
        "a": entry("F32", [1], 70_010, 70_014),
        "b": entry("F32", [1], 70_030, 70_034),
        "c": entry("F32", [1], 70_034, 70_038),
    }
    data = safetensors_bytes(header, bytes(70_050))
    assert kinds(data)[1:] == [
        (SpanKind.GAP, Dtype.BYTES, 10),
        (SpanKind.BUNDLE, Dtype.F32, 28),
        (SpanKind.TAIL, Dtype.BYTES, 12),
    ]


def test_gaps_that_break_elements_make_a_run_plain_bytes():
    header = {"a": entry("F32", [1], 0, 4), "b": entry("F32", [17_000], 7, 68_007)}
    header["a2"] = entry("F32", [1], 68_010, 68_014)
    header["a3"] = entry("F32", [1], 68_017, 68_021)
    data = safetensors_bytes(header, bytes(68_021))
    assert kinds(data)[-1] == (SpanKind.BUNDLE, Dtype.BYTES, 11)


@pytest.mark.parametrize(("dtype", "step"), [("F6_E2M3", 1_048_575), ("F64", 1 << 20)])
def test_large_bundles_are_cut_at_whole_elements_up_to_a_mebibyte(dtype, step):
    count = 5000
    header = {f"t{i}": entry(dtype, [400], 0, 0) for i in range(count)}
    size = 400 * Dtype[dtype].bits // 8
    for index, value in enumerate(header.values()):
        value["data_offsets"] = [index * size, (index + 1) * size]
    layout = layout_of(safetensors_bytes(header, bytes(count * size)))
    cuts = [cut for cut in cuts_of(layout) if cut.kind is SpanKind.BUNDLE]
    assert len([span for span in layout.spans if span.kind is SpanKind.BUNDLE]) == 1
    assert {cut.size for cut in cuts[:-1]} == {step}
    assert cuts[-1].size <= step


@st.composite
def span_lists(draw):
    spans, position, gap_before = [], 0, False
    for size in draw(st.lists(st.integers(1, 1500), max_size=30)):
        gap = not gap_before and draw(st.integers(0, 4)) == 0
        dtype = (
            Dtype.BYTES if gap else draw(st.sampled_from([Dtype.F32, Dtype.BF16, Dtype.F6_E2M3]))
        )
        unit = element_unit(dtype)
        kind = SpanKind.GAP if gap else SpanKind.TENSOR
        spans.append(Span(position, size * unit, kind, dtype, unit))
        position += size * unit
        gap_before = gap
    return spans


@settings(deadline=None, derandomize=True, max_examples=300)
@given(span_lists())
def test_bundling_covers_the_same_bytes_with_fewer_small_spans(spans):
    bundled = bundle_small(spans)
    size = spans[-1].end if spans else 0
    check_layout(Layout(FileFormat.SAFETENSORS, size, tuple(bundled)), size)
    assert len(bundled) <= len(spans)
    large = [span for span in spans if span.size >= SMALL_TENSOR_SIZE]
    assert [span for span in bundled if span.kind is not SpanKind.BUNDLE and span in large] == large
    small_tensors = [s for s in bundled if s.kind is SpanKind.TENSOR and s.size < SMALL_TENSOR_SIZE]
    assert small_tensors == []


# --- imports


def test_cutting_starts_without_numpy():
    code = (
        "import sys, fragfs.formats.detect, fragfs.formats.cut, fragfs.formats.zip;"
        "assert 'numpy' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
