"""Linearised models: their features are those of torch's forward derivatives, and a search is over sums of them."""

from __future__ import annotations

import json

import pytest
import torch
from learned_families import learned_family
from places import GOLDENS
from safetensors.torch import load_file
from tiny_network import make_family
from torch import nn

from mergeline.merging.learning.directions import Inputs
from mergeline.merging.learning.fitting import fit
from mergeline.merging.learning.network import Network
from mergeline.merging.learning.tangent import Tangent, derivative, task_vector
from mergeline.merging.recipes.recipe import Recipe


class TwoLayers(nn.Module):
    def __init__(self, a: torch.Tensor, b: torch.Tensor) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(*reversed(a.shape)), nn.Linear(*reversed(b.shape))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(nn.functional.gelu(self.a(x)))


def test_derivatives_and_sums_are_the_official_ones():
    held = load_file(GOLDENS / "unit-tangent.safetensors")
    names = ["a.weight", "a.bias", "b.weight", "b.bias"]
    network = Network(
        TwoLayers(held["p0.a.weight"], held["p0.b.weight"]), lambda module, batch: module(batch["x"])
    )
    network.load({name: held[f"p0.{name}"] for name in names})
    found = []
    for t in (0, 1):
        found.append(derivative(network, {n: held[f"tv.{t}.{n}"] for n in names}, {"x": held["x"]}))
        torch.testing.assert_close(found[t], held[f"jvp.{t}"], atol=1e-5, rtol=1e-4)
    with torch.no_grad():
        base = network.features({"x": held["x"]})
    features = Tangent({}, base, torch.stack(found)).features(torch.ones(2))
    torch.testing.assert_close(features, held["out_linearised_sum"], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["open_clip", "bert"])
def test_attention_has_forward_derivatives(kind, tmp_path):
    family = learned_family(kind, tmp_path, experts=1, noise=0.01)
    with Inputs(Recipe.of({**family.recipe("average")})) as inputs:
        inputs.load_start(family.network)
        tau = task_vector(inputs, family.network, "e0")
        batch = {"images": family.inputs(0, 3)}
        found = derivative(family.network, tau, batch)
        own = family.network.tensors()
        sides = []
        for step in (1e-2, -1e-2):
            inputs.load_start(family.network)
            with torch.no_grad():
                for name, value in tau.items():
                    own[name].add_(value, alpha=step)
                sides.append(family.network.features(batch))
    expected = (sides[0] - sides[1]) / 2e-2
    assert float((found - expected).norm()) < 1e-2 * float(expected.norm()) and float(expected.norm()) > 0


def test_the_scale_of_least_loss_is_taken_and_experts_of_one_task_are_found(tmp_path):
    family = make_family(tmp_path / "family", experts=1)
    for each in (False, True):
        params = {"objective": "l2", "each": each}
        recipe = fit(
            {**family.recipe, "method": "tangent", "params": params}, family.network, family.examples,
            tmp_path / f"job{each}",
        )  # fmt: skip
        assert recipe.method == "task_arithmetic"
        expected = {"scale": 1.0, "weights": [pytest.approx(1.0)]} if each else {"scale": 1.0}
        assert recipe.params == expected


def test_coefficients_of_each_expert_have_no_more_loss_than_one_scale(tmp_path):
    family = make_family(tmp_path / "family")
    recipe = {**family.recipe, "method": "tangent", "params": {"objective": "l2", "each": True}}
    found = fit(recipe, family.network, family.examples, tmp_path / "job")
    rows = json.loads((tmp_path / "job" / "curve.json").read_text())
    assert [row["scale"] for row in rows] == pytest.approx([i / 20 for i in range(21)])
    notes = json.loads((tmp_path / "job" / "fit.json").read_text())["notes"]
    assert notes["linearised"] and notes["loss"] <= min(row["loss"] for row in rows)
    assert len(found.params["weights"]) == 3
