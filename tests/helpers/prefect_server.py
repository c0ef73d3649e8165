"""A real Prefect server for tests, as a team would run it, and what its API says."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable, Iterator, TypeVar

import requests

_START_UP_SECONDS = 180  # generous: imports take long on a busy machine
_PATIENCE = 150  # seconds that a server on a busy machine may take to answer
_POLL_SECONDS = 0.5

T = TypeVar("T")


@contextmanager
def prefect_server(folder: Path) -> Iterator[str]:
    """The API URL of a server on the loopback interface that keeps its database in `folder`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}/api"
    quiet = {"PREFECT_HOME": str(folder), "PREFECT_SERVER_ANALYTICS_ENABLED": "false", "DO_NOT_TRACK": "1"}
    with open(folder / "server.log", "wb") as log:
        # A session of its own: what answers is a child of the command, and ends with the whole group.
        server = subprocess.Popen(
            [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)],
            stdout=log,
            stderr=log,
            cwd=folder,
            env=os.environ | quiet,
            start_new_session=True,
        )
    try:
        wait_for(lambda: healthy(url), _START_UP_SECONDS)
        yield url
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def healthy(url: str) -> bool:
    try:
        return requests.get(f"{url}/health", timeout=5).ok
    except (requests.ConnectionError, requests.Timeout):
        return False


def wait_for(question: Callable[[], T], seconds: float) -> T:
    """The first answer that is true; fails after `seconds`."""
    deadline = time.monotonic() + seconds
    while not (answer := question()):
        assert time.monotonic() < deadline, f"waited {seconds} seconds in vain"
        time.sleep(_POLL_SECONDS)
    return answer


def flow_runs(url: str, *states: str) -> list[dict[str, Any]]:
    """Flow runs in these states (names, such as "Completed"), the earliest start first."""
    wanted = {"state": {"name": {"any_": list(states)}}}
    return _read(url, "flow_runs", flow_runs=wanted, sort="START_TIME_ASC")


def task_runs(url: str, flow_run: dict[str, Any]) -> dict[str, str]:
    """The states' names of a flow run's task runs, by the names of the task runs."""
    found = _read(url, "task_runs", task_runs={"flow_run_id": {"any_": [flow_run["id"]]}})
    return {run["name"]: run["state_name"] for run in found}


def artifacts(url: str, flow_run: dict[str, Any]) -> dict[str, str]:
    """The types of a flow run's artifacts by their keys."""
    found = _read(url, "artifacts", artifacts={"flow_run_id": {"any_": [flow_run["id"]]}})
    return {artifact["key"]: artifact["type"] for artifact in found}


def logs(url: str, flow_run: dict[str, Any]) -> list[str]:
    """The messages that a flow run has logged."""
    found = _read(url, "logs", logs={"flow_run_id": {"any_": [flow_run["id"]]}})
    return [line["message"] for line in found]


def automations(url: str) -> list[str]:
    """The names of what starts runs on events."""
    return [automation["name"] for automation in _read(url, "automations")]


def _read(url: str, what: str, **query: Any) -> list[dict[str, Any]]:
    answer = requests.post(f"{url}/{what}/filter", json=query, timeout=_PATIENCE)
    answer.raise_for_status()
    return answer.json()
