"""Task vectors cut to low rank in a weighted norm, beside the closed form with inverses written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from checkpoints import random_state, refused
from torch import Tensor

from mergeline.merging import merge_state_dicts

NAME = "layers.0.weight"


def cut(tau_MN: Tensor, k: int, root_NN: Tensor) -> Tensor:
    """argmin over rank k of |(tau - cut) root|, by SVD and the inverse."""
    u, s, vt = torch.linalg.svd(tau_MN @ root_NN, full_matrices=False)
    return (u[:, :k] * s[:k]) @ vt[:k] @ torch.linalg.inv(root_NN)


def family(
    shape: tuple[int, int], dtype: torch.dtype = torch.float64
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    base = random_state(0, dtype, {NAME: shape})
    return base, {f"e{t}": random_state(t + 1, dtype, {NAME: shape}) for t in range(2)}


def merged(params: dict[str, Any], statistics: dict[str, Any], shape: tuple[int, int] = (6, 9)) -> Tensor:
    base, experts = family(shape)
    given = {"params": {"scale": 1.0, **params}, "statistics": statistics}
    found = merge_state_dicts("weighted_truncate", experts, base, **given)
    return found[NAME] - base[NAME]


@pytest.mark.parametrize("shape", [(6, 9), (9, 6)])
def test_inputs_weigh_as_their_gram_matrix_says(shape):
    base, experts = family(shape)
    inputs = [torch.randn(40, shape[1], dtype=torch.float64) * torch.rand(shape[1]) for _ in experts]
    grams = [x.T @ x for x in inputs]
    expected = sum(
        cut(state[NAME] - base[NAME], 2, torch.linalg.cholesky(gram))
        for state, gram in zip(experts.values(), grams)
    )
    found = merged({"rank": 2 / 6}, {"gram": [{NAME: gram} for gram in grams]}, shape)
    assert torch.allclose(found, expected, atol=1e-9)


@pytest.mark.parametrize("side", ["in", "out"])
def test_fisher_information_weighs_inputs_or_outputs(side):
    base, experts = family((6, 9))
    fisher = [torch.rand(6, 9, dtype=torch.float64) + 0.01 for _ in experts]
    expected = torch.zeros(6, 9, dtype=torch.float64)
    for state, f in zip(experts.values(), fisher):
        tau = state[NAME] - base[NAME]
        if side == "in":
            expected += cut(tau, 2, f.mean(0).sqrt().diag())
        else:
            expected += cut(tau.T, 2, f.mean(1).sqrt().diag()).T
    params = {"rank": 2 / 6, "weights": "fisher", "side": side}
    assert torch.allclose(merged(params, {"fisher": [{NAME: f} for f in fisher]}), expected, atol=1e-9)


def test_inputs_that_never_occur_cost_nothing():
    """The example of the two columns: the one that counts is kept; a weight of zero needs no inverse."""
    base = {NAME: torch.zeros(2, 2, dtype=torch.float64)}
    statistics = {"gram": [{NAME: torch.diag(torch.tensor([0.0, 100.0], dtype=torch.float64))}]}
    params = {"rank": 0.5, "scale": 1.0}
    expert = {NAME: torch.eye(2, dtype=torch.float64)}
    found = merge_state_dicts("weighted_truncate", {"a": expert}, base, params=params, statistics=statistics)
    assert torch.allclose(found[NAME], torch.diag(torch.tensor([0.0, 1.0], dtype=torch.float64)))


def test_equal_weights_are_those_of_truncate_and_energy_keeps_as_much():
    base, experts = family((6, 9))
    grams = {"gram": [{NAME: torch.eye(9, dtype=torch.float64)} for _ in experts]}
    for params in ({"rank": 0.4}, {"energy": 0.7}):
        plain = (
            merge_state_dicts("truncate", experts, base, params={"scale": 1.0, **params})[NAME] - base[NAME]
        )
        assert torch.allclose(merged(params, grams), plain, atol=1e-9)


def test_gram_matrices_are_of_inputs_alone():
    with refused("side: Gram matrices are of inputs"):
        merged({"side": "out"}, {"gram": [{NAME: torch.eye(9)}, {NAME: torch.eye(9)}]})
