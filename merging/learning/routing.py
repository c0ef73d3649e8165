"""Routers of compressed stores, made: from the task vectors alone, or from a few examples of each task.

Both look at the inputs of the same linear maps of the base: those that widen into the MLPs of the last blocks.
Shape suffixes: B examples, F what is seen of one, E experts, M by N a map's weight, k kept directions.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import partial
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Mapping

from mergeline.merging.algebra.directions import rank_for_task
from mergeline.merging.architecture import Role, describe
from mergeline.merging.checkpoints.checkpoint import open_checkpoint
from mergeline.merging.checkpoints.router import ROUTER, Kind, Router, described, layer_inputs, write_router
from mergeline.merging.errors import UserError, did_you_mean
from mergeline.merging.lazy import torch
from mergeline.merging.learning.contract import Job
from mergeline.merging.learning.corrections import expert_folder, load
from mergeline.merging.methods.contract import get_method
from mergeline.merging.recipes.recipe import Recipe

if TYPE_CHECKING:
    from torch import Tensor, nn

    from mergeline.merging.methods.parameters import TaskRank

_WIDENING = (Role.MLP_UP, Role.MLP_GATE, Role.MLP_GATE_UP)


def store_recipe(job: Job, inner: str, params: Mapping[str, object], router: Router) -> Recipe:
    """The recipe of a store by the method `inner`, with a router that is written into the job's folder.

    Raises:
        UserError: the method keeps no store.
    """
    path = job.folder / ROUTER
    write_router(path, router)
    written = {**job.recipe.model_dump(), "method": inner, "params": dict(params), "router": path}
    return Recipe.of(written)


def check_store(inner: str, params: Mapping[str, object]) -> None:
    """Raises UserError unless `inner` is a method of compressed stores, and its parameters are right."""
    from mergeline.merging.compress import stores

    if inner not in stores():
        near = did_you_mean(inner, stores())
        raise UserError(
            f"inner: '{inner}' keeps no store of experts{near}; choose one of {', '.join(stores())}"
        )
    get_method(inner).resolve(params)


def by_residual(job: Job, rank: TaskRank, blocks: int) -> Router:
    """The router that needs no examples: bases of what each task vector takes in, (E, k, N) a layer."""
    names = _layers(job, blocks)
    base = open_checkpoint(_base(job))
    experts = [open_checkpoint(expert_folder(job, name)) for name in job.recipe.experts]
    tensors = {}
    for layer, name in names.items():
        origin_MN = base.read(name).double()
        k = max(1, rank_for_task(rank, origin_MN.shape, len(experts)))
        bases = [_taken_in(expert.read(name).double() - origin_MN, k) for expert in experts]
        tensors[f"{layer}/basis"] = torch.stack(bases)
    return _router(job, "residual", names, tensors)


def _taken_in(tau_MN: Tensor, k: int) -> Tensor:
    """The k leading right singular vectors of a task vector, (k, N)."""
    _, q_NN = torch.linalg.eigh(tau_MN.T @ tau_MN)
    return q_NN[:, -k:].T.flip(0).contiguous()


def by_features(job: Job, ridge: float, blocks: int) -> Router:
    """The linear discriminant of the experts' tasks: one covariance for all, its diagonal raised by the share `ridge`.

    Every expert counts equally. Scores are log-likelihoods but for a term that all share.
    """
    names = _layers(job, blocks)
    load(job, _base(job))
    seen = {expert: _seen(job, expert, list(names)) for expert in job.recipe.experts}
    mean_EF = torch.stack([x_BF.mean(0) for x_BF in seen.values()])
    centred = [(x_BF - x_BF.mean(0)) / len(x_BF) ** 0.5 for x_BF in seen.values()]
    covariance_FF = sum((x_BF.T @ x_BF for x_BF in centred), torch.zeros(())) / len(centred)
    spread_F = covariance_FF.diagonal()
    covariance_FF.diagonal().add_(ridge * spread_F + 1e-6 * spread_F.mean())
    weight_EF = torch.linalg.solve(covariance_FF, mean_EF.T).T
    offset_E = -0.5 * (weight_EF * mean_EF).sum(1)
    return _router(job, "features", names, {"weight": weight_EF, "offset": offset_E})


@dataclass(frozen=True)
class Training:
    """How a network is trained: AdamW on batches of `batch`, `epochs` over all examples but the share `held_out`."""

    width: int
    dropout: float
    rate: float
    epochs: int
    batch: int
    held_out: float

    @property
    def every(self) -> int:
        """Which of the examples of an expert is held out: every second or a later one."""
        return max(2, round(1 / self.held_out))


def by_network(job: Job, blocks: int, training: Training) -> Router:
    """The network of Twin-Merging: three linear maps, batch normalisation, leaky ReLU and dropout between them.

    The epoch of the least cross-entropy on held-out examples is kept, its normalisation folded into the maps.

    Raises:
        UserError: too few examples; a loss that is not finite.
    """
    names = _layers(job, blocks)
    load(job, _base(job))
    seen = [_seen(job, expert, list(names)).float() for expert in job.recipe.experts]
    for expert, x_BF in zip(job.recipe.experts, seen):
        if len(x_BF) < 2 * training.every:
            raise UserError(
                f"'{expert}' has {len(x_BF)} examples, too few for a router that is trained; bring "
                f"{2 * training.every} or more, or take routed_by_features"
            )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(job.recipe.seed)
        return _router(job, "network", names, _folded(_trained(seen, training)))


def _trained(seen: list[Tensor], training: Training) -> nn.Sequential:
    """The network at its best epoch, in eval mode. seen: of each expert, (B, F)."""
    from torch.nn import functional

    held = [[i % training.every == 0 for i in range(len(x_BF))] for x_BF in seen]
    held_B = torch.tensor([is_held for each in held for is_held in each])
    x_BF, expert_B = torch.cat(seen), torch.cat([torch.full((len(x),), e) for e, x in enumerate(seen)])
    inputs, hidden = x_BF.shape[1], training.width * x_BF.shape[1]
    network = torch.nn.Sequential()
    for i, (n, m) in enumerate([(inputs, hidden), (hidden, hidden), (hidden, len(seen))]):
        network.append(torch.nn.Linear(n, m))
        if i < 2:
            network.extend(
                [torch.nn.BatchNorm1d(m), torch.nn.LeakyReLU(), torch.nn.Dropout(training.dropout)]
            )
    optimiser = torch.optim.AdamW(network.parameters(), lr=training.rate, foreach=False)
    own_BF, own_B = x_BF[~held_B], expert_B[~held_B]
    best, kept = float("inf"), copy.deepcopy(network.state_dict())
    for epoch in range(training.epochs):
        network.train()
        for which in torch.randperm(len(own_B)).split(training.batch):
            if len(which) > 1:  # batch normalisation has no variance of one
                optimiser.zero_grad()
                functional.cross_entropy(network(own_BF[which]), own_B[which]).backward()
                optimiser.step()
        network.eval()
        with torch.no_grad():
            loss = float(functional.cross_entropy(network(x_BF[held_B]), expert_B[held_B]))
        if not isfinite(loss):
            raise UserError(f"the router's loss of epoch {epoch + 1} is not finite; lower the rate")
        if loss < best:
            best, kept = loss, copy.deepcopy(network.state_dict())
    network.load_state_dict(kept)
    return network.eval()


def _folded(network: nn.Sequential) -> dict[str, Tensor]:
    """The weights and biases of the linear maps, each with the batch normalisation after it."""
    tensors: dict[str, Tensor] = {}
    for part in network:
        if isinstance(part, torch.nn.Linear):
            i = len(tensors) // 2
            weight_MN, bias_M = part.weight.detach().double(), part.bias.detach().double()
        elif isinstance(part, torch.nn.BatchNorm1d):
            assert part.running_mean is not None and part.running_var is not None
            scale_M = part.weight.detach().double() / (part.running_var.double() + part.eps).sqrt()
            bias_M = scale_M * (bias_M - part.running_mean.double()) + part.bias.detach().double()
            weight_MN = scale_M[:, None] * weight_MN
        else:
            continue
        tensors |= {f"{i}/weight": weight_MN, f"{i}/bias": bias_M}
    return tensors


def _seen(job: Job, expert: str, layers: list[str]) -> Tensor:
    """What a discriminant sees of the examples of an expert's tasks: float64 (B, F)."""
    found = []
    for task in job.examples.tasks_of(expert):
        for batch in job.examples.of(task):
            with torch.no_grad():
                run = partial(job.network.features, batch)
                inputs = layer_inputs(job.network.module, layers, run)
            found.append(described(inputs).cpu())
    return torch.cat(found)


