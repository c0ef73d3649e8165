"""A search with a budget: points that a sampler proposes are merged and scored one by one, and the best is chosen."""

from __future__ import annotations

import math
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Iterator, Mapping

from mergeline.evaluation.measures import Measures
from mergeline.evaluation.racing import Part, Raced, parts, race
from mergeline.merging.engine.machine import one_thread
from mergeline.tasks.evaluate import outcomes_of
from mergeline.tasks.evaluations import Evaluations, is_afresh
from mergeline.tasks.places import SOURCES
from mergeline.tasks.private import private_folder
from mergeline.tasks.progress import counting, said_of_stage
from mergeline.tasks.search_space import sampled, size
from mergeline.tasks.study import front, outcomes_by_task, places, study, surrogates

if TYPE_CHECKING:
    import numpy as np

    from mergeline.tasks.modality import Modality, Model
    from mergeline.tasks.schema import Params
    from mergeline.tasks.search_space import Branch, Search, Setting
    from mergeline.tasks.study import Point

FOLDER = Path(".mergeline/studies")  # of a workspace
_CODE = (
    "evaluation/racing.py",
    "merging",
    "tasks/budget_search.py",
    "tasks/search.py",
    "tasks/search_space.py",
    "tasks/study.py",
)

Merging = Callable[[str, list[dict[str, Any]]], Iterator[tuple[int, "Model"]]]


def search_within(
    modality: Modality, params: Params, name: str, build: Path, merging: Merging
) -> dict[str, Any]:
    """What a search with a budget found, as JSON; a study that was begun before goes on.

    merging: merges points of a method. Only points that were measured on all examples are chosen, the first of equals.

    Raises:
        UserError: as `tasks.search.search`; optuna is not installed.
    """
    merge = params.all_merges[name]
    search = merge.within
    assert search
    branches, experts = merge.branches, len(params.experts_of(name))
    evaluator = Evaluations(modality, params, build, build / "checkpoints" / params.base)
    measure = _measure(modality, params, name, build, merging, evaluator)
    record = private_folder(build.parent / FOLDER) / f"{_key(params, name, build, evaluator)}.jsonl"
    if is_afresh():
        record.unlink(missing_ok=True)
    found: list[Point] = []
    with counting("points") as count:
        for point in study(
            search,
            branches,
            experts=experts,
            seed=params.seed,
            tasks=params.tasks,
            allowed=lambda setting: params.takes(name, setting),
            measure=measure,
            record=record,
        ):
            found.append(point)
            count(len(found), search.budget.points or 0)
    measures = Measures(modality.measures(params))
    rows = []
    for point in found:
        branch = branches[point.branch]
        row: dict[str, Any] = {"method": branch.method} if search.methods else {}
        row |= {
            "params": {**branch.params, **point.params},
            "mean": measures.mean.turned(point.mean),
            "tasks": {task: measures.of(task).turned(mean) for task, mean in point.means.items()},
            **({"dropped": point.dropped, "examples": point.seen} if search.race else {}),
        }
        rows.append(row)
    whole = [i for i, point in enumerate(found) if not point.dropped]
    best = max(whole, key=lambda i: found[i].mean)
    points_of_space = sum(size(branch.space, experts) for branch in branches)
    seen = sum(point.seen for point in found)
    about = {
        "sampler": search.sampler,
        "budget": search.budget.words,
        "seed": params.seed if search.seed is None else search.seed,
        "reproducible": search.budget.minutes is None,
        "dropped": len(found) - len(whole),
        "examples": seen,  # that were measured, of all points
        "examples_of_a_point": found[0].seen,
        "points_of_space": int(points_of_space) if math.isfinite(points_of_space) else None,
    }
    said_of_stage(_words(search, found))
    return {
        "method": branches[found[best].branch].method,
        "points": rows,
        "chosen": rows[best]["params"],
        "search": about,
        **({"front": front(found)} if search.has_front else {}),
        **(
            {"surrogate": _surrogate(search, branches[0], experts, found, params)}
            if search.sampler == "map"
            else {}
        ),
    }


