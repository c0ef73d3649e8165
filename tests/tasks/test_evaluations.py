"""Nothing is measured twice, and nothing is taken for measured that was not."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ruamel.yaml import YAML
from safetensors.numpy import load_file
from toy_workspace import FAMILY, SCORED, TASKS, run_all, save_with_score

from mergeline.flows.pipeline import run_stage
from mergeline.merging.files import write_bytes
from mergeline.tasks import evaluations
from mergeline.tasks.custom.modality import Custom
from mergeline.tasks.evaluations import Evaluations, afresh, model_digest
from mergeline.tasks.modality import Evaluation, Model
from mergeline.tasks.places import SOURCES
from mergeline.tasks.schema import Params
from mergeline.tasks.workspace import Workspace

SCORE = """
from safetensors.numpy import load_file

def score(model, split, tasks, device):
    with open("../calls", "a") as calls:
        print(split, *tasks, file=calls)
    [file] = model.glob("*.safetensors")
    total = float(load_file(file)["w"] @ [1, 2, 3, 4])
    for task in tasks:
        for i in range(5):
            yield task, i, total * (i + (task == "left"))
"""


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A workspace in which nothing has run, as the current folder; `calls` has a line a process that measured."""
    monkeypatch.chdir(tmp_path)
    save_with_score(tmp_path, SCORE)
    write(tmp_path)
    return tmp_path


def write(root: Path, **changes: Any) -> None:
    YAML().dump({**FAMILY, **SCORED, **changes}, root / "params.yaml")


def calls(root: Path) -> int:
    """How many processes have measured since it was asked last."""
    found = (root / "calls").read_text().splitlines() if (root / "calls").exists() else []
    (root / "calls").unlink(missing_ok=True)
    return len(found)


def searched(root: Path) -> Workspace:
    workspace = Workspace(root / "params.yaml")
    for stage in workspace.stages:
        if stage.step == "fetch" or stage.name in ("fit@sum", "search@sum"):
            workspace.run(stage)
    return workspace


def said(workspace: Workspace) -> dict[str, str]:
    return {cost["stage"]: cost["said"] for cost in workspace.costs() if "said" in cost}


