"""The leaderboard of language models: gains, held-in tasks and norms, of the experts that a merge is made of."""

from __future__ import annotations

import json
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ruamel.yaml import YAML
from safetensors.torch import save_file

from mergeline.merging import merge
from mergeline.tasks.compare import compare
from mergeline.tasks.evaluate import write_evaluation
from mergeline.tasks.modalities import modality_of
from mergeline.tasks.params import load_params

N = 10  # examples of each task
TASKS = ("sums", "code", "prose", "facts")  # facts has no expert
URI = "https://host/prose.safetensors?version=1"
PARAMS = {
    "name": "small",
    "checkpoints": {"layout": "as_is", "files": {n: n for n in ("base", *TASKS[:2])}, "uris": {"prose": URI}},
    "base": "base",
    "experts": [*TASKS[:3]],
    "language": {"tasks": "tasks", "suites": {task: [task] for task in TASKS}},
    "merges": {"all": {"method": "average"}, "pair": {"method": "slerp", "experts": ["code", "sums"]}},
    "seed": 0,
}
BASE = {"sums": 2, "code": 0, "prose": 5, "facts": 4}  # of N right
OWN = {"sums": 10, "code": 8, "prose": 5}  # what each expert has right; prose taught nothing
MERGED = {
    "all": {"sums": 6, "code": 2, "prose": 5, "facts": 3},
    "pair": {"sums": 8, "code": 6, "prose": 1, "facts": 2},
}


def right(counts: dict[str, int], prefix: str = "") -> dict[str, np.ndarray]:
    """Predictions of both splits: the first examples of each task are right."""
    rows = {task: (np.arange(N) < count).astype(np.int32) for task, count in counts.items()}
    return {f"{prefix}{split}/{task}": row for split in ("val", "test") for task, row in rows.items()}


@pytest.fixture
def board(tmp_path: Path) -> dict[str, Any]:
    """The leaderboard. The experts' distances from the base are 3, 4 and 12."""
    YAML().dump(PARAMS, tmp_path / "params.yaml")
    params, build = load_params(tmp_path / "params.yaml"), tmp_path / "build"
    for i, (name, distance) in enumerate({"base": 0.0, "sums": 3.0, "code": 4.0, "prose": 12.0}.items()):
        (build / "checkpoints" / name).mkdir(parents=True)
        weight = torch.full((4,), 100.0)
        weight[i] += distance
        save_file({"w": weight}, build / "checkpoints" / name / "model.safetensors")
        (build / "checkpoints" / name / "provenance.json").write_text('{"digest": "sha256:0"}')
    norms = {"sums": {"norm": 3.0}, "code": {"norm": 4.0}, "prose": {"norm": 12.0}}
    for folder in ("extract", "search"):
        (build / folder).mkdir()
    (build / "extract" / "description.json").write_text(json.dumps({"experts": norms}))
    scores = {"perplexity": {}, "lm_eval": {"test": {}}}
    for name, counts in MERGED.items():
        (build / "search" / f"{name}.json").write_text('{"method": "average", "points": [], "chosen": {}}')
        experts = {expert: build / "checkpoints" / expert for expert in params.experts_of(name)}
        merge({"method": params.merges[name].method, "experts": experts}, build / "merges" / name)
        write_evaluation(build / "evaluations" / name, scores, right(counts))
    found = right(BASE, "base/")
    for task, count in OWN.items():
        found |= right({task: count}, f"{task}/")
    write_evaluation(build / "evaluations" / "baselines", {"models": {"base": scores}}, found)
    compare(modality_of(params), params, build, build / "leaderboard")
    return json.loads((build / "leaderboard" / "leaderboard.json").read_text())


