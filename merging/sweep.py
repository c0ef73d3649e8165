"""Sweeps: a merge at every point of a grid of parameters, from as few readings of the inputs as memory allows."""

from __future__ import annotations

import os
import re
import resource
from concurrent.futures import Executor
from itertools import product
from math import prod
from pathlib import Path
from typing import Any, Iterator, Mapping, Sequence

from mergeline.merging.api import merge_points
from mergeline.merging.canonical import canonical_json, text_digest
from mergeline.merging.engine.manifest import is_single
from mergeline.merging.engine.opening import Headers
from mergeline.merging.engine.places import refuse_file
from mergeline.merging.engine.plan import Plan
from mergeline.merging.engine.planning import make_plan
from mergeline.merging.engine.work import Count, Progress
from mergeline.merging.errors import UserError
from mergeline.merging.files import read_object, write_json
from mergeline.merging.methods.bound import bind
from mergeline.merging.methods.contract import get_method
from mergeline.merging.recipes.recipe import Recipe, too_many_points, unfolded

Point = dict[str, Any]

_TABLE = "sweep.json"
_POINTS = 64  # merged at a time: each keeps some files open
_FILES_A_POINT = 3  # its staging folder, its journal, the folder that is synced; besides those of its weights
_OTHER_FILES = 24  # of the process: libraries, pipes, what is imported meanwhile
_LONGEST_NAME = 100  # of a point's folder
_UNSAFE = re.compile(r"[^A-Za-z0-9_.,+-]+")


def sweep(
    recipe: Recipe | Mapping[str, Any],
    grid: Mapping[str, Sequence[Any]],
    out: str | os.PathLike,
    *,
    device: str = "cpu",
    memory: int | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
    factors: str | os.PathLike | None = None,
    executor: Executor | None = None,
    force: bool = False,
) -> list[dict[str, Any]]:
    """Merge every combination of the values of `grid` into a folder of its own in `out`.

    Folders are named after their point, `rank-0.08_scale-1.5`, and hold the same bytes as a single merge there; the
    grid wins over the recipe's own parameters. `out/sweep.json` lists the points, as does what is returned: folder,
    params, digest, recipe_digest. The other arguments, and how a killed sweep goes on, are those of `merging.merge`.

    Raises:
        UserError: as `merging.merge`; a grid that is empty or names an unknown parameter, a wrong or repeated value.
    """
    recipe, out = Recipe.of(recipe), Path(out)
    if is_single(out):
        raise UserError(f"{out}: a sweep makes many checkpoints; name a folder")
    refuse_file(out / _TABLE, [], _is_table, "sweep", force)
    points = grid_points(recipe, grid)
    names = _names(points)
    recipes = [recipe.model_copy(update={"params": {**recipe.params, **point}}) for point in points]
    headers = Headers()
    plan = make_plan(recipes[0], headers)
    plan.check()
    workers, settings = _shares(plan, memory, workers)
    params = [made.params for made in recipes]
    batches = list(in_batches(recipe.method, params, _points_at_a_time(plan), settings))
    manifests: dict[int, Any] = {}
    for number, batch in enumerate(batches):
        merged = merge_points(
            [(make_plan(recipes[i], headers), out / names[i]) for i in batch],
            device=device,
            memory=memory,
            workers=workers,
            progress=progress and _part(progress, number, len(batches)),
            factors=factors,
            executor=executor,
            force=force,
        )
        manifests |= dict(zip(batch, merged))
    rows = [
        {
            "folder": name,
            "params": point,
            "digest": manifests[i]["output"]["digest"],
            "recipe_digest": manifests[i]["recipe_digest"],
        }
        for i, (name, point) in enumerate(zip(names, points))
    ]
    write_json(
        out / _TABLE,
        {"method": recipe.method, "params": recipe.params, "grid": dict(grid), "points": rows},
    )
    return rows


def folders(recipe: Recipe, grid: Mapping[str, Sequence[Any]]) -> list[str]:
    """The names of the folders of a sweep (raises UserError as `grid_points`)."""
    return _names(grid_points(recipe, grid))


