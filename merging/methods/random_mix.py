"""Random mix: each entry from an expert drawn at random, the baseline of MagMax."""

from __future__ import annotations

from typing import TYPE_CHECKING

from merging import draws
from merging.lazy import torch
from merging.methods import method
from merging.slots import Slot

if TYPE_CHECKING:
    from torch import Tensor


@method(
    family="elementwise",
    paper="2407.06322",
    code="danielm1405/magmax@4f49f18f",
    reference="pretrained",
    needs_base=True,
)
def random_mix(x: Slot, *, scale: float = 1.0) -> Tensor:
    """base + scale * the task-vector entry of an expert drawn uniformly for each entry.

    The drawn expert is the one whose own number is the largest. Those depend on the seed, the expert's name, the
    tensor and the element alone.

    Formula:
        θ₀ + scale · τₛ, s drawn uniformly for each entry
    Trap:
        A baseline: another seed is another model.
    """
    source = x.view.source
    chosen_X = x.task_vectors[0]
    highest_X = torch.full(x.shape, -1.0, device=chosen_X.device)
    for expert, tau_X in zip(source.experts, x.task_vectors):
        drawn_X = draws.uniform(source.seed, expert, x.name, x.start, x.elements).reshape(x.shape)
        drawn_X = drawn_X.to(highest_X)
        chosen_X = torch.where(drawn_X > highest_X, tau_X, chosen_X)
        highest_X = torch.maximum(drawn_X, highest_X)
    return (chosen_X * scale).add_(x.base)
