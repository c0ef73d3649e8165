"""How far things are, on a terminal and in a pipe."""

from __future__ import annotations

import io
import sys
import time
from pathlib import Path
from typing import Callable

import pytest

from mergeline.flows import console
from mergeline.flows.cli import text
from mergeline.merging.engine.work import Count
from mergeline.merging.files import write_json
from mergeline.tasks import progress
from mergeline.tasks.progress import Running, counting, told
from mergeline.tasks.workspace import Workspace


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Callable[[], Terminal]:
    """Makes stderr a terminal, when it is called: before, pytest puts its own in place."""

    def make() -> Terminal:
        screen = Terminal()
        monkeypatch.setattr(sys, "stderr", screen)
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setenv("COLUMNS", "120")
        return screen

    return make


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that stands until its one entry is changed."""
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "time", lambda: now[0])
    return now


def wait_for(screen: io.StringIO, part: str) -> None:
    deadline = time.monotonic() + 10
    while part not in screen.getvalue():
        assert time.monotonic() < deadline, f"'{part}' is not in {screen.getvalue()!r}"
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("done", "total", "seconds", "said"),
    [
        (10, 40, 20.0, ", 0.5/s, 1:00 left"),
        (1, 7300, 1.0, ", 1/s, 2:01:39 left"),
        (0, 40, 20.0, ""),
        (40, 40, 20.0, ""),
    ],
)
def test_rate_and_time_left(done, total, seconds, said):
    assert text.time_left(done, total, seconds) == said


def test_a_stage_in_words(clock):
    stage = Running("search@cart", since=900.0, done=12, total=40, unit="points", counting_since=976.0)
    assert console.words(stage) == "12/40 points, 0.5/s, 0:56 left"
    assert console.words(stage._replace(total=0)) == "100 s"


def test_a_merge_shows_bytes_rate_and_time_left_on_a_terminal(terminal, clock):
    screen, show = terminal(), text.progress()
    gib = 1 << 30
    total = Count.of(100, 40 * gib)
    clock[0] += 10
    show(Count.of(1, gib), total)
    clock[0] += 20
    show(Count.of(50, 21 * gib), total)
    last = screen.getvalue().split("\r")[-1]
    assert last == "merging 50/100 tensors, 21 GiB of 40 GiB, 1 GiB/s, 0:19 left\033[K"
    show(total, total)
    assert screen.getvalue().endswith("merging 100/100 tensors, 40 GiB of 40 GiB\033[K\n")


def test_a_merge_is_quiet_in_a_pipe_but_for_what_was_there(capsys, clock):
    show = text.progress()
    clock[0] += 100
    show(Count.of(31, 31), Count.of(100, 100))
    show(Count.of(32, 32), Count.of(100, 100))
    assert capsys.readouterr() == ("", "going on: 30 of 100 tensors are there\n")


def cost(workspace: Workspace, stage: str) -> None:
    write_json(workspace.state / "costs" / f"{stage}.json", {"stage": stage, "seconds": 1.25})


@pytest.fixture
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "_SECONDS", 0.02)
    monkeypatch.setattr(progress, "_SECONDS", 0)


def test_a_pipe_gets_a_line_a_stage(workspace: Path, capsys, quickly):
    ws = Workspace(workspace / "params.yaml")
    cost(ws, "heads")  # of an earlier run
    with console.watched(ws), told(ws.progress, "search@cart"), counting("points") as count:
        count(1, 4)
        time.sleep(0.1)
        cost(ws, "search@cart")
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert err.split()[1:] == ["search@cart", "1.2", "s"]


def test_a_terminal_also_gets_what_runs(workspace: Path, terminal, quickly):
    ws, screen = Workspace(workspace / "params.yaml"), terminal()
    with console.watched(ws):
        with told(ws.progress, "search@cart"), counting("points") as count:
            count(1, 4)
            wait_for(screen, "1/4 points")
            with told(ws.progress, "merge@average"):
                wait_for(screen, "merge@average")
        cost(ws, "search@cart")
        wait_for(screen, "1.2 s")
