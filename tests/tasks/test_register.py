"""Promotion, refusal and roll-back, on a plain database and on a real MLflow server."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from judged_workspace import PARAMS, JudgedWorkspace
from mlflow_server import mlflow_server

from mergeline.evaluation.verdicts import told
from mergeline.merging.errors import UserError
from mergeline.tasks import tracking
from mergeline.tasks.register import champion, register
from mergeline.tasks.rollback import rollback

STRICT = {**PARAMS, "gates": {"minimum_mean": 0.4, "minimum_gain": 0.0, "largest_drop": 0.05}}
GOOD, BETTER, MUCH_BETTER = ({"digits": n, "shapes": n} for n in (200, 260, 320))


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with mlflow_server(tmp_path_factory.mktemp("server")) as url:
        yield url


@pytest.fixture
def workspace(tmp_path, monkeypatch, mlflow_database):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    mlflow_database(tmp_path)
    return JudgedWorkspace(tmp_path)


def aliases(workspace):
    client = tracking.connect(workspace.root)
    return {k: str(v) for model in client.search_registered_models() for k, v in model.aliases.items()}


def versions(workspace):
    return tracking.connect(workspace.root).search_model_versions("name = 'sample'")


def experiment_of(workspace, version):
    return tracking.connect(workspace.root).get_run(version.run_id).info.experiment_id


def failed(outcome):
    return {f.gate for f in outcome.findings if not f.passed}


@pytest.mark.parametrize("where", ["database", pytest.param("server", marks=pytest.mark.slow)])
def test_the_story_of_a_champion(workspace, request, monkeypatch, where):
    """First champion, no change, a better one, a worse one, back again."""
    if where == "server":
        monkeypatch.setenv("MLFLOW_TRACKING_URI", request.getfixturevalue("server"))
    assert champion(workspace.root, STRICT) is None
    workspace.add("ties", GOOD)
    first = register(workspace.root, STRICT)
    assert first.passed and (first.version, first.champion_before, first.champion_after) == ("1", None, "1")
    again = register(workspace.root, STRICT)
    assert again.passed and "was the champion already (version 1)" in again.findings[0].sentence
    assert aliases(workspace) == {"candidate": "1", "champion": "1"} and len(versions(workspace)) == 1

    workspace.add("cart", BETTER)
    second = register(workspace.root, STRICT)
    assert second.passed and (second.version, second.champion_before, second.champion_after) == (
        "2",
        "1",
        "2",
    )
    info = champion(workspace.root, STRICT)
    assert (info.version, info.merge) == ("2", "cart")

    workspace.add("cart", {"digits": 263, "shapes": 260}, seed=1)
    third = register(workspace.root, STRICT)
    assert failed(third) == {"minimum_gain"} and third.champion_after == "2"
    assert aliases(workspace) == {"candidate": "3", "champion": "2"}
    assert register(workspace.root, STRICT) == third

    assert rollback(workspace.root, STRICT, "1").champion.merge == "ties"
    assert aliases(workspace)["champion"] == "1"
    assert rollback(workspace.root, STRICT, "2").champion.merge == "cart"  # whose place version 3 has by now
    assert aliases(workspace)["champion"] == "2"


def test_what_is_published_is_not_published_again(workspace, monkeypatch):
    workspace.add("cart", GOOD)
    run = tracking.publish(workspace.root, PARAMS)
    monkeypatch.delattr(tracking, "publish")
    register(workspace.root, PARAMS, run)
    assert versions(workspace)[0].run_id == run.merges["cart"]


def test_a_version_refers_to_its_files_and_to_its_run(workspace):
    workspace.add("cart", GOOD)
    register(workspace.root, PARAMS)
    (version,) = versions(workspace)
    client = tracking.connect(workspace.root)
    run = client.get_run(version.run_id)
    digest = tracking.digests(workspace.root).of(workspace.root / "build/merges/cart")
    assert version.tags["dvc.md5"] == digest == f"{Path(version.tags['uri']).name}.dir"
    assert version.tags["lineage.model"] == run.data.tags["lineage.model"]
    assert re.fullmatch(r"0\.\d{3} \(0\.\d{3} - 0\.\d{3}\)", version.tags["score"])
    (output,) = run.outputs.model_outputs
    model = client.get_logged_model(output.model_id)
    assert version.source == model.artifact_location
    assert model.tags["lineage.model"] == version.tags["lineage.model"]
    assert "all finite" in version.description


def test_the_verdict_is_left_for_the_report(workspace):
    workspace.add("cart", GOOD)
    register(workspace.root, {**PARAMS, "gates": {"minimum_mean": 0.9}})
    verdict = json.loads((workspace.root / tracking.STATE / "verdict.json").read_text())
    assert {k: v for k, v in verdict.items() if k != "findings"} == {
        "candidate": "cart", "version": "1", "champion_before": None, "champion_after": None, "passed": False,
    }  # fmt: skip
    assert verdict["findings"][-1] == {
        "gate": "minimum_mean",
        "passed": False,
        "sentence": "The mean test accuracy is 0.5000; at least 0.9000 is required.",
    }
    assert aliases(workspace) == {"candidate": "1"}


def test_a_verdict_that_is_kept_stays_true(workspace):
    """Publishing again finds the champion that the verdict made: what it says must hold then, too."""
    workspace.add("cart", GOOD)
    register(workspace.root, STRICT)
    register(workspace.root, STRICT)
    kept = json.loads((workspace.root / tracking.STATE / "verdict.json").read_text())
    assert champion(workspace.root, STRICT).version == "1"
    assert told(kept, "cart") == "cart passed every gate: version 1 became the first champion."
    sentences = [finding["sentence"] for finding in kept["findings"]]
    assert "There was no champion to compare with, so no gain over one was required." in sentences
    assert not any("There is no champion" in sentence for sentence in sentences)


def test_a_drop_on_one_task_moves_nothing(workspace):
    workspace.add("ties", BETTER)
    register(workspace.root, STRICT)
    workspace.add("cart", {"digits": 400, "shapes": 230})
    outcome = register(workspace.root, STRICT)
    assert failed(outcome) == {"largest_drop"} and aliases(workspace)["champion"] == "1"


def test_files_that_changed_after_their_evaluation_are_not_registered(workspace):
    workspace.add("ties", GOOD)
    register(workspace.root, STRICT)
    workspace.add("cart", BETTER)
    weights = workspace.root / "build" / "merges" / "cart" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    outcome = register(workspace.root, STRICT)
    assert failed(outcome) == {"reload"} and outcome.version is None
    assert aliases(workspace) == {"candidate": "1", "champion": "1"} and len(versions(workspace)) == 1
    weights.unlink()
    assert "does not open" in register(workspace.root, STRICT).findings[0].sentence


def test_changed_test_data_cannot_be_compared_until_the_champion_is_evaluated_on_them(workspace):
    workspace.add("ties", GOOD)
    register(workspace.root, STRICT)
    workspace.change_data()
    workspace.add("cart", BETTER)
    outcome = register(workspace.root, STRICT)
    assert outcome.passed  # `ties` is still among the merges, so it was evaluated on the new data

    workspace.add("cart", MUCH_BETTER, seed=1)  # the champion is overwritten ...
    workspace.change_data()  # ... and never sees the newest data
    outcome = register(workspace.root, STRICT)
    assert failed(outcome) == {"minimum_gain", "largest_drop"}
    assert "cannot be compared: the test data changed" in outcome.findings[-1].sentence
    assert outcome.champion_after == "2"


def test_predictions_of_the_champion_outlive_its_files(workspace):
    workspace.add("cart", GOOD)
    register(workspace.root, STRICT)
    workspace.add("cart", BETTER)
    outcome = register(workspace.root, STRICT)
    assert outcome.passed and "changes by +0.1500" in next(
        f.sentence for f in outcome.findings if f.gate == "minimum_gain"
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "call", ["create_logged_model", "create_model_version", "set_registered_model_alias"]
)
def test_a_registration_killed_after_a_call_is_completed(workspace, call):
    workspace.add("cart", GOOD)
    script = f"""
