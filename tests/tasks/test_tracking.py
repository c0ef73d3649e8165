"""Publishing to MLflow: complete, idempotent, and completed after a crash. On a real database."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from judged_workspace import PARAMS, TASKS, JudgedWorkspace
from loopback import QuietHandler, listening

from mergeline.merging.errors import UserError
from mergeline.merging.files import write_json
from mergeline.tasks import tracking


@pytest.fixture
def workspace(tmp_path, monkeypatch, mlflow_database):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    judged = JudgedWorkspace(tmp_path / "a workspace")
    judged.add("ties", {"digits": 300, "shapes": 200})
    judged.add("cart", {"digits": 310, "shapes": 320})
    mlflow_database(judged.root)
    return judged


def runs(workspace, status=None):
    client = tracking.connect(workspace.root)
    found = client.search_runs([client.get_experiment_by_name("sample").experiment_id])
    return {run.info.run_id: run for run in found if status in (None, run.info.status)}


def artifacts(workspace, run_id, folder=None):
    return {file.path for file in tracking.connect(workspace.root).list_artifacts(run_id, folder)}


def test_everything_of_a_merge_is_shown(workspace):
    published = tracking.publish(workspace.root, PARAMS)
    run = runs(workspace)[published.merges["cart"]]
    assert run.info.status == "FINISHED" and run.info.run_name == "cart"
    assert run.data.params == {"method": "ties", "seed": "0", "density": "0.2", "scale.all": "0.3"}
    assert run.data.metrics["accuracy.shapes"] == 0.8
    assert run.data.metrics["mean"] == pytest.approx(0.7875)
    assert {"lower", "upper", "normalised", "worst_task", "val_mean"} <= run.data.metrics.keys()
    tags = run.data.tags
    assert tags["mlflow.parentRunId"] == published.run_id
    assert tags["lineage.model"].startswith("sha256:") and tags["lineage.expert.digits"] == "sha256:digits"
    assert tags["merge.method"] == "ties" and tags["merge.data"] == tags["merge.seen"] == "none"
    inputs = {(i.tags[0].value, i.dataset.name): i.dataset.digest for i in run.inputs.dataset_inputs}
    data = {("data", task): tags[f"lineage.data.{task}"] for task in TASKS}
    assert (
        inputs
        == {("base", "base"): "base", ("expert", "digits"): "digits", ("expert", "shapes"): "shapes"} | data
    )
    assert artifacts(workspace, run.info.run_id) == {"scores.json", "predictions.safetensors", "cart.json"}
    curve = tracking.connect(workspace.root).get_metric_history(run.info.run_id, "search.val_mean")
    assert [(m.step, m.value) for m in curve] == [(0, 0.0), (1, 0.1), (2, 0.2)]


def test_what_one_opens_says_what_was_merged_and_found(workspace):
    write_json(workspace.root / tracking.STATE / "costs" / "merge@cart.json", {"seconds": 90.5})
    published = tracking.publish(workspace.root, PARAMS)
    client = tracking.connect(workspace.root)
    whole, cart = (client.get_run(run) for run in (published.run_id, published.merges["cart"]))
    assert whole.info.run_name == "sample: cart 0.787" and whole.data.params["candidate"] == "cart"
    assert whole.data.params["density"] == "0.2"
    for run in (whole, cart):
        assert run.data.tags["merge.base"] == "base" and run.data.tags["merge.experts"] == "digits, shapes"
        assert run.data.metrics["gain_over_base"] == pytest.approx(0.7875 - 0.1)
        assert {"mean", "lower", "upper", "worst_task"} <= run.data.metrics.keys()
        assert 90 < (run.info.end_time - run.info.start_time) / 1000 < 150
    steps = client.get_metric_history(published.merges["cart"], "search.density")
    assert [(m.step, m.value) for m in steps] == [(0, 0.0), (1, 0.1), (2, 0.2)]
    kind = client.get_experiment(published.experiment_id).tags["mlflow.experimentKind"]
    assert kind == "custom_model_development"


def test_what_a_merge_was_fitted_to_is_shown(workspace):
    file = workspace.root / "build/merges/cart/manifest.json"
    manifest = json.loads(file.read_text())
    fitted = {
        "method": "learned", "params": {}, "data": "unlabelled", "split": "fit",
        "examples": {"digits": 5, "shapes": 7}, "digests": {},
    }  # fmt: skip
    file.write_text(json.dumps({**manifest, "recipe": {**manifest["recipe"], "fitted": fitted}}))
    published = tracking.publish(workspace.root, PARAMS)
    tags = runs(workspace)[published.merges["cart"]].data.tags
    assert tags["merge.method"] == "learned" and tags["merge.data"] == "unlabelled"
    assert tags["merge.seen"] == "5 to 7 unlabelled a task of fit"


def test_the_pipeline_run_holds_the_pictures_also_when_they_are_drawn_later(workspace):
    first = tracking.publish(workspace.root, PARAMS)
    assert artifacts(workspace, first.run_id) == {"leaderboard.json"}
    figure = workspace.root / "heatmap.svg"
    figure.write_text("<svg/>")
    (workspace.root / "build" / "report.html").write_text("<html/>")
    assert tracking.publish(workspace.root, PARAMS, [figure]) == first
    tracking.attach(workspace.root, first, Path("build/report.html"))
    assert artifacts(workspace, first.run_id) == {"leaderboard.json", "report.html", "figures"}
    assert artifacts(workspace, first.run_id, "figures") == {"figures/heatmap.svg"}
    run = runs(workspace)[first.run_id]
    assert run.data.tags["mergeline.candidate"] == "cart" and run.data.metrics["accuracy.shapes"] == 0.8
    assert "| **cart** | 0." in run.data.tags["mlflow.note.content"]  # its description, the leaderboard


def test_publishing_twice_or_from_a_copy_leaves_the_same_runs(workspace, tmp_path, monkeypatch):
    first = tracking.publish(workspace.root, PARAMS)
    assert tracking.publish(workspace.root, PARAMS) == first
    copy = tmp_path / "elsewhere"
    shutil.copytree(workspace.root, copy)
    database = workspace.root / tracking.STATE / "mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{database}")
    assert tracking.publish(copy, PARAMS) == first
    keys = {run.data.tags[tracking.RUN_KEY] for run in runs(workspace).values()}
    assert len(keys) == len(runs(workspace)) == 3
    assert set(tracking.run_keys(copy).values()) < keys


def test_changed_results_are_new_runs(workspace):
    first = tracking.publish(workspace.root, PARAMS)
    workspace.add("cart", {"digits": 311, "shapes": 320})
    second = tracking.publish(workspace.root, PARAMS)
    assert {first.run_id, *first.merges.values()}.isdisjoint({second.run_id, *second.merges.values()})


@pytest.mark.parametrize(("call", "after"), [("log_batch", 2), ("log_inputs", 2), ("set_terminated", 1)])
def test_a_killed_publication_is_completed_without_duplicates(workspace, call, after):
    """The process dies, without a chance to clean up, before the nth call of one of the client's methods."""
    script = f"""
import os, pathlib, sys
sys.path[:0] = {sys.path!r}
from mergeline.tasks import tracking
from mlflow import MlflowClient
original, count = MlflowClient.{call}, 0
def dying(*args, **kwargs):
    global count
    count += 1
    if count == {after}:
        os._exit(9)
    return original(*args, **kwargs)
MlflowClient.{call} = dying
tracking.publish(pathlib.Path({str(workspace.root)!r}), {PARAMS!r})
"""
    assert subprocess.run([sys.executable, "-c", script]).returncode == 9
    assert runs(workspace, "RUNNING")
    published = tracking.publish(workspace.root, PARAMS)
    assert (
        {published.run_id, *published.merges.values()}
        == set(runs(workspace))
        == set(runs(workspace, "FINISHED"))
    )
    parents = {run.data.tags.get("mlflow.parentRunId") for run in runs(workspace).values()}
    assert parents == {None, published.run_id}


