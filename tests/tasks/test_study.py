"""Studies: the same seed gives the same points, and what was killed ends as if it had not been."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mergeline.evaluation.racing import Raced
from mergeline.tasks import study as module
from mergeline.tasks.search_space import Branch, Search, edges, size
from mergeline.tasks.study import Point, front, study

SPACE = {"x": {"low": 0.01, "high": 1, "log": True}, "y": {"low": 0, "high": 4, "step": 0.5}}
TASKS = ["b", "a"]  # not in the order of the alphabet
SAMPLERS = ["tpe", "cmaes", "nsga2", "map", "random"]


class Stop(Exception):
    """The process is killed here."""


def measured(setting, best):
    params = {**setting.params}
    x, y = params.get("x", 0.5), params.get("y", 2)
    means = {"b": -((np.log10(x) + 1) ** 2), "a": -((y - 2.5) ** 2) / 3.0}
    return Raced(
        {k: float(v) for k, v in means.items()}, 30, {task: np.full(15, v) for task, v in means.items()}
    )


def run(tmp_path=None, stop=None, seed=0, branches=None, allowed=lambda setting: True, **search: Any):
    """The points, and which settings were measured."""
    asked = []

    def measure(setting, best):
        if stop is not None and len(asked) == stop:
            raise Stop
        asked.append(setting)
        return measured(setting, best)

    given = Search.model_validate({"sampler": "tpe", "budget": 20, "space": SPACE, **search})
    own = branches or given.branches("cart", {"keys": "matrices"})
    record = tmp_path / "study.jsonl" if tmp_path else None
    found = study(
        given, own, experts=2, seed=seed, tasks=TASKS, allowed=allowed, measure=measure, record=record
    )
    try:
        return [*found], asked
    except Stop:
        return [], asked


def settings(points):
    return [(point.branch, point.params, point.mean) for point in points]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_seed_decides_and_killed_studies_end_as_undisturbed_ones(sampler, tmp_path):
    whole, asked = run(sampler=sampler)
    assert len(asked) == len(whole) == 20 and asked[0].params["keys"] == "matrices"
    assert settings(whole) == settings(run(sampler=sampler)[0]) != settings(run(sampler=sampler, seed=1)[0])
    file = tmp_path / "study.jsonl"
    for stop in (7, 5):
        assert len(run(tmp_path, stop=stop, sampler=sampler)[1]) == stop
    before = file.read_bytes()
    with open(file, "ab") as record:
        record.write(b'{"branch": 0, "par')  # a line that was being written
    points, asked = run(tmp_path, sampler=sampler)
    assert len(asked) == 20 - 12 and settings(points) == settings(whole)
    assert file.read_bytes().startswith(before) and file.read_bytes().count(b"\n") == 20
    points, asked = run(tmp_path, sampler=sampler)
    assert asked == [] and settings(points) == settings(whole)
    assert [[*point.means] for point in points] == [TASKS] * 20


def test_a_resumed_race_is_run_against_the_same_best(tmp_path):
    seen = []

    def measure(setting, best):
        seen.append(best)
        return measured(setting, best)

    search = Search.model_validate({"sampler": "random", "budget": 6, "space": SPACE})
    branches, common = search.branches("cart", {}), {"experts": 2, "seed": 0, "tasks": TASKS}
    [*_] = study(search, branches, **common, measure=measure)
    whole, seen = seen, []
    cut = search.model_copy(update={"budget": search.budget.model_copy(update={"points": 3})})
    [*_] = study(cut, branches, **common, measure=measure, record=tmp_path / "r")
    [*_] = study(search, branches, **common, measure=measure, record=tmp_path / "r")
    assert len(seen) == 6 and whole[0] is seen[0] is None
    for a, b in zip(whole[1:], seen[1:]):
        assert all(np.array_equal(a[task], b[task]) for task in TASKS)


def test_good_points_are_found():
    points, _ = run(budget=40)
    assert max(point.mean for point in points) > -0.02
    points, _ = run(sampler="cmaes", budget=60)
    assert max(point.mean for point in points) > -0.02


def test_map_measures_the_corners_then_the_front_that_its_quadratics_foretell():
    """Both scores are quadratics in log x and y, and best at one point, x 0.1 and y 2.5."""
    space = {**SPACE, "y": {"low": 0, "high": 4, "step": 0.5}}
    points, _ = run(sampler="map", budget=15, space=space, first=[{"x": 0.3}], seed=-1)
    assert len(points) == 15 and points[0].params["x"] == 0.3
    assert [p.params for p in points[1:6]] == [
        {"x": 1.0, "y": 0.0},
        {"x": 0.01, "y": 4.0},
        {"x": 0.03162, "y": 1.0},
        {"x": 0.1, "y": 2.0},
        {"x": 0.3162, "y": 3.0},
    ]
    best = points[10]  # the first after two thirds
    assert best.params["y"] == 2.5 and best.params["x"] == pytest.approx(0.1, rel=0.02)


def test_map_ends_where_a_space_has_few_points():
    space = {"n": {"low": 1, "high": 3, "integer": True}, "y": {"low": 0, "high": 1, "step": 0.5}}
    points, asked = run(sampler="map", budget=30, space=space)
    assert len(points) == len(asked) == 9 and all(isinstance(p.params["n"], int) for p in points)


def test_budgets(monkeypatch):
    assert len(run(budget={"evaluations": 3.5})[0]) == 4
    clock = iter(range(0, 10_000, 7))
    monkeypatch.setattr(module.time, "monotonic", lambda: next(clock))
    points, _ = run(budget={"minutes": 1})
    assert 2 <= len(points) <= 6 and points[-1].seconds <= 67


def test_a_point_is_measured_once_and_a_space_that_is_tried_ends():
    few = {"x": [0.1, 0.2, 0.5], "keys": ["matrices", "block_linear"]}
    branches = [Branch(method="cart", space=few)]
    points, asked = run(sampler="random", branches=branches, budget=100)
    assert len(points) == len(asked) == 6 == size(branches[0].space, 2)
    points, asked = run(
        sampler="tpe", branches=branches, budget=100, allowed=lambda s: s.params["keys"] == "matrices"
    )
    assert len(points) == 3 and {s.params["keys"] for s in asked} == {"matrices"}


def test_first_points_come_first_by_points_and_by_grid():
    first = [{"x": 0.3, "y": 1.5}, {"x": 0.7}]
    points, _ = run(first=first)
    assert points[0].params == first[0] and points[1].params["x"] == 0.7
    points, _ = run(first={"x": [0.1, 0.2], "y": [1.0, 2.0]})
    assert [p.params for p in points[:4]] == [{"x": x, "y": y} for x in (0.1, 0.2) for y in (1.0, 2.0)]


def test_several_methods_each_have_their_own_space():
    search = {
        "sampler": "tpe",
        "budget": 30,
        "methods": [
            {"method": "cart", "space": {"x": {"low": 0.1, "high": 1}}},
            {"method": "lines(ties)", "params": {"density": 0.2}, "space": {"y": [1.0, 2.0, 3.0]}},
            {"method": "linear", "space": {"weights": {"each": {"low": 0, "high": 1}}}},
        ],
    }
    given = Search.model_validate(search)
    points, asked = run(branches=given.methods, **{**search, "space": {}})
    assert {s.method for s in asked} == {"cart", "lines", "linear"}
    for setting in asked:
        keys = {"cart": {"x"}, "lines": {"density", "inner", "y"}, "linear": {"weights"}}[setting.method]
        assert setting.params.keys() == keys
    weights = next(s.params["weights"] for s in asked if s.method == "linear")
    assert len(weights) == 2 and len({*weights}) == 2
    assert edges(given.methods[2].space["weights"], 2) == [[0.0, 0.0], [1.0, 1.0]]
    assert [s.params for s in given.methods[1].settings(2)] == [{"density": 0.2, "inner": "ties", "y": 1.0}]


def test_a_front_has_what_nothing_beats_on_every_task():
    def point(*means):
        return Point(0, {}, dict(zip(TASKS, means)), 1, 0.0, False, None)

    assert front([point(1, 0), point(0, 1), point(0.5, 0.5), point(0.4, 0.5), point(1, 0)]) == [0, 1, 2]


def test_numbers_are_such_as_people_write():
    space = {"n": {"low": 1, "high": 9, "integer": True}, "x": {"low": 0.1, "high": 0.7, "step": 0.2}}
    points, _ = run(space=space, sampler="random")
    assert all(isinstance(p.params["n"], int) for p in points)
    assert {p.params["x"] for p in points} <= {0.1, 0.3, 0.5, 0.7}
    points, _ = run(sampler="random")
    assert all(len(f"{p.params['x']:g}".strip("0.")) <= 4 for p in points)
