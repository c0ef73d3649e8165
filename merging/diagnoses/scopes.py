"""The scope of weights, mean and standard deviation of each tensor, and how far experts left that of the base.

Scopes are those of Weight Scope Alignment (2408.12237), of which neither formula nor code is public: what is here is
reconstructed. The divergence of an expert's Gaussian from the base's is KL(N(m_i, s_i^2) | N(m_0, s_0^2)).

A change of scope is a rescaling and a shift of the base's weights, a + b theta_0: what training on a task does not do
of itself, while another weight decay, another learning rate or a conversion do. How much of a task vector is one, its
squared correlation with (1, theta_0), is about 2 / n of n entries by chance.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any, Iterator, NamedTuple, Sequence

from mergeline.merging.diagnoses.advice import Advice, Span, spans
from mergeline.merging.diagnoses.sums import Layer, Sums, TensorSums, number
from mergeline.merging.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

Json = dict[str, Any]

# Where more than half of a change is one of scope, it is no longer mainly what was learned. In samples/ it is 2 %.
_MOSTLY = 0.5
_ENTRIES = 64  # of a layer's weights; of fewer, half of a change is one of scope by chance now and then
_LEAST = 1e-12  # of a standard deviation: below, a tensor is constant


class Scopes(NamedTuple):
    """Of one tensor of two or more dimensions. mean, std: of the base. kl_T: in nats. energy_T: of each task vector,
    the squared norm of what is a change of scope."""

    mean: Tensor
    std: Tensor
    mean_T: Tensor
    std_T: Tensor
    kl_T: Tensor
    energy_T: Tensor


def divergence(mean: Tensor, std: Tensor, mean_0: Tensor, std_0: Tensor) -> Tensor:
    """KL(N(mean, std^2) | N(mean_0, std_0^2)) in nats."""
    return torch.log(std_0 / std) + (std.square() + (mean - mean_0).square()) / (2 * std_0.square()) - 0.5


def scopes_of(tensor: TensorSums) -> Scopes | None:
    """The scopes of a tensor; None if it has fewer than two dimensions, or is constant in the base or an expert."""
    sums = tensor.sums
    if not sums.weights or len(tensor.shape) < 2:
        return None
    n = sums.elements
    mean, mean_T = sums.base_sum / n, (sums.base_sum + sums.shift_T) / n
    std = _deviation(sums.weights / n, mean)
    std_T = _deviation(sums.experts_T / n, mean_T)
    if std < _LEAST or (std_T < _LEAST).any():
        return None
    along_T = sums.aligned_T - sums.weights - sums.shift_T * mean  # n times the covariance of change and base
    energy_T = sums.shift_T.square() / n + along_T.square() / (n * std.square())
    return Scopes(mean, std, mean_T, std_T, divergence(mean_T, std_T, mean, std), energy_T)


def _deviation(square: Tensor, mean: Tensor) -> Tensor:
    return (square - mean.square()).clamp(min=0).sqrt()


class LayerScopes(NamedTuple):
    """Over the weights of a layer, (T,) each. ratio: geometric mean of s_i / s_0; kl, moved: means of the divergence
    and of (m_i - m_0) / s_0, every entry counting alike; share: of the change's squared norm, what is one of scope."""

    ratio: Tensor
    kl: Tensor
    moved: Tensor
    share: Tensor


def layer_scopes(layer: Layer[TensorSums]) -> LayerScopes | None:
    """The scopes of a layer; None if it has no weights that have one."""
    found = [(scopes, m.sums) for m in layer.tensors if (scopes := scopes_of(m)) is not None]
    entries = sum(float(sums.elements) for _, sums in found)
    if entries < _ENTRIES:
        return None

    def mean(values: Sequence[Tensor]) -> Tensor:
        return torch.stack([v * sums.elements for v, (_, sums) in zip(values, found)]).sum(0) / entries

    length_T = torch.stack([_lengths(sums) for _, sums in found]).sum(0)
    energy_T = torch.stack([scopes.energy_T for scopes, _ in found]).sum(0)
    return LayerScopes(
        mean([torch.log(s.std_T / s.std) for s, _ in found]).exp(),
        mean([s.kl_T for s, _ in found]),
        mean([(s.mean_T - s.mean) / s.std for s, _ in found]),
        torch.where(length_T > 0, energy_T / length_T, 0.0),
    )


def _lengths(sums: Sums) -> Tensor:
    return sums.products_TT.diagonal()


# ---------------------------------------------------------------------------------------------- of a model


def scope_row(tensor: TensorSums) -> Json | None:
    """The scopes of a tensor as JSON: means and standard deviations, the base's first, and divergences."""
    found = scopes_of(tensor)
    if found is None:
        return None
    return {
        "mean": [number(found.mean), *map(number, found.mean_T)],
        "std": [number(found.std), *map(number, found.std_T)],
        "kl": [number(value) for value in found.kl_T],
    }


def scopes(layers: Sequence[Layer[TensorSums]]) -> Json:
    """By layer, and expert in it: `ratio`, `kl`, `moved` and `share`; None in place of a layer without scopes."""
    found = [layer_scopes(layer) for layer in layers]
    return {
        key: [None if own is None else [number(value) for value in getattr(own, key)] for own in found]
        for key in LayerScopes._fields
    }


def advice_on_scopes(
    layers: Sequence[Layer[TensorSums]], names: Sequence[str], members: Sequence[int]
) -> Iterator[Advice]:
    """For each expert, and each run of blocks where most of its change is one of scope.

    members: the experts that are looked at, among `names`.
    """
    found: dict[int, dict[tuple[str, int], LayerScopes]] = defaultdict(dict)
    for layer in layers:
        own = layer_scopes(layer) if layer.place is not None else None
        for t in members:
            if own is not None and layer.place is not None and own.share[t] > _MOSTLY:
                found[t][layer.place] = own
    towers = len({layer.place[0] for layer in layers if layer.place is not None})
    for t, places in found.items():
        for span in spans(places, towers):
            inside = [own for place, own in places.items() if span.has(place)]
            yield _on_scope(span, names[t], *(_over(inside, key, t) for key in ("ratio", "moved", "share")))


def _over(layers: Sequence[LayerScopes], key: str, t: int) -> float:
    return sum(float(getattr(own, key)[t]) for own in layers) / len(layers)


def _on_scope(span: Span, expert: str, ratio: float, moved: float, share: float) -> Advice:
    shift = f" and their mean moved by {moved:.2g} of it" if abs(moved) > abs(ratio - 1) else ""
    return Advice(
        "scopes",
        [expert],
        f"expert '{expert}' left the base's scope in {span}: the standard deviation of its weights is {ratio:.3g} "
        f"times the base's{shift}, which is {share:.0%} of its change; it was rescaled, or trained with a weight "
        "decay or learning rate out of line: bring it back to scale first, or leave it out there",
        span.tower,
        (span.first, span.last),
        [span.rule(expert, 0.0)],
    )
