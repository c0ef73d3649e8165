"""The device that is none refuses what an accelerator refuses, and allows what that allows."""

from __future__ import annotations

from typing import Any, Callable

import pytest
import torch
from torch import Tensor, nn

from mergeline.merging.pretended_device import Mixed, Pretended, pretended_device

HERE = torch.arange(6.0).reshape(2, 3)

REFUSED: dict[str, Callable[[Tensor], Any]] = {
    "sum": lambda there: there + HERE,
    "in place": lambda there: HERE.add_(there),
    "product": lambda there: there @ HERE.T,
    "where": lambda there: torch.where(there > 1, there, HERE),
    "cat": lambda there: torch.cat([there, HERE]),
    "stack with a number": lambda there: torch.stack([there.sum(), HERE.sum()]),
    "indices of the device in a tensor of the CPU": lambda there: HERE[(there[0] > 0).nonzero()[:, 0]],
    "put": lambda there: there.index_put_((torch.tensor([0]),), HERE[:1]),
    "generator": lambda there: torch.rand(2, device=there.device, generator=torch.Generator()),
    "draw": lambda there: torch.multinomial(there + 1, 1, generator=torch.Generator()),
    "array": lambda there: there.numpy(),
    "layer": lambda there: nn.Linear(3, 2)(there),
}
ALLOWED: dict[str, Callable[[Tensor], Any]] = {
    "number": lambda there: there * torch.tensor(2.0),
    "copy": lambda there: torch.zeros_like(there).copy_(HERE),
    "copy back": lambda there: torch.zeros(2, 3).copy_(there),
    "indices of the CPU": lambda there: there[torch.tensor([1, 0])],
    "put a number": lambda there: there.clone().index_put_((torch.tensor([0]),), torch.tensor(0.0)),
    "made there": lambda there: there + torch.ones(2, 3, device=there.device),
    "numbers of Python": lambda there: there + torch.tensor([1.0, 2.0, 3.0], device=there.device),
    "like": lambda there: there + torch.full_like(there, 2.0),
    "view": lambda there: there[:, 0].mul_(2),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused(what):
    with pretended_device() as device, pytest.raises(Mixed):
        REFUSED[what](HERE.clone().to(device))


@pytest.mark.parametrize("what", ALLOWED)
def test_allowed_with_the_values_of_the_cpu(what):
    expected = ALLOWED[what](HERE.clone())
    with pretended_device() as device:
        found = ALLOWED[what](HERE.clone().to(device))
        assert isinstance(found, Pretended) == (what != "copy back")
        assert type(found.cpu()) is Tensor and torch.equal(found.cpu(), expected)


def test_training_is_that_of_the_cpu():
    def trained(device: str) -> dict[str, Tensor]:
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 1)).to(device)
        optimizer = torch.optim.Adam(module.parameters(), 0.1)
        for _ in range(3):
            optimizer.zero_grad()
            module(HERE.to(device)).square().mean().backward()
            optimizer.step()
        return {name: value.cpu() for name, value in module.state_dict().items()}

    expected = trained("cpu")
    with pretended_device() as device:
        found = trained(device)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
