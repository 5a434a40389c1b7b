"""Grouping, the compiled loops and what stands in for them."""

import importlib.util
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fragfs.codec import floats, planes, rebuild, residual
from fragfs.codec import groups as module
from fragfs.codec.groups import (
    GROUPS_MAX,
    Groups,
    join_groups,
    key_field,
    plan_groups,
    split_groups,
)
from fragfs.codec.kernels import find_kernels
from fragfs.errors import FormatError
from fragfs.types import Dtype
from tests.codec.families import EVERY_KIND, as_dtype, nudged, numbers, words_of

KEYED = [dtype for dtype in EVERY_KIND if key_field(dtype)[1]]
WIDTHS = {1: Dtype.F8_E4M3, 2: Dtype.BF16, 4: Dtype.F32, 8: Dtype.F64}
compiled = pytest.mark.skipif(
    module._kernels is None, reason="fragfs.codec._kernels is not compiled here"
)


def names(value):
    return getattr(value, "name", value)


def weights(dtype, count=20_000, seed=0):
    return words_of(as_dtype(numbers(count, seed), dtype), dtype)


def joined(residual_words, prediction, groups, dtype):
    out = np.full_like(prediction, 0xAB)
    join_groups(residual_words, prediction, groups, dtype, out)
    return out


def reference_split(words, prediction, groups, dtype):
    shift, mask = key_field(dtype)
    keys = [word >> shift & mask for word in prediction.tolist()]
    found = []
    first = 0
    for last in groups.last_keys:
        found += [i for i, key in enumerate(keys) if first <= key <= last]
        first = last + 1
    return (words - prediction)[found]


def test_the_compiled_loops_are_used_where_they_can_be_imported():
    is_built = importlib.util.find_spec("fragfs.codec._kernels") is not None
    assert (module._kernels is not None) == (is_built and sys.byteorder == "little")
    found = find_kernels()
    for user in (floats, module, planes, rebuild, residual):
        assert user._kernels is found


@compiled
def test_compiled_loops_for_other_sources_are_not_used(monkeypatch):
    for version in (None, 0, module._kernels.VERSION + 1):
        monkeypatch.setattr(module._kernels, "VERSION", version)
        assert find_kernels() is None
    monkeypatch.delattr(module._kernels, "VERSION")
    assert find_kernels() is None
    monkeypatch.undo()
    monkeypatch.setattr(sys, "byteorder", "big")
    assert find_kernels() is None


@pytest.mark.parametrize("dtype", EVERY_KIND, ids=names)
def test_split_and_join(dtype, loops):
    prediction = weights(dtype)
    words = words_of(nudged(prediction.tobytes(), dtype, step=50), dtype)
    for fine in (False, True):
        groups = plan_groups(prediction, dtype, fine=fine)
        assert sum(groups.sizes) == words.size
        split = split_groups(words, prediction, groups, dtype)
        assert np.array_equal(split, reference_split(words, prediction, groups, dtype))
        assert np.array_equal(joined(split, prediction, groups, dtype), words)


def test_fine_groups_are_more_groups():
    prediction = weights(Dtype.BF16, 1 << 19)
    coarse, fine = (plan_groups(prediction, Dtype.BF16, fine=f) for f in (False, True))
    assert len(coarse.sizes) < len(fine.sizes) <= GROUPS_MAX
    assert min(fine.sizes) < min(coarse.sizes)


@pytest.mark.parametrize("dtype", KEYED, ids=names)
def test_plans(dtype, kernels):
    groups = plan_groups(weights(dtype), dtype)
    assert 1 <= len(groups.sizes) <= GROUPS_MAX
    assert groups.last_keys[-1] == 255
    assert list(groups.last_keys) == sorted(set(groups.last_keys))
    assert min(groups.sizes) >= 1
    if dtype is not Dtype.F8_E8M0:
        assert len(groups.sizes) > 1


def test_both_kernels_plan_the_same(monkeypatch):
    for dtype in EVERY_KIND:
        expected = plan_groups(weights(dtype), dtype)
        with monkeypatch.context() as patch:
            patch.setattr(module, "_kernels", None)
            assert plan_groups(weights(dtype), dtype) == expected


