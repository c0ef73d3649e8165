"""Task vectors cut to low rank where it costs a layer's outputs, or the loss, least, before another merge sees them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Iterator, Literal, Mapping, Sequence

from mergeline.merging.algebra import decompositions, directions, linear
from mergeline.merging.algebra.slots import Slot
from mergeline.merging.methods.bound import Inner
from mergeline.merging.methods.contract import method
from mergeline.merging.methods.parameters import Share
from mergeline.merging.methods.wrapper.truncate import cut as plain_cut

if TYPE_CHECKING:
    from torch import Tensor

Weights = Literal["gram", "fisher"]
Side = Literal["in", "out"]


def _needs(params: Mapping[str, Any]) -> Sequence[str]:
    return ("base", params["weights"])


def wrong_side(params: Mapping[str, Any], experts: int) -> Iterator[str]:
    """What is wrong with the weights and their side, which `merging.methods.contract.Method.check` yields."""
    if params["weights"] == "gram" and params["side"] == "out":
        yield "side: Gram matrices are of inputs; take side in, or weights fisher"


def weighted_squares(x: Slot, t: int, tau_MN: Tensor, weights: Weights, side: Side) -> Tensor:
    """tau W W^T tau^T, (M, M), or of outputs tau^T W^2 tau, (N, N): its leading eigenvectors hold what counts most.

    A part of rank k of tau W, undone by W^-1, is tau projected onto them: W may have zeros, and need not be inverted.
    """
    weight = x.statistic(weights, t).double()
    if weights == "gram":
        return (tau_MN @ weight) @ tau_MN.T
    if side == "in":
        return (tau_MN * weight.mean(0)) @ tau_MN.T
    return tau_MN.T @ (weight.mean(1)[:, None] * tau_MN)


def cut(x: Slot, *, rank: float, energy: float | None, weights: Weights, side: Side, inner: str) -> Slot:
    """The slot with the parts of its task vectors of low rank that are nearest in the weighted norm."""
    if not all(x.has_statistic(weights, t) for t in range(len(x.experts))):
        return plain_cut(x, rank=rank, energy=energy, inner=inner)
    k = min(x.shape) if energy is not None else linear.rank_of(rank, x.shape)

    def nearest(t: int) -> Tensor:
        tau_MN = directions.task_vector(x, t)
        energy_K, q_K = decompositions.leading(weighted_squares(x, t, tau_MN, weights, side), k)
        q_K = q_K[:, : linear.rank_for_energy(energy_K, energy)] if energy is not None else q_K
        return (tau_MN @ q_K) @ q_K.T if side == "out" else q_K @ (q_K.T @ tau_MN)

    return x.with_task_vectors(nearest, wide=True, keep=True)


@method(
    paper="2403.07378",
    code="hahnyuan/ASVD4LLM@86304274",
    reference="none",
    keys="block_linear",
    other="inner",
    needs=_needs,
    check=wrong_side,
    transform=cut,
    spectral=lambda rows, columns, experts: max(rows, columns) ** 2 + rows * columns,
)
def weighted_truncate(
    x: Slot,
    merge: Inner,
    *,
    inner: str = "task_arithmetic",
    rank: Share = 0.12,
    energy: Share | None = None,
    weights: Weights = "gram",
    side: Side = "in",
) -> Tensor:
    """Another merge of experts whose task vectors are cut to rank k = max(1, int(rank * min(M, N))) in a weighted norm.

    With `weights: gram` what is lost is measured in a layer's outputs on a few examples (SVD-LLM): G is the Gram matrix
    (N, N) of its inputs. With `weights: fisher` in the loss, to second order, with one weight for each input, as the
    published port of FWSVD (2207.00112) has it, or for each output (`side: out`): the mean of the Fisher information
    (M, N) over the other. With one expert it compresses what a fine-tune, or a merge, adds to its base. Where matrices
    have no statistics they are cut as by `truncate`.

    Formula:
        τ̂ₜ = argmin ‖(τₜ − τ̂) W‖_F over rank k, W Wᵀ = Gₜ or diag(mean of Fₜ over outputs)
           = Uₖ Uₖᵀ τₜ, Uₖ the leading eigenvectors of τₜ W Wᵀ τₜᵀ;  of outputs: τₜ Vₖ Vₖᵀ, Vₖ of τₜᵀ W² τₜ
    Parameters:
        energy: share of the weighted squares that is kept, in place of `rank`
        weights: by which statistics loss is measured
        side: whether a weight is of an input or of an output
    Needs:
        a Gram matrix (N, N) of every linear layer, or Fisher information (M, N)
    Spectral work:
        an eigendecomposition of (M, M), of outputs (N, N), for every matrix and expert
    Trap:
        The squared error of the weights themselves is larger than that of `truncate`, as it must be.
    """
    return merge.weights()
