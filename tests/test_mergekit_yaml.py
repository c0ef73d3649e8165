"""Configurations of mergekit's: what they become, and that it is what mergekit made of them.

tests/goldens/mergekit holds configurations and mergekit's own outputs (benchmarks/make_mergekit_outputs.py).
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from checkpoints import random_state, refused
from safetensors.torch import load_file, save_file

from flows.cli import main
from merging import merge, merge_state_dicts
from merging.mergekit_yaml import METHODS
from merging.methods import catalogue
from merging.plan import make_plan
from merging.recipe import Recipe, load_recipe

STORED = Path(__file__).parent / "goldens" / "mergekit"
NAMES = sorted(path.stem for path in STORED.glob("*.yml"))
# Wider than float32's rounding: mergekit computes these in float32, where norms and angles are not exact.
LOOSE = {"karcher-with-base": 2e-6, "slerp": 2e-7, "slerp-filters": 2e-7, "slerp-slices": 2e-7}


def is_known(name: str) -> bool:
    method = yaml.safe_load((STORED / f"{name}.yml").read_text())["merge_method"]
    return METHODS[method].id in catalogue()


@pytest.fixture
def family(tmp_path) -> Path:
    """A folder where the models of the configurations lie."""
    for path in STORED.glob("*.safetensors"):
        if path.stem == "base" or path.stem.startswith("expert"):
            (tmp_path / path.stem).mkdir()
            shutil.copyfile(path, tmp_path / path.stem / "model.safetensors")
            (tmp_path / path.stem / "config.json").write_text('{"num_hidden_layers": 4}')
    return tmp_path


def written(folder: Path, text: str, name: str = "mergekit.yml") -> Path:
    (folder / name).write_text(text)
    return folder / name


def loaded(folder: Path, text: str) -> Recipe:
    return load_recipe(written(folder, text), Path)


# --------------------------------------------------------------------------------------- mergekit's own outputs


@pytest.mark.parametrize("name", [name for name in NAMES if is_known(name)])
def test_the_merge_is_what_mergekit_makes_of_it(name, family):
    recipe = loaded(family, (STORED / f"{name}.yml").read_text())
    plan = make_plan(recipe)
    assert plan.problems == [] and not any("changes nothing" in w and "embed" not in w for w in plan.warnings)
    merge(recipe, family / "out.safetensors")
    found, expected = load_file(family / "out.safetensors"), load_file(STORED / f"{name}.safetensors")
    assert found.keys() == expected.keys()
    for key, theirs in expected.items():
        ours = found[key]
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        apart = (ours.double() - theirs.double()).abs()
        if name.endswith("-bf16"):
            # It rounds every step to bfloat16 if that is `dtype`, and only the result if it is `out_dtype`.
            ulps = 1.01 if "out" in name else 2.01
            assert bool((apart <= ulps * 2**-8 * theirs.double().abs() + 1e-6).all()), key
        else:
            assert apart.max().item() <= LOOSE.get(name, 1.3e-7), key


@pytest.mark.parametrize("name", [name for name in NAMES if not is_known(name)])
def test_a_method_that_is_not_in_the_catalogue_is_named(name, family):
    with refused("mergekit.yml:", f"unknown method '{name.partition('-')[0].replace('plus_tl', '')}'"):
        loaded(family, (STORED / f"{name}.yml").read_text())
