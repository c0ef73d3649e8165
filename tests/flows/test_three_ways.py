"""`mergeline run`, `dvc repro` and a scheduled run: three ways to the same bytes and the same MLflow runs."""

from __future__ import annotations

import json
import shutil
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Iterator, NamedTuple

import pytest
from mlflow import MlflowClient
from mlflow_server import mlflow_server
from prefect_server import flow_runs, prefect_server, task_runs, wait_for
from small_workspace import MERGES, TIME_LIMIT, SmallWorkspace, make_workspace

pytestmark = pytest.mark.slow

EVERY_MINUTE = "* * * * *"
TIES_BRANCH = {"fit@ties", "search@ties", "merge@ties", "evaluate@ties", "compare"}


class Team(NamedTuple):
    """The servers that all workspaces share."""

    prefect: str
    mlflow: str

    @property
    def settings(self) -> dict[str, str]:
        return {"PREFECT_API_URL": self.prefect, "MLFLOW_TRACKING_URI": self.mlflow}


class Scheduled(NamedTuple):
    """A workspace and the first two flow runs that its schedule started."""

    workspace: SmallWorkspace
    runs: list[dict[str, Any]]


@pytest.fixture(scope="module")
def team(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Team]:
    with (
        prefect_server(tmp_path_factory.mktemp("prefect")) as prefect,
        mlflow_server(tmp_path_factory.mktemp("mlflow")) as mlflow,
    ):
        yield Team(prefect, mlflow)


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> SmallWorkspace:
    return make_workspace(tmp_path_factory.mktemp("clone"))


@pytest.fixture(scope="module")
def ran(clone: SmallWorkspace, team: Team, tmp_path_factory: pytest.TempPathFactory) -> SmallWorkspace:
    workspace = clone.copy(tmp_path_factory.mktemp("ran") / "workspace")
    workspace.check("mergeline", "run", **team.settings)
    return workspace


@pytest.fixture(scope="module")
def reproduced(clone: SmallWorkspace, team: Team, tmp_path_factory: pytest.TempPathFactory) -> SmallWorkspace:
    workspace = clone.copy(tmp_path_factory.mktemp("reproduced") / "workspace")
    workspace.check("dvc", "repro")
    workspace.check("mergeline", "publish", **team.settings)
    return workspace


@pytest.fixture(scope="module")
def scheduled(clone: SmallWorkspace, team: Team, tmp_path_factory: pytest.TempPathFactory) -> Scheduled:
    workspace = clone.copy(tmp_path_factory.mktemp("scheduled") / "workspace")
    with workspace.start("mergeline", "serve", "--cron", EVERY_MINUTE, **team.settings):
        wait_for(lambda: flow_runs(team.prefect, "Scheduled"), TIME_LIMIT)
        # Taken while they are seen: the end of serve calls a run cancelled whose process has not ended yet.
        runs = wait_for(lambda: found if len(found := scheduled_runs(team)) > 1 else None, TIME_LIMIT)
    return Scheduled(workspace, runs[:2])


def scheduled_runs(team: Team) -> list[dict[str, Any]]:
    """The completed flow runs that a schedule started, the earliest first."""
    return [run for run in flow_runs(team.prefect, "Completed") if run["auto_scheduled"]]


def shown_in_mlflow(team: Team) -> list[dict[str, Any]]:
    """Everything MLflow tells of its runs."""
    client = MlflowClient(team.mlflow)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    return [run.to_dictionary() for run in client.search_runs(experiments)]


def write_times(workspace: SmallWorkspace) -> dict[str, int]:
    """When each output was written; dvc.lock too."""
    files = [*workspace.outputs(), "dvc.lock"]
    return {name: (workspace.root / name).stat().st_mtime_ns for name in files}


def test_same_bytes(ran: SmallWorkspace, reproduced: SmallWorkspace, scheduled: Scheduled) -> None:
    assert ran.outputs() == reproduced.outputs() == scheduled.workspace.outputs()
    assert ran.lock() == reproduced.lock() == scheduled.workspace.lock()
    for workspace in (ran, reproduced, scheduled.workspace):
        assert "up to date" in workspace.check("dvc", "status")


@pytest.mark.parametrize("way", ["ran", "reproduced"])
def test_all_that_a_run_leaves_to_git_is_dvc_lock(way: str, request: pytest.FixtureRequest) -> None:
    workspace: SmallWorkspace = request.getfixturevalue(way)
    status = ["git", "-C", str(workspace.root), "status", "--porcelain"]
    assert subprocess.run(status, capture_output=True, check=True, text=True).stdout == "?? dvc.lock\n"


def test_same_mlflow_runs(
    ran: SmallWorkspace, reproduced: SmallWorkspace, scheduled: Scheduled, team: Team
) -> None:
    tags = [run["data"]["tags"] for run in shown_in_mlflow(team)]
    assert len({t["mergeline.run_key"] for t in tags}) == len(tags) == 1 + len(MERGES)
    assert sum("mlflow.parentRunId" not in t for t in tags) == 1
    client = MlflowClient(team.mlflow)
    (version,) = client.search_model_versions()
    assert client.get_model_version_by_alias(version.name, "champion").version == version.version


def test_a_scheduled_run_again(scheduled: Scheduled, team: Team) -> None:
    first, second = scheduled.runs
    assert not flow_runs(team.prefect, "Failed")
    assert set(task_runs(team.prefect, first).values()) == {"Completed"}
    again = task_runs(team.prefect, second)
    assert again.pop("publish") == "Completed"
    assert set(again.values()) == {"Cached"}
    start = datetime.fromisoformat(second["start_time"]).astimezone(timezone.utc).timestamp()
    assert max(write_times(scheduled.workspace).values()) < start * 1e9


