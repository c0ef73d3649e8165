"""A compressed store whose router needs no examples: an input goes to the expert whose task vectors take it in."""

from __future__ import annotations

from typing import Any

from mergeline.merging.learning.contract import Job, learned
from mergeline.merging.learning.routing import by_residual, check_store, store_recipe
from mergeline.merging.methods.parameters import PositiveCount, TaskRank
from mergeline.merging.recipes.recipe import Recipe


@learned(paper="2504.05342", code="crisostomi/mass@583b35e9", data="none", routed=True)
def routed_by_residual(
    job: Job,
    *,
    inner: str = "tsv_compress",
    router_rank: TaskRank = "1/T",
    blocks: PositiveCount = 4,
    **params: Any,
) -> Recipe:
    """A store of all experts, and a router that finds the expert of an input by the base's hidden states alone.

    The base is run on the input. Of each task vector of the maps into the MLPs, the leading directions that it takes in
    are known; the expert is chosen that leaves least of the first (class) token outside of them. Its weights are then
    given back from the store, as `mergeline extract-expert` does, and run.

    Formula:
        e* = argmin_e Σ over blocks log(|x − x V_eᵀV_e|² / |x|²), x the first token before the MLP, V_e the leading
        right singular vectors of expert e's task vector of that map
    Parameters:
        inner: the method that keeps the store; its parameters stand beside these
        router_rank: how many directions of each task vector
        blocks: how many of the last blocks are looked at
    Trap:
        The official code looks at one chosen layer and merges up to three experts; one is taken here. Two runs an
        example: of the base, and of the expert. Its scores know inputs only as far as fine-tuning moved by them.
    """
    check_store(inner, params)
    return store_recipe(job, inner, params, by_residual(job, router_rank, blocks))
