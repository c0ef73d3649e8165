"""Sums over the entries of task vectors, of a tensor, a layer or a model: what diagnoses are computed from.

One tensor's task vectors are held at a time, block by block.
Shape suffixes: T experts, D entries of a block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Iterable, NamedTuple, Sequence, TypeVar

from mergeline.merging.algebra.slots import Slot, View
from mergeline.merging.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

_TINY = 1e-300


class Sums(NamedTuple):
    """Sums over the entries of T task vectors, of a tensor or of many; `total` adds them up. All float64.

    products_TT: of every two task vectors; magnitudes_TT: of their magnitudes. opposite_TT, nonzero_TT: entries of
    opposite sign, and where neither is 0. magnitude: sum of all magnitudes; cancelled: what of it is lost when task
    vectors are added. base: the base's squared norm. squares_TT: of every two task vectors' squares. elements: how many
    entries there are; shift_T, base_sum: their sums in task vectors and in the base. aligned_T, experts_T, weights:
    over tensors of two or more dimensions, inner product of expert and base, and their squared norms.
    """

    products_TT: Tensor
    magnitudes_TT: Tensor
    opposite_TT: Tensor
    nonzero_TT: Tensor
    magnitude: Tensor
    cancelled: Tensor
    base: Tensor
    squares_TT: Tensor
    elements: Tensor
    shift_T: Tensor
    base_sum: Tensor
    aligned_T: Tensor
    experts_T: Tensor
    weights: Tensor

    @classmethod
    def zero(cls, experts: int) -> Sums:
        sizes = {"TT": (experts, experts), "T": (experts,)}
        return cls(
            *(torch.zeros(sizes.get(n.rpartition("_")[2], ()), dtype=torch.float64) for n in cls._fields)
        )

    @property
    def norm_T(self) -> Tensor:
        """Of the task vectors."""
        return self.products_TT.diagonal().sqrt()

    @property
    def relative_norm_T(self) -> Tensor:
        """Of the task vectors, over the base's; where that is 0, over 1."""
        return self.norm_T / (self.base.sqrt() or 1.0)

    @property
    def cosine_TT(self) -> Tensor:
        """Of the task vectors; 0 with one that is 0."""
        return self.products_TT / (self.norm_T[:, None] * self.norm_T).clamp(min=_TINY)

    @property
    def conflict_TT(self) -> Tensor:
        """Share of entries, where neither is 0, in which two task vectors have opposite signs."""
        return self.opposite_TT / self.nonzero_TT.clamp(min=1)

    @property
    def weighted_conflict_TT(self) -> Tensor:
        """The same, each entry weighted by the product of both magnitudes."""
        return (self.magnitudes_TT - self.products_TT) / 2 / self.magnitudes_TT.clamp(min=_TINY)

    @property
    def cancelled_share(self) -> float:
        """Share of the magnitude of all task vectors that their sum loses to opposite signs: 0 for one expert."""
        return float(self.cancelled / self.magnitude.clamp(min=_TINY))

    @property
    def alignment_T(self) -> Tensor | None:
        """Cosine of the experts' weights with the base's; None if the base has none of two or more dimensions."""
        if not self.weights:
            return None
        return self.aligned_T / (self.experts_T.sqrt() * self.weights.sqrt()).clamp(min=_TINY)


def total(parts: Iterable[Sums], experts: int) -> Sums:
    """The sums over several tensors."""
    found = Sums.zero(experts)
    for part in parts:
        found = Sums(*(a + b for a, b in zip(found, part)))
    return found


def sums_of(view: View) -> Sums:
    """The sums over one tensor, block by block."""
    count = len(view.source.experts)
    return total((_block_sums(x) for x in view.blocks("element")), count)


def _block_sums(x: Slot) -> Sums:
    zero = Sums.zero(len(x.experts))
    tau_TD = x.task_vectors.double()
    size_TD = tau_TD.abs()
    products_TT, magnitude = tau_TD @ tau_TD.T, size_TD.sum()
    sign_TD = tau_TD.sign().float()
    agreement_TT = (sign_TD @ sign_TD.T).double()
    nonzero_TD = sign_TD.abs()
    nonzero_TT = (nonzero_TD @ nonzero_TD.T).double()
    assert x.base is not None, "task vectors are measured from the base"
    base_D, squares_TD = x.base.double(), tau_TD.square()
    found = zero._replace(
        products_TT=products_TT,
        magnitudes_TT=size_TD @ size_TD.T,
        opposite_TT=(nonzero_TT - agreement_TT) / 2,
        nonzero_TT=nonzero_TT,
        magnitude=magnitude,
        cancelled=magnitude - tau_TD.sum(0).abs().sum(),
        base=base_D @ base_D,
        squares_TT=squares_TD @ squares_TD.T,
        elements=torch.tensor(float(len(base_D)), dtype=torch.float64),
        shift_T=tau_TD.sum(1),
        base_sum=base_D.sum(),
    )
    if len(x.tensor_shape) < 2:
        return found
    experts_TD = x.experts.stacked.double()
    return found._replace(
        aligned_T=experts_TD @ base_D, experts_T=experts_TD.square().sum(1), weights=found.base
    )


# ---------------------------------------------------------------------------------------------- tensors and layers


@dataclass(frozen=True)
class TensorSums:
    """The sums over one tensor. layer: the tower and the number of the layer that it belongs to."""

    name: str
    shape: tuple[int, ...]
    sums: Sums
    layer: tuple[str, int] | None

    @property
    def component(self) -> str:
        """What stands before the tensor's name in a model of several components, as `unet/`."""
        return self.name[: self.name.find("/") + 1]


T = TypeVar("T", bound=TensorSums, covariant=True)


@dataclass(frozen=True)
class Layer(Generic[T]):
    """The tensors of one block, or what of a component lies outside of blocks, where `place` is None."""

    name: str
    place: tuple[str, int] | None
    tensors: Sequence[T]
    sums: Sums


def layers_of(measured: Sequence[T], experts: int) -> list[Layer[T]]:
    """Each block and what of each component lies outside of blocks, in the order of the model."""
    places = sorted({m.layer for m in measured if m.layer is not None})
    outside = sorted({m.component for m in measured if m.layer is None})
    found = []
    for place, component in [*((place, "") for place in places), *((None, c) for c in outside)]:
        inside = [m for m in measured if m.layer == place and (place or m.component == component)]
        name = f"{place[0]}{place[1]}" if place else f"{component}outside blocks"
        found.append(Layer(name, place, inside, total((m.sums for m in inside), experts)))
    return found


# ---------------------------------------------------------------------------------------------- JSON


def number(value: Any) -> float | None:
    """Six significant digits: enough to read, and the same text on every run; None for NaN."""
    value = float(value)
    return None if value != value else float(f"{value:.6g}")


def rows(values: Tensor) -> list[list[float | None]]:
    """Numbers of a matrix."""
    return [[number(value) for value in row] for row in values]
