"""Self Positioning walks from task vector to task vector."""

from __future__ import annotations

import json
import math

import pytest
import torch
from tiny_network import make_family

from mergeline.merging.learning.contract import learned_methods
from mergeline.merging.learning.fitting import fit
from mergeline.merging.learning.methods.self_positioning import Folds, turned


def turn(a: torch.Tensor, b: torch.Tensor, t: float) -> torch.Tensor:
    both = torch.stack([a, b])
    c = turned(
        torch.tensor([1.0, 0.0]).double(), torch.tensor([0.0, 1.0]).double(), torch.tensor(t), both @ both.T
    )
    return c @ both


def test_a_turn_goes_by_the_angle_and_interpolates_the_length():
    a, b = torch.tensor([2.0, 0.0]).double(), torch.tensor([0.0, 4.0]).double()
    for t in (0.0, 0.25, 0.5, 1.0):
        expected = (2 + 2 * t) * torch.tensor([math.cos(t * math.pi / 2), math.sin(t * math.pi / 2)]).double()
        assert torch.allclose(turn(a, b, t), expected, atol=1e-12)


@pytest.mark.parametrize("b", [[4.0, 0.0], [-2.0, 0.0], [0.0, 0.0]])
def test_on_one_line_it_goes_straight(b):
    a, to = torch.tensor([2.0, 0.0]).double(), torch.tensor(b).double()
    assert torch.allclose(turn(a, to, 0.25), 0.75 * a + 0.25 * to)


def test_one_expert_has_a_length_and_experts_are_corners():
    alone = Folds(torch.ones(1, 1).double(), 0.7)
    numbers = alone.start(None, "whole", torch.float64)  # type: ignore[arg-type]
    assert alone.coefficients(None, numbers).tolist() == [[0.7]]  # type: ignore[arg-type]
    three = Folds(torch.eye(3).double(), 1.0)
    for angles, corner in (([0.0, 0.0], [1, 0, 0]), ([1.0, 0.0], [0, 1, 0]), ([0.5, 1.0], [0, 0, 1])):
        numbers = {"angle": torch.tensor(angles).double(), "length": torch.ones(2).double()}
        found = three.coefficients(None, numbers)[:, 0]  # type: ignore[arg-type]
        assert torch.allclose(found, torch.tensor(corner).double(), atol=1e-12)


def test_it_begins_near_the_middle_and_a_short_way_can_be_asked_for(tmp_path):
    three = Folds(torch.eye(3).double(), 1.0)
    start = three.coefficients(None, three.start(None, "whole", torch.float64))  # type: ignore[arg-type]
    assert start[:, 0].tolist() == pytest.approx([0.375**0.5, 0.375**0.5, 0.5])
    sizes = []
    for regularisation in (0.0, 10.0):
        family, out = make_family(tmp_path / "family"), tmp_path / f"job{regularisation}"
        params = {"iterations": 60, "rate": 0.02, "regularisation": regularisation}
        recipe = {**family.recipe, "method": "self_positioning", "params": params}
        fit(recipe, family.network, family.examples, out)
        rows = json.loads((out / "curve.json").read_text())
        assert rows[-1]["loss"] < rows[0]["loss"]
        moved = [family.network.tensors()[n].detach() - base for n, base in family.states["base"].items()]
        sizes.append(sum(float(tensor.square().sum()) for tensor in moved))
    assert sizes[1] < 0.5 * sizes[0]


@pytest.mark.parametrize("objective", ["cosine", "cross_entropy"])
def test_self_positioning_asks_for_labels_where_its_objective_does(objective):
    """As any method with an objective."""
    method = learned_methods()["self_positioning"]
    data = method.data_of(method.resolve({"objective": objective}))
    assert data == {"cosine": "unlabelled", "cross_entropy": "labelled"}[objective]
