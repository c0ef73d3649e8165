"""A run that is killed or interrupted at any moment is completed by the next one."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Callable, Iterator

import pytest
from mlflow import MlflowClient
from prefect_server import prefect_server, wait_for
from small_workspace import MERGES, TIME_LIMIT, SmallWorkspace, make_workspace

pytestmark = pytest.mark.slow

KILLS = int(os.environ.get("KILLS", "4"))
AT_ONCE = 2  # workspaces
START_SECONDS = 120


@pytest.fixture(scope="module")
def prefect(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with prefect_server(tmp_path_factory.mktemp("prefect")) as url:
        yield url


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> SmallWorkspace:
    """Nothing runs in it; every test copies it."""
    return make_workspace(tmp_path_factory.mktemp("clone"))


@contextmanager
def running(workspace: SmallWorkspace, prefect: str) -> Iterator[subprocess.Popen[str]]:
    """`mergeline run`, past its imports and at its first stage."""
    with workspace.start("mergeline", "run", PREFECT_API_URL=prefect) as run:
        wait_for((workspace.root / ".mergeline/last_run.json").exists, START_SECONDS)
        yield run


def finish(workspace: SmallWorkspace, prefect: str) -> float:
    """`mergeline run` to its end; the seconds from its first stage on."""
    with running(workspace, prefect) as run:
        begin = time.monotonic()
        _, errors = run.communicate(timeout=TIME_LIMIT)
    assert run.returncode == 0, errors
    return time.monotonic() - begin


def check_registry(workspace: SmallWorkspace) -> None:
    """MLflow has every run once, and the candidate as the champion."""
    client = MlflowClient(f"sqlite:///{workspace.root}/.mergeline/mlflow.db")
    experiments = [e.experiment_id for e in client.search_experiments()]
    runs = client.search_runs(experiments)
    parents = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    children = [run for run in runs if run not in parents]
    assert [run.info.status for run in runs] == ["FINISHED"] * (1 + len(MERGES))
    assert [run.data.tags["mlflow.parentRunId"] for run in children] == [parents[0].info.run_id] * len(MERGES)
    assert {run.info.run_name for run in children} == set(MERGES)
    (version,) = client.search_model_versions()
    board = json.loads((workspace.root / "build/leaderboard/leaderboard.json").read_text())
    candidate = next(row for row in board["rows"] if row["name"] == board["candidate"])
    assert version.tags["lineage.model"] == candidate["digest"]
    assert client.get_model_version_by_alias(version.name, "champion").version == version.version


def test_kill_at_any_moment(
    clone: SmallWorkspace,
    prefect: str,
    tmp_path: Path,
    record_testsuite_property: Callable[[str, object], None],
) -> None:
    with ThreadPoolExecutor(AT_ONCE) as pool:
        undisturbed = [clone.copy(tmp_path / f"undisturbed{i}") for i in range(AT_ONCE)]
        seconds = min(pool.map(lambda workspace: finish(workspace, prefect), undisturbed))
        expected = undisturbed[0]
        assert expected.outputs() == undisturbed[1].outputs()

        def kill_and_go_on(moment: float) -> bool:
            workspace = clone.copy(tmp_path / f"killed after {moment:.2f} s")
            with running(workspace, prefect) as run:
                time.sleep(moment)
                run.kill()
            workspace.check("mergeline", "run", PREFECT_API_URL=prefect)
            assert workspace.outputs() == expected.outputs()
            assert workspace.lock() == expected.lock()
            assert "up to date" in workspace.check("dvc", "status")
            check_registry(workspace)
            shutil.rmtree(workspace.root)
            return run.returncode == -signal.SIGKILL

        draw = random.Random(0)
        moments = [(i + draw.random()) / KILLS * seconds for i in range(KILLS)]
        record_testsuite_property("killed run", sum(pool.map(kill_and_go_on, moments)))  # not ended before


def test_kill_while_mlflow_makes_its_database(clone: SmallWorkspace, prefect: str, tmp_path: Path) -> None:
    workspace = clone.copy(tmp_path / "workspace")
    with running(workspace, prefect) as run:
        wait_for(lambda: [*workspace.root.glob(".mergeline/*mlflow.db*")], TIME_LIMIT)
        run.kill()
    workspace.check("mergeline", "run", PREFECT_API_URL=prefect)
    check_registry(workspace)


def test_control_c(clone: SmallWorkspace, prefect: str, tmp_path: Path) -> None:
    workspace = clone.copy(tmp_path / "workspace")
    with running(workspace, prefect) as run:
        time.sleep(3)
        run.send_signal(signal.SIGINT)
        _, errors = run.communicate(timeout=TIME_LIMIT)
    assert run.returncode == 130
    assert errors.splitlines()[-1] == "mergeline: stopped; what was finished is kept, run again to go on"
    workspace.check("mergeline", "run", PREFECT_API_URL=prefect)
    assert "up to date" in workspace.check("dvc", "status")


def test_two_runs_at_once(clone: SmallWorkspace, prefect: str, tmp_path: Path) -> None:
    workspace = clone.copy(tmp_path / "workspace")
    with running(workspace, prefect) as first:
        second = workspace.run("mergeline", "run", PREFECT_API_URL=prefect)
        _, errors = first.communicate(timeout=TIME_LIMIT)
    assert second.returncode == 2
    assert "another run is using this workspace" in second.stderr.splitlines()[-1]
    assert "Traceback" not in second.stderr
    assert first.returncode == 0, errors
    assert "up to date" in workspace.check("dvc", "status")
