"""Planning bases for a group of similar fragments together. Pure; costs come from the caller.

Adding plans one fragment at a time, with what was there before it. Here all members of a group are
known: which of them to store from nothing, and which from which others, so that the sum is small
and no read takes more fragments than allowed. It starts from the best star (one hub, everyone else
predicted from it) and then lets each member move to cheaper bases while that pays.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

__all__ = ["Group", "plan_group"]

_ROUNDS_MAX = 8
_GAIN_MIN = 0.01
"""A member moves to other bases if that saves this share of what it costs."""


@dataclass(frozen=True, slots=True)
class Group:
    """Similar fragments, by index, and what they cost in bytes.

    Attributes:
        solo: Cost of each from nothing.
        against: Cost of a member (first index) predicted from others (the tuple); what is not
            listed is not to be had.
        fixed: Members whose bases must stay as they are, and how many fragments outside the group
            reading them takes besides themselves. They cost nothing and may serve as bases.
    """

    solo: Sequence[float]
    against: Mapping[tuple[int, tuple[int, ...]], float]
    fixed: Mapping[int, int]


def plan_group(
    group: Group,
    closure_max: int,
    find_blends: Callable[[int, Sequence[int]], Mapping[tuple[int, ...], float]],
) -> list[tuple[int, ...]]:
    """Choose bases for every member.

    Args:
        group: The members and their costs.
        closure_max: Most fragments that reading one may take.
        find_blends: Costs of a member predicted from several of some others, asked for when those
            are settled as its likely bases.

    Returns:
        The bases of each member, () for those stored from nothing; fixed members get ().
    """
    plan = _best_star(group, closure_max)
    costs = dict(group.against)
    for round_number in range(_ROUNDS_MAX):
        moved = _improve(group, costs, plan, closure_max)
        if round_number == 0:
            moved |= _add_blends(group, costs, plan, find_blends)
        if not moved:
            break
    return [plan.get(index, ()) for index in range(len(group.solo))]


def _best_star(group: Group, closure_max: int) -> dict[int, tuple[int, ...]]:
    """Everyone predicted from one hub, or from nothing where that is cheaper."""
    members = [index for index in range(len(group.solo)) if index not in group.fixed]
    best: dict[int, tuple[int, ...]] = {}
    best_cost = sum(group.solo[index] for index in members)
    for hub in range(len(group.solo)):
        if group.fixed.get(hub, 0) + 2 > closure_max:
            continue
        plan: dict[int, tuple[int, ...]] = {}
        total = 0.0
        for index in members:
            cost = group.against.get((index, (hub,)), float("inf"))
            if index != hub and cost < group.solo[index]:
                plan[index] = (hub,)
                total += cost
            else:
                total += group.solo[index]
        if total < best_cost:
            best, best_cost = plan, total
    return best


def _improve(
    group: Group,
    costs: Mapping[tuple[int, tuple[int, ...]], float],
    plan: dict[int, tuple[int, ...]],
    closure_max: int,
) -> bool:
    """One round of moves, the largest gains first; True if anyone moved."""

    def current(index: int) -> float:
        bases = plan.get(index, ())
        return costs[index, bases] if bases else group.solo[index]

    moves = sorted(
        (cost - current(index), index, bases)
        for (index, bases), cost in costs.items()
        if index not in group.fixed and cost < current(index) * (1 - _GAIN_MIN)
    )
    moved = False
    for _, index, bases in moves:
        if costs[index, bases] >= current(index) * (1 - _GAIN_MIN):
            continue  # it has moved to something better meanwhile
        before = plan.get(index, ())
        plan[index] = bases
        if _is_allowed(group, plan, index, closure_max):
            moved = True
        elif before:
            plan[index] = before
        else:
            del plan[index]
    return moved


def _is_allowed(
    group: Group, plan: Mapping[int, tuple[int, ...]], moved: int, closure_max: int
) -> bool:
    """Whether the moved member and all that are predicted from it stay within the limit."""
    for index in range(len(group.solo)):
        closure = _closure(plan, index)
        if closure is None:
            return False
        if index != moved and moved not in closure:
            continue
        if len(closure) + sum(group.fixed.get(member, 0) for member in closure) > closure_max:
            return False
    return True


def _closure(plan: Mapping[int, tuple[int, ...]], index: int) -> set[int] | None:
    """What reading a member takes, itself included; None if it needs itself."""
    found: set[int] = set()
    waiting = [index]
    while waiting:
        member = waiting.pop()
        for base in plan.get(member, ()):
            if base == index:
                return None
            if base not in found:
                found.add(base)
                waiting.append(base)
    return found | {index}


def _add_blends(
    group: Group,
    costs: dict[tuple[int, tuple[int, ...]], float],
    plan: Mapping[int, tuple[int, ...]],
    find_blends: Callable[[int, Sequence[int]], Mapping[tuple[int, ...], float]],
) -> bool:
    """Ask for blends of each member's cheapest bases; True if there are any."""
    found = False
    for index in range(len(group.solo)):
        if index in group.fixed or not plan.get(index):
            continue
        singles = sorted(
            (cost, bases[0])
            for (member, bases), cost in costs.items()
            if member == index and len(bases) == 1
        )
        for bases, cost in find_blends(index, [base for _, base in singles]).items():
            costs[index, bases] = cost
            found = True
    return found
