"""Derivatives by what is fitted, read off the gradients of weights, are those of autograd through the merge."""

from __future__ import annotations

from typing import Any, Callable

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_network import Family, make_family
from torch import Tensor
from torch.func import functional_call

from mergeline.merging import merge
from mergeline.merging.algebra import draws
from mergeline.merging.learning import task_vectors
from mergeline.merging.learning.directions import Directions, Inputs
from mergeline.merging.learning.spaces import (
    Bits,
    Coefficients,
    Masks,
    MetaMasks,
    Numbers,
    Space,
    fitted_tensors,
    merged_by,
)
from mergeline.merging.recipes.recipe import Recipe

State = dict[str, Tensor]
MATRICES = [f"layers.{i}.attn.weight" for i in range(3)]


@pytest.fixture
def family(tmp_path) -> Family:
    return make_family(tmp_path / "family")


def entropy(network_output: Callable[[str, Tensor], Tensor], family: Family) -> Tensor:
    """Summed over tasks, of all examples."""
    total = torch.zeros((), dtype=torch.float64)
    for task in family.examples.batches:
        for batch in family.examples.of(task):
            logits = family.network.logits(network_output(task, batch["inputs"]), task)
            total = total - (logits.softmax(1) * logits.log_softmax(1)).sum(1).mean()
    return total


def through_the_merge(family: Family, merged: State) -> Tensor:
    return entropy(lambda task, x: functional_call(family.network.module, merged, (x,)), family)


def streamed(family: Family, space: Space, step: int = 0) -> State:
    """The derivatives by the space's numbers: backward a task at a time, then inner products."""
    network = family.network
    space.put(step)
    for tensor in network.tensors().values():
        tensor.grad = None
    for task in family.examples.batches:
        loss = torch.zeros((), dtype=torch.float64)
        for batch in family.examples.of(task):
            logits = network.logits(network.features(batch), task)
            loss = loss - (logits.softmax(1) * logits.log_softmax(1)).sum(1).mean()
        loss.backward()
    space.pull(step)
    return {name: number.grad for name, number in space.numbers.items()}


def made(family: Family, tmp_path, params: dict[str, Any], form: Any) -> Coefficients:
    inputs = Inputs(Recipe.of(family.recipe))
    fitted_tensors(family.network, inputs.names)
    directions = Directions(inputs, family.network, tmp_path / "job", params)
    return Coefficients(directions, family.network, form, Recipe.of(family.recipe))


def scattered(space: Space) -> None:
    """Numbers that differ from each other, some outside of [0, 1]."""
    generator = torch.Generator().manual_seed(1)
    for number in space.numbers.values():
        noise = torch.randn(number.shape, generator=generator, dtype=number.dtype)
        number.data.add_(0.5 * noise)


