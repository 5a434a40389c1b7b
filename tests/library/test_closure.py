"""Closures, and looking up many at once."""

from __future__ import annotations

import pytest

from fragfs.library.closure import CLOSURE_LIMIT, Closures, closure_of

BASES = {1: (), 2: (1,), 3: (2, 1), 4: (), 5: (4, 3)}


class Recorder:
    """Bases of fragments, and the numbers that were asked for."""

    def __init__(self, bases):
        self.bases = bases
        self.asked = []

    def __call__(self, numbers):
        self.asked.append(sorted(numbers))
        return {number: self.bases[number] for number in numbers}


@pytest.mark.parametrize("numbers", [(1,), (2,), (3,), (5,), (1, 4), (2, 5)])
def test_closures_are_those_of_their_fragments(numbers):
    closures = Closures(Recorder(BASES))
    assert closures.of(numbers) == closure_of(numbers, BASES.__getitem__)
    assert [closures.bases(number) for number in numbers] == [BASES[n] for n in numbers]


def test_a_level_takes_one_look_up_and_nothing_is_looked_up_twice():
    find = Recorder(BASES)
    closures = Closures(find)
    closures.load(BASES)
    assert find.asked == [[1, 2, 3, 4, 5]]
    assert closures.of([5]) == {1, 2, 3, 4, 5}
    assert len(find.asked) == 1

    find = Recorder(BASES)
    Closures(find).load([2, 5])
    assert find.asked == [[2, 5], [1, 3, 4]]


def test_a_cycle_or_an_endless_chain_of_a_damaged_catalog_ends():
    assert Closures(Recorder({1: (2,), 2: (1,)})).of([1]) == {1, 2}
    chain = {number: (number + 1,) for number in range(100)}
    find = Recorder(chain)
    assert len(Closures(find).of([0])) == CLOSURE_LIMIT + 1
    assert len(find.asked) == CLOSURE_LIMIT + 1
