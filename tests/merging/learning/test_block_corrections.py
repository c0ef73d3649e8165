"""Corrections after every block: the steps of a loop written out, on a model of three blocks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from mergeline.merging.errors import UserError
from mergeline.merging.learning.block_corrections import _blocks, _fitted, _means
from mergeline.merging.learning.corrections import batches, beginning
from mergeline.merging.learning.network import Network

D, N, RANK, STEPS = 6, 20, 3, 5


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(4, D)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(D, D), nn.Tanh()) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x)
        return x[:, 0]


@pytest.fixture
def job() -> Any:
    torch.manual_seed(0)
    model = Model().eval().requires_grad_(False)
    network = Network(model, lambda module, batch: module(batch["x"]))
    return SimpleNamespace(network=network, recipe=SimpleNamespace(seed=0))


def test_each_step_goes_down_the_sum_over_blocks_of_the_distance_of_token_means(job):
    model, x = job.network.module, torch.randn(N, 5, 4)
    target = torch.randn(3, N, D)
    names = _blocks(model)
    assert names == ["layers.0", "layers.1", "layers.2"]
    found = _fitted(job, names, {"x": x}, target, RANK, 1e-2, STEPS, "digits")

    seed = (0, "digits")
    pairs = [[f.detach().clone().requires_grad_() for f in beginning(D, RANK, (*seed, n))] for n in names]
    optimiser = torch.optim.Adam([f for pair in pairs for f in pair], lr=1e-2)
    for which in batches(N, 2 * STEPS, seed):
        loss, h = torch.zeros(()), model.stem(x[which])
        for layer, (down, up), y in zip(model.layers, pairs, target[:, which]):
            h = layer(h)
            h = h - torch.relu(h @ down.T) @ up.T
            loss = loss + nn.functional.l1_loss(h.mean(1), y)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    for name, (down, up) in zip(names, pairs):
        torch.testing.assert_close(found[f"{name}/down"], down.detach())
        torch.testing.assert_close(found[f"{name}/up"], up.detach())
    assert all(tensor.any() for tensor in found.values())


def test_the_outputs_of_blocks_are_seen_and_the_model_is_left_as_it_was(job):
    model, x = job.network.module, torch.randn(N, 5, 4)
    before = model(x)
    means = _means(job, _blocks(model), {"x": x})
    torch.testing.assert_close(means[0], model.layers[0](model.stem(x)).mean(1))
    assert torch.equal(model(x), before)


def test_a_model_without_blocks_or_tokens_is_refused(job):
    with pytest.raises(UserError, match="no blocks one after the other"):
        _blocks(nn.Sequential(nn.Linear(2, 2), nn.Tanh()))
    flat = Network(job.network.module, lambda module, batch: module.layers[0](batch["x"]))
    with pytest.raises(UserError, match="gives no tokens"):
        _means(SimpleNamespace(network=flat), ["layers.0"], {"x": torch.randn(2, D)})