def low_rank(matrix: Tensor, k: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u[:, :k], s[:k], vh[:k].T


def orthogonal(matrix: Tensor) -> Tensor:
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u @ vh


def directions_of(family: Family, name: str, kind: str) -> tuple[Tensor, list[Any]]:
    """The origin, and the directions: tensors, or triplets."""
    base, experts = family.states["base"][name], [family.states[n][name] for n in "abc"]
    mean = torch.stack(experts).mean(0)
    if kind == "task_vectors":
        return base, [e - base for e in experts]
    if kind == "ties":
        taus = {
            n: [family.states[n][k] - family.states["base"][k] for k in family.states["base"]] for n in "abc"
        }
        flat = torch.stack([torch.cat([t.reshape(-1) for t in taus[n]]) for n in "abc"])
        d = flat.shape[1]
        least = flat.abs().kthvalue(d - int(d * 0.2), dim=1, keepdim=True).values
        trimmed = torch.where(flat.abs() >= least, flat, 0.0)
        sign = trimmed.sum(0).sign()
        majority = sign.sum().sign()
        sign[sign == 0] = majority
        agreeing = torch.where(trimmed * sign > 0, trimmed, 0.0)
        place = list(family.states["base"]).index(name)
        start = sum(v.numel() for v in list(family.states["base"].values())[:place])
        return base, list(agreeing[:, start : start + base.numel()].reshape(3, *base.shape))
    if name not in MATRICES:
        return (base, [e - base for e in experts]) if kind == "tsv" else (mean, [e - mean for e in experts])
    if kind == "cart":
        k = max(1, int(0.5 * min(base.shape)))
        return mean, [low_rank(e - mean, k) for e in experts]
    k = min(base.shape) // 3
    found = [low_rank(e - base, k) for e in experts]
    u, v = (orthogonal(torch.cat([part[i] for part in found], 1)) for i in (0, 2))
    return base, [(u[:, k * t : k * t + k], found[t][1], v[:, k * t : k * t + k]) for t in range(3)]


def expanded(direction: Any, numbers: Tensor, name: str, over: str) -> Tensor:
    """One direction times its numbers, differentiable in them."""
    if over == "singular" and isinstance(direction, tuple):
        u, s, v = direction
        return (u * (s * numbers[: len(s)])) @ v.T
    whole = (direction[0] * direction[1]) @ direction[2].T if isinstance(direction, tuple) else direction
    if over == "chunks":
        chunks = torch.chunk(whole.reshape(-1), len(numbers))
        return torch.cat([c * x for c, x in zip(chunks, numbers)]).reshape(whole.shape)
    if over == "partition":
        u = draws.uniform(0, "partition", name, 0, whole.numel())
        return whole * numbers[(u * len(numbers)).long()].reshape(whole.shape)
    return whole * numbers[0]


SQUASHED: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "clamp": lambda x: x.clamp(0, 1),
    "sigmoid": torch.sigmoid,
    "softmax": lambda x: x.softmax(0),
}


@pytest.mark.parametrize(
    ("kind", "over", "count", "shared", "squash"),
    [
        ("task_vectors", "whole", 1, True, "none"),
        ("task_vectors", "whole", 1, False, "clamp"),
        ("task_vectors", "whole", 1, True, "softmax"),
        ("task_vectors", "chunks", 10, False, "sigmoid"),
        ("task_vectors", "partition", 3, False, "none"),
        ("ties", "whole", 1, False, "clamp"),
        ("cart", "whole", 1, False, "none"),
        ("cart", "singular", 1, False, "none"),
        ("tsv", "whole", 1, False, "none"),
        ("tsv", "singular", 1, False, "clamp"),
    ],
)
def test_derivatives_by_coefficients_are_those_of_autograd(
    family, tmp_path, kind, over, count, shared, squash
):
    form = Numbers(lambda piece, d: 0.4, shared=shared, squash=squash, count=lambda name: count)
    params = {"directions": kind, "over": over} | ({"rank": 0.5} if kind == "cart" else {})
    space = made(family, tmp_path, params, form)
    scattered(space)
    found = streamed(family, space)

    leaves = {name: number.detach().clone().requires_grad_() for name, number in space.numbers.items()}
    merged = {}
    for name in family.states["base"]:
        origin, directions = directions_of(family, name, kind)
        numbers = SQUASHED[squash](leaves["all" if shared else name])
        merged[name] = origin + sum(expanded(d, c, name, over) for d, c in zip(directions, numbers))
        assert torch.allclose(family.network.tensors()[name], merged[name], rtol=0, atol=1e-12), name
    through_the_merge(family, merged).backward()
    norm = torch.cat([leaf.grad.reshape(-1) for leaf in leaves.values()]).norm()
    assert norm > 1e-3
    for name, leaf in leaves.items():
        assert (found[name] - leaf.grad).abs().max() <= 1e-12 * max(1, norm), name
    outside = [leaf.grad[(leaf < 0) | (leaf > 1)] for leaf in leaves.values()]
    if squash == "clamp":
        assert torch.cat(outside).numel() and not torch.cat(outside).any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("block", "small"), [(7, 0), (9, 8), (1 << 16, 0), (1 << 16, 1 << 13)])
