"""Random mix: each entry from an expert drawn at random, the baseline of MagMax."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergeline.merging.algebra import draws
from mergeline.merging.algebra.slots import Slot
from mergeline.merging.lazy import torch
from mergeline.merging.methods.contract import method

if TYPE_CHECKING:
    from torch import Tensor


@method(paper="2407.06322", code="danielm1405/magmax@4f49f18f", scale=1.0, needs=("base",))
def random_mix(x: Slot) -> Tensor:
    """base + scale * the task-vector entry of an expert drawn uniformly for each entry.

    The drawn expert is the one whose own number is the largest. Those depend on the seed, the expert's name, the
    tensor and the element alone.

    Formula:
        θ₀ + scale · τₛ, s drawn uniformly for each entry
    Trap:
        A baseline: another seed is another model.
    """
    chosen_X = x.task_vectors[0]
    highest_X = torch.full(x.shape, -1.0, device=chosen_X.device)
    for expert, tau_X in zip(x.view.experts, x.task_vectors):
        drawn_X = draws.uniform(x.view.source.seed, expert, x.name, x.start, x.elements).reshape(x.shape)
        drawn_X = drawn_X.to(highest_X)
        chosen_X = torch.where(drawn_X > highest_X, tau_X, chosen_X)
        highest_X = torch.maximum(drawn_X, highest_X)
    return chosen_X
