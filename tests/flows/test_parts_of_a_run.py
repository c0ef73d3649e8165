"""`mergeline run` of nothing, of a part, of what is forced, and of what was killed: dvc.lock is right each time."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest
from ruamel.yaml import YAML
from small_workspace import TIME_LIMIT, SmallWorkspace, make_workspace

pytestmark = pytest.mark.slow

TIES = {"fit@ties", "search@ties", "merge@ties", "evaluate@ties"}
CART = {"fit@cart", "search@cart", "merge@cart", "evaluate@cart"}


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> SmallWorkspace:
    workspace = make_workspace(tmp_path_factory.mktemp("clone"))
    workspace.check("mergeline", "run")
    return workspace


@pytest.fixture
def workspace(ran: SmallWorkspace, tmp_path: Path) -> SmallWorkspace:
    return ran.copy(tmp_path / "workspace")


def locked(workspace: SmallWorkspace) -> dict[str, object]:
    return YAML(typ="safe").load(workspace.root / "dvc.lock")["stages"]


def stale(workspace: SmallWorkspace) -> set[str]:
    """The stages that DVC would run."""
    return set(json.loads(workspace.check("dvc", "status", "--json", "dvc.yaml")))


def test_a_run_with_nothing_to_do_starts_no_server(workspace: SmallWorkspace) -> None:
    log = workspace.root / ".mergeline/prefect/server.log"
    before, lock = log.stat().st_mtime_ns, workspace.lock()
    with workspace.stages_run() as stages:
        done = workspace.run("mergeline", "run")
    assert (
        (done.returncode, stages) == (0, set()) and "Prefect" not in done.stderr and "\n0 of " in done.stdout
    )
    assert (log.stat().st_mtime_ns, workspace.lock()) == (before, lock)
    last = json.loads(workspace.check("mergeline", "run", "--status", "--json"))["last_run"]
    assert last["outcome"] == "completed" and CART < set(last["ran"])


def test_a_part_runs_with_what_it_needs_and_dvc_knows_it_alone(workspace: SmallWorkspace) -> None:
    before = locked(workspace)

    def change(params: dict) -> None:
        params["merges"]["ties"]["params"]["density"] = 0.3
        params["merges"]["cart"]["search"]["rank"] = [0.2]

    workspace.edit(change)
    with workspace.stages_run() as stages:
        printed = workspace.check("mergeline", "run", "--only", "ties")
    assert stages == TIES and f"4 of {len(before)} stages ran" in printed
    after = locked(workspace)
    assert {name for name in before if after[name] != before[name]} == TIES
    assert not stale(workspace) & TIES and CART - {"evaluate@cart"} <= stale(workspace)
    with workspace.stages_run() as stages:
        workspace.check("mergeline", "run")
    assert stages == CART | {"compare"} and not stale(workspace)


def test_what_is_forced_runs_and_is_the_same(workspace: SmallWorkspace) -> None:
    before = workspace.outputs(), workspace.lock()
    with workspace.stages_run() as stages:
        workspace.check("mergeline", "run", "--force", "merge@ties")
    assert stages == {"merge@ties"} and (workspace.outputs(), workspace.lock()) == before
    assert not stale(workspace)


def test_a_part_that_is_killed_leaves_all_as_it_was(workspace: SmallWorkspace) -> None:
    before = workspace.outputs(), workspace.lock()
    telling = workspace.root / ".mergeline/progress/search@cart.json"
    arguments = ("run", "--only", "cart", "--force", "search@cart")
    with workspace.start("mergeline", *arguments) as process:
        deadline = time.monotonic() + TIME_LIMIT
        while not telling.exists():
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
    assert (workspace.outputs(), workspace.lock()) == before and not stale(workspace)
    assert "did not end" in workspace.check("mergeline", "run", "--status")
    with workspace.stages_run() as stages:
        workspace.check("mergeline", *arguments)
    assert stages == {"search@cart"} and (workspace.outputs(), workspace.lock()) == before
