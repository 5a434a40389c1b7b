"""Decoding of any fragment, whatever predicts it. The way back from `solo` and `predicted`."""

from __future__ import annotations

from collections.abc import Sequence

from fragfs.codec.entropy import Bytes
from fragfs.codec.predicted import decode_predicted
from fragfs.codec.solo import decode_solo
from fragfs.errors import FormatError
from fragfs.types import PREDICTORS_FROM_BASES, Dtype

__all__ = ["decode"]


def decode(
    predictor: int,
    dtype: Dtype,
    params: Bytes,
    payload: memoryview,
    raw_size: int,
    bases: Sequence[memoryview] = (),
) -> memoryview:
    """Decode a fragment; every argument but `bases` may come from a damaged or hostile file.

    Args:
        predictor: Code of the predictor.
        dtype: Element type the encoding works on.
        params: Parameters of the predictor.
        payload: The encoded bytes.
        raw_size: Bytes after decoding.
        bases: Raw bytes of the fragments that the prediction reads, in its order.

    Returns:
        Exactly `raw_size` bytes, read-only: a view of `payload` or of a base, or fresh memory.

    Raises:
        FormatError: The stored bytes break a rule of the format. Memory in use never exceeds a
            small multiple of FRAGMENT_BYTES_MAX.
    """
    if predictor in PREDICTORS_FROM_BASES:
        return decode_predicted(predictor, dtype, memoryview(params), payload, raw_size, bases)
    if bases:
        raise FormatError("a fragment has bases that nothing is predicted from", actual=len(bases))
    return decode_solo(predictor, dtype, params, payload, raw_size)
