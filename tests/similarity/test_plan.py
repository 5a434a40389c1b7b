"""Planning a group of fragments, on costs made by hand and at random."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fragfs.similarity.plan import Group, plan_group

Costs = dict[tuple[int, tuple[int, ...]], float]
Plan = list[tuple[int, ...]]


def no_blends(index: int, singles: Sequence[int]) -> Mapping[tuple[int, ...], float]:
    return {}


def plan(
    solo: Sequence[float],
    against: Costs,
    closure_max: int = 4,
    fixed: dict[int, int] | None = None,
    find_blends=no_blends,
) -> Plan:
    return plan_group(Group(solo, against, fixed or {}), closure_max, find_blends)


def singles(table: Mapping[int, Mapping[int, float]]) -> Costs:
    return {
        (index, (base,)): cost for index, costs in table.items() for base, cost in costs.items()
    }


def closure(found: Plan, index: int, above: tuple[int, ...] = ()) -> set[int]:
    assert index not in above, f"{index} needs itself"
    return {index}.union(*(closure(found, base, (*above, index)) for base in found[index]))


def total(found: Plan, solo: Sequence[float], costs: Costs, fixed=()) -> float:
    return sum(
        costs[index, bases] if bases else solo[index]
        for index, bases in enumerate(found)
        if index not in fixed
    )


def test_nobody_resembles_anybody():
    assert plan([10, 10, 10], {}) == [(), (), ()]


def test_an_empty_group():
    assert plan([], {}) == []


def test_a_star_is_taken_where_a_chain_saves_no_more():
    # Members of a family: each is as close to the hub as to its neighbour.
    against = {
        (index, (base,)): 3.0 for index in range(5) for base in (0, index - 1) if 0 <= base != index
    }
    assert plan([10] * 5, against) == [(), (0,), (0,), (0,), (0,)]


def test_the_hub_may_come_last():
    against = singles({0: {2: 3}, 1: {2: 3}, 2: {0: 9, 1: 9}})
    assert plan([10, 10, 10], against) == [(2,), (2,), ()]


def test_a_chain_is_taken_where_it_saves_more():
    against = singles({1: {0: 5}, 2: {0: 8, 1: 2}})
    assert plan([10, 10, 10], against) == [(), (0,), (1,)]


def test_a_chain_may_not_be_longer_than_allowed():
    against = singles({1: {0: 5}, 2: {0: 8, 1: 2}})
    found = plan([10, 10, 10], against, closure_max=2)
    assert all(len(closure(found, index)) <= 2 for index in range(3))
    assert total(found, [10, 10, 10], against) == 22  # 1 solo, 2 from it; or as good


@pytest.mark.parametrize("closure_max", [1])
def test_nothing_is_predicted_where_reading_may_take_one_fragment(closure_max):
    against = singles({0: {1: 1}, 1: {0: 1}, 2: {0: 1, 1: 1}})
    blends = {(0, 1): 0.1}
    found = plan([10, 10, 10], against, closure_max, find_blends=lambda *_: blends)
    assert found == [(), (), ()]


def test_two_that_are_close_to_each_other_make_no_cycle():
    against = singles({0: {1: 1}, 1: {0: 1}})
    assert plan([10, 10], against) in ([(), (0,)], [(1,), ()])


def test_three_in_a_ring_make_no_cycle():
    against = singles({0: {1: 1}, 1: {2: 1}, 2: {0: 1}})
    found = plan([10, 10, 10], against)
    for index in range(3):
        closure(found, index)
    assert total(found, [10, 10, 10], against) == 12


def test_a_base_that_saves_nothing_is_not_taken():
    assert plan([10, 10], singles({1: {0: 10}})) == [(), ()]
    assert plan([10, 10], singles({1: {0: 12}})) == [(), ()]


def merged(index: int, bases: Sequence[int]) -> Mapping[tuple[int, ...], float]:
    """Member 3 is a blend of 1 and 2, and of nothing else."""
    return {(1, 2): 0.5} if index == 3 and {1, 2} <= set(bases) else {}


FAMILY = singles({1: {0: 4}, 2: {0: 4}, 3: {0: 5, 1: 4, 2: 4}})


def test_a_blend_is_taken_where_closures_allow_it():
    assert plan([10] * 4, FAMILY, 4, find_blends=merged) == [(), (0,), (0,), (1, 2)]


@pytest.mark.parametrize("closure_max", [2, 3])
def test_a_blend_is_left_where_closures_do_not_allow_it(closure_max):
    found = plan([10] * 4, FAMILY, closure_max, find_blends=merged)
    assert all(len(closure(found, index)) <= closure_max for index in range(4))
    assert total(found, [10] * 4, FAMILY | {(3, (1, 2)): 0.5}) <= 23


def test_a_merge_is_no_hub_only_because_it_is_closest_to_everyone():
    """A base, two fine-tunes and their merge: from the merge a star is cheapest, but the merge is
    nearly free once the fine-tunes are predicted from the base."""
    against = singles(
        {
            0: {1: 36.8, 2: 36.8, 3: 35.5},
            1: {0: 36.8, 2: 37.8, 3: 35.5},
            2: {0: 36.8, 1: 37.8, 3: 35.5},
            3: {0: 35.5, 1: 35.5, 2: 35.5},
        }
    )
    found = plan([54.6] * 4, against, 4, find_blends=merged_at_3)
    best = 54.6 + 36.8 + 36.8 + 2.5
    assert total(found, [54.6] * 4, against | {(3, (1, 2)): 2.5}) <= 1.05 * best


def merged_at_3(index: int, bases: Sequence[int]) -> Mapping[tuple[int, ...], float]:
    return {(1, 2): 2.5} if index == 3 and {1, 2} <= set(bases) else {}


def test_blends_are_asked_for_with_the_cheapest_bases_first():
    asked: dict[int, list[int]] = {}

    def note(index: int, bases: Sequence[int]) -> Mapping[tuple[int, ...], float]:
        asked[index] = list(bases)
        return {}

    plan([10] * 4, singles({1: {0: 4}, 2: {0: 4}, 3: {0: 5, 1: 3, 2: 4}}), find_blends=note)
    assert 0 not in asked, "the hub needs no bases"
    assert asked[3] == [1, 2, 0]


def test_fixed_members_stay_and_serve():
    against = singles({0: {1: 1}, 2: {0: 9, 1: 2}, 3: {1: 2}})
    found = plan([10, 0, 10, 10], against, fixed={1: 0})
    assert found == [(1,), (), (1,), (1,)]


def test_a_fixed_member_does_not_move_however_cheap():
    against = singles({0: {1: 1}, 1: {0: 0.1}})
    assert plan([10, 10], against, fixed={1: 0})[1] == ()


@pytest.mark.parametrize(("depth", "closure_max", "fits"), [(2, 4, True), (2, 3, False)])
def test_what_a_fixed_member_needs_counts(depth, closure_max, fits):
    """Reading member 0 from member 1 takes both and `depth` more."""
    against = singles({0: {1: 1}})
    assert plan([10, 0], against, closure_max, fixed={1: depth})[0] == ((1,) if fits else ())


def test_what_a_fixed_member_needs_counts_for_those_behind_it():
    against = singles({0: {1: 1}, 2: {0: 1}})
    found = plan([10, 0, 10], against, 4, fixed={1: 2})
    assert found == [(1,), (), ()] or found == [(), (), (0,)]
    assert plan([10, 0, 10], against, 5, fixed={1: 2}) == [(1,), (), (0,)]


def test_what_is_not_listed_is_not_to_be_had():
    assert plan([10, 10, 10], singles({1: {0: 1}})) == [(), (0,), ()]


@st.composite
def groups(draw):
    count = draw(st.integers(1, 7))
    cost = st.floats(0.01, 20)
    solo = draw(st.lists(cost, min_size=count, max_size=count))
    pairs = [(i, (b,)) for i in range(count) for b in range(count) if i != b]
    against = {pair: draw(cost) for pair in pairs if draw(st.integers(0, 3))}
    fixed = draw(st.dictionaries(st.integers(0, count - 1), st.integers(0, 3), max_size=count))
    against = {pair: value for pair, value in against.items() if pair[0] not in fixed}
    blended = {
        (index, (a, b)): draw(cost)
        for index in range(count)
        for a in range(count)
        for b in range(a)
        if index not in (a, b) and index not in fixed and not draw(st.integers(0, 4))
    }
    return Group(solo, against, fixed), blended, draw(st.integers(1, 6))


@given(groups())
def test_any_costs_make_a_good_plan(drawn):
    group, blended, closure_max = drawn
    asked: Costs = {}

    def find_blends(index: int, bases: Sequence[int]) -> Mapping[tuple[int, ...], float]:
        found = {
            pair: cost
            for (of, pair), cost in blended.items()
            if of == index and set(pair) <= set(bases)
        }
        asked.update({(index, pair): cost for pair, cost in found.items()})
        return found

    found = plan_group(group, closure_max, find_blends)
    assert len(found) == len(group.solo)
    costs = dict(group.against) | asked
    for index, bases in enumerate(found):
        if index in group.fixed:
            assert bases == ()
            continue
        assert not bases or (index, bases) in costs
        members = closure(found, index)
        if bases:
            assert len(members) + sum(group.fixed.get(m, 0) for m in members) <= closure_max
    free = [cost for index, cost in enumerate(group.solo) if index not in group.fixed]
    assert total(found, group.solo, costs, group.fixed) <= sum(free) + 1e-9
    assert found == plan_group(group, closure_max, find_blends), "the same every time"
