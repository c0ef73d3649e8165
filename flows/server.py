"""An embedded Prefect server: on loopback, with its database in the workspace, and gone when its owner is."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator

from merging.errors import UserError
from merging.files import write_json

_START_SECONDS = 180
_DRAIN_SECONDS = 20
_PREFERRED_PORT = 4200

# Read by Prefect when it is imported; what the user has set stays.
_QUIET = {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
    "PREFECT_CLI_PROMPT": "false",
}


@contextmanager
def prefect_server(state: Path, announce: bool = False) -> Iterator[str]:
    """The API URL to use while the block runs: the team's PREFECT_API_URL, a server announced in this workspace,
    or one of our own that ends with the block (and that others here use meanwhile, if we `announce` it).

    Must be entered before Prefect is imported.

    Raises:
        UserError: the server does not start.
    """
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("PREFECT_LOCAL_STORAGE_PATH", str(state / "prefect" / "storage"))
    if team := os.environ.get("PREFECT_API_URL"):
        yield team
        return
    os.environ.setdefault("PREFECT_HOME", str(state / "prefect"))
    if url := announced_server(state):
        os.environ["PREFECT_API_URL"] = url
        yield url
        return
    port = _free_port()
    url = f"http://127.0.0.1:{port}/api"
    process = _start(port, state)
    try:
        _wait(process, url, state)
        os.environ["PREFECT_API_URL"] = url
        if announce:
            write_json(_address_file(state), {"url": url})
        yield url
    finally:
        _send_what_waits()
        if announce:
            _address_file(state).unlink(missing_ok=True)
        process.stdin.close()
        process.terminate()
        process.wait(timeout=30)


def _send_what_waits() -> None:
    """Logs and events leave from queues; at exit it would be too late, their server being gone."""
    if "prefect" in sys.modules:
        from prefect.events.worker import EventsWorker
        from prefect.logging.handlers import APILogWorker

        for worker in (APILogWorker, EventsWorker):
            worker.drain_all(timeout=_DRAIN_SECONDS)


def _address_file(state: Path) -> Path:
    return state / "prefect" / "server.json"


def announced_server(state: Path) -> str | None:
    """The API URL of the server that another process runs for this workspace, if there is one."""
    try:
        url = json.loads(_address_file(state).read_text())["url"]
    except (FileNotFoundError, ValueError, KeyError):
        return None
    return url if _healthy(url) else None


def _healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False


def _free_port() -> int:
    for port in (_PREFERRED_PORT, 0):
        with socket.socket() as candidate:
            try:
                candidate.bind(("127.0.0.1", port))
            except OSError:
                continue
            return candidate.getsockname()[1]
    raise UserError("no free loopback port for the Prefect server")


def _start(port: int, state: Path) -> subprocess.Popen:
    origin = f"http://127.0.0.1:{port}"
    environment = {
        **os.environ,
        "PREFECT_SERVER_API_HOST": "127.0.0.1",
        "PREFECT_SERVER_API_PORT": str(port),
        "PREFECT_SERVER_UI_API_URL": f"{origin}/api",
        "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": origin,
    }
    log = state / "prefect" / "server.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "w") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "flows.server", str(port)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
        )


def _wait(process: subprocess.Popen, url: str, state: Path) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while not _healthy(url):
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            raise UserError(
                f"the embedded Prefect server did not start; see {state / 'prefect' / 'server.log'}"
            )
        time.sleep(0.2)


def _serve(port: int) -> None:
    """The child: a Prefect server that ends when its parent does, even by kill -9 (its stdin then closes)."""

    def end_with_parent() -> None:
        sys.stdin.buffer.read()
        os._exit(0)

    threading.Thread(target=end_with_parent, daemon=True).start()
    import uvicorn

    uvicorn.run(
        "prefect.server.api.server:create_app", factory=True, host="127.0.0.1", port=port, log_level="warning"
    )


if __name__ == "__main__":
    _serve(int(sys.argv[1]))
