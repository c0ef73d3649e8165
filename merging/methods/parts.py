"""What linear merges are sums of: W = origin + sum over directions of coefficient * direction, tensor by tensor.

The engine's `weighted` and fitting by gradients read the same directions here, and multiply them in the same ways, so
that what was fitted is what is merged.

Shape suffixes: X a block of a tensor, M rows out, N columns in, D directions, K numbers for each of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Iterable, Iterator, Literal, Mapping, NamedTuple

from mergeline.merging.algebra import combine, decompositions, directions, draws, linear, sparsify
from mergeline.merging.algebra.slots import Slot
from mergeline.merging.lazy import torch
from mergeline.merging.methods.optimised.cart_wudi import flattened

if TYPE_CHECKING:
    from torch import Tensor

# task_vectors: of the base. ties: their large entries that agree in sign. cart: the rank-k parts of (expert - mean).
# cart_wudi: those, and as one more what cart_wudi calls F. tsv: the parts that tsv_merge makes orthogonal and adds.
Kind = Literal["task_vectors", "ties", "cart", "cart_wudi", "tsv"]
AROUND_MEAN = ("cart", "cart_wudi")
# What one number multiplies: a direction of a tensor; one of K stretches of it, or of K random parts; one singular
# triplet of it.
Over = Literal["whole", "chunks", "partition", "singular"]


class Part(NamedTuple):
    """A direction of one tensor: (X), or the singular triplets (M, L), (L,), (N, L) whose sum it is."""

    whole: Tensor | None = None
    triplets: tuple[Tensor, Tensor, Tensor] | None = None

    @property
    def values(self) -> int:
        """How many triplets it has; 1 if it is whole."""
        return 1 if self.triplets is None else len(self.triplets[1])

    def to(self, dtype: torch.dtype) -> Part:
        if self.triplets is None:
            return Part(self.full().to(dtype))
        u, s, v = self.triplets
        return Part(None, (u.to(dtype), s.to(dtype), v.to(dtype)))

    def full(self) -> Tensor:
        """The direction: (X)."""
        if self.triplets is None:
            assert self.whole is not None
            return self.whole
        u_ML, s_L, v_NL = self.triplets
        return (u_ML * s_L) @ v_NL.T

    def times(self, factor_L: Tensor) -> Tensor:
        """The direction with each triplet multiplied: (M, N)."""
        if self.triplets is None:
            return self.full() * factor_L[0]
        u_ML, s_L, v_NL = self.triplets
        return (u_ML * (s_L * factor_L[: len(s_L)])) @ v_NL.T

    def along(self, gradient_X: Tensor) -> Tensor:
        """The inner product of a gradient with each triplet: (L,); with the direction itself: (1,)."""
        if self.triplets is None:
            return (self.full() * gradient_X).sum().reshape(1)
        u_ML, s_L, v_NL = self.triplets
        return ((u_ML.T @ gradient_X) * v_NL.T).sum(1) * s_L


def parts_of(
    x: Slot, kind: Kind, *, matrix: bool, found: Any = None, rank: float = 1.0, singular: bool = False,
    damping: float = 0.1, power: float = 0.55,
) -> Iterator[Part]:  # fmt: skip
    """The directions of a tensor, in float64: one an expert, in their order, and what `kind` adds to them.

    x: measured from the mean of the experts where `kind` is in AROUND_MEAN, else from the base. matrix: whether it is
    a matrix to the method; other tensors have the task vectors themselves. found: of `ties`, what its look finds.
    singular: as triplets, where it is a matrix.
    """
    if kind == "ties":
        taus = _agreeing(x, found)
    else:
        taus = (directions.task_vector(x, t) for t in range(len(x.experts)))
    if not matrix or (kind in ("task_vectors", "ties") and not singular):
        yield from map(Part, taus)
        return
    if kind in ("task_vectors", "ties"):
        yield from (Part(None, decompositions.singular_triplets(tau_MN)) for tau_MN in taus)
        return
    if kind == "tsv":
        yield from _orthogonal(x, directions.rank_for_task("1/T", x.shape, len(x.experts)))
        return
    k = linear.rank_of(rank, x.shape)
    for t in range(len(x.experts)):
        yield Part(None, directions.leading_triplets(x, t, k))
    if kind == "cart_wudi":
        update_MN = x.shared(flattened, damping, power)
        yield Part(None, decompositions.singular_triplets(update_MN)) if singular else Part(update_MN)


def _agreeing(x: Slot, found: Mapping[str, Any]) -> Iterator[Tensor]:
    """TIES' trimmed task vectors, of each the entries that have the elected sign, not summed."""
    tau_TX = sparsify.trimmed(x, found["thresholds"])
    sign_X = combine.elect_signs(tau_TX, None, found["majority"] or -1.0)
    for tau_X in tau_TX:
        yield torch.where(tau_X * sign_X > 0, tau_X, 0.0).double()


def _orthogonal(x: Slot, k: int) -> Iterator[Part]:
    """TSV-M's factors, made orthogonal together, apart by task; nothing where there are more tasks than directions."""
    if not k:
        yield from (Part(torch.zeros(x.shape, dtype=torch.float64)) for _ in x.experts)
        return
    found = list(directions.triplets_of_tasks(x, k))
    sizes = [len(s_K) for _, s_K, _ in found]
    u_MR, v_NR = (decompositions.polar(torch.cat([part[i] for part in found], dim=1)) for i in (0, 2))
    for u_MK, (_, s_K, _), v_NK in zip(u_MR.split(sizes, 1), found, v_NR.split(sizes, 1)):
        yield Part(None, (u_MK, s_K, v_NK))


def owners(over: Over, count: int, size: int, start: int, elements: int, seed: int, name: str) -> Tensor:
    """Which of `count` numbers multiplies each element [start, start + size) of a flattened tensor: (size,) int64.

    chunks: stretches of ceil(elements / count), as torch.chunk cuts: there may be fewer than `count`. partition: drawn
    by seed, tensor and element alone.
    """
    if over == "chunks":
        return torch.arange(start, start + size) // -(-elements // count)
    return (draws.uniform(seed, "partition", name, start, size) * count).long().clamp_(max=count - 1)


def summed(parts: Iterable[Part], c_DK: Tensor, over: Over, owner_X: Tensor | None = None) -> Tensor | None:
    """The sum of the directions, each multiplied by its numbers: (X); None if there are no directions.

    c_DK: K is 1 for `whole`, the most triplets of a direction for `singular`. owner_X: see `owners`.
    """
    total = None
    for part, c_K in zip(parts, c_DK, strict=True):
        if over == "singular":
            term = part.times(c_K)
        elif owner_X is None:
            term = part.full() * c_K[0]
        else:
            whole_X = part.full()
            term = whole_X * c_K[owner_X].reshape(whole_X.shape)
        total = term if total is None else total.add_(term)
    return total


def slopes(
    parts: Iterable[Part], gradient_X: Tensor, over: Over, count: int, owner_X: Tensor | None = None
) -> Tensor:
    """The derivative of a loss by each number of `summed`, from its gradient by the weights: (D, K)."""
    rows = []
    for part in parts:
        row_K = gradient_X.new_zeros(count)
        if over == "singular":
            found_L = part.along(gradient_X)
            row_K[: len(found_L)] = found_L
        elif owner_X is None:
            row_K[0] = (part.full() * gradient_X).sum()
        else:
            row_K += torch.bincount(owner_X, (part.full() * gradient_X).reshape(-1), count)
        rows.append(row_K)
    return torch.stack(rows)