def test_task_vectors_in_blocks_and_kept_ones_give_what_whole_ones_do(
    block, small, dtype, tmp_path, monkeypatch
):
    monkeypatch.setattr(task_vectors, "_BLOCK", block)
    monkeypatch.setattr(task_vectors, "_SMALL", small)
    family = make_family(tmp_path / "family", dtype=dtype)
    inputs = Inputs(Recipe.of(family.recipe))
    directions = Directions(inputs, family.network, tmp_path / "job", {})
    generator, tolerance = torch.Generator().manual_seed(2), 1e-12 if dtype == torch.float64 else 1e-5
    own = family.network.tensors()
    for number, piece in enumerate(directions.pieces):
        base, *taus = (family.states[name][piece.tensor] for name in ("base", *"abc"))
        taus = [expert - base for expert in taus]
        c_D1 = torch.randn(3, 1, generator=generator, dtype=dtype)
        gradient, mask = torch.randn(2, *base.shape, generator=generator, dtype=dtype)
        update = sum(c * tau for c, tau in zip(c_D1, taus))
        for multiplier, factor in ((None, 1.0), (mask, mask)):
            for _ in range(2):  # the first time, what is read is looked at, too
                with torch.no_grad():
                    directions.put(number, c_D1, own[piece.tensor], multiplier)
                found_D1 = directions.slopes(number, 1, gradient, multiplier)
                expected_D = torch.stack([(factor * gradient * tau).sum() for tau in taus])
                assert torch.allclose(own[piece.tensor], base + factor * update, rtol=0, atol=tolerance)
                assert torch.allclose(found_D1[:, 0], expected_D, rtol=0, atol=30 * tolerance)


def test_derivatives_by_gates_are_those_of_straight_through(family, tmp_path):
    form = Bits(1.7, lambda side: 2)
    space = made(family, tmp_path, {"directions": "cart", "over": "singular"}, form)
    scattered(space)
    found = streamed(family, space)

    leaves = {name: number.detach().clone().requires_grad_() for name, number in space.numbers.items()}
    merged = {}
    for name in family.states["base"]:
        experts = [family.states[n][name] for n in "abc"]
        mean = torch.stack(experts).mean(0)
        merged[name] = mean
        for t, expert in enumerate(experts):
            weight, tau = leaves[f"weight/{name}"][t], expert - mean
            if name in MATRICES:
                u, s, vh = torch.linalg.svd(tau, full_matrices=False)
                soft = (leaves[f"bits/{name}"][t] / 10).sigmoid()
                gate = (soft > 0.5).double() + soft - soft.detach()
                tau = (u * (gate * s)) @ vh
            merged[name] = merged[name] + weight * tau
        assert torch.allclose(family.network.tensors()[name], merged[name], rtol=0, atol=1e-12), name
    through_the_merge(family, merged).backward()
    for name, leaf in leaves.items():
        assert (found[name] - leaf.grad).abs().max() <= 1e-12, name
    assert all(found[f"bits/{name}"].abs().max() > 1e-6 for name in MATRICES)


def test_derivatives_by_masks_go_through_their_means(family, tmp_path):
    recipe = Recipe.of(family.recipe)
    inputs = Inputs(recipe)
    fitted_tensors(family.network, inputs.names)
    directions = Directions(inputs, family.network, tmp_path / "job", {"initial": 0.3}, together=[0.3] * 3)
    space = Masks(directions, family.network, recipe, {"initial": 0.3}, seed=5)
    scattered(space)
    found = streamed(family, space)

    leaves = {name: number.detach().clone().requires_grad_() for name, number in space.numbers.items()}
    merged = {}
    for name, base in family.states["base"].items():
        u = draws.uniform(5, "mask 0", name, 0, base.numel()).double().reshape(base.shape)
        mask = ((u.logit() + leaves[name]) / 0.5).sigmoid()
        taus = sum(0.3 * (family.states[n][name] - base) for n in "abc")
        merged[name] = base + taus * mask / mask.mean()
    through_the_merge(family, merged).backward()
    for name, leaf in leaves.items():
        assert (found[name] - leaf.grad).abs().max() <= 1e-12, name


