"""The search step: try settings of a merge, score each on the validation split, take the best.

Settings are those of a grid, or what a sampler proposes within a budget (tasks/budget_search.py).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Iterator, Mapping

from mergeline.evaluation.measures import Measures
from mergeline.evaluation.state import load_state
from mergeline.merging.api import merge, merge_points, merge_state_dicts_points
from mergeline.merging.engine.cache import FolderStore
from mergeline.merging.engine.machine import one_thread
from mergeline.merging.files import staged, write_json
from mergeline.merging.sweep import in_batches
from mergeline.tasks.budget_search import search_within
from mergeline.tasks.collect import statistics_for
from mergeline.tasks.evaluate import mean_outcomes
from mergeline.tasks.evaluations import Evaluations
from mergeline.tasks.fit import fitted_recipe
from mergeline.tasks.merge import recipe_of
from mergeline.tasks.progress import counting, said_of_stage

if TYPE_CHECKING:
    from torch import Tensor

    from mergeline.tasks.modality import Modality, Model
    from mergeline.tasks.schema import Merge, Params

_MERGED_BYTES = 1 << 29  # of merged models in memory at a time
_MERGED_FILES = 8  # merged models on the disk at a time

Points = list[dict[str, Any]]
State = dict[str, "Tensor"]
Merging = Callable[[str, Points], Iterator[tuple[int, "Model"]]]


def search(
    modality: Modality,
    params: Params,
    name: str,
    build: Path,
    out: Path,
    *,
    factors: Path,
    scratch: Path,
) -> None:
    """Write the mean validation score of every point of a merge's search, and the best setting, to the JSON file `out`.

    The test split is never read, nor are examples of val that the merge was fitted to. Of equal points the first is
    taken. Without a search there is nothing to score.
    `factors` is a folder that keeps spectral decompositions for other searches and merges, `scratch` a place for models
    that are merged to the disk.

    Raises:
        UserError: as `merging.merge_state_dicts`; a base of a kind that is not measured.
    """
    grid = params.all_merges[name]
    points = list(grid.points)
    base = build / "checkpoints" / params.base
    modality.check(base)
    fits = build / "fits" / name
    if grid.within:
        merged = merging_of(modality, params, name, build, factors, scratch)
        write_json(out, search_within(modality, params, name, build, merged))
        return
    measures = Measures(modality.measures(params))
    scores: dict[int, dict[str, Any]] = {}
    outcomes: dict[int, float] = {}
    looks = params.looks(name)
    if grid.grid:
        evaluator = Evaluations(modality, params, build, base)
        if grid.is_learned:
            models = _fitted(fits, points, factors, scratch, params)
        else:
            models = merging_of(modality, params, name, build, factors, scratch)(grid.method, points)
        with counting("points") as count:
            for i, model in models:
                with one_thread():
                    found = evaluator.evaluate(model, ("val",), params.tasks)
                means = mean_outcomes(modality, build, found, "val", held_back=looks)
                outcomes[i] = sum(means.values()) / len(means)
                tasks = {task: measures.of(task).turned(mean) for task, mean in means.items()}
                scores[i] = {"mean": measures.mean.turned(outcomes[i]), "tasks": tasks}
                count(len(scores), len(points))
        said_of_stage(evaluator.told(len(points), "points"))
    scored = [{"params": points[i], **scores[i]} for i in sorted(scores)]
    best = points[max(sorted(outcomes), key=outcomes.__getitem__)] if outcomes else points[0]
    write_json(out, {"method": grid.method, "points": scored, "chosen": best})


def merging_of(
    modality: Modality, params: Params, name: str, build: Path, factors: Path, scratch: Path
) -> Merging:
    """What merges points of a method in the place of a merge: gives each one's index and merged model."""
    own = params.all_merges[name]
    if modality.in_memory and not own.in_recipe:
        recipe = params.recipe(name, build, [])
        loaded = _loaded(own, recipe["base"], recipe["experts"])

        def merging(method: str, points: Points) -> Iterator[tuple[int, Model]]:
            return _in_memory(method, points, *loaded, recipe["experts"], build, factors, params.seed)

    else:
        recipe = recipe_of(params, name, build, modality.heads(params, build))

        def merging(method: str, points: Points) -> Iterator[tuple[int, Model]]:
            return _on_disk(points, {**recipe, "method": method}, build, factors, scratch, params.device)

    return merging


def _loaded(merge: Merge, base: Path, experts: Mapping[str, Path]) -> tuple[dict[str, State], State]:
    """The tensors of experts and base."""
    states = {name: load_state(folder) for name, folder in experts.items()}
    if merge.takes:  # as in `recipe_of`
        common = set.intersection(*(set(state) for state in states.values()))
        states = {name: {t: state[t] for t in state if t in common} for name, state in states.items()}
    return states, load_state(base)


def _in_memory(
    method: str,
    points: Points,
    states: Mapping[str, State],
    reference: State,
    experts: Mapping[str, Path],
    build: Path,
    factors: Path,
    seed: int,
) -> Iterator[tuple[int, Model]]:
    """Each point's index and merged model; as many are in memory as have room."""
    size = sum(tensor.nbytes for tensor in next(iter(states.values())).values())
    for batch, files in _batches(method, points, max(1, _MERGED_BYTES // size), build, experts):
        with one_thread():
            merged = merge_state_dicts_points(
                method,
                states,
                reference,
                points=[points[i] for i in batch],
                statistics={kind: [load_state(file) for file in each] for kind, each in files.items()},
                seed=seed,
                factors=FolderStore(factors),
            )
        yield from zip(batch, merged)
        del merged  # before the next batch is there


def _fitted(
    fits: Path, points: Points, factors: Path, scratch: Path, params: Params
) -> Iterator[tuple[int, Model]]:
    """Each point's index and the folder of what the recipe that was fitted there makes."""
    for i, point in enumerate(points):
        with staged(scratch) as place:
            recipe = fitted_recipe(fits, point)
            assert recipe
            merge(recipe, place / str(i), device=params.device, workers=1, factors=factors)
            yield i, place / str(i)


def _on_disk(
    points: Points,
    recipe: Mapping[str, Any],
    build: Path,
    factors: Path,
    scratch: Path,
    device: str,
) -> Iterator[tuple[int, Model]]:
    """Each point's index and the folder of its merged model, which may be larger than memory; a few at a time."""
    for batch, files in _batches(recipe["method"], points, _MERGED_FILES, build, recipe["experts"]):
        with staged(scratch) as place:
            point = {**recipe, "statistics": files}
            recipes = [({**point, "params": points[i]}, place / str(i)) for i in batch]
            merge_points(recipes, device=device, workers=1, factors=factors)
            yield from ((i, place / str(i)) for i in batch)


def _batches(
    method: str, points: Points, most: int, build: Path, experts: Mapping[str, Path]
) -> Iterator[tuple[list[int], dict[str, list[Path]]]]:
    """The indexes of points in batches, those of each of which read the same statistics, and the files of these."""
    groups: dict[tuple[str, ...], list[int]] = {}
    files = [statistics_for(method, point, build, experts) for point in points]
    for i, found in enumerate(files):
        groups.setdefault(tuple(found), []).append(i)
    for group in groups.values():
        for batch in in_batches(method, [points[i] for i in group], most):
            yield [group[i] for i in batch], files[group[0]]