def outputs(root: Path) -> dict[str, str]:
    files = sorted(file for file in (root / "build").rglob("*") if file.is_file())
    return {str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def test_a_second_run_measures_nothing_and_writes_the_same_bytes(root):
    workspace = run_all(root)
    # Three points on val; two merges, the base and two experts on val and test.
    assert calls(root) == 3 + 2 * 5 and said(workspace) == {}
    before = outputs(root)
    shutil.rmtree(root / "build")
    workspace = run_all(root)
    assert calls(root) == 0 and outputs(root) == before
    assert said(workspace) == {
        "search@sum": "3 of 3 points were measured before",
        "baselines": "3 of 3 models were measured before",
        "evaluate@average": "1 of 1 models was measured before",
        "evaluate@sum": "1 of 1 models was measured before",
    }
    [*files] = (root / evaluations.FOLDER).rglob("*.safetensors")
    assert len(files) == 3 + 5 and all(file.stat().st_mode & 0o777 == 0o600 for file in files)
    assert (root / evaluations.FOLDER).stat().st_mode & 0o777 == 0o700
    assert all(set(load_file(file)) <= {f"{s}/{t}" for s in ("val", "test") for t in TASKS} for file in files)


def test_new_points_are_measured_alone_and_all_where_code_changes_or_force_is_used(root):
    searched(root)
    assert calls(root) == 3
    grid = {"method": "task_arithmetic", "search": {"scale": [0.1, 0.25, 0.5, 4.0]}}
    write(root, merges={"sum": grid}, gates={"largest_norm_ratio": 3})
    assert said(searched(root))["search@sum"] == "3 of 4 points were measured before" and calls(root) == 1
    (root / "measure/score.py").write_text(SCORE.replace("range(5)", "range(6)"))
    assert said(searched(root)) == {} and calls(root) == 4
    run_stage.fn(str(root / "params.yaml"), "search@sum", force=True)
    assert calls(root) == 4


# ---------------------------------------------------------------------------------------------- the key


class Counting(Custom):
    """Answers the number of evaluations; `during` is called in each."""

    name = "counting"
    deps = ("measure", "${code}/evaluation/metrics.py")

    def __init__(self) -> None:
        self.count, self.during = 0, lambda: None

    def evaluator(self, params: Params, build: Path, like: Path) -> Any:
        return self

    def evaluate(self, model: Model, splits: Sequence[str], tasks: Sequence[str]) -> Evaluation:
        self.count += 1
        self.during()
        found = {
            f"{split}/{task}": np.arange(self.count, dtype=np.int32) for split in splits for task in tasks
        }
        return Evaluation(found, {"b": 0.1 + 0.2, "a": [None, float(self.count)]})


@pytest.fixture
def counting(root: Path) -> Counting:
    checkpoints = root / "build/checkpoints/base"
    checkpoints.mkdir(parents=True)
    shutil.copy(root / "in/base.safetensors", checkpoints / "model.safetensors")
    return Counting()


MODEL = {"w": torch.arange(4.0)}


def evaluated(
    modality: Counting, model: Model | None = None, splits: Any = ("val",), tasks: Any = TASKS, **changes: Any
) -> Evaluation:
    params = Workspace("params.yaml").params.model_copy(update=changes)
    evaluator = Evaluations(modality, params, Path("build"), Path("build/checkpoints/base"))
    return evaluator.evaluate(MODEL if model is None else model, splits, tasks)


def test_answers_and_scores_come_back_as_they_were(counting):
    first, second = (evaluated(counting, splits=("val", "test"), tasks=("right", "left")) for _ in range(2))
    assert counting.count == 1 and [*second.answers] == [*first.answers]
    for name, answers in first.answers.items():
        assert answers.dtype == second.answers[name].dtype and np.array_equal(answers, second.answers[name])
    assert json.dumps(first.scores) == json.dumps(second.scores)


@pytest.mark.parametrize(
    "model",
    [
        {"w": torch.tensor([0.0, 1.0, 2.0, 4.0])},
        {"v": MODEL["w"]},
        {"w": MODEL["w"].reshape(2, 2)},
        {"w": MODEL["w"].view(torch.int32)},
        {"w": MODEL["w"], "v": torch.zeros(0)},
    ],
)
def test_another_state_dict_is_another_model(counting, model):
    evaluated(counting)
    evaluated(counting, model)
    assert counting.count == 2
    evaluated(counting, {name: tensor.clone() for name, tensor in model.items()})
    assert counting.count == 2


@pytest.mark.parametrize(
    "changes", [{"splits": ("test",)}, {"tasks": ("left",)}, {"tasks": ("right", "left")}]
)
def test_other_splits_and_tasks_are_other_evaluations(counting, changes):
    evaluated(counting)
    evaluated(counting, **changes)
    assert counting.count == 2


def test_any_file_of_a_folder_makes_another_model(counting, tmp_path):
    folder = tmp_path / "model"
    (folder / "adapters").mkdir(parents=True)
    for name in ("config.json", "adapters/left.safetensors", "more.txt"):
        digest = model_digest(folder)
        (folder / name).write_bytes(b"x")
        assert model_digest(folder) != digest
    digest = model_digest(folder)
    (folder / "more.txt").rename(folder / "moved.txt")
    assert model_digest(folder) != digest
    (folder / "moved.txt").rename(folder / "more.txt")
    assert model_digest(folder) == digest


def test_device_machine_packages_and_code_of_mergeline_are_part_of_it(counting, root, monkeypatch):
    evaluated(counting)
    monkeypatch.setattr(evaluations, "_packages", lambda: ["torch 99"])
    evaluated(counting)
    assert counting.count == 2
    monkeypatch.setattr(evaluations, "_machine", lambda device: ["another one"])
    evaluated(counting)
    assert counting.count == 3
    evaluated(counting, device="cuda")
    assert counting.count == 4
    for name in ("evaluation", "merging", "tasks"):
        shutil.copytree(SOURCES / name, root / "code" / name)
    monkeypatch.setattr(evaluations, "SOURCES", root / "code")
    evaluated(counting)
    assert counting.count == 4  # the same code elsewhere
    for count, name in enumerate(("evaluation/metrics.py", "merging/checkpoints/more.py"), 5):
        with open(root / "code" / name, "a") as file:
            file.write("# changed\n")
        evaluations._code.cache_clear()
        evaluated(counting)
        assert counting.count == count, name


def test_settings_and_the_seed_are_part_of_it_and_merges_and_gates_are_not(counting):
    params = Workspace("params.yaml").params
    evaluated(counting)
    evaluated(counting, merges={}, gates=params.gates.model_copy(update={"minimum_mean": 0.0}), name="other")
    assert counting.count == 1
    evaluated(counting, seed=1)
    evaluated(counting, evaluate=params.evaluate.model_copy(update={"better": "lower"}))  # type: ignore[attr-defined]
    assert counting.count == 3


def test_what_is_wanted_afresh_is_measured_again_and_kept(counting):
    evaluated(counting)
    with afresh():
        evaluated(counting)
    assert counting.count == 2
    assert len(evaluated(counting).answers["val/left"]) == 2 and counting.count == 2


def test_the_base_and_the_data_are_part_of_it(counting, root):
    for count, name in enumerate(("build/checkpoints/base/config.json", "measure/data.txt"), 2):
        evaluated(counting)
        (root / name).write_text("{}")
        evaluated(counting)
        assert counting.count == count, name


def test_what_was_changed_while_it_was_measured_is_not_kept(counting, root):
    counting.during = lambda: (root / "measure/data.txt").write_text(str(counting.count))
    evaluated(counting)
    (root / "measure/data.txt").unlink()
    counting.during = lambda: None
    evaluated(counting)
    assert counting.count == 2
    evaluated(counting)
    assert counting.count == 2


@pytest.mark.parametrize("how", ["cut", "changed", "foreign", "empty"])
def test_damaged_and_foreign_entries_are_measured_again(counting, root, how):
    first = evaluated(counting)
    [file] = (root / evaluations.FOLDER).rglob("*.safetensors")
    data = file.read_bytes()
    if how == "cut":
        write_bytes(file, data[:-1])
    elif how == "changed":
        write_bytes(file, data[:-1] + bytes([data[-1] ^ 1]))
    elif how == "empty":
        write_bytes(file, b"")
    else:
        evaluated(counting, splits=("test",))
        [other] = {*(root / evaluations.FOLDER).rglob("*.safetensors")} - {file}
        shutil.copy(other, file)
    counting.count = 0
    assert np.array_equal(evaluated(counting).answers["val/left"], first.answers["val/left"])
    assert counting.count == 1


def test_an_entry_that_is_used_is_young(counting, root):
    evaluated(counting)
    [file] = (root / evaluations.FOLDER).rglob("*.safetensors")
    os.utime(file, (0, 0))
    evaluated(counting)
    assert counting.count == 1 and file.stat().st_mtime > 10**9
