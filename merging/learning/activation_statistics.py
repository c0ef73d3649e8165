"""Statistics of a merge's activations on examples of all tasks: what methods that set them anew share."""

from __future__ import annotations

from contextlib import contextmanager
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, Iterator, Mapping

from mergeline.merging.api import merge
from mergeline.merging.checkpoints.checkpoint import open_checkpoint
from mergeline.merging.engine.work import Count
from mergeline.merging.errors import UserError
from mergeline.merging.lazy import torch
from mergeline.merging.learning.contract import Job, inner_recipe
from mergeline.merging.learning.network import Batch
from mergeline.merging.recipes.recipe import Recipe

if TYPE_CHECKING:
    from torch import nn

_START = "start"


def begun(job: Job, inner: str, params: Mapping[str, Any]) -> Recipe:
    """The recipe of the merge by `inner`, whose weights the job's network has then."""
    recipe = inner_recipe(job, inner, params)
    start = recipe.model_copy(update={"dtype": "float32", "shard_size": None})
    if not (job.folder / _START).exists():
        merge(start, job.folder / _START, device=job.device)
    merged = open_checkpoint(job.folder / _START)
    own = job.network.tensors()
    job.network.load({name: merged.read(name) for name in merged.tensors if name in own})
    return recipe


def batch_norms(network: nn.Module) -> dict[str, Any]:
    """The BatchNorm layers that keep statistics, by name."""
    return {
        name: layer
        for name, layer in network.named_modules()
        if isinstance(layer, torch.nn.modules.batchnorm._BatchNorm) and layer.running_mean is not None
    }


def found_statistics(job: Job, layers: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The statistics that BatchNorm layers of the job's network have now, by the checkpoint's names."""
    return {
        job.network.stored(f"{name}.{key}"): getattr(layer, key).clone()
        for name, layer in layers.items()
        for key in ("running_mean", "running_var")
    }


@contextmanager
def gathering(layers: list[Any]) -> Iterator[None]:
    """In this block, BatchNorm layers normalise by the batch; their statistics become the means over the batches."""
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


def passes(job: Job, number: int = 1) -> Iterator[Iterator[Batch]]:
    """So many times the images of all tasks, in batches that have some of each task; progress is told of all.

    Raises:
        UserError: the examples are no images, or of several sizes.
    """
    done, total = 0, number * sum(map(job.examples.count, job.examples.counts))

    def mixed() -> Iterator[Batch]:
        nonlocal done
        for parts in zip_longest(*(job.examples.of(task) for task in job.examples.counts)):
            images = [part["images"] for part in parts if part is not None and "images" in part]
            if len({x.shape[1:] for x in images}) != 1:
                raise UserError(f"{job.recipe.method}: needs images of one size, of all tasks")
            yield {"images": torch.cat(images)}
            done += sum(map(len, images))
            if job.progress:
                job.progress(Count.of(done, 0), Count.of(total, 0))

    return (mixed() for _ in range(number))
