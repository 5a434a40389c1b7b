"""Planning bases for a group of similar fragments together. Pure; costs come from the caller.

Adding plans one fragment at a time, with what was there before it. Here all members of a group are
known: which of them to store from nothing, and which from which others, so that the sum is small
and no read takes more fragments than allowed. It starts from the best stars (one hub, everyone
else predicted from it), lets each member move to cheaper bases while that pays, and takes the
cheapest outcome.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

__all__ = ["Group", "plan_group"]

_ROUNDS_MAX = 8
_HUBS_MAX = 4
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
        find_blends: Costs of a member predicted from several of some others, given cheapest first.

    Returns:
        The bases of each member, () for those stored from nothing; fixed members get ().
    """
    costs = {**group.against, **_blend_costs(group, find_blends)}
    best: dict[int, tuple[int, ...]] = {}
    best_cost = _total(group, costs, best)
    for star in _stars(group, closure_max):
        plan = star
        for _ in range(_ROUNDS_MAX):
            if not _improve(group, costs, plan, closure_max):
                break
        cost = _total(group, costs, plan)
        if cost < best_cost:
            best, best_cost = plan, cost
    return [best.get(index, ()) for index in range(len(group.solo))]


def _total(
    group: Group,
    costs: Mapping[tuple[int, tuple[int, ...]], float],
    plan: Mapping[int, tuple[int, ...]],
) -> float:
    return sum(
        costs[index, plan[index]] if index in plan else group.solo[index]
        for index in range(len(group.solo))
        if index not in group.fixed
    )


def _stars(group: Group, closure_max: int) -> list[dict[int, tuple[int, ...]]]:
    """Everyone predicted from one hub, or from nothing where that is cheaper; the best few hubs.

    Not only the best: a merge lies between its parents, close to everyone, and costs most as a hub.
    """
    found = []
    for hub in range(len(group.solo)):
        if group.fixed.get(hub, 0) + 2 > closure_max:
            continue
        plan: dict[int, tuple[int, ...]] = {
            index: (hub,)
            for index in range(len(group.solo))
            if index not in group.fixed
            and index != hub
            and group.against.get((index, (hub,)), float("inf")) < group.solo[index]
        }
        found.append((_total(group, group.against, plan), hub, plan))
    found.sort(key=lambda star: star[:2])
    return [plan for *_, plan in found[:_HUBS_MAX]]


def _blend_costs(
    group: Group,
    find_blends: Callable[[int, Sequence[int]], Mapping[tuple[int, ...], float]],
) -> dict[tuple[int, tuple[int, ...]], float]:
    """What members cost predicted from several of their cheapest bases."""
    singles: dict[int, list[tuple[float, int]]] = {}
    for (member, bases), cost in group.against.items():
        if len(bases) == 1 and member not in group.fixed:
            singles.setdefault(member, []).append((cost, bases[0]))
    return {
        (member, bases): cost
        for member, found in singles.items()
        for bases, cost in find_blends(member, [base for _, base in sorted(found)]).items()
    }


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
