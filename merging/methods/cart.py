"""CART: centred task vectors, cut to low rank."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Any, Literal, Mapping

from annotated_types import Gt, Le

from merging import operators as ops
from merging.methods import Slot, method
from merging.methods.task_arithmetic import task_arithmetic

if TYPE_CHECKING:
    from torch import Tensor

Share = Annotated[float, Gt(0), Le(1)]

_BLOCK = re.compile(r"(^|\.)\d+\.")
_NOT_LINEAR = re.compile(r"(^|[._])(ln|norm|layernorm|bias|embed\w*)([._\d]|$)", re.IGNORECASE)


def is_matrix(name: str, ndim: int, keys: str) -> bool:
    """Whether a tensor gets the matrix treatment.

    `matrices`: every 2-D tensor. `block_linear`: the 2-D weights of linear layers inside numbered blocks, no norms,
    biases or embeddings; on open_clip names the same set as the official substring rule.
    """
    if ndim != 2 or keys == "matrices":
        return ndim == 2
    return bool(_BLOCK.search(name)) and not _NOT_LINEAR.search(name)


def _two_experts(experts: int, params: Mapping[str, Any]) -> str | None:
    if experts == 2 and params["origin"] == "mean" and params["reduce"] == "sum":
        return (
            "cart with two experts equals their average: the centred task vectors cancel; give three or more"
        )
    return None


@method(
    paper="2412.12153",
    code="JH-GEECS/CART@964cfd78",
    reference="mean",
    warn=_two_experts,
    base_if=lambda params: params["origin"] == "task_arithmetic",
    spectral=True,
)
def cart(
    x: Slot,
    *,
    rank: Share = 0.12,
    scale: float = 1.0,
    rank_rule: Literal["fraction", "energy"] = "fraction",
    energy: Share = 0.8,
    keys: Literal["block_linear", "matrices"] = "block_linear",
    origin: Literal["mean", "task_arithmetic", "cart"] = "mean",
    origin_scale: float = 0.3,
    origin_rank: Share = 0.12,
    reduce: Literal["sum", "tsv"] = "sum",
) -> Tensor:
    """origin + scale * sum of the rank-k parts of (expert - origin); the origin is the mean of the experts.

    k = max(1, int(rank * min(M, N))), or the smallest that holds `energy` of the squared singular values. Tensors
    that are no block matrices add their (expert - origin) whole, which is nothing around the mean. `origin` may be
    another merge with its own scale and rank; `reduce: tsv` orthogonalises the factors before summing.
    """
    start = _origin(x, origin, origin_scale, origin_rank, keys)
    if not is_matrix(x.name, x.experts.ndim - 1, keys):
        if origin == "mean":
            return start
        return start + scale * (ops.weighted_sum(x.experts, None) - len(x.experts) * start)
    parts = []
    for t, expert in enumerate(x.experts):
        tau_MN = expert.double() - start
        stored = x.factors[t] if x.factors and origin == "mean" else None
        energy_R, q_RR = stored or ops.spectrum(tau_MN)
        k = (
            ops.rank_of(rank, tau_MN.shape)
            if rank_rule == "fraction"
            else ops.rank_for_energy(energy_R, energy)
        )
        if k > q_RR.shape[1]:  # more than was stored
            q_RR = ops.spectrum(tau_MN)[1]
        q_RK = q_RR[:, :k].to(tau_MN)
        parts.append(ops.project(tau_MN, q_RK) if reduce == "sum" else ops.leading_triplets(tau_MN, q_RK))
    return start + scale * (sum(parts) if reduce == "sum" else ops.orthogonal_sum(parts))


def _origin(x: Slot, origin: str, scale: float, rank: float, keys: Any) -> Tensor:
    if origin == "task_arithmetic":
        return task_arithmetic(x, scale=scale)
    if origin == "cart":
        return cart(x, rank=rank, scale=scale, keys=keys)
    return ops.mean(x.experts)
