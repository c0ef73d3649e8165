"""Soft prompts as experts: rows without order are matched to a reference, what belongs to class names is left out.

Text prompts (CoOp, CoCoOp) get the positions of a text: row i of all experts is merged. Visual prompts (VPT, UPT) are
put beside image patches that have their positions already: any order of their rows, in each layer, is the same prompt,
and of two prompts the nearest rows belong together. MVLPT (Shen et al. 2022, arXiv 2211.11720), whose
trainers/mvlpt.py has all of them and drops the buffers of class names when it loads; VPT (Jia et al. 2022, arXiv
2203.12119).

Shape suffixes: L layers, P rows of a prompt, D their width.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Callable, Iterator, Mapping

from mergeline.merging.algebra.assignment import matched
from mergeline.merging.architecture import Role, prompt_role
from mergeline.merging.checkpoints.checkpoint import Checkpoint, TensorInfo
from mergeline.merging.checkpoints.computed import ComputedTensor, Elements
from mergeline.merging.engine.plan import Plan
from mergeline.merging.errors import UserError
from mergeline.merging.lazy import torch
from mergeline.merging.recipes.rules import is_merged

if TYPE_CHECKING:
    from torch import Tensor

_OF_CLASSES = ("token_prefix", "token_suffix")
_PROJECTION = "mvlpt_proj"  # of UPT, through which text and visual prompts go
_MOST_ROWS = 4096  # an assignment takes their cube
_BLOCK = 1 << 22  # elements that are compared at once

Roles = Mapping[str, Role]


@dataclass(frozen=True)
class MatchedRows(ComputedTensor):
    """A prompt (L, P, D) whose rows are, layer by layer, in the order in which they are nearest to the reference's."""

    source: TensorInfo = field(kw_only=True)
    reference: TensorInfo = field(kw_only=True)

    @property
    def nbytes(self) -> int:
        """What is read for it."""
        return self.source.nbytes + self.reference.nbytes

    @property
    def computing_bytes(self) -> int:
        """Memory for the products of all rows of a layer, for both prompts, and for the rows in order."""
        rows, numbers = self.shape[1], prod(self.shape)
        return 8 * (3 * rows**2 + 4 * numbers)

    @property
    def files(self) -> set[Path]:
        return self.source.files | self.reference.files

    def bytes_in(self, counts: Callable[[Path], bool]) -> int:
        return self.source.bytes_in(counts) + self.reference.bytes_in(counts)

    def read(self, elements: Elements, start: int, stop: int) -> Tensor:
        known = vars(self._last).pop("made", None)
        made: Tensor = known[1] if known else self._ordered(elements)
        if stop < prod(self.shape):
            self._last.made = None, made
        self._noted()
        return made[start:stop]

    def _ordered(self, elements: Elements) -> Tensor:
        own_LPD, like_LPD = (
            info.read(elements, 0, prod(info.shape)).reshape(self.shape)
            for info in (self.source, self.reference)
        )
        if not (own_LPD.isfinite().all() and like_LPD.isfinite().all()):
            return own_LPD.reshape(-1)  # nothing is nearest; the engine refuses it by its name
        layers = zip(own_LPD, like_LPD)
        ordered = [own_PD[matched([like_PD.double()], [own_PD.double()])] for own_PD, like_PD in layers]
        return torch.stack(ordered).reshape(-1) if ordered else own_LPD.reshape(-1)


@dataclass(frozen=True)
class ClassContexts(ComputedTensor):
    """Contexts (C, P, D) of C classes, given only if buffers of their names are the reference's.

    buffers: pairs of both. misfit: what is said if they differ.
    """

    source: TensorInfo = field(kw_only=True)
    buffers: tuple[tuple[TensorInfo, TensorInfo], ...] = field(kw_only=True)
    misfit: str = field(kw_only=True)
    _same: threading.Event = field(default_factory=threading.Event, repr=False, compare=False, kw_only=True)

    @property
    def nbytes(self) -> int:
        """What is read for it."""
        return self.source.nbytes + sum(info.nbytes for pair in self.buffers for info in pair)

    def read(self, elements: Elements, start: int, stop: int) -> Tensor:
        """As of any tensor (raises UserError for other classes)."""
        if not self._same.is_set():
            for own, like in self.buffers:
                for first in range(0, prod(own.shape), _BLOCK):
                    last = min(first + _BLOCK, prod(own.shape))
                    found = (info.read(elements, first, last).double() for info in (own, like))
                    if not torch.equal(*found):
                        raise UserError(self.misfit)
            self._same.set()
        return self.source.read(elements, start, stop)


