"""Models that were tuned in their tangent space: features are linear in the coefficients of task vectors.

Such a model is f(x; base) + J(x) (weights - base), J the derivative of the features by the weights at the base. So the
features of every sum of task vectors follow from those of the base and of each task vector.

Shape suffixes: R rows of features, d features, D experts.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Iterator, Mapping

from mergeline.merging.lazy import torch
from mergeline.merging.learning.directions import Inputs
from mergeline.merging.learning.network import Batch, Network
from mergeline.merging.learning.pool import Pool

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Tangent:
    """Of one batch: the base's features (R, d), and what each task vector adds to them, (D, R, d)."""

    batch: Batch
    base_Rd: Tensor
    added_DRd: Tensor

    def features(self, c_D: Tensor) -> Tensor:
        """Of the sum of task vectors with these coefficients: (R, d)."""
        return self.base_Rd + torch.einsum("d,dre->re", c_D.to(self.added_DRd), self.added_DRd)


def tangents(inputs: Inputs, network: Network, pools: Mapping[str, Pool]) -> dict[str, list[Tangent]]:
    """Of each task's examples; one task vector at a time is in memory. Leaves the network with the base's weights."""
    inputs.load_start(network)
    batches = {task: [batch for _, batch in pool.all_of(pool.fitted)] for task, pool in pools.items()}
    with torch.no_grad():
        base = {task: [network.features(batch) for batch in own] for task, own in batches.items()}
    added: dict[str, list[list[Tensor]]] = {task: [[] for _ in own] for task, own in batches.items()}
    for expert in inputs.experts:
        tau = task_vector(inputs, network, expert)
        for task, own in batches.items():
            for rows, batch in zip(added[task], own):
                rows.append(derivative(network, tau, batch))
    return {
        task: [Tangent(*parts[:2], torch.stack(parts[2])) for parts in zip(own, base[task], added[task])]
        for task, own in batches.items()
    }


def task_vector(inputs: Inputs, network: Network, expert: str) -> dict[str, Tensor]:
    """expert - base of all tensors that are merged and that the network has, in its shapes."""
    own, found = network.tensors(), {}
    for view in inputs.views():
        if view.name in own:
            base, tuned = (inputs.read_like(own[view.name], view, origin) for origin in ("base", expert))
            found[view.name] = tuned - base
    return found


def derivative(network: Network, tau: Mapping[str, Tensor], batch: Batch) -> Tensor:
    """The derivative of the features (R, d) of a batch along a task vector, at the weights that the network has."""
    # In one order, which torch compares.
    weights = {name: tensor.detach() for name, tensor in network.tensors().items() if name in tau}
    along = {name: tau[name] for name in weights}
    whole = _whole(network)

    def features(values: dict[str, Tensor]) -> Tensor:
        named = {f"module.{network.inside(name)}": value for name, value in values.items()}
        return torch.func.functional_call(whole, named, (batch,))

    with _plain_attention(), torch.no_grad():
        found = torch.func.jvp(features, (weights,), (along,))[1]
    return found.detach()


def _whole(network: Network) -> Any:
    """The network as a module that is called with a batch."""

    class Whole(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = network.module

        def forward(self, batch: Batch) -> Tensor:
            return network.run(self.module, batch)

    return Whole()


@contextmanager
def _plain_attention() -> Iterator[None]:
    """In this block attention is computed by what has forward derivatives."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