def test_an_exception_leaves_a_failed_run_that_the_next_publication_replaces(workspace, monkeypatch):
    from mlflow import MlflowClient

    def full_disk(*_):
        raise OSError("no space left")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space"):
        patch.setattr(MlflowClient, "log_inputs", full_disk)
        tracking.publish(workspace.root, PARAMS)
    assert runs(workspace, "FAILED") and not runs(workspace, "RUNNING")
    tracking.publish(workspace.root, PARAMS)
    assert len(runs(workspace)) == len(runs(workspace, "FINISHED")) == 3


def test_two_at_once_publish_once(workspace):
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: tracking.publish(workspace.root, PARAMS), range(2))
    assert first == second and len(runs(workspace)) == 3


def test_many_parameters_and_metrics_fit_into_mlflows_calls(workspace):
    manifest = workspace.root / "build" / "merges" / "ties" / "manifest.json"
    content = json.loads(manifest.read_text())
    content["recipe"]["params"] = {f"weight{i}": i for i in range(250)}
    manifest.write_text(json.dumps(content))
    workspace.add("cart", {"digits": 310, "shapes": 320}, points=1100)
    published = tracking.publish(workspace.root, PARAMS)
    assert len(runs(workspace)[published.merges["ties"]].data.params) == 252
    client = tracking.connect(workspace.root)
    assert len(client.get_metric_history(published.merges["cart"], "search.val_mean")) == 1100


