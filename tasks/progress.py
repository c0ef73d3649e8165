"""How far a stage is: a count in `.mergeline/progress/STAGE.json`, for whoever watches, maybe from another process."""

from __future__ import annotations

import json
import os
import time
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Callable, Iterator, NamedTuple

from mergeline.merging.files import json_bytes, write_bytes

Count = Callable[[int, int], None]  # takes how many are done, and of how many

_SECONDS = 0.5  # between two writings


class Running(NamedTuple):
    """A stage that runs. `since` and `counting_since` are of time.time(); `unit` is empty where nothing is counted."""

    stage: str
    since: float
    done: int
    total: int
    unit: str
    counting_since: float


class _Told:
    """The file of one stage."""

    def __init__(self, file: Path, stage: str):
        self.file, self.said = file, ""
        self.state: dict[str, Any] = {"stage": stage, "since": time.time(), "done": 0, "total": 0, "unit": ""}
        self.write()

    def count(self, done: int, total: int) -> None:
        self.state |= {"done": int(done), "total": int(total)}
        if time.monotonic() - self._written >= _SECONDS:
            self.write()

    def write(self) -> None:
        self._written = time.monotonic()
        write_bytes(self.file, json_bytes({"pid": os.getpid(), **self.state}), lasting=False)


_CURRENT: ContextVar[_Told | None] = ContextVar("stage", default=None)


@contextmanager
def told(folder: Path, stage: str) -> Iterator[_Told]:
    """The stage runs in this block; what it counts is told in `folder`, and what it says is `said` of what is given."""
    file = folder / f"{stage}.json"
    current = _Told(file, stage)
    token = _CURRENT.set(current)
    try:
        yield current
    finally:
        _CURRENT.reset(token)
        file.unlink(missing_ok=True)


def said_of_stage(words: str) -> None:
    """What people are told of the stage that runs when it has ended; "" is nothing, and outside a stage nobody is."""
    if current := _CURRENT.get():
        current.said = words


@contextmanager
def adding(unit: str, total: int) -> Iterator[Callable[[int], None]]:
    """As `counting`, of `total` in all: takes how many more are done."""
    done = 0
    with counting(unit) as count:

        def more(some: int) -> None:
            nonlocal done
            done += some
            count(done, total)

        yield more


@contextmanager
def counting(unit: str) -> Iterator[Count]:
    """Takes how many of `unit` are done, and of how many; within another count, or outside a stage, it tells nobody."""
    current = _CURRENT.get()
    if current is None or current.state["unit"]:
        yield lambda done, total: None
        return
    current.state |= {"unit": unit, "done": 0, "total": 0, "counting_since": time.time()}
    try:
        yield current.count
    finally:
        current.state["unit"] = ""


def running(folder: Path) -> list[Running]:
    """The stages that run now, in the order in which they began."""
    found = []
    for file in folder.glob("*.json"):
        try:
            told = json.loads(file.read_text())
        except (FileNotFoundError, ValueError):  # it ended just now
            continue
        if _lives(told["pid"]):
            since = told["since"]
            found.append(
                Running(
                    told["stage"],
                    since,
                    told["done"],
                    told["total"],
                    told["unit"],
                    told.get("counting_since", since),
                )
            )
    return sorted(found, key=lambda stage: stage.since)


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True
