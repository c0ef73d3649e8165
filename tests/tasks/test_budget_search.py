"""The search step within a budget: what was scored is merged, and a killed search ends as an undisturbed one."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ruamel.yaml import YAML
from toy_workspace import FAMILY, SCORED, run_all, save_with_score

from mergeline.evaluation.state import load_state
from mergeline.tasks.budget_search import FOLDER
from mergeline.tasks.clip.evaluator import open_evaluator
from mergeline.tasks.evaluations import afresh
from mergeline.tasks.params import load_params
from mergeline.tasks.publish import write_report
from mergeline.tasks.sweep import write_table
from mergeline.tasks.workspace import Workspace

SCORE = """
from safetensors.numpy import load_file

def score(model, split, tasks, device):
    with open("../calls", "a") as calls:
        print(split, *tasks, file=calls)
    [file] = model.glob("*.safetensors")
    weight = load_file(file)["w"]
    for task in tasks:
        for i in range(5):
            yield task, i, -abs(float(weight @ [1, 2, 3, 4]) - i - 3 * (task == "left"))
"""
WEIGHTS = {"each": {"low": 0, "high": 1}}
MERGES: dict[str, Any] = {
    "sum": {
        "method": "task_arithmetic",
        "search": {"sampler": "tpe", "budget": 12, "space": {"scale": {"low": 0.1, "high": 4, "log": True}}},
    },
    "front": {
        "method": "task_arithmetic",
        "search": {"sampler": "nsga2", "budget": 8, "seed": 3, "space": {"weights": WEIGHTS}},
    },
    "any": {
        "search": {
            "sampler": "random",
            "budget": {"minutes": 0.001},
            "methods": [
                {"method": "ties", "space": {"density": [0.5, 1.0]}},
                {"method": "linear", "space": {"weights": {"each": [0.0, 1.0]}}},
            ],
        },
    },
}


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A workspace of models of one weight, in which nothing has run, as the current folder."""
    monkeypatch.chdir(tmp_path)
    save_with_score(tmp_path, SCORE)
    YAML().dump({**FAMILY, **SCORED, "merges": MERGES}, tmp_path / "params.yaml")
    return tmp_path


def found(root: Path, name: str) -> dict[str, Any]:
    return json.loads((root / "build" / "search" / f"{name}.json").read_text())


@pytest.mark.slow
def test_the_best_point_is_merged_and_shown(root):
    workspace = run_all(root)
    front = found(root, "front")
    for name, budget in (("sum", 12), ("front", 8)):
        search = found(root, name)
        assert len(search["points"]) == budget
        best = max(search["points"], key=lambda point: point["mean"])
        assert search["chosen"] == best["params"]
        assert search["search"]["examples"] == 10 * budget and search["search"]["reproducible"]
        manifest = json.loads((root / "build/merges" / name / "manifest.json").read_text())
        assert search["chosen"].items() <= manifest["recipe"]["params"].items()
    means = [[*front["points"][i]["tasks"].values()] for i in front["front"]]
    assert len(means) > 1 and not any(
        np.all(np.greater_equal(b, a)) for a in means for b in means if b is not a
    )
    any_ = found(root, "any")
    assert any_["search"]["reproducible"] is False and any_["points"]
    manifest = json.loads((root / "build/merges/any/manifest.json").read_text())
    assert manifest["recipe"]["method"] == any_["method"]
    said = {cost["stage"]: cost.get("said", "") for cost in workspace.costs()}
    assert said["search@sum"] == "12 points by tpe"
    assert said["search@any"].endswith("not reproducible, for the budget is in minutes")
    page = write_report(workspace).read_text()
    assert "Proposed by tpe with seed 0 within 12 points" in page
    assert "not reproducible, for the budget is in minutes" in page and "The front of front" in page
    write_table(workspace, root / "table.md")
    assert "its search on validation" in " ".join((root / "table.md").read_text().split())


