"""Who is told of promotions, of what gates held back and of failures; no address is said or written."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Iterator

import pytest
from ruamel.yaml import YAML
from webhook import Hook, webhook

from mergeline.merging.errors import UserError
from mergeline.merging.files import write_json
from mergeline.tasks.alerts import tell_of_failure, tell_of_verdict, without_address
from mergeline.tasks.schema import Alerts
from mergeline.tasks.workspace import Workspace

ALERTS = {"failure": ["OPS"], "promotion": ["TEAM"], "held_back": ["TEAM", "OPS"]}


@pytest.fixture
def hook(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hook]:
    with webhook() as made:
        monkeypatch.setenv("TEAM", made.url)
        monkeypatch.setenv("OPS", made.url)
        yield made


def verdict(passed: bool, before: str | None, after: str | None) -> dict[str, Any]:
    findings = [{"gate": "minimum_mean", "passed": passed, "sentence": "The mean is 0.7; 0.6 is asked for."}]
    found = {"passed": passed, "findings": findings, "candidate": "cart", "version": "2"}
    return {**found, "champion_before": before, "champion_after": after}


def told(root: Path, found: dict[str, Any], alerts: dict[str, list[str]] = ALERTS) -> list[str]:
    """What is said when the last verdict of a workspace is this one."""
    file = root / "params.yaml"
    params = YAML(typ="safe").load(file)
    YAML().dump({**params, "alerts": alerts}, file)
    workspace = Workspace(file)
    write_json(workspace.state / "verdict.json", found)
    said: list[str] = []
    tell_of_verdict(workspace, said.append)
    return said


def test_a_promotion_is_told_once(hook, workspace):
    title = "small: version 2 (cart) is champion"
    assert told(workspace, verdict(True, "1", "2")) == [f"told TEAM: {title}"]
    assert told(workspace, verdict(True, "1", "2")) == []
    [sent] = hook.sent
    assert (sent["title"], sent["type"]) == (title, "success")
    assert sent["message"].splitlines() == [
        "cart passed every gate: version 2 became champion, in place of version 1.",
        "yes: The mean is 0.7; 0.6 is asked for.",
    ]


def test_what_was_held_back_is_told_to_all_of_whom_it_concerns(hook, workspace):
    title = "small: cart was held back"
    assert told(workspace, verdict(False, "1", "1")) == [f"told TEAM: {title}", f"told OPS: {title}"]
    assert [sent["type"] for sent in hook.sent] == ["warning"] * 2
    assert "NO: The mean is 0.7" in hook.sent[0]["message"]


def test_nothing_is_told_of_a_candidate_that_was_champion_already(hook, workspace):
    assert told(workspace, verdict(True, "2", "2")) == [] and hook.sent == []


def test_who_could_not_be_told_is_told_the_next_time(hook, workspace, monkeypatch):
    hook.status = 500
    [line] = told(workspace, verdict(True, "1", "2"))
    assert line.startswith("TEAM was not told (Failed to send JSON POST notification: Internal server error")
    monkeypatch.setenv("TEAM", "nonsense")
    assert "no address that apprise knows" in told(workspace, verdict(True, "1", "2"))[0]
    monkeypatch.delenv("TEAM")
    assert "not set" in told(workspace, verdict(True, "1", "2"))[0]
    assert without_address(Workspace(workspace / "params.yaml").params.alerts) == ["TEAM"]
    monkeypatch.setenv("TEAM", hook.url)
    hook.status = 200
    assert len(told(workspace, verdict(True, "1", "2"))) == len(hook.sent) == 1


def test_a_failure_is_told_without_passwords(hook):
    said: list[str] = []
    tell_of_failure("small", Alerts(failure=["OPS"]), "https://me:pw@host/x: not found", said.append)
    assert said == ["told OPS: small: the run failed"]
    assert hook.sent[0]["message"] == "https://host/x: not found" and hook.sent[0]["type"] == "failure"


def test_no_address_is_said_or_written(hook, workspace):
    said = told(workspace, verdict(False, None, None))
    hook.status = 404
    said += told(workspace, verdict(False, "1", "1"))
    files = [file.read_text(errors="ignore") for file in workspace.rglob("*") if file.is_file()]
    assert len(said) == 4 and not any("S3CR3T" in text or "127.0.0.1" in text for text in said)
    assert not any("S3CR3T" in text for text in files)


def test_an_address_in_params_yaml_is_refused(workspace, hook):
    with pytest.raises(UserError, match="alerts.failure.*'json://host/x' is no name of an environment"):
        told(workspace, verdict(True, "1", "2"), {"failure": ["json://me:pw@host/x"]})
