"""Corrections of features: the closed form is the solver's, and Representation Surgery is its official code's."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from mergeline.merging.errors import UserError
from mergeline.merging.learning.corrections import batches, beginning, linear, surgery

N, D = 40, 6


@pytest.fixture
def features() -> tuple[torch.Tensor, torch.Tensor]:
    """Of a merge and of an expert, (N, D)."""
    draws = torch.Generator().manual_seed(0)
    merged = torch.randn(N, D, generator=draws)
    return merged, merged @ torch.randn(D, D, generator=draws) + torch.randn(N, D, generator=draws)


@pytest.mark.parametrize("ridge", [1e-3, 0.05, 1.0])
def test_the_linear_adapter_is_what_a_least_squares_solver_finds(features, ridge):
    merged, expert = (x.double() for x in features)
    x = torch.cat([merged, torch.ones(N, 1)], 1)
    weight = math.sqrt(ridge * x.square().mean(0).mean() * N)
    rows = torch.cat([x, weight * torch.eye(D + 1, dtype=torch.float64)])
    targets = torch.cat([expert - merged, torch.zeros(D + 1, D, dtype=torch.float64)])
    solved = torch.linalg.lstsq(rows, targets).solution
    found = linear(*features, ridge)
    torch.testing.assert_close(found["matrix"], solved[:-1].T, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found["offset"], solved[-1], rtol=1e-5, atol=1e-6)


def test_an_affine_difference_is_undone(features):
    merged, _ = features
    matrix, offset = 0.1 * torch.randn(D, D), torch.randn(D)
    found = linear(merged, merged @ matrix.T + offset + merged, 1e-9)
    torch.testing.assert_close(found["matrix"].float(), matrix, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found["offset"].float(), offset, rtol=1e-4, atol=1e-4)


class Official(nn.Module):
    """The module of one task in EnnengYang/RepresentationSurgery, src/main_surgery: two linear layers without bias."""

    def __init__(self, down: torch.Tensor):
        super().__init__()
        self.down, self.up = nn.Linear(D, len(down), bias=False), nn.Linear(len(down), D, bias=False)
        self.non_linear = nn.ReLU()
        with torch.no_grad():
            self.down.weight.copy_(down)
            self.up.weight.zero_()

    def forward(self, feature: torch.Tensor) -> torch.Tensor:
        return feature - self.up(self.non_linear(self.down(feature)))


def test_surgery_begins_as_kaimings_rule_says():
    down, up = beginning(D, 16, (0, "digits"))
    expected = torch.empty(16, D)
    same = torch.Generator()
    same.set_state(_start_state())
    nn.init.kaiming_uniform_(expected, a=math.sqrt(5), generator=same)
    assert torch.equal(down, expected) and down.shape == (16, D)
    assert up.shape == (D, 16) and not up.any()


def _start_state() -> torch.Tensor:
    from mergeline.merging.learning.corrections import _generator

    return _generator(0, "digits", "start").get_state()


def test_surgery_takes_the_steps_of_the_official_code(features):
    merged, expert = features
    seed = (0, "digits")
    module = Official(beginning(D, 16, seed)[0].detach())
    optimiser, loss_func = torch.optim.Adam(module.parameters(), lr=1e-3, weight_decay=0.0), nn.L1Loss()
    order = iter(list(batches(N, 2 * 20, seed)))
    for _ in range(20):
        for _ in range(2):  # the official loop steps after each of its two batches of 16
            which = next(order)
            assert len(which) == 16
            loss = loss_func(module(merged[which]), expert[which])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    found = surgery(merged, expert, 16, 1e-3, 20, seed)
    torch.testing.assert_close(found["down"], module.down.weight.detach())
    torch.testing.assert_close(found["up"], module.up.weight.detach())
    assert found["up"].any()


def test_batches_use_every_example_before_any_is_used_again():
    which = torch.cat(list(batches(40, 4, (0, "digits"))))
    assert len(set(which[:32].tolist())) == 32
    assert all(len(batch) == 5 for batch in batches(5, 3, (0,)))


def test_a_loss_that_is_not_finite_stops_at_its_step(features):
    merged, expert = features
    expert[3] = float("nan")
    with pytest.raises(UserError, match=r"the loss of step \d is not finite"):
        surgery(merged, expert, 4, 1e-3, 5, (0,))
