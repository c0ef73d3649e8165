"""What `mergeline serve` says of its pages: the address of the server that runs, whatever port it got."""

from __future__ import annotations

import pytest

from mergeline.flows.deployments import _pages
from mergeline.flows.server import address_file
from mergeline.tasks.workspace import Workspace


@pytest.mark.parametrize("port", [4200, 49152])
def test_the_pages_are_where_the_server_is(port, workspace):
    ws = Workspace(workspace / "params.yaml")
    url = f"http://127.0.0.1:{port}/api"
    assert _pages(url, ws) == f"pages: http://127.0.0.1:{port}"
    file = address_file(ws.state)
    file.parent.mkdir(parents=True)
    file.write_text("{}")
    assert _pages(url, ws) == f"pages: http://127.0.0.1:{port}; they ask for the login in {file}"


def test_the_login_of_a_teams_server_is_not_shown(workspace):
    shown = _pages("https://me:S3CR3T@prefect.example/api", Workspace(workspace / "params.yaml"))
    assert shown == "pages: https://prefect.example"
