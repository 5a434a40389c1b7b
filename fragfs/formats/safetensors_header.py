"""The JSON header of a safetensors file, read as leniently as its bytes allow.

Duplicate keys, unknown dtypes and malformed entries are kept and flagged: whether safetensors
0.8.0 would reject the file is one question, which byte ranges hold tensors is another.
Source: safetensors 0.8.0, src/tensor.rs, and the rules of serde_json it inherits.
"""

from __future__ import annotations

import json
import math
import re
import sys
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn, TypeGuard

from fragfs.formats.layout import element_unit
from fragfs.types import DTYPES_BY_NAME, Dtype

__all__ = ["ENTRIES_MAX", "Entry", "Header", "HeaderError", "parse_header", "shown"]

ENTRIES_MAX = 2_000_000
"""A header with more tensors than this is not read as one."""

_BRACKETS_MAX = 4 * ENTRIES_MAX
_COMMAS_MAX = 6 * ENTRIES_MAX
# They bound what parsing may allocate. A 4-D tensor needs 3 brackets, 9 commas and some 90
# bytes, and a header has at most 100 MB, so no real header comes near.
_NESTING_MAX = 127  # serde_json's recursion limit: what safe_open accepts stays within it
_USIZE_MAX = 2**64 - 1
_ONLY_INT = frozenset({int})
_FIELDS = ("dtype", "shape", "data_offsets")
_FIELD_SET = frozenset(_FIELDS)
_ESCAPES = re.compile(r"\\(?:u[dD][89abAB]..\\u[dD][c-fC-F]..|(u[dD][89a-fA-F])|.)")


class _KnownDtype(NamedTuple):
    """A dtype with its figures at hand: a header looks them up once per tensor."""

    dtype: Dtype
    bits: int
    unit: int


_DTYPES = {
    name: _KnownDtype(dtype, dtype.bits, element_unit(dtype))
    for name, dtype in DTYPES_BY_NAME.items()
    if dtype is not Dtype.C128  # a dtype of other formats only
}


class HeaderError(Exception):
    """The header is not JSON that could name tensors; the message says why."""


class Entry(NamedTuple):
    """One tensor of the header, with offsets counted from the end of the header.

    Attributes:
        name: Its key.
        dtype_name: Its dtype as spelled; "" if that is no string.
        shape: Elements per dimension; None if that is no list of sizes.
        begin: Where its bytes start.
        end: First byte after them; may be below `begin`.
        dtype: What the bytes are; BYTES if there is a problem.
        unit: Bytes that no cut splits.
        problem: Why the fields contradict each other or mean nothing; "" if they are sound.
    """

    name: str
    dtype_name: str
    shape: tuple[int, ...] | None
    begin: int
    end: int
    dtype: Dtype
    unit: int
    problem: str


@dataclass(frozen=True, slots=True)
class Header:
    """What the header says.

    Attributes:
        entries: Tensors whose offsets are numbers, in the file's order, duplicates included.
        problem: Why the header's syntax alone makes safe_open reject the file, or "".
        duplicate: A tensor name that occurs more than once, if there is one.
    """

    entries: list[Entry]
    problem: str
    duplicate: str | None


class _Object(list[tuple[str, Any]]):
    """A JSON object as its pairs: duplicate keys and their order survive."""

    __slots__ = ()


class _Fields(NamedTuple):
    """The fields of one tensor, before it has a name. As JSON it is two containers deep."""

    dtype_name: str
    shape: tuple[int, ...] | None
    begin: int
    end: int

    @property
    def well_typed(self) -> bool:
        return self.dtype_name in _DTYPES and self.shape is not None


def parse_header(raw: bytes) -> Header:
    """Read the N bytes of JSON.

    Raises:
        HeaderError: They are not UTF-8, not one JSON object, or beyond the limits above.
    """
    if raw.count(b"[") + raw.count(b"{") > _BRACKETS_MAX or raw.count(b",") > _COMMAS_MAX:
        raise HeaderError("its header has too many parts")
    try:
        text = raw.decode()
        document = _DECODER.decode(text)
    except UnicodeDecodeError:
        raise HeaderError("its header is not valid UTF-8") from None
    except RecursionError:
        raise HeaderError("its header is nested too deeply") from None
    except ValueError:
        raise HeaderError("its header is not valid JSON") from None
    if not isinstance(document, _Object):
        raise HeaderError("its header is not a map of tensors")
    if len(document) > ENTRIES_MAX:
        raise HeaderError(f"its header names more than {ENTRIES_MAX} tensors")
    if _nesting(document) > _NESTING_MAX:
        raise HeaderError("its header is nested too deeply")
    return _read_document(document, "a lone surrogate" if _has_lone_surrogate(text) else "")


def shown(name: str) -> str:
    """A tensor's name for messages: quoted, escaped and short."""
    return repr(name if len(name) <= 60 else name[:57] + "...")


