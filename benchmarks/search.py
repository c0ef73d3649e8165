"""Searches within a budget beside the whole grid: the best found, and how many evaluations that took, over ten seeds.

    python benchmarks/search.py table WORKSPACE TABLE.npz [MERGE...]   every point of every grid, example by example
    python benchmarks/search.py replay TABLE.npz                       results/search.json, from a table alone

WORKSPACE has the params.yaml of a CLIP family; its checkpoints, data and heads are made where they are missing. A table
holds whether each example of the validation split was right, of every point: it is made once, and searches replay from
it what they would merge and measure. Merges that a table has already stay. An evaluation is as many examples
as the validation split has; a race measures some of them.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
from measure import save

from mergeline.evaluation.metrics import paired
from mergeline.evaluation.racing import Raced, parts, race
from mergeline.merging.canonical import canonical_json
from mergeline.tasks.search_space import Branch, Search, Setting
from mergeline.tasks.study import Point, study

SEEDS = range(10)
SHARES = (0.025, 0.05, 0.1)  # of the evaluations of all points
RACE = {"error": 0.05, "looks": 5}
SAMPLERS = ("random", "tpe")
MERGE = "merge"  # the parameter that says whose row a setting is


class Table(NamedTuple):
    """points: merge and parameters of each of P. right: float64 (P, N). sizes: task -> how many of N are its own."""

    points: list[tuple[str, dict[str, Any]]]
    right: np.ndarray
    sizes: dict[str, int]

    def outcomes(self, row: int) -> dict[str, np.ndarray]:
        """By tasks."""
        ends = np.cumsum([*self.sizes.values()])
        return {t: self.right[row, end - n : end] for (t, n), end in zip(self.sizes.items(), ends)}

    def mean(self, row: int) -> float:
        """Over tasks."""
        return float(np.mean([own.mean() for own in self.outcomes(row).values()]))


def read(file: Path) -> Table:
    """A table that `write` made."""
    with np.load(file) as arrays:
        sizes = json.loads(str(arrays["sizes"]))
        right = np.unpackbits(arrays["right"], axis=1, count=sum(sizes.values()))
        points = [(merge, params) for merge, params in json.loads(str(arrays["points"]))]
    return Table(points, right.astype(np.float64), sizes)


def write(file: Path, table: Table) -> None:
    """A bit an example."""
    bits = np.packbits(table.right.astype(bool), axis=1)
    texts = {"sizes": json.dumps(table.sizes), "points": json.dumps(table.points)}
    np.savez_compressed(file, right=bits, **texts)


def measure(workspace: Path, file: Path, merges: list[str]) -> None:
    """Add merges to a table, one after the other."""
    from mergeline.merging.engine.machine import one_thread
    from mergeline.tasks.clip.evaluator import open_evaluator
    from mergeline.tasks.search import merging_of
    from mergeline.tasks.workspace import Workspace

    file = file.absolute()
    os.chdir(workspace)
    work = Workspace("params.yaml")
    for stage in work.stages:
        if stage.step in ("fetch", "data", "heads") and not work.path(stage.out).exists():
            work.run(stage)
    params, build, scratch = work.params, Path("build"), Path(".mergeline/scratch")
    evaluator = open_evaluator(params, build, build / "checkpoints" / params.base)
    labels = {task: evaluator.data[task].split("val")[1] for task in params.tasks}
    sizes = {task: len(label_N) for task, label_N in labels.items()}
    found = read(file) if file.exists() else Table([], np.zeros((0, sum(sizes.values()))), sizes)
    known = {merge for merge, _ in found.points}
    for name in merges or params.merges:
        if name in known:
            continue
        points, began = [*params.merges[name].points], time.monotonic()
        rows: dict[int, np.ndarray] = {}
        merging = merging_of(work.modality, params, name, build, Path(".mergeline/factors"), scratch)
        for i, model in merging(params.merges[name].method, points):
            with one_thread():
                predicted = evaluator.predict(model, "val", params.tasks)
            rows[i] = np.concatenate([predicted[task] == labels[task] for task in params.tasks])
        right = np.concatenate([found.right, np.stack([rows[i] for i in range(len(points))])])
        found = Table([*found.points, *((name, point) for point in points)], right, sizes)
        write(file, found)
        print(f"{name}: {len(points)} points, {time.monotonic() - began:.0f} s", flush=True)


class Replay:
    """Searches over the points of a table, whose merges are chosen among as methods are."""

    def __init__(self, table: Table):
        self.table, self.rows = table, {}
        grids: dict[str, list[dict[str, Any]]] = {}
        for row, (merge, params) in enumerate(table.points):
            self.rows[canonical_json({**params, MERGE: merge})] = row
            grids.setdefault(merge, []).append(params)
        self.branches = [_branch(merge, points) for merge, points in grids.items()]
        self.best = max(self.rows.values(), key=table.mean)

    def run(self, search: Search, seed: int) -> list[Point]:
        """What a search measures."""
        sizes = self.table.sizes
        cut = parts(sizes, search.race.looks, seed) if search.race else []

        def measure(setting: Setting, best: dict[str, np.ndarray] | None) -> Raced:
            own = self.table.outcomes(self.rows[canonical_json(setting.params)])
            if not search.race:
                means = {task: float(own_N.mean()) for task, own_N in own.items()}
                return Raced(means, sum(sizes.values()), own)
            return race(
                lambda part: {task: own[task][which] for task, which in part.items()},
                cut,
                best,
                sizes,
                search.race.error,
            )

        found = study(search, self.branches, experts=len(sizes), seed=seed, tasks=[*sizes], measure=measure)
        return [*found]

    def row_of(self, point: Point) -> int:
        return self.rows[canonical_json({**self.branches[point.branch].params, **point.params})]


def _branch(merge: str, points: list[dict[str, Any]]) -> Branch:
    """A grid as it was written: what varies, in its order; numbers of it that ascend are ordered."""
    values: dict[str, list[Any]] = {key: [] for key in points[0]}
    for point in points:
        for key, value in point.items():
            if value not in values[key]:
                values[key].append(value)
    varied = {key: found for key, found in values.items() if len(found) > 1}
    fixed = {key: found[0] for key, found in values.items() if len(found) == 1}
    return Branch(method="average", params={**fixed, MERGE: merge}, space=varied)


def figures(replay: Replay, sampler: str, raced: bool, share: float) -> dict[str, Any]:
    """Of ten seeds: the best point found on validation beside the grid's, evaluations, and what races dropped."""
    table, total = replay.table, len(replay.rows)
    search = Search.model_validate(
        {
            "sampler": sampler,
            "budget": {"evaluations": share * total - 1},  # the last point may exceed it, by one at most
            "methods": replay.branches,
            "race": RACE if raced else None,
        }
    )
    best = table.outcomes(replay.best)
    means, evaluations, points, level, dropped, wrongly = [], [], [], 0, 0, 0
    began = time.monotonic()
    for seed in SEEDS:
        found = replay.run(search, seed)
        whole = [point for point in found if not point.dropped]
        chosen = replay.row_of(max(whole, key=lambda point: point.mean))
        means.append(table.mean(chosen))
        evaluations.append(sum(point.seen for point in found) / sum(table.sizes.values()))
        points.append(len(found))
        level += paired(best, table.outcomes(chosen)).lower <= 0
        dropped += len(found) - len(whole)
        wrongly += sum(_wrongly(replay, found))
    return {
        "points_of_grid": total,
        "sampler": sampler,
        "race": raced,
        "budget": share,
        "evaluations": round(median(evaluations), 1),
        "share": round(median(evaluations) / total, 4),
        "points": median(points),
        "best_median": round(median(means), 4),
        "best_least": round(min(means), 4),
        "best_of_grid": round(table.mean(replay.best), 4),
        "found": sum(mean == table.mean(replay.best) for mean in means),
        "level": level,
        "dropped": dropped,
        "dropped_wrongly": wrongly,
        "seconds_a_seed": round((time.monotonic() - began) / len(SEEDS), 2),
    }


def _wrongly(replay: Replay, found: list[Point]) -> Iterator[bool]:
    """Of each point that was dropped, whether on all examples it is as good as the best was then."""
    best = -np.inf
    for point in found:
        if point.dropped:
            yield replay.table.mean(replay.row_of(point)) >= best
        else:
            best = max(best, point.mean)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("table")
    command.add_argument("workspace", type=Path)
    command.add_argument("table", type=Path)
    command.add_argument("merges", nargs="*")
    command = commands.add_parser("replay")
    command.add_argument("table", type=Path)
    args = parser.parse_args()
    if args.command == "table":
        measure(args.workspace, args.table, args.merges)
        return
    table = read(args.table)
    replay = Replay(table)
    for sampler in SAMPLERS:
        for raced in (False, True):
            for share in SHARES:
                row = figures(replay, sampler, raced, share)
                save("search", [row], ["sampler", "race", "budget"])
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
