"""Which class of a model is which label of the data: by name where both have names, else by number."""

from __future__ import annotations

import re
from typing import Any, Mapping, Sequence

from mergeline.merging.errors import UserError


def matched(
    task: str, config: Mapping[str, Any], classes: int, names: Sequence[str] | None
) -> list[int] | None:
    """The label of the data for each of the C classes of a head; None where they are the same numbers.

    config: of the expert, whose `id2label` names its classes; names such as LABEL_0 say nothing. names: of the data's
    labels, in their order.

    Raises:
        UserError: the two have other numbers of classes.
    """
    if names is None:
        return None
    if len(names) != classes:
        raise UserError(f"{task}: the data have {len(names)} classes, the head of its expert {classes}")
    own = config.get("id2label")
    if not isinstance(own, dict) or {*own} != {str(i) for i in range(classes)}:
        return None
    mine = [_plain(own[str(i)]) for i in range(classes)]
    theirs = [_plain(name) for name in names]
    if sorted(mine) != sorted(theirs) or len({*mine}) != classes:
        return None
    found = [theirs.index(name) for name in mine]
    return None if found == [*range(classes)] else found


def refuse_labels(task: str, split: str, highest: int, classes: int) -> None:
    """Raises UserError where the data have a label that no class of the head stands for."""
    if highest >= classes:
        raise UserError(
            f"{task}: label {highest} in {split}, but the head of its expert has {classes} classes"
        )


def _plain(name: Any) -> str:
    return re.sub(r"[\W_]+", " ", str(name)).strip().casefold()