@pytest.mark.parametrize("step", [4, 5], ids=["coefficients", "mask"])
@pytest.mark.parametrize("shared", [True, False])
def test_derivatives_under_a_mask_move_what_the_step_is_of(family, tmp_path, step, shared):
    """Of an even step the coefficients, which begin anew; of an odd one the mask, around what they have become."""
    inputs = Inputs(Recipe.of(family.recipe))
    fitted_tensors(family.network, inputs.names)
    directions = Directions(inputs, family.network, tmp_path / "job", {"directions": "task_vectors"})
    form = Numbers(lambda piece, d: 0.3, shared=shared)
    space = MetaMasks(directions, family.network, form, 0.0, 0.5, seed=5)
    scattered(space)
    found = streamed(family, space, step)

    leaves = {name: number.detach().clone().requires_grad_() for name, number in space.numbers.items()}
    merged = {}
    for name, base in family.states["base"].items():
        u = draws.uniform(5, "mask 2", name, 0, base.numel()).double().reshape(base.shape)
        mask = ((u.logit() + leaves[f"mask/{name}"]) / 0.5).sigmoid()
        weights = leaves["coefficients/all" if shared else f"coefficients/{name}"]
        taus = sum(w * (family.states[n][name] - base) for w, n in zip(weights, "abc"))
        merged[name] = base + taus * mask / mask.mean()
    through_the_merge(family, merged).backward()
    of_coefficients = step % 2 == 0
    for name, leaf in leaves.items():
        if name.startswith("coefficients/") == of_coefficients:
            assert leaf.grad.abs().max() > 1e-6, name
            assert (found[name] - leaf.grad).abs().max() <= 1e-12, name
        else:
            assert found[name] is None, name
        if of_coefficients and name.startswith("coefficients/"):
            assert (leaf == 0.3).all(), name


def test_derivatives_by_coefficients_under_a_finished_mask_are_those_of_autograd(family, tmp_path):
    inputs = Inputs(Recipe.of(family.recipe))
    fitted_tensors(family.network, inputs.names)
    directions = Directions(inputs, family.network, tmp_path / "job", {"directions": "task_vectors"})
    generator = torch.Generator().manual_seed(2)
    masks = {
        name: torch.rand(base.shape, generator=generator).double()
        for name, base in family.states["base"].items()
    }
    space = Coefficients(
        directions, family.network, Numbers(lambda piece, d: 0.4), Recipe.of(family.recipe), multipliers=masks
    )
    scattered(space)
    found = streamed(family, space)

    leaves = {name: number.detach().clone().requires_grad_() for name, number in space.numbers.items()}
    merged = {}
    for name, base in family.states["base"].items():
        taus = sum(w * (family.states[n][name] - base) for w, n in zip(leaves[name], "abc"))
        merged[name] = base + taus * masks[name]
    through_the_merge(family, merged).backward()
    for name, leaf in leaves.items():
        assert (found[name] - leaf.grad).abs().max() <= 1e-12, name


