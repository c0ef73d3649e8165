"""Means and standard deviations of weights, how far they left the base's, and who was rescaled."""

from __future__ import annotations

import pytest
import torch
from faulty_families import State, Taus, base_state, diagnosed, of_layers, save, told, unrelated

from mergeline.merging.describe import describe_family
from mergeline.merging.diagnoses.scopes import divergence


def rescaled(base: State, taus: Taus) -> None:
    for name in of_layers(base, 1, 2):
        taus["c"][name] = 1.3 * (base[name] + taus["c"][name]) - base[name]


def test_the_divergence_is_that_of_gaussians():
    wide, narrow = [(torch.tensor(m), torch.tensor(s)) for m, s in ((0.1, 0.2), (0.0, 0.1))]
    assert float(divergence(*wide, *narrow)) == pytest.approx(1.306853, abs=1e-6)
    assert float(divergence(*narrow, *wide)) == pytest.approx(0.443147, abs=1e-6)
    assert float(divergence(*wide, *wide)) == 0


def test_who_was_rescaled_is_named_and_where(tmp_path):
    found = diagnosed(tmp_path, rescaled)
    assert ("scopes", ["c"], (1, 2)) in told(found)
    assert not [experts for what, experts, _ in told(found) if what == "scopes" and experts != ["c"]]
    (advice,) = [advice for advice in found["advice"] if advice["diagnosis"] == "scopes"]
    assert "in layers 1-2" in advice["sentence"] and "1.31 times the base's" in advice["sentence"]
    assert advice["rules"] == [{"expert": "c", "layers": [1, 2], "params": {"weights": 0.0}}]


def test_shifted_weights_are_a_change_of_scope(tmp_path):
    def plant(base: State, taus: Taus) -> None:
        for name in of_layers(base, 3, 3):
            taus["a"][name] = taus["a"][name] + 0.3

    found = diagnosed(tmp_path, plant)
    assert ("scopes", ["a"], (3, 3)) in told(found)
    assert "and their mean moved by 0." in next(a["sentence"] for a in found["advice"])


def test_training_leaves_scopes_alone(tmp_path):
    found = diagnosed(tmp_path)
    assert found["advice"] == []
    assert max(share for layer in found["scopes"]["share"] for share in layer) < 0.02


def test_scopes_are_those_of_the_tensors(tmp_path):
    base = base_state()
    taus = unrelated("ab", base)
    base["embed.weight"] = torch.ones_like(base["embed.weight"])  # has no scope
    family = save(tmp_path, base, taus)
    for row in describe_family(family["base"], family["experts"], ranks=(1.0,), workers=1)["by_tensor"]:
        name, scope = row["tensor"], row["scope"]
        if name == "embed.weight":
            assert scope is None
            continue
        states = [base[name].double(), *((base[name] + tau[name]).double() for tau in taus.values())]
        assert scope["mean"] == pytest.approx([float(s.mean()) for s in states], rel=1e-4)
        assert scope["std"] == pytest.approx([float(s.std(correction=0)) for s in states], rel=1e-5)
        assert len(scope["kl"]) == 2
