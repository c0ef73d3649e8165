"""ProDistill: coefficients of task vectors, block by block, by which each block gives what the experts' do."""

from __future__ import annotations

from mergeline.merging.learning.blockwise import Granularity, Settings, distilled
from mergeline.merging.learning.contract import Job, learned
from mergeline.merging.methods.parameters import Positive, PositiveCount
from mergeline.merging.recipes.recipe import Recipe


@learned(
    paper="2502.12706",
    code="JingXuTHU/Scalable_Model_Merging_with_Progressive_Layerwise_Distillation@c773fcae",
)
def prodistill(
    job: Job,
    *,
    granularity: Granularity = "elementwise",
    initial: float = 0.3,
    rate: Positive = 1e-2,
    epochs: PositiveCount = 100,
    batch: PositiveCount = 16,
) -> Recipe:
    """base + the sum of coefficient * task vector, one block after the other fitted to the outputs of experts' blocks.

    The merged block sees what the merged blocks before it give, each expert's what its own do. Adam. What lies outside
    of blocks, embeddings and heads, has the coefficient that all begin with.

    Formula:
        argmin_α Σₜ Σ ‖f_l(x; θ₀ + Σₛ αₛ ⊙ τₛ) − f_l(xₜ; θₜ)‖², x and xₜ what goes into block l of the
        merge and of expert t
    Parameters:
        granularity: whether a coefficient is of an expert's block, of a tensor in it, or of an entry
        initial: of every coefficient
        rate: of Adam
        epochs: passes over the examples, for each block
        batch: examples of a task in a step
    Needs:
        unlabelled examples of every expert's own task; the paper has 64
    Trap:
        Coefficients of entries reach any weights where task vectors are not zero: as many are fitted as the experts
        have parameters together. The official code ignores its option `granularity`, saves blocks to another folder
        than it reads, and draws steps of 128 examples of all tasks; here a step has `batch` of each.
    """
    return distilled(job, Settings(granularity, initial, rate, epochs, batch))
