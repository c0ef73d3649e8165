"""kill -9 of `mergeline serve` at random moments: its processes end, and the next run has the workspace and works.

KILLS=20 kills it more often than by default.
"""

from __future__ import annotations

import os
import random
import time
from contextlib import contextmanager
from datetime import datetime, timezone
from subprocess import Popen
from typing import Iterator

import psutil
import pytest
from prefect_server import flow_runs, wait_for
from small_workspace import TIME_LIMIT, SmallWorkspace, make_workspace
from test_prefect import ADDRESS, END_SECONDS, ON_LEAP_DAYS, deployed

from mergeline.flows.server import announced_server
from mergeline.tasks.progress import running

pytestmark = pytest.mark.slow

KILLS = int(os.environ.get("KILLS", "2"))
LONGEST_SECONDS = 40  # after the event; by then a whole run may have ended


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> SmallWorkspace:
    return make_workspace(tmp_path_factory.mktemp("clone"))


@contextmanager
def serving(workspace: SmallWorkspace) -> Iterator[tuple[Popen[str], str]]:
    """The process of `mergeline serve` in the block, and the API URL of its server, which was told of a checkpoint."""
    (workspace.root / ADDRESS).unlink(missing_ok=True)  # that of the one that was killed before
    with workspace.start("mergeline", "serve", "--cron", ON_LEAP_DAYS) as owner:
        served = deployed(workspace, owner)
        served.tell()
        yield owner, served.url


def kill(owner: Popen[str]) -> None:
    """kill -9; what it had started must end by itself."""
    children = psutil.Process(owner.pid).children(recursive=True)
    owner.kill()
    _, alive = psutil.wait_procs(children, timeout=END_SECONDS)
    assert children and not alive


def change(workspace: SmallWorkspace, density: float) -> None:
    """So that there is something to do again."""
    workspace.edit(lambda params: params["merges"]["ties"]["params"].update(density=density))


@pytest.mark.parametrize("seed", range(KILLS))
def test_after_kill_9_of_serve_the_next_run_works(seed: int, workspace: SmallWorkspace) -> None:
    change(workspace, 0.2 + seed / 100)
    with serving(workspace) as (owner, _):
        time.sleep(random.Random(seed).uniform(0, LONGEST_SECONDS))
        kill(owner)
    assert announced_server(workspace.root / ".mergeline") is None
    assert not (workspace.root / ADDRESS).exists()
    workspace.check("mergeline", "run")
    assert "up to date" in workspace.check("dvc", "status", "dvc.yaml")


@pytest.mark.parametrize(("command", "density"), [("serve", 0.81), ("pages", 0.82), ("run", 0.83)])
def test_a_server_that_dies_alone_ends_its_owner_with_one_line(
    command: str, density: float, workspace: SmallWorkspace
) -> None:
    """With an exit code at which a supervisor starts it again."""
    change(workspace, density)
    (workspace.root / ADDRESS).unlink(missing_ok=True)
    options = ("--cron", ON_LEAP_DAYS) if command == "serve" else ()
    with workspace.start("mergeline", command, *options) as owner:

        def works() -> bool:
            assert owner.poll() is None, owner.communicate()
            announced = (workspace.root / ADDRESS).exists()
            return announced if command == "pages" else bool(running(workspace.root / ".mergeline/progress"))

        if command == "serve":
            deployed(workspace, owner).tell()
        wait_for(works, TIME_LIMIT)
        children = psutil.Process(owner.pid).children(recursive=True)
        [server] = [child for child in children if "mergeline.flows.embedded_server" in child.cmdline()]
        server.kill()
        _, err = owner.communicate(timeout=END_SECONDS)
    assert owner.returncode == 1 and "Traceback" not in err
    assert "server.log, and start again" in err.splitlines()[-1]
    assert not psutil.wait_procs(children, timeout=END_SECONDS)[1]
    assert not (workspace.root / ADDRESS).exists()
    if command != "pages":
        workspace.check("mergeline", "run")
        assert "up to date" in workspace.check("dvc", "status", "dvc.yaml")


def test_a_run_that_was_killed_holds_no_place_in_the_queue(workspace: SmallWorkspace) -> None:
    change(workspace, 0.9)
    began = datetime.now(timezone.utc).isoformat()
    with serving(workspace) as (owner, url):
        # Not one that an earlier kill left, until serve has told Prefect of it.
        [killed] = wait_for(
            lambda: [run for run in flow_runs(url, "Running") if run["created"] > began], TIME_LIMIT
        )
        kill(owner)
    with serving(workspace) as (_, again):
        wait_for(
            lambda: [r for r in flow_runs(again, "Completed") if r["created"] > killed["created"]], TIME_LIMIT
        )
        assert killed["id"] in [run["id"] for run in flow_runs(again, "Crashed")]
    assert "up to date" in workspace.check("dvc", "status", "dvc.yaml")
