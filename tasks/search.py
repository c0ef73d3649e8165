"""The search step: try settings of a merge, score each on the validation split, take the best.

Settings are those of a grid, or what a sampler proposes within a budget (tasks/budget_search.py).
"""

from __future__ import annotations

from concurrent.futures import Executor, as_completed
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Iterator, Mapping, NamedTuple, Sequence

from mergeline.evaluation.measures import Measures
from mergeline.evaluation.state import load_state
from mergeline.merging.api import merge, merge_points, merge_state_dicts_points
from mergeline.merging.engine.cache import FolderStore
from mergeline.merging.engine.elsewhere import stopped_together
from mergeline.merging.engine.machine import one_thread
from mergeline.merging.files import staged, write_json
from mergeline.merging.sweep import in_batches
from mergeline.tasks import spread
from mergeline.tasks.budget_search import search_within
from mergeline.tasks.collect import statistics_for
from mergeline.tasks.evaluate import mean_outcomes
from mergeline.tasks.evaluations import Evaluations
from mergeline.tasks.fit import fitted_recipe
from mergeline.tasks.merge import recipe_of
from mergeline.tasks.modalities import modality_of
from mergeline.tasks.progress import counting, said_of_stage

if TYPE_CHECKING:
    from torch import Tensor

    from mergeline.tasks.modality import Modality, Model
    from mergeline.tasks.schema import Merge, Params

_MERGED_BYTES = 1 << 29  # of merged models in memory at a time
_MERGED_FILES = 8  # merged models on the disk at a time
_UNITS = 24  # in which the points of a grid are sent to workers, who make an evaluator for each

Points = list[dict[str, Any]]
Scored = tuple[int, float, dict[str, Any]]  # a point's index, its mean outcome, and what is written of it
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
    if grid.within:
        merged = merging_of(modality, params, name, build, factors, scratch)
        write_json(out, search_within(modality, params, name, build, merged))
        return
    scores: dict[int, dict[str, Any]] = {}
    outcomes: dict[int, float] = {}
    if grid.grid:
        evaluator = Evaluations(modality, params, build, base)
        own = Places(params, name, build, factors, scratch)
        if executor := spread.executor():
            found = _scored_there(executor, own, grid, points, evaluator)
        else:
            found = _scored(modality, own, points, range(len(points)), evaluator)
        with counting("points") as count:
            for i, outcome, score in found:
                outcomes[i], scores[i] = outcome, score
                count(len(scores), len(points))
        said_of_stage(evaluator.told(len(points), "points"))
    scored = [{"params": points[i], **scores[i]} for i in sorted(scores)]
    best = points[max(sorted(outcomes), key=outcomes.__getitem__)] if outcomes else points[0]
    write_json(out, {"method": grid.method, "points": scored, "chosen": best})


class Places(NamedTuple):
    """Of a search: its parameters, the name of its merge, and the folders that it uses."""

    params: Params
    name: str
    build: Path
    factors: Path
    scratch: Path


def _scored(
    modality: Modality, places: Places, points: Points, chosen: Sequence[int], evaluator: Evaluations
) -> Iterator[Scored]:
    """The scores of the chosen points of a grid."""
    params, name, build, factors, scratch = places
    grid, own = params.all_merges[name], [points[i] for i in chosen]
    measures = Measures(modality.measures(params))
    if grid.is_learned:
        models = _fitted(build / "fits" / name, own, factors, scratch, params)
    else:
        models = merging_of(modality, params, name, build, factors, scratch)(grid.method, own)
    for i, model in models:
        with one_thread():
            found = evaluator.evaluate(model, ("val",), params.tasks)
        means = mean_outcomes(modality, build, found, "val", held_back=params.looks(name))
        outcome = sum(means.values()) / len(means)
        tasks = {task: measures.of(task).turned(mean) for task, mean in means.items()}
        yield chosen[i], outcome, {"mean": measures.mean.turned(outcome), "tasks": tasks}


def _scored_there(
    executor: Executor, places: Places, grid: Merge, points: Points, evaluator: Evaluations
) -> Iterator[Scored]:
    """The same of all points, a few of them at a time to a worker; the evaluator is told how many were known."""
    scene, most = spread.scene_of(places.params), -(-len(points) // _UNITS)
    batches = [[i] for i in range(len(points))] if grid.is_learned else in_batches(grid.method, points, most)
    units = [executor.submit(_score_unit, scene, places, points, chosen) for chosen in batches]
    with stopped_together(units):
        for unit in as_completed(units):
            scored, before = unit.result()
            evaluator.before += before
            yield from scored


def _score_unit(
    scene: spread.Scene, places: Places, points: Points, chosen: Sequence[int]
) -> tuple[list[Scored], int]:
    """On a worker: the scores of some points, and of how many the model was measured before."""
    with spread.at(scene):
        modality = modality_of(places.params)
        evaluator = Evaluations(
            modality, places.params, places.build, places.build / "checkpoints" / places.params.base
        )
        # The staging folder of a scratch place is one process's at a time.
        own = places._replace(scratch=places.scratch.with_name(f"{places.scratch.name}-{chosen[0]}"))
        return [*_scored(modality, own, points, chosen, evaluator)], evaluator.before


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
