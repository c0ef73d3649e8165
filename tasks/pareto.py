"""The front of a search over tasks, and which of its points someone wants: what `mergeline pareto` says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Collection, Mapping

from mergeline.evaluation.measures import Measures, measures_of
from mergeline.merging.errors import UserError, did_you_mean
from mergeline.merging.files import read_object
from mergeline.tasks.evaluate import PREDICTIONS, read_outcomes
from mergeline.tasks.merge import recipe_at
from mergeline.tasks.search_space import holds
from mergeline.tasks.study import Point, foretold

if TYPE_CHECKING:
    from mergeline.tasks.modality import Modality
    from mergeline.tasks.schema import Params

Json = dict[str, Any]

_FEW = 20  # points that are shown of a front that was foretold
_NOTE = "by mergeline pareto"  # the end of a note in recipes


def front_of(modality: Modality, params: Params, name: str, build: Path) -> Json:
    """The points of a finished search that no other beats on every task, the best mean first, as JSON values.

    tasks, measures: task -> name, unit and which scores are better. experts: task -> its expert's mean score on the
    same validation examples, where it was measured. points: each with its `index` in the search's file, `method`,
    `params`, `mean`, scores by task (`tasks`), and `shares`, task -> the score over its expert's, where larger scores
    are better and the expert's is above 0. all: parameters and scores of every point that was measured whole.
    surrogate: as the search has it. foretold: whether the scores are not measured (`foretold_front`).

    Raises:
        UserError: there is no finished search of this name.
    """
    from mergeline.merging.algebra.fronts import front

    file = build / "search" / f"{name}.json"
    if not file.is_file():
        raise UserError(f"{name} was not searched yet; run `mergeline run --only search@{name}` first")
    found = read_object(file, mend="search again")
    whole = {i: point for i, point in enumerate(found["points"]) if not point.get("dropped")}
    if not whole:
        raise UserError(f"{name} has no search, and so one point alone; give it one in params.yaml")
    measures = Measures(modality.measures(params))
    tasks, experts = list(params.tasks), _experts(modality, params, name, build)
    outcomes = _outcomes(whole.values(), tasks, measures)
    indexes = list(whole)
    points = [
        _point(whole[i]["params"], whole[i]["tasks"], experts, measures)
        | {"index": i, "method": whole[i].get("method", found["method"]), "mean": whole[i]["mean"]}
        for i in (indexes[k] for k in front(outcomes))
    ]
    return {
        "merge": name,
        "tasks": tasks,
        **measures.as_json(),
        "experts": experts,
        "all": [{key: point[key] for key in ("params", "tasks")} for point in whole.values()],
        "points": sorted(points, key=lambda point: -measures.mean.turned(point["mean"])),
        "surrogate": found.get("surrogate"),
        "foretold": False,
    }


def foretold_front(params: Params, name: str, found: Json) -> Json:
    """The front that the quadratics of a search by MAP foretell, in the form of `found`, the measured one.

    They are fitted to all points that were measured; those of the front were not, and have no `index`.

    Raises:
        UserError: the merge was not searched by MAP, or in another space.
    """
    own, experts = params.all_merges[name], len(params.experts_of(name))
    if not own.within or own.within.sampler != "map" or not found["surrogate"]:
        raise UserError(f"{name} was not searched by map, so that nothing is foretold; leave out --foretold")
    [branch] = own.branches
    measures = measures_of(found)
    points = []
    for row in found["all"]:
        varied = {key: row["params"].get(key) for key in branch.space}
        if not all(holds(branch.space[key], value, experts) for key, value in varied.items()):
            raise UserError(f"{name} was searched in another space than params.yaml has; search again first")
        means = {task: measures.of(task).turned(score) for task, score in row["tasks"].items()}
        points.append(Point(0, varied, means, 0, 0.0, False, None))
    front = []
    for varied, means in foretold(points, branch, experts, params.seed % 2**32):
        scores = {task: measures.of(task).turned(mean) for task, mean in means.items()}
        point = _point({**branch.params, **varied}, scores, found["experts"], measures)
        mean = measures.mean.turned(sum(means.values()) / len(means))
        front.append(point | {"index": None, "method": branch.method, "mean": mean})
    return {**found, "points": front, "foretold": True}


def shown(found: Json, picked: int | None) -> tuple[Json, int | None]:
    """The same with a few points of a front that was foretold, the picked one among them; the best mean first."""
    if not found["foretold"]:
        return found, picked
    chosen = {*range(_FEW), *({picked} if picked is not None else ())}
    mean = measures_of(found).mean
    order = sorted(
        (i for i in chosen if i < len(found["points"])),
        key=lambda i: -mean.turned(found["points"][i]["mean"]),
    )
    points = [found["points"][i] for i in order]
    return {**found, "points": points}, None if picked is None else order.index(picked)


def pick(
    found: Json,
    at_least: Mapping[str, float],
    scores: Mapping[str, float],
    weights: Mapping[str, float],
) -> Json:
    """The point of a front that is best among those that hold what is asked.

    at_least: task -> the least share of its expert's score. scores: task -> the worst score. weights: task -> what it
    counts in the mean by which the points are compared; without any, tasks of which nothing is asked count 1, or all
    where something is asked of each. The mean is of shares where all tasks have them, else of scores.

    Raises:
        UserError: a task that is not known, or has no share; weights that are all 0; no point holds what is asked: the
            nearest one is named.
    """
    measures = measures_of(found)
    for task in (*at_least, *scores, *weights):
        if task not in found["tasks"]:
            raise UserError(f"'{task}' is no task of {found['merge']}{did_you_mean(task, found['tasks'])}")
    for task in at_least:
        _refuse_share(found, task, measures)
    counted = dict(weights) or {
        task: 1.0 for task in found["tasks"] if task not in at_least and task not in scores
    }
    counted = counted or dict.fromkeys(found["tasks"], 1.0)
    if min(counted.values()) < 0 or not any(counted.values()):
        raise UserError("weights of tasks are 0 or more, and one of them is above 0")
    by_shares = all(len(point["shares"]) == len(found["tasks"]) for point in found["points"])

    def worth(point: Json) -> float:
        if by_shares:
            return sum(weight * point["shares"][task] for task, weight in counted.items())
        return sum(
            weight * measures.of(task).turned(point["tasks"][task]) for task, weight in counted.items()
        )

    def lacks(point: Json) -> float:
        """The most by which a point misses what is asked, in parts of it; 0 or less if it holds."""
        missed = [(share - point["shares"][task]) / (abs(share) or 1.0) for task, share in at_least.items()]
        for task, score in scores.items():
            turned = measures.of(task).turned
            missed.append((turned(score) - turned(point["tasks"][task])) / (abs(score) or 1.0))
        return max(missed, default=0.0)

    holding = [point for point in found["points"] if lacks(point) <= 0]
    if holding:
        return max(holding, key=worth)
    nearest = min(found["points"], key=lacks)
    asked = [
        *(f"{task} at {share:g} of its expert" for task, share in at_least.items()),
        *(f"{task} at {score:g}" for task, score in scores.items()),
    ]
    there = [
        *(f"{task} {nearest['shares'][task]:.3f} of its expert" for task in at_least),
        *(f"{task} {nearest['tasks'][task]:.3f}" for task in scores),
    ]
    settings = ", ".join(f"{key} {json.dumps(value)}" for key, value in nearest["params"].items())
    raise UserError(
        f"no point of {found['merge']} has {' and '.join(asked)}; the nearest has {', '.join(there)}, at {settings}: "
        f"ask for less, {'see --foretold, ' if found['surrogate'] and not found['foretold'] else ''}or search on"
    )


def recipe_of_point(
    modality: Modality, params: Params, name: str, root: Path, point: Mapping[str, Any]
) -> Json:
    """A recipe that merges a point of a front, as JSON values; its paths are absolute.

    Raises:
        UserError: as `tasks.merge.recipe_at`.
    """
    from mergeline.merging.recipes.recipe import Recipe

    build = root / "build"
    heads = modality.heads(params, build)
    recipe = recipe_at(params, name, build, heads, point["method"], point["params"])
    methods = [root / file for file in params.methods]
    what = (
        f"what the search of {name} foretells"
        if point["index"] is None
        else f"point {point['index']} of {name}"
    )
    notes = [f"{what}, {_NOTE}"]
    return Recipe.of({**recipe, "methods": methods, "notes": notes}).model_dump(mode="json")


def is_recipe(path: Path) -> bool:
    """Whether a file is a recipe that was written here."""
    try:
        notes = read_object(path).get("notes")
    except UserError:
        return False
    return isinstance(notes, list) and any(isinstance(note, str) and note.endswith(_NOTE) for note in notes)


def _experts(modality: Modality, params: Params, name: str, build: Path) -> dict[str, float]:
    """Task -> the mean score of its expert on the validation examples that the search chose by; {} if not measured."""
    predictions = build / "evaluations" / "baselines" / PREDICTIONS
    if not predictions.is_file():
        return {}
    measures, found = Measures(modality.measures(params)), {}
    for task, expert in params.owners.items():
        outcome_N = read_outcomes(modality, build, predictions, "val", [task], model=expert)[task]
        own_N = outcome_N[modality.choosing(build, task)] if params.looks(name) else outcome_N
        found[task] = measures.of(task).turned(float(own_N.mean()))
    return found


def _point(params: Json, tasks: Json, experts: Mapping[str, float], measures: Measures) -> Json:
    shares = {
        task: score / experts[task]
        for task, score in tasks.items()
        if experts.get(task, 0) > 0 and not measures.of(task).lower
    }
    return {"params": params, "tasks": tasks, "shares": shares}


def _outcomes(points: Collection[Json], tasks: list[str], measures: Measures) -> Any:
    import numpy as np

    return np.array([[measures.of(task).turned(point["tasks"][task]) for task in tasks] for point in points])


def _refuse_share(found: Json, task: str, measures: Measures) -> None:
    if not found["experts"]:
        raise UserError(
            "the experts were not measured yet; run `mergeline run --only baselines` first, or ask for a score by "
            "--at-least-score"
        )
    if task not in found["points"][0]["shares"]:
        why = "has no expert"
        if task in found["experts"]:
            why = (
                "is better where its score is smaller"
                if measures.of(task).lower
                else "has an expert whose score is not above 0"
            )
        raise UserError(f"'{task}' {why}, so there is no share of it; ask for a score by --at-least-score")
