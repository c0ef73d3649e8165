"""Frank-Wolfe merging goes toward the checkpoints that it says it chose."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import refused
from safetensors.torch import load_file
from tiny_network import Family, make_family

from mergeline.merging import merge
from mergeline.merging.learning.fitting import fit
from mergeline.merging.learning.frank_wolfe import selection


@pytest.fixture
def family(tmp_path) -> Family:
    return make_family(tmp_path / "family", dtype=torch.float32)


def fitted(family: Family, folder: Path, **params: Any) -> Any:
    recipe = {**family.recipe, "method": "fw_merging", "params": params}
    return fit(recipe, family.network, family.examples, folder)


def curve(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "curve.json").read_text())


@pytest.mark.parametrize("params", [{}, {"granularity": "tensor", "objective": "cosine"}], ids=str)
def test_frank_wolfe_goes_toward_what_it_says(family, tmp_path, params):
    recipe = fitted(family, tmp_path / "job", iterations=2, examples=24, step_size=1.0, **params)
    first, second = json.loads((tmp_path / "job" / "selection.json").read_text())
    merge(recipe, tmp_path / "out.safetensors")
    merged = load_file(tmp_path / "out.safetensors")
    for name, base in family.states["base"].items():
        start = base + sum(0.3 * (family.states[n][name] - base) for n in "abc")
        pool = {**{n: family.states[n][name] for n in "abc"}, "start": start}
        step = start
        for chosen, share in ((first, 0.3), (second, 0.2)):
            picked = chosen if isinstance(chosen, str) else chosen[name]
            step = step + share * (pool[picked] - step)
        assert torch.allclose(merged[name], step, rtol=0, atol=1e-6), name
        assert torch.allclose(family.network.tensors()[name], step, rtol=0, atol=1e-6), name
    assert len(curve(tmp_path / "job")) == 2


SOFT = {"variant": "soft", "iterations": 2, "examples": 24, "soft_initial": 0.5}


@pytest.mark.parametrize("granularity", ["expert", "tensor"])
def test_soft_steps_go_toward_an_expert_for_each_task(family, tmp_path, granularity):
    """Shares hardly move from where they begin, so that the merge is known."""
    params = {**SOFT, "soft_iterations": 2, "rate": 1e-12, "granularity": granularity}
    recipe = fitted(family, tmp_path / "job", **params)
    merge(recipe, tmp_path / "out.safetensors")
    merged = load_file(tmp_path / "out.safetensors")
    for name, base in family.states["base"].items():
        experts = [family.states[n][name] for n in "abc"]
        first = base + sum(0.3 * (expert - base) for expert in experts)
        second = first + sum(0.5 * (expert - first) for expert in experts)
        assert torch.allclose(merged[name], second, rtol=0, atol=1e-6), name
        assert torch.allclose(family.network.tensors()[name], second, rtol=0, atol=1e-6), name
    for chosen in json.loads((tmp_path / "job" / "selection.json").read_text()):
        for names in [chosen] if granularity == "expert" else chosen.values():
            assert sorted(names) == ["a", "b", "c"]
    assert [row["step"] for row in curve(tmp_path / "job")] == list(range(4))


def test_soft_steps_lower_what_they_are_fitted_to(family, tmp_path):
    fitted(family, tmp_path / "job", **{**SOFT, "soft_iterations": 30, "rate": 0.02, "soft_initial": 1e-8})
    losses = [row["loss"] for row in curve(tmp_path / "job")]
    assert sum(losses[25:30]) < sum(losses[:5]) and sum(losses[55:]) < sum(losses[25:30])


def test_an_expert_without_examples_may_be_in_the_pool(family, tmp_path):
    examples = family.examples
    few = replace(examples, **{  # type: ignore[arg-type]
        key: {task: value for task, value in getattr(examples, key).items() if task != "c"}
        for key in ("batches", "counts", "owners", "digests")
    })  # fmt: skip
    recipe = {**family.recipe, "method": "fw_merging", "params": {**SOFT, "soft_iterations": 1}}
    fit(recipe, family.network, few, tmp_path / "job")
    for chosen in json.loads((tmp_path / "job" / "selection.json").read_text()):
        assert len(set(chosen)) == 2
    with refused("'c' has no examples"):
        fit({**family.recipe, "method": "adamerging"}, family.network, few, tmp_path / "other")


def test_a_checkpoint_that_is_taken_is_not_chosen_again():
    scores = [[0.1, 0.2, 0.3], [0.9, 0.1, 0.2]]
    assert selection(scores, "expert") == [1, 1]
    assert selection(scores, "expert", [[1], [1]]) == [2, 2]
    assert selection(scores, "tensor", [[0], [1]]) == [1, 2]
