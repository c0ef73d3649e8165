"""Outputs of published reference implementations on small inputs: goldens/cases.json, one case a line."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from checkpoints import State, same_tensors, shard
from safetensors.torch import load_file

from merging import merge, merge_state_dicts

GOLDENS = Path(__file__).parent / "goldens"
CASES = json.loads((GOLDENS / "cases.json").read_text())["cases"]

pytestmark = pytest.mark.parametrize("case", CASES, ids=[c["case"] for c in CASES])


def path_of(case: dict[str, Any], stem: str) -> Path:
    return GOLDENS / "inputs" / case["input_set"] / f"{stem}.safetensors"


def inputs(case: dict[str, Any]) -> tuple[dict[str, State], State | None]:
    experts = {stem: load_file(path_of(case, stem)) for stem in case["experts"]}
    return experts, load_file(path_of(case, case["base"])) if case["base"] else None


def recipe(case: dict[str, Any]) -> dict[str, Any]:
    return {
        "method": case["method"],
        "params": case["params"],
        "experts": {stem: path_of(case, stem) for stem in case["experts"]},
        "base": path_of(case, case["base"]) if case["base"] else None,
    }


def in_memory(case: dict[str, Any]) -> State:
    experts, base = inputs(case)
    return merge_state_dicts(case["method"], experts, base, params=case["params"])


def test_equals_the_reference(case):
    merged, expected = in_memory(case), load_file(GOLDENS / case["expected"])
    wrong = 0
    for key in case["expected_keys"]:
        a, b = merged[key].double(), expected[key].double()
        assert a.shape == b.shape, key
        # "not within" instead of "beyond": a NaN is wrong too
        wrong += int((~((a - b).abs() <= case["atol"] + case["rtol"] * b.abs())).sum())
    assert wrong <= case["max_mismatch_elements"]


def test_inputs_are_not_modified(case):
    experts, base = inputs(case)
    merge_state_dicts(case["method"], experts, base, params=case["params"])
    experts_again, base_again = inputs(case)
    assert all(same_tensors(experts[stem], experts_again[stem]) for stem in experts)
    assert base is None or same_tensors(base, base_again)


def test_files_give_what_memory_gives_with_any_number_of_workers(case, tmp_path):
    shas = set()
    for workers in (1, 2):
        out = tmp_path / f"{workers}.safetensors"
        merge(recipe(case), out, workers=workers)
        shas.add(hashlib.sha256(out.read_bytes()).hexdigest())
        assert same_tensors(load_file(out), in_memory(case))
    assert len(shas) == 1


def test_sharded_inputs_give_the_same(case, tmp_path):
    whole = merge(recipe(case), tmp_path / "whole.safetensors", workers=1)
    sharded = recipe(case)
    first = case["experts"][0]
    sharded["experts"] |= {first: shard(load_file(path_of(case, first)), tmp_path / "shards", 3)}
    again = merge(sharded, tmp_path / "again.safetensors", workers=1)
    assert again["output"] == whole["output"]
    assert again["recipe_digest"] == whole["recipe_digest"]
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
