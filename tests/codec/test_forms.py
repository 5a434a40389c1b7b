"""Forms of groups: the same with compiled loops and without, close to the best, and never wrong."""

import sys

import numpy as np
import pytest

from fragfs.codec import forms as module
from fragfs.codec.entropy import store_plane
from fragfs.codec.forms import PLANES, choose_forms
from fragfs.codec.packing import PACKED_BITS
from fragfs.codec.residual import _pack, store_streams

UNITS = pytest.mark.parametrize("unit", [1, 2, 4, 8])
COMPILED = pytest.mark.skipif(
    module._kernels is None, reason="fragfs.codec._kernels is not compiled here"
)


def residuals(unit, spread, count, seed=0):
    values = np.rint(np.random.default_rng(seed).standard_normal(count) * spread)
    return values.astype(np.int64).astype(f"<u{unit}")


def stored_size(values, form):
    """Bytes that a group really takes in a form, coded without a view to matches."""
    payload = []
    if form in PACKED_BITS:
        packed, values = _pack(values, form)
        payload.append(store_plane(packed, 1)[1])
    if values.size:
        store_streams(values, 1, [], payload, int("80" * values.itemsize, 16))
    return sum(map(len, payload))


@COMPILED
@UNITS
def test_both_come_to_the_same(unit, monkeypatch):
    rng = np.random.default_rng(unit)
    cases = []
    for spread in (0, 0.05, 0.2, 0.5, 1, 3, 12, 90, 1e4, 1e9):
        sizes = [1, 2, 77, 4095, 4096, 4097, 8191, 8192, 8193, int(rng.integers(1, 30_000))]
        values = residuals(unit, spread, sum(sizes), seed=int(spread))
        cases += [(values, sizes), (values[: sizes[-1]], [sizes[-1]])]
        mixed = np.where(rng.random(values.size) < 0.4, 0, values).astype(values.dtype)
        cases.append((mixed, sizes))
    cases.append((np.frombuffer(rng.bytes(9000 * unit), f"<u{unit}"), [9000]))
    compiled = [choose_forms(*case) for case in cases]
    monkeypatch.setattr(module, "_kernels", None)
    for case, expected in zip(cases, compiled, strict=True):
        found = choose_forms(*case)
        assert found.forms == expected.forms
        assert found.bits == expected.bits
    assert {form for costs in compiled for form in costs.forms} == {0, *PACKED_BITS, PLANES}


@UNITS
def test_only_zeros_are_all_zero(unit, kernels):
    values = np.zeros(50_000, f"<u{unit}")
    assert (choose_forms(values, [50_000]).forms, choose_forms(values, [50_000]).size) == ([0], 0)
    # One that no sample sees.
    values[49_999 - 3] = 1
    found = choose_forms(values, [40_000, 10_000])
    assert found.forms[0] == 0
    assert found.forms[1] != 0


@pytest.mark.parametrize("spread", [0.2, 0.25, 0.4, 0.6, 1, 2, 5, 30])
def test_close_to_the_best(spread, kernels):
    values = residuals(2, spread, 1 << 17)
    costs = choose_forms(values, [values.size])
    sizes = {form: stored_size(values, form) for form in (*PACKED_BITS, PLANES)}
    assert sizes[costs.forms[0]] <= 1.04 * min(sizes.values())
    assert costs.size == pytest.approx(sizes[costs.forms[0]], rel=0.12)


def test_random_planes_count_as_raw(kernels):
    values = np.frombuffer(np.random.default_rng(0).bytes(1 << 16), "<u2")
    costs = choose_forms(values, [values.size])
    assert costs.forms == [PLANES]
    assert costs.size == values.nbytes


def test_escapes_of_many_groups_count_more(kernels):
    values = np.where(np.random.default_rng(0).random(1 << 14) < 0.4, 0, residuals(2, 9, 1 << 14))
    values = values.astype("<u2")
    alone = choose_forms(values, [values.size])
    both = choose_forms(np.concatenate([values, values]), [values.size] * 2)
    assert alone.bits[0] < both.bits[0] == both.bits[1]


@COMPILED
def test_wrong_arguments():
    logs, losses = module._LOGS.tobytes(), module._LOSSES.tobytes()

    def right():
        sizes = np.array([4, 6], np.uint32).tobytes()
        return [2, bytearray(20), sizes, logs, losses, bytearray(2), bytearray(16)]

    module._kernels.forms(*right())
    wrong = {
        0: (0, 1, 3, 4, 8, 16, 0xFFFFFFFF, None, "2"),
        1: (bytearray(18), bytearray(19), bytearray(22), bytearray(), None, "", 7),
        2: (
            np.array([4, 7], np.uint32),
            np.array([10, 0], np.uint32),
            np.array([10], np.uint32),
            np.array([0xFFFFFFFF, 11], np.uint32),
            bytes(9),
            None,
        ),
        3: (logs[:-4], logs + bytes(4), b"", None),
        4: (losses[:-4], losses + bytes(4), b"", None),
        5: (bytearray(1), bytearray(3), bytes(2), None),
        6: (bytearray(8), bytearray(24), bytearray(15), bytes(16), None),
    }
    for place, values in wrong.items():
        for value in values:
            arguments = right()
            arguments[place] = value
            arrays = [argument for argument in arguments if isinstance(argument, bytearray)]
            counts = [sys.getrefcount(array) for array in arrays]
            with pytest.raises((ValueError, TypeError, BufferError)):
                module._kernels.forms(*arguments)
            # All buffers are let go of: arrays can grow again.
            assert [sys.getrefcount(array) for array in arrays] == counts
            for array in arrays:
                array.append(0)
