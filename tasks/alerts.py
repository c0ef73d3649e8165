"""Alerts: who is told, by a webhook, mail or a chat, when a run fails and when the gates have decided.

params.yaml names environment variables; each holds one or several addresses of apprise's
(https://github.com/caronc/apprise/wiki), such as `jsons://hooks.example.com/x`: no secret stands in a file.
"""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Any, Literal, Sequence

from mergeline.evaluation.verdicts import told
from mergeline.merging.canonical import text_digest
from mergeline.merging.errors import UserError
from mergeline.merging.files import read_object, write_json
from mergeline.tasks.credentials import scrubbed
from mergeline.tasks.kept import Say
from mergeline.tasks.publication import load_verdict

if TYPE_CHECKING:
    from mergeline.tasks.schema import Alerts
    from mergeline.tasks.workspace import Workspace

_TOLD = "alerts.json"  # in .mergeline: of which verdict each variable was told
_KINDS = {"failure": "failure", "held_back": "warning", "promotion": "success"}  # as apprise has them
_LONGEST = 2000  # characters of a message, which some services cut


def without_address(alerts: Alerts) -> list[str]:
    """The variables that params.yaml names and that are not set here."""
    return sorted({name for name in alerts.all if not os.environ.get(name)})


def tell_of_failure(pipeline: str, alerts: Alerts, message: str, say: Say) -> None:
    """Tell those of `failure` that a run of a pipeline did not end well. say: is told who was, and who was not."""
    for name in alerts.failure:
        _tell(name, f"{pipeline}: the run failed", scrubbed(message), "failure", say)


def tell_of_verdict(workspace: Workspace, say: Say) -> None:
    """Tell of the last verdict, if it made a version champion or held one back, each of whom it concerns once.

    Who could not be told is told again the next time. say: is told who was, and who was not.
    """
    verdict = load_verdict(workspace.state)
    event = _event(verdict) if verdict else None
    if verdict is None or event is None:
        return
    alerts, pipeline = workspace.params.alerts, workspace.params.name
    digest = text_digest(verdict)
    known = _known(workspace)
    for name in alerts.promotion if event == "promotion" else alerts.held_back:
        title = f"{pipeline}: {_title(verdict, event)}"
        if known.get(name) != digest and _tell(name, title, _text(verdict), event, say):
            write_json(workspace.state / _TOLD, known := {**known, name: digest})


def _known(workspace: Workspace) -> dict[str, Any]:
    try:
        return read_object(workspace.state / _TOLD)
    except UserError:  # cut short; to be told twice is safe
        return {}


def _event(verdict: dict[str, Any]) -> Literal["promotion", "held_back"] | None:
    if not verdict["passed"]:
        return "held_back"
    return "promotion" if verdict["champion_before"] != verdict["champion_after"] else None


def _title(verdict: dict[str, Any], event: str) -> str:
    if event == "held_back":
        return f"{verdict['candidate']} was held back"
    return f"version {verdict['champion_after']} ({verdict['candidate']}) is champion"


def _text(verdict: dict[str, Any]) -> str:
    findings: Sequence[dict[str, Any]] = verdict["findings"]
    lines = [f"{'yes' if found['passed'] else 'NO'}: {found['sentence']}" for found in findings]
    return "\n".join([told(verdict, verdict["candidate"]), *lines])


def _tell(name: str, title: str, text: str, event: str, say: Say) -> bool:
    """Whether all addresses in a variable took a message."""
    from apprise import Apprise, LogCapture, NotifyType

    address = os.environ.get(name)
    if not address:
        say(f"no alert to {name}, which is not set: {title}")
        return False
    service = Apprise()
    with LogCapture(level=logging.WARNING, fmt="%(message)s") as warned:
        known = service.add(address)
        kind = NotifyType(_KINDS[event])
        sent = known and service.notify(body=text[:_LONGEST], title=title, notify_type=kind)
        why = scrubbed(" ".join(warned.getvalue().split())) if known else "no address that apprise knows"
    say(f"told {name}: {title}" if sent else f"{name} was not told ({why}): {title}")
    return bool(sent)
