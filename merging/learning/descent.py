"""Fitting by gradients: seeded, stopped early if asked, kept on disk as it goes, and gone on with if it was killed."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from functools import cached_property
from math import cos, isfinite, pi
from typing import TYPE_CHECKING, Any, Collection, Iterator, Literal, Mapping

from mergeline.merging.canonical import text_digest
from mergeline.merging.engine.machine import workers_of_one_thread
from mergeline.merging.engine.work import Count
from mergeline.merging.errors import UserError
from mergeline.merging.files import write_bytes, write_json
from mergeline.merging.lazy import torch
from mergeline.merging.learning.contract import Job
from mergeline.merging.learning.directions import Inputs
from mergeline.merging.learning.network import Batch, Network, are_small, joined
from mergeline.merging.learning.objectives import Objective, Outputs, Seen
from mergeline.merging.learning.pool import Pool
from mergeline.merging.learning.spaces import Space
from mergeline.merging.learning.teachers import SIDE_BY_SIDE, Teachers, outputs_of

if TYPE_CHECKING:
    from torch import Tensor

Optimiser = Literal["adam", "lbfgs"]

_STATE, CURVE = "fit.state", "curve.json"


@dataclass(frozen=True)
class Schedule:
    """How a fit goes.

    batch: units of each task in a step, of which `micro` batches are summed. rate: of the optimiser, after `warmup`
    steps; with `cosine`, it falls to that share of itself. even_rate: of steps 0, 2, ..., where it is another.
    optimiser: `lbfgs` sees all units in each step, a batch at a time, and needs no rate: its lines are searched. clip:
    the largest norm of the gradient. held_out: the share of the examples on which agreement with the task's own expert
    is measured every `check` steps, which stops a fit that was no better for `patience` checks, and takes the best; 0
    runs all steps and takes the last. keep: seconds between states on the disk.
    """

    steps: int
    batch: int
    rate: float
    optimiser: Optimiser | Literal["adamw"] = "adam"
    micro: int = 1
    decay: float = 0.0
    warmup: int = 0
    cosine: float | None = None
    even_rate: float | None = None
    clip: float | None = None
    held_out: float = 0.0
    check: int = 20
    patience: int = 5
    copies: int = 0
    keep: float = 10.0

    def rate_at(self, step: int) -> float:
        if self.optimiser == "lbfgs":
            return 1.0
        if self.even_rate is not None and step % 2 == 0:
            return self.even_rate
        if step < self.warmup:
            return self.rate * (step + 1) / self.warmup
        if self.cosine is None:
            return self.rate
        place = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.rate * (self.cosine + (1 - self.cosine) * (1 + cos(pi * place)) / 2)


@dataclass(frozen=True)
class _Drawn:
    """A batch of a task: the units that it is of, and what its loss is divided by. labels: whether they are seen."""

    pool: Pool
    which: list[int]
    divisor: float
    labels: bool

    @property
    def task(self) -> str:
        return self.pool.task

    @cached_property
    def batch(self) -> Batch:
        """Made when it is asked for."""
        found = self.pool.batch(self.which)
        return found if self.labels else {key: value for key, value in found.items() if key != "labels"}


def pools_of(job: Job, schedule: Schedule) -> dict[str, Pool]:
    """The examples of the tasks of the experts that are merged."""
    tasks = [task for expert in job.recipe.experts for task in job.examples.tasks_of(expert)]
    return {
        task: Pool(task, job.examples, job.recipe.seed, schedule.held_out, schedule.copies) for task in tasks
    }


class Descent:
    """One fit: what is fitted, to what, and how far it is."""

    def __init__(
        self, job: Job, inputs: Inputs, space: Space, objective: Objective, schedule: Schedule,
        pools: Mapping[str, Pool], teachers: Teachers | None,
    ):  # fmt: skip
        self._job, self._space, self._objective, self._schedule = job, space, objective, schedule
        self._pools, self._teachers = pools, teachers
        self._network: Network = job.network
        self.curve: list[dict[str, Any]] = []
        self._best: tuple[float, dict[str, Tensor]] | None = None
        self._worse = 0
        self._optimiser = self._made_optimiser()
        recipe = [job.recipe.method, job.recipe.params, job.recipe.settings]
        seen = [job.examples.split, dict(job.examples.digests), dict(job.examples.counts), job.examples.first]
        changing = {"keep": None}
        self._key = text_digest([recipe, asdict(schedule) | changing, seen, inputs.contents])

    def _made_optimiser(self) -> Any:
        numbers, s = list(self._space.numbers.values()), self._schedule
        if s.optimiser == "lbfgs":
            return torch.optim.LBFGS(numbers, line_search_fn="strong_wolfe")
        kind = torch.optim.AdamW if s.optimiser == "adamw" else torch.optim.Adam
        return kind(numbers, lr=s.rate, weight_decay=s.decay, foreach=False)

    # ------------------------------------------------------------------------------------------ steps

    def run(self) -> None:
        """Fit, from where a fit that was killed had come to; leaves numbers and network as the result has them.

        Raises:
            UserError: a loss that is not finite; what was kept before stays.
        """
        s, kept = self._schedule, time.monotonic()
        first = self._resumed()
        for step in range(first, s.steps):
            if self._worse > s.patience and s.held_out:
                break
            if s.held_out and step % s.check == 0 and not self._is_checked(step) and not self._checked(step):
                break
            losses = self.loss(step)
            if step == first or time.monotonic() - kept >= s.keep:
                self._keep(step)
                kept = time.monotonic()
            for group in self._optimiser.param_groups:
                group["lr"] = s.rate_at(step)
            if s.clip is not None:
                torch.nn.utils.clip_grad_norm_(list(self._space.numbers.values()), s.clip)
            if s.optimiser == "lbfgs":
                self._optimiser.step(lambda at=step: sum(self.loss(at).values()))
            else:
                self._optimiser.step()
            self.curve.append({"step": step, "loss": sum(losses.values()), "tasks": losses})
            if self._job.progress is not None:
                self._job.progress(Count.of(step + 1, 0), Count.of(s.steps, 0))
        if s.held_out:
            if not self._is_checked(s.steps) and self._worse <= s.patience:
                self._checked(s.steps)
            self._take_best()
        self._space.put(None)
        write_json(self._job.folder / CURVE, self.curve)
        (self._job.folder / _STATE).unlink(missing_ok=True)

    def put(self) -> None:
        """Give the network the weights that the numbers stand for."""
        self._space.put(None)

    def loss(
        self, step: int, keep_gradients: bool = False, tasks: Collection[str] | None = None
    ) -> dict[str, float]:
        """The loss of each task at the numbers of this step, their derivatives in `.grad`.

        Backward goes a task at a time, or a few where their images are small, and then for two such groups side by
        side. keep_gradients: those of the weights stay, too. tasks: only of these.
        """
        self._space.put(step)
        tensors = self._network.tensors()
        for tensor in [*tensors.values(), *self._space.numbers.values()]:
            tensor.grad = None
        losses = {task: 0.0 for task in self._pools if tasks is None or task in tasks}
        leaves = [tensor for tensor in tensors.values() if tensor.requires_grad]
        for groups in self._runs(step, losses):
            for drawn, loss in self._backward(groups, leaves):
                if not isfinite(loss):
                    raise UserError(
                        f"the loss of '{drawn.task}' at step {step} is {loss}; what was kept last is in "
                        f"{self._job.folder}; try a smaller rate"
                    )
                losses[drawn.task] += loss
        penalty = self._space.pull(step)
        for name, tensor in tensors.items():
            if name not in self._space.numbers and not keep_gradients:
                tensor.grad = None
        return losses if penalty is None else losses | {"penalty": float(penalty)}

    def _backward(self, groups: list[list[_Drawn]], leaves: list[Tensor]) -> Iterator[tuple[_Drawn, float]]:
        """Add to the derivatives by `leaves`, of one group after the other, and give each batch's loss."""
        if len(groups) == 1:
            losses = self._losses(groups[0])
            losses.sum().backward()
            yield from zip(groups[0], losses.tolist())
            return

        def slopes(group: list[_Drawn]) -> tuple[Tensor, tuple[Tensor | None, ...]]:
            losses = self._losses(group)
            return losses, torch.autograd.grad(losses.sum(), leaves, allow_unused=True)

        with workers_of_one_thread(SIDE_BY_SIDE) as pool:
            for group, (losses, found) in zip(groups, pool.map(slopes, groups)):
                for leaf, slope in zip(leaves, found):
                    if slope is not None:
                        leaf.grad = slope if leaf.grad is None else leaf.grad.add_(slope)
                yield from zip(group, losses.tolist())

    def _losses(self, group: list[_Drawn]) -> Tensor:
        """The share of each batch in the loss, (batches,)."""
        experts = [self._expert(drawn) for drawn in group]
        return torch.stack([
            self._objective.loss(Seen(self._network, drawn.batch, drawn.task, merged, expert)) / drawn.divisor
            for drawn, merged, expert in zip(group, self._outputs(group), experts)
        ])  # fmt: skip

    def _runs(self, step: int, tasks: Collection[str]) -> Iterator[list[list[_Drawn]]]:
        """The groups of a step: in runs those whose images are small, which two cores share; others each alone."""
        run: list[list[_Drawn]] = []
        for group in self._groups(step, tasks):
            small = SIDE_BY_SIDE > 1 and self._are_small(group)
            if run and not small:
                yield run
                run = []
            run.append(group)
            if not small:
                yield run
                run = []
        if run:
            yield run

    def _groups(self, step: int, tasks: Collection[str]) -> Iterator[list[_Drawn]]:
        """What a step sees of these tasks, by what the network is run on at once."""
        group: list[_Drawn] = []
        for task in tasks:
            pool = self._pools[task]
            for which, divisor in self._drawn(pool, step):
                drawn = _Drawn(pool, which, divisor, self._objective.labels)
                if group and not self._are_small([*group, drawn]):
                    yield group
                    group = []
                group.append(drawn)
        if group:
            yield group

    def _are_small(self, group: list[_Drawn]) -> bool:
        return not self._objective.hidden and are_small([drawn.pool.images(drawn.which) for drawn in group])

    def _drawn(self, pool: Pool, step: int) -> Iterator[tuple[list[int], float]]:
        """The batches of a task in a step, and what the loss of each is divided by."""
        s = self._schedule
        if s.optimiser == "lbfgs":
            for which in pool.cut(s.batch):
                yield which, len(pool.fitted) / len(which)
            return
        for micro in range(s.micro):
            drawn = list(pool.drawn(step * s.micro + micro, s.batch))
            yield from ((which, len(drawn)) for which in drawn)

    def _outputs(self, group: list[_Drawn]) -> list[Outputs]:
        """What the merged model makes of each batch."""
        if len(group) == 1:
            return [outputs_of(self._network, group[0].batch, self._objective.hidden)]
        features = self._network.features(joined([drawn.batch for drawn in group]))
        return [Outputs(rows) for rows in features.split([len(drawn.which) for drawn in group])]

    def _expert(self, drawn: _Drawn) -> Outputs | None:
        """What the task's own expert makes of a batch, if that is asked."""
        if self._teachers is None or not self._objective.expert:
            return None
        return self._teachers.of(drawn.task, drawn.which)

    # ------------------------------------------------------------------------------------------ early stopping

    def agreement(self) -> float:
        """How often the merged model predicts what the task's own expert does, on what is held out, mean over tasks.

        Where models have no logits, the mean cosine of their features.
        """
        assert self._teachers is not None, "experts are asked"
        found = []
        with torch.no_grad():
            for task, pool in self._pools.items():
                agreed = count = 0.0
                for which, batch in pool.all_of(pool.held):
                    merged = outputs_of(self._network, batch, hidden=False)
                    seen = Seen(self._network, batch, task, merged, self._teachers.of(task, which))
                    if self._network.score is None:
                        same = torch.cosine_similarity(merged.features, seen.teacher.features, dim=-1)
                    else:
                        same = (seen.logits.argmax(-1) == seen.teacher_logits.argmax(-1)).double()
                    agreed, count = agreed + float(same.sum()), count + len(same)
                found.append(agreed / count)
        return sum(found) / len(found)

    def _is_checked(self, step: int) -> bool:
        """Whether that was done before a fit was killed."""
        return any(row["step"] == step and "agreement" in row for row in self.curve)

    def _checked(self, step: int) -> bool:
        """Measure agreement at the numbers of this step; whether to go on."""
        self._space.put(None)
        found = self.agreement()
        if self._best is None or found > self._best[0]:
            numbers = {name: number.detach().clone() for name, number in self._space.numbers.items()}
            self._best, self._worse = (found, numbers), 0
        else:
            self._worse += 1
        self.curve.append({"step": step, "agreement": found})
        return self._worse <= self._schedule.patience

    def _take_best(self) -> None:
        assert self._best is not None
        with torch.no_grad():
            for name, value in self._best[1].items():
                self._space.numbers[name].copy_(value)

    # ------------------------------------------------------------------------------------------ on the disk

    def _keep(self, step: int) -> None:
        """Write all that the fit needs to go on at this step, whose loss is finite."""
        from safetensors.torch import save

        tensors: dict[str, Tensor] = {}
        state = _without_tensors(
            {
                "key": self._key,
                "step": step,
                "numbers": {name: number.detach() for name, number in self._space.numbers.items()},
                "optimiser": self._optimiser.state_dict(),
                "curve": self.curve,
                "best": self._best,
                "worse": self._worse,
            },
            tensors,
        )
        write_bytes(self._job.folder / _STATE, save(tensors, {"state": json.dumps(state)}), lasting=False)

    def _resumed(self) -> int:
        """The step that was kept last, with what was kept taken over; 0 if nothing was."""
        from safetensors import SafetensorError, safe_open

        path = self._job.folder / _STATE
        if not path.is_file():
            return 0
        try:
            with safe_open(path, framework="pt") as file:
                # Copies, which lie as torch lays tensors: the last bits of a sum depend on where it begins.
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
                state = _with_tensors(json.loads(file.metadata()["state"]), tensors)
        except (SafetensorError, OSError, ValueError, KeyError, TypeError):
            return 0  # a file that a power cut left is no state: the fit begins anew
        if state.get("key") != self._key:
            return 0
        with torch.no_grad():
            for name, value in state["numbers"].items():
                self._space.numbers[name].copy_(value)
        self._optimiser.load_state_dict(state["optimiser"])
        self.curve, self._best, self._worse = state["curve"], state["best"], state["worse"]
        return int(state["step"])


def _without_tensors(value: Any, tensors: dict[str, Tensor]) -> Any:
    """A nested value as JSON, its tensors moved to `tensors`; of mappings whose keys are no texts, too."""
    if isinstance(value, torch.Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().cpu().contiguous()
        return {"tensor": name}
    if isinstance(value, Mapping):
        return {"items": [[key, _without_tensors(part, tensors)] for key, part in value.items()]}
    if isinstance(value, list | tuple):
        return [_without_tensors(part, tensors) for part in value]
    return value


def _with_tensors(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """What `_without_tensors` was given; tuples are lists."""
    if isinstance(value, list):
        return [_with_tensors(part, tensors) for part in value]
    if isinstance(value, dict):
        if "tensor" in value:
            return tensors[value["tensor"]]
        return {key: _with_tensors(part, tensors) for key, part in value["items"]}
    return value
