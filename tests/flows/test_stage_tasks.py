"""Prefect's tasks are made from what steps say of themselves."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from pretended_runs import pretend_all_ran
from ruamel.yaml import YAML

from mergeline.merging.files import write_bytes
from mergeline.tasks import workspace as workspaces
from mergeline.tasks.records import last_run
from mergeline.tasks.workspace import Workspace


def test_downloads_are_tried_more_often_and_the_device_has_a_tag(workspace: Path) -> None:
    from mergeline.flows.pipeline import _task_for

    file = workspace / "params.yaml"
    params = YAML(typ="safe").load(file)
    for device, tags in (("cpu", set()), ("cuda", {"gpu"})):
        YAML().dump({**params, "device": device}, file)
        ws = Workspace(file)
        for stage in ws.stages:
            task, step = _task_for(ws, stage), stage.step
            assert task.retries == (4 if step in ("fetch", "data") else 1), stage.name
            on_device = step in ("fit", "search", "merge-all", "evaluate", "baselines")
            assert set(task.tags) == {step} | (tags if on_device else set()), stage.name


@pytest.fixture
def ran(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The stages that run, in a workspace where all have run; they write what they are called."""
    names: list[str] = []

    def step(params: Any, stage: Any) -> None:
        names.append(stage.name)
        write_bytes(Path(stage.out), stage.name.encode())

    real = workspaces.steps
    monkeypatch.setattr(workspaces, "steps", lambda modality: [s._replace(run=step) for s in real(modality)])
    monkeypatch.chdir(workspace)
    pretend_all_ran(workspace)
    return names


def test_a_stage_runs_unless_its_record_vouches_for_it_or_it_is_forced(workspace, ran):
    from mergeline.flows.pipeline import run_stage

    params = str(workspace / "params.yaml")
    assert run_stage.fn(params, "merge@cart").name == "Restored" and ran == []
    state = run_stage.fn(params, "merge@cart", force=True)
    assert state.name == "Completed" and ran == ["merge@cart"]
    (workspace / "build/merges/cart").unlink()
    assert run_stage.fn(params, "merge@cart").name == "Completed" and ran == ["merge@cart"] * 2
    (workspace / ".mergeline/records/merge@cart.json").unlink()
    run_stage.fn(params, "merge@cart")
    assert ran == ["merge@cart"] * 3 and last_run(Workspace(params), workspace_stage(params, "merge@cart"))


def workspace_stage(params: str, name: str) -> Any:
    return next(stage for stage in Workspace(params).stages if stage.name == name)


def test_what_is_published_is_not_published_again(workspace, monkeypatch):
    from mergeline.flows import artifacts, pipeline
    from mergeline.tasks import publish

    published: list[Any] = []
    monkeypatch.setattr(pipeline, "get_run_logger", lambda: logging.getLogger("test"))
    done = publish.Published("id", None)
    monkeypatch.setattr(publish, "publish", lambda ws, say: published.append(ws) or done)
    monkeypatch.setattr(artifacts, "show", lambda ws, found: None)
    params = str(workspace / "params.yaml")
    monkeypatch.setattr(pipeline, "is_published", lambda ws: True)
    assert pipeline.publish_run.fn(params) == {"run_id": None} and published == []
    monkeypatch.setattr(pipeline, "is_published", lambda ws: False)
    assert pipeline.publish_run.fn(params) == {"run_id": "id"} and len(published) == 1
