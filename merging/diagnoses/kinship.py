"""How alike the experts' changes are, and who does not belong (Hu et al. 2024, Model Kinship, 2410.12613).

Model kinship is the similarity of task vectors: their cosine, Pearson's correlation or Euclidean distance. Here also
the median over blocks of the cosine in each, which a conflict in a few of them does not change.
"""

from __future__ import annotations

from itertools import combinations
from statistics import median
from typing import TYPE_CHECKING, Any, Iterator, Sequence

from mergeline.merging.diagnoses.advice import Advice
from mergeline.merging.diagnoses.sums import Layer, Sums, TensorSums, rows
from mergeline.merging.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

Json = dict[str, Any]

# An expert whose weights point elsewhere than the base's was not fine-tuned from it; real experts stay above 0.9.
_SAME_FAMILY = 0.5
# Near-copies have nine tenths of their squared norms in common.
_COPIES = 0.9**0.5
# How many times shorter or longer than the median of the others a task vector may be; in samples/ it is 1.2 at most.
_LENGTHS = 3.0
# Experts of different tasks are nearly orthogonal (.006 to .08 in samples/) and merge well. Only where all others have
# a relative nearer than this is one without any a stranger among them.
_AKIN = 0.1
_FURTHER = 3.0  # how many times less akin the stranger is to its nearest
_TINY = 1e-300


def pearson(sums: Sums) -> Tensor:
    """Pearson's correlation of every two task vectors over their entries: (T, T)."""
    shift_T = sums.shift_T
    covariance_TT = sums.products_TT - shift_T[:, None] * shift_T / sums.elements.clamp(min=1)
    deviation_T = covariance_TT.diagonal().clamp(min=0).sqrt()
    return covariance_TT / (deviation_T[:, None] * deviation_T).clamp(min=_TINY)


def distance(sums: Sums) -> Tensor:
    """Euclidean distance of every two experts: (T, T)."""
    length_T = sums.products_TT.diagonal()
    return (length_T[:, None] + length_T - 2 * sums.products_TT).clamp(min=0).sqrt()


def median_cosine(layers: Sequence[Layer[TensorSums]], whole: Sums) -> Tensor:
    """The median over blocks of the cosine of every two task vectors, (T, T); without blocks that of the whole."""
    blocks = [layer.sums.cosine_TT for layer in layers if layer.place is not None]
    return torch.stack(blocks).quantile(0.5, dim=0) if blocks else whole.cosine_TT


def kinship(layers: Sequence[Layer[TensorSums]], whole: Sums) -> Json:
    """`pearson`, `distance` and `median_cosine` of every two experts, and `by_layer` their cosines."""
    return {
        "pearson": rows(pearson(whole)),
        "distance": rows(distance(whole)),
        "median_cosine": rows(median_cosine(layers, whole)),
        "by_layer": [rows(layer.sums.cosine_TT) for layer in layers],
    }


# ---------------------------------------------------------------------------------------------- who does not belong


def of_another_base(whole: Sums) -> list[int]:
    """The experts whose weights point elsewhere than the base's."""
    alignment_T = whole.alignment_T
    return [] if alignment_T is None else [t for t, value in enumerate(alignment_T) if value < _SAME_FAMILY]


def unchanged(whole: Sums) -> list[int]:
    """The experts that equal the base."""
    return [t for t, norm in enumerate(whole.norm_T) if norm == 0]


def advice_on_origins(whole: Sums, names: Sequence[str]) -> Iterator[Advice]:
    """A sentence for each expert that is not of this base, equals it, or is another's twin."""
    for t in of_another_base(whole):
        assert whole.alignment_T is not None
        yield Advice(
            "origins",
            [names[t]],
            f"expert '{names[t]}' was not fine-tuned from this base: the cosine of their weights is "
            f"{whole.alignment_T[t]:.2f}, a fine-tuned copy has more than {_SAME_FAMILY}; remove it, name its own "
            "base, or bring it to the base's order first (mergeline align)",
        )
    for t in unchanged(whole):
        yield Advice("origins", [names[t]], f"expert '{names[t]}' equals the base; remove it from experts")
    for i, j in combinations(range(len(names)), 2):
        if _are_equal(whole, i, j):
            pair = [names[i], names[j]]
            yield Advice(
                "origins", pair, f"experts '{pair[0]}' and '{pair[1]}' are the same; list one of them"
            )


def _are_equal(whole: Sums, i: int, j: int) -> bool:
    norm_T = whole.norm_T
    return bool(norm_T[i] == norm_T[j] != 0 and whole.cosine_TT[i, j] > 1 - 1e-12)


def advice_on_kinship(
    layers: Sequence[Layer[TensorSums]], whole: Sums, names: Sequence[str], members: Sequence[int]
) -> Iterator[Advice]:
    """Who is nearly a copy of another; of three or more, whose change is out of line in length, who is akin to none.

    members: the experts that are looked at, among `names`.
    """
    for i, j in combinations(members, 2):
        if whole.cosine_TT[i, j] > _COPIES and not _are_equal(whole, i, j):
            yield _on_copies([names[i], names[j]], float(whole.cosine_TT[i, j]))
    if len(members) < 3:
        return
    norm_T, kin_TT = whole.norm_T, median_cosine(layers, whole)
    for t in members:
        others = [j for j in members if j != t]
        usual = median(float(norm_T[j]) for j in others)
        if not usual / _LENGTHS <= norm_T[t] <= usual * _LENGTHS:
            yield _on_length(names[t], float(norm_T[t]) / usual)
        nearest = max(others, key=lambda j: float(kin_TT[t, j]))
        least_akin = min(float(max(kin_TT[j, k] for k in others if k != j)) for j in others)
        if least_akin > _AKIN and kin_TT[t, nearest] * _FURTHER < least_akin:
            yield _advice(
                [names[t]],
                f"expert '{names[t]}' is akin to none: its nearest is '{names[nearest]}' with a cosine of "
                f"{kin_TT[t, nearest]:.2f}, each of the others has one of {least_akin:.2f} or nearer; see whether it "
                "is of this base and for these tasks, and merge without it, too",
            )


def _on_copies(pair: list[str], cosine: float) -> Advice:
    return _advice(
        pair,
        f"experts '{pair[0]}' and '{pair[1]}' are nearly copies (cosine {cosine:.3f}): what they changed counts twice; "
        "list one of them, or give each half its weight",
        *({"expert": name, "params": {"weights": 0.5}} for name in pair),
    )


def _on_length(name: str, ratio: float) -> Advice:
    weight = float(f"{1 / ratio:.2g}")
    what = "it drowns them" if ratio > 1 else "it is lost among them, and leaving it out changes little"
    return _advice(
        [name],
        f"expert '{name}' changed {ratio:.2g} times as much as the others' median: {what}; the weight {weight:g} makes "
        "it as long as they are",
        {"expert": name, "params": {"weights": weight}},
    )


def _advice(experts: list[str], sentence: str, *rules: Json) -> Advice:
    return Advice("kinship", experts, sentence, rules=list(rules))