def grid_points(recipe: Recipe, grid: Mapping[str, Sequence[Any]]) -> list[Point]:
    """Every combination of the grid's values, the last parameter's first.

    Raises:
        UserError: the recipe's method does not take them.
    """
    method = get_method(recipe.method)
    if not grid:
        raise UserError("the grid is empty; name a parameter and its values")
    for key, values in grid.items():
        if not isinstance(values, list | tuple) or not values:
            raise UserError(f"grid: '{key}' has no values; list some")
    recipe.refuse_set_by_parts(grid)
    if problem := too_many_points(grid):
        raise UserError(problem)
    points = [dict(zip(grid, values)) for values in product(*grid.values())]
    for point in points:
        params = method.resolve({**recipe.params, **point})
        if recipe.stack:  # its parts have experts of their own
            continue
        for misuse in method.misuses(params, len(recipe.experts), recipe.base is not None, recipe.statistics):
            raise UserError(misuse)
    for key, values in grid.items():
        if len(set(map(canonical_json, values))) < len(values):
            raise UserError(f"grid: '{key}' lists a value twice")
    return points


def in_batches(
    method: str, points: Sequence[Mapping[str, Any]], most_points: int, most_settings: int | None = None
) -> Iterator[list[int]]:
    """The indexes of points of a method's parameters in batches; points of one setting are neighbours.

    Of one setting are points that differ only in what multiplies an update: it is computed once for all of them.
    """
    settings: dict[str, list[int]] = {}
    for i, point in enumerate(points):
        id, params = unfolded(method, point)
        entry = get_method(id)
        bound = bind(entry, entry.resolve(params))
        setting = canonical_json({k: v for k, v in bound.flat.items() if k not in bound.scales})
        settings.setdefault(setting, []).append(i)
    batch: list[int] = []
    held = 0
    for indexes in settings.values():
        for start in range(0, len(indexes), most_points):
            part = indexes[start : start + most_points]
            if batch and (len(batch) + len(part) > most_points or held == most_settings):
                yield batch
                batch, held = [], 0
            batch = batch + part
            held += 1
    yield batch


def _shares(plan: Plan, memory: int | None, workers: int | None) -> tuple[int | None, int | None]:
    """How many workers, and how many settings at a time, fit into memory: each worker remembers their updates."""
    peak = plan.peak_bytes
    whole = [entry for entry in plan.entries if entry.unit == "tensor"]
    if not whole:
        return workers, None
    update = max(8 * prod(entry.spec.shape) for entry in whole)
    if memory is None:
        room = 2 * peak
    else:
        workers = max(1, min(workers or os.cpu_count() or 1, memory // (2 * peak)))
        room = memory // workers
    return workers, max(1, 1 + (room - peak) // max(update, 1))


def _points_at_a_time(plan: Plan) -> int:
    """How many points may keep their files open, by the limit of this process."""
    read = {
        file
        for checkpoint in plan.experts.values()
        for info in checkpoint.stored.tensors.values()
        for file in info.files
    }
    written = 1 + (plan.bytes_written // plan.recipe.shard_size if plan.recipe.shard_size else 0)
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
        return _POINTS
    free = limit - _OTHER_FILES - len(read) - 1
    return max(1, min(_POINTS, free // (_FILES_A_POINT + written)))


def _part(progress: Progress, number: int, count: int) -> Progress:
    """The progress of one of several merges of the same tensors."""

    def part(done: Count, total: Count) -> None:
        size = number * total.bytes + done.bytes
        progress(Count.of(number * total + done, size), Count.of(count * total, count * total.bytes))

    return part


def _is_table(path: Path) -> bool:
    """Whether a file is the list of a sweep's points."""
    try:
        return {"method", "grid", "points"} <= read_object(path).keys()
    except UserError:
        return False


def _names(points: Sequence[Point]) -> list[str]:
    """A readable folder name for each point."""
    names = ["_".join(f"{key}-{_text(value)}" for key, value in point.items()) for point in points]
    return [
        name
        if len(name) <= _LONGEST_NAME and names.count(name) == 1
        else f"{name[:_LONGEST_NAME]}_{text_digest(point)[-8:]}"
        for name, point in zip(names, points)
    ]


def _text(value: Any) -> str:
    return _UNSAFE.sub("", value if isinstance(value, str) else canonical_json(value))