def read_prompts(plan: Plan) -> None:
    """Make checkpoints of soft prompts comparable, if the plan is of such; what was done becomes notes of the plan."""
    names = {name: info.shape for c in plan.checkpoints.values() for name, info in c.tensors.items()}
    roles = {name: role for name, shape in names.items() if (role := prompt_role(name, shape))}
    if not roles:
        return
    like = next(iter(plan.checkpoints))
    reference = plan.checkpoints[like]
    views = {}
    for who, checkpoint in plan.checkpoints.items():
        tensors = dict(checkpoint.tensors)
        if who != like:
            tensors |= _of_classes(plan, roles, (who, checkpoint), (like, reference))
            tensors |= _matched(plan, roles, (who, checkpoint), (like, reference))
        views[who] = _without_buffers(plan, who, checkpoint, tensors)
    if not plan.base and any(_PROJECTION in name for name in names):
        plan.warnings.append(
            f"prompts go through each expert's own {_PROJECTION}: name what their training began with as base, or they "
            "are of spaces that differ"
        )
    plan.base = views.pop("base", None)
    plan.experts = views


def _without_buffers(
    plan: Plan, who: str, checkpoint: Checkpoint, tensors: dict[str, TensorInfo]
) -> Checkpoint:
    """A view of these tensors without what belongs to class names."""
    buffers = [name for name in tensors if name.rpartition(".")[2] in _OF_CLASSES]
    if buffers:
        plan.warnings.append(f"'{who}': what belongs to its class names is left out: {', '.join(buffers)}")
    kept = {name: info for name, info in tensors.items() if name not in buffers}
    return checkpoint if kept == checkpoint.tensors else checkpoint.view(kept)


def _matched(
    plan: Plan, roles: Roles, one: tuple[str, Checkpoint], other: tuple[str, Checkpoint]
) -> dict[str, TensorInfo]:
    """The prompts of one checkpoint whose rows have no order, in that of the other."""
    (who, own), (like, reference) = one, other
    found: dict[str, TensorInfo] = {}
    for name, info, theirs in _shared(plan, roles, Role.UNORDERED_PROMPT, own, reference):
        if info.shape != theirs.shape or not (info.is_float and theirs.is_float):
            continue  # which the plan refuses
        if info.shape[1] > _MOST_ROWS and plan.recipe.prompt_rows == "matched":
            plan.problems.append(
                f"'{name}' has {info.shape[1]} rows, too many to match them: set prompt_rows: as_stored"
            )
            continue
        at = (info.file, info.start, info.stop)
        found[name] = MatchedRows(name, info.dtype, info.shape, *at, source=info, reference=theirs)
    if not found:
        return {}
    said = f"'{who}': rows of {', '.join(found)} have no order"
    if plan.recipe.prompt_rows == "as_stored":
        plan.warnings.append(f"{said}, but are merged where they lie, as prompt_rows says")
        return {}
    plan.warnings.append(f"{said}: those nearest to the rows of '{like}' take their places, layer by layer")
    return found


def _of_classes(
    plan: Plan, roles: Roles, one: tuple[str, Checkpoint], other: tuple[str, Checkpoint]
) -> dict[str, TensorInfo]:
    """The contexts of one checkpoint that are of single classes, which must be those of the other."""
    (who, own), (like, reference) = one, other
    found: dict[str, TensorInfo] = {}
    for name, info, theirs in _shared(plan, roles, Role.PROMPT, own, reference):
        if len(info.shape) != 3 or len(theirs.shape) != 3:
            continue
        misfit = (
            f"'{name}' of '{who}' has a context for each class, and its classes are not those of '{like}': such "
            "prompts are merged of one list of classes alone; leave it out with --exclude"
        )
        prefix = name.rpartition(".")[0]
        names = [f"{prefix}.{buffer}".lstrip(".") for buffer in _OF_CLASSES]
        pairs = [
            (own.tensors[n], reference.tensors[n])
            for n in names
            if n in own.tensors and n in reference.tensors
        ]
        if info.shape[0] != theirs.shape[0] or any(a.shape != b.shape for a, b in pairs):
            plan.problems.append(misfit)
        elif not pairs:
            plan.warnings.append(
                f"'{who}': '{name}' has a context for each of {info.shape[0]} classes, and no {names[-1]} says of "
                f"which: they are taken for those of '{like}', in their order"
            )
        else:
            at = (info.file, info.start, info.stop)
            found[name] = ClassContexts(
                name, info.dtype, info.shape, *at, source=info, buffers=tuple(pairs), misfit=misfit
            )
    return found


def _shared(
    plan: Plan, roles: Roles, role: Role, own: Checkpoint, reference: Checkpoint
) -> Iterator[tuple[str, TensorInfo, TensorInfo]]:
    """The prompts of a kind that two checkpoints have, and that are merged: the name, and what each has."""
    for name in sorted(own.tensors.keys() & reference.tensors.keys()):
        if roles.get(name) is role and is_merged(plan.recipe, name):
            yield name, own.tensors[name], reference.tensors[name]
