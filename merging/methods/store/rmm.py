"""RMM: one expert given back from a basis of low-rank factors that all experts share, position by position."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Iterator, Mapping, Sequence

from mergeline.merging.algebra import directions, linear
from mergeline.merging.algebra.slots import Slot
from mergeline.merging.lazy import torch
from mergeline.merging.methods.contract import method
from mergeline.merging.methods.parameters import Count, PositiveCount, Share, Task
from mergeline.merging.methods.stored import Encoded, Part, Parts, Store, Stored, given_back, stored_dtype

if TYPE_CHECKING:
    from torch import Tensor


Rank = PositiveCount | Share


def _sizes(shape: Sequence[int], experts: int, rank: Rank, components: int | None) -> tuple[int, int]:
    """Of the factors of a matrix: columns, and principal directions, of which there are no more than either allows."""
    k = min(rank, *shape) if isinstance(rank, int) else linear.rank_of(rank, shape)
    most = min(experts - 1, k)
    return k, most if components is None else min(components, most)


def _parts(shape: Sequence[int], experts: int, *, rank: Rank, components: int | None, **_: Any) -> Parts:
    positions, (k, p) = sum(shape), _sizes(shape, experts, rank, components)
    once = {"mean": Part("number", (positions, k)), "basis": Part("number", (positions, p, k))}
    return once, {"coordinates": Part("number", (positions, p))}


def _encode(
    x: Slot, tasks: Sequence[int], *, rank: Rank, components: int | None, stored: Stored | None, **_: Any
) -> Encoded:
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
    for u_MR, s_R, v_NR in directions.triplets_of_tasks(x, k):
        z_PR = torch.cat([u_MR, v_NR]) * s_R.sqrt()
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


def _decode(
    once: Mapping[str, Tensor], own: Mapping[str, Tensor], shape: Sequence[int], _dtype: torch.dtype, **_: Any
) -> Tensor:
    basis_PCK, coordinates_PC = once["basis"].double(), own["coordinates"].double()
    z_PK = once["mean"].double() + torch.einsum("pc,pck->pk", coordinates_PC, basis_PCK)
    return z_PK[: shape[0]] @ z_PK[shape[0] :].T


STORE = Store(_parts, _encode, _decode)


@method(
    paper="2510.14163",
    keys="block_linear",
    other="task",
    experts=(2, None),
    needs=("base",),
    spectral=lambda rows, columns, experts: 4 * experts * (rows + columns) * min(rows, columns),
    store=STORE,
)
def rmm(
    x: Slot,
    *,
    rank: Rank = 0.08,
    components: Count | None = None,
    task: Task = 0,
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
    return given_back(STORE, x, task=task, rank=rank, components=components, stored=stored)
