"""SMILE: the base, to whose linear maps the experts add what they changed, chosen token by token."""

from __future__ import annotations

from mergeline.merging.learning.contract import Job, learned
from mergeline.merging.learning.upscaling import upscaled
from mergeline.merging.methods.parameters import PositiveCount
from mergeline.merging.recipes.recipe import Recipe


@learned(paper="2408.10174", code="tanganke/fusion_bench@54c9e8c9", data="none", routed=True)
def smile_upscaling(
    job: Job, *, k: PositiveCount = 32, gate_k: PositiveCount = 16, top_k: PositiveCount = 1
) -> Recipe:
    """The base and, beside it, the low-rank part of what each expert changed of its linear maps, with a router in each.

    No examples are looked at. At every linear map each token goes to the experts whose task vectors take most of it in,
    and is given what they add; attention's packed projection is three maps. Embeddings and norms stay the base's.

    Formula:
        y = W₀x + b₀ + Σ over the top_k experts of g_e (U_e S_e V_eᵀ x + δb_e), k triplets of τ_e = W_e − W₀;
        g = softmax over experts of |V_{e, 1:gate_k}ᵀ x|, renormalised over the top_k
    Parameters:
        k: singular triplets that are kept of each map and expert
        gate_k: how many of them a router looks at
        top_k: experts that add to a token
    Trap:
        A model of another kind, slower by the routers: no checkpoint of plain weights comes out, and whoever loads the
        merge without `adapters/` has the base. What the experts changed of norms and embeddings is lost.
    """
    return upscaled(job, k, gate_k, top_k)
