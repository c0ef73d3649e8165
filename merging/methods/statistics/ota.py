"""OTA: every entry is averaged with powers of the experts' second moments as weights, which Adam leaves behind."""

from __future__ import annotations

from math import sqrt
from typing import TYPE_CHECKING, Any, Iterator, Literal, Mapping, Sequence

from mergeline.merging.algebra import combine, decompositions, sums
from mergeline.merging.algebra.slots import Slot, Unit, View, Views
from mergeline.merging.lazy import torch
from mergeline.merging.methods.contract import Look, method
from mergeline.merging.methods.parameters import Positive, Share, Weights
from mergeline.merging.methods.statistics.ffg import kept, roots_for_density

if TYPE_CHECKING:
    from torch import Tensor


_SPARED = 1e-6  # share of the norm below which a masked task vector is not rescaled, but dropped


def _unit(params: Mapping[str, Any]) -> Unit:
    return "tensor" if params["rank1"] or params["rescale"] else "element"


def _needs(params: Mapping[str, Any]) -> Sequence[str]:
    return ("base", "fisher") if params["rescale"] or params["merge"] != "precond" else ("fisher",)


def _wrong(params: Mapping[str, Any], _experts: int) -> Iterator[str]:
    threshold = params["threshold"]
    if threshold is not None and params["density"] is not None:
        yield "threshold and density say the same; leave one out"
    if any(number < 0 for number in threshold or ()):
        yield "a threshold is negative"


def _moment(x: Slot, t: int, rank1: bool) -> Tensor:
    """The second moments of expert t, or of a matrix what its row and column sums say of them: (X)."""
    moment_X = x.statistic("fisher", t)
    if not rank1 or moment_X.ndim != 2:
        return moment_X
    row_M1 = moment_X.sum(1, keepdim=True, dtype=torch.float64)
    column_1N = moment_X.sum(0, keepdim=True, dtype=torch.float64)
    share_1N = column_1N / row_M1.sum().clamp(min=torch.finfo(torch.float64).tiny)
    return (row_M1 @ share_1N).to(moment_X.dtype)


def _over(params: Mapping[str, Any]) -> Literal["model", "tensor"] | None:
    if params["density"] is not None:
        return "model"
    return "tensor" if params["normalize"] != "none" else None


def _measured(
    views: Views, *, power: float, normalize: str, density: float | None, rank1: bool, rescale: bool
) -> dict[str, Any]:
    """What `significance` must reach, of each expert; and for every tensor the mean of each expert's v^power."""
    found: dict[str, Any] = {"roots": None, "means": None}
    if density is not None:
        unit = _unit({"rank1": rank1, "rescale": rescale})
        found["roots"] = roots_for_density(views, unit, lambda x, t: _moment(x, t, rank1), density)
    if normalize != "none":
        means = views.each(lambda view: _means(view, power, rank1))
        found["means"] = dict(zip((view.name for view in views.views), means))
    return found


def _means(view: View, power: float, rank1: bool) -> list[float]:
    totals = [0.0] * len(view.experts)
    for x in view.blocks("tensor" if rank1 else "element"):
        for t in range(len(totals)):
            totals[t] += float(_moment(x, t, rank1).double().pow(power).sum())
    return [total / view.elements for total in totals]