@pytest.fixture
def rows(board: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The rows of the leaderboard by name."""
    return {row["name"]: row for row in board["rows"]}


def test_gain_kept_is_of_the_tasks_that_the_merges_experts_learned(rows):
    assert rows["all"]["gain_kept"] == pytest.approx(((6 - 2) / (10 - 2) + (2 - 0) / (8 - 0)) / 2)
    assert rows["pair"]["gain_kept"] == pytest.approx(((8 - 2) / (10 - 2) + (6 - 0) / (8 - 0)) / 2)
    assert "gain_kept" not in rows["base"] and "gain_kept" not in rows["experts"]


def test_tasks_are_held_in_if_an_expert_of_the_merge_was_trained_for_them(rows):
    held = {name: (row.get("held_in"), row.get("held_out")) for name, row in rows.items()}
    assert held["all"] == (pytest.approx((6 + 2 + 5) / 30), pytest.approx(0.3))
    assert held["pair"] == (pytest.approx((8 + 6) / 20), pytest.approx((1 + 2) / 20))
    assert held["base"] == (pytest.approx((2 + 0 + 5) / 30), pytest.approx(0.4))
    assert held["experts"] == (pytest.approx((10 + 8 + 5) / 30), None)


def test_means_and_normalised_accuracies_are_of_all_tasks(rows):
    """So that merges of different experts can be compared."""
    assert rows["pair"]["mean"] == pytest.approx((8 + 6 + 1 + 2) / 40)
    assert rows["pair"]["normalised"] == pytest.approx((8 / 10 + 6 / 8 + 1 / 5) / 3)


def test_the_norm_ratio_is_of_the_merges_own_task_vectors(rows):
    assert rows["all"]["norm_ratio"] == pytest.approx(sqrt(1 + (4 / 3) ** 2 + 16) / ((3 + 4 + 12) / 3))
    assert rows["pair"]["norm_ratio"] == pytest.approx(sqrt(1.5**2 + 2**2) / 3.5, rel=1e-3)  # nearly straight


def test_rows_name_the_experts_of_merges_that_have_their_own(rows):
    assert rows["pair"]["experts"] == ["code", "sums"]
    assert not any("experts" in rows[name] for name in ("base", "experts", "all"))


def test_the_lineage_names_sources_without_the_part_where_secrets_travel(board):
    assert board["lineage"]["experts"]["sums"] == {"source": "sums", "digest": "sha256:0"}
    assert board["lineage"]["experts"]["prose"]["source"] == "https://host/prose.safetensors"
    assert list(board["lineage"]["experts"]) == list(TASKS[:3]) and board["lineage"]["base"]["name"] == "base"


def test_the_metrics_that_dvc_shows_are_few(rows, tmp_path):
    """Each number is a column of `dvc metrics show` and `dvc exp show`."""
    metrics = json.loads((tmp_path / "build/leaderboard/metrics.json").read_text())
    best = max((rows[name] for name in MERGED), key=lambda row: row["val_mean"])
    assert metrics["mean"] == {name: rows[name]["mean"] for name in MERGED}
    own = {"mean", "val_mean", "normalised", "worst_task"}
    assert metrics["candidate"] == {key: best[key] for key in (*own, "gain_kept", "held_in", "held_out")}


def told_the_task(build: Path, *names: str) -> None:
    """Let the evaluations of merges say that the task of an example was known."""
    for name in names:
        file = build / "evaluations" / name / "scores.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "at_use": {"task": "known"}}))


def compared_again(root: Path) -> dict[str, Any]:
    params, build = load_params(root / "params.yaml"), root / "build"
    compare(modality_of(params), params, build, build / "leaderboard")
    return json.loads((build / "leaderboard" / "leaderboard.json").read_text())


def test_a_merge_that_is_told_the_task_is_a_candidate_only_among_its_like(board, tmp_path):
    best = board["candidate"]
    [other] = {"all", "pair"} - {best}
    assert len(board["pairs"]) == 1 and not any("at_use" in row for row in board["rows"])
    told_the_task(tmp_path / "build", best)
    again = compared_again(tmp_path)
    assert again["candidate"] == other and again["pairs"] == []
    assert [row["name"] for row in again["rows"] if "at_use" in row] == [best]
    told_the_task(tmp_path / "build", other)
    both = compared_again(tmp_path)
    assert both["candidate"] == best and len(both["pairs"]) == 1
