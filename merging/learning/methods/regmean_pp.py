"""RegMean++: RegMean block by block, on inputs that come through the merged blocks before."""

from __future__ import annotations

from typing import Any

from mergeline.merging.learning.contract import Job, learned
from mergeline.merging.learning.least_squares import Settings, solve
from mergeline.merging.methods.parameters import Rate
from mergeline.merging.recipes.recipe import Recipe


@learned(paper="2508.03121", code="tanganke/fusion_bench@54c9e8c9")
def regmean_pp(job: Job, *, inner: str = "average", nondiagonal: Rate = 0.95, **params: Any) -> Recipe:
    """Of every block, (sum of W G) (sum of G)^-1, G of what each expert's block sees behind the merged blocks before.

    All linear maps of a block are solved at once, from one pass of the merged stream through each expert's own block;
    the stream then goes on through the merged block. What is outside of blocks, biases and norms are averaged.

    Formula:
        Gₜ = XₜᵀXₜ / rows, off-diagonals times nondiagonal, Xₜ on the merged stream
        (Σₜ θₜ Gₜ) (Σₜ Gₜ)⁻¹
    Parameters:
        inner: what makes all other tensors; its parameters stand beside these
        nondiagonal: what off-diagonal entries of Gram matrices are multiplied by
    Needs:
        unlabelled examples of every expert's own task; the official code takes 256
    Trap:
        Targets are what experts make of inputs that are not theirs: `progressive_least_squares` on the same examples,
        with targets of the experts' own streams, is far better.
    """
    return solve(job, inner, params, Settings("own", ridge=0.0, nondiagonal=nondiagonal))