def _read_document(document: _Object, problem: str) -> Header:
    entries: list[Entry] = []
    seen: set[str] = set()
    duplicate = None
    metadata_count = 0
    for name, value in document:
        if name == "__metadata__":
            metadata_count += 1
            if metadata_count > 1 or not _is_string_map(value):
                problem = problem or "__metadata__ is not one map of strings"
            continue
        if name in seen:
            duplicate = duplicate or name
        seen.add(name)
        fields, sound = _tensor_fields(value)
        if not sound:
            problem = problem or f"the entry of tensor {shown(name)} is malformed"
        if fields is not None:
            entries.append(_entry(name, fields))
    return Header(entries, problem, duplicate)


def _entry(name: str, fields: _Fields) -> Entry:
    known = _DTYPES.get(fields.dtype_name)
    problem = _contradiction(known, fields)
    dtype, unit = (Dtype.BYTES, 1) if known is None or problem else (known.dtype, known.unit)
    return Entry(name, *fields, dtype, unit, problem)


def _contradiction(known: _KnownDtype | None, fields: _Fields) -> str:
    if known is None:
        return "has an unknown dtype"
    if fields.shape is None:
        return "has no shape"
    count = 1
    for length in fields.shape:
        count *= length
        if count > _USIZE_MAX:
            return "has an overflowing shape"
    bits = count * known.bits
    size = fields.end - fields.begin
    if bits != size * 8:
        return f"has {size} bytes where its dtype and shape need {bits / 8:.16g}"
    return ""


def _is_string_map(value: object) -> bool:
    if value is None:
        return True
    return isinstance(value, _Object) and all(isinstance(item, str) for _, item in value)


def _tensor_fields(value: object) -> tuple[_Fields | None, bool]:
    """The fields of a tensor entry as far as they make sense, and whether serde reads it too."""
    if isinstance(value, _Fields):
        return value, value.well_typed
    if isinstance(value, _Object):
        known = [name for name, _ in value if name in _FIELDS]
        by_name = dict(value)
        fields = _fields(*(by_name.get(name) for name in _FIELDS))
        return fields, len(known) == 3 and fields is not None and fields.well_typed
    if isinstance(value, list) and len(value) == 3:  # serde reads a struct from an array, too
        fields = _fields(*value)
        return fields, fields is not None and fields.well_typed
    return None, False


def _fields(dtype: object, shape: object, offsets: object) -> _Fields | None:
    if not (_is_sizes(offsets) and len(offsets) == 2):
        return None
    if isinstance(dtype, _Object) and len(dtype) == 1 and dtype[0][1] is None:
        dtype = dtype[0][0]  # serde reads {"F32": null} as the enum member F32
    dtype_name = sys.intern(dtype) if isinstance(dtype, str) else ""
    return _Fields(dtype_name, tuple(shape) if _is_sizes(shape) else None, *offsets)


def _is_sizes(value: object) -> TypeGuard[list[int]]:
    if type(value) is not list or not _ONLY_INT.issuperset(map(type, value)):  # bool is no size
        return False
    return not value or (min(value) >= 0 and max(value) <= _USIZE_MAX)


def _read_object(pairs: list[tuple[str, Any]]) -> _Object | _Fields:
    """Shrink the usual tensor entry at once: a header has up to a million of them."""
    if len(pairs) == 3:
        by_name = dict(pairs)
        if by_name.keys() == _FIELD_SET:
            fields = _fields(by_name["dtype"], by_name["shape"], by_name["data_offsets"])
            if fields is not None:
                return fields
    return _Object(pairs)


def _read_integer(digits: str) -> int | float:
    """As serde_json: what fits 64 bits is an integer, the rest (and -0) a float."""
    if len(digits) <= 20 and digits != "-0":
        return int(digits)
    return _read_float(digits)


def _read_float(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise ValueError("number out of range")
    return value


def _reject_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(
    object_pairs_hook=_read_object,
    parse_float=_read_float,
    parse_int=_read_integer,
    parse_constant=_reject_constant,
)


def _nesting(document: _Object) -> int:
    """Containers inside each other, the document included."""
    deepest = 0
    pending: list[tuple[Any, int]] = [(document, 1)]
    while pending:
        value, depth = pending.pop()
        if isinstance(value, _Fields):
            depth += 1
        elif isinstance(value, _Object):
            pending.extend((item, depth + 1) for _, item in value if _is_container(item))
        else:
            pending.extend((item, depth + 1) for item in value if _is_container(item))
        deepest = max(deepest, depth)
    return deepest


def _is_container(value: object) -> bool:
    return isinstance(value, (list, _Fields))


def _has_lone_surrogate(text: str) -> bool:
    """Whether an escape stands for half a character, which serde_json rejects."""
    return "\\u" in text and any(match[1] for match in _ESCAPES.finditer(text))
