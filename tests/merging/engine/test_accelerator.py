"""The torch-only branches that an accelerator takes, run on the CPU: the same results within rounding."""

from __future__ import annotations

import pytest
import torch
from checkpoints import random_state
from patched import patch_everywhere

from mergeline.merging import merge_state_dicts
from mergeline.merging.algebra import directions
from mergeline.merging.laws import gathered
from mergeline.merging.methods import catalogue

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
def test_every_method_gives_the_same(method, monkeypatch):
    base = random_state(0, shapes=SHAPES)
    count = catalogue()[method].experts[1] or 3
    experts = {
        f"e{t}": {n: v + 0.1 * random_state(t + 1, shapes=SHAPES)[n] for n, v in base.items()}
        for t in range(count)
    }
    params = PARAMS.get(method, {})
    given = {"params": params, "statistics": gathered(method, experts, params)}
    expected = merge_state_dicts(method, experts, base, **given)
    seen = []
    patch_everywhere(monkeypatch, "on_cpu", lambda tensor: seen.append(tensor) or False)
    merged = merge_state_dicts(method, experts, base, **given)
    for name, value in expected.items():
        assert torch.allclose(merged[name], value, rtol=1e-5, atol=1e-5), name
    # weighted decomposes nothing of its usual directions, the task vectors; Fourier transforms are the same anywhere
    spectral = catalogue()[method].spectral and method not in ("weighted", "free")
    if spectral or method in ("ties", "della", "breadcrumbs", "sce"):
        assert seen


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
