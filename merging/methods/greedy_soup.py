"""Greedy soup: the mean of those experts that a search accepted."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Mapping

from annotated_types import Ge

from merging import operators as ops
from merging.methods import method
from merging.slots import Slot

if TYPE_CHECKING:
    from torch import Tensor


def _wrong(params: Mapping[str, Any], experts: int) -> str | None:
    members = params["members"]
    if members is None or (members and sorted(set(members)) == sorted(members) and max(members) < experts):
        return None
    return f"members {members}: name one or more of the {experts} experts, each once, counted from 0"


@method(
    family="elementwise",
    paper="2203.05482",
    code="mlfoundations/model-soups@d5398f18",
    reference="mean",
    check=_wrong,
)
def greedy_soup(x: Slot, *, members: list[Annotated[int, Ge(0)]] | None = None) -> Tensor:
    """The mean of the experts whose indices `members` lists; of all by default.

    Formula:
        mean of the θₜ with t in members
    Parameters:
        members: indices of the experts that are averaged, from 0; by default all
    Needs:
        a search on held-out data, to say who is a member
    Trap:
        By itself it is the mean of all: the greedy part is the search, which accepts an expert only if the
        score of the mean rises.
    """
    chosen = range(len(x.experts)) if members is None else sorted(members)
    return ops.mean([x.experts[t] for t in chosen], x.precision)
