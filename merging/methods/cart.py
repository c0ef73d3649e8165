"""CART: centred task vectors, cut to low rank."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, Mapping

from annotated_types import Gt, Le

from merging import operators as ops
from merging import spectral
from merging.keys import Keys, is_matrix
from merging.lazy import torch
from merging.methods import method
from merging.methods.task_arithmetic import task_arithmetic
from merging.methods.tsv_merge import tsv_merge
from merging.slots import Slot

if TYPE_CHECKING:
    from torch import Tensor

Share = Annotated[float, Gt(0), Le(1)]
Basis = Literal["svd", "dct"]


def _two_experts(experts: int, params: Mapping[str, Any]) -> str | None:
    if experts == 2 and params["origin"] == "mean" and params["reduce"] == "sum":
        return (
            "cart with two experts equals their average: the centred task vectors cancel; give three or more"
        )
    return None


def _wrong(params: Mapping[str, Any], experts: int) -> str | None:
    if params["basis"] == "dct" and params["reduce"] == "tsv":
        return "reduce: tsv orthogonalises singular vectors; set basis to svd"
    return None


@method(
    family="spectral",
    paper="2412.12153",
    code="JH-GEECS/CART@964cfd78",
    reference="mean",
    unit="matrix",
    check=_wrong,
    warn=_two_experts,
    base_if=lambda params: params["origin"] in ("task_arithmetic", "tsv_merge"),
    spectral=True,
)
def cart(
    x: Slot,
    *,
    rank: Share = 0.12,
    rank_rounding: Literal["floor", "ceil"] = "floor",
    scale: float = 1.0,
    rank_rule: Literal["fraction", "energy"] = "fraction",
    energy: Share = 0.8,
    keys: Keys = "block_linear",
    origin: Literal["mean", "task_arithmetic", "tsv_merge", "cart"] = "mean",
    origin_scale: float = 0.3,
    origin_rank: Share = 0.12,
    reduce: Literal["sum", "tsv"] = "sum",
    basis: Basis = "svd",
) -> Tensor:
    """origin + scale * sum of the rank-k parts of (expert - origin); the origin is the mean of the experts.

    k = max(1, int(rank * min(M, N))), or rounded up, or the smallest that holds `energy` of the squared singular
    values. Tensors that are no block matrices add their (expert - origin) whole, which is nothing around the mean.
    `origin` may be another merge: task_arithmetic with origin_scale, cart with origin_scale and origin_rank, or
    tsv_merge with scale 1; `reduce: tsv` orthogonalises the factors before summing. `basis: dct` is cheaper and not
    optimal: instead of the rank-k part, the k columns of the rows' cosine transforms with the largest norms.

    Formula:
        θₒ + scale · Σₜ P_k(θₜ − θₒ), θₒ = θ̄ or another merge;  k = max(1, int(rank · min(M, N)))
    Parameters:
        rank_rule: whether `rank` or `energy` says how much is kept
        energy: share of the squared singular values that is kept, with `rank_rule: energy`
        origin: what task vectors are measured from: the mean of the experts, or another merge of them
        origin_scale: the scale of that other merge
        origin_rank: its rank, if it is cart
        reduce: whether low-rank parts are summed as they are, or with singular vectors made orthogonal (tsv)
        basis: singular vectors, or columns of cosine transforms, which are cheaper and not optimal
    Needs:
        three experts or more, to differ from their mean
    Spectral work:
        an eigendecomposition of the smaller Gram matrix, of every matrix and expert; `--factors` keeps it
    Trap:
        With two experts it is their mean: the centred task vectors cancel. Around the mean, tensors that are
        no block matrices end at the mean. A packed QKV matrix is one matrix, not three. Official settings
        truncate less than the paper's 8 %.
    """
    reference = "mean" if origin == "mean" else [origin, origin_scale, origin_rank, keys]
    start = x.share(("origin", str(reference)), lambda: _origin(x, origin, origin_scale, origin_rank, keys))
    if not is_matrix(x.name, x.shape, keys):
        if origin == "mean":
            return start
        return start + scale * (ops.weighted_sum(x.experts) - len(x.experts) * start)

    k = None if rank_rule == "energy" else spectral.rank_of(rank, x.shape, rank_rounding)

    def update() -> Tensor:
        return low_rank_sum(x, start, reference, k, energy, reduce, basis)

    setting = ("cart", str(reference), k or energy, reduce, basis)
    return torch.add(start, x.share(setting, update), alpha=scale)


def low_rank_sum(
    x: Slot,
    start: Tensor,
    reference: Any,
    k: int | None,
    energy: float = 1.0,
    reduce: str = "sum",
    basis: str = "svd",
) -> Tensor:
    """Sum over experts of the rank-k part of (expert - start), or, if k is None, of what holds `energy`: (M, N)."""
    if basis == "dct":
        return _cosine_sum(x, start, k, energy)
    total_MN = torch.zeros_like(start, dtype=x.dtype)
    triplets = []
    for t in range(len(x.experts)):
        if reduce == "tsv":
            tau_MN = spectral.task_vector(x, t, start)
            energy_L, q_RL = spectral.directions(x, t, start, tau_MN, reference, k)
            triplets.append(
                spectral.triplets(tau_MN, q_RL[:, : k or spectral.rank_for_energy(energy_L, energy)])
            )
        else:
            energy_L, left_ML, right_NL = spectral.factors(x, t, start, reference, k, x.dtype)
            kept = k or spectral.rank_for_energy(energy_L, energy)
            total_MN.addmm_(left_ML[:, :kept], right_NL[:, :kept].T)
    return spectral.orthogonal_sum(triplets) if reduce == "tsv" else total_MN


def _cosine_sum(x: Slot, start: Tensor, k: int | None, energy: float) -> Tensor:
    """The same with columns of the cosine transform in place of singular vectors (2505.17967): (M, N)."""
    sum_MN = torch.zeros_like(start, dtype=torch.float64)
    for t in range(len(x.experts)):
        cosine_MN = spectral.dct(spectral.task_vector(x, t, start))
        energy_N, order_N = cosine_MN.square().sum(0).sort(descending=True, stable=True)
        kept = order_N[: k or spectral.rank_for_energy(energy_N, energy)]
        sum_MN[:, kept] += cosine_MN[:, kept]
    return spectral.dct(sum_MN, inverse=True)


def _origin(x: Slot, origin: str, scale: float, rank: float, keys: Keys) -> Tensor:
    if origin == "task_arithmetic":
        return task_arithmetic(x, scale=scale)
    if origin == "tsv_merge":
        return tsv_merge(x, keys=keys).double()
    if origin == "cart":
        return cart(x, rank=rank, scale=scale, keys=keys)
    return ops.mean(x.experts)
