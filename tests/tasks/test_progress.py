"""How far stages are, as whoever watches sees it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mergeline.tasks import progress
from mergeline.tasks.progress import counting, running, told
from mergeline.tasks.workspace import Workspace


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_SECONDS", 0)


def test_a_stage_tells_what_it_counts_and_nothing_when_it_ended(tmp_path):
    with told(tmp_path, "search@cart"):
        [stage] = running(tmp_path)
        assert (stage.stage, stage.total, stage.unit) == ("search@cart", 0, "")
        with counting("points") as count:
            count(3, 40)
            [stage] = running(tmp_path)
            assert (stage.done, stage.total, stage.unit) == (3, 40, "points")
            assert stage.counting_since >= stage.since
    assert running(tmp_path) == []


def test_a_count_within_a_count_is_not_told(tmp_path):
    with told(tmp_path, "baselines"), counting("models") as models:
        models(1, 9)
        with counting("examples") as examples:
            examples(500, 1000)
        assert [(s.done, s.total, s.unit) for s in running(tmp_path)] == [(1, 9, "models")]


def test_outside_a_stage_nothing_is_told(tmp_path):
    with counting("points") as count:
        count(1, 2)
    assert list(tmp_path.iterdir()) == []


def test_a_stage_that_fails_is_gone_and_one_that_was_killed_is_not_shown(tmp_path):
    with pytest.raises(ValueError), told(tmp_path, "heads"):
        raise ValueError
    assert running(tmp_path) == []
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    with told(tmp_path, "extract"):
        file = tmp_path / "extract.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "pid": dead.pid}))
        assert running(tmp_path) == []


def test_files_are_written_seldom(tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "_SECONDS", 1000)
    with told(tmp_path, "merge@cart"), counting("tensors") as count:
        before = (tmp_path / "merge@cart.json").stat().st_mtime_ns
        for done in range(100):
            count(done, 100)
        assert (tmp_path / "merge@cart.json").stat().st_mtime_ns == before


@pytest.mark.slow
def test_searches_merges_and_evaluations_count(workspace: Path, mergeline, monkeypatch):
    seen: dict[str, set[tuple[int, str]]] = {}
    write = progress._Told.write

    def noted(self: progress._Told) -> None:
        if self.state["total"]:
            seen.setdefault(self.state["stage"], set()).add((self.state["total"], self.state["unit"]))
        write(self)

    monkeypatch.setattr(progress._Told, "write", noted)
    params = workspace / "params.yaml"
    for step in ("fetch", "data", "heads", "baselines", "fit", "search", "merge-all", "evaluate"):
        assert mergeline(step, "--params", params).code == 0
    tensors = seen["merge@cart"]
    assert seen["search@cart"] == {(4, "points")} and seen["baselines"] == {(4, "models")}
    assert {unit for _, unit in tensors} == {"tensors"} and len(tensors) == 1
    [(examples, unit)] = seen["evaluate@cart"]
    assert unit == "examples" and examples > 1000
    assert not list((Workspace(params).progress).iterdir())
