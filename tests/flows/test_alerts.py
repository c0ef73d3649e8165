"""Runs of a pipeline tell a webhook what became of them: promoted, held back, failed, killed; and say so themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Iterator

import psutil
import pytest
from prefect_server import wait_for
from small_workspace import TIME_LIMIT, SmallWorkspace, make_workspace
from test_prefect import ON_LEAP_DAYS, deployed
from webhook import Hook, webhook

from mergeline.tasks.progress import running

pytestmark = pytest.mark.slow


class Watched(SmallWorkspace):
    """A workspace whose params.yaml names a webhook."""

    hook: Hook

    def environment(self, **more: str) -> dict[str, str]:
        return super().environment(TEAM=self.hook.url, **more)


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    workspace = Watched(make_workspace(tmp_path_factory.mktemp("clone")).root)
    alerts = {event: ["TEAM"] for event in ("failure", "promotion", "held_back")}
    workspace.edit(lambda params: params.update(alerts=alerts))
    with webhook() as workspace.hook:
        yield workspace


@pytest.fixture
def hook(watched: Watched) -> Hook:
    watched.hook.sent.clear()
    return watched.hook


def gate(minimum: float, density: float) -> Any:
    def change(params: dict[str, Any]) -> None:
        params["gates"]["minimum_mean"] = minimum
        params["merges"]["ties"]["params"]["density"] = density

    return change


def test_a_promotion_is_told_and_a_run_with_nothing_to_do_tells_nothing(watched: Watched, hook: Hook) -> None:
    done = watched.run("mergeline", "run")
    assert done.returncode == 0, done.stderr
    [title] = hook.titles
    assert title.startswith("sample-clip: version 1 (") and title.endswith(") is champion")
    assert f"told TEAM: {title}" in done.stderr
    watched.check("mergeline", "run")
    assert len(hook.sent) == 1


def test_a_gate_that_held_something_back_is_told(watched: Watched, hook: Hook) -> None:
    watched.edit(gate(0.99, 0.3))
    watched.edit(lambda params: params["merges"]["cart"].update(search={"rank": [0.3], "scale": [1.5]}))
    done = watched.run("mergeline", "run")
    [title] = hook.titles
    assert title.endswith(" was held back") and f"told TEAM: {title}" in done.stderr
    assert "0.99" in hook.sent[0]["message"]


def test_a_failure_is_told(watched: Watched, hook: Hook) -> None:
    expert = watched.root / "samples/experts/digits.safetensors"
    good = expert.read_bytes()
    expert.write_bytes(b"not a checkpoint")
    try:
        done = watched.run("mergeline", "run")
    finally:
        expert.write_bytes(good)
    assert done.returncode == 2
    assert hook.titles == ["sample-clip: the run failed"]
    assert "digits.safetensors" in hook.sent[0]["message"]
    assert "told TEAM: sample-clip: the run failed" in done.stderr


def test_a_served_run_that_was_killed_is_told(watched: Watched, hook: Hook) -> None:
    watched.edit(gate(0.2, 0.7))
    with watched.start("mergeline", "serve", "--cron", ON_LEAP_DAYS) as owner:
        served = deployed(watched, owner)
        served.tell()
        wait_for(lambda: running(watched.root / ".mergeline/progress"), TIME_LIMIT)
        children = psutil.Process(owner.pid).children(recursive=True)
        [run] = [child for child in children if "spawn_main" in " ".join(child.cmdline())]
        run.kill()
        wait_for(lambda: hook.titles, TIME_LIMIT)
    assert hook.titles == ["sample-clip: the run failed"]


def test_no_address_is_left_in_the_workspace(watched: Watched) -> None:
    files = [path for path in watched.root.rglob("*") if path.is_file() and ".git" not in path.parts]
    assert not any(b"S3CR3T" in path.read_bytes() for path in files)
    assert Path(watched.root / ".mergeline/alerts.json").exists()
