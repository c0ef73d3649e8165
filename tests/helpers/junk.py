"""JSON with anything in the place of anything."""

from __future__ import annotations

import copy
from typing import Any, Iterator

JUNK = [
    None, True, -1, 0, 0.5, 10**9, 10**30, 1e308, "", "x", "../../x", "a\0b", "\x1b[2J\n", [], ["x"], [[1]], [None], {},
    {"x": "y"},
]  # fmt: skip


def places(value: Any, way: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The ways to all values in a JSON value, itself first."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [way, *(place for key, one in inner for place in places(one, (*way, key)))]


def junked(value: Any) -> Iterator[tuple[tuple[Any, ...], Any, Any]]:
    """A JSON value with one of its values replaced by junk: where, by what, and what it is then."""
    for way in places(value):
        for junk in JUNK:
            changed = copy.deepcopy(value)
            if way:
                inner = changed
                for key in way[:-1]:
                    inner = inner[key]
                inner[way[-1]] = junk
            else:
                changed = junk
            if changed != value:
                yield way, junk, changed
