"""Weighted directions: what fits of coefficients are merged by."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Mapping

from annotated_types import Ge

from mergeline.merging.algebra.slots import Slot, Views
from mergeline.merging.errors import UserError
from mergeline.merging.lazy import torch
from mergeline.merging.methods.contract import Look, Reference, method
from mergeline.merging.methods.elementwise.ties import trim
from mergeline.merging.methods.parameters import Positive, Rate, Share
from mergeline.merging.methods.parts import AROUND_MEAN, Kind, Over, owners, parts_of, summed

if TYPE_CHECKING:
    from torch import Tensor


def _reference(params: Mapping[str, Any]) -> Reference:
    return "mean" if params["directions"] in AROUND_MEAN else "pretrained"


def _needs(params: Mapping[str, Any]) -> tuple[str, ...]:
    return ("base", "coefficients", "multipliers") if params["masked"] else ("base", "coefficients")


def _trim(views: Views, *, density: float) -> dict[str, Any]:
    return trim(views, density=density, variant="official")


def _other(x: Slot, **params: Any) -> Tensor | None:
    return _weighted(x, False, **params)


@method(
    paper="Mergeline's own, of 2310.02575 (AdaMerging), 2407.02880 (aTLAS) and 2503.22178 (AdaRank)",
    reference=_reference,
    keys="block_linear",
    other=_other,
    needs=_needs,
    measure=Look(_trim, over=lambda params: "model" if params["directions"] == "ties" else None),
    spectral=True,
)
def weighted(
    x: Slot,
    *,
    directions: Kind = "task_vectors",
    over: Over = "whole",
    initial: float = 0.3,
    masked: bool = False,
    rank: Share = 1.0,
    density: Share = 0.2,
    damping: Positive = 0.1,
    power: Rate = 0.55,
    partition_seed: Annotated[int, Ge(0)] = 0,
) -> Tensor | None:
    """origin + the sum of coefficient * direction, the coefficients of each tensor from a file (`coefficients`).

    A direction is an expert's task vector (`task_vectors`), its large entries that agree in sign (`ties`), the rank-k
    part of (expert - mean) (`cart`), or what `tsv_merge` makes orthogonal (`tsv`); `cart_wudi` has as one more what
    `cart_wudi` calls F. The origin is the base, or for `cart` and `cart_wudi` the mean. Fits of coefficients write
    the file: of each tensor, or matrix in it, the numbers (D, K) of its D directions.

    Formula:
        θₒ + m ⊙ Σ_d c_d ⊙ D_d;  c_d: one number, one for each of K parts of the tensor, or for each singular value;
        directions of power and density as in `cart_wudi` and `ties`; m = 1, or the file `multipliers`
    Parameters:
        directions: what is added up
        over: what one number multiplies: a whole direction, one of K stretches of it (chunks) or of K random parts
            (partition), or one singular triplet (singular)
        initial: the coefficient of all directions of a tensor that the file lacks
        masked: whether sums are multiplied entry by entry, by the file `multipliers`
        rank: of `cart` and `cart_wudi`
        density: of `ties`
        damping: of `cart_wudi`
        power: of `cart_wudi`
        partition_seed: draws the parts of `partition`
    Spectral work:
        of `task_vectors` and `ties` none but for `singular`; else that of `cart`, `cart_wudi` or `tsv_merge`
    Trap:
        The file belongs to these experts in this order, and to these parameters; a fit's recipe has them all. Chunks
        are of ceil(n / K) entries, so that there may be fewer than K of them, and the last numbers multiply nothing.
    """
    return _weighted(
        x, True, directions=directions, over=over, initial=initial, masked=masked, rank=rank, density=density,
        damping=damping, power=power, partition_seed=partition_seed,
    )  # fmt: skip


def _weighted(
    x: Slot, matrix: bool, *, directions: Kind, over: Over, initial: float, masked: bool, rank: float, density: float,
    damping: float, power: float, partition_seed: int,
) -> Tensor | None:  # fmt: skip
    c_DK = None
    if x.has_statistic("coefficients"):
        c_DK = x.statistic("coefficients").double()
        if c_DK.ndim != 2:
            raise UserError(
                f"statistics 'coefficients': '{x.name}' has shape {list(c_DK.shape)}; it is (directions, numbers)"
            )
    parts = list(
        parts_of(x, directions, matrix=matrix, found=x.found, rank=rank, singular=over == "singular",
                 damping=damping, power=power)
    )  # fmt: skip
    width = max((part.values for part in parts), default=1) if over == "singular" else 1
    if c_DK is None:
        c_DK = x.reference.new_full((len(parts), width), initial, dtype=torch.float64)
    if len(c_DK) != len(parts) or (c_DK.shape[1] < width if over == "singular" else not c_DK.shape[1]):
        raise UserError(
            f"statistics 'coefficients': '{x.name}' has shape {list(c_DK.shape)}, and there are {len(parts)} "
            f"directions of {width}: these are other experts, or other parameters, than were fitted"
        )
    owner_X, count = None, c_DK.shape[1]
    if over in ("chunks", "partition") and count > 1:
        total = torch.Size(x.tensor_shape).numel()
        owner_X = owners(over, count, x.elements, x.start, total, partition_seed, x.name).to(c_DK.device)
    update_X = summed(parts, c_DK, over, owner_X)
    if masked and update_X is not None and x.has_statistic("multipliers"):
        update_X *= x.statistic("multipliers").double()
    return update_X
