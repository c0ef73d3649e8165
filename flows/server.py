"""The Prefect server of a workspace: the team's, one that runs here already, or one of our own, gone when its owner is.

Our own listens on loopback, has its database in the workspace, and a password that is new with every start. It is kept
for other processes of this workspace in server.json, which counts only while its writer lives and its server proves to
know the password.
"""

from __future__ import annotations

import hmac
import json
import os
import secrets
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import chdir, contextmanager
from datetime import timedelta
from http.client import HTTPException
from pathlib import Path
from typing import Iterator, NamedTuple

from mergeline.flows.embedded_server import PROOF, proof
from mergeline.flows.ending import dying_with
from mergeline.merging.errors import UserError
from mergeline.tasks.private import open_private, private_folder, write_private_json

_START_SECONDS = 300
_PROOF_SECONDS = 30  # of a machine that is busy
_DRAIN_SECONDS = 20
_HASTY_DRAIN_SECONDS = 2  # after a signal
_SHORTEST_RETENTION_SECONDS = 3601  # Prefect refuses an hour and less
_EVENTS_SECONDS = 7 * 86400
_PREFERRED_PORT = 4200
_DATABASES = {"PREFECT_SERVER_DATABASE_CONNECTION_URL", "PREFECT_API_DATABASE_CONNECTION_URL"}
_USER = "mergeline"

# Read by Prefect when it is imported; what the user has set stays.
_QUIET = {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
    "PREFECT_CLI_PROMPT": "false",
}


class Address(NamedTuple):
    """Where a server answers, and what an embedded one asks for: `user:password`; of the team's it is empty."""

    url: str
    login: str

    @property
    def pages(self) -> str:
        return self.url.removesuffix("/api")

    def proved(self) -> bool:
        """Whether the server that answers there knows the password; it is not told."""
        nonce = secrets.token_hex(16)
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        expected = proof(self.login, nonce)
        try:
            with direct.open(f"{self.pages}{PROOF}?{nonce}", timeout=_PROOF_SECONDS) as answer:
                return hmac.compare_digest(answer.read(len(expected)), expected.encode())
        except (OSError, HTTPException):
            return False


@contextmanager
def prefect_server(
    state: Path, alone: bool = False, start: bool = True, keep: timedelta = timedelta(days=30)
) -> Iterator[Address]:
    """The server to use while the block runs: the team's PREFECT_API_URL, one announced in this workspace, or one of
    our own that ends with the block (and that others here use meanwhile, if it is `alone` here and we `announce` it).
    Our own forgets runs that ended longer ago than `keep`.

    Must be entered before Prefect is imported. The current folder is another one in the block: Prefect takes settings
    from `.env`, `prefect.toml` and `pyproject.toml` there, and a workspace's files are data.

    Raises:
        UserError: the server does not start, there is none and none is to be started, or another process of this
            workspace announces one already.
        ServerDied: our own ended before the block.
    """
    _prepare(state)
    with chdir(private_folder(state / "prefect")):
        if team := os.environ.get("PREFECT_API_URL"):
            yield Address(team, "")
            return
        os.environ.setdefault("PREFECT_HOME", str(state / "prefect"))
        if alone:
            with _alone(state), _own_server(state, keep) as own:
                yield own
        elif running := announced_server(state):
            _use(running)
            yield running
        elif start:
            with _own_server(state, keep) as own:
                yield own
        else:
            raise UserError(
                "no server to tell: start `mergeline serve` in this workspace, or set PREFECT_API_URL"
            )


def announce(state: Path, server: Address) -> None:
    """Let other processes of this workspace find the server of ours that is alone here, until it ends."""
    if server.login:
        write_private_json(address_file(state), server._asdict())


@contextmanager
def _alone(state: Path) -> Iterator[None]:
    """For the one process of a workspace whose server the others may use; at the end nobody finds it any more."""
    from filelock import FileLock, Timeout

    lock = FileLock(_lock_file(state), timeout=1)
    try:
        lock.acquire()
    except Timeout:
        raise UserError(
            f"{state.parent}: `mergeline serve` or `mergeline pages` runs here already; stop it first"
        ) from None
    try:
        address_file(state).unlink(missing_ok=True)  # that of a process that was killed
        yield
    finally:
        address_file(state).unlink(missing_ok=True)
        lock.release()


def announced_server(state: Path) -> Address | None:
    """The server that another process runs for this workspace, if there is one.

    What a process that was killed has left is removed.
    """
    from filelock import FileLock, Timeout

    file = address_file(state)
    try:
        address = Address(**json.loads(file.read_text()))
    except (FileNotFoundError, ValueError, TypeError):
        return None
    try:
        with FileLock(_lock_file(state), timeout=0):
            file.unlink(missing_ok=True)
        return None
    except Timeout:  # its writer lives
        return address if address.proved() else None


