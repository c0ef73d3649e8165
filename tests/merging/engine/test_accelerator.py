"""Merges on an accelerator: on a device that refuses the CPU's tensors, and by the branches that it takes."""

from __future__ import annotations

import pytest
import torch
from checkpoints import random_state, save_family_for
from patched import patch_everywhere
from safetensors.torch import load_file

from mergeline.merging import merge, merge_state_dicts
from mergeline.merging.algebra import directions
from mergeline.merging.methods import catalogue
from mergeline.merging.pretended_device import pretended_device

SHAPES = {"blocks.0.attn.weight": (160, 140), "blocks.1.mlp.weight": (130, 200), "blocks.1.bias": (300,)}
PARAMS = {
    "breadcrumbs": {"density": 0.5, "outlier_rate": 0.1},
    "della": {"density": 0.5, "epsilon": 0.2},
    "ties": {"density": 0.3},
    "sce": {"density": 0.3},
    "pcb": {"density": 0.3},
    "tatr": {"density": 0.6},
    "lines": {"inner": "cart"},
    "ota": {"density": 0.5, "merge": "linear", "rescale": True},
}


@pytest.mark.parametrize("method", catalogue())
def test_every_method_from_files(method, tmp_path):
    recipe = save_family_for(method, tmp_path / "in", SHAPES) | {"params": PARAMS.get(method, {})}
    merge(recipe, tmp_path / "here.safetensors")
    with pretended_device() as device:
        manifest = merge(recipe, tmp_path / "there.safetensors", device=device, workers=2)
    assert manifest["device"] == device.partition(":")[0]
    here, there = load_file(tmp_path / "here.safetensors"), load_file(tmp_path / "there.safetensors")
    for name, value in here.items():
        assert torch.allclose(there[name], value, rtol=1e-5, atol=1e-5), name


@pytest.mark.parametrize("method", ["cart", "tsv_merge", "iso_c"])
def test_decompositions_that_are_kept(method, tmp_path):
    recipe = save_family_for(method, tmp_path / "in", SHAPES)
    for out in ("first", "again"):
        with pretended_device() as device:
            merge(recipe, tmp_path / f"{out}.safetensors", device=device, factors=tmp_path / "factors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "first.safetensors").read_bytes()


@pytest.mark.parametrize("bytes", [1, 2 * 8 * 160 * 140, 1 << 30])
@pytest.mark.parametrize("method", ["cart", "tsv_merge", "lowrank_task_arithmetic"])
def test_any_number_of_experts_at_once(method, bytes, monkeypatch):
    base = random_state(0, shapes=SHAPES)
    experts = {f"e{t}": random_state(t + 1, shapes=SHAPES) for t in range(3)}
    params = {"rank": 0.1}
    expected = merge_state_dicts(method, experts, base, params=params)
    patch_everywhere(monkeypatch, "on_cpu", lambda tensor: False)
    monkeypatch.setattr(directions, "_BATCH_BYTES", bytes)
    merged = merge_state_dicts(method, experts, base, params=params)
    for name, value in expected.items():
        assert torch.allclose(merged[name], value, rtol=1e-5, atol=1e-5), name
