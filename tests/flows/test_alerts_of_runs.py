"""Runs of a pipeline tell a webhook what became of them: promoted, held back, failed, killed; and say so themselves."""

from __future__ import annotations

import json
import os
import signal
from contextlib import contextmanager
from pathlib import Path
from subprocess import Popen
from typing import Any, Iterator

import psutil
import pytest
from prefect_server import wait_for
from small_workspace import TIME_LIMIT, SmallWorkspace, make_workspace
from test_prefect import ADDRESS, ON_LEAP_DAYS, deployed
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
    with serving(watched) as owner:
        pid = process_of_the_run(watched)
        assert pid in [child.pid for child in psutil.Process(owner.pid).children(recursive=True)]
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda: hook.titles, TIME_LIMIT)
    assert hook.titles == ["sample-clip: the run failed"]


def test_a_run_that_was_killed_with_its_server_is_told_by_the_next_one(watched: Watched, hook: Hook) -> None:
    watched.edit(gate(0.2, 0.8))
    with serving(watched) as owner:
        process_of_the_run(watched)
        owner.kill()
    assert hook.titles == []
    (watched.root / ADDRESS).unlink(missing_ok=True)
    with watched.start("mergeline", "serve", "--cron", ON_LEAP_DAYS) as owner:
        deployed(watched, owner)
        wait_for(lambda: hook.titles, TIME_LIMIT)
    assert hook.titles[0] == "sample-clip: the run failed"
    assert "`mergeline serve` was killed" in hook.sent[0]["message"]


@contextmanager
def serving(watched: Watched) -> Iterator[Popen[str]]:
    """The process of `mergeline serve` in the block, which was told of a checkpoint."""
    with watched.start("mergeline", "serve", "--cron", ON_LEAP_DAYS) as owner:
        deployed(watched, owner).tell()
        yield owner


def process_of_the_run(watched: Watched) -> int:
    """The process that runs stages, as soon as one does."""
    progress = watched.root / ".mergeline/progress"
    wait_for(lambda: running(progress), TIME_LIMIT)
    newest = max(progress.glob("*.json"), key=lambda file: file.stat().st_mtime_ns)
    return json.loads(newest.read_text())["pid"]


def test_no_address_is_left_in_the_workspace(watched: Watched) -> None:
    files = [path for path in watched.root.rglob("*") if path.is_file() and ".git" not in path.parts]
    assert not any(b"S3CR3T" in path.read_bytes() for path in files)
    assert Path(watched.root / ".mergeline/alerts.json").exists()
