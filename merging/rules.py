"""Which tensors are merged, and with which parameters: the recipe's patterns, layers and gradients applied to names."""

from __future__ import annotations

import re
from fnmatch import fnmatchcase
from typing import Any, Iterable, Mapping

from merging.recipe import Recipe, Rule

_BLOCK = re.compile(r"^(.*?(?:^|\.))(\d+)\.")


def block_of(name: str) -> tuple[str, int] | None:
    """The tower (what stands before the first number) and the block index of a tensor, or None outside of blocks."""
    found = _BLOCK.match(name)
    return (found.group(1), int(found.group(2))) if found else None


def block_counts(names: Iterable[str]) -> dict[str, int]:
    """How many blocks each tower of a model has."""
    counts: dict[str, int] = {}
    for tower, index in filter(None, map(block_of, names)):
        counts[tower] = max(counts.get(tower, 0), index + 1)
    return counts


def depth(name: str, counts: Mapping[str, int]) -> float | None:
    """Where a tensor stands between the first block of its tower (0) and the last (1); None outside of blocks."""
    block = block_of(name)
    return block[1] / max(1, counts[block[0]] - 1) if block else None


def is_merged(recipe: Recipe, name: str) -> bool:
    """Whether the recipe merges this tensor."""
    return _matches(recipe.include, name) and not _matches(recipe.exclude, name)


def parameters_for(recipe: Recipe, name: str, counts: Mapping[str, int]) -> dict[str, Any]:
    """The parameters of one tensor: the recipe's, with those of every rule that matches, in order."""
    params = dict(recipe.params)
    for rule in recipe.rules:
        values = values_of(rule, name, counts)
        if rule.expert is not None:
            t = list(recipe.experts).index(rule.expert)
            values = {key: [*params[key][:t], value, *params[key][t + 1 :]] for key, value in values.items()}
        params |= values
    return params


def values_of(rule: Rule, name: str, counts: Mapping[str, int]) -> dict[str, Any]:
    """What a rule says of one tensor."""
    place = _place(rule, name, counts)
    if place is None:
        return {}
    values = dict(rule.params)
    if place >= 0:
        values |= {key: _interpolated(values, place) for key, values in rule.gradient.items()}
    return values


def _matches(patterns: Iterable[str], name: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _place(rule: Rule, name: str, counts: Mapping[str, int]) -> float | None:
    """Where in the rule's layers a tensor stands, from 0 to 1; -1 outside of blocks; None if the rule is not for it."""
    if not _matches(rule.match, name):
        return None
    block = block_of(name)
    if block is None:
        return None if rule.layers else -1
    index, count = block[1], counts[block[0]]
    first, last = (i % count if -count <= i < 0 else i for i in rule.layers or (0, count - 1))
    if not first <= index <= last:
        return None
    return (index - first) / (last - first) if last > first else 0.0


def _interpolated(values: list[float], place: float) -> float:
    position = place * (len(values) - 1)
    left = min(int(position), len(values) - 1)
    right = min(left + 1, len(values) - 1)
    return values[left] + (position - left) * (values[right] - values[left])
