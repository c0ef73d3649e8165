"""Whether what would be published is what was published last."""

from __future__ import annotations

from pathlib import Path

import pytest
from checkpoints import refused
from pretended_runs import pretend_all_ran, pretend_published
from ruamel.yaml import YAML

from mergeline.tasks.publication import is_published, load_verdict
from mergeline.tasks.register import _promoted
from mergeline.tasks.workspace import Workspace


@pytest.fixture
def published(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    ws = pretend_all_ran(workspace)
    assert not is_published(ws)
    pretend_published(ws)
    assert is_published(Workspace(ws.params_file))
    return Workspace(ws.params_file)


def test_other_outputs_are_not_published(published):
    (published.root / "build/merges/cart").write_text("another")
    assert not is_published(published)


def test_other_gates_are_not_published(published):
    params = YAML(typ="safe").load(published.params_file)
    YAML().dump({**params, "gates": {"minimum_mean": 0.9}}, published.params_file)
    assert not is_published(Workspace(published.params_file))


def test_another_server_is_not_published_to(published, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    assert not is_published(published)


@pytest.mark.parametrize("lost", ["build/report.html", ".mergeline/verdict.json", ".mergeline/mlflow.db"])
def test_what_publishing_left_must_be_there(lost, published):
    (published.root / lost).unlink()
    assert not is_published(published)


def test_a_note_that_was_cut_short_counts_as_none(published):
    (published.state / "published.json").write_text('{"digest": "sha')
    assert not is_published(published)


@pytest.mark.parametrize("damaged", ['{"passed": tr', "[]"])
def test_a_verdict_that_was_damaged_is_told_with_its_remedy(damaged, published):
    assert load_verdict(published.state) is not None
    (published.state / "verdict.json").write_text(damaged)
    for read in (load_verdict, lambda state: _promoted(state.parent)):
        with refused(str(published.state / "verdict.json"), "remove it, and the next run writes it anew"):
            read(published.state)
    (published.state / "verdict.json").unlink()
    assert load_verdict(published.state) is None and _promoted(published.root) is None
