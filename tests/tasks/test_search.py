"""The search step: batches and stored factors change nothing; the merge step takes what it chose."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from ruamel.yaml import YAML

from mergeline.evaluation.state import load_state
from mergeline.merging import merge
from mergeline.merging.errors import UserError
from mergeline.tasks import search as steps
from mergeline.tasks.clip.evaluator import open_evaluator
from mergeline.tasks.clip.modality import Clip
from mergeline.tasks.params import load_params

EXPERTS = ("digits", "shapes", "textures")


@pytest.fixture
def ready(workspace: Path, mergeline: Any) -> Path:
    """The workspace with everything that a search needs."""
    for step in ("fetch", "data", "heads", "fit"):
        assert mergeline(step, "--params", workspace / "params.yaml").code == 0
    return workspace


def stored(workspace: Path) -> list[Path]:
    return sorted(f for f in (workspace / ".mergeline" / "factors").rglob("*") if f.is_file())


def test_batches_and_stored_factors_change_no_byte(ready, mergeline, monkeypatch):
    params, out = ready / "params.yaml", ready / "build" / "search" / "cart.json"
    results = []
    for bytes_at_a_time in (1, 1 << 29):  # point by point with an empty store; all at once with a full one
        monkeypatch.setattr(steps, "_MERGED_BYTES", bytes_at_a_time)
        assert mergeline("search", "--params", params, "cart").code == 0
        results.append((out.read_bytes(), stored(ready)))
    assert results[0] == results[1] and results[0][1]


def test_a_base_that_cannot_be_measured_is_refused_before_anything_is_merged(workspace, tmp_path):
    class Refusing(Clip):
        def check(self, base: Path) -> None:
            raise UserError(f"{base}: is of another kind")

    params = load_params(workspace / "params.yaml")
    for name in ("average", "cart"):  # without a grid, and with one
        places = {"factors": tmp_path / "factors", "scratch": tmp_path / "scratch"}
        with pytest.raises(UserError, match="checkpoints/base: is of another kind"):
            steps.search(Refusing(), params, name, tmp_path / "build", tmp_path / f"{name}.json", **places)
    assert [path.name for path in tmp_path.iterdir()] == ["workspace"]


def test_a_merge_takes_its_own_experts_in_its_own_order(ready, mergeline, tmp_path):
    params, build, yaml = ready / "params.yaml", ready / "build", YAML()
    content = yaml.load(params)
    content["merges"]["pair"] = {
        "method": "slerp",
        "experts": ["textures", "digits"],
        "search": {"t": [0.1, 0.6]},
    }
    yaml.dump(content, params)
    for step in ("fit", "search", "merge-all"):
        assert mergeline(step, "--params", params, "pair").code == 0
    found = json.loads((build / "search" / "pair.json").read_text())
    recipe = {"method": "slerp", "base": build / "checkpoints" / "base", "params": found["chosen"]}
    experts = {name: build / "checkpoints" / name for name in ("textures", "digits")}
    alone = merge({**recipe, "experts": experts}, tmp_path / "alone")
    manifest = json.loads((build / "merges" / "pair" / "manifest.json").read_text())
    assert list(manifest["recipe"]["experts"]) == ["textures", "digits"]
    assert manifest["output"] == alone["output"]
    assert list(found["points"][0]["tasks"]) == [*EXPERTS]  # settings are chosen by all tasks


def test_a_merge_says_what_it_merges_of_the_models(ready, mergeline, tmp_path):
    params, build, yaml = ready / "params.yaml", ready / "build", YAML()
    content = yaml.load(params)
    selection = {
        "exclude": ["visual.conv1.*"],
        "keep": {"visual.ln_post.*": "digits"},
        "rules": [{"match": ["*.mlp.*"], "params": {"scale": 0.0}}],
    }
    content["merges"]["part"] = {"method": "task_arithmetic", "search": {"scale": [0.5, 0.2]}, **selection}
    yaml.dump(content, params)
    for step in ("fit", "search", "merge-all"):
        assert mergeline(step, "--params", params, "part").code == 0
    found = json.loads((build / "search" / "part.json").read_text())
    experts = {name: build / "checkpoints" / name for name in EXPERTS}
    plain = {"method": "task_arithmetic", "base": build / "checkpoints" / "base", "experts": experts}
    alone = merge({**plain, "params": found["chosen"], **selection}, tmp_path / "alone")
    manifest = json.loads((build / "merges" / "part" / "manifest.json").read_text())
    assert manifest["output"] == alone["output"]
    base, digits, merged = (
        load_state(path) for path in (plain["base"], experts["digits"], build / "merges" / "part")
    )
    changed = {name for name, tensor in merged.items() if not torch.equal(tensor, base[name])}
    assert changed and not any("conv1" in name or ".mlp." in name for name in changed)
    assert torch.equal(merged["visual.ln_post.weight"], digits["visual.ln_post.weight"])
    evaluator = open_evaluator(load_params(params), build, plain["base"])
    predicted = evaluator.predict(merged, "val", EXPERTS)
    accuracy = {t: float((predicted[t] == evaluator.data[t].split("val")[1]).mean()) for t in EXPERTS}
    assert next(p for p in found["points"] if p["params"] == found["chosen"])["tasks"] == accuracy


def test_what_was_scored_is_what_is_merged(ready, mergeline, tmp_path, monkeypatch):
    """Points are scored as single merges, in the grid's order; the best one is merged with the stored factors."""
    params, build = ready / "params.yaml", ready / "build"
    mergeline("search", "--params", params, "cart")
    found = json.loads((build / "search" / "cart.json").read_text())
    points, chosen = found["points"], found["chosen"]
    assert [p["params"] for p in points] == [{"rank": r, "scale": s} for r in (0.1, 0.5) for s in (1.0, 2.0)]
    assert chosen == max(points, key=lambda p: p["mean"])["params"]

    base, *experts = (build / "checkpoints" / name for name in ("base", *EXPERTS))
    recipe = {"method": "cart", "base": base, "experts": dict(zip(EXPERTS, experts))}
    alone = merge({**recipe, "params": chosen}, tmp_path / "alone")
    monkeypatch.delattr("mergeline.merging.algebra.decompositions.leading")
    assert mergeline("merge-all", "--params", params, "cart").code == 0
    manifest = json.loads((build / "merges" / "cart" / "manifest.json").read_text())
    assert manifest["output"] == alone["output"]

    evaluator = open_evaluator(load_params(params), build, base)
    predicted = evaluator.predict(load_state(tmp_path / "alone"), "val", EXPERTS)
    accuracy = {t: float((predicted[t] == evaluator.data[t].split("val")[1]).mean()) for t in EXPERTS}
    assert next(p for p in points if p["params"] == chosen)["tasks"] == accuracy
