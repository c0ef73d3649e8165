"""Which experts undo what others changed, and in which layers.

In the sum of all task vectors, <tau_i, sum_{j != i} tau_j> / |tau_i|^2 is what the others add along tau_i, relative
to tau_i itself. Where it is negative, that share of the expert's change is undone. Experts that know nothing of one
another add 0 on average: where signs of entries are random, with a standard deviation of
sqrt(sum_j sum_d tau_id^2 tau_jd^2) / |tau_i|^2.

The weight that is advised makes the sum most alike all experts: it has the largest mean cosine with their task vectors,
which does not depend on the scale of the merge.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Iterator, Sequence

from mergeline.merging.diagnoses.advice import Advice, Span, quoted, spans
from mergeline.merging.diagnoses.sums import Layer, Sums, TensorSums, number, total
from mergeline.merging.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

Json = dict[str, Any]

# The share of a change that may be lost. In families of samples/ whose merges work no expert loses more than .091 in a
# block (`numbers` of the embeddings), and on the CLIP family none loses anything.
_MAY_BE_LOST = 0.1
_DEVIATIONS = 4.0  # of what independent experts do to one another: once in 30000 layers
_STEP = 0.05  # of a weight that is advised
_LARGEST = 3.0  # of these weights
_TINY = 1e-300


@dataclass(frozen=True)
class Fault:
    """An expert that is at odds with others in one layer.

    undone: the share of its change that the others take. harm: what it takes of each other's, of those that lose more
    than they may; empty where it does them little harm.
    """

    expert: int
    undone: float
    harm: dict[int, float]


def undone(sums: Sums) -> Tensor:
    """The share of each task vector that the others undo, (T,); negative where they strengthen it."""
    products_TT = _others(sums.products_TT)
    return -products_TT.sum(1) / sums.products_TT.diagonal().clamp(min=_TINY)


def undone_by_chance(sums: Sums) -> Tensor:
    """Its standard deviation if the experts knew nothing of one another: (T,)."""
    return _others(sums.squares_TT).sum(1).sqrt() / sums.products_TT.diagonal().clamp(min=_TINY)


def sign_conflict(sums: Sums) -> Tensor:
    """Sign conflict by magnitude of an expert with all others together: (T,)."""
    shared_T = _others(sums.magnitudes_TT).sum(1)
    return (shared_T - _others(sums.products_TT).sum(1)) / 2 / shared_T.clamp(min=_TINY)


def faults(sums: Sums, members: Sequence[int]) -> Iterator[Fault]:
    """The experts at odds with others: whoever cancels most, then the same without it, until nobody loses too much."""
    left = list(members)
    while len(left) > 1:
        here = _only(sums, left)
        lost_T, norm_T = undone(here), here.norm_T
        if not (lost_T > _allowed(undone_by_chance(here))).any():
            return
        # In whose row the most is cancelled; of two, who lose the same, the longer.
        along_T = _others(here.products_TT).sum(1)
        worst = min(range(len(left)), key=lambda t: (float(along_T[t]), -float(norm_T[t])))
        if len(left) == 2:
            worst = int(norm_T.argmax())
        length_T = here.products_TT.diagonal().clamp(min=_TINY)
        harm_T = -here.products_TT[worst] / length_T
        harm_T[worst] = 0
        allowed_T = _allowed(here.squares_TT[worst].sqrt() / length_T)
        harm = {left[t]: float(harm_T[t]) for t in range(len(left)) if harm_T[t] > allowed_T[t]}
        yield Fault(left[worst], float(lost_T[worst]), harm)
        del left[worst]


def best_weight(sums: Sums, members: Sequence[int], expert: int, low: float, high: float) -> float:
    """The weight of one expert, 1 for the other members, of which the sum has the largest mean cosine with them all."""
    among = _only(sums, members)
    products_MM, length_M = among.products_TT, among.norm_T.clamp(min=_TINY)

    def likeness(weight: float) -> float:
        weight_M = torch.ones(len(members), dtype=torch.float64)
        weight_M[list(members).index(expert)] = weight
        along_M = products_MM @ weight_M
        length = (weight_M @ along_M).clamp(min=_TINY).sqrt()
        return float((along_M / length_M).mean() / length)

    steps = range(round(low / _STEP), round(high / _STEP) + 1)
    return max((round(step * _STEP, 2) for step in steps), key=likeness)


def _allowed(deviation_T: Tensor) -> Tensor:
    return (_DEVIATIONS * deviation_T).clamp(min=_MAY_BE_LOST)


def _others(values_TT: Tensor) -> Tensor:
    return values_TT - torch.diag(values_TT.diagonal())


def _only(sums: Sums, members: Sequence[int]) -> Sums:
    """What is said of pairs, of some experts alone."""
    among = torch.tensor(list(members))
    pairs = {
        key: getattr(sums, key)[among][:, among] for key in ("products_TT", "magnitudes_TT", "squares_TT")
    }
    return sums._replace(**pairs)


# ---------------------------------------------------------------------------------------------- of a model


def interference(layers: Sequence[Layer[TensorSums]]) -> Json:
    """By layer, and expert in it: `undone`, its standard deviation `by_chance`, `sign_conflict` (.5 by chance)."""
    return {
        key: [[number(value) for value in measure(layer.sums)] for layer in layers]
        for key, measure in (
            ("undone", undone),
            ("by_chance", undone_by_chance),
            ("sign_conflict", sign_conflict),
        )
    }


def advice_on_interference(
    layers: Sequence[Layer[TensorSums]], names: Sequence[str], members: Sequence[int]
) -> Iterator[Advice]:
    """For each expert at odds with others, and each run of blocks where it is: whom it harms, which weight is best.

    members: the experts that are looked at, among `names`.
    """
    found: dict[tuple[bool, int], dict[tuple[str, int], Fault]] = defaultdict(dict)
    for layer in layers:
        if layer.place is not None:
            for fault in faults(layer.sums, members):
                found[not fault.harm, fault.expert][layer.place] = fault
    towers = len({layer.place[0] for layer in layers if layer.place is not None})
    for (is_harmless, expert), places in found.items():
        for span in spans(places, towers):
            inside = [fault for place, fault in places.items() if span.has(place)]
            sums = total((layer.sums for layer in layers if span.has(layer.place)), len(names))
            low, high = (1.0, _LARGEST) if is_harmless else (0.0, 1.0)
            weight = best_weight(sums, members, expert, low, high)
            make = _on_the_undone if is_harmless else _on_harm
            yield make(span, names, names[expert], inside, weight)


def _on_harm(span: Span, names: Sequence[str], expert: str, faults: Sequence[Fault], weight: float) -> Advice:
    harm: dict[str, float] = {}
    for fault in faults:
        for t, share in fault.harm.items():
            harm[names[t]] = max(share, harm.get(names[t], 0.0))
    hurt = sorted(harm, key=lambda name: -harm[name])
    most = harm[hurt[0]]
    sentence = (
        f"expert '{expert}' conflicts in {span}: it undoes up to {most:.0%} of what {quoted(hurt)} changed"
    )
    if weight > 1 - 2 * _STEP:
        what = "no weight mends that: have signs elected there (ties), or leave one of them out"
        return _advice(span, expert, f"{sentence}; {what}")
    what = f"lower its scale there to {weight:g}" if weight else "leave it out there"
    return _advice(span, expert, f"{sentence}; {what}", span.rule(expert, weight))


def _on_the_undone(
    span: Span, names: Sequence[str], expert: str, faults: Sequence[Fault], weight: float
) -> Advice:
    most = max(fault.undone for fault in faults)
    return _advice(
        span,
        expert,
        f"expert '{expert}' is undone in {span}: the others together take {most:.0%} of what it changed, and it harms "
        f"none of them; raise its scale there to {weight:g}",
        span.rule(expert, weight),
    )


def _advice(span: Span, expert: str, sentence: str, *rules: Json) -> Advice:
    return Advice("interference", [expert], sentence, span.tower, (span.first, span.last), list(rules))
