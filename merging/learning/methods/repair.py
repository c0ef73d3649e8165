"""The activations of a merge, given the means and deviations that its parts have on the same examples."""

from __future__ import annotations

from collections import defaultdict
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Callable, Iterable, Iterator

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
from mergeline.merging.learning.directions import Inputs
from mergeline.merging.learning.network import Batch, Network
from mergeline.merging.learning.spaces import SOLVED, replacing
from mergeline.merging.recipes.recipe import Recipe

if TYPE_CHECKING:
    from torch import Tensor, nn

_EPS = 1e-8  # of variances, so that units that are always off stay so


@dataclass
class _Moments:
    """Of the C units of a map, over the batches: sums of the batches' means and variances, (C) each."""

    batches: int = 0
    means: Any = 0.0
    variances: Any = 0.0

    def add(self, x: Tensor, axis: int) -> tuple[Tensor, Tensor]:
        """Take in the outputs of a batch, whose units lie along `axis`; returns their mean and variance."""
        rest = [i for i in range(x.ndim) if i != axis % x.ndim]
        mean, variance = x.mean(rest), x.var(rest, correction=0)
        self.batches += 1
        self.means, self.variances = self.means + mean, self.variances + variance
        return mean, variance

    @property
    def mean(self) -> Tensor:
        return self.means / self.batches

    @property
    def variance(self) -> Tensor:
        return self.variances / self.batches


@learned(paper="2211.08403", code="https://github.com/KellerJordan/REPAIR")
def repair(job: Job, *, inner: str = "average", **params: Any) -> Recipe:
    """The merge by `inner`, whose units have the means and deviations that the experts' have on average.

    In a merge of experts far from one another the units' activations vary less than in each of them, layer by layer
    less. Each linear map and convolution that has a bias is rescaled and shifted, unit by unit, so that on examples of
    all tasks its outputs have the mean over the experts of their means and of their deviations; what comes after is
    measured on what was set right before. BatchNorm layers take their statistics from the same pass, as
    `reset_batch_norm` does, and the maps without a bias before them stay.

    Formula:
        s = sqrt(((mean_t dev_t(y))^2 + 1e-8) / (var(y) + 1e-8));  W' = s W,  b' = s (b - mean y) + mean_t mean_t(y)
    Parameters:
        inner: what makes the merge, a method or a learned one; its parameters stand beside these
    Needs:
        unlabelled images, and models that have maps with a bias, or BatchNorm
    Trap:
        It is meant for models without LayerNorm, and for experts that were trained independently and aligned first:
        fine-tuned experts of one base lose little variance. Where a head belongs to each task, what it reads changes.
        Attention whose maps are one packed tensor is left alone. The official code adds 1e-5 to var(y) alone, by which
        units of little variance lose some even where all experts are the same.
    """
    network, inputs = job.network, Inputs(job.recipe.model_copy(update={"rules": []}), job.device)
    maps, norms = _maps(job, inputs.names), batch_norms(network.module)
    runs = passes(job, len(inputs.experts) + 1)
    means: dict[str, list[Tensor]] = defaultdict(list)
    deviations: dict[str, list[Tensor]] = defaultdict(list)
    for expert in inputs.experts:
        inputs.load(network, expert)
        seen = _measured(network, maps, next(runs))
        for name, moments in seen.items():
            means[name].append(moments.mean)
            deviations[name].append(moments.variance.sqrt())
    recipe = begun(job, inner, params)
    if not means and not norms:
        raise UserError(
            f"repair: the models have no map with a bias, and no BatchNorm; merge by {inner} alone"
        )
    goals = {name: (_mean(means[name]), _mean(deviations[name])) for name in means}
    found = {name: _Moments() for name in goals}

    def set_right(name: str, x: Tensor, axis: int) -> Tensor:
        mean, variance = found[name].add(x, axis)
        goal, deviation = goals[name]
        return ((x.movedim(axis, -1) - mean) * _scale(deviation, variance) + goal).movedim(-1, axis)

    with torch.no_grad(), gathering(list(norms.values())), _heard({n: maps[n] for n in goals}, set_right):
        for batch in next(runs):
            network.features(batch)
    own, solved = network.tensors(), found_statistics(job, norms)
    for name, (goal, deviation) in goals.items():
        scale = _scale(deviation, found[name].variance)
        weight, bias = (network.stored(f"{name}.{key}") for key in ("weight", "bias"))
        solved[weight] = own[weight] * scale.view(-1, *[1] * (own[weight].ndim - 1))
        solved[bias] = (own[bias] - found[name].mean) * scale + goal
    result = replacing(recipe, solved, job.folder / SOLVED)
    return result.model_copy(update={"running_statistics": "merge"}) if norms else result


def _measured(network: Network, maps: dict[str, nn.Module], batches: Iterable[Batch]) -> dict[str, _Moments]:
    """Of the maps that are run: the moments of their outputs on some batches."""
    seen: dict[str, _Moments] = defaultdict(_Moments)

    def listen(name: str, x: Tensor, axis: int) -> None:
        seen[name].add(x, axis)

    with torch.no_grad(), _heard(maps, listen):
        for batch in batches:
            network.features(batch)
    return seen


def _mean(values: list[Tensor]) -> Tensor:
    return torch.stack(values).mean(0)


def _scale(deviation: Tensor, variance: Tensor) -> Tensor:
    """What units of this variance are multiplied by, to have this deviation; 1 where they have it already."""
    return ((deviation.square() + _EPS) / (variance + _EPS)).sqrt()


def _maps(job: Job, merged: list[str]) -> dict[str, nn.Module]:
    """The maps with a bias of the job's network by name, where both their tensors are merged."""
    own = job.network.tensors().keys() & set(merged)
    kinds = (torch.nn.Linear, torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)
    return {
        name: part
        for name, part in job.network.module.named_modules()
        if isinstance(part, kinds)
        and {job.network.stored(f"{name}.{key}") for key in ("weight", "bias")} <= own
    }


@contextmanager
def _heard(maps: dict[str, nn.Module], listen: Callable[[str, Tensor, int], Any]) -> Iterator[None]:
    """In this block, `listen` is given a map's name, its outputs and the axis of its units, and may replace these."""

    def hook(name: str, axis: int) -> Any:
        return lambda _, __, out: listen(name, out, axis)

    handles = [
        part.register_forward_hook(hook(name, -1 if isinstance(part, torch.nn.Linear) else 1))
        for name, part in maps.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
