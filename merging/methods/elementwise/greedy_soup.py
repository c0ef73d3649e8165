"""Greedy soup: the mean of those experts that a search accepted."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Iterator, Mapping

from mergeline.merging.algebra import sums
from mergeline.merging.algebra.slots import Slot
from mergeline.merging.methods.contract import method
from mergeline.merging.methods.parameters import Count

if TYPE_CHECKING:
    from torch import Tensor


def _wrong(params: Mapping[str, Any], experts: int) -> Iterator[str]:
    members = params["members"]
    if members is None or (members and sorted(set(members)) == sorted(members) and max(members) < experts):
        return
    yield f"members {members}: name one or more of the {experts} experts, each once, counted from 0"


@method(paper="2203.05482", code="mlfoundations/model-soups@d5398f18", reference="none", check=_wrong)
def greedy_soup(x: Slot, *, members: list[Count] | None = None) -> Tensor:
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
    return sums.mean([x.experts[t] for t in chosen], x.precision)
