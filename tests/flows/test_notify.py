"""`mergeline notify` says that it told a server if that server took the event, and only then."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest
from loopback import QuietHandler, listening
from places import REPOSITORY

pytestmark = pytest.mark.slow

DEPLOYMENT = {"id": str(uuid4()), "flow_id": str(uuid4()), "name": "small"}
TOKEN = {"token": "t", "client": "c", "expiration": "2999-01-01T00:00:00Z"}
TAKEN, HANGS_UP = 204, 0
# Prefect is imported once, reads its environment then, and is asked as often as there are answers.
NOTIFY = """
import sys
from mergeline.flows.cli import main
for _ in range(int(sys.argv[1])):
    print(main(["notify", sys.argv[2], "--params", sys.argv[3]]))
    print("---", file=sys.stderr)
"""


class Team:
    """A team's server: the answers to who asks for the deployment, and to who sends events; what it was sent."""

    def __init__(self) -> None:
        self.deployment: list[int] = []
        self.events: list[int] = []
        self.sent: list[dict[str, object]] = []
        self.url = ""

    def answer(self, path: str, body: bytes) -> tuple[int, object]:
        if path == "/api/events":
            self.sent += json.loads(body)
            return self.events.pop(0), None
        if "/deployments/name/" in path:
            return self.deployment.pop(0), DEPLOYMENT
        return 200, TOKEN if path.startswith("/api/csrf-token") else "3.0.0"


@pytest.fixture
def team() -> Iterator[Team]:
    made = Team()

    class Handler(QuietHandler):
        def do_GET(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"] or 0))
            status, said = made.answer(self.path, body)
            if status == HANGS_UP:
                return
            text = b"" if status == TAKEN else json.dumps(said).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        do_POST = do_GET

    with listening(Handler) as port:
        made.url = f"http://127.0.0.1:{port}/api"
        yield made


def notify(times: int, workspace: Path, name: str, url: str) -> tuple[list[str], list[str]]:
    """What came of it each time: lines of stdout, the exit code among them, and what stderr says after the first."""
    done = subprocess.run(
        [sys.executable, "-c", NOTIFY, str(times), name, workspace / "params.yaml"],
        cwd=REPOSITORY,
        env=os.environ | {"PREFECT_API_URL": url, "PREFECT_CLIENT_MAX_RETRIES": "0"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    said = [text.removeprefix("\n").removeprefix("asking Prefect ...\n") for text in done.stderr.split("---")]
    return done.stdout.splitlines(), said[:-1]


def test_what_a_server_took_is_told(team, workspace):
    team.deployment, team.events = [200], [TAKEN]
    codes, said = notify(1, workspace, "digits", team.url)
    assert codes == [f"told {team.url} of digits", "0"] and said == [""], said
    [event] = team.sent
    assert event["event"] == "mergeline.checkpoint.pushed"
    assert event["resource"] == {"prefect.resource.id": "mergeline.checkpoint.small.digits"}


def test_what_a_server_did_not_take_is_no_success(team, workspace):
    team.events = [401, 403, 404, 413, 422, 500, 503, HANGS_UP]
    team.deployment = [200] * len(team.events)
    count = len(team.events)
    codes, said = notify(count, workspace, "digits", team.url)
    assert codes == ["2"] * count and len(team.sent) == count
    for line in said:
        assert line.startswith(f"mergeline: {team.url} did not take the event (") and line.count("\n") == 1


def test_a_server_that_does_not_serve_the_workspace_is_told_nothing(team, workspace):
    team.deployment = [404, 401, 500, HANGS_UP]
    codes, said = notify(4, workspace, "digits", team.url)
    assert codes == ["2"] * 4 and team.sent == []
    assert said[0].startswith(f"mergeline: {team.url} serves no pipeline 'small': start `mergeline serve`")
    for line in said[1:]:
        assert line.startswith(f"mergeline: {team.url} did not take the event (") and line.count("\n") == 1


def test_a_checkpoint_that_is_none_is_told_to_nobody(team, workspace):
    codes, said = notify(1, workspace, "digit", team.url)
    assert codes == ["2"] and "has no checkpoint 'digit'; did you mean 'digits'?" in said[0]
    assert team.sent == []
