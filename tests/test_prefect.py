"""`mergeline serve` with its own Prefect server: events start runs, pages show them, and all ends with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Iterator, NamedTuple

import psutil
import pytest
from prefect_server import artifacts, automations, flow_runs, task_runs, wait_for
from small_workspace import TIME_LIMIT, SmallWorkspace, make_workspace

pytestmark = pytest.mark.slow

ON_LEAP_DAYS = "0 0 29 2 *"  # only events start runs here
END_SECONDS = 30


class Served(NamedTuple):
    """A workspace, and the API URL of the server that `mergeline serve` started for it."""

    workspace: SmallWorkspace
    url: str

    def notify(self) -> dict[str, Any]:
        """Tell of a new checkpoint; the flow run that this starts, at its end."""
        before = len(self._ended())
        assert self.url in self.workspace.check("mergeline", "notify", "digits")
        return wait_for(lambda: self._ended()[before:], TIME_LIMIT)[0]

    def _ended(self) -> list[dict[str, Any]]:
        return flow_runs(self.url, "Completed", "Failed", "Crashed")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    workspace = make_workspace(tmp_path_factory.mktemp("clone"))
    address = workspace.root / ".mergeline/prefect/server.json"
    with workspace.start("mergeline", "serve", "--cron", ON_LEAP_DAYS):
        wait_for(address.exists, TIME_LIMIT)
        url = json.loads(address.read_text())["url"]
        wait_for(lambda: automations(url), TIME_LIMIT)
        yield Served(workspace, url)


def test_an_event_starts_a_run(served: Served) -> None:
    run = served.notify()
    assert (run["state_type"], run["created_by"]["type"]) == ("COMPLETED", "AUTOMATION")
    assert artifacts(served.url, run) == {"leaderboard": "table", "report": "markdown", "heatmap": "image"}
    assert {"checkpoint-file@digits", "extract", "merge@cart", "publish"} < set(task_runs(served.url, run))


def test_the_next_run_is_cached(served: Served) -> None:
    tasks = task_runs(served.url, served.notify())
    assert tasks.pop("publish") == "Completed"
    assert set(tasks.values()) == {"Cached"}


def test_bad_input_fails_in_one_line(served: Served) -> None:
    expert = served.workspace.root / "samples/experts/digits.safetensors"
    good = expert.read_bytes()
    expert.write_bytes(b"not a checkpoint")
    try:
        run = served.notify()
    finally:
        expert.write_bytes(good)
    message = run["state"]["message"]
    assert run["state_type"] == "FAILED"
    assert "UserError" in message and "digits.safetensors" in message and "\n" not in message
    tasks = task_runs(served.url, run)
    assert (tasks["checkpoint-file@digits"], tasks["compare"]) == ("Failed", "NotReady")


@pytest.mark.parametrize(
    "command, sign_of_work",
    [("run", ".mergeline/digests.sqlite"), ("serve", ".mergeline/prefect/server.json")],
)
def test_the_server_ends_with_its_owner(command: str, sign_of_work: str, tmp_path: Path) -> None:
    workspace = make_workspace(tmp_path)
    with workspace.start("mergeline", command) as owner:
        wait_for((workspace.root / sign_of_work).exists, TIME_LIMIT)
        children = psutil.Process(owner.pid).children(recursive=True)
        owner.kill()
    _, alive = psutil.wait_procs(children, timeout=END_SECONDS)
    assert children and not alive
    told = workspace.run("mergeline", "notify", "digits")
    assert (told.returncode, "no server to tell" in told.stderr) == (2, True)
