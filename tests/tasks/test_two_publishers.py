"""Two who publish one pipeline to one MLflow server at the same time leave what they leave one after the other."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from interleaving import interleaved
from judged_workspace import PARAMS, JudgedWorkspace
from mlflow_server import mlflow_server

from mergeline.tasks import tracking, turns
from mergeline.tasks.register import champion, register
from mergeline.tasks.registry import versions
from mergeline.tasks.rollback import rollback
from mergeline.tasks.turns import turn

STRICT = {**PARAMS, "gates": {"minimum_gain": 0.0, "largest_drop": 0.05}}
GOOD, BETTER = ({"digits": n, "shapes": n} for n in (200, 260))
ORDERS = [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 20))]


@pytest.fixture
def team(tmp_path, monkeypatch, mlflow_database):
    """Two workspaces, of two merges one of which is better, and the database of both."""
    mlflow_database(tmp_path / "team")
    shutil.move(tmp_path / "team" / tracking.STATE / "mlflow.db", tmp_path / "team.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'team.db'}")
    good, better = JudgedWorkspace(tmp_path / "a"), JudgedWorkspace(tmp_path / "b")
    good.add("ties", GOOD)
    better.add("cart", BETTER)
    return good, better


def finished(root: Path):
    """The keys of the runs that the pipeline's experiment shows, all of which have ended."""
    client = tracking.connect(root)
    runs = client.search_runs([client.get_experiment_by_name("sample").experiment_id])
    assert {run.info.status for run in runs} == {"FINISHED"}
    tags = {run.info.run_id: run.data.tags for run in runs}
    assert all(own.get("mlflow.parentRunId", next(iter(tags))) in tags for own in tags.values())
    return sorted(own[tracking.RUN_KEY] for own in tags.values())


def registered(root: Path):
    """The merges that are versions, and that of the champion."""
    found = versions(tracking.connect(root), "sample")
    return sorted(version.merge for version in found), champion(root, STRICT).merge


@pytest.mark.parametrize("seed", ORDERS)
def test_two_judges_leave_the_better_champion_in_any_order(team, seed):
    good, better = (workspace.root for workspace in team)
    with interleaved(seed) as order:
        outcomes = order.run([lambda: register(good, STRICT), lambda: register(better, STRICT)])
    assert registered(good) == (["cart", "ties"], "cart")
    assert outcomes[1].passed and 0 < order.order.index(1 - order.order[0]) < len(order.order)
    [after] = {outcome.champion_after for outcome in outcomes[1:]}
    assert champion(good, STRICT).version == after
    keys = finished(good)
    assert len(keys) == len(set(keys)) == 4


@pytest.mark.parametrize("seed", ORDERS)
def test_two_who_publish_the_same_write_it_once(team, tmp_path, seed):
    good = team[0].root
    shutil.copytree(good, tmp_path / "copy")
    with interleaved(seed) as order:
        one, other = order.run([lambda: register(good, STRICT), lambda: register(tmp_path / "copy", STRICT)])
    assert (one.version, other.version, one.champion_after, other.champion_after) == ("1",) * 4
    assert registered(good) == (["ties"], "ties")
    keys = finished(good)
    assert len(keys) == len(set(keys)) == 2


@pytest.mark.parametrize("seed", ORDERS[:5])
def test_a_rollback_in_the_middle_of_a_judgement_counts(team, seed):
    good, better = (workspace.root for workspace in team)
    register(good, STRICT)
    register(better, STRICT)
    rollback(good, STRICT, "1")
    with interleaved(seed) as order:
        order.run([lambda: register(better, STRICT), lambda: rollback(good, STRICT, "1")])
    assert champion(good, STRICT).version == "1"  # version 2 was taken down


def test_a_turn_is_one_processs_at_a_time(team):
    root = team[0].root
    client = tracking.connect(root)
    experiment_id = tracking.experiment(client, root, "sample")
    inside, most = 0, 0

    def work() -> None:
        nonlocal inside, most
        for _ in range(5):
            with turn(client, experiment_id):
                inside += 1
                most = max(most, inside)
                time.sleep(0.01)
                inside -= 1

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1 and not [t for t in client.get_experiment(experiment_id).tags if "turn" in t]


def test_the_claim_of_one_who_was_killed_is_removed(team, monkeypatch):
    root = team[0].root
    client = tracking.connect(root)
    experiment_id = tracking.experiment(client, root, "sample")
    client.set_experiment_tag(experiment_id, "mergeline.turn.0123", "claimed")
    monkeypatch.setattr(turns, "_LONGEST_SECONDS", 0.5)
    with turn(client, experiment_id):
        assert "mergeline.turn.0123" not in client.get_experiment(experiment_id).tags


def test_the_claim_of_a_process_of_this_machine_that_was_killed_is_removed_at_once(team, monkeypatch):
    root = team[0].root
    client = tracking.connect(root)
    experiment_id = tracking.experiment(client, root, "sample")
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    with turn(client, experiment_id):
        [own] = [tag for tag in client.get_experiment(experiment_id).tags if "turn" in tag]
    left = own.replace(f".{os.getpid()}.", f".{ended.pid}.")
    client.set_experiment_tag(experiment_id, left, "claimed")
    monkeypatch.setattr(turns, "_LONGEST_SECONDS", float("inf"))
    with turn(client, experiment_id):
        assert left not in client.get_experiment(experiment_id).tags


@pytest.mark.slow
def test_processes_that_publish_to_a_server_at_once_leave_one_registry(team, tmp_path, monkeypatch):
    script = """
import pathlib, sys
sys.path[:0] = {path!r}
from mergeline.tasks.register import register
print(register(pathlib.Path({root!r}), {params!r}).champion_after)
"""
    (tmp_path / "server").mkdir()
    with mlflow_server(tmp_path / "server") as url:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", url)
        roots = [str(workspace.root) for workspace in team]
        codes = [script.format(path=sys.path, root=root, params=STRICT) for root in roots]
        started = [
            subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            for code in codes
        ]  # fmt: skip
        ended = [process.communicate(timeout=300) for process in started]
        assert [process.returncode for process in started] == [0, 0], ended
        assert registered(team[0].root) == (["cart", "ties"], "cart")
        keys = finished(team[0].root)
        assert len(keys) == len(set(keys)) == 4
