"""Merges of a run's training shards are those of safetensors copies of them, bit for bit, in every verb."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import refused
from safetensors.torch import load_file, save_file
from small_language_model import save_model
from torch import Tensor
from training_shards import run_state, save_shards, trained

from mergeline.merging import merge
from mergeline.merging.checkpoints.checkpoint import open_checkpoint
from mergeline.merging.compress import compress, extract_expert
from mergeline.merging.engine.planning import make_plan
from mergeline.merging.verify import verify

WEIGHTS = "model.safetensors"
State = dict[str, Tensor]


def squares_of(state: dict[str, Any]) -> State:
    return {name: own["exp_avg_sq"].contiguous() for name, own in state["optim"]["state"].items()}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three checkpoints of a run, its beginning, and copies of all as safetensors, of second moments too."""
    folder = tmp_path_factory.mktemp("run")
    for steps in range(4):
        model, optimizer = trained(steps)
        state = run_state(model, optimizer)
        save_shards(state, folder / f"step-{steps}")
        weights = {name: tensor.contiguous() for name, tensor in state["model"].items()}
        save_file(weights, folder / f"step-{steps}.safetensors")
        save_file(squares_of(state), folder / f"squares-{steps}.safetensors")
    return folder


def steps(run: Path, suffix: str = "") -> dict[str, Path]:
    return {f"s{n}": run / f"step-{n}{suffix}" for n in (1, 2, 3)}


RECIPES: list[dict[str, Any]] = [
    {"method": "ema", "params": {"decay": 0.7}},
    {"method": "linear", "params": {"weights": [1, 2, 3]}},
    {"method": "ties", "base": True},
]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe["method"])
def test_a_merge_of_shards_is_the_merge_of_their_copies(recipe, run: Path, tmp_path: Path):
    recipe = dict(recipe)
    based = recipe.pop("base", False)
    manifests = []
    for suffix, out in (("", "out"), (".safetensors", "expected.safetensors")):
        base = {"base": run / f"step-0{suffix}"} if based else {}
        manifests.append(merge({**recipe, **base, "experts": steps(run, suffix)}, tmp_path / out))
    found, expected = load_file(tmp_path / "out" / WEIGHTS), load_file(tmp_path / "expected.safetensors")
    assert found.keys() == expected.keys()
    assert all(found[n].dtype == t.dtype and torch.equal(found[n], t) for n, t in expected.items())
    assert "bit-identical" in verify(tmp_path / "out")
    digests = [{n: e["digest"] for n, e in m["recipe"]["experts"].items()} for m in manifests]
    assert digests[0] == digests[1] and manifests[0]["output"]["digest"] == manifests[1]["output"]["digest"]


def test_second_moments_of_shards_weigh_as_their_copies(run: Path, tmp_path: Path):
    recipe = {"method": "ota", "exclude": ["count"], "base": run / "step-0"}
    moments = {"fisher": [run / f"step-{n}" for n in (1, 2, 3)]}
    merge({**recipe, "experts": steps(run), "statistics": moments}, tmp_path / "out")
    copies = {"fisher": [run / f"squares-{n}.safetensors" for n in (1, 2, 3)]}
    merge({**recipe, "experts": steps(run), "statistics": copies}, tmp_path / "expected")
    found, expected = (load_file(tmp_path / name / WEIGHTS) for name in ("out", "expected"))
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert "bit-identical" in verify(tmp_path / "out")
    plan = make_plan({**recipe, "experts": steps(run), "statistics": moments})
    [said] = [warning for warning in plan.warnings if "second moments" in warning]
    assert said.startswith("statistics 'fisher': second moments as the optimizer holds them")


def test_plans_say_what_is_left_out_and_that_no_configuration_is_there(run: Path):
    plan = make_plan({"method": "ema", "experts": steps(run)})
    assert plan.problems == []
    assert "s1: training shards: left out, for they are no weights: optim (30), rng, step" in plan.warnings
    assert any("no config.json" in warning and "name as base" in warning for warning in plan.warnings)
    files = {path.name for path in plan.stamps if path.is_relative_to(run / "step-1")}
    assert files == {".metadata", "__0_0.distcp"}


def test_the_base_gives_the_configuration_and_says_which_head_is_tied(tmp_path: Path):
    save_model(tmp_path / "base", 0)
    for seed in (1, 2):
        save_model(tmp_path / f"copy-{seed}", seed)
        state = load_file(tmp_path / f"copy-{seed}" / WEIGHTS)
        state["lm_head.weight"] = state["model.embed_tokens.weight"]  # as a state dict has it
        save_shards({"model": state}, tmp_path / f"step-{seed}")
    recipe: dict[str, Any] = {"method": "linear", "base": tmp_path / "base"}
    merge({**recipe, "experts": {f"s{n}": tmp_path / f"step-{n}" for n in (1, 2)}}, tmp_path / "out")
    merge({**recipe, "experts": {f"s{n}": tmp_path / f"copy-{n}" for n in (1, 2)}}, tmp_path / "expected")
    assert open_checkpoint(tmp_path / "out").digest() == open_checkpoint(tmp_path / "expected").digest()
    assert (tmp_path / "out" / "config.json").exists()


def test_a_merge_of_shards_goes_on_where_it_was_killed_and_refuses_files_that_changed(
    run: Path, tmp_path: Path
):
    for n in (1, 2, 3):
        save_shards({"model": load_file(run / f"step-{n}.safetensors")}, tmp_path / f"step-{n}")
    recipe = {"method": "ema", "experts": steps(tmp_path)}
    plan = make_plan(recipe)
    [file] = (tmp_path / "step-2").glob("*.distcp")
    file.touch()
    with refused(file.name, "was changed while it was read"):
        merge(plan, tmp_path / "out")

    def stop(count: int, total: int) -> None:
        if count == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge(recipe, tmp_path / "out", progress=stop, workers=1)
    merge(recipe, tmp_path / "out")
    merge({"method": "ema", "experts": steps(run, ".safetensors")}, tmp_path / "expected.safetensors")
    assert (
        open_checkpoint(tmp_path / "out").digest()
        == open_checkpoint(tmp_path / "expected.safetensors").digest()
    )


def test_a_compressed_store_gives_back_what_shards_held(run: Path, tmp_path: Path):
    for suffix, place in (("", "shards"), (".safetensors", "copies")):
        recipe = {"method": "tall_mask", "base": run / f"step-0{suffix}", "experts": steps(run, suffix)}
        compress(recipe, tmp_path / place / "store")
        extract_expert(tmp_path / place / "store", "s2", tmp_path / place / "again", base=recipe["base"])
    digests = {open_checkpoint(tmp_path / place / "again").digest() for place in ("shards", "copies")}
    assert len(digests) == 1
    assert "bit-identical" in verify(tmp_path / "shards" / "again")
