"""The kinds of statistics that methods read: what was gathered from data or training beside the checkpoints."""

from __future__ import annotations

from typing import NamedTuple, Sequence


class Statistic(NamedTuple):
    """What a kind of statistics is.

    squared_side: it has a row and a column for each input of a matrix, else the shape of the tensor.
    by_row: it has one number for each entry of the tensor's first dimension.
    positive: none of its numbers is negative. partial: tensors without any are merged in a simpler way.
    for_all: there is one for all experts, else one of each. free: its tensors have shapes of their own.
    """

    squared_side: bool = False
    by_row: bool = False
    positive: bool = False
    partial: bool = False
    for_all: bool = False
    free: bool = False

    @property
    def by_entry(self) -> bool:
        """Whether there is a number for each entry of the tensor."""
        return not (self.squared_side or self.by_row or self.free)

    def shape(self, of: Sequence[int], inputs: int = -1) -> tuple[int, ...]:
        """The shape of the statistics of a tensor, or of a matrix (M, N), whose axis `inputs` counts its inputs."""
        if self.squared_side and of:
            return (of[inputs], of[inputs])
        return tuple(of[:1]) if self.by_row else tuple(of)


STATISTICS = {
    "coefficients": Statistic(partial=True, for_all=True, free=True),  # of the directions of each tensor
    "fisher": Statistic(positive=True),  # a diagonal Fisher, or Adam's second moments
    "gram": Statistic(squared_side=True, partial=True),  # of the inputs of a linear layer
    "gradients": Statistic(),  # mean magnitudes of the loss's gradients at the base
    "instruction": Statistic(for_all=True),  # a checkpoint that was tuned to follow instructions
    "usage": Statistic(  # how often a row of an embedding is looked up
        by_row=True, positive=True, partial=True
    ),
    "multipliers": Statistic(partial=True, for_all=True),  # of the update, entry by entry
    "masks": Statistic(partial=True),  # 1 where an entry is kept
    "solved": Statistic(for_all=True, partial=True),  # merged tensors that were solved for
}
