"""Fronts: points of which none is at least as good as another on all counts, and better on one; larger is better.

Shape suffixes: N points, T values of each, all of which count; D numbers of each, between 0 and 1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Callable

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.float64]
    Indexes = NDArray[np.int64]

_POPULATION, _GENERATIONS = 200, 60
_CROSSOVER = 0.9
_ETA = 20.0  # of both distributions: how near children are to their parents


def front(values_NT: Array) -> list[int]:
    """The indexes of the points that no other beats; of equal ones the first."""
    first = np.sort(np.unique(values_NT, axis=0, return_index=True)[1])
    return first[~_dominates(values_NT[first]).any(0)].tolist()


def evolved(values: Callable[[Array], Array], start_ND: Array, seed: int) -> Array:
    """Points of the unit cube on the front of a function, by NSGA-II (Deb et al. 2002) from some points: (K, D).

    values: of points (N, D), their values (N, T). start_ND: the best of them are among the first generation.
    """
    rng = np.random.default_rng(seed)
    numbers = start_ND.shape[1]
    points_ND = np.vstack([start_ND, rng.random((_POPULATION, numbers))])
    values_NT = values(points_ND)
    for _ in range(_GENERATIONS):
        kept, order_N = _survivors(values_NT)
        points_ND, values_NT = points_ND[kept], values_NT[kept]
        children_ND = _children(points_ND, order_N[kept], rng)
        points_ND = np.vstack([points_ND, children_ND])
        values_NT = np.vstack([values_NT, values(children_ND)])
    return points_ND[front(values_NT)]


def spread(values_KT: Array, first: int) -> list[int]:
    """The indexes of points in an order in which each is the one that is farthest from all before it.

    Values of a kind are counted in shares of their range. first: where it begins.
    """
    range_T = np.ptp(values_KT, axis=0)
    places_KT = values_KT / np.where(range_T > 0, range_T, 1)
    order = [first]
    distance_K = np.linalg.norm(places_KT - places_KT[first], axis=1)
    while len(order) < len(values_KT):
        distance_K[order[-1]] = -1
        order.append(int(np.argmax(distance_K)))
        distance_K = np.minimum(distance_K, np.linalg.norm(places_KT - places_KT[order[-1]], axis=1))
    return order


def scattered(count: int, numbers: int, seed: int) -> Array:
    """Points of the unit cube, of each number one in each of `count` equal parts (McKay et al. 1979): (N, D)."""
    rng = np.random.default_rng(seed)
    parts_ND = rng.permuted(np.tile(np.arange(count)[:, None], numbers), axis=0)
    return (parts_ND + rng.random((count, numbers))) / count


def _dominates(values_NT: Array) -> NDArray[np.bool_]:
    """Whether the first of two points beats the second: (N, N)."""
    no_worse_NN = np.ones((len(values_NT),) * 2, bool)
    better_NN = np.zeros_like(no_worse_NN)
    for value_N in values_NT.T:
        no_worse_NN &= value_N[:, None] >= value_N
        better_NN |= value_N[:, None] > value_N
    return no_worse_NN & better_NN


def _survivors(values_NT: Array) -> tuple[Indexes, Array]:
    """The indexes of the points that are kept: by fronts, those of the last one by the room around them; and how early
    each of all points comes, the first of all with the largest number.
    """
    beaten_by_NN = _dominates(values_NT)
    left_N, rank_N, room_N = (
        beaten_by_NN.sum(0),
        np.full(len(values_NT), np.inf),
        np.zeros(len(values_NT)),
    )
    rank, placed = 0, 0
    while placed < _POPULATION:
        now = np.flatnonzero((left_N == 0) & np.isinf(rank_N))
        rank_N[now] = rank
        room_N[now] = _room(values_NT[now])
        left_N = left_N - beaten_by_NN[now].sum(0)
        rank, placed = rank + 1, placed + len(now)
    order = np.lexsort((-room_N, rank_N))
    early_N = np.empty(len(order))
    early_N[order] = -np.arange(len(order))
    return order[:_POPULATION], early_N


def _room(values_KT: Array) -> Array:
    """The crowding distance of points of one front (K): infinite at its ends."""
    room_K = np.zeros(len(values_KT))
    for value_K in values_KT.T:
        order = np.argsort(value_K, kind="stable")
        extent = value_K[order[-1]] - value_K[order[0]]
        room_K[order[[0, -1]]] = np.inf
        if extent > 0:
            room_K[order[1:-1]] += (value_K[order[2:]] - value_K[order[:-2]]) / extent
    return room_K


def _children(points_ND: Array, early_N: Array, rng: np.random.Generator) -> Array:
    """As many children, of parents that each won against another: simulated binary crossover, polynomial mutation."""
    count, numbers = points_ND.shape
    rivals_2N = rng.integers(count, size=(2, 2 * count))
    winners = np.where(early_N[rivals_2N[0]] >= early_N[rivals_2N[1]], *rivals_2N)
    a_ND, b_ND = points_ND[winners[:count]], points_ND[winners[count:]]
    u_ND = rng.random((count, numbers))
    beta_ND = np.where(u_ND <= 0.5, 2 * u_ND, 1 / (2 * (1 - u_ND))) ** (1 / (_ETA + 1))
    side_ND = np.where(rng.random((count, numbers)) < 0.5, 1, -1)
    crossed = (rng.random((count, numbers)) < 0.5) & (rng.random((count, 1)) < _CROSSOVER)
    child_ND = np.where(crossed, ((a_ND + b_ND) + side_ND * beta_ND * (a_ND - b_ND)) / 2, a_ND)
    u_ND = rng.random((count, numbers))
    moved_ND = np.where(
        u_ND < 0.5, (2 * u_ND) ** (1 / (_ETA + 1)) - 1, 1 - (2 * (1 - u_ND)) ** (1 / (_ETA + 1))
    )
    mutated = rng.random((count, numbers)) < 1 / numbers
    return np.clip(child_ND + np.where(mutated, moved_ND, 0), 0, 1)
