"""A short test that this machine decodes as every other one does.

Decoding is written so that it cannot differ between machines. This notices when it does:
a library that converts numbers its own way, a miscompiled loop, a processor that rounds wrongly.
The raw bytes here were computed once, with exact arithmetic; records that need the same conversions
are read forever. Pure; about two milliseconds.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from fragfs.codec.encoding import decode
from fragfs.errors import FragmentError, IntegrityError
from fragfs.types import Dtype, Predictor

__all__ = ["check_decoder"]

_REPEATS = 4
"""Copies that conversions are checked on: enough for vector units."""

_REMEDY = "install fragfs, numpy and zstandard again, and test the memory of this machine"


@dataclass(frozen=True, slots=True)
class _Record:
    """A stored fragment and what it decodes to."""

    name: str
    predictor: Predictor
    dtype: Dtype
    params: bytes
    payload: bytes
    raw: bytes
    bases: tuple[bytes, ...] = ()


# Zeros, denormals, ties of every narrower format and their neighbours, the largest number,
# infinities and NaNs with payloads; and the same rotated, so that each kind meets others.
_WIDE = bytes.fromhex(
    "000000000000008001000000ffff7f80000080000000803f008080bf0180803f0080813f000000330100"
    "00b30010803f0030803fffffff38ffef7f4700f07fc70000803a0100803a0000883f0000e843ffffe7c3"
    "0000903f000000370100003700006047ffff7f7f0000807f000080ff0100807f4523c1ffffffff7f0080"
    "ff7f"
)
_NEXT = _WIDE[4:] + _WIDE[:4]
_OTHER = _WIDE[56:] + _WIDE[:56]

_NARROWED = {
    Dtype.BF16: (
        "00000080000080808000803f80bf813f823f003300b3803f803f0039804780c7803a803a883fe843e8c3"
        "903f003700376047807f807f80ff807fc1ff00800080"
    ),
    Dtype.F16: (
        "00000080000000800000003c04bc043c0c3c00000180003c023c0008ff7bfffb00140014403c405f40df"
        "803c80008000007bff7bff7bfffbff7bfffbff7bff7b"
    ),
    Dtype.F8_E4M3: "008000800038b8383800803838007efe0001387efe3900007e7e7efe7efe7e7e",
    Dtype.F8_E5M2: "00800080003cbc3c3c00803c3c087bfb14143c5fdf3c00017b7b7bfb7bfb7b7b",
}
"""The numbers of `_WIDE` in narrower formats."""

_WIDENED = {
    Dtype.BF16: (
        "0000008001007f00807fc1ffb53f7f7f",
        "00000000000000800000010000007f000000807f0000c1ff0000b53f00007f7f",
    ),
    Dtype.F16: (
        "ff0301000082007c01fe553555b5ff7b",
        "00c07f3800008033000000b8000080470020c0c700a0aa3e00a0aabe00e07f47",
    ),
    Dtype.F8_E4M3: (
        "00800187087e7fb5",
        "00000000000000800000003b000060bc0000803c0000e0430000f043000050bf",
    ),
    Dtype.F8_E5M2: (
        "00800183047b7cff",
        "000000000000008000008037000040b80000803800006047000080470000e0c7",
    ),
}
"""Special and ordinary numbers of each format, and the same as f32."""

_BLENDED = (
    (
        Dtype.F32,
        (0.3, -0.7),
        (
            "00000000000000000000000000000000333333bf9a59803f018080bf6566d0be66669b3e00000033"
            "994933bfff3fcdbe01c8993eff2733c700f07f47009099c6ceccccb933533ebf993da2c30000e843"
            "cdfc0bc31accac3ececc4cb6cdcc1cc7323333ff0000000000000000000000000000000000000000"
            "0000000000000000"
        ),
    ),
    (
        Dtype.F16,
        (0.3, 0.25, -3.0),
        (
            "fffbff7b009a009ae0c170e57065a4c1db348081fffb00000000000000000000000000004557cd4d"
            "57d8663546000073ff7b0000000000000000000000000000"
        ),
    ),
)
"""Sums of `_WIDE`, `_NEXT` and `_OTHER`: dtype, coefficients, raw bytes."""

_QUANTIZED = "000000000000ff010100004d4d007f800000527f8057007f7f7f7f8000000000"
_SCALES = bytes.fromhex("00f40000fd00005480403c21")  # planes of 2, 0.013 and 2**-60

_STEPS = bytes.fromhex("5c7f8090")
"""Planes of the differences of steps: each is 0x0ffffedc more than the one before it."""
_DECAYED = (
    "dcfeff0fdcfeff8fddfeff0fffdb7e80dcfe7f10dcfe7f4fb87d80dfb97d805f707b817fdcfeff42ddfe"
    "ffc2dc0e804fdc2e804fffdbfe38ffcb7e4700cc7ec7dcfe7f4addfe7f4a9cec874f9c11e753bf12e7c3"
    "5cda8f4fdcfeff46ddfeff46dc235f57ffdb7e7fdcfe7f8fdcfe7f0fddfe7f8fd98dc02fffdbfe7f005c"
    "fe7f"
)

_DELTAS = (
    (
        Dtype.F8_E4M3,
        "0800000002070500000004010000000003000000ff03000000020000000000010000000001000000",
        "0afe010688",
        "1038b9447f02c03a",
        "1331c0457f0abf34",
    ),
    (
        Dtype.BF16,
        "08000000040001000000040000000000010000007902000000010100000000010000007c020000000201"
        "0000000001000000ff03000000080003000000000300000000020000000002000000",
        "0a020e3aa16880808481778080",
        "0100123c33bd803d813fc17f55bc993e",
        "0400123c34bd773d3b3fe27f56bc8142",
    ),
    (
        Dtype.F32,
        "08000000027a040000000102000000020a000000ff0400000008020d000000020d000000020d00000002"
        "0d000000020b000000020b000000020b000000020b000000",
        "28b52ffd20010900000628b52ffd20042100003a80857f28b52ffd20042100008080808028b52ffd2004"
        "2100008090808028b52ffd20042100008080808028b52ffd2002110000818228b52ffd20021100008080"
        "28b52ffd2002110000808028b52ffd20021100008080",
        "010000005634123c111133bd0000803d7777813f0100c07f555555bc9999993e",
        "010000005734123c131133bdbaff7f3d7777913f0600c07f555555bc9899993e",
    ),
    (
        Dtype.F64,
        "0800000002fa0400000002000000000001000000ff0400000000",
        "49",
        "0100000000000000cdab89674523813f332322121131a3bf000000000000b03f010000707717f83f0100"
        "00000000f07f55555555555585bf9a9999999999d93f",
        "0100000000000000ceab89674523813f322322121131a3bf000000000000b03f010000707717f83f0100"
        "00000000f07f55555555555585bf9a9999999999d93f",
    ),
)
"""Groups of a few words, in every form: dtype, params, payload, base, raw bytes."""

_FRAME = (
    "28b52ffd20783501008285058342317f3e669b0bbea397af6cee3ecc23e2cc79c318050035331e672eb8f6625a0bea"
)
_DIGITS = (
    "04030020001001000000100441000400010300000200200102010200222000012000240020000322"
    "0010202000000000000100202000400001000000"
)
"""A frame of Huffman coded literals, and its bytes as digits."""


def check_decoder() -> None:
    """Decode a few constants of every predictor and conversion, in the calling thread.

    Raises:
        IntegrityError: This machine, or a library on it, decodes wrongly: nothing that it reads
            or writes can be trusted.
    """
    for record in _records():
        try:
            raw = decode(
                record.predictor,
                record.dtype,
                record.params,
                memoryview(record.payload),
                len(record.raw),
                [memoryview(base) for base in record.bases],
            )
        except FragmentError as error:
            raise IntegrityError(
                f"this machine cannot decode ({record.name}): {error.message}", remedy=_REMEDY
            ) from error
        if raw != record.raw:
            raise IntegrityError(
                f"this machine decodes wrongly ({record.name})",
                remedy=_REMEDY,
                expected=record.raw.hex(),
                actual=raw.hex(),
            )


def _records() -> Iterator[_Record]:
    yield from _solo_records()
    yield from _cast_records()
    yield from _blend_records()
    yield _Record(
        "QUANTIZE",
        Predictor.QUANTIZE,
        Dtype.I8,
        struct.pack("<IBII", 32, Dtype.F32.code, 13, 10) + struct.pack("<BI", 0, 3) * 4 + b"\0",
        _SCALES,
        bytes.fromhex(_QUANTIZED),
        (_WIDE,),
    )
    yield _Record(
        "DECAY",
        Predictor.DECAY,
        Dtype.F32,
        struct.pack("<I", len(_WIDE) // 4) + struct.pack("<BI", 1, 1) * 4 + b"\0",
        _STEPS,
        bytes.fromhex(_DECAYED),
        (_WIDE,),
    )
    for dtype, *fields in _DELTAS:
        params, payload, base, raw = map(bytes.fromhex, fields)
        yield _Record(
            f"DELTA of {dtype.name}", Predictor.DELTA, dtype, params, payload, raw, (base,)
        )
    yield _Record(
        "SPARSE",
        Predictor.SPARSE,
        Dtype.BF16,
        struct.pack("<II", 4, 2)
        + struct.pack("<BIBIBIBI", 0, 2, 1, 1, 1, 1, 1, 1)
        + struct.pack("<BIBI", 0, 2, 1, 1)
        + struct.pack("<BH", Predictor.RAW, 0),
        b"\1\1\0\0\0\xff\2\xfftail",
        bytes.fromhex("0000ff00ffff0200") + b"tail",
        (bytes.fromhex("00000001ffff0001"),),
    )


def _solo_records() -> Iterator[_Record]:
    yield _Record("RAW", Predictor.RAW, Dtype.U8, b"", b"raw", b"raw")
    yield _Record("CONSTANT", Predictor.CONSTANT, Dtype.BF16, b"ab", b"", b"ababa")
    yield _Record(
        "ZSTD",
        Predictor.ZSTD,
        Dtype.BYTES,
        b"",
        bytes.fromhex(_FRAME),
        bytes(map(int, _DIGITS)),
    )
    yield _Record(
        "PLANES",
        Predictor.PLANES,
        Dtype.BF16,
        bytes([1, 2]) + struct.pack("<BIBI", 0, 2, 1, 1),
        bytes.fromhex("80017f") + b"x",
        bytes.fromhex("80bf813f") + b"x",
    )


def _cast_records() -> Iterator[_Record]:
    wide = [(Dtype.F32, dtype, _WIDE, bytes.fromhex(raw)) for dtype, raw in _NARROWED.items()]
    narrow = [
        (dtype, Dtype.F32, bytes.fromhex(base), bytes.fromhex(raw))
        for dtype, (base, raw) in _WIDENED.items()
    ]
    for source, target, base, raw in wide + narrow:
        count = _REPEATS * len(base) * 8 // source.bits
        yield _Record(
            f"CAST from {source.name} to {target.name}",
            Predictor.CAST,
            target,
            struct.pack("<IBB", count, source.code, 0),
            b"",
            raw * _REPEATS,
            (base * _REPEATS,),
        )


def _blend_records() -> Iterator[_Record]:
    for dtype, coefficients, raw in _BLENDED:
        bases = (_WIDE, _NEXT, _OTHER)[: len(coefficients)]
        fields = [struct.pack("<Bf", Dtype.F32.code, value) for value in coefficients]
        yield _Record(
            f"BLEND to {dtype.name}",
            Predictor.BLEND,
            dtype,
            struct.pack("<I", _REPEATS * len(_WIDE) // 4) + b"".join(fields) + b"\0",
            b"",
            bytes.fromhex(raw) * _REPEATS,
            tuple(base * _REPEATS for base in bases),
        )
