"""All that is diagnosed in a family's weights, and what to do about it."""

from __future__ import annotations

from typing import Any, Collection, Sequence

from mergeline.merging.diagnoses.heads import Tower, advice_on_heads, composition_drift
from mergeline.merging.diagnoses.interference import advice_on_interference, interference
from mergeline.merging.diagnoses.kinship import (
    advice_on_kinship,
    advice_on_origins,
    kinship,
    of_another_base,
    unchanged,
)
from mergeline.merging.diagnoses.scopes import advice_on_scopes, scopes
from mergeline.merging.diagnoses.sums import Layer, Sums, TensorSums

Json = dict[str, Any]


def diagnose(
    layers: Sequence[Layer[TensorSums]],
    whole: Sums,
    names: Sequence[str],
    locked: Collection[str],
    towers: Sequence[Tower] = (),
) -> Json:
    """The numbers of each diagnosis by layer (in the order of `layers`) and expert, and `advice`.

    towers: what heads pass on, where it was measured; `composition` is empty where it was not.
    Experts of another base, such as equal it and those that are `locked` are named once, and left out of the rest.
    """
    apart = {*of_another_base(whole), *unchanged(whole)}
    members = [t for t, name in enumerate(names) if t not in apart and name not in locked]
    advice = [
        *advice_on_origins(whole, names),
        *advice_on_kinship(layers, whole, names, members),
        *advice_on_interference(layers, names, members),
        *advice_on_heads(towers, names, members),
        # Last, for of two rules the later wins: what is left out stays so.
        *advice_on_scopes(layers, names, members),
    ]
    return {
        "advice": [found.as_json() for found in advice],
        "scopes": scopes(layers),
        "interference": interference(layers),
        "kinship": kinship(layers, whole),
        "composition": composition_drift(towers, names),
    }
