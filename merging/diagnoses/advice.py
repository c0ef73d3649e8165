"""What to do about a fault: a sentence, where the fault is, and rules of a recipe that mend it."""

from __future__ import annotations

import glob
from dataclasses import asdict, dataclass, field
from typing import Any, Iterable, Iterator, NamedTuple, Sequence

Json = dict[str, Any]

_NAMED = 3  # experts that a sentence names before it counts the others


@dataclass(frozen=True)
class Advice:
    """diagnosis: the section that has its numbers. experts: whom it is about. layers: the first and the last, of one
    tower; None for the whole model. rules: of a recipe whose `params` have a list `weights` of all experts."""

    diagnosis: str
    experts: list[str]
    sentence: str
    tower: str | None = None
    layers: tuple[int, int] | None = None
    rules: list[Json] = field(default_factory=list)

    def as_json(self) -> Json:
        return asdict(self)


class Span(NamedTuple):
    """Neighbouring blocks of a tower; `alone`: the model has no other tower."""

    tower: str
    first: int
    last: int
    alone: bool

    def __str__(self) -> str:
        layers = f"layer {self.first}" if self.first == self.last else f"layers {self.first}-{self.last}"
        return layers if self.alone else f"{layers} of {self.tower.rstrip('.')}"

    def rule(self, expert: str, weight: float) -> Json:
        """The rule of a recipe that gives an expert this weight in these blocks."""
        match = {} if self.alone else {"match": f"{glob.escape(self.tower)}*"}
        return {"expert": expert, **match, "layers": [self.first, self.last], "params": {"weights": weight}}

    def has(self, place: tuple[str, int] | None) -> bool:
        return place is not None and place[0] == self.tower and self.first <= place[1] <= self.last


def spans(places: Iterable[tuple[str, int]], towers: int) -> Iterator[Span]:
    """The runs of neighbours among blocks of a model of so many towers."""
    first: tuple[str, int] | None = None
    last: tuple[str, int] | None = None
    for place in [*sorted(set(places)), None]:
        if last is not None and place != (last[0], last[1] + 1):
            assert first is not None
            yield Span(first[0], first[1], last[1], towers == 1)
            first = None
        first, last = first or place, place


def quoted(names: Sequence[str]) -> str:
    """`'a', 'b' and 'c'`; of many, the first and how many more."""
    shown = [f"'{name}'" for name in names[:_NAMED]]
    if len(names) > _NAMED:
        return f"{', '.join(shown)} and {len(names) - _NAMED} more"
    return " and ".join(filter(None, [", ".join(shown[:-1]), *shown[-1:]]))