@pytest.mark.parametrize(
    ("params", "form"),
    [
        ({}, Numbers(lambda piece, d: 0.4, squash="clamp")),
        ({"over": "chunks"}, Numbers(lambda piece, d: 0.4, count=lambda name: 5)),
        ({"over": "partition"}, Numbers(lambda piece, d: 0.4, count=lambda name: 5)),
        ({"directions": "ties"}, Numbers(lambda piece, d: 0.4)),
        ({"directions": "cart_wudi", "rank": 0.3}, Numbers(lambda piece, d: 0.4)),
        ({"directions": "cart_wudi", "rank": 0.3, "over": "singular"}, Numbers(lambda piece, d: 0.4)),
        ({"directions": "tsv", "over": "singular"}, Numbers(lambda piece, d: 0.4)),
        ({"directions": "cart", "over": "singular"}, Bits(1.7, lambda side: 2)),
    ],
    ids=["clamped", "chunks", "partition", "ties", "cart_wudi", "cart_wudi-singular", "tsv", "gates"],
)
def test_what_was_fitted_is_what_the_engine_merges(family, tmp_path, params, form):
    space = made(family, tmp_path, params, form)
    scattered(space)
    space.put(0)
    fitted = {name: tensor.detach().clone() for name, tensor in family.network.tensors().items()}
    merge(space.recipe(tmp_path / "job"), tmp_path / "out.safetensors")
    merged = load_file(tmp_path / "out.safetensors")
    for name, tensor in fitted.items():
        assert torch.allclose(merged[name], tensor, rtol=0, atol=1e-6), name
    assert any((tensor - family.states["base"][name]).abs().max() > 0.01 for name, tensor in fitted.items())


def test_masks_without_noise_are_what_the_engine_merges(family, tmp_path):
    recipe = Recipe.of(family.recipe)
    inputs = Inputs(recipe)
    directions = Directions(inputs, family.network, tmp_path / "job", {"initial": 0.3}, together=[0.3] * 3)
    space = Masks(directions, family.network, recipe, {"initial": 0.3})
    scattered(space)
    space.put(None)
    merge(space.recipe(tmp_path / "job"), tmp_path / "out.safetensors")
    merged = load_file(tmp_path / "out.safetensors")
    for name, tensor in family.network.tensors().items():
        assert torch.allclose(merged[name], tensor, rtol=0, atol=1e-6), name


def test_a_file_of_other_directions_is_refused(family, tmp_path):
    from mergeline.merging.errors import UserError

    space = made(family, tmp_path, {}, Numbers(lambda piece, d: 0.4))
    recipe = space.recipe(tmp_path / "job")
    fewer = {name: path for name, path in recipe.experts.items() if name != "c"}
    other = merged_by(
        recipe.model_copy(update={"experts": fewer}), recipe.method, recipe.params, recipe.statistics
    )
    with pytest.raises(UserError, match="3, 1.*2 directions"):
        merge(other, tmp_path / "out.safetensors")


def test_what_is_not_fitted_is_what_the_merge_has(family, tmp_path):
    """BatchNorm's running statistics are averaged, and what is kept of one expert is kept, while a fit runs, too."""
    norms = {}
    for number, (name, state) in enumerate(family.states.items()):
        bn = {
            "bn.running_mean": torch.full((3,), float(number)),
            "bn.running_var": torch.full((3,), 2.0 + number),
        }
        norms[name] = {**state, **{key: value.double() for key, value in bn.items()}}
        save_file(norms[name], tmp_path / f"{name}.safetensors")
    module = family.network.module
    module.bn = torch.nn.BatchNorm1d(3, affine=False, track_running_stats=True).double().eval()
    files = {name: tmp_path / f"{name}.safetensors" for name in norms}
    recipe = Recipe.of(
        {"method": "average", "base": files.pop("base"), "experts": files, "keep": {"gain": "b"}}
    )
    inputs = Inputs(recipe)
    assert sorted(inputs.names) == sorted(name for name in family.states["base"] if name != "gain")
    inputs.load_start(family.network)
    fitted_tensors(family.network, inputs.names)
    directions = Directions(inputs, family.network, tmp_path / "job", {})
    space = Coefficients(directions, family.network, Numbers(lambda piece, d: 0.4), recipe)
    space.put(None)
    merge(space.recipe(tmp_path), tmp_path / "out.safetensors")
    merged = load_file(tmp_path / "out.safetensors")
    assert torch.equal(merged["bn.running_mean"], torch.full((3,), 2.0, dtype=torch.float64))
    assert torch.equal(merged["gain"], norms["b"]["gain"])
    for name, tensor in family.network.tensors().items():
        if name in merged:
            assert torch.allclose(merged[name].double(), tensor.double(), rtol=0, atol=1e-6), name