def _surrogate(
    search: Search, branch: Branch, experts: int, found: list[Point], params: Params
) -> dict[str, Any] | None:
    """How far the quadratics of a search by MAP are off, by tasks; None where its space had too few points to fit them.

    Root mean squares of what they miss: `bootstrap_error`, of fits to most of the sampled points, at the others;
    `front_error`, at points that were measured because they are on the front.
    """
    from mergeline.merging.algebra.surrogate import bootstrap_error

    count, seed = sampled(search, branch.space, experts), params.seed % 2**32
    if len(found) <= count:
        return None
    inside, outside = found[:count], found[count:]
    fitted = surrogates(inside, branch, experts)
    inside_ND, outside_KD = places(inside, branch, experts), places(outside, branch, experts)
    values, measured = outcomes_by_task(inside), outcomes_by_task(outside)
    return {
        "sampled": count,
        "tasks": {
            task: {
                "activation": one.activation,
                "bootstrap_error": bootstrap_error(inside_ND, values[task], one.activation, seed),
                "front_error": float(((one.at(outside_KD) - measured[task]) ** 2).mean() ** 0.5),
            }
            for task, one in fitted.items()
        },
    }


def _words(search: Search, found: list[Point]) -> str:
    words = f"{len(found)} points by {search.sampler}"
    if search.race:
        share = sum(point.seen for point in found) / (len(found) * found[0].seen)
        words += f", {sum(p.dropped for p in found)} dropped early, {share:.0%} of their examples measured"
    if search.budget.minutes is not None:
        words += "; not reproducible, for the budget is in minutes"
    return words


def _measure(
    modality: Modality,
    params: Params,
    name: str,
    build: Path,
    merging: Merging,
    evaluator: Evaluations,
) -> Callable[[Setting, Mapping[str, np.ndarray] | None], Raced]:
    """What merges and scores a setting, maybe in a race with the best so far."""
    looks, search = params.looks(name), params.all_merges[name].within
    assert search

    def whole(model: Model) -> Raced:
        found = evaluator.evaluate(model, ("val",), params.tasks)
        outcomes = outcomes_of(modality, build, found, "val", held_back=looks)
        means = {task: float(outcome_N.mean()) for task, outcome_N in outcomes.items()}
        return Raced(means, sum(map(len, outcomes.values())), outcomes)

    def raced(model: Model, best: Mapping[str, np.ndarray] | None) -> Raced:
        def measured(part: Part) -> dict[str, np.ndarray]:
            asked = {task: numbers[task][which_n] for task, which_n in part.items()}
            found = evaluator.evaluate_part(model, "val", asked)
            outcomes = outcomes_of(modality, build, found, "val", held_back=looks)
            return {task: outcomes[task][which_n] for task, which_n in part.items()}

        assert search and search.race
        return race(measured, cut, best, sizes, search.race.error)

    if search.race:
        import numpy as np

        numbers = {
            task: np.arange(evaluator.count("val", task))[
                modality.choosing(build, task) if looks else slice(None)
            ]
            for task in params.tasks
        }
        sizes = {task: len(which_N) for task, which_N in numbers.items()}
        cut = parts(sizes, search.race.looks, params.seed)

    def measure(setting: Setting, best: Mapping[str, np.ndarray] | None) -> Raced:
        models = merging(setting.method, [setting.params])
        with closing(models), one_thread():  # type: ignore[type-var]
            _, model = next(models)
            return raced(model, best) if search.race else whole(model)

    return measure


def _key(params: Params, name: str, build: Path, evaluator: Evaluations) -> str:
    """A digest of all that decides which points a study proposes, and how good they are."""
    merge = params.all_merges[name]
    places = [*params.places_of(name, build).values(), params.recipe(name, build, [])["base"]]
    read = [build / "statistics" / kind for kind in params.kinds_of(name)]
    code = [*(SOURCES / part for part in _CODE), *(build.parent / file for file in params.methods)]
    return evaluator.key_of(
        {
            "merge": merge.model_dump(mode="json"),
            "experts": params.experts_of(name),
            "seed": params.seed,
            "files": evaluator.digests([*places, *read, *code]),
        }
    )
