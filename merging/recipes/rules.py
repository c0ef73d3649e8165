"""Which tensors are merged, and with which parameters: the recipe's patterns, layers and gradients applied to names."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any, Iterable, Mapping

from mergeline.merging.architecture import Model
from mergeline.merging.recipes.recipe import Part, Recipe, Rule


def is_merged(recipe: Recipe, name: str) -> bool:
    """Whether the recipe merges this tensor."""
    return matches(recipe.include, name) and not matches([*recipe.exclude, *recipe.heads], name)


def is_head(recipe: Recipe, name: str) -> bool:
    """Whether the tensor is each expert's own."""
    return matches(recipe.heads, name)


def parameters_for(recipe: Recipe, name: str, model: Model) -> dict[str, Any]:
    """The parameters of one tensor: the recipe's, with those of every rule that matches, in order."""
    params = dict(recipe.params)
    for rule in recipe.rules:
        _change(params, rule, values_of(rule, name, model), list(recipe.experts))
    return params


def parameters_in_part(
    recipe: Recipe, part: Part, listed: Iterable[str], name: str, layer: int | None, count: int
) -> dict[str, Any]:
    """The parameters of one tensor of a stack's part.

    listed: the parameters that may have a list of one number an expert. layer: of the part's `count`, from 0; None
    outside of layers.
    """
    experts = list(recipe.experts)
    params = dict(recipe.params)
    for key in listed:
        if isinstance(params.get(key), list) and len(params[key]) == len(experts):
            params[key] = [params[key][experts.index(expert)] for expert in part.experts]
    params |= part.params
    for rule in part.rules:
        if matches(rule.match, name):
            _change(params, rule, _values_at(rule, _depth(rule, layer, count)), part.experts)
    return params


def _change(params: dict[str, Any], rule: Rule, values: Mapping[str, Any], experts: list[str]) -> None:
    """What a rule says, of all experts or of one."""
    if rule.expert is not None:
        t = experts.index(rule.expert)
        values = {key: [*params[key][:t], value, *params[key][t + 1 :]] for key, value in values.items()}
    params |= values


def values_of(rule: Rule, name: str, model: Model) -> dict[str, Any]:
    """What a rule says of one tensor."""
    return _values_at(rule, _place(rule, name, model))


def _values_at(rule: Rule, place: float | None) -> dict[str, Any]:
    """What a rule says at a place of its layers; -1 outside of blocks, None where it says nothing."""
    if place is None:
        return {}
    values = dict(rule.params)
    if place >= 0:
        values |= {key: _interpolated(values, place) for key, values in rule.gradient.items()}
    return values


def matches(patterns: Iterable[str], name: str) -> bool:
    """Whether a tensor's name is one of these shell patterns'."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _place(rule: Rule, name: str, model: Model) -> float | None:
    """Where in the rule's layers a tensor stands, from 0 to 1; -1 outside of blocks; None if the rule is not for it."""
    if not matches(rule.match, name):
        return None
    role = model.tensors[name]
    if role.tower is None or role.layer is None:
        return _depth(rule, None, 0)
    return _depth(rule, role.layer, model.layers[role.tower])


def _depth(rule: Rule, layer: int | None, count: int) -> float | None:
    """Where a layer of so many stands in those of a rule, as `_place` says it."""
    if layer is None:
        return None if rule.layers else -1
    first, last = (i % count if -count <= i < 0 else i for i in rule.layers or (0, count - 1))
    if not first <= layer <= last:
        return None
    return (layer - first) / (last - first) if last > first else 0.0


def _interpolated(values: list[float], place: float) -> float:
    position = place * (len(values) - 1)
    left = min(int(position), len(values) - 1)
    right = min(left + 1, len(values) - 1)
    return values[left] + (position - left) * (values[right] - values[left])
