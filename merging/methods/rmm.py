"""RMM: one expert given back from a basis of low-rank factors that all experts share, position by position."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Iterator, Sequence

from annotated_types import Ge, Gt, Le

from merging import spectral
from merging.keys import Keys, is_matrix
from merging.lazy import torch
from merging.methods import Encoded, Part, Parts, Store, Stored, method, stored_dtype
from merging.slots import Slot

if TYPE_CHECKING:
    from torch import Tensor

Rank = Annotated[int, Ge(1)] | Annotated[float, Gt(0), Le(1)]
Components = Annotated[int, Ge(0)]


def _sizes(shape: Sequence[int], experts: int, rank: Rank, components: Components | None) -> tuple[int, int]:
    """Of the factors of a matrix: columns, and principal directions, of which there are no more than either allows."""
    k = min(rank, *shape) if isinstance(rank, int) else spectral.rank_of(rank, shape)
    most = min(experts - 1, k)
    return k, most if components is None else min(components, most)


def _parts(
    name: str, shape: Sequence[int], experts: int, *, rank: Rank, components: Components | None, keys: Keys, **_: Any
) -> Parts:
    if not is_matrix(name, shape, keys):
        return {}, {"whole": Part("exact", tuple(shape))}
    positions, (k, p) = sum(shape), _sizes(shape, experts, rank, components)
    once = {"mean": Part("number", (positions, k)), "basis": Part("number", (positions, p, k))}
    return once, {"coordinates": Part("number", (positions, p))}


def _encode(
    x: Slot,
    tasks: Sequence[int],
    *,
    rank: Rank,
    components: Components | None,
    keys: Keys,
    stored: Stored | None,
    **_: Any,
) -> Encoded:
    if not is_matrix(x.name, x.shape, keys):
        return {}, ({"whole": x.experts[t]} for t in tasks)
    k, p = _sizes(x.shape, len(x.experts), rank, components)
    z_TPK, dtype = _aligned(list(_balanced(x, k))), stored_dtype(x, stored)
    mean_PK = z_TPK.mean(dim=0)
    apart_PTK = (z_TPK - mean_PK).transpose(0, 1)
    _, w_PTT = torch.linalg.eigh(apart_PTK @ apart_PTK.mT)  # of which the last p are the principal ones
    w_PTC = w_PTT[..., len(x.experts) - p :]
    once = {"mean": mean_PK.to(dtype), "basis": (w_PTC.mT @ apart_PTK).to(dtype)}
    return once, ({"coordinates": w_PTC[:, t].to(dtype).contiguous()} for t in tasks)


def _balanced(x: Slot, k: int) -> Iterator[Tensor]:
    """Of each task vector, U S^1/2 above V S^1/2 of its k leading singular triplets: (M + N, K)."""
    base_MN = x.base.double()
    for t in range(len(x.experts)):
        tau_MN = spectral.task_vector(x, t, base_MN)
        u, s, v = spectral.leading_triplets(x, t, base_MN, tau_MN, "pretrained", k)
        z_PR = torch.cat([u, v]) * s.sqrt()
        yield torch.nn.functional.pad(z_PR, (0, k - z_PR.shape[1]))


def _aligned(z_TPK: list[Tensor]) -> Tensor:
    """The factors, each turned by the orthogonal matrix that brings it nearest to the largest ones: (T, P, K).

    The product of two factors leaves such a turn open, and without one a mean of factors says nothing.
    """
    to_PK = max(z_TPK, key=lambda z_PK: float(z_PK.norm()))
    return torch.stack([z_PK @ _turn(z_PK.T @ to_PK) for z_PK in z_TPK])


def _turn(between_KK: Tensor) -> Tensor:
    """The orthogonal polar factor: Procrustes' rotation (Schoenemann 1966)."""
    u, _, vt = torch.linalg.svd(between_KK)
    return u @ vt


def _decode(base_X: Tensor, once: dict[str, Tensor], own: dict[str, Tensor], **_: Any) -> Tensor:
    if "whole" in own:
        return own["whole"]
    z_PK = once["mean"].double() + torch.einsum("pc,pck->pk", own["coordinates"].double(), once["basis"].double())
    return base_X.double() + z_PK[: base_X.shape[0]] @ z_PK[base_X.shape[0] :].T


@method(
    family="store",
    paper="2510.14163",
    code="",
    reference="mean",
    unit="matrix",
    needs_base=True,
    minimum_experts=2,
    spectral=True,
    beside=lambda rows, columns, experts: 4 * experts * (rows + columns) * min(rows, columns),
    store=Store(_parts, _encode, _decode),
)
def rmm(
    x: Slot,
    *,
    rank: Rank = 0.08,
    components: Components | None = None,
    task: Annotated[int, Ge(0)] = 0,
    keys: Keys = "block_linear",
    stored: Stored | None = None,
) -> Tensor:
    """base + A B^T of expert number `task`, a row of A or B a point in a basis that all experts share; others in full.

    Reconstructed: no code was found, and that the basis is the principal one around the mean is inferred from the
    paper's count of stored numbers, p (r + T) + r a position. Factors are balanced, U S^1/2 and V S^1/2, and turned to
    the largest expert's, so that their rows can be compared. Numbers are rounded to the dtype `stored`, by default
    float32, as a compressed store keeps them.

    Formula:
        Zₜ = [U S^½; V S^½] Qₜ of P_k(τₜ), Qₜ orthogonal and nearest to the largest expert's; for every row
        z = mean over tasks + Σ over `components` principal directions of coordinate · direction
        θ₀ + A Bᵀ, [A; B] = Z of t = task
    Parameters:
        rank: how many directions of a task vector are kept: a number, or a share of full rank
        components: principal directions of each row over the experts; all there are by default, T - 1 or k
    Spectral work:
        an eigendecomposition of the smaller Gram matrix, of every matrix and expert, which `--factors` keeps, and
        of a T x T matrix for every row and column
    Trap:
        With all components it loses nothing but what `rank` cuts, and takes more than `tsv_compress`: it saves
        where T is well above `components`. Other tensors are stored whole for each task.
    """
    once, [own] = _encode(x, [task], rank=rank, components=components, keys=keys, stored=stored)
    return _decode(x.base, once, own)