def _layers(job: Job, blocks: int) -> dict[str, str]:
    """The linear maps into the MLPs of the last blocks: names of weights in the checkpoint, by those of the modules.

    Raises:
        UserError: the model has none.
    """
    prefix, modules = job.network.prefix, dict(job.network.module.named_modules())
    base = open_checkpoint(_base(job))
    model = describe({name: info.shape for name, info in base.tensors.items()})
    found: dict[int, tuple[str, str]] = {}
    for name, tensor in model.tensors.items():
        layer = job.network.inside(name).removesuffix(".weight")
        if not name.startswith(prefix) or tensor.role not in _WIDENING or tensor.layer is None:
            continue
        if isinstance(modules.get(layer), torch.nn.Linear):
            found.setdefault(tensor.layer, (layer, name))
    if not found:
        raise UserError("the model has no MLPs in numbered blocks, whose inputs a router could look at")
    return dict(found[number] for number in sorted(found)[-blocks:])


def _router(job: Job, kind: Kind, names: Mapping[str, str], tensors: Mapping[str, Tensor]) -> Router:
    digest = open_checkpoint(_base(job)).digest()
    return Router(kind, list(job.recipe.experts), digest, list(names), tensors)


def _base(job: Job) -> Path:
    assert job.recipe.base is not None, "fit has checked it"
    return job.recipe.base
