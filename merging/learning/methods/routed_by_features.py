"""A compressed store whose router has seen a few examples of each task."""

from __future__ import annotations

from typing import Any

from mergeline.merging.learning.contract import Job, learned
from mergeline.merging.learning.routing import by_features, check_store, store_recipe
from mergeline.merging.methods.parameters import Positive, PositiveCount
from mergeline.merging.recipes.recipe import Recipe


@learned(paper="Fisher 1936", routed=True)
def routed_by_features(
    job: Job,
    *,
    inner: str = "tsv_compress",
    ridge: Positive = 0.1,
    blocks: PositiveCount = 4,
    **params: Any,
) -> Recipe:
    """A store of all experts, and a router that takes the expert whose examples an input is nearest to.

    Nearest in the base's hidden states before the MLPs of the last blocks, their first token and their mean over
    tokens, by one covariance for all: a linear discriminant, in closed form. Examples need no labels but whose task
    they are of. The expert's weights are then given back from the store, as `mergeline extract-expert` does, and run.

    Formula:
        e* = argmax_e x Σ⁻¹μ_e − ½ μ_eᵀΣ⁻¹μ_e;  Σ = mean of the experts' covariances + ridge · diag
    Parameters:
        inner: the method that keeps the store; its parameters stand beside these
        ridge: what the covariance's diagonal is raised by, as a share of it
        blocks: how many of the last blocks are looked at
    Trap:
        Two runs an example: of the base, and of the expert. What is unlike all tasks still goes to one of them.
    """
    check_store(inner, params)
    return store_recipe(job, inner, params, by_features(job, ridge, blocks))
