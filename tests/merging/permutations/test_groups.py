"""A model in another order of its units computes the same; what was moved is found again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_zoo import build, config_of, run_on, shaken_state

from mergeline.merging.architecture import describe
from mergeline.merging.permutations.groups import (
    Group,
    Order,
    Place,
    Split,
    groups_of,
    random_order,
    reordered,
)
from mergeline.merging.permutations.matching import distance, match_many, match_weights

OPEN_CLIP = {
    "vision_cfg": {"layers": 2, "width": 16, "head_width": 4},
    "text_cfg": {"width": 16, "heads": 4, "layers": 2},
}
# What a folder's configuration says of models whose library has none in the model.
CONFIGS: dict[str, dict[str, Any]] = {
    "open_clip_vit": OPEN_CLIP,
    "timm/vit_tiny_patch16_224": {"architecture": "vit_tiny_patch16_224", "model_args": {"num_heads": 3}},
}
# Which groups move, by the ends of their names.
MODELS = {
    "resnet_hf": {"convolution", "residual"},
    "timm/vit_tiny_patch16_224": {"hidden", "heads", "residual"},
    "vit": {"hidden", "heads", "residual"},
    "clip": {"hidden", "heads", "residual"},
    "open_clip_vit": {"hidden", "heads", "residual"},
    "llama": {"hidden", "heads", "residual"},
    "qwen3": {"hidden", "heads", "residual"},
    "gpt_neox": {"hidden", "heads", "residual"},
    "gpt2": {"hidden", "heads", "residual"},
    "bert": {"hidden", "heads"},
}


def shaken(name: str) -> tuple[Any, dict[str, torch.Tensor], list[Group]]:
    """A model of the zoo with weights that nothing hides, these, and its groups."""
    torch.manual_seed(0)
    model = build(name)
    state = shaken_state(model)
    model.load_state_dict(state)
    shapes = {key: tuple(tensor.shape) for key, tensor in state.items()}
    return model, dict(state), groups_of(describe(shapes, CONFIGS.get(name) or config_of(model)))


SLOW = {
    "torchvision/resnet18": {"conv1", "residual"},
    "torchvision/resnet50": {"conv1", "conv2", "residual"},
}


@pytest.mark.parametrize("name", [*MODELS, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_a_reordered_model_computes_the_same_and_is_found_again(name):
    model, state, groups = shaken(name)
    assert {group.name.rpartition(".")[2] for group in groups} == (MODELS | SLOW)[name]
    with torch.no_grad():
        before = run_on(name, model)
        generator = torch.Generator().manual_seed(1)
        orders = {group.name: random_order(group, generator) for group in groups}
        moved = reordered(state, groups, orders)
        model.load_state_dict(moved)
        assert all(not torch.equal(moved[g.tensors[0]], state[g.tensors[0]]) for g in groups)
        scale = float(before.abs().max())
        torch.testing.assert_close(run_on(name, model) / scale, before / scale, rtol=0, atol=1e-5)
    found = match_weights(state, moved, groups, restarts=4)
    back = reordered(moved, groups, found.orders)
    assert all(torch.equal(back[key], state[key]) for key in state)
    assert distance(back, state) == 0 < distance(moved, state)


@pytest.mark.parametrize(
    ("name", "sizes"), [("llama", [(2, [2])]), ("gpt2", [(4, [4, 4])]), ("gpt_neox", [(4, [])])]
)
def test_heads_keep_what_positions_rotate(name, sizes):
    _, _, groups = shaken(name)
    heads = [group for group in groups if group.name.endswith(".heads")]
    assert [(g.units, [s.size for s in g.splits]) for g in heads] == 2 * sizes


# ------------------------------------------------------------------------------------------ orders


@given(st.integers(1, 5), st.integers(1, 4), st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_orders_follow_one_another_and_are_undone(units, size, seed):
    group = Group(
        "g", units, (Place("a", 0, 0, units),), (Split(size, (Place("b", 1, 2, 3 * units * size),)),)
    )
    generator = torch.Generator().manual_seed(seed)
    first, second = random_order(group, generator), random_order(group, generator)
    state = {"a": torch.rand(units, 2), "b": torch.rand(4, 2 + 3 * units * size)}

    def by(tensors: dict[str, torch.Tensor], order: Order) -> dict[str, torch.Tensor]:
        return reordered(tensors, [group], {"g": order})

    twice, once = by(by(state, first), second), by(state, first.then(second))
    assert all(torch.equal(twice[key], once[key]) for key in state)
    back = by(by(state, first), first.undone())
    assert all(torch.equal(back[key], state[key]) for key in state)
    assert torch.equal(by(state, first)["b"][:, :2], state["b"][:, :2])
    assert first.then(first.undone()).moved == 0


def chain(*widths: int, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for i, (inputs, outputs) in enumerate(zip(widths, widths[1:])):
        found[f"net.{2 * i}.weight"] = torch.randn(outputs, inputs, generator=generator)
        found[f"net.{2 * i}.bias"] = torch.randn(outputs, generator=generator)
    return found


def groups_in(state: dict[str, torch.Tensor]) -> list[Group]:
    return groups_of(describe({key: tuple(tensor.shape) for key, tensor in state.items()}))


@given(st.integers(0, 2**31), st.floats(0, 0.1))
@settings(max_examples=20, deadline=None)
def test_matching_never_makes_models_less_alike(seed, noise):
    a = chain(3, 6, 5, 2, seed=seed)
    groups = groups_in(a)
    generator = torch.Generator().manual_seed(seed)
    moved = reordered(a, groups, {g.name: random_order(g, generator) for g in groups})
    b = {key: t + noise * torch.randn(t.shape, generator=generator) for key, t in moved.items()}
    found = match_weights(a, b, groups, seed=seed)
    assert distance(a, reordered(b, groups, found.orders)) <= distance(a, b) + 1e-5
    again = match_weights(a, b, groups, seed=seed)
    assert all(
        torch.equal(x, y) for k in found.orders for x, y in zip(found.orders[k].all, again.orders[k].all)
    )


def test_more_descents_find_no_worse_orders():
    a, b = chain(8, 24, 24, 24, 24, 8), chain(8, 24, 24, 24, 24, 8, seed=1)
    groups = groups_in(a)
    found = [match_weights(a, b, groups, restarts=restarts).similarity for restarts in (1, 5, 20)]
    assert found == sorted(found) and found[0] < found[-1]


def test_many_models_are_told_in_the_order_of_the_first():
    a = chain(5, 9, 7, 3)
    groups = groups_in(a)
    generator = torch.Generator().manual_seed(3)
    moved = [reordered(a, groups, {g.name: random_order(g, generator) for g in groups}) for _ in range(3)]
    noisy = [
        {k: t + 0.01 * torch.randn(t.shape, generator=generator) for k, t in m.items()} for m in (a, *moved)
    ]
    found = match_many(noisy, groups)
    assert all(order.moved == 0 for order in found[0].orders.values())
    for state, match in zip(noisy[1:], found[1:]):
        assert distance(reordered(state, groups, match.orders), a) < 0.5
        assert distance(state, a) > 1
