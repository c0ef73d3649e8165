"""What a search with a budget says in params.yaml: who proposes points, how many, and out of what.

A point is a method and parameters. Of a space each entry is a list of choices, a range, or one of both for each expert.
"""

from __future__ import annotations

import math
from itertools import product
from typing import Annotated, Any, Iterator, Literal, Mapping, NamedTuple

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

from mergeline.merging.recipes.recipe import MOST_POINTS, Seed, unfolded

_KEYS = ("sampler", "budget", "space", "methods", "first", "race")  # that a grid has no lists under

Number = Annotated[float, Field(allow_inf_nan=False)]


class Setting(NamedTuple):
    """A method and its parameters."""

    method: str
    params: dict[str, Any]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Range(_Strict):
    """Numbers from `low` to `high`, both among them.

    log: evenly by their logarithms. step: only low, low + step, ... integer: only whole numbers.
    """

    low: Number
    high: Number
    log: bool = False
    step: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    integer: bool = False

    @model_validator(mode="after")
    def _sound(self) -> Range:
        if self.low >= self.high:
            raise ValueError(f"low {self.low:g} must be less than high {self.high:g}")
        if self.log and self.low <= 0:
            raise ValueError("a logarithmic range begins above 0")
        if self.log and self.step is not None:
            raise ValueError("a logarithmic range has no step; leave one of the two out")
        if self.integer and not all(float(n).is_integer() for n in (self.low, self.high, self.step or 1)):
            raise ValueError("low, high and step of an integer range are whole numbers")
        return self

    @property
    def ends(self) -> list[Any]:
        """Its smallest and its largest value."""
        return [int(self.low), int(self.high)] if self.integer else [self.low, self.high]

    @property
    def size(self) -> float:
        """How many values it has."""
        step = self.step or (1.0 if self.integer else 0.0)
        return 1 + math.floor((self.high - self.low) / step + 1e-9) if step else math.inf

    def holds(self, value: Any) -> bool:
        """Whether a value is one of its own; that it is off the steps is no matter."""
        number = isinstance(value, int | float) and not isinstance(value, bool)
        whole = not self.integer or isinstance(value, int)
        return number and whole and self.low <= value <= self.high


def _kind_of_entry(value: Any) -> str | None:
    if isinstance(value, list):
        return "[choices]"
    if isinstance(value, Each) or (isinstance(value, dict) and "each" in value):
        return "[each]"
    return "[range]" if isinstance(value, Range | dict) else None


Choices = Annotated[list[Any], Field(min_length=1)]
_Single = Annotated[Choices, Tag("[choices]")] | Annotated[Range, Tag("[range]")]
_KIND_OF_ENTRY = Discriminator(
    _kind_of_entry,
    custom_error_type="entry",
    custom_error_message="must be a list of choices, or a range such as {low: 0.1, high: 2}",
)


class Each(_Strict):
    """A list with a number for each expert, all out of the same."""

    each: Annotated[_Single, _KIND_OF_ENTRY]


def _kind_of_first(value: Any) -> str | None:
    return "[points]" if isinstance(value, list) else "[grid]" if isinstance(value, dict) else None


Entry = Annotated[_Single | Annotated[Each, Tag("[each]")], _KIND_OF_ENTRY]
Space = dict[str, Entry]
First = Annotated[
    Annotated[list[dict[str, Any]], Tag("[points]")] | Annotated[dict[str, Choices], Tag("[grid]")],
    Discriminator(
        _kind_of_first,
        custom_error_type="first",
        custom_error_message="must be a list of points, or a grid such as {scale: [0.5, 1.0]}",
    ),
]


def is_ordered(entry: Any) -> bool:
    """Whether neighbouring values are alike: of a range, and of choices that are ascending numbers."""
    if isinstance(entry, Each):
        return is_ordered(entry.each)
    if isinstance(entry, Range):
        return True
    plain = all(isinstance(one, int | float) and not isinstance(one, bool) for one in entry)
    return plain and all(a < b for a, b in zip(entry, entry[1:]))


def edges(entry: Any, experts: int) -> list[Any]:
    """Values of an entry that are allowed only if all are: its choices, or the ends of its range."""
    if isinstance(entry, Each):
        return [[value] * experts for value in edges(entry.each, experts)]
    return entry.ends if isinstance(entry, Range) else list(entry)


def holds(entry: Any, value: Any, experts: int) -> bool:
    """Whether a value is one of an entry's."""
    if isinstance(entry, Each):
        fits = isinstance(value, list) and len(value) == experts
        return fits and all(holds(entry.each, one, experts) for one in value)
    return entry.holds(value) if isinstance(entry, Range) else value in entry


def numbers(space: Mapping[str, Any], experts: int) -> int:
    """How many values of a point are varied."""
    varied = [entry for key, entry in space.items() if size({key: entry}, experts) > 1]
    return sum(experts if isinstance(entry, Each) else 1 for entry in varied)


def size(space: Mapping[str, Any], experts: int) -> float:
    """How many points a space has, maybe infinitely many."""

    def of(entry: Any) -> float:
        if isinstance(entry, Each):
            return of(entry.each) ** experts
        return entry.size if isinstance(entry, Range) else len(entry)

    return math.prod(map(of, space.values()))


