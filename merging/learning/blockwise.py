"""Coefficients fitted block by block, until each block of the merge gives what every expert's own block does.

Two streams of every example stand before each block: of its task's expert, and of the merged model. The block's
coefficients are fitted so that it turns the second into what the expert's block makes of the first; then both go on.
Of one block at a time the task vectors, coefficients and their moments are in memory.

Shape suffixes: T experts, X a tensor.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from math import isfinite
from typing import TYPE_CHECKING, Any, Literal, Mapping, Sequence

from mergeline.merging.algebra import draws
from mergeline.merging.engine.work import Count
from mergeline.merging.errors import UserError
from mergeline.merging.files import write_json
from mergeline.merging.lazy import torch
from mergeline.merging.learning.contract import Job
from mergeline.merging.learning.descent import CURVE
from mergeline.merging.learning.directions import Directions, Inputs
from mergeline.merging.learning.pool import Pool
from mergeline.merging.learning.spaces import SOLVED, fitted_tensors, load_tensors, merged_by, write_tensors
from mergeline.merging.learning.stages import Stage, Stream, stages_of
from mergeline.merging.recipes.recipe import Recipe

if TYPE_CHECKING:
    from torch import Tensor

Granularity = Literal["taskwise", "layerwise", "elementwise"]
Streams = dict[str, list[Stream]]  # of each task's batches

_STAGES = "stages"
_ALL = "all"  # of taskwise coefficients


@dataclass(frozen=True)
class Settings:
    """How the coefficients of a block are fitted.

    granularity: whether one is of an expert's block, of a tensor in it, or of an entry. initial: of every coefficient,
    and of what lies outside of blocks. rate: of Adam. epochs: passes over the examples. batch: examples of a task in a
    step.
    """

    granularity: Granularity
    initial: float
    rate: float
    epochs: int
    batch: int


def distilled(job: Job, settings: Settings) -> Recipe:
    """Fit the blocks of base + sum of coefficient * task vector, in order; a block that was finished stays.

    Raises:
        UserError: a loss that is not finite.
    """
    with Inputs(job.recipe, job.device) as inputs:
        fit = _Fit(job, inputs, settings)
        fit.run()
        return fit.recipe()


class _Block:
    """The coefficients of a block: `numbers`, leaves (T, or T and X)."""

    def __init__(self, base: dict[str, Tensor], taus: dict[str, list[Tensor]], settings: Settings):
        self._base, self._taus, self._by = base, taus, settings.granularity
        self.numbers: dict[str, Tensor] = {}
        for name, tau_TX in taus.items():
            shape = tau_TX[0].shape if self._by == "elementwise" else ()
            start = torch.full((len(tau_TX), *shape), settings.initial).to(base[name])
            self.numbers.setdefault(self.key(name), start.requires_grad_())

    def key(self, name: str) -> str:
        """Of the numbers that multiply the task vectors of a tensor."""
        return _ALL if self._by == "taskwise" else name

    def put(self, own: Mapping[str, Tensor]) -> None:
        """Give the network the weights that the numbers stand for."""
        with torch.no_grad():
            for name, tau_TX in self._taus.items():
                own[name].copy_(self._base[name])
                for number, tau_X in zip(self.numbers[self.key(name)], tau_TX):
                    own[name].addcmul_(number, tau_X)

    def pull(self, own: Mapping[str, Tensor]) -> None:
        """The derivatives by the numbers, from those of the weights."""
        for number in self.numbers.values():
            number.grad = torch.zeros_like(number)
        for name, tau_TX in self._taus.items():
            gradient_X, slopes = own[name].grad, self.numbers[self.key(name)].grad
            assert slopes is not None
            if gradient_X is None:
                continue
            for slope, tau_X in zip(slopes, tau_TX):
                found_X = gradient_X * tau_X
                slope += found_X if self._by == "elementwise" else found_X.sum()


class _Fit:
    """One pass over the blocks; `found`: their coefficients, or, where each entry has its own, their weights."""

    def __init__(self, job: Job, inputs: Inputs, settings: Settings):
        self._job, self._inputs, self._settings = job, inputs, settings
        self._network, self._own = job.network, job.network.tensors()
        self._views = {view.name: view for view in inputs.views() if view.name in self._own}
        self._owners = {t: expert for expert in inputs.experts for t in job.examples.tasks_of(expert)}
        self.found: dict[str, Tensor] = {}
        self._curve: list[dict[str, Any]] = []
        self._total = self._done = 0

    @property
    def _elementwise(self) -> bool:
        return self._settings.granularity == "elementwise"

    def run(self) -> None:
        s, seed = self._settings, self._job.recipe.seed
        with torch.no_grad():
            self._begin()
            merged = {task: self._batches(Pool(task, self._job.examples, seed)) for task in self._owners}
            experts = {task: list(streams) for task, streams in merged.items()}
            stages = stages_of(self._network, next(iter(merged.values()))[0].batch)
        blocks = stages[1:-1] or stages
        self._total = len(blocks) * s.epochs * max(map(len, merged.values()))
        for k, stage in enumerate(stages[:-1] or stages):
            with torch.no_grad():
                self._advance_experts(stage, experts)
            if stage in blocks:
                self._block(k, stage, merged, experts)
            with torch.no_grad():
                for task, streams in merged.items():
                    merged[task] = [_detached(stage.run(stream)) for stream in streams]

    def _begin(self) -> None:
        """base + initial * sum of task vectors in the network."""
        self._inputs.load_start(self._network)
        fitted_tensors(self._network, [])
        for name in self._views:
            base_X, tau_TX = self._read(name)
            self._own[name].copy_(base_X)
            for tau_X in tau_TX:
                self._own[name].add_(tau_X, alpha=self._settings.initial)

    def _read(self, name: str) -> tuple[Tensor, list[Tensor]]:
        """A tensor of the base (X), and the experts' task vectors, as the network has it."""
        read = partial(self._inputs.read_like, self._own[name], self._views[name])
        base_X = read("base")
        return base_X, [read(expert).sub_(base_X) for expert in self._inputs.experts]

    def _batches(self, pool: Pool) -> list[Stream]:
        """The examples of a task in batches, which stay together from here on."""
        return [Stream(pool.batch(which)) for which in pool.cut(self._settings.batch)]

    def _advance_experts(self, stage: Stage, experts: Streams) -> None:
        kept = {name: self._own[name].clone() for name in stage.tensors}
        for expert in self._inputs.experts:
            self._inputs.load(self._network, expert, stage.tensors)
            for task in self._job.examples.tasks_of(expert):
                experts[task] = [_detached(stage.run(stream)) for stream in experts[task]]
        self._network.load(kept)

    # ------------------------------------------------------------------------------------------ one block

    def _block(self, k: int, stage: Stage, merged: Streams, targets: Streams) -> None:
        """Fit a block, or take what was kept of it; leaves the network with its weights."""
        path, rows = self._job.folder / _STAGES / f"{k:04d}.safetensors", self._job.folder / CURVE
        names = [name for name in stage.tensors if name in self._views]
        held = {name: self._read(name) for name in names}
        block = _Block(
            {n: base for n, (base, _) in held.items()}, {n: t for n, (_, t) in held.items()}, self._settings
        )
        if path.is_file():
            kept = [row for row in json.loads(rows.read_bytes()) if row["block"] == stage.name]
            self._curve += kept
            self._done += self._settings.epochs * max(map(len, merged.values()))
        else:
            fitted_tensors(self._network, names)
            self._fit(stage, block, merged, targets)
            fitted_tensors(self._network, [])
            write_json(rows, self._curve)
            weights = {name: self._own[name] for name in names}
            write_tensors(
                path, weights if self._elementwise else {n: block.numbers[block.key(n)] for n in names}
            )
        # In both cases what the file holds goes on, so that a fit that was killed is the same.
        found = load_tensors(path)
        self.found |= found
        if self._elementwise:
            self._network.load({name: value.to(self._own[name]) for name, value in found.items()})
        else:
            for name, value in found.items():
                block.numbers[block.key(name)].data.copy_(value)
            block.put(self._own)

    def _fit(self, stage: Stage, block: _Block, merged: Streams, targets: Streams) -> None:
        s = self._settings
        optimiser = torch.optim.Adam(list(block.numbers.values()), lr=s.rate, foreach=False)
        steps = max(map(len, merged.values()))
        for epoch in range(s.epochs):
            orders = {task: self._order(stage, epoch, task, len(streams)) for task, streams in merged.items()}
            total = 0.0
            for step in range(steps):
                block.put(self._own)
                for tensor in self._own.values():
                    tensor.grad = None
                for task, order in orders.items():
                    if step < len(order):
                        stream, target = merged[task][order[step]], targets[task][order[step]]
                        total += self._backward(stage, epoch, task, stream, target)
                block.pull(self._own)
                optimiser.step()
                self._done += 1
                if self._job.progress is not None:
                    self._job.progress(Count.of(self._done, 0), Count.of(self._total, 0))
            self._curve.append({"step": self._done, "block": stage.name, "loss": total})
        block.put(self._own)
        for tensor in self._own.values():
            tensor.grad = None

    def _backward(self, stage: Stage, epoch: int, task: str, stream: Stream, target: Stream) -> float:
        """The sum of squares by which a batch misses the expert's."""
        found, wanted = stage.run(stream).hidden, target.hidden
        assert found is not None and wanted is not None
        loss = (found - wanted).square().sum()
        if not isfinite(float(loss.detach())):
            raise UserError(
                f"the loss of '{task}' in '{stage.name}' at epoch {epoch} is {float(loss.detach())}; the blocks before "
                f"are in {self._job.folder}; try a smaller rate"
            )
        loss.backward()
        return float(loss.detach())

    def _order(self, stage: Stage, epoch: int, task: str, count: int) -> Sequence[int]:
        u = draws.uniform(self._job.recipe.seed, f"order of {stage.name} {epoch}", task, 0, count)
        return u.argsort(stable=True).tolist()

    # ------------------------------------------------------------------------------------------ the result

    def recipe(self) -> Recipe:
        recipe, s = self._job.recipe, self._settings
        if self._elementwise:
            file = self._job.folder / SOLVED
            write_tensors(file, self.found)
            return merged_by(
                recipe, "solved", {"inner": "task_arithmetic", "scale": s.initial}, {"solved": file}
            )
        directions = Directions(self._inputs, self._network, self._job.folder, {"initial": s.initial})
        pieces = [piece for piece in directions.pieces if piece.tensor in self.found]
        file = self._job.folder / "coefficients.safetensors"
        write_tensors(file, {piece.name: self.found[piece.tensor][:, None] for piece in pieces})
        return merged_by(recipe, "weighted", directions.params, {"coefficients": file})


def _detached(stream: Stream) -> Stream:
    return stream if stream.hidden is None else stream.moved(stream.hidden.detach())
