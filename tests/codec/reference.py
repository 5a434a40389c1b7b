"""The format's rules for predicted fragments, one word at a time, sharing nothing with the code.

Numbers are exact fractions and are rounded where the format says so; slow, and easy to check.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from fractions import Fraction

import zstandard

from fragfs.types import Dtype, Predictor

# Mantissa bits, exponent bias, code of the largest finite number.
SMALL = {
    Dtype.F16: (10, 15, 0x7BFF),
    Dtype.F8_E4M3: (3, 7, 0x7E),
    Dtype.F8_E5M2: (2, 15, 0x7B),
}
RAW, CONSTANT, ZSTD = 0, 1, 2
F32_LARGEST = 0x7F7FFFFF

# --- numbers


def unit_of(dtype: Dtype) -> int:
    """Bytes of a word; of packed elements one."""
    return dtype.bits // 8 // (2 if dtype in (Dtype.C64, Dtype.C128) else 1) or 1


def value_of(magnitude: int, mantissa: int, bias: int) -> Fraction:
    """The number of a code without its sign, as if there were no infinities and NaNs."""
    exponent, fraction = divmod(magnitude, 1 << mantissa)
    if exponent:
        fraction += 1 << mantissa
    return fraction * Fraction(2) ** (max(exponent, 1) - bias - mantissa)


def code_of(value: Fraction, mantissa: int, bias: int) -> int:
    """The code nearest to a number of at least 0, ties to even, as if there were no largest."""
    if not value:
        return 0
    exponent = value.numerator.bit_length() - value.denominator.bit_length()
    exponent -= Fraction(2) ** exponent > value
    exponent = max(exponent, 1 - bias)
    steps = round(value / Fraction(2) ** (exponent - mantissa))
    return (exponent - (1 - bias) << mantissa) + steps


def widen(word: int, dtype: Dtype) -> int:
    """The bits of the f32 that a word counts as."""
    if dtype is Dtype.F32:
        return word
    if dtype is Dtype.BF16:
        return word << 16
    mantissa, bias, _ = SMALL[dtype]
    sign, magnitude = divmod(word, 1 << dtype.bits - 1)
    return sign << 31 | code_of(value_of(magnitude, mantissa, bias), 23, 127)


def narrow(bits: int, dtype: Dtype) -> int:
    """The word nearest to an f32."""
    if dtype is Dtype.F32:
        return bits
    if dtype is Dtype.BF16:
        return round(Fraction(bits, 1 << 16)) & 0xFFFF
    mantissa, bias, largest = SMALL[dtype]
    sign, magnitude = divmod(bits, 1 << 31)
    code = largest
    if magnitude <= F32_LARGEST:
        code = min(largest, code_of(value_of(magnitude, 23, 127), mantissa, bias))
    return sign << dtype.bits - 1 | code


def quantize(bits: int, scale: int) -> int:
    """A number divided by another (both bits of f32), as a signed byte."""
    sign, magnitude = divmod(bits, 1 << 31)
    if magnitude > 0x7F800000:
        return 0
    code = 1 << 31
    if magnitude <= F32_LARGEST:
        code = code_of(value_of(magnitude, 23, 127) / value_of(scale, 23, 127), 23, 127)
    whole = 1 << 40 if code > F32_LARGEST else round(value_of(code, 23, 127))
    return max(-128, min(127, -whole if sign else whole)) & 0xFF


def blend(inputs: Sequence[int], coefficients: Sequence[float]) -> int:
    """A sum of products, rounded to f32 after every operation; 0 if anything overflows."""
    total: tuple[int, Fraction] | None = None
    for bits, coefficient in zip(inputs, coefficients, strict=True):
        sign, magnitude = divmod(bits, 1 << 31)
        if magnitude > F32_LARGEST:
            return 0
        if magnitude >> 23 < 64:
            sign = magnitude = 0
        factor = Fraction(coefficient)
        product = _rounded(value_of(magnitude, 23, 127) * abs(factor))
        if product is None:
            return 0
        term = (sign ^ (factor < 0), product)
        if total is None:
            total = term
            continue
        exact = _signed(total) + _signed(term)
        added = _rounded(abs(exact))
        if added is None:
            return 0
        # What cancels is plus zero; minus zero is the sum of two such.
        negative = exact < 0 if exact else total[0] and term[0]
        total = (int(negative), added)
    assert total is not None
    return total[0] << 31 | code_of(total[1], 23, 127)


def _signed(number: tuple[int, Fraction]) -> Fraction:
    return -number[1] if number[0] else number[1]


def _rounded(value: Fraction) -> Fraction | None:
    code = code_of(value, 23, 127)
    return value_of(code, 23, 127) if code <= F32_LARGEST else None


# --- streams


class Reader:
    """Parameters and payload, consumed in step."""

    def __init__(self, params: bytes, payload: bytes) -> None:
        self.params = params
        self.payload = payload

    def take(self, layout: str) -> tuple[int, ...]:
        size = struct.calcsize("<" + layout)
        values = struct.unpack("<" + layout, self.params[:size])
        self.params = self.params[size:]
        return values

    def stream(self, count: int) -> bytes:
        method, size = self.take("BI")
        stored, self.payload = self.payload[:size], self.payload[size:]
        if method == CONSTANT:
            return stored * count
        return stored if method == RAW else zstandard.decompress(stored)

    def words(self, count: int, unit: int) -> list[int]:
        if not count:
            return []
        planes = [self.stream(count) for _ in range(unit)]
        return [int.from_bytes(element, "little") for element in zip(*planes, strict=True)]


def decode(
    predictor: int,
    dtype: Dtype,
    params: bytes,
    payload: bytes,
    raw_size: int,
    bases: Sequence[bytes],
) -> bytes:
    """The covered part of a predicted fragment, and as many zeros as no base covers."""
    reader = Reader(params, payload)
    unit = unit_of(dtype)
    (count,) = reader.take("I")
    if predictor == Predictor.SPARSE:
        words = _words(bases[0], unit, count)
        (changes,) = reader.take("I")
        gaps = reader.words(changes, 4)
        place = -1
        for gap, residual in zip(gaps, reader.words(changes, unit), strict=True):
            place += gap + 1
            words[place] += residual
    else:
        predicted = _predict(predictor, dtype, count, reader, bases)
        residual = _residual(reader, predicted, dtype)
        words = [a + b for a, b in zip(predicted, residual, strict=True)]
    modulus = 1 << 8 * unit
    covered = b"".join((word % modulus).to_bytes(unit, "little") for word in words)
    return covered + bytes(raw_size - len(covered))


def _words(raw: bytes, unit: int, count: int) -> list[int]:
    return [int.from_bytes(raw[i * unit : (i + 1) * unit], "little") for i in range(count)]


def _predict(
    predictor: int, dtype: Dtype, count: int, reader: Reader, bases: Sequence[bytes]
) -> list[int]:
    if predictor == Predictor.DELTA:
        return _words(bases[0], unit_of(dtype), count)
    if predictor == Predictor.DECAY:
        assert dtype is Dtype.F32
        differences = [word - 0x80808080 for word in reader.words(256, 4)]
        steps = [sum(differences[: index + 1]) for index in range(256)]
        words = _words(bases[0], 4, count)
        return [(word + steps[word // 2**15 % 256]) % 2**32 for word in words]
    floats, coefficients = [], []
    for base in bases:
        (code,) = reader.take("B")
        base_dtype = Dtype.of_code(code)
        assert base_dtype is not None
        if predictor == Predictor.BLEND:
            coefficients += reader.take("f")
        floats.append(
            [widen(word, base_dtype) for word in _words(base, unit_of(base_dtype), count)]
        )
    if predictor == Predictor.CAST:
        return [narrow(bits, dtype) for bits in floats[0]]
    if predictor == Predictor.BLEND:
        return [narrow(blend(row, coefficients), dtype) for row in zip(*floats, strict=True)]
    row, first = reader.take("II")
    rows = [0 if not row or i < first else 1 + (i - first) // row for i in range(count)]
    scales = reader.words(max(rows) + 1, 4)
    return [quantize(bits, scales[r]) for bits, r in zip(floats[0], rows, strict=True)]


def _residual(reader: Reader, predicted: Sequence[int], dtype: Dtype) -> list[int]:
    unit = unit_of(dtype)
    bias = int("80" * unit, 16)
    (group_count,) = reader.take("B")
    if not group_count:
        return [0] * len(predicted)
    last_keys: list[int] = []
    groups: list[list[int | None]] = []
    for _ in range(group_count):
        last_key, size, bits = reader.take("BIB")
        last_keys.append(last_key)
        if bits == 0:
            groups.append([0] * size)
        elif bits == 8:
            groups.append([word - bias for word in reader.words(size, unit)])
        else:
            reader.take("I")
            packed = reader.stream(-(-size * bits // 8))
            codes = [
                byte >> place & (1 << bits) - 1 for byte in packed for place in range(0, 8, bits)
            ]
            zero, escape = (1 << bits - 1) - 1, (1 << bits) - 1
            groups.append([None if code == escape else code - zero for code in codes[:size]])
    outside = iter(reader.words(sum(group.count(None) for group in groups), unit))
    flat = [
        [next(outside) - bias if value is None else value for value in group] for group in groups
    ]
    queues = [iter(group) for group in flat]
    shift, mask = (dtype.mantissa_bits, (1 << min(8, dtype.exponent_bits)) - 1)
    return [
        next(queues[next(g for g, last in enumerate(last_keys) if word >> shift & mask <= last)])
        for word in predicted
    ]


# --- writing: every form on demand, however few words there are


def stream_of(data: Sequence[int], method: int) -> tuple[bytes, bytes]:
    """Descriptor and stored bytes of one stream."""
    stored = bytes(data)
    if method == CONSTANT:
        assert len(set(stored)) == 1
        stored = stored[:1]
    elif method == ZSTD:
        stored = zstandard.ZstdCompressor(level=1).compress(stored)
    return struct.pack("<BI", method, len(stored)), stored


def planes_of(words: Iterable[int], unit: int, methods: Sequence[int]) -> tuple[bytes, bytes]:
    """Descriptors and stored bytes of the planes of some words, lowest byte first."""
    elements = [(word % (1 << 8 * unit)).to_bytes(unit, "little") for word in words]
    streams = [
        stream_of([element[place] for element in elements], method)
        for place, method in zip(range(unit), methods, strict=True)
    ]
    return b"".join(s[0] for s in streams), b"".join(s[1] for s in streams)


def residual_of(
    groups: Sequence[tuple[int, int, Sequence[int]]], unit: int, method: int = RAW
) -> tuple[bytes, bytes]:
    """A residual in given forms.

    Args:
        groups: (last key, bits, residuals) of each group; bits 0, 1, 2, 4, or 8 for planes.
        unit: Bytes of a word.
        method: How every stream is stored.
    """
    bias = int("80" * unit, 16)
    params, payload = [bytes([len(groups)])], []
    outside: list[int] = []
    for last_key, bits, values in groups:
        params.append(struct.pack("<BIB", last_key, len(values), bits))
        if bits == 8:
            streams = planes_of([value + bias for value in values], unit, [method] * unit)
        elif bits:
            zero, escape = (1 << bits - 1) - 1, (1 << bits) - 1
            near = [-zero <= value < escape - zero for value in values]
            codes = [v + zero if n else escape for v, n in zip(values, near, strict=True)]
            far = [value for value, n in zip(values, near, strict=True) if not n]
            outside += far
            per_byte = 8 // bits
            packed = [
                sum(code << bits * place for place, code in enumerate(codes[i : i + per_byte]))
                for i in range(0, len(codes), per_byte)
            ]
            params.append(struct.pack("<I", len(far)))
            streams = stream_of(packed, method)
        else:
            assert not any(values)
            continue
        params.append(streams[0])
        payload.append(streams[1])
    if outside:
        streams = planes_of([value + bias for value in outside], unit, [method] * unit)
        params.append(streams[0])
        payload.append(streams[1])
    return b"".join(params), b"".join(payload)
