"""LATA: less of those tensors of a task vector that look like instruction tuning."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from merging import operators as ops
from merging.lazy import torch
from merging.methods import method
from merging.slots import Inputs, Slot, View

if TYPE_CHECKING:
    from torch import Tensor


def layer_weights(inputs: Inputs, *, mode: str, threshold: float, **_: Any) -> dict[str, list[float]]:
    """What each expert's task vector is multiplied by, for every tensor."""
    names = [view.name for view in inputs.views]
    cosine_LT = torch.stack(list(inputs.each(_cosines)))
    if mode == "threshold":
        weight_LT = (cosine_LT < threshold).double()
    else:
        rank_LT = cosine_LT.argsort(dim=0, descending=True, stable=True).argsort(dim=0)
        weight_LT = rank_LT / max(len(names) - 1, 1)
    return dict(zip(names, weight_LT.tolist()))


def _cosines(view: View) -> Tensor:
    """Of each expert's task vector with that of the instruction model, 0 if one of them is zero: (T,)."""

    def rows(x: Slot) -> list[Tensor]:
        return [x.statistic("instruction").to(x.base) - x.base, *x.task_vectors]

    gram_TT = sum(ops.gram(rows(x)) for x in view.blocks("element"))
    norm_T = gram_TT.diagonal().sqrt()
    return gram_TT[0, 1:] / (norm_T[0] * norm_T[1:]).clamp(min=1e-300)


@method(
    family="statistics",
    paper="2502.20186",
    reference="pretrained",
    needs_base=True,
    prepass=layer_weights,
    statistics=lambda params: ["instruction"],
)
def lata(
    x: Slot,
    *,
    mode: Literal["linear_rank", "threshold"] = "linear_rank",
    threshold: float = 0.95,
    scale: float = 0.3,
    scope: Literal["tensor"] = "tensor",
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
    return ops.combination(x, [scale * weight for weight in x.facts[x.name]])