@pytest.mark.parametrize(
    "dtype", [Dtype.U8, Dtype.I16, Dtype.BYTES, Dtype.U64, Dtype.F4], ids=names
)
def test_what_has_no_exponent_is_one_group(dtype):
    assert plan_groups(weights(dtype), dtype) == Groups((255,), (20_000,))


def test_few_words_are_one_group(kernels):
    for count in (1, 2, 4095):
        assert plan_groups(weights(Dtype.BF16, count), Dtype.BF16) == Groups((255,), (count,))


def test_an_exponent_for_every_word(loops):
    spread = np.arange(1 << 18, dtype=np.uint32).astype("<u2")
    groups = plan_groups(spread, Dtype.BF16)
    assert len(groups.sizes) <= GROUPS_MAX
    split = split_groups(spread, spread, groups, Dtype.BF16)
    assert not split.any()


def test_one_exponent_only(kernels):
    same = np.full(10_000, 0x3F80, "<u2")
    assert plan_groups(same, Dtype.BF16) == Groups((255,), (10_000,))
    largest = np.full(10_000, 0x7F80, "<u2")
    assert plan_groups(largest, Dtype.BF16) == Groups((255,), (10_000,))


def test_keys_by_hand():
    assert key_field(Dtype.BF16) == (7, 255)
    assert key_field(Dtype.F16) == (10, 31)
    assert key_field(Dtype.F32) == (23, 255)
    assert key_field(Dtype.F64) == (52, 255)
    assert key_field(Dtype.C64) == (23, 255)
    assert key_field(Dtype.F8_E4M3) == (3, 15)
    assert key_field(Dtype.U8)[1] == key_field(Dtype.BYTES)[1] == key_field(Dtype.F4)[1] == 0


def test_lookup():
    table = Groups((3, 7, 255), (1, 1, 1)).lookup()
    assert table.tolist() == [0] * 4 + [1] * 4 + [2] * 248


@settings(max_examples=40)
@given(
    data=st.data(),
    dtype=st.sampled_from(KEYED),
    # Vectors sort blocks of 1024.
    count=st.integers(1, 60) | st.integers(1020, 2060),
    seed=st.integers(0, 1000),
)
def test_any_groups_of_any_words(data, dtype, count, seed):
    rng = np.random.default_rng(seed)
    kind = weights(dtype, 8).dtype
    prediction = np.frombuffer(rng.bytes(count * kind.itemsize), kind)
    words = np.frombuffer(rng.bytes(count * kind.itemsize), kind)
    shift, mask = key_field(dtype)
    last_keys = sorted({*data.draw(st.lists(st.integers(0, 254), max_size=20)), 255})
    keys = (prediction >> kind.type(shift)) & kind.type(mask)
    sizes = np.diff(
        [0, *(int(np.count_nonzero(keys <= kind.type(last))) for last in last_keys)]
    ).tolist()
    groups = Groups(tuple(last_keys), tuple(sizes))
    expected = reference_split(words, prediction, groups, dtype)
    for kernels, vectors in ((module._kernels, True), (module._kernels, False), (None, False)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "_kernels", kernels)
            if kernels is not None:
                kernels.allow_vectors(vectors)
            split = split_groups(words, prediction, groups, dtype)
            assert np.array_equal(split, expected)
            assert np.array_equal(joined(split, prediction, groups, dtype), words)
            if kernels is not None:
                kernels.allow_vectors(True)


@pytest.mark.parametrize("dtype", WIDTHS.values(), ids=names)
def test_groups_of_another_prediction_are_refused(dtype, kernels):
    prediction = weights(dtype)
    groups = plan_groups(prediction, dtype)
    split = split_groups(prediction, prediction, groups, dtype)
    sizes = list(groups.sizes)
    sizes[0], sizes[1] = sizes[0] - 1, sizes[1] + 1
    for wrong in (sizes, sizes[::-1]):
        with pytest.raises(FormatError):
            joined(split, prediction, Groups(groups.last_keys, tuple(wrong)), dtype)


