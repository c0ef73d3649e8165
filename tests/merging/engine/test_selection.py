"""Selection means what its words say: what is excluded, kept, left out, and mapped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import random_state, refused, same_tensors
from safetensors.torch import load_file, save_file

from mergeline.merging import merge
from mergeline.merging.engine.planning import make_plan

SHAPES = {"blocks.0.weight": (4, 3), "blocks.0.bias": (4,), "head.weight": (2, 4)}
HEADS = {"a": 3, "b": 5}  # classes


@pytest.fixture
def family(tmp_path: Path) -> dict[str, Any]:
    """A base without a head, and two experts with heads of different sizes."""
    base = random_state(0, shapes={k: v for k, v in SHAPES.items() if not k.startswith("head")})
    save_file(base, tmp_path / "base.safetensors")
    for t, (name, classes) in enumerate(HEADS.items()):
        state = random_state(t + 1, shapes={**SHAPES, "head.weight": (classes, 4)})
        save_file(state, tmp_path / f"{name}.safetensors")
    paths = {name: tmp_path / f"{name}.safetensors" for name in HEADS}
    return {"method": "average", "base": tmp_path / "base.safetensors", "experts": paths}


def test_an_excluded_tensor_is_not_compared_and_left_out_where_the_base_lacks_it(family, tmp_path):
    recipe = {**family, "exclude": ["head.*"]}
    plan = make_plan(recipe)
    assert not plan.problems
    assert any("head.weight" in w and "left out" in w and "keep" in w for w in plan.warnings)
    merge(recipe, tmp_path / "out.safetensors")
    assert set(load_file(tmp_path / "out.safetensors")) == {"blocks.0.weight", "blocks.0.bias"}


def test_an_excluded_tensor_is_the_bases_whatever_experts_have(family, tmp_path):
    base = {**load_file(family["base"]), "head.weight": torch.ones(7, 7)}
    save_file(base, tmp_path / "with_head.safetensors")
    merge(
        {**family, "base": tmp_path / "with_head.safetensors", "exclude": ["head.*"]},
        tmp_path / "out.safetensors",
    )
    assert torch.equal(load_file(tmp_path / "out.safetensors")["head.weight"], torch.ones(7, 7))


def test_keep_takes_a_tensor_from_a_named_expert(family, tmp_path):
    recipe = {**family, "keep": {"head.*": "b"}}
    merge(recipe, tmp_path / "out.safetensors")
    found = load_file(tmp_path / "out.safetensors")
    assert torch.equal(found["head.weight"], load_file(family["experts"]["b"])["head.weight"])
    row = next(row for row in make_plan(recipe).table() if row["tensor"] == "head.weight")
    assert row["treatment"] == "kept from b"
    with refused("keep", "'c'", "no expert"):
        merge({**recipe, "keep": {"head.*": "c"}}, tmp_path / "other.safetensors")


def test_without_a_base_excluded_tensors_need_an_owner(family, tmp_path):
    recipe = {**family, "base": None, "exclude": ["head.*"]}
    with refused("name a base", "keep"):
        merge(recipe, tmp_path / "out.safetensors")
    merge({**recipe, "keep": {"head.*": "a"}}, tmp_path / "out.safetensors")
    assert load_file(tmp_path / "out.safetensors")["head.weight"].shape == (HEADS["a"], 4)


@pytest.mark.parametrize("option", ["include", "exclude"])
def test_a_pattern_that_matches_nothing_is_refused(option, family, tmp_path):
    with refused(option, "no tensor matches 'haed.*'"):
        merge({**family, option: ["haed.*"]}, tmp_path / "out.safetensors")
    with refused("keep", "no tensor matches 'haed.*'"):
        merge({**family, "keep": {"haed.*": "a"}}, tmp_path / "out.safetensors")


def test_a_mismatch_says_the_way_out(family, tmp_path):
    base = {**load_file(family["base"]), "head.weight": torch.ones(3, 4)}
    save_file(base, tmp_path / "with_head.safetensors")
    with refused("head.weight", "[5, 4]", "leave it out with --exclude 'head.*'"):
        merge({**family, "base": tmp_path / "with_head.safetensors"}, tmp_path / "out.safetensors")
    with refused("the base lacks", "head.weight", "--exclude 'head.*'"):
        merge(family, tmp_path / "out.safetensors")


@pytest.mark.parametrize("longer", ["base", "experts"])
def test_a_base_with_or_without_one_prefix_is_mapped_and_said(longer, tmp_path):
    shapes = {"layers.0.weight": (4, 3), "norm.weight": (4,)}
    states = {name: random_state(seed, shapes=shapes) for seed, name in enumerate(("base", "a", "b"))}
    for name, state in states.items():
        prefix = "model." if (name == "base") == (longer == "base") else ""
        save_file({prefix + key: value for key, value in state.items()}, tmp_path / f"{name}.safetensors")
    recipe = {
        "method": "task_arithmetic",
        "base": tmp_path / "base.safetensors",
        "experts": {name: tmp_path / f"{name}.safetensors" for name in "ab"},
    }
    assert any("'model.'" in warning and "mapped" in warning for warning in make_plan(recipe).warnings)
    merge(recipe, tmp_path / "out.safetensors")
    found = load_file(tmp_path / "out.safetensors")
    prefix = "model." if longer == "experts" else ""
    expected = {
        prefix + key: value + 0.3 * (states["a"][key] - value + states["b"][key] - value)
        for key, value in states["base"].items()
    }
    assert found.keys() == expected.keys()
    assert all(torch.allclose(found[key], expected[key]) for key in expected)


def test_excluded_tensors_that_are_averaged_still_must_fit(family, tmp_path):
    with refused("head.weight"):
        merge({**family, "exclude": ["head.*"], "excluded": "average"}, tmp_path / "out.safetensors")


def test_other_prefixes_are_no_reason_to_map(tmp_path):
    for name, prefix in (("base", "model."), ("a", "other."), ("b", "other.")):
        state = {prefix + k: v for k, v in random_state(0, shapes=SHAPES).items()}
        save_file(state, tmp_path / f"{name}.safetensors")
    recipe = {
        "method": "average",
        "base": tmp_path / "base.safetensors",
        "experts": {name: tmp_path / f"{name}.safetensors" for name in "ab"},
    }
    with refused("the base lacks"):
        merge(recipe, tmp_path / "out.safetensors")


def test_what_is_excluded_from_all_is_the_base(family, tmp_path):
    recipe = {**family, "include": ["blocks.0.bias"]}
    merge(recipe, tmp_path / "out.safetensors")
    found, base = load_file(tmp_path / "out.safetensors"), load_file(family["base"])
    assert same_tensors({"w": found["blocks.0.weight"]}, {"w": base["blocks.0.weight"]})
    assert not torch.equal(found["blocks.0.bias"], base["blocks.0.bias"])