def test_a_deleted_experiment_is_restored(workspace):
    published = tracking.publish(workspace.root, PARAMS)
    client = tracking.connect(workspace.root)
    client.delete_experiment(published.experiment_id)
    assert tracking.publish(workspace.root, PARAMS).experiment_id == published.experiment_id
    assert client.get_experiment(published.experiment_id).lifecycle_stage == "active"


@pytest.mark.parametrize(
    "missing", ["leaderboard/leaderboard.json", "evaluations/ties/scores.json", "search/cart.json"]
)
def test_missing_outputs_are_named_before_anything_is_written(workspace, missing):
    (workspace.root / "build" / missing).unlink()
    with pytest.raises(UserError, match=f"{missing}: is missing; run"):
        tracking.publish(workspace.root, PARAMS)
    assert tracking.connect(workspace.root).get_experiment_by_name("sample") is None


def test_an_absent_server_is_one_line_without_the_password(workspace, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@127.0.0.1:9")
    with pytest.raises(UserError, match="MLflow at http://127.0.0.1:9 does not answer") as error:
        tracking.publish(workspace.root, PARAMS)
    assert "secret" not in str(error.value) and "\n" not in str(error.value)


def test_a_server_that_goes_away_is_one_line(workspace, monkeypatch):
    def refused(answering: QuietHandler) -> None:
        body = b'{"experiments": []}' if "search" in answering.path else b""
        if not body:
            return answering.close_connection_now()
        answering.send_response(200)
        answering.send_header("Content-Length", str(len(body)))
        answering.end_headers()
        answering.wfile.write(body)

    class Leaving(QuietHandler):
        """Answers that it is there, and hangs up when it is asked for more."""

        do_GET = do_POST = refused

        def close_connection_now(self) -> None:
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True

    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with listening(Leaving) as port:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
        with pytest.raises(UserError, match=f"MLflow at http://127.0.0.1:{port} does not answer") as error:
            tracking.publish(workspace.root, PARAMS)
    assert "\n" not in str(error.value)


def test_a_damaged_database_is_one_line(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / tracking.STATE).mkdir()
    (tmp_path / tracking.STATE / "mlflow.db").write_text(
        "not a database, but long enough to be read as one" * 9
    )
    with pytest.raises(UserError, match="does not answer"):
        tracking.connect(tmp_path)