@pytest.mark.parametrize("dtype", WIDTHS.values(), ids=names)
def test_words_that_lie_across_their_natural_places(dtype, loops):
    prediction = weights(dtype, 5000)
    words = words_of(nudged(prediction.tobytes(), dtype, step=50), dtype)
    groups = plan_groups(prediction, dtype)
    split = split_groups(words, prediction, groups, dtype)
    for skip in range(1, 8):
        moved = [
            np.frombuffer(bytes(skip) + x.tobytes(), x.dtype, offset=skip)
            for x in (words, prediction, split)
        ]
        assert plan_groups(moved[1], dtype) == groups
        assert np.array_equal(split_groups(moved[0], moved[1], groups, dtype), split)
        assert np.array_equal(joined(moved[2], moved[1], groups, dtype), words)


# --- the compiled module by itself: wrong arguments are errors, never writes


@pytest.fixture
def kernel_arguments():
    """Valid arguments of split for 2-byte words in two groups."""
    prediction = np.arange(100, dtype="<u2") << np.uint16(7)
    return {
        "width": 2,
        "words": np.arange(100, dtype="<u2"),
        "prediction": prediction,
        "lookup": Groups((49, 255), (50, 50)).lookup(),
        "sizes": np.array([50, 50], np.uint32),
        "out": np.zeros(100, "<u2"),
        "shift": 7,
        "mask": 255,
    }