def test_run_again(ran: SmallWorkspace, team: Team) -> None:
    before = write_times(ran), shown_in_mlflow(team)
    with ran.stages_run() as stages:
        printed = ran.check("mergeline", "run", **team.settings)
    assert not stages and "\n0 of " in printed
    assert (write_times(ran), shown_in_mlflow(team)) == before
    assert "up to date" in ran.check("dvc", "repro")


def test_repro_again(reproduced: SmallWorkspace, team: Team) -> None:
    before = write_times(reproduced), shown_in_mlflow(team)
    assert "up to date" in reproduced.check("dvc", "repro")
    reproduced.check("mergeline", "publish", **team.settings)
    with reproduced.stages_run() as stages:
        printed = reproduced.check("mergeline", "run", **team.settings)
    assert not stages and "\n0 of " in printed
    assert (write_times(reproduced), shown_in_mlflow(team)) == before


def test_one_parameter_changes_one_branch(
    ran: SmallWorkspace, reproduced: SmallWorkspace, team: Team, tmp_path: Path
) -> None:
    by_prefect, by_dvc = ran.copy(tmp_path / "prefect"), reproduced.copy(tmp_path / "dvc")
    for workspace, command in ((by_prefect, "mergeline run"), (by_dvc, "dvc repro")):
        workspace.edit(lambda params: params["merges"]["ties"]["params"].update(density=0.3))
        with workspace.stages_run() as stages:
            workspace.check(*command.split(), PREFECT_API_URL=team.prefect)
        assert stages == TIES_BRANCH
    assert by_prefect.outputs() == by_dvc.outputs() != ran.outputs()
    assert by_prefect.lock() == by_dvc.lock()


def lose_and_damage_outputs(workspace: SmallWorkspace) -> None:
    shutil.rmtree(workspace.root / "build/merges/ties")
    search = workspace.root / "build/search/cart.json"
    search.unlink()  # it may be a hard link into DVC's cache
    search.write_text("{}")


@pytest.mark.parametrize("command", ["mergeline run", "dvc repro"])
def test_outputs_come_back_from_the_cache(
    command: str, ran: SmallWorkspace, team: Team, tmp_path: Path
) -> None:
    workspace = ran.copy(tmp_path / "workspace")
    lose_and_damage_outputs(workspace)
    with workspace.stages_run() as stages:
        workspace.check(*command.split(), **team.settings)
    assert not stages
    assert workspace.outputs() == ran.outputs()


def test_without_a_cache_only_those_are_made_again(ran: SmallWorkspace, team: Team, tmp_path: Path) -> None:
    workspace = ran.copy(tmp_path / "workspace")
    shutil.rmtree(workspace.root / ".dvc/cache")
    lose_and_damage_outputs(workspace)
    with workspace.stages_run() as stages:
        workspace.check("mergeline", "run", **team.settings)
    assert stages == {"merge@ties", "search@cart"}
    assert workspace.outputs() == ran.outputs()
    assert "up to date" in workspace.check("dvc", "status")


def test_statistics_are_waited_for_and_what_reads_them_alone_follows_them(
    clone: SmallWorkspace, team: Team, tmp_path: Path
) -> None:
    """By DVC as by Prefect, with dvc.yaml as it comes."""
    by_prefect, by_dvc = clone.copy(tmp_path / "prefect"), clone.copy(tmp_path / "dvc")

    def run() -> list[set[str]]:
        ran = []
        for workspace, command in ((by_prefect, "mergeline run"), (by_dvc, "dvc repro")):
            with workspace.stages_run() as stages:
                workspace.check(*command.split(), **team.settings)
            ran.append(stages)
        assert by_prefect.outputs() == by_dvc.outputs() and by_prefect.lock() == by_dvc.lock()
        assert "up to date" in by_prefect.check("dvc", "status")
        return ran

    for workspace in (by_prefect, by_dvc):
        workspace.edit(
            lambda params: params.update(
                statistics={"gram": {"images": 4}},
                merges={"regmean": {"method": "regmean"}, "average": {"method": "average"}},
            )
        )
    for stages in run():
        assert {"statistics@gram", "merge@regmean", "merge@average"} <= stages
    for workspace in (by_prefect, by_dvc):
        workspace.edit(lambda params: params["statistics"]["gram"].update(images=8))
    for stages in run():
        assert {"statistics@gram", "fit@regmean", "search@regmean", "merge@regmean"} <= stages
        assert not {"search@average", "merge@average", "evaluate@average"} & stages


def test_a_search_with_a_budget_is_the_same_study_by_every_way(
    clone: SmallWorkspace, team: Team, tmp_path: Path
) -> None:
    """By Prefect, by DVC, and by a sweep: the same points, and the same choice."""
    search = {
        "sampler": "tpe",
        "budget": 6,
        "race": True,
        "space": {"rank": {"low": 0.05, "high": 0.5, "log": True}, "scale": {"low": 0.5, "high": 3}},
    }
    found = []
    for way in (["mergeline", "run"], ["dvc", "repro"], ["mergeline", "sweep", "--params", "params.yaml"]):
        workspace = clone.copy(tmp_path / way[1])
        workspace.edit(lambda params: params.update(merges={"cart": {"method": "cart", "search": search}}))
        out = ["--out", "table.md"] if way[1] == "sweep" else []
        workspace.check(*way, *out, **team.settings)
        found.append(workspace.outputs())
    assert len(json.loads((workspace.root / "build/search/cart.json").read_text())["points"]) == 6
    assert found[0] == found[1] == found[2]
