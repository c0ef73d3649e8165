"""BatchNorm's statistics of a merge, computed anew on examples of all tasks."""

from __future__ import annotations

from typing import Any

from mergeline.merging.errors import UserError
from mergeline.merging.lazy import torch
from mergeline.merging.learning.activation_statistics import (
    batch_norms,
    begun,
    found_statistics,
    gathering,
    passes,
)
from mergeline.merging.learning.contract import Job, learned
from mergeline.merging.learning.spaces import SOLVED, replacing
from mergeline.merging.recipes.recipe import Recipe


@learned(paper="2211.08403 (REPAIR), which resets the statistics of networks with BatchNorm so")
def reset_batch_norm(job: Job, *, inner: str = "average", **params: Any) -> Recipe:
    """The merge by `inner`, with the means and variances of BatchNorm that examples of all tasks have in it.

    Averaged statistics belong to the unmerged weights: the merged activations have less variance than those of
    its parts, layer by layer less. One pass over the examples gives each layer the statistics of what reaches it. Every
    batch has examples of all tasks, for the layers before it normalise by what the batch has.

    Formula:
        mu = mean x, v = var x of every layer's inputs x, the mean of both over the batches
    Parameters:
        inner: what makes the merge, a method or a learned one; its parameters stand beside these
    Needs:
        unlabelled examples, and models with BatchNorm
    Trap:
        One set of statistics serves all tasks: where tasks look very different, each would be better off with its own.
        Of experts that were trained independently, it repairs the variance, not the permutation of units: align these
        first.
    """
    recipe = begun(job, inner, params)
    layers = batch_norms(job.network.module)
    if not layers:
        raise UserError(
            f"reset_batch_norm: the models have no BatchNorm; merge by {inner} alone, or by repair"
        )
    [batches] = passes(job)
    with torch.no_grad(), gathering(list(layers.values())):
        for batch in batches:
            job.network.features(batch)
    result = replacing(recipe, found_statistics(job, layers), job.folder / SOLVED)
    return result.model_copy(update={"running_statistics": "merge"})
