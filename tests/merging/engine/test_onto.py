"""Adapters that add to another model than the base: what PEFT merges, as expert, as base, and alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import State, refused
from peft_adapters import llama, save_adapter
from safetensors.torch import load_file, save_file

from mergeline.merging import merge
from mergeline.merging.checkpoints.checkpoint import open_checkpoint
from mergeline.merging.engine.planning import make_plan
from mergeline.merging.recipes.loading import load_recipe
from mergeline.merging.verify import verify


@pytest.fixture
def family(tmp_path: Path) -> dict[str, State]:
    """A base, another model, an adapter of that, and what PEFT makes of both."""
    llama().save_pretrained(tmp_path / "base")
    other = llama()
    with torch.no_grad():
        for number, value in enumerate(other.parameters()):
            value += 0.01 * (number % 3)
    other.save_pretrained(tmp_path / "other")
    merged = save_adapter(other, tmp_path / "lora")
    return {"merged": merged, **{n: load_file(tmp_path / n / "model.safetensors") for n in ("base", "other")}}


def made(recipe: dict[str, Any], out: Path) -> State:
    merge(recipe, out)
    assert "bit-identical" in verify(out)
    return load_file(out / "model.safetensors")


def same(found: State, expected: State) -> bool:
    return all(torch.allclose(value, expected[name], rtol=1e-5, atol=1e-6) for name, value in found.items())


def test_an_adapter_alone_is_put_into_its_model(family, tmp_path):
    recipe = {"method": "passthrough", "experts": {"a": tmp_path / "lora"}, "onto": {"a": tmp_path / "other"}}
    assert same(made(recipe, tmp_path / "out"), family["merged"])
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["recipe"]["onto"]["a"]["digest"] == open_checkpoint(tmp_path / "other").digest()
    assert (tmp_path / "out" / "config.json").is_file() and not (
        tmp_path / "out" / "adapter_config.json"
    ).exists()
    from transformers import AutoModelForCausalLM

    _, loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not loaded["missing_keys"] and not loaded["mismatched_keys"]


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "knots"])
def test_an_expert_is_the_model_with_its_adapter(method, family, tmp_path):
    save_file(family["merged"], tmp_path / "full.safetensors")
    recipe = {
        "method": method,
        "base": tmp_path / "base",
        "experts": {"a": tmp_path / "lora", "b": tmp_path / "other"},
    }
    found = made({**recipe, "onto": {"a": tmp_path / "other"}}, tmp_path / "out")
    full = {**recipe, "experts": {"a": tmp_path / "full.safetensors", "b": tmp_path / "other"}}
    merge(full, tmp_path / "full-merge.safetensors")
    expected = load_file(tmp_path / "full-merge.safetensors")
    assert all(torch.allclose(found[n], value, rtol=1e-4, atol=1e-5) for n, value in expected.items())


def test_a_base_may_be_a_model_with_an_adapter(family, tmp_path):
    recipe = {"method": "task_arithmetic", "base": tmp_path / "lora", "experts": {"a": tmp_path / "base"}}
    recipe |= {"onto": {"base": tmp_path / "other"}, "params": {"scale": 0.5}}
    found = made(recipe, tmp_path / "out")
    assert same(found, {n: (value + family["base"][n]) / 2 for n, value in family["merged"].items()})


def test_what_an_adapter_adds_to_is_looked_at_by_verify(family, tmp_path):
    recipe = {"method": "passthrough", "experts": {"a": tmp_path / "lora"}, "onto": {"a": tmp_path / "other"}}
    merge(recipe, tmp_path / "out")
    save_file(family["base"], tmp_path / "other" / "model.safetensors")
    with refused("other", "no longer the 'a'"):
        verify(tmp_path / "out")


def test_only_an_adapter_adds_to_anything(family, tmp_path):
    recipe = {"method": "passthrough", "experts": {"a": tmp_path / "base"}, "onto": {"a": tmp_path / "other"}}
    [problem] = make_plan(recipe).problems
    assert problem == "a: is no PEFT adapter, so it adds to nothing; leave it out of onto"
    [problem] = make_plan(
        {**recipe, "experts": {"a": tmp_path / "lora"}, "onto": {"a": tmp_path / "x"}}
    ).problems
    assert "onto: a:" in problem and "no such" in problem
    with refused("onto: 'b' is neither"):
        make_plan({**recipe, "onto": {"b": tmp_path / "other"}})


def test_mergekits_model_with_an_adapter(family, tmp_path):
    text = "merge_method: passthrough\nmodels: [{model: other+lora}]\n"
    (tmp_path / "mergekit.yml").write_text(text)
    recipe = load_recipe(tmp_path / "mergekit.yml", Path)
    assert same(made(recipe.model_dump(), tmp_path / "out"), family["merged"])
    text = "merge_method: linear\nparameters: {weight: 1}\n"
    text += "models: [{model: other+lora}, {model: other}, {model: base}]\n"
    (tmp_path / "mergekit.yml").write_text(text)
    merge(load_recipe(tmp_path / "mergekit.yml", Path), tmp_path / "mean")
    found = load_file(tmp_path / "mean" / "model.safetensors")
    assert same(found, {n: sum(family[m][n] for m in family) / 3 for n in found})
