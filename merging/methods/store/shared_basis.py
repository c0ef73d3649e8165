"""One basis for matrices of neighbouring layers: a joint SVD of what experts add to them, or of the weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Mapping, Sequence

from mergeline.merging.algebra import linear, sums
from mergeline.merging.algebra.decompositions import leading
from mergeline.merging.algebra.slots import Slot, Views
from mergeline.merging.architecture import layer_of
from mergeline.merging.lazy import torch
from mergeline.merging.methods.contract import Look, method
from mergeline.merging.methods.parameters import PositiveCount, Share, Task
from mergeline.merging.methods.store.svd_compress import Of, reference_of
from mergeline.merging.methods.stored import Encoded, Part, Parts, Store, Stored, given_back, stored_dtype
from mergeline.merging.methods.wrapper.weighted_truncate import Side

if TYPE_CHECKING:
    from torch import Tensor


def groups(views: Views, *, layers: int) -> dict[str, list[str]]:
    """Of each matrix, by its name, those that it shares a basis with, in the order of layers; itself among them."""
    found: dict[Any, list[str]] = {}
    for view in views.views:
        tower, layer = layer_of(view.name)
        if view.is_matrix and tower is not None and layer is not None:
            alike = view.name[len(tower) :].partition(".")[2]
            found.setdefault((tower, layer // layers, alike, view.shape), []).append(view.name)
        elif view.is_matrix:
            found[view.name] = [view.name]
    ordered = [sorted(names, key=lambda name: layer_of(name)[1] or 0) for names in found.values()]
    return {name: names for names in ordered for name in names}


def _rank(rank: float, side: Side, shape: Sequence[int], together: int) -> int:
    """Directions of so many matrices, one below the other or, where they share outputs, side by side."""
    rows, columns = shape if side == "in" else (shape[1], shape[0])
    return linear.rank_of(rank, (together * rows, columns))


def _parts(shape: Sequence[int], _experts: int, *, rank: float, side: Side, together: int, **_: Any) -> Parts:
    k = _rank(rank, side, shape, together)
    common, alone = (shape[1], shape[0]) if side == "in" else shape
    return {}, {
        "basis": Part("number", (common, k), of_group=True),
        "coordinates": Part("number", (alone, k)),
    }


def _encode(
    x: Slot, tasks: Sequence[int], *, rank: float, of: Of, side: Side, stored: Stored | None, **_: Any
) -> Encoded:
    names, dtype = x.found[x.name], stored_dtype(x, stored)
    members = [x if name == x.name else x.alike(name) for name in names]
    k = _rank(rank, side, x.shape, len(names))

    def matrix(member: Slot, t: int) -> Tensor:
        """What is decomposed, with the common side as columns, float64."""
        expert_MN = member.experts[t].double()
        if of == "task_vectors":
            assert member.base is not None
            expert_MN = expert_MN - member.base
        return expert_MN if side == "in" else expert_MN.T

    def own(t: int) -> dict[str, Tensor]:
        _, q_RK = leading(sums.added(linear.inner(matrix(member, t)) for member in members), k)
        basis_RK = q_RK.to(dtype).contiguous()
        return {"basis": basis_RK, "coordinates": (matrix(x, t) @ basis_RK.double()).to(dtype).contiguous()}

    return {}, map(own, tasks)


def _decode(
    _once: Mapping[str, Tensor],
    own: Mapping[str, Tensor],
    _shape: Sequence[int],
    _dtype: torch.dtype,
    *,
    side: Side,
    **_: Any,
) -> Tensor:
    found = own["coordinates"].double() @ own["basis"].double().T
    return found if side == "in" else found.T


STORE = Store(_parts, _encode, _decode, group=lambda name, found: found[name])


@method(
    paper="2503.18893",
    code="abdelfattah-lab/xKV@bfe5d720",
    reference=reference_of,
    keys="block_linear",
    other="task",
    needs=lambda params: ("base",) if params["of"] == "task_vectors" else (),
    measure=Look(groups, over="model"),
    spectral=lambda rows, columns, experts: 2 * rows * columns + 3 * max(rows, columns) ** 2,
    store=STORE,
)
def shared_basis(
    x: Slot,
    *,
    rank: Share = 0.12,
    layers: PositiveCount = 4,
    of: Of = "task_vectors",
    side: Side = "in",
    task: Task = 0,
    stored: Stored | None = None,
) -> Tensor:
    """base + the task vector of expert number `task`, or its weights, in a basis shared by layers; others in full.

    What xKV does to caches of neighbouring layers, done to their weights: matrices of one name and shape in a stretch
    of `layers` layers, from the first on, are decomposed together. The basis is kept once for all of them, of each
    matrix its coordinates. `include: ["*k_proj*", "*v_proj*"]` makes it that of keys and values alone. Numbers are
    rounded to the dtype `stored`, by default float32, as a compressed store keeps them.

    Formula:
        θ₀ + τₜ B Bᵀ, t = task;  B (N, k) the leading right singular vectors of the τₜ of all layers one below the other
        side out: θ₀ + B Bᵀ τₜ, B (M, k) the left ones of all side by side;  of weights: θₜ for τₜ, 0 for θ₀
        k = max(1, int(rank · min(g M, N))), of outputs min(M, g N), g matrices in the stretch
    Parameters:
        rank: share of the directions of all matrices together; at 1 nothing is lost
        layers: how many neighbouring layers share a basis
        of: whether what is added to the base is decomposed, or the weights
        side: what matrices have in common: inputs, or outputs
    Spectral work:
        an eigendecomposition of (N, N), of outputs (M, M), for every matrix and expert
    Trap:
        Each matrix sums the Gram matrices of its whole stretch again: a stretch of g layers is read g times. It is
        smaller than a basis of each where the layers' directions overlap; unlike xKV it needs no rotation to be undone,
        for positions turn keys after their weights.
    """
    params = {"rank": rank, "layers": layers, "of": of, "side": side}
    return given_back(STORE, x, task=task, stored=stored, **params)
