"""LATA: less of those tensors of a task vector that look like instruction tuning."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from mergeline.merging.algebra import combine, sums
from mergeline.merging.algebra.slots import Slot, View, Views
from mergeline.merging.lazy import torch
from mergeline.merging.methods.contract import Look, method

if TYPE_CHECKING:
    from torch import Tensor


def layer_weights(views: Views, *, mode: str, threshold: float, scope: str) -> dict[str, list[float]]:
    """What each expert's task vector is multiplied by, for every tensor."""
    names = [_layer(view) if scope == "block" else view.name for view in views.views]
    grams: dict[str, Tensor] = {}
    for name, gram_TT in zip(names, views.each(_gram)):
        grams[name] = grams[name] + gram_TT if name in grams else gram_TT
    cosine_LT = torch.stack([_cosines(gram_TT) for gram_TT in grams.values()])
    if mode == "threshold":
        weight_LT = (cosine_LT < threshold).double()
    else:
        rank_LT = cosine_LT.argsort(dim=0, descending=True, stable=True).argsort(dim=0)
        weight_LT = rank_LT / max(len(grams) - 1, 1)
    weights = dict(zip(grams, weight_LT.tolist()))
    return {view.name: weights[name] for view, name in zip(views.views, names)}


def _layer(view: View) -> str:
    """The layer that a tensor belongs to; a tensor outside of layers is one of its own."""
    return view.name if view.role.layer is None else f"{view.role.tower}{view.role.layer}"


def _gram(view: View) -> Tensor:
    """Inner products of the instruction model's task vector and all experts': (1 + T, 1 + T)."""

    def rows(x: Slot) -> list[Tensor]:
        return [x.statistic("instruction").to(x.reference) - x.reference, *x.task_vectors]

    return combine.gram_of(Views([view]), rows)


def _cosines(gram_TT: Tensor) -> Tensor:
    """Of each expert's task vector with that of the instruction model, 0 if one of them is zero: (T,)."""
    norm_T = gram_TT.diagonal().sqrt()
    return gram_TT[0, 1:] / (norm_T[0] * norm_T[1:]).clamp(min=1e-300)


@method(
    paper="2502.20186",
    scale=0.3,
    needs=("base", "instruction"),
    measure=Look(layer_weights, over="model"),
)
def lata(
    x: Slot,
    *,
    mode: Literal["linear_rank", "threshold"] = "linear_rank",
    threshold: float = 0.95,
    scope: Literal["block", "tensor"] = "block",
) -> Tensor:
    """base + scale * sum of weight * task vector; a tensor weighs the less the more it goes as instruction tuning did.

    The statistics `instruction` are a checkpoint of the same base that was tuned to follow instructions. Tensors are
    ranked by the cosine of the two task vectors: linear_rank gives rank / (number of tensors - 1), 0 for the most
    similar; threshold drops those whose cosine reaches it.

    Formula:
        linear_rank: wₜₗ = (rank of tensor l by cos(τₜₗ, τᵢₗ), from 0 for the most similar) / (L − 1)
        threshold: wₜₗ = [cos < threshold]
        θ₀ + scale · Σₜ wₜₗ τₜₗ, where τᵢ is the task vector of the instruction model
    Parameters:
        mode: weights by rank, or by a threshold
        threshold: the cosine from which on a tensor is dropped, with `mode: threshold`
    Trap:
        The most similar tensor gets weight 0, it is dropped. Reconstructed: there is no official code, and
        the rank is over all tensors.
    """
    base = x.reference.to(x.precision)
    taus = (expert.to(x.precision) - base for expert in x.experts)
    return sums.weighted_sum(taus, x.found[x.name], x.precision)
