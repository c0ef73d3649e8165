"""The evaluator of image models: the image tower of the base with the heads and data of a workspace."""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Iterator, Mapping, Sequence

from mergeline.evaluation.state import load_state
from mergeline.merging.errors import UserError
from mergeline.tasks.clip import places
from mergeline.tasks.data_step import dataset
from mergeline.tasks.modality import Evaluation, Model
from mergeline.tasks.progress import adding

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from mergeline.evaluation.clip.zero_shot import Evaluator
    from mergeline.merging.checkpoints.task_adapters import TaskAdapter
    from mergeline.tasks.schema import Params


class ClipEvaluator:
    """Answers are classes, int32 (N).

    A merge with adapters of tasks is corrected by them. Of a compressed store with a router, every image is given to
    the expert that the router finds, and has an answer of -1 where that one is of another task than the image. Where
    experts add to linear maps token by token (smile), every image is run through the one model.

    base: the folder that routers look at. owners: task -> the expert that is held in for it.
    """

    def __init__(self, evaluator: Evaluator, base: Path, owners: Mapping[str, str], device: str = "cpu"):
        self._evaluator, self._base, self._owners, self._device = evaluator, base, owners, device

    def evaluate(self, model: Model, splits: Sequence[str], tasks: Sequence[str]) -> Evaluation:
        from mergeline.merging.checkpoints.task_adapters import task_adapters
        from mergeline.merging.compress import is_store

        total = sum(len(self._evaluator.data[task].split(split)[1]) for split in splits for task in tasks)
        with adding("examples", total) as more:
            if isinstance(model, Path) and is_store(model):
                return self._of_store(model, splits, tasks, more)
            state = load_state(model) if isinstance(model, Path) else model
            adapters = task_adapters(model) if isinstance(model, Path) else {}
            if any(adapter.kind == "smile" for adapter in adapters.values()):
                return self._of_upscaled(state, adapters, splits, tasks, more)
            found = {split: self._evaluator.predict(state, split, tasks, more, adapters) for split in splits}
        scores: dict[str, Any] = {}
        if adapters:
            kinds = sorted({adapter.kind for adapter in adapters.values()})
            nbytes = sum(adapter.nbytes for adapter in adapters.values())
            scores["at_use"] = {"task": "known", "how": ", ".join(kinds), "passes": 1, "bytes": nbytes}
        return Evaluation(_answers(found), scores)

    def count(self, split: str, task: str) -> int:
        return len(self._evaluator.data[task].split(split)[1])

    def evaluate_part(self, model: Model, split: str, part: Mapping[str, np.ndarray]) -> Evaluation:
        import numpy as np

        from mergeline.merging.checkpoints.task_adapters import task_adapters
        from mergeline.merging.compress import is_store

        if isinstance(model, Path) and (is_store(model) or task_adapters(model)):
            return self.evaluate(model, [split], [*part])
        state = load_state(model) if isinstance(model, Path) else model
        with adding("examples", sum(map(len, part.values()))) as more:
            found = self._evaluator.predict(state, split, [*part], more, part=part)
        answers = {task: np.full(self.count(split, task), -1, np.int32) for task in part}
        for task, where in part.items():
            answers[task][where] = found[task]
        return Evaluation(_answers({split: answers}), {})

    def _of_upscaled(
        self,
        state: Mapping[str, Tensor],
        adapters: Mapping[str, TaskAdapter],
        splits: Sequence[str],
        tasks: Sequence[str],
        more: Callable[[int], None],
    ) -> Evaluation:
        """Experts are chosen token by token; each image is told apart by its own task's classes, as of plain merges."""
        from mergeline.merging.checkpoints.upscaling import Upscaled

        if other := [adapter for adapter in adapters.values() if adapter.kind != "smile"]:
            raise UserError(
                f"{other[0].file}: is of another kind than those beside it; fit them together again"
            )
        upscaled = Upscaled({task: adapter.tensors for task, adapter in adapters.items()}, self._device)
        found, right = {}, {}
        for split in splits:
            route: dict[str, float] = {}

            @contextmanager
            def around(tower: Any, task: str, route: dict[str, float] = route) -> Iterator[None]:
                with upscaled.inside(tower) as chosen:
                    yield
                if task in upscaled.tasks:
                    route[task] = float(chosen[upscaled.tasks.index(task)] / chosen.sum())

            found[split] = self._evaluator.predict(state, split, tasks, more, around=around)
            right[split] = route
        at_use = {
            "task": "found",
            "how": "smile",
            "passes": upscaled.passes,
            "bytes": upscaled.nbytes,
            "route": right,  # of tokens, over all linear maps
        }
        return Evaluation(_answers(found), {"at_use": at_use})

    def _of_store(
        self, store: Path, splits: Sequence[str], tasks: Sequence[str], more: Callable[[int], None]
    ) -> Evaluation:
        from mergeline.evaluation.clip.zero_shot import build_tower
        from mergeline.merging.checkpoints.checkpoint import open_checkpoint
        from mergeline.merging.checkpoints.router import ROUTER, read_router
        from mergeline.merging.compress import CompressedStore, expert_state

        experts = CompressedStore(store).header.experts
        if not (store / ROUTER).is_file():
            raise UserError(
                f"{store}: is a compressed store without a router; measure what `mergeline extract-expert` gives "
                "back, or make it by routed_by_residual"
            )
        router = read_router(store / ROUTER, experts)
        if open_checkpoint(self._base).digest() != router.base:
            raise UserError(f"{router.file}: was made for another base ({router.base}); fit it again")
        heads = {expert: task for task, expert in self._owners.items()}
        if ownerless := [*(set(tasks) - self._owners.keys()), *(set(experts) - heads.keys())]:
            raise UserError(
                f"'{ownerless[0]}' has no expert, or no task, of its own; a routed store is measured where each task "
                "has one"
            )
        tower, _ = build_tower(self._base, self._device)
        states = [partial(expert_state, store, expert, base=self._base) for expert in experts]
        found, right = {}, {}
        for split in splits:
            routes = self._evaluator.routes(tower, router, split, tasks)
            owners = [heads[expert] for expert in experts]
            found[split] = self._evaluator.predict_routed(states, owners, routes, split, more)
            right[split] = {
                task: float((route == experts.index(self._owners[task])).mean())
                for task, route in routes.items()
                if self._owners[task] in experts
            }
        checkpoint = open_checkpoint(store)
        at_use = {
            "task": "found",
            "how": router.kind,
            "passes": 2,  # of the base, which routes, and of the expert
            "bytes": checkpoint.nbytes + router.nbytes,
            "route": right,
        }
        return Evaluation(_answers(found), {"at_use": at_use})


def _answers(found: Mapping[str, Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {f"{split}/{task}": answers for split, own in found.items() for task, answers in own.items()}


def open_evaluator(params: Params, build: Path, like: Path) -> Evaluator:
    """The image tower of the checkpoint `like` with the heads and data of all tasks.

    Of a compressed store, that of the base.
    """
    from safetensors.torch import load_file

    from mergeline.evaluation.clip.zero_shot import Evaluator
    from mergeline.evaluation.datasets import load
    from mergeline.merging.compress import is_store

    data = {task: load(dataset(build, task)) for task in params.tasks}
    model = build / "checkpoints" / params.base if is_store(like) else like
    return Evaluator(model, load_file(places.heads(build)), data, params.device)