import os, pathlib, sys
sys.path[:0] = {sys.path!r}
from mlflow import MlflowClient
from mergeline.tasks.register import register
original = MlflowClient.{call}
def dying(*args, **kwargs):
    original(*args, **kwargs)
    os._exit(9)
MlflowClient.{call} = dying
register(pathlib.Path({str(workspace.root)!r}), {STRICT!r})
"""
    assert subprocess.run([sys.executable, "-c", script]).returncode == 9
    assert "champion" not in aliases(workspace)
    assert register(workspace.root, STRICT).champion_after == "1"
    assert aliases(workspace) == {"candidate": "1", "champion": "1"}
    (version,) = versions(workspace)
    assert (
        len(tracking.connect(workspace.root).search_logged_models([experiment_of(workspace, version)])) == 1
    )


def test_a_version_that_does_not_exist_is_named_with_those_that_do(workspace):
    with pytest.raises(UserError, match="has no version 7; there are: none"):
        rollback(workspace.root, PARAMS, "7")
    workspace.add("cart", GOOD)
    register(workspace.root, PARAMS)
    with pytest.raises(UserError, match="has no version ../1; there are: 1"):
        rollback(workspace.root, PARAMS, "../1")


def test_malformed_gates_are_one_line(workspace):
    workspace.add("cart", GOOD)
    with pytest.raises(UserError, match="gates.minimum_men: is no key that is known"):
        register(workspace.root, {**PARAMS, "gates": {"minimum_men": 0.5}})


def test_what_is_told_the_task_is_not_compared_with_what_is_not(workspace):
    known = {"task": "known", "how": "linear", "passes": 1, "bytes": 10}
    workspace.add("cart", GOOD)
    assert register(workspace.root, STRICT).champion_after == "1"
    workspace.add("adapted", MUCH_BETTER, at_use=known)
    outcome = register(workspace.root, STRICT)
    assert failed(outcome) == {"minimum_gain", "largest_drop"} and outcome.champion_after == "1"
    [told] = {f.sentence for f in outcome.findings if not f.passed}
    assert "the task of an input is unknown to it at use, and known to adapted" in told

    # Adapters beside the champion's own weights make another model of them.
    workspace.remove("adapted")
    workspace.add("cart", GOOD, at_use=known)
    same = register(workspace.root, STRICT)
    assert failed(same) == {"minimum_gain", "largest_drop"} and same.version == "3"
    assert len({v.source for v in versions(workspace)}) == 3
