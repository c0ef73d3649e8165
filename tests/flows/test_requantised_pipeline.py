"""A language model's merge in the FP8 of its base, by `mergeline run` and by `dvc repro`: the same bytes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from fp8_folders import FP8, WEIGHTS, quantise
from mlflow import MlflowClient
from ruamel.yaml import YAML
from safetensors.torch import load_file
from small_language_model import save_experts, save_model, save_tasks, skill
from small_workspace import REPOSITORY, SmallWorkspace, make_workspace

pytestmark = pytest.mark.slow

SKILLS = {"one": skill(0), "two": skill(14)}
PARAMS = {
    "name": "fp8",
    "seed": 0,
    "checkpoints": {"layout": "as_is", "files": {n: f"family/{n}" for n in ("base", *SKILLS)}, "uris": {}},
    "base": "base",
    "experts": [*SKILLS],
    "language": {"tasks": "tasks", "suites": {n: [n] for n in SKILLS}, "perplexity": ["prose"]},
    "merges": {"rounded": {"method": "task_arithmetic", "search": {"scale": [0.4, 0.8]}, "requantise": True}},
    "gates": {"minimum_mean": 0.1, "largest_perplexity_ratio": 1000.0, "largest_norm_ratio": 10.0},
}
PLACE = "runs/fp8"


def test_prefect_and_dvc_write_the_same_merge_in_the_format_of_its_base(tmp_path: Path) -> None:
    by_flow = make_workspace(tmp_path / "flow")
    (by_flow.root / "samples/llm").mkdir()
    for name in ("samples/llm/dvc.yaml", "samples/llm/params.yaml"):
        shutil.copy(REPOSITORY / name, by_flow.root / name)
    (by_flow.root / "given").mkdir()
    YAML().dump(PARAMS, by_flow.root / "given/fp8.yaml")
    by_flow.check("mergeline", "init", PLACE, "--params", "given/fp8.yaml")
    family = by_flow.root / PLACE / "family"
    save_experts(family, save_model(family / "base", 0), SKILLS)
    quantise(family / "base")
    save_tasks(by_flow.root / PLACE / "tasks", SKILLS)
    by_dvc = by_flow.copy(tmp_path / "dvc")
    by_flow.check("mergeline", "run", "--params", f"{PLACE}/params.yaml")
    by_dvc.check("dvc", "repro", f"{PLACE}/dvc.yaml")
    assert "up to date" in by_flow.check("dvc", "status", f"{PLACE}/dvc.yaml")

    ran, reproduced = (SmallWorkspace(workspace.root / PLACE) for workspace in (by_flow, by_dvc))
    assert ran.outputs() == reproduced.outputs()
    locks = (YAML(typ="safe").load(workspace.lock()) for workspace in (ran, reproduced))
    assert next(locks) == next(locks)  # DVC writes stages in the order in which they ran
    merge = ran.root / "build/merges/rounded"
    stored = load_file(merge / WEIGHTS)
    assert sum(tensor.dtype == torch.float8_e4m3fn for tensor in stored.values()) == 14
    assert json.loads((merge / "config.json").read_text())["quantization_config"] == FP8
    assert "14 tensors are rounded to the base's quantised format" in (merge / "README.md").read_text()
    assert "14 tensors in the base's quantised format" in (ran.root / "build/report.html").read_text()

    client = MlflowClient(f"sqlite:///{ran.root}/.mergeline/mlflow.db")
    experiment = client.get_experiment_by_name("fp8")
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert runs["rounded"].data.params["requantise"] == "True"
