"""How attention heads pass on to one another in experts, and what of it their average loses.

The composition score of an earlier head and a later one (Elhage et al. 2021; of models' parts in 2406.09519) is
|L R|_F / (|L|_F |R|_F), where R = OV of the earlier, and L = QK^T, QK or OV of the later: what the earlier head writes
is read as a query, a key or a value. Of heads that know nothing of one another it is about 1 / sqrt(N). An expert
that taught two heads to pass something on changed both of them; the average of T experts has 1 / T of each change, and
1 / T^2 of what passes.

Scales of the norm before an attention are part of what it reads; positions that rotate queries and keys are left out.
From Gram matrices of the width of a head: |QK OV|^2 = tr(G_q M G_v M^T), M = W_k W_o. Held are the output matrices of
one model.

Shape suffixes: H heads of a layer, A of a later one, B of an earlier; E width of a head, N of the model; K kinds
(query, key, value); P pairs of heads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Callable, Collection, Iterator, Mapping, NamedTuple, Sequence

from mergeline.merging.architecture import Model, layer_of
from mergeline.merging.diagnoses.advice import Advice
from mergeline.merging.diagnoses.sums import number
from mergeline.merging.engine.mergelock import Attention, Part
from mergeline.merging.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

Json = dict[str, Any]
Read = Callable[[Part], "Tensor"]

KINDS = ("query", "key", "value")
# Norms that come before an attention.
_NORMS = ("ln_1", "norm1", "layer_norm1", "layernorm_before", "input_layernorm")
# A circuit is a pair whose score is this many standard deviations above the median of all pairs: of a million pairs of
# random heads none is.
_OUTLIER = 6.0
_NORMAL = 1.4826  # standard deviation over median absolute deviation, of a normal distribution
_LOST = 0.5  # of what a circuit's score is above chance
_TINY = 1e-300


class Layer(NamedTuple):
    """An attention with heads. groups: how many share keys and values. norm: the scale of what it reads, if known."""

    tower: str
    layer: int
    module: Attention
    groups: int
    norm: Part | None


class Pair(NamedTuple):
    """Heads by layer and number, from 0: who writes and who reads."""

    writer: tuple[int, int]
    reader: tuple[int, int]


class Tower(NamedTuple):
    """The composition scores of a tower of this width: pairs (P), and of the base, the experts' average and each of
    them (K, P)."""

    name: str
    width: int
    pairs: list[Pair]
    base_KP: Tensor
    mean_KP: Tensor
    experts: Mapping[str, Tensor]


def attention_layers(
    model: Model, modules: Sequence[Attention], merged: Collection[str]
) -> dict[str, list[Layer]]:
    """The layers of each tower with two or more whose number of heads is known, in order.

    merged: the names of tensors that all models have; norms that are not among them are left out of what is read.
    """
    found: dict[str, list[Layer]] = {}
    for module in modules:
        tower, layer = layer_of(module.name + ".")
        labels = model.tensors[module.query.tensor].axes or ()
        groups = next((model.units[label] for label in labels if label and label.endswith(".heads")), None)
        if tower is not None and layer is not None and groups:
            norms = [name for norm in _NORMS if (name := f"{tower}{layer}.{norm}.weight") in merged]
            norm = Part(norms[0], 0, 1, module.query.columns) if norms else None
            found.setdefault(tower, []).append(Layer(tower, layer, module, groups, norm))
    return {
        tower: sorted(layers, key=lambda own: own.layer) for tower, layers in found.items() if len(layers) > 1
    }


def composition(read: Read, layers: Sequence[Layer]) -> tuple[list[Pair], Tensor]:
    """The scores of all pairs of heads of two layers: (K, P). read: a part of a tensor of the model, in float64."""
    pairs: list[Pair] = []
    found: list[Tensor] = []
    earlier: list[tuple[Layer, Tensor, Tensor, Tensor]] = []
    for layer in layers:
        query_HEN, key_HEN, value_HEN, output_HNE = _heads(read, layer)
        query_HEE, key_HEE, value_HEE = (x @ x.mT for x in (query_HEN, key_HEN, value_HEN))
        output_HEE = output_HNE.mT @ output_HNE
        qk_H = (query_HEE * key_HEE).sum((1, 2)).sqrt()
        ov_H = (output_HEE * value_HEE).sum((1, 2)).sqrt()
        for before, output_BNE, value_BEE, ov_B in earlier:
            kinds = (
                (query_HEN, key_HEE, qk_H),
                (key_HEN, query_HEE, qk_H),
                (value_HEN, output_HEE, ov_H),
            )
            found.append(
                torch.stack([_passed(*kind, output_BNE, value_BEE, ov_B).flatten() for kind in kinds])
            )
            pairs += [
                Pair((before.layer, b), (layer.layer, a)) for a in range(len(qk_H)) for b in range(len(ov_B))
            ]
        earlier.append((layer, output_HNE, value_HEE, ov_H))
    return pairs, torch.cat(found, dim=1) if found else torch.zeros(len(KINDS), 0, dtype=torch.float64)


def _heads(read: Read, layer: Layer) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries, keys and values (H, E, N), outputs (H, N, E); keys and values repeated for all heads that share them."""
    module = layer.module
    gain = read(layer.norm) if layer.norm else 1.0
    width = module.key.rows // layer.groups
    heads = module.query.rows // width

    def split(part: Part) -> Tensor:
        rows_HEN = (read(part) * gain).reshape(part.rows // width, width, part.columns)
        return rows_HEN.repeat_interleave(heads // len(rows_HEN), dim=0)

    output = read(module.output)
    output_HNE = output.reshape(len(output), heads, width).permute(1, 0, 2)
    return split(module.query), split(module.key), split(module.value), output_HNE


def _passed(
    reader_AEN: Tensor, rest_AEE: Tensor, norm_A: Tensor, output_BNE: Tensor, value_BEE: Tensor, ov_B: Tensor
) -> Tensor:
    """The scores of readers and writers: (A, B)."""
    heads, width, _ = reader_AEN.shape
    flat = reader_AEN.flatten(0, 1) @ output_BNE.permute(1, 0, 2).flatten(1)
    m_ABEE = flat.reshape(heads, width, len(output_BNE), -1).permute(0, 2, 1, 3)
    square_AB = ((rest_AEE[:, None] @ m_ABEE @ value_BEE) * m_ABEE).sum((2, 3)).clamp(min=0)
    return square_AB.sqrt() / (norm_A[:, None] * ov_B).clamp(min=_TINY)


# ---------------------------------------------------------------------------------------------- of a family


def composition_drift(towers: Sequence[Tower], names: Sequence[str]) -> Json:
    """By tower and expert: `mean` and `largest` distance of the average's scores from its own, and where that is."""
    found: Json = {}
    for tower in towers:
        merged_KP = tower.mean_KP
        own: Json = {}
        for name in names:
            score_KP = tower.experts[name]
            drift_KP = (merged_KP - score_KP).abs()
            k, p = divmod(int(drift_KP.argmax()), drift_KP.shape[1])
            own[name] = {
                "mean": number(drift_KP.mean()),
                "largest": number(drift_KP[k, p]),
                "kind": KINDS[k],
                "writer": list(tower.pairs[p].writer),
                "reader": list(tower.pairs[p].reader),
                "in_expert": number(score_KP[k, p]),
                "in_average": number(merged_KP[k, p]),
                "in_base": number(tower.base_KP[k, p]),
            }
        found[tower.name.rstrip(".")] = {"by_chance": number(tower.width**-0.5), "experts": own}
    return found


def advice_on_heads(
    towers: Sequence[Tower], names: Sequence[str], members: Sequence[int]
) -> Iterator[Advice]:
    """For each expert whose circuits the average loses: the strongest of them, and how many there are.

    members: the experts that are looked at, among `names`.
    """
    if len(members) < 2:
        return
    for tower in towers:
        chance = tower.width**-0.5
        merged_KP = tower.mean_KP
        for t in members:
            score_KP = tower.experts[names[t]]
            is_circuit_KP = score_KP > _usual(score_KP) + _OUTLIER * _spread(score_KP)
            is_lost_KP = is_circuit_KP & (score_KP - merged_KP > _LOST * (score_KP - chance))
            if is_lost_KP.any():
                yield _on_circuits(tower, names[t], is_lost_KP, len(towers) == 1)


def _usual(score_KP: Tensor) -> Tensor:
    return score_KP.median(dim=1, keepdim=True).values


def _spread(score_KP: Tensor) -> Tensor:
    """The standard deviation of the bulk of the pairs, from their median distance from the median: (K, 1)."""
    return _NORMAL * (score_KP - _usual(score_KP)).abs().median(dim=1, keepdim=True).values


def _on_circuits(tower: Tower, expert: str, is_lost_KP: Tensor, alone: bool) -> Advice:
    score_KP, merged_KP = tower.experts[expert], tower.mean_KP
    k, p = divmod(int((score_KP * is_lost_KP).argmax()), score_KP.shape[1])
    (first, writer), (last, reader) = tower.pairs[p]
    count = int(is_lost_KP.sum())
    place = "" if alone else f" of {tower.name.rstrip('.')}"
    more = f" (and {count - 1} more)" if count > 1 else ""
    return Advice(
        "composition",
        [expert],
        f"expert '{expert}' has heads that pass on what the average of all does not: from head {writer} of layer "
        f"{first} to the {_plural(k)} of head {reader} of layer {last}{place}{more}, {score_KP[k, p]:.2f} becomes "
        f"{merged_KP[k, p]:.2f}, by chance {tower.width**-0.5:.2f}; merge by a sum of task vectors, or give "
        f"'{expert}' more weight in the attention of these layers",
        tower.name,
        (first, last),
    )


def _plural(kind: int) -> str:
    return {"query": "queries", "key": "keys", "value": "values"}[KINDS[kind]]
