"""CART: centred task vectors, cut to low rank."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Iterator, Literal, Mapping, Sequence

from mergeline.merging.algebra import decompositions, directions, linear
from mergeline.merging.algebra.slots import Slot
from mergeline.merging.lazy import torch
from mergeline.merging.methods.contract import Note, Origin, Reference, method
from mergeline.merging.methods.parameters import Share

if TYPE_CHECKING:
    from torch import Tensor


Basis = Literal["svd", "dct", "dct_l1"]


def _wrong(params: Mapping[str, Any], experts: int) -> Iterator[str]:
    if params["basis"] != "svd" and params["reduce"] == "tsv":
        yield "reduce: tsv orthogonalises singular vectors; set basis to svd"
    if experts == 2 and params["origin"] == "mean" and params["reduce"] == "sum":
        yield Note(
            "cart with two experts equals their average: the centred task vectors cancel; give three or more"
        )


def _origin(params: Mapping[str, Any]) -> Reference:
    scale, matrices = params["origin_scale"], {name: params[name] for name in ("keys", "convolutions")}
    match params["origin"]:
        case "task_arithmetic":
            return Origin("task_arithmetic", {"scale": scale})
        case "tsv_merge":
            return Origin("tsv_merge", matrices)
        case "cart":
            return Origin("cart", {"scale": scale, "rank": params["origin_rank"], **matrices})
    return "mean"


def _needs(params: Mapping[str, Any]) -> Sequence[str]:
    return ("base",) if params["origin"] in ("task_arithmetic", "tsv_merge") else ()


@method(
    paper="2412.12153",
    code="JH-GEECS/CART@964cfd78",
    reference=_origin,
    scale=1.0,
    keys="block_linear",
    other="sum",
    needs=_needs,
    check=_wrong,
    spectral=True,
)
def cart(
    x: Slot,
    *,
    rank: Share = 0.12,
    rank_rounding: Literal["floor", "ceil"] = "floor",
    rank_rule: Literal["fraction", "energy"] = "fraction",
    energy: Share = 0.8,
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
    optimal: instead of the rank-k part, the k columns of the rows' cosine transforms with the largest norms, which
    hold most energy; `dct_l1` takes those of the largest sums of magnitudes, as the official code of 2505.17967 does.

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
    k = None if rank_rule == "energy" else linear.rank_of(rank, x.shape, rank_rounding)
    return low_rank_sum(x, k, energy, reduce, basis)


def low_rank_sum(
    x: Slot, k: int | None, energy: float = 1.0, reduce: str = "sum", basis: str = "svd"
) -> Tensor:
    """Sum over experts of the rank-k part of the task vector, or, if k is None, of what holds `energy`: (M, N)."""
    if basis != "svd":
        return _cosine_sum(x, k, energy, 1 if basis == "dct_l1" else 2)
    total_MN = torch.zeros(x.shape, dtype=x.dtype, device=x.reference.device)
    triplets = []
    for t in range(len(x.experts)):
        if reduce == "tsv":
            tau_MN = directions.task_vector(x, t)
            energy_L, q_RL = directions.directions(x, t, tau_MN, k)
            kept = linear.rank_for_energy(energy_L, energy) if k is None else k
            triplets.append(decompositions.triplets(tau_MN, q_RL[:, :kept]))
        else:
            energy_L, left_ML, right_NL = directions.factors(x, t, k, x.dtype)
            kept = linear.rank_for_energy(energy_L, energy) if k is None else k
            total_MN.addmm_(left_ML[:, :kept], right_NL[:, :kept].T)
    return decompositions.orthogonal_sum(triplets) if reduce == "tsv" else total_MN


def _cosine_sum(x: Slot, k: int | None, energy: float, norm: int) -> Tensor:
    """The same with columns of the cosine transform in place of singular vectors (2505.17967): (M, N).

    norm: 1 or 2, of the columns, of which the largest are kept.
    """
    sum_MN = torch.zeros_like(x.reference, dtype=torch.float64)
    for t in range(len(x.experts)):
        cosine_MN = linear.dct(directions.task_vector(x, t))
        order_N = cosine_MN.norm(norm, dim=0).sort(descending=True, stable=True).indices
        energy_N = cosine_MN.square().sum(0)[order_N]
        kept = order_N[: linear.rank_for_energy(energy_N, energy) if k is None else k]
        sum_MN[:, kept] += cosine_MN[:, kept]
    return linear.dct(sum_MN, inverse=True)
