"""BatchNorm's statistics of a merge, computed anew on examples of all tasks."""

from __future__ import annotations

from contextlib import contextmanager
from itertools import zip_longest
from typing import Any, Iterator

from mergeline.merging.api import merge
from mergeline.merging.checkpoints.checkpoint import open_checkpoint
from mergeline.merging.engine.work import Count
from mergeline.merging.errors import UserError
from mergeline.merging.lazy import torch
from mergeline.merging.learning.contract import Job, inner_recipe, learned
from mergeline.merging.learning.network import Batch
from mergeline.merging.learning.spaces import SOLVED, replacing
from mergeline.merging.recipes.recipe import Recipe

_START = "start"


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
    begun = inner_recipe(job, inner, params)
    start = begun.model_copy(update={"dtype": "float32", "shard_size": None})
    if not (job.folder / _START).exists():
        merge(start, job.folder / _START, device=job.device)
    merged = open_checkpoint(job.folder / _START)
    own = job.network.tensors()
    job.network.load({name: merged.read(name) for name in merged.tensors if name in own})
    layers = {
        name: layer
        for name, layer in job.network.module.named_modules()
        if isinstance(layer, torch.nn.modules.batchnorm._BatchNorm) and layer.running_mean is not None
    }
    if not layers:
        raise UserError(f"reset_batch_norm: the models have no BatchNorm; merge by {inner} alone")
    done, total = 0, sum(map(job.examples.count, job.examples.counts))
    with torch.no_grad(), _gathering(list(layers.values())):
        for batch in _mixed(job):
            job.network.features(batch)
            done += len(batch["images"])
            if job.progress:
                job.progress(Count.of(done, 0), Count.of(total, 0))
    found = {
        f"{job.network.prefix}{name}.{key}": getattr(layer, key).clone()
        for name, layer in layers.items()
        for key in ("running_mean", "running_var")
    }
    result = replacing(begun, found, job.folder / SOLVED)
    return result.model_copy(update={"running_statistics": "merge"})


@contextmanager
def _gathering(layers: list[Any]) -> Iterator[None]:
    """In this block, layers normalise by the batch, and their statistics become the means over the batches."""
    before = [layer.momentum for layer in layers]
    try:
        for layer in layers:
            layer.reset_running_stats()
            layer.momentum = None
            layer.train()
        yield
    finally:
        for layer, momentum in zip(layers, before):
            layer.eval()
            layer.momentum = momentum


def _mixed(job: Job) -> Iterator[Batch]:
    """Batches of images of all tasks together (raises UserError for other examples, or images of several sizes)."""
    streams = [job.examples.of(task) for task in job.examples.counts]
    for parts in zip_longest(*streams):
        images = [part["images"] for part in parts if part is not None and "images" in part]
        if len({x.shape[1:] for x in images}) != 1:
            raise UserError("reset_batch_norm: needs images of one size, of all tasks")
        yield {"images": torch.cat(images)}
