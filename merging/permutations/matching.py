"""Units of one model matched to another's by their weights, and of many models to one another.

Git Re-Basin (Ainsworth et al. 2022, arXiv 2209.04836; samuela/git-re-basin): weight matching is coordinate descent,
each group of units by a linear assignment, with all others as they stand; MergeMany matches each model to the mean of
the others in turn.

Shape suffixes: U units of a group, R parts of each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Callable, Mapping, Sequence

from mergeline.merging.lazy import torch
from mergeline.merging.permutations.groups import Group, Order, Orders, kept_order, reordered

if TYPE_CHECKING:
    from torch import Tensor

State = Mapping[str, "Tensor"]
Told = Callable[[int], None]

SWEEPS = 100  # of all groups at most, as the official code has it
_GAIN = 1e-7  # of the size of the sum: less is rounding of float32


@dataclass(frozen=True)
class Match:
    """What was found. similarity: the sum of the products of all weights that are put beside one another.

    sweeps: over all groups, until none gained.
    """

    orders: Orders
    similarity: float
    sweeps: int


@dataclass(frozen=True)
class Alike:
    """How alike the units of two models are, (U, U), and their parts, (U * R, U * R) for each split: float64."""

    units: Tensor
    parts: tuple[Tensor, ...] = ()


def match_weights(
    reference: State, other: State, groups: Sequence[Group], *, seed: int = 0, restarts: int = 1, sweeps: int = SWEEPS,
    told: Told | None = None,
) -> Match:  # fmt: skip
    """The orders that put the units of `other` beside those of `reference` whose weights are most alike.

    Groups are visited in orders drawn from the seed; the best of `restarts` descents counts, by the similarity. told:
    hears of each sweep. No descent is sure to find the best orders: the problem is NP-hard.
    """
    generator = torch.Generator().manual_seed(seed)
    found = [
        _descent(reference, other, groups, generator, sweeps, told or (lambda _: None))
        for _ in range(restarts)
    ]
    return max(found, key=lambda match: match.similarity)


def _descent(
    reference: State, other: State, groups: Sequence[Group], generator: Any, sweeps: int, told: Told
) -> Match:
    names = {name for group in groups for name in group.tensors}
    current = {name: other[name] for name in names}
    orders = {group.name: kept_order(group) for group in groups}
    sweep = 0
    while sweep < sweeps:
        gained = False
        for i in torch.randperm(len(groups), generator=generator).tolist():
            group = groups[i]
            alike = weights_alike(reference, current, group)
            step = assigned(group, alike)
            before, after = similarity(alike, kept_order(group)), similarity(alike, step)
            if after - before > _GAIN * max(abs(before), abs(after)):
                gained = True
                orders[group.name] = orders[group.name].then(step)
                current |= reordered({n: current[n] for n in group.tensors}, [group], {group.name: step})
        sweep += 1
        told(sweep)
        if not gained:
            break
    total = sum(float((reference[n].double() * current[n].double()).sum()) for n in sorted(_weighing(groups)))
    return Match(orders, total, sweep)


def _weighing(groups: Sequence[Group]) -> set[str]:
    return {place.name for group in groups for place, _, _ in group.counted if place.weighs}


def match_many(
    states: Sequence[State], groups: Sequence[Group], *, seed: int = 0, restarts: int = 1, rounds: int = SWEEPS,
    told: Told | None = None,
) -> list[Match]:  # fmt: skip
    """MergeMany: the orders of all models, each matched to the mean of the others until none moves.

    The first keeps its order: the others' are told in its own. restarts: of each matching.
    """
    generator = torch.Generator().manual_seed(seed)
    names = sorted({name for group in groups for name in group.tensors})
    current = [{name: state[name].float() for name in names} for state in states]
    orders = [{group.name: kept_order(group) for group in groups} for _ in states]
    last = [Match(o, 0.0, 0) for o in orders]
    for number in range(1, rounds + 1):
        moved = False
        for i in torch.randperm(len(states), generator=generator).tolist():
            others = [state for j, state in enumerate(current) if j != i]
            mean = {name: sum(state[name] for state in others) / len(others) for name in names}
            last[i] = match_weights(mean, current[i], groups, seed=seed, restarts=restarts)  # type: ignore[arg-type]
            if any(order.moved for order in last[i].orders.values()):
                moved = True
                current[i] = reordered(current[i], groups, last[i].orders)
                orders[i] = {name: order.then(last[i].orders[name]) for name, order in orders[i].items()}
        if told:
            told(number)
        if not moved:
            break
    back = {name: order.undone() for name, order in orders[0].items()}
    settled = [{name: order.then(back[name]) for name, order in own.items()} for own in orders]
    return [Match(o, found.similarity, number) for o, found in zip(settled, last)]


def weights_alike(reference: State, other: State, group: Group) -> Alike:
    """The sums of products of the weights of any two units of a group."""
    sums = [torch.zeros(n, n, dtype=torch.float64) for n in group.counts]
    for place, count, which in group.counted:
        if place.weighs:
            a, b = (place.rows(state[place.name].float(), count) for state in (reference, other))
            sums[which] += (a @ b.T).double().cpu()
    return Alike(sums[0], tuple(sums[1:]))


def assigned(group: Group, alike: Alike) -> Order:
    """The order of a group's units, and of their parts, of which the sum of `alike` is largest."""
    values_UU, chosen = alike.units.clone(), []
    for split, alike_LL in zip(group.splits, alike.parts):
        pairs_UURR = alike_LL.reshape(group.units, split.size, group.units, split.size).transpose(1, 2)
        best_UUR = torch.stack([torch.stack([_assignment(pair_RR) for pair_RR in row]) for row in pairs_UURR])
        values_UU += pairs_UURR.gather(3, best_UUR[..., None]).sum((2, 3))
        chosen.append(best_UUR)
    units_U = _assignment(values_UU)
    at_U = torch.arange(group.units)
    parts = tuple(
        (units_U[:, None] * split.size + best_UUR[at_U, units_U]).reshape(-1)
        for split, best_UUR in zip(group.splits, chosen)
    )
    return Order(units_U, parts)


def _assignment(values_NN: Tensor) -> Tensor:
    """Of each row the column, so that the sum is largest, (N)."""
    from scipy.optimize import linear_sum_assignment

    return torch.from_numpy(linear_sum_assignment(values_NN.numpy(), maximize=True)[1])


def similarity(alike: Alike, order: Order) -> float:
    """The sum over things that an order puts beside one another."""
    tensors = (alike.units, *alike.parts)
    return sum(float(t[torch.arange(len(o)), o].sum()) for t, o in zip(tensors, order.all))


def distance(a: State, b: State) -> float:
    """The L2 distance of the floating-point tensors of two models."""
    squares = (
        float((tensor.double() - b[name].double()).square().sum())
        for name, tensor in sorted(a.items())
        if tensor.is_floating_point()
    )
    return float(sum(squares)) ** 0.5
