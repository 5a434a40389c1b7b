"""FORMAT.md says what the code does: tables, codes, limits, schema and the worked example."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from blake3 import blake3

import fragfs.library
from fragfs.codec.encoding import decode
from fragfs.codec.groups import GROUPS_MAX
from fragfs.codec.packing import PACKED_BITS
from fragfs.codec.solo import encode_solo
from fragfs.library import extents, names, records, schema
from fragfs.types import (
    FRAGMENT_BYTES_MAX,
    LIBRARY_FORMAT_VERSION,
    SHARED_INODE_BYTES_MIN,
    Dtype,
    Fragment,
    FragmentId,
    Level,
    LibraryConfig,
    Predictor,
    SpanKind,
)

DOCUMENT = (Path(fragfs.library.__file__).parent / "FORMAT.md").read_text()


def section(title: str) -> str:
    found = re.search(rf"^#+ {re.escape(title)}\n(.*?)(?=^#+ |\Z)", DOCUMENT, re.M | re.S)
    assert found, f"FORMAT.md has no section {title!r}"
    return found.group(1)


def field_tables(text: str) -> list[list[tuple[int, int, str]]]:
    """Every run of rows `| offset | size | name...`."""
    tables: list[list[tuple[int, int, str]]] = [[]]
    for line in text.splitlines():
        row = re.match(r"\| (\d+) \| (\d+) \| (\w+)", line)
        if row:
            tables[-1].append((int(row[1]), int(row[2]), row[3]))
        elif tables[-1]:
            tables.append([])
    return [table for table in tables if table]


@pytest.mark.parametrize(
    ("title", "index", "layout"),
    [
        ("Pack header", 0, records.PACK_HEADER),
        ("Record header", 0, records.RECORD_HEADER),
        ("Fragment header", 0, records.FRAGMENT_HEADER),
        ("Batch trailer", 0, records.BATCH_TRAILER),
        ("Retirement", 0, records.RETIRED_BATCH),
        ("Pack index", 0, records.INDEX_ENTRY),
        ("Pack index", 1, records.PACK_FOOTER),
    ],
)
def test_the_tables_of_the_document_are_the_fields_of_the_code(title, index, layout):
    assert field_tables(section(title))[index] == layout.table()


def test_magics():
    for text, magic in (
        ("Pack header", records.PACK_MAGIC),
        ("Record header", b"FrRc"),
        ("Pack index", b"FRAGEND\n"),
    ):
        assert magic.hex(" ") in section(text)


def test_record_kinds():
    rows = dict(re.findall(r"^\| (\d+) \| ([A-Z_]+) \|", section("Record header"), re.M))
    assert {int(code): name for code, name in rows.items()} == {
        kind.value: kind.name for kind in records.RecordKind
    }


def test_dtype_codes():
    rows = re.findall(r"\| (\d+) \| ([A-Z0-9_]+) ", section("Dtypes"))
    assert {int(code): name for code, name in rows} == {d.code: d.name for d in Dtype}


def test_predictor_codes():
    rows = re.findall(r"^\| (\d+) \| ([A-Z]+) \|", section("Predictors"), re.M)
    assert {int(code): name for code, name in rows} == {p.value: p.name for p in Predictor}


def test_the_example_of_planes_decodes():
    text = section("Planes: an example")
    blocks = [bytes.fromhex(h) for h in re.findall(r"^    ((?:[0-9a-f]{2} ?)+)", text, re.M)]
    raw, params, payload = blocks[0], b"".join(blocks[1:4]), b"".join(blocks[4:])
    decoded = decode(Predictor.PLANES, Dtype.BF16, params, memoryview(payload), len(raw))
    assert bytes(decoded) == raw
    assert encode_solo(raw, Dtype.BF16, zstd_level=12).params == params


def test_the_example_of_a_prediction_decodes():
    text = section("Predictions: an example")
    blocks = [bytes.fromhex(h) for h in re.findall(r"^    ((?:[0-9a-f]{2} ?)+)", text, re.M)]
    raw, params, payload = blocks[0], b"".join(blocks[1:7]), b"".join(blocks[7:])
    assert f"`params` ({len(params)} bytes) and `payload` ({len(payload)} bytes)" in text
    numbers = (np.frombuffer(raw, "<u2").astype("<u4") << 16).view("<f4").copy()
    numbers[-1] = 4.5
    base = memoryview(numbers.tobytes())
    found = decode(Predictor.CAST, Dtype.BF16, params, memoryview(payload), len(raw), [base])
    assert bytes(found) == raw


def test_levels_and_the_forms_of_groups():
    row = section("Pack header")
    assert "level: " + ", ".join(f"{x.value} {x.name.lower()}" for x in Level) in row
    text = section("Residuals")
    assert f"group count, 0 to {GROUPS_MAX}" in text
    assert "0 all residuals are 0; 1, 2 or 4 packed" in text
    assert PACKED_BITS == (1, 2, 4)


def test_span_kind_codes():
    text = section("Extents")
    for kind in SpanKind:
        assert f"{kind.value} {kind.name.lower()}" in text


def test_limits():
    rows = dict(re.findall(r"^\| (.+?) \| ([\d,]+(?: to [\d,]+)?)", section("Limits"), re.M))
    numbers = {name: value.replace(",", "") for name, value in rows.items()}
    assert numbers["raw bytes of a fragment"] == str(FRAGMENT_BYTES_MAX)
    assert numbers["bytes of a record header"] == str(records.RECORD_HEADER_BYTES_MAX)
    assert numbers["extents of a file"] == str(extents.EXTENTS_MAX)
    assert numbers["bytes of a path component"] == str(names.NAME_BYTES_MAX)
    assert numbers["bytes of a model name, of a path in a model"] == str(names.MODEL_NAME_BYTES_MAX)
    for setting in ("fragment_elements", "pack_bytes_max"):
        low, high = map(int, numbers[setting].split(" to "))
        for value in (low, high):
            LibraryConfig(**{setting: value})
        for value in (low // 2, high * 2):
            with pytest.raises(Exception, match=setting):
                LibraryConfig(**{setting: value})


def test_versions_and_numbers_in_the_text():
    assert f"# The fragfs library format, version {LIBRARY_FORMAT_VERSION}" in DOCUMENT
    assert f"0x{schema.APPLICATION_ID:08x}" in section("The catalog")
    assert f"start at {schema.FIRST_CONTENT}" in section("The catalog")
    assert f"{SHARED_INODE_BYTES_MIN:,} bytes" in section("The catalog")


def test_every_table_of_the_schema_is_described():
    for table in re.findall(r"CREATE TABLE (\w+)", schema.SCHEMA):
        assert f"`{table}`" in section("The catalog")


def test_the_worked_example_is_what_the_code_writes():
    raw = bytes.fromhex("0000803f") * 4
    encoding = encode_solo(raw, Dtype.F32, zstd_level=12)
    fragment = Fragment(
        id=FragmentId(blake3(raw).digest()),
        dtype=Dtype.F32,
        raw_size=len(raw),
        raw_checksum=records.checksum(raw),
        predictor=encoding.predictor,
        params=encoding.params,
        payload=encoding.payload,
    )
    record = b"".join(bytes(part) for part in records.pack_fragment_record(fragment))
    lines = re.findall(r"^    ([0-9a-f]{4})  ((?:[0-9a-f]{2} ?)+)", section("Worked example"), re.M)
    documented = bytes.fromhex("".join(line for _, line in lines))
    assert documented == record