@compiled
class TestKernelArguments:
    def call(self, name, arguments):
        getattr(module._kernels, name)(*arguments.values())

    def test_valid_ones(self, kernel_arguments):
        self.call("split", kernel_arguments)

    WRONG = (
        {"width": 0},
        {"width": 3},
        {"width": 16},
        {"width": 0xFFFFFFFF},
        {"width": 4},
        {"words": np.zeros(99, "<u2")},
        {"words": np.zeros(101, "<u2")},
        {"words": np.zeros(0, "<u2")},
        {"prediction": np.zeros(99, "<u2")},
        {"prediction": np.zeros(200, "u1")[1:]},
        {"out": np.zeros(99, "<u2")},
        {"out": np.zeros(0, "<u2")},
        {"lookup": np.zeros(255, np.uint8)},
        {"lookup": np.zeros(257, np.uint8)},
        {"lookup": np.zeros(0, np.uint8)},
        {"lookup": np.full(256, 255, np.uint8)},
        {"lookup": np.full(256, 2, np.uint8)},
        {"lookup": np.zeros(256, np.uint8)},
        {"lookup": np.ones(256, np.uint8)},
        {"sizes": np.zeros(0, np.uint32)},
        {"sizes": np.array([50, 49], np.uint32)},
        {"sizes": np.array([50, 51], np.uint32)},
        {"sizes": np.array([49, 51], np.uint32)},
        {"sizes": np.array([100, 0], np.uint32)},
        {"sizes": np.array([0xFFFFFFFF, 101], np.uint32)},
        {"sizes": np.array([50, 0xFFFFFFFF, 51], np.uint32)},
        {"sizes": np.full(257, 1, np.uint32)},
        {"sizes": np.zeros(1000, np.uint32)},
        {"sizes": np.zeros(3, np.uint8)},
        {"shift": 16},
        {"shift": 64},
        {"shift": 0xFFFFFFFF},
        {"mask": 256},
        {"mask": 0xFFFFFFFF},
        {"mask": 0},
    )

    @pytest.mark.parametrize("key", sorted({key for wrong in WRONG for key in wrong}))
    def test_wrong_ones(self, key, kernel_arguments):
        for wrong in self.WRONG:
            if key in wrong:
                with pytest.raises((ValueError, OverflowError)):
                    self.call("split", kernel_arguments | wrong)

    @pytest.mark.parametrize("key", ["words", "prediction", "lookup", "sizes", "out"])
    def test_wrong_kinds(self, key, kernel_arguments):
        for wrong in (None, "text", 7, np.zeros((200, 2), np.uint8)[:, 0]):
            with pytest.raises((TypeError, ValueError, BufferError)):
                self.call("split", kernel_arguments | {key: wrong})

    def test_an_output_that_may_not_be_written(self, kernel_arguments):
        frozen = kernel_arguments["out"].copy()
        frozen.flags.writeable = False
        for wrong in (frozen, bytes(200)):
            with pytest.raises((TypeError, ValueError, BufferError)):
                self.call("split", kernel_arguments | {"out": wrong})

    def test_no_words(self, kernel_arguments):
        none = np.zeros(0, "<u2")
        empty = {"words": none, "prediction": none, "out": none, "sizes": np.zeros(1, np.uint32)}
        self.call("split", kernel_arguments | empty)

    def test_a_group_that_runs_over_writes_nothing_outside(self, kernel_arguments):
        around = np.full(300, 0xABCD, "<u2")
        wrong = {"out": around[100:200], "lookup": np.full(256, 1, np.uint8)}
        with pytest.raises(ValueError, match="more words than it should"):
            self.call("split", kernel_arguments | wrong)
        assert (around[:100] == 0xABCD).all()
        assert (around[200:] == 0xABCD).all()

    @pytest.mark.parametrize("kind", ["<u2", "<u4"])
    def test_blocks_of_a_group_that_runs_over_write_nothing_outside(self, kind):
        keys = np.arange(5000, dtype=kind) % 4
        out = np.full(5200, 0xABCD, kind)
        lookup = Groups((0, 1, 2, 255), (1, 1, 1, 1)).lookup()
        for sizes in ([1249, 1250, 1250, 1251], [5000, 0, 0, 0], [0, 5000, 0, 0], [1, 1, 1, 4997]):
            arguments = (keys, keys, lookup, np.array(sizes, np.uint32), out[100:5100])
            with pytest.raises(ValueError, match="more words than it should"):
                module._kernels.split(out.itemsize, *arguments, 0, 255)
            assert (out[:100] == 0xABCD).all()
            assert (out[5100:] == 0xABCD).all()

    @pytest.mark.parametrize("group_count", [2, 16, 17, 64])
    def test_groups_whose_keys_are_no_neighbours(self, group_count):
        keys = np.random.default_rng(5).integers(0, 256, 5000).astype("<u2")
        lookup = (np.arange(256) % group_count).astype(np.uint8)
        sizes = np.bincount(lookup[keys], minlength=group_count).astype(np.uint32)
        out = np.empty_like(keys)
        values = np.arange(5000, dtype="<u2")
        module._kernels.split(2, values, keys, lookup, sizes, out, 0, 255)
        order = np.argsort(lookup[keys], kind="stable")
        assert np.array_equal(out, (values - keys)[order])

    @pytest.mark.parametrize(
        "wrong",
        [
            {"width": 3},
            {"words": np.zeros(5, np.uint8)},
            {"out": np.zeros(255, np.uint32)},
            {"out": np.zeros(257, np.uint32)},
            {"out": np.zeros(0, np.uint32)},
            {"shift": 16},
            {"mask": 256},
            {"mask": 0xFFFFFFFF},
        ],
        ids=lambda wrong: next(iter(wrong)),
    )
    def test_wrong_arguments_of_counting(self, wrong):
        arguments = {
            "width": 2,
            "words": np.arange(100, dtype="<u2"),
            "out": np.zeros(256, np.uint32),
            "shift": 7,
            "mask": 255,
        }
        self.call("count_keys", arguments)
        with pytest.raises(ValueError, match="fit each other"):
            self.call("count_keys", arguments | wrong)

    @pytest.mark.parametrize("width", WIDTHS)
    def test_counting(self, width):
        for count in (0, 1, 3, 4, 5, 1001):
            words = np.frombuffer(np.random.default_rng(count).bytes(count * width), f"<u{width}")
            shift, mask = key_field(WIDTHS[width])
            out = np.full(256, 77, np.uint32)
            module._kernels.count_keys(width, words, out, shift, mask)
            expected = [0] * 256
            for word in words.tolist():
                expected[word >> shift & mask] += 1
            assert out.tolist() == expected
