from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fragfs.errors import StorageError
from fragfs.formats.detect import parse_layout
from fragfs.formats.layout import FileFormat
from tests.formats.format_samples import (
    entry,
    gguf_bytes,
    gguf_tensor,
    layout_of,
    safetensors_bytes,
    zip_bytes,
)

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n"
SAFETENSORS = safetensors_bytes({"a": entry("F32", [3], 0, 12)}, bytes(12))
GGUF = gguf_bytes([], [gguf_tensor("w", (4,), 0, 0)], bytes(16))
ZIP = zip_bytes({"a": b"b"})


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (SAFETENSORS, FileFormat.SAFETENSORS),
        (GGUF, FileFormat.GGUF),
        (ZIP, FileFormat.ZIP),
        (b"{}", FileFormat.OPAQUE),
        (b"", FileFormat.OPAQUE),
        (b"plain text\n" * 1000, FileFormat.OPAQUE),
    ],
)
@pytest.mark.parametrize("name", ["model.safetensors", "m.gguf", "m.pt", "config.json", ""])
def test_content_decides_whatever_the_name(data, expected, name):
    assert layout_of(data, name).format is expected


@pytest.mark.parametrize(
    "data", [b"plain text\n" * 1000, b"{}", b"", b"\x80\x04pickle", bytes(100_000), SAFETENSORS]
)
def test_unremarkable_files_get_no_verdict(data):
    layout = layout_of(data, "pytorch_model.bin")
    assert (layout.verdict, layout.refusal) == ("", None)


@pytest.mark.parametrize(("data", "word"), [(GGUF, "gguf"), (ZIP, "zip")])
def test_other_formats_called_safetensors_are_remarked(data, word):
    verdict = layout_of(data, "model.safetensors").verdict
    assert verdict == f"safe_open rejects it: it is a {word} file"


@pytest.mark.parametrize(
    "suffix", ".safetensors .bin .pt .pth .ckpt .gguf .onnx .msgpack .h5".split()
)
def test_lfs_pointers_in_place_of_weights_are_refused(suffix):
    layout = layout_of(POINTER, f"model{suffix}")
    assert "git LFS pointer" in layout.refusal
    assert layout.refusal_remedy == "run git lfs pull"
    assert layout.format is FileFormat.OPAQUE


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (POINTER, "README.md"),
        (POINTER.ljust(1024, b" "), "model.bin"),
        (POINTER[1:], "model.bin"),
        (POINTER[:20], "model.bin"),
    ],
)
def test_what_only_resembles_a_pointer_is_added(data, name):
    assert layout_of(data, name).refusal is None


@pytest.mark.parametrize("data", [SAFETENSORS, GGUF, ZIP, POINTER])
def test_errors_of_the_reader_propagate(data):
    def read_at(offset: int, size: int) -> bytes:
        raise StorageError("disk on fire")

    with pytest.raises(StorageError):
        parse_layout("model.safetensors", len(data), read_at)


MAGICS = st.sampled_from([b"", b"GGUF\3\0\0\0", b"PK\3\4", b"\x20\0\0\0\0\0\0\0{", POINTER[:42]])
NAMES = st.sampled_from(["m.safetensors", "m.gguf", "m.bin", "x"])


@settings(deadline=None, derandomize=True, max_examples=500)
@given(MAGICS, st.binary(max_size=200), st.sampled_from([b"", ZIP[-22:], ZIP[4:]]), NAMES)
def test_no_content_makes_it_fail(magic, body, end, name):
    layout_of(magic + body + end, name)


@settings(deadline=None, derandomize=True, max_examples=100)
@given(st.sampled_from([SAFETENSORS, GGUF, ZIP]), st.data(), NAMES)
def test_truncated_and_extended_files_never_fail(data, draw, name):
    size = draw.draw(st.integers(0, len(data) + 5))
    layout_of(data[:size], name, size)