@method(
    paper="2509.11167",
    code="pmahdavi/ota-merge@eee703f5",
    unit=_unit,
    needs=_needs,
    measure=Look(_measured, over=_over),
    check=_wrong,
    spectral=True,
)
def ota(
    x: Slot,
    *,
    power: Positive = 0.5,
    epsilon: Positive = 1e-26,
    normalize: Literal["none", "global"] = "none",
    threshold: Weights | None = None,
    density: Share | None = None,
    merge: Literal["precond", "linear", "ties"] = "precond",
    rescale: bool = False,
    fallback_to_base: bool = True,
    rank1: bool = False,
) -> Tensor:
    """base + sum of w * tau over the sum of w, w = v^power + epsilon, v the second moments (statistics `fisher`).

    Without a base the experts themselves are averaged. Entries with v * tau^2 (v alone, without a base) below an
    expert's `threshold`, or outside the `density` largest of the model, are masked; where everything is, the base
    stands, or else the mean. `linear` takes the mean of the masked task vectors, `ties` of what agrees with the elected
    sign. `rescale` gives a masked task vector its norm back: largest singular value, RMS of a vector. `global` divides
    v^power by its mean over the tensor, as the official code does. `rank1` knows row and column sums of v alone. The
    official code masks `linear` and `ties` only if it rescales too.

    Formula:
        wₜ = vₜ^power + epsilon, 0 where vₜ ⊙ τₜ² is below the threshold, or that of density;  v the second moments
        θ₀ + Σₜ wₜ ⊙ τₜ / Σₜ wₜ
    Parameters:
        power: of the second moments
        epsilon: is added to vₜ^power, so that no weight is 0
        normalize: divide vₜ^power by its mean over the tensor (global, as the official code calls it)
        threshold: one number an expert, absolute, on v · τ²; by default nothing is masked
        density: share of the model's entries that is not masked; by default nothing is
        merge: how masked task vectors are merged: by weights (precond), their mean, or the mean of what
            agrees in sign
        rescale: give a masked task vector its norm back
        fallback_to_base: whether the base, or else the mean, stands where all experts are masked
        rank1: know of v its row and column sums alone
    Spectral work:
        with `rescale`, the largest singular value of every matrix and expert, before and after
    Trap:
        The official default epsilon, 1e-8, swamps the roots of real second moments. The official code masks
        linear and ties only with `rescale`.
    """
    found = x.found or {"roots": None, "means": None}
    means = found["means"] and found["means"][x.name]
    roots = found["roots"] or (threshold and [sqrt(value) for value in threshold])
    count = len(x.experts)

    def part(t: int) -> tuple[Tensor, Tensor]:
        """The weights of expert t, and what they weigh: (X), (X)."""
        moment_X = _moment(x, t, rank1)
        scale = 1.0 if means is None else 1 / (means[t] + epsilon)
        weight_X = moment_X.to(x.precision).pow(power).mul_(scale).add_(epsilon)
        tau_X = x.experts[t] - x.reference if x.has_base else x.experts[t]
        if roots is None:
            return weight_X, tau_X
        mask_X = kept(x, t, moment_X, roots[t])
        masked_X = tau_X * mask_X
        return weight_X.mul_(mask_X), _rescaled(masked_X, tau_X) if rescale else masked_X

    total_X = weights_X = torch.zeros(())
    taus = []
    for t in range(count):
        weight_X, tau_X = part(t)
        weights_X = weights_X + weight_X
        if merge == "precond":
            total_X = total_X + weight_X * tau_X
        else:
            taus.append(tau_X)
    if merge == "precond":
        merged_X = total_X / weights_X
    elif merge == "linear":
        merged_X = sums.mean(taus, x.precision)
    else:
        merged_X = combine.orthant_sum(taus, combine.elect_signs(taus, None, 1.0))[0] / count
    if roots is None:
        return merged_X
    if fallback_to_base and x.has_base:
        other_X = torch.zeros_like(merged_X)
    else:
        other_X = sums.mean(x.experts, x.precision)
        other_X = other_X.sub_(x.reference) if x.has_base else other_X
    return torch.where(weights_X <= 1.1 * count * epsilon, other_X.to(merged_X.dtype), merged_X)


def _rescaled(masked_X: Tensor, tau_X: Tensor) -> Tensor:
    """The masked task vector with the norm of the whole one; kernels, which have neither norm, as they are."""
    if tau_X.ndim > 2:
        return masked_X
    norm = decompositions.largest_singular_value if tau_X.ndim == 2 else torch.linalg.norm
    before, after = float(norm(tau_X.double())), float(norm(masked_X.double()))
    return masked_X * (before / after) if after > _SPARED * before else torch.zeros_like(tau_X)
