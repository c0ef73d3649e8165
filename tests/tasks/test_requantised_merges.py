"""Merges of params.yaml that are written in the quantised format of their base: scored, compared and told as such."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import refused
from fp8_folders import FP8, WEIGHTS, quantise
from pretended_runs import pretend_all_ran
from ruamel.yaml import YAML
from safetensors.torch import load_file, save_file
from toy_workspace import FAMILY, TASKS, run_all

from mergeline.merging.checkpoints.checkpoint import Files, open_checkpoint
from mergeline.merging.checkpoints.quantised.formats import dequantised
from mergeline.merging.verify import verify
from mergeline.tasks.params import load_params
from mergeline.tasks.status import states
from mergeline.tasks.workspace import Workspace

NAME = "layers.0.mlp.weight"
# What is stored as FP8 has ten points more, so that scores say what was scored.
SCORE = f"""
from safetensors.torch import load_file

def score(model, split, tasks, device):
    stored = load_file(model / "{WEIGHTS}")
    weight, scale = stored["{NAME}"].float(), stored.get("{NAME}_scale_inv")
    if scale is not None:
        weight = weight * scale.repeat_interleave(16, 0).repeat_interleave(16, 1)
    for task in tasks:
        row = weight[0 if task == "left" else 1]
        for i in range(20):
            yield task, i, 10 * (scale is not None) + 1 / (1 + (row[i] - 1).square().item())
"""
SUM = {"method": "task_arithmetic", "search": {"scale": [0.5, 1.0]}}
PARAMS: dict[str, Any] = {
    **FAMILY,
    "checkpoints": {"layout": "as_is", "files": {n: f"in/{n}" for n in ("base", *TASKS)}, "uris": {}},
    "name": "rounded",
    "evaluate": {"folder": "measure", "function": "score:score", "suites": {task: [task] for task in TASKS}},
    "merges": {"plain": SUM, "rounded": {**SUM, "requantise": True}},
    "merges_of_merges": {
        "outer": {"method": "linear", "experts": ["merge:rounded", "right"], "requantise": True}
    },
}


def write(root: Path, **changed: Any) -> Path:
    YAML().dump({**PARAMS, **changed}, root / "params.yaml")
    return root / "params.yaml"


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Experts move a row of their own; base and experts are FP8 in blocks of 16 x 16."""
    monkeypatch.chdir(tmp_path)
    save(tmp_path)
    for name in ("base", *TASKS):
        quantise(tmp_path / "in" / name)
    (tmp_path / "measure").mkdir()
    (tmp_path / "measure/score.py").write_text(SCORE)
    write(tmp_path)
    return tmp_path


def save(root: Path) -> None:
    base = torch.randn(32, 32, generator=torch.Generator().manual_seed(0))
    for row, name in enumerate(("base", *TASKS), -1):
        weight = base + 0.2 * torch.randn(32, 32, generator=torch.Generator().manual_seed(row + 1))
        if row >= 0:
            weight[row] = 1.0
        (root / "in" / name).mkdir(parents=True, exist_ok=True)
        save_file({NAME: weight, "norm.weight": torch.ones(32)}, root / "in" / name / WEIGHTS)


def floats(folder: Path) -> torch.Tensor:
    view, _ = dequantised(open_checkpoint(folder))
    with Files() as files:
        return view.tensors[NAME].read(files.elements, 0, 32 * 32).reshape(32, 32)


@pytest.mark.slow
def test_a_merge_is_searched_written_compared_and_told_as_it_is_rounded(root, mergeline):
    run_all(root)
    rounded, plain = root / "build/merges/rounded", root / "build/merges/plain"
    stored = load_file(rounded / WEIGHTS)
    assert stored[NAME].dtype == torch.float8_e4m3fn and f"{NAME}_scale_inv" in stored
    assert load_file(plain / WEIGHTS)[NAME].dtype == torch.bfloat16
    assert json.loads((rounded / "config.json").read_text())["quantization_config"] == FP8
    error = (floats(rounded) - floats(plain)).norm() / floats(plain).norm()
    said = json.loads((rounded / "manifest.json").read_text())["requantised"]
    assert said["tensors"] == 1 and said["mean"] == pytest.approx(float(error), rel=0.2) and error > 0.01
    assert "1 tensors are rounded to the base's quantised format" in (rounded / "README.md").read_text()
    assert "bit-identical" in verify(rounded)

    for name, least in (("rounded", 10), ("plain", 0)):
        points = json.loads((root / f"build/search/{name}.json").read_text())["points"]
        assert [least < point["mean"] < least + 1 for point in points] == [True, True]

    board = json.loads((root / "build/leaderboard/leaderboard.json").read_text())
    rows = {row["name"]: row for row in board["rows"]}
    assert rows["rounded"]["requantised"] == said and "requantised" not in rows["plain"]
    assert rows["rounded"]["norm_ratio"] == pytest.approx(rows["plain"]["norm_ratio"], rel=0.1)
    assert rows["rounded"]["finite"]
    assert mergeline("report").code == 0
    report = (root / "build/report.html").read_text()
    assert f"in the base's quantised format,\n relative error {said['mean']:.2%} in the mean" in report


@pytest.mark.slow
def test_a_requantised_merge_is_merged_again(root):
    run_all(root)
    outer = root / "build/merges/outer"
    assert load_file(outer / WEIGHTS)[NAME].dtype == torch.float8_e4m3fn
    mean = (floats(root / "build/merges/rounded") + floats(root / "in/right")) / 2
    assert (floats(outer) - mean).norm() / mean.norm() < 0.04


def test_requantise_makes_its_merge_stale_and_no_other(root):
    pretend_all_ran(root)
    file = write(root, merges={**PARAMS["merges"], "plain": {**SUM, "requantise": True}})
    workspace = Workspace(file)
    stale = {state.stage.name for state in states(workspace, workspace.stages) if state.action == "run"}
    assert {"search@plain", "merge@plain"} <= stale and not [name for name in stale if "rounded" in name]


def test_requantise_is_refused_where_it_cannot_be(root):
    merges = {"fitted": {"method": "adamerging", "requantise": True}}
    with refused("requantise", "adamerging is fitted to models of floats", "leave requantise out"):
        load_params(write(root, merges=merges, merges_of_merges={}))
    with refused("requantise", "must be true or false"):
        load_params(write(root, merges={"odd": {**SUM, "requantise": "much"}}, merges_of_merges={}))
    write(root, merges={"rounded": {"method": "average", "requantise": True}}, merges_of_merges={})
    save(root)
    for name in ("base", *TASKS):
        (root / "in" / name / "config.json").unlink()
    with refused("requantise: the base is not quantised"):
        run_all(root)
    assert not (root / "build/merges/rounded").exists()