def sampled(search: Search, space: Mapping[str, Any], experts: int) -> int:
    """How many points of a search by `map` lie all over the space; the others on the front that these foretell."""
    from mergeline.merging.algebra.surrogate import enough

    assert search.budget.points
    return max(math.ceil(search.budget.points * 2 / 3), enough(numbers(space, experts)))


class Branch(_Strict):
    """A method, what is fixed and what is varied of its parameters.

    first: points that are tried first, in whatever order they stand; or a grid of them, as a search without a budget
    has it. What a point leaves out the sampler fills in.
    """

    method: str
    params: dict[str, Any] = {}
    space: Space = {}
    first: First = []

    @model_validator(mode="before")
    @classmethod
    def _unfold(cls, data: Any) -> Any:
        if isinstance(data, dict) and isinstance(data.get("method"), str):
            params = data.get("params", {})
            method, params = unfolded(data["method"], params if isinstance(params, dict) else {})
            return {**data, "method": method, "params": params}
        return data

    @property
    def first_points(self) -> list[dict[str, Any]]:
        """The points of `first`."""
        if isinstance(self.first, dict):
            return [dict(zip(self.first, values)) for values in product(*self.first.values())]
        return list(self.first)

    def settings(self, experts: int) -> Iterator[Setting]:
        """One for each combination of what is chosen and no number; numbers are at the first of their edges.

        What a method needs besides its experts depends on such choices alone.
        """
        at = {key: edges(entry, experts) for key, entry in self.space.items()}
        few = {key: values[:1] if is_ordered(self.space[key]) else values for key, values in at.items()}
        for values in product(*few.values()):
            yield Setting(self.method, {**self.params, **dict(zip(few, values))})


class Budget(_Strict):
    """When a search ends: after so many points, after so many minutes, or after as many examples as so many points
    have on validation, of which a race leaves some out.
    """

    points: Annotated[int, Field(gt=0, le=MOST_POINTS)] | None = None
    minutes: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    evaluations: Annotated[float, Field(gt=0, le=MOST_POINTS)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _points(cls, data: Any) -> Any:
        return data if isinstance(data, dict | Budget) else {"points": data}

    @model_validator(mode="after")
    def _one(self) -> Budget:
        if len(self.model_fields_set) != 1 or None in (getattr(self, key) for key in self.model_fields_set):
            raise ValueError("write a number of points, {minutes: M} or {evaluations: E}")
        return self

    @property
    def words(self) -> str:
        """What it is, for people."""
        [(unit, value)] = self.model_dump(exclude_none=True).items()
        return f"{value:g} {unit.removesuffix('s') if value == 1 else unit}"


class Race(_Strict):
    """A point is measured on a growing part of the validation examples, and dropped when it is surely worse than the
    best so far.

    error: the largest probability with which a point is dropped that is as good as that one on all examples. looks: how
    often the two are compared, the last time on half of them, each time before on half of that.
    """

    error: Annotated[float, Field(gt=0, lt=0.5)] = 0.05
    looks: Annotated[int, Field(ge=1, le=12)] = 5


class Search(_Strict):
    """A search with a budget; without one, `search` is a grid.

    sampler: `tpe`, a tree of Parzen estimators; `cmaes`, over numbers alone; `nsga2`, a genetic algorithm over all
    tasks, for a front of merges of which none is better on every task; `map`, for such a front by quadratics that are
    fitted to two thirds of the points; `random`.
    seed: of the sampler; the pipeline's unless it is given.
    space, first: of the merge's own method; methods: several, of each of which points are tried.
    race: `true`, or what is other than usual of it.
    """

    sampler: Literal["tpe", "cmaes", "nsga2", "map", "random"]
    budget: Budget
    seed: Seed | None = None
    space: Space = {}
    first: First = []
    methods: list[Branch] = []
    race: Race | None = None

    @model_validator(mode="before")
    @classmethod
    def _usual_race(cls, data: Any) -> Any:
        if isinstance(data, dict) and isinstance(data.get("race"), bool):
            return {**data, "race": {} if data["race"] else None}
        return data

    @model_validator(mode="after")
    def _sound(self) -> Search:
        if self.methods and (self.space or self.first):
            raise ValueError("several methods have a space and first points each; say them there")
        if not self.methods and not self.space:
            raise ValueError("the space is empty; name a parameter and its range, or list methods")
        if self.race and self.has_front:
            raise ValueError(
                "a race drops points by their mean, and with them parts of the front; leave race out"
            )
        return self

    @property
    def has_front(self) -> bool:
        """Whether it looks for a front over all tasks."""
        return self.sampler in ("nsga2", "map")

    @property
    def place(self) -> list[str]:
        """Where its spaces stand."""
        return ["methods"] if self.methods else []

    def branches(self, method: str, params: Mapping[str, Any]) -> list[Branch]:
        """Its methods; the merge's own where it names none."""
        if self.methods:
            return self.methods
        return [Branch(method=method, params=dict(params), space=self.space, first=self.first)]


def kind_of_search(value: Any) -> str:
    """The tag of what stands under `search`: a grid has lists of values alone."""
    if isinstance(value, Search):
        return "[budget]"
    told = isinstance(value, dict) and any(
        key in value and (key in ("space", "methods") or not isinstance(value[key], list)) for key in _KEYS
    )
    return "[budget]" if told else "[grid]"
