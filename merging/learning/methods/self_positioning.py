"""Self Positioning: where a merge lies in the span of task vectors, by an angle and a length for each expert."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Mapping

from mergeline.merging.lazy import torch
from mergeline.merging.learning.contract import Job, learned
from mergeline.merging.learning.descent import Schedule
from mergeline.merging.learning.directions import Inputs, Piece
from mergeline.merging.learning.fits import fitted_coefficients
from mergeline.merging.learning.objectives import objective_of
from mergeline.merging.methods.parameters import BelowOne, Count, NotNegative, Positive, PositiveCount
from mergeline.merging.recipes.recipe import Recipe

if TYPE_CHECKING:
    from torch import Tensor


@learned(paper="2410.15035", marked="reconstructed", data="labelled")
def self_positioning(
    job: Job,
    *,
    initial: Positive = 1.0,
    regularisation: NotNegative = 0.0,
    objective: str = "cross_entropy",
    rate: Positive = 1e-2,
    iterations: Count = 300,
    batch: PositiveCount = 16,
    held_out: BelowOne = 0.0,
) -> Recipe:
    """base + v, v found in the planes of task vectors: between the one so far and the next, at an angle and a length.

    The first two task vectors span a plane with the base, in which v lies between them, as far out as `length` times
    the lengths of both, interpolated; v and the next task vector span another, and so on. All angles and lengths, one
    for each expert but the first, are fitted together by Adam. With one expert there is a length alone.

    Formula:
        v₁ = τ₁, v_k = s_k ((1 − t_k)|v_{k−1}| + t_k|τ_k|) · slerp(v_{k−1}/|v_{k−1}|, τ_k/|τ_k|; t_k)
        argmin_{s, t} Σₜ objective + regularisation · |v|² / mean |τ|², W = θ₀ + v
    Parameters:
        initial: of every length; t begins at 1/2, 1/3, ...
        regularisation: how much the length of v costs
        objective: cross_entropy, which for images and class names is the contrastive loss (InfoNCE), or as of
            `coefficients`
        rate: of Adam
        iterations: how many steps
        batch: examples of a task in a step
        held_out: the share of the examples on which agreement with the experts stops the fit; 0 takes the last step
    Trap:
        Reconstructed: the paper's equations, rates and probe set were not found, and whether it fits plane after plane
        or all together. As many numbers as experts, twice, for all tensors alike: `adamerging` has as many for each.
    """
    experts = len(job.recipe.experts)
    with Inputs(job.recipe, job.device) as inputs:
        gram_DD = gram_of(inputs)
    size = float(gram_DD.diagonal().mean()) or 1.0

    def penalty(c_DK: Tensor, count: int) -> Tensor:
        """Of one of count / experts tensors, which all have the same coefficients."""
        c_D = c_DK[:, 0].double()
        return regularisation * (c_D @ gram_DD.to(c_D) @ c_D) / size * experts / count

    form = Folds(gram_DD, initial)
    schedule = Schedule(iterations, batch, rate, held_out=held_out)
    return fitted_coefficients(
        job, {"directions": "task_vectors"}, form, objective_of(objective), schedule,
        penalty if regularisation else None,
    )  # fmt: skip


@dataclass(frozen=True)
class Folds:
    """Coefficients (D) of task vectors by an angle and a length for each fold, as shares of a turn toward the next.

    gram: inner products of the task vectors, (D, D) float64.
    """

    gram_DD: Tensor
    initial: float

    def start(self, piece: Piece, over: str, dtype: torch.dtype) -> dict[str, Tensor]:
        folds = len(self.gram_DD) - 1
        shares = [1 / (k + 2) for k in range(folds)]
        return {
            "angle": torch.tensor(shares, dtype=dtype),
            "length": torch.full((max(folds, 1),), self.initial, dtype=dtype),
        }

    def coefficients(self, piece: Piece, numbers: Mapping[str, Tensor]) -> Tensor:
        angle_F, length_F = numbers["angle"].double(), numbers["length"].double()
        gram_DD = self.gram_DD.to(length_F)
        one_DD = torch.eye(len(gram_DD)).to(gram_DD)
        c_D = one_DD[0] if len(gram_DD) > 1 else one_DD[0] * length_F[0]
        for k, (t, s) in enumerate(zip(angle_F, length_F), start=1):
            if k == len(gram_DD):
                break
            c_D = s * turned(c_D, one_DD[k], t, gram_DD)
        return c_D[:, None].to(numbers["length"].dtype)


def turned(a_D: Tensor, b_D: Tensor, t: Tensor, gram_DD: Tensor) -> Tensor:
    """Between two vectors, given by coefficients: the share t of the angle from a to b, of interpolated length.

    Where they lie on one line, or one is zero, the straight way.
    """
    size_a, size_b = (c_D @ gram_DD @ c_D for c_D in (a_D, b_D))
    size_a, size_b = size_a.clamp(min=0).sqrt(), size_b.clamp(min=0).sqrt()
    product = size_a * size_b
    cosine = a_D @ gram_DD @ b_D / product if float(product.detach()) > 0 else torch.ones_like(product)
    if float(cosine.detach().abs()) > 1 - 1e-9:
        return (1 - t) * a_D + t * b_D
    angle = cosine.acos()
    size = (1 - t) * size_a + t * size_b
    toward_a, toward_b = ((1 - t) * angle).sin() / size_a, (t * angle).sin() / size_b
    return size * (toward_a * a_D + toward_b * b_D) / angle.sin()


def gram_of(inputs: Inputs) -> Tensor:
    """Inner products of all task vectors, over the whole model: (D, D) float64."""
    count = len(inputs.experts)
    found_DD = torch.zeros(count, count, dtype=torch.float64)
    for view in inputs.views():
        base = view.read("base", 0, view.shape).reshape(-1).double()
        tau_DX = torch.stack(
            [view.read(e, 0, view.shape).reshape(-1).double() - base for e in inputs.experts]
        )
        found_DD += (tau_DX @ tau_DX.T).cpu()
    return found_DD