@pytest.mark.slow
def test_a_search_that_was_killed_ends_as_an_undisturbed_one(root, tmp_path):
    def stages(*names: str) -> None:
        workspace = Workspace(root / "params.yaml")
        for stage in workspace.stages:
            if stage.name in names or (stage.step == "fetch" and names == ("fetch",)):
                workspace.run(stage)

    stages("fetch")
    stages("fit@sum", "search@sum")
    undisturbed = (root / "build/search/sum.json").read_bytes()
    shutil.rmtree(root / ".mergeline")
    (root / "build/search/sum.json").unlink()
    (root / "calls").unlink()
    command = [sys.executable, "-m", "mergeline.flows.cli", "search", "--params", "params.yaml", "sum"]
    for least in (2, 5):
        process = subprocess.Popen(command, cwd=root, stdout=subprocess.DEVNULL, start_new_session=True)
        while sum(file.read_bytes().count(b"\n") for file in (root / FOLDER).glob("*.jsonl")) < least:
            assert process.poll() is None
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    [record] = (root / FOLDER).glob("*.jsonl")
    before = record.read_bytes()
    shutil.rmtree(root / ".mergeline/evaluations")  # the record alone says what was measured
    measured = len((root / "calls").read_text().splitlines())
    kept = before.count(b"\n")
    stages("search@sum")
    assert (root / "build/search/sum.json").read_bytes() == undisturbed
    assert record.read_bytes().startswith(before[: before.rindex(b"\n") + 1])
    assert len((root / "calls").read_text().splitlines()) - measured == 12 - kept
    stages("search@sum")
    assert len((root / "calls").read_text().splitlines()) - measured == 12 - kept
    with afresh():
        stages("search@sum")
    assert len((root / "calls").read_text().splitlines()) - measured == 24 - kept
    assert (root / "build/search/sum.json").read_bytes() == undisturbed


@pytest.mark.slow
def test_a_race_chooses_what_was_measured_on_all_examples(workspace, mergeline):
    file, yaml = workspace / "params.yaml", YAML()
    content = yaml.load(file)
    content["merges"]["cart"] = {
        "method": "cart",
        "search": {
            "sampler": "random",
            "budget": 6,
            "race": True,
            "space": {"rank": [0.1, 0.5], "scale": {"low": 0.1, "high": 30, "log": True}},
            "first": [{"rank": 0.1, "scale": 2.0}],
        },
    }
    yaml.dump(content, file)
    for step in ("fetch", "data", "heads", "fit", "search", "merge-all"):
        done = mergeline(step, "--params", file)
        assert done.code == 0
    search = found(workspace, "cart")
    whole = [point for point in search["points"] if not point["dropped"]]
    dropped = [point for point in search["points"] if point["dropped"]]
    assert dropped and all(point["examples"] < 1050 for point in dropped)
    assert search["chosen"] == max(whole, key=lambda point: point["mean"])["params"]
    assert search["points"][0]["params"] == {"rank": 0.1, "scale": 2.0} and search["points"][0] in whole
    assert search["search"]["examples"] == sum(point["examples"] for point in search["points"])
    params, build = load_params(file), workspace / "build"
    evaluator = open_evaluator(params, build, build / "checkpoints/base")
    predicted = evaluator.predict(load_state(build / "merges/cart"), "val", params.tasks)
    right = {t: float((predicted[t] == evaluator.data[t].split("val")[1]).mean()) for t in params.tasks}
    assert next(p for p in whole if p["params"] == search["chosen"])["tasks"] == right


def test_a_race_is_refused_where_models_are_measured_whole(root):
    merges = {"sum": {**MERGES["sum"], "search": {**MERGES["sum"]["search"], "race": True}}}
    content = YAML(typ="safe").load(root / "params.yaml")
    YAML().dump({**content, "merges": merges}, root / "params.yaml")
    with pytest.raises(Exception, match="are not measured on some of the examples alone; leave race out"):
        load_params(root / "params.yaml")
