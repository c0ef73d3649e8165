"""Decompositions of the task vectors of a slot, shared by the points of a sweep and kept in the factor store.

Task vectors are measured from the slot's reference. Shape suffixes: M rows out, N columns in, R = min(M, N) the smaller
side, L or K kept directions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Iterator, Sequence

from mergeline.merging.algebra.decompositions import SMALL, above_noise, leading, projected, triplets
from mergeline.merging.algebra.device import on_cpu
from mergeline.merging.algebra.linear import gram, inner, rank_of
from mergeline.merging.algebra.slots import Slot
from mergeline.merging.algebra.sums import added
from mergeline.merging.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

_BATCH_BYTES = 1 << 31  # float64 task vectors that an accelerator decomposes at once


def task_vector(x: Slot, t: int) -> Tensor:
    """Expert t minus the reference: (M, N) float64, a new tensor."""
    return x.experts[t].to(torch.float64, copy=True).sub_(x.reference)


def directions(x: Slot, t: int, tau_MN: Tensor, rank: int | None) -> tuple[Tensor, Tensor]:
    """Squared singular values (L,) and singular vectors (R, L) of the smaller side of tau, task vector t.

    The `rank` leading ones or more (None: all), see `_count`. They are kept in the factor store, if there is one.
    """
    count = _count(x, rank)

    def make() -> dict[str, Tensor]:
        if on_cpu(tau_MN):
            energy_L, q_RL = leading(gram(tau_MN), count)
        else:
            energy_L, q_RL = _among_equals(x, t, count)
        return {"energy": energy_L, "vectors": q_RL}

    key = None if x.store is None else _dependencies(x, t)
    found = make() if key is None or x.store is None else x.store.recall({"directions": count, **key}, make)
    return found["energy"].to(tau_MN.device), found["vectors"].to(tau_MN.device)


def _among_equals(x: Slot, t: int, count: int) -> tuple[Tensor, Tensor]:
    """`directions` on an accelerator, which decomposes the task vectors of several experts, equal in shape, at once."""
    size = max(1, min(len(x.experts), _BATCH_BYTES // (8 * x.elements)))
    first = t // size * size
    energy_TL, q_TRL = x.once(_batch, first, size, count)
    return energy_TL[t - first], q_TRL[t - first]


def _batch(x: Slot, first: int, size: int, count: int) -> tuple[Tensor, Tensor]:
    batch = range(first, min(first + size, len(x.experts)))
    return leading(gram(torch.stack([task_vector(x, i) for i in batch])), count)


def factors(x: Slot, t: int, rank: int | None, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Squared singular values (L,), and factors (M, L) and (N, L) whose product is the task vector's leading part.

    The product of their first k columns is P_k of it. Points of a sweep share them.
    """
    return x.shared(_factors, t, _count(x, rank), dtype)


def _factors(x: Slot, t: int, count: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    tau_MN = task_vector(x, t)
    energy_L, q_RL = directions(x, t, tau_MN, count)
    left_ML, right_NL = projected(tau_MN, q_RL)
    return energy_L, left_ML.to(dtype), right_NL.to(dtype)


def leading_triplets(x: Slot, t: int, k: int, tau_MN: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """U (M, K), s (K,), V (N, K): the k leading singular triplets of task vector t, but for mere noise.

    tau_MN: the task vector, where it is known.
    """
    tau_MN = task_vector(x, t) if tau_MN is None else tau_MN
    energy_L, q_RL = directions(x, t, tau_MN, k)
    kept = min(k, int(above_noise(energy_L, energy_L.sum()).sum()))
    return triplets(tau_MN, q_RL[:, :kept])


def triplets_of_tasks(x: Slot, k: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """`leading_triplets` of every expert."""
    for t in range(len(x.experts)):
        yield leading_triplets(x, t, k)


def common_directions(x: Slot, right: bool = False) -> tuple[Tensor, Tensor]:
    """Squared singular values (K,), descending, and left singular vectors (M, K) of all task vectors side by side.

    Or the right ones (N, K) of all one below the other. Those that are more than noise. Kept in the factor store, if
    there is one; see `directions`.
    """

    def make() -> dict[str, Tensor]:
        taus = (task_vector(x, t) for t in range(len(x.experts)))
        sides = (tau_MN if right else tau_MN.T for tau_MN in taus)
        energy_M, q_MM = leading(added(map(inner, sides)), x.shape[1 if right else 0])
        kept_M = above_noise(energy_M, energy_M.sum())
        return {"energy": energy_M[kept_M], "vectors": q_MM[:, kept_M]}

    key = None if x.store is None else _dependencies(x, None)
    if key is None or x.store is None:
        found = make()
    else:
        found = x.store.recall({"common directions": ["right"] if right else [], **key}, make)
    device = x.reference.device
    return found["energy"].to(device), found["vectors"].to(device)


def rank_for_task(rank: float | str, shape: Sequence[int], experts: int) -> int:
    """`rank_of`, or for `1/T` an even share of the directions, which may be none: int(min(M, N) * (1 / T))."""
    return int(min(shape) * (1 / experts)) if isinstance(rank, str) else rank_of(rank, shape)


def _count(x: Slot, rank: int | None) -> int:
    """How many directions are computed for a rank: one of three shares of R, so that nearby ranks find the same."""
    side = min(x.shape)
    return next((side // n for n in (8, 4) if side >= SMALL and rank is not None and rank <= side // n), side)


def _dependencies(x: Slot, t: int | None) -> dict[str, Any] | None:
    """The shape, and the digests of everything that a task vector (None: all) depends on; None if unknown."""
    source, experts = x.view.source, x.view.experts
    if x.base_is is None or x.changes is None:
        return None
    reference: Any = x.reference_is
    if reference == "pretrained":
        reference = x.base_is
    elif reference != "mean" and x.base_is != "pretrained":
        reference = [reference, x.base_is]
    own: dict[str, Any] = {"shape": x.shape, "reference": reference}
    own |= {} if x.name == x.view.stored_name else {"matrix": x.name}
    own |= {} if t is None else {"expert": x.digest(experts[t])}
    if x.changes:  # they may be drawn
        own |= {
            "changes": x.changes,
            "seed": source.seed,
            "number": t,
            "tensor": x.name,
            "names": list(experts),
        }
    elif reference == "pretrained" and t is not None:
        return own | {"base": x.digest("base")}
    base = None
    if x.view.has_base and (x.changes or reference != "mean"):
        base = x.digest("base")
    return own | {"experts": [x.digest(expert) for expert in experts], "base": base}


def weighted_factors(x: Slot, weights: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Factors (M, K) and (K, N) of the weighted sum of what experts, all adapters, add; K the sum of their ranks."""
    pairs = [x.factors(t) for t in range(len(x.experts))]
    lefts = [weight * pair[0] for weight, pair in zip(weights, pairs) if pair is not None]
    rights = [pair[1] for pair in pairs if pair is not None]
    assert len(rights) == len(pairs), f"{x.name}: an expert is no adapter"
    return torch.cat(lefts, dim=1), torch.cat(rights)
