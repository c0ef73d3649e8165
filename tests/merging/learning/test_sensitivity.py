"""Weights of outputs: what features feel, and the least squares that they weigh."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from checkpoints import refused
from learned_families import examples_of, learned_family
from safetensors.torch import load_file

from mergeline.merging.learning.fitting import fit
from mergeline.merging.learning.least_squares import metric_of, minimum
from mergeline.merging.learning.sensitivity import _between_classes, sensitivities, weighted_minimum

METHOD = "progressive_least_squares"


def systems(tasks: int, outputs: int, inputs: int) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    torch.manual_seed(0)
    found = []
    for _ in range(tasks):
        x, y, h = torch.randn(9, inputs), torch.randn(9, outputs), torch.randn(outputs, outputs)
        found.append(
            ((x.T @ x).double() / 9, (y.T @ x).double() / 9, h @ h.T / outputs + 0.1 * torch.eye(outputs))
        )
    return found


def test_a_weighted_minimum_is_where_the_slope_is_none():
    parts, start, ridge = systems(3, 4, 5), torch.randn(4, 5).double(), 0.7
    metric = metric_of(iter([torch.randn(4, 5).double()]), 5, 0.3)
    found = weighted_minimum(parts, start, ridge, metric, steps=100, near=1e-7)
    found = found.requires_grad_(True)
    size, h_mean = (
        sum(g for g, *_ in parts).diagonal().mean(),
        sum(h for *_, h in parts).double() / len(parts),
    )
    loss = sum((h.double() @ (found @ g - 2 * c) * found).sum() for g, c, h in parts)
    loss = loss + ridge * size * (h_mean @ (found - start) @ metric * (found - start)).sum()
    (slope,) = torch.autograd.grad(loss, found)
    assert float(slope.abs().max()) < 1e-4


def test_the_same_weights_for_all_tasks_weigh_nothing():
    parts = systems(3, 4, 5)
    alike = [(g, c, parts[0][2]) for g, c, _ in parts]
    start, one = torch.zeros(4, 5).double(), torch.eye(5).double()
    gram, cross = sum(g for g, *_ in parts), sum(c for _, c, _ in parts)
    expected = minimum(gram, cross, start, 0.5, one)
    torch.testing.assert_close(weighted_minimum(alike, start, 0.5, one), expected, rtol=1e-4, atol=1e-5)


def test_directions_between_classes_lead_from_the_likeliest_to_another():
    logits = torch.tensor([[4.0, 1.0, 0.0], [0.0, 30.0, 29.0]])
    drawn = [_between_classes(logits, torch.Generator().manual_seed(seed)) for seed in range(50)]
    for direction in drawn:
        assert torch.equal(direction.sum(-1), torch.zeros(2)) and direction.abs().max() <= 1
        assert (direction[:, [1, 2]][0] <= 0).all() and (direction[:, [0, 2]][1] <= 0).all()
    assert {int(direction[0].argmin()) for direction in drawn if direction[0].any()} == {1, 2}


def test_features_move_as_sensitivities_say(tmp_path):
    """A step of the last map's bias moves the first token's output alone, as far as features see."""
    family = learned_family("open_clip", tmp_path)
    images = [{"task": "e0", "images": family.inputs(0, 6)}]
    family.network.load(load_file(tmp_path / "e0/model.safetensors"))
    found = sensitivities(family.network, images, "e0", "features", draws=400)
    name = max(n for n in found if n.endswith("mlp.c_proj.weight"))
    own = family.network.tensors()
    assert not any(tensor.requires_grad for tensor in own.values())
    bias = own[name.removesuffix("weight") + "bias"]
    felt, moved = [], []
    h = found[name] - 0.1 * torch.eye(len(found[name]))  # without the floor
    with torch.no_grad():
        before = torch.nn.functional.normalize(family.network.features(images[0]), dim=-1)
        for step in torch.linalg.eigh(h).eigenvectors.T[[-1, -2, -3]]:
            bias += 1e-3 * step
            after = torch.nn.functional.normalize(family.network.features(images[0]), dim=-1)
            bias -= 1e-3 * step
            felt.append(float(step @ h @ step))
            moved.append(float((after - before).square().sum()) / 1e-6)
    for a, b in zip(felt[1:], moved[1:]):
        assert a / felt[0] == pytest.approx(b / moved[0], rel=0.15)


def test_with_one_expert_the_solution_is_the_expert_whatever_is_felt(tmp_path):
    family = learned_family("open_clip", tmp_path, experts=1)
    recipe = family.recipe(METHOD, inner="average", shifts=0, errors="features", draws=2)
    fit(recipe, family.network, family.examples(40), tmp_path / "fit")
    expert = load_file(tmp_path / "e0/model.safetensors")
    for name, value in load_file(tmp_path / "fit/solved.safetensors").items():
        torch.testing.assert_close(value, expert[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["open_clip", "llama"])
def test_what_is_felt_changes_the_maps_of_two_experts_and_repeats(kind, tmp_path):
    family, solved = learned_family(kind, tmp_path), []
    for number, errors in enumerate(("alike", "features", "features")):
        recipe = family.recipe(METHOD, inner="average", shifts=0, ridge=0.1, errors=errors)
        fit(recipe, family.network, family.examples(20), tmp_path / f"{number}")
        solved.append(load_file(tmp_path / f"{number}/solved.safetensors"))
        notes = json.loads((tmp_path / f"{number}/fit.json").read_text())["notes"]
        convolutions = [n for n in notes.get("unweighted", []) if not n.endswith("conv1.weight")]
        assert ("unweighted" in notes) == (errors != "alike") and not convolutions
    plain, first, second = solved
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert plain.keys() == first.keys()
    changed = [name for name in plain if not torch.equal(plain[name], first[name])]
    assert len(changed) > len(plain) / 4


def test_classes_are_felt_through_the_heads_and_asked_of_models_that_have_some(tmp_path):
    family = learned_family("open_clip", tmp_path)
    recipe = family.recipe(METHOD, inner="average", shifts=0, ridge=0.1, errors="classes")
    with refused("features, but no logits"):
        fit(recipe, family.network, family.examples(20), tmp_path / "none")
    assert not (tmp_path / "none/fit.json").exists()
    images = [{"task": "e0", "images": family.inputs(0, 20)}]
    blind = torch.zeros(family.network.features(images[0]).shape[1], 3)
    sighted = blind.clone()
    sighted[0] = torch.tensor([1.0, -1.0, 0.0])
    felt = {}
    for name, head in (("blind", blind), ("sighted", sighted)):
        network = replace(family.network, score=lambda features, task, head=head: features @ head)
        felt[name] = sensitivities(network, images, "e0", "classes", draws=4)
    assert not felt["blind"]
    projection = felt["sighted"]["visual.proj"]  # whose first output alone is seen
    assert float(projection[0, 0]) == pytest.approx(len(projection) + 0.1, rel=1e-4)
    numbers = replace(network, score=lambda features, task: features[:, :1], numbers=frozenset({"e0"}))
    only = sensitivities(numbers, images, "e0", "classes", draws=1)["visual.proj"]
    assert float(only[0, 0]) == pytest.approx(len(only) + 0.1, rel=1e-4)


@pytest.mark.parametrize("errors", ["features", "classes"])
def test_examples_that_are_no_numbers_are_refused(errors, tmp_path):
    family = learned_family("open_clip", tmp_path)
    network = replace(family.network, score=lambda features, task: features)
    drawn = {name: family.inputs(t, 10) for t, name in enumerate(family.experts)}
    drawn["e1"][3, 0, 5, 5] = float("nan")
    with refused("NaN or Inf"):
        fit(
            family.recipe(METHOD, inner="average", errors=errors),
            network,
            examples_of(drawn),
            tmp_path / "fit",
        )
    assert not (tmp_path / "fit/fit.json").exists()
