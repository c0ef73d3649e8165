"""What stands around Prefect's server, and when another process believes that it is this workspace's."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Callable, Iterator

import pytest
from checkpoints import another_process
from loopback import QuietHandler, listening
from starlette.responses import PlainTextResponse
from starlette.testclient import TestClient

from mergeline.flows import server
from mergeline.flows.embedded_server import PROOF, guarded, proof
from mergeline.flows.ending import ServerDied
from mergeline.flows.server import Address, address_file, announced_server
from mergeline.tasks.private import private_folder, write_private_json

PORT = 4200
LOGIN = "mergeline:secret"


@pytest.fixture(autouse=True)
def own_environment() -> Iterator[None]:
    """What commands put into the environment of this process, for Prefect and its children, is taken out again."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def client() -> TestClient:
    """Of a guarded application that answers everything with "inside"."""
    return TestClient(guarded(PlainTextResponse("inside"), PORT, LOGIN), base_url=f"http://127.0.0.1:{PORT}")


@pytest.mark.parametrize("host", [f"127.0.0.1:{PORT}", f"localhost:{PORT}"])
@pytest.mark.parametrize("origin", [None, f"http://127.0.0.1:{PORT}", f"http://localhost:{PORT}"])
def test_loopback_and_its_own_pages_are_let_in(client, host, origin):
    headers = {"host": host} | ({"origin": origin} if origin else {})
    assert client.get("/api/health", headers=headers).text == "inside"


@pytest.mark.parametrize(
    "headers",
    [
        {"host": "evil.example"},
        {"host": f"evil.example:{PORT}"},
        {"host": "127.0.0.1:80"},
        {"host": f"127.0.0.1.evil.example:{PORT}"},
        {"origin": "http://evil.example"},
        {"origin": "http://127.0.0.1:8000"},
        {"origin": "null"},
    ],
)
@pytest.mark.parametrize("path", ["/api/health", "/", PROOF])
def test_foreign_names_and_pages_are_refused(client, headers, path):
    answer = client.post(path, headers=headers)
    assert answer.status_code == 403 and "inside" not in answer.text


def test_a_websocket_from_a_foreign_page_is_refused(client):
    with (
        pytest.raises(Exception) as refused,
        client.websocket_connect("/", headers={"origin": "http://evil.example"}),
    ):
        pass
    assert getattr(refused.value, "status_code", None) == 403


def test_the_proof_tells_nothing_of_the_login(client):
    answer = client.get(f"{PROOF}?nonce").text
    assert answer == proof(LOGIN, "nonce") != proof("mergeline:other", "nonce")
    assert "secret" not in answer and answer != client.get(f"{PROOF}?other").text


# --------------------------------------------------------------------------------------- who is believed


@contextmanager
def answering(answer: Callable[[str], str]) -> Iterator[tuple[str, list[str]]]:
    """The API URL of a server that answers GET with 200 and a text, and the headers that it was sent."""
    seen: list[str] = []

    class Handler(QuietHandler):
        def do_GET(self) -> None:
            seen.append(f"{self.path}\n{self.headers}")
            body = answer(self.path).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    with listening(Handler) as port:
        yield f"http://127.0.0.1:{port}/api", seen


def announce(state: Path, url: str) -> None:
    private_folder(state / "prefect")
    write_private_json(address_file(state), Address(url, LOGIN)._asdict())


def owner_lives(state: Path):
    """During the block, another process is the one that announces a server."""
    return another_process("FileLock(path)", state / "prefect" / "server.lock")


def test_a_server_that_proves_itself_is_believed(tmp_path):
    with answering(lambda path: proof(LOGIN, path.partition("?")[2])) as (url, seen):
        announce(tmp_path, url)
        with owner_lives(tmp_path):
            assert announced_server(tmp_path) == Address(url, LOGIN)
    assert len(seen) == 1 and "secret" not in seen[0] and "Authorization" not in seen[0]


@pytest.mark.parametrize("answer", [lambda path: "true", lambda path: proof("mergeline:other", path[-32:])])
def test_a_stranger_on_the_port_is_not_believed_and_told_nothing(answer, tmp_path):
    with answering(answer) as (url, seen):
        announce(tmp_path, url)
        with owner_lives(tmp_path):
            assert announced_server(tmp_path) is None
    assert seen and not any("secret" in text or "Authorization" in text for text in seen)


def test_the_address_of_an_owner_that_was_killed_is_removed(tmp_path):
    with answering(lambda path: proof(LOGIN, path.partition("?")[2])) as (url, seen):
        announce(tmp_path, url)
        assert announced_server(tmp_path) is None
    assert not seen and not address_file(tmp_path).exists()


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", json.dumps({"url": "http://127.0.0.1:4200/api"})])
def test_what_is_no_address_is_none(content, tmp_path):
    private_folder(tmp_path / "prefect")
    address_file(tmp_path).write_text(content)
    assert announced_server(tmp_path) is None


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[subprocess.Popen]:
    """Servers that are started from now on are processes that do nothing and are believed."""
    started: list[subprocess.Popen] = []

    def start(*_: object) -> subprocess.Popen:
        started.append(subprocess.Popen(["sleep", "600"], stdin=subprocess.PIPE))
        return started[-1]

    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    monkeypatch.setattr(server, "_start", start)
    monkeypatch.setattr(Address, "proved", lambda self: True)
    return started


@pytest.mark.parametrize("alone", [False, True])
def test_a_block_ends_when_its_server_dies(alone, pretended, tmp_path):
    with pytest.raises(ServerDied, match="server.log, and start again"):
        with server.prefect_server(tmp_path, alone=alone) as own:
            if alone:
                server.announce(tmp_path, own)
                assert address_file(tmp_path).exists()
            pretended[0].kill()
            time.sleep(600)
    assert not address_file(tmp_path).exists()


def test_what_fails_for_want_of_the_server_is_told_as_its_death(pretended, tmp_path):
    with pytest.raises(ServerDied):
        with server.prefect_server(tmp_path):
            with pytest.raises(ServerDied):  # as if it came while the body was about to fail, too
                pretended[0].kill()
                time.sleep(600)
            raise ConnectionError("no answer")


def test_other_processes_that_end_and_other_failures_are_let_be(pretended, tmp_path):
    before = signal.getsignal(signal.SIGCHLD)
    with pytest.raises(ValueError, match="of its own"):
        with server.prefect_server(tmp_path):
            subprocess.run(["true"], check=True)
            raise ValueError("of its own")
    assert signal.getsignal(signal.SIGCHLD) == before and pretended[0].poll() is not None


def test_a_port_is_taken_before_its_server_starts():
    with server._listening() as one, server._listening() as other:
        assert one.getsockname()[1] != other.getsockname()[1]
        with pytest.raises(OSError):
            socket.create_server(one.getsockname())


def test_notify_says_in_one_line_that_no_server_runs(workspace, mergeline, monkeypatch):
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    with answering(lambda path: "true") as (url, _):
        announce(workspace / ".mergeline", url)
        outcome = mergeline("notify", "digits", "--params", workspace / "params.yaml")
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith("asking Prefect ...\nmergeline: no server to tell: start `mergeline serve`")
    assert outcome.err.count("\n") == 2


def test_a_workspace_is_served_once(workspace, mergeline, monkeypatch):
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    private_folder(workspace / ".mergeline" / "prefect")
    with owner_lives(workspace / ".mergeline"):
        for command in ("serve", "pages"):
            outcome = mergeline(command, "--params", workspace / "params.yaml")
            assert outcome.code == 2 and outcome.err.endswith("runs here already; stop it first\n")
