"""Sweeps: the bytes of single merges from one reading, names, batches, refusals, going on after a kill."""

from __future__ import annotations

import json
from collections import Counter
from math import prod
from pathlib import Path
from typing import Any

import pytest
from checkpoints import SHAPES, refused, save_family
from hypothesis import given
from hypothesis import strategies as st

from mergeline.merging import merge
from mergeline.merging import sweep as sweeps
from mergeline.merging.engine.planning import make_plan
from mergeline.merging.engine.sources import FileInputs
from mergeline.merging.methods.bound import Bound
from mergeline.merging.sweep import in_batches, sweep

GRID = {"scale": [0.5, 1.0, 2.0], "rank": [0.2, 0.6]}
NAMES = [f"scale-{scale}_rank-{rank}" for scale in GRID["scale"] for rank in GRID["rank"]]


@pytest.fixture
def recipe(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "in").mkdir()
    return save_family(tmp_path / "in") | {"method": "cart"}


def content(folder: Path) -> dict[str, bytes]:
    return {f.relative_to(folder).as_posix(): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


# --------------------------------------------------------------------------------------- what is written


@pytest.mark.parametrize("at_a_time", [64, 2, 1])
@pytest.mark.parametrize("factors", [None, "factors"])
def test_every_point_has_the_bytes_of_a_single_merge(at_a_time, factors, recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(sweeps, "_POINTS", at_a_time)
    rows = sweep(recipe, GRID, tmp_path / "out", factors=factors and tmp_path / factors)
    assert [row["folder"] for row in rows] == NAMES
    for row in rows:
        manifest = merge({**recipe, "params": row["params"]}, tmp_path / "single" / row["folder"])
        assert content(tmp_path / "out" / row["folder"]) == content(tmp_path / "single" / row["folder"])
        assert row["digest"] == manifest["output"]["digest"]
        assert row["recipe_digest"] == manifest["recipe_digest"]
    assert len({row["digest"] for row in rows}) == len(NAMES)
    assert (tmp_path / "factors").exists() == bool(factors)


@pytest.mark.parametrize(
    ("method", "grid", "passes"),
    [
        ("ties", {"density": [0.2, 0.5], "scale": [0.5, 1.0, 2.0]}, 2),
        ("dare(ties)", {"drop_rate": [0.2, 0.5], "scale": [0.5, 1.0]}, 2),
        ("lines(ties)", {"scale": [0.5, 1.0]}, 2),  # whose alpha depends on what is merged
    ],
)
def test_points_that_differ_in_scale_alone_share_what_a_pre_pass_finds(
    method, grid, passes, recipe, tmp_path, monkeypatch
):
    ran = []
    look = Bound.look_at_model
    monkeypatch.setattr(
        Bound, "look_at_model", lambda bound, views: ran.append(bound.method.id) or look(bound, views)
    )
    rows = sweep({**recipe, "method": method}, grid, tmp_path / "out")
    assert ran.count(method.partition("(")[0]) == passes
    for row in rows:
        merge({**recipe, "method": method, "params": row["params"]}, tmp_path / "single" / row["folder"])
        assert content(tmp_path / "out" / row["folder"]) == content(tmp_path / "single" / row["folder"])


def test_sweep_json_lists_the_points(recipe, tmp_path):
    rows = sweep({**recipe, "params": {"keys": "matrices", "scale": 9.0}}, GRID, tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted([*NAMES, "sweep.json"])
    found = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert found["points"] == rows and found["grid"] == GRID and found["method"] == "cart"
    lineage = json.loads((tmp_path / "out" / NAMES[0] / "manifest.json").read_text())["recipe"]
    assert lineage["params"]["keys"] == "matrices" and lineage["params"]["scale"] == 0.5


def test_the_inputs_are_read_once(recipe, tmp_path, monkeypatch):
    read: Counter[str] = Counter()
    elements = FileInputs.elements

    def counted(self: FileInputs, info: Any, start: int, stop: int) -> Any:
        read[f"{info.file.name}/{info.name}"] += stop - start
        return elements(self, info, start, stop)

    monkeypatch.setattr(FileInputs, "elements", counted)
    sweep({**recipe, "method": "task_arithmetic"}, {"scale": [0.1, 0.2, 0.3]}, tmp_path / "out")
    assert set(read.values()) == {24, 15, 7, 1} and len(read) == 4 * len(SHAPES)


def test_a_killed_sweep_goes_on(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(sweeps, "_POINTS", 3)
    sweep(recipe, GRID, tmp_path / "whole")
    seen: list[tuple[int, int]] = []

    def stop(done: int, total: int) -> None:
        seen.append((done, total))
        if done == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sweep(recipe, GRID, tmp_path / "out", progress=stop, workers=1)
    assert seen == [(done, 8) for done in range(1, 7)]
    assert (tmp_path / "out" / f".{NAMES[1]}.partial").exists()
    sweep(recipe, GRID, tmp_path / "out")
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_progress_counts_the_bytes_of_all_batches(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(sweeps, "_POINTS", 3)
    seen: list[tuple[int, int]] = []
    sweep(recipe, GRID, tmp_path / "out", progress=lambda d, t: seen.append((d.bytes, t.bytes)), workers=1)
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    assert {total for _, total in seen} == {seen[-1][0]} == {2 * make_plan(recipe).bytes_read}


# --------------------------------------------------------------------------------------- names


def test_names_are_readable_safe_and_different(recipe, tmp_path):
    grid = {"weights": [[1, 0.5, -1], [1, 0.5, 1]], "normalize": [True, False], "scale": [-1, 1e-9]}
    rows = sweep({**recipe, "method": "task_arithmetic"}, grid, tmp_path / "out")
    assert rows[0]["folder"] == "weights-1,0.5,-1_normalize-true_scale--1"
    names = sweeps._names([{"keys": text} for text in ("../a b", "..a b", "x" * 300, "x" * 301, "..", "é")])
    assert len(set(names)) == 6 and all(len(name) < 120 and "/" not in name for name in names)
    assert names[4] == "keys-.."


# --------------------------------------------------------------------------------------- batches


@given(
    ranks=st.lists(st.integers(0, 9), min_size=1, unique=True),
    scales=st.lists(st.integers(0, 9), min_size=1, unique=True),
    scale_first=st.booleans(),
    most_points=st.integers(1, 20),
    most_settings=st.none() | st.integers(1, 5),
)
def test_batches_hold_every_point_once_and_keep_to_their_limits(
    ranks, scales, scale_first, most_points, most_settings
):
    points = [{"rank": (rank + 1) / 10, "scale": scale} for rank in ranks for scale in scales]
    if scale_first:
        points.sort(key=lambda point: point["scale"])
    batches = list(in_batches("cart", points, most_points, most_settings))
    assert sorted(i for batch in batches for i in batch) == list(range(len(points)))
    order = [points[i]["rank"] for batch in batches for i in batch]
    assert order == sorted(order, key=order.index)  # points that differ in scale alone are neighbours
    for batch in batches:
        assert 0 < len(batch) <= most_points
        assert len({points[i]["rank"] for i in batch}) <= (most_settings or len(points))


@pytest.mark.parametrize(("peaks", "workers"), [(1, 1), (2, 1), (3, 1), (4, 2), (1000, 2)])
def test_memory_bounds_workers_and_settings(peaks, workers, recipe, tmp_path, monkeypatch):
    """Memory, given in peaks of a single merge, has room for the update of every setting of a batch in each worker."""
    calls: list[tuple[int, int]] = []
    merge_points = sweeps.merge_points

    def counted(points: Any, **options: Any) -> Any:
        calls.append((options["workers"], len(points)))
        return merge_points(points, **options)

    monkeypatch.setattr(sweeps, "merge_points", counted)
    ranks = [i / 20 for i in range(1, 21)]
    peak, update = make_plan(recipe).peak_bytes, 8 * max(prod(shape) for shape in SHAPES.values())
    sweep(recipe, {"rank": ranks}, tmp_path / "out", memory=peaks * peak, workers=2)
    fits = 1 + (peaks * peak // workers - peak) // update
    assert {count for count, _ in calls} == {workers}
    assert [size for _, size in calls][0] == min(fits, len(ranks))


# --------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("grid", "parts"),
    [
        ({}, ["grid is empty"]),
        ({"rank": []}, ["'rank' has no values"]),
        ({"rank": "0.1"}, ["'rank' has no values"]),
        ({"rank": 0.1}, ["'rank' has no values"]),
        ({"scale": [float("nan")]}, ["scale = nan"]),
        ({"rnak": [0.1]}, ["unknown parameter 'rnak'", "did you mean 'rank'?"]),
        ({"rank": [0.1, 1.5]}, ["rank = 1.5"]),
        ({"rank": [0.1, 0.2, 0.1]}, ["'rank' lists a value twice"]),
        ({"origin": ["mean", "men"]}, ["origin = 'men'"]),
    ],
)
def test_bad_grids_are_refused_before_anything_is_read(grid, parts, recipe, tmp_path):
    with refused(*parts):
        sweep(recipe, grid, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_point_that_does_not_suit_the_experts_is_refused_first(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(sweeps, "_POINTS", 1)
    grid = {"weights": [[1, 1, 1], [1, 1]]}
    with refused("2 weights for 3 experts"):
        sweep({**recipe, "method": "task_arithmetic"}, grid, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_sweep_into_a_file_is_refused(recipe, tmp_path):
    with refused("name a folder"):
        sweep(recipe, GRID, tmp_path / "out.safetensors")
