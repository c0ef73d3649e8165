"""What parameters of methods can be: types that several methods share, and what the engine reads off a type."""

from __future__ import annotations

from dataclasses import dataclass
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt

Share = Annotated[float, Gt(0), Le(1)]
Rate = Annotated[float, Ge(0), Le(1)]
BelowOne = Annotated[float, Ge(0), Lt(1)]
Positive = Annotated[float, Gt(0)]
NotNegative = Annotated[float, Ge(0)]
TaskRank = Share | Literal["1/T"]  # of directions, what one task gets: a share, or one of equal ones
Count = Annotated[int, Ge(0)]
PositiveCount = Annotated[int, Ge(1)]
Other = Literal["pretrained", "mean", "sum"]  # what tensors without matrix treatment add to the reference


@dataclass(frozen=True)
class OneAnExpert:
    """Marks lists that have one entry an expert, in their order."""


@dataclass(frozen=True)
class AnExpert:
    """Marks the number of an expert, from 0."""


Weights = Annotated[list[float], OneAnExpert()]
Shares = Annotated[list[Share], OneAnExpert()]
Rates = Annotated[list[Rate], OneAnExpert()]
Task = Annotated[int, Ge(0), AnExpert()]


def is_marked(annotation: Any, mark: type) -> bool:
    """Whether a type, or one of a union's, carries a mark."""
    if get_origin(annotation) is Annotated:
        first, *marks = get_args(annotation)
        return any(isinstance(m, mark) for m in marks) or is_marked(first, mark)
    if get_origin(annotation) in (Union, UnionType):
        return any(is_marked(one, mark) for one in get_args(annotation))
    return False