def address_file(state: Path) -> Path:
    return state / "prefect" / "server.json"


def _lock_file(state: Path) -> Path:
    """Held by the process that announces a server; the kernel frees it on death."""
    return state / "prefect" / "server.lock"


def _prepare(state: Path) -> None:
    """What Prefect and the processes that it starts find in their environment."""
    private_folder(state)
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("PREFECT_LOCAL_STORAGE_PATH", str(state / "prefect" / "storage"))
    for name in ("NO_PROXY", "no_proxy"):  # a proxy would be shown the password
        os.environ[name] = ",".join(filter(None, [os.environ.get(name), "127.0.0.1"]))


def _use(address: Address) -> None:
    os.environ["PREFECT_API_URL"] = address.url
    os.environ["PREFECT_API_AUTH_STRING"] = address.login


@contextmanager
def _own_server(state: Path, keep: timedelta) -> Iterator[Address]:
    listening = _listening()
    port = listening.getsockname()[1]
    login = os.environ.get("PREFECT_SERVER_API_AUTH_STRING") or f"{_USER}:{secrets.token_urlsafe(32)}"
    address = Address(f"http://127.0.0.1:{port}/api", login)
    with listening:
        process = _start(listening, login, state, keep)
    drain = _DRAIN_SECONDS
    try:
        _wait(process, address, state)
        _use(address)
        with dying_with(
            process, f"the embedded Prefect server died; see {_log_file(state)}, and start again"
        ):
            yield address
    except KeyboardInterrupt:
        drain = _HASTY_DRAIN_SECONDS
        raise
    finally:
        if process.poll() is None:
            _send_what_waits(drain)
        assert process.stdin  # _start opens it
        process.stdin.close()
        process.terminate()
        process.wait(timeout=30)


def _send_what_waits(seconds: float) -> None:
    """Logs and events leave from queues; at exit it would be too late, their server being gone."""
    if "prefect" in sys.modules:
        from prefect.events.worker import EventsWorker
        from prefect.logging.handlers import APILogWorker

        for worker in (APILogWorker, EventsWorker):
            worker.drain_all(timeout=seconds)


def _listening() -> socket.socket:
    """A socket that listens on loopback from now on: nobody else can take its port while the server starts."""
    for port in (_PREFERRED_PORT, 0):
        try:
            return socket.create_server(("127.0.0.1", port))
        except OSError:
            continue
    raise UserError("no free loopback port for the Prefect server")


def prefect_settings(database: Path, keep: timedelta) -> dict[str, str]:
    """The environment of a Prefect that has its database in a file, and forgets runs that ended longer ago."""
    seconds = max(round(keep.total_seconds()), _SHORTEST_RETENTION_SECONDS)
    return {
        "PREFECT_HOME": str(database.parent),
        **dict.fromkeys(_DATABASES, f"sqlite+aiosqlite:///{database}"),
        "PREFECT_SERVER_SERVICES_DB_VACUUM_ENABLED": "events,flow_runs",
        "PREFECT_SERVER_SERVICES_DB_VACUUM_RETENTION_PERIOD": str(seconds),
        "PREFECT_SERVER_EVENTS_RETENTION_PERIOD": f"PT{min(seconds, _EVENTS_SECONDS)}S",
    }


def _log_file(state: Path) -> Path:
    return state / "prefect" / "server.log"


def _start(listening: socket.socket, login: str, state: Path, keep: timedelta) -> subprocess.Popen:
    port = listening.getsockname()[1]
    names = [f"http://{host}:{port}" for host in ("127.0.0.1", "localhost")]
    database = state / "prefect" / "prefect.db"
    elsewhere = os.environ["PREFECT_HOME"] != str(database.parent) or _DATABASES & os.environ.keys()
    environment = {
        **({} if elsewhere else prefect_settings(database, keep)),
        **os.environ,
        "PREFECT_SERVER_API_AUTH_STRING": login,
        "PREFECT_SERVER_API_HOST": "127.0.0.1",
        "PREFECT_SERVER_API_PORT": str(port),
        "PREFECT_SERVER_UI_API_URL": f"{names[0]}/api",
        "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": ",".join(names),
    }
    with open_private(_log_file(state)) as output:
        # A session of its own: Ctrl-C is for its owner, who still has things to tell it.
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "mergeline.flows.embedded_server", str(listening.fileno())],
            env=environment,
            pass_fds=[listening.fileno()],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _wait(process: subprocess.Popen, address: Address, state: Path) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while not address.proved():
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            raise UserError(f"the embedded Prefect server did not start; see {_log_file(state)}")
        time.sleep(0.2)
