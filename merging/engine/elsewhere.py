"""Units of work in other processes, which are told paths and numbers alone: their plans, and looks at the model.

A look goes on from what it found in all tensors before, by functions that are made as it goes. These are not sent: the
other process runs the look again from its start, is told what each of its earlier questions gave, and answers the next
one for the tensors of its unit.
"""

from __future__ import annotations

import json
import platform
from concurrent.futures import Executor, Future, as_completed, wait
from contextlib import contextmanager
from copy import deepcopy
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Iterable, Iterator, Mapping, NamedTuple, Sequence

from mergeline.merging.algebra.slots import Runner, View, integer_sum
from mergeline.merging.engine.blocks import look_at_model
from mergeline.merging.engine.cache import FolderStore, store_at
from mergeline.merging.engine.machine import keep_freed_memory, one_thread
from mergeline.merging.engine.manifest import identity, versions
from mergeline.merging.engine.plan import Plan
from mergeline.merging.engine.planning import make_plan
from mergeline.merging.engine.sources import FileInputs
from mergeline.merging.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

# What another process reads for one unit of work, at most and at least, if there is so much.
_UNIT_BYTES, _LEAST_BYTES = 1 << 28, 1 << 23
_UNITS = 64  # so that workers are busy to the end
_ITEM_BYTES = 4  # about
Hashes = dict[tuple[str, str], str]  # of what was read, by origin and tensor


class Address(NamedTuple):
    """What another process makes a plan from; plain data.

    recipe: its paths absolute. identity: of the recipe and its files. factors: the folder of decompositions, or "".
    """

    recipe: dict[str, Any]
    identity: str
    device: str
    versions: dict[str, str]
    factors: str


def address_of(plan: Plan, source: FileInputs) -> Address:
    """What to tell another process of a plan (raises UserError for inputs whose data is not in files here)."""
    if plan.bytes_over_network:
        raise UserError(
            "other processes read files alone, and the data of an input is not here; leave --no-cache out"
        )
    recipe = _absolute(plan.recipe.model_dump())
    factors = str(source.store.folder.absolute()) if isinstance(source.store, FolderStore) else ""
    return Address(recipe, identity(plan, source.device), source.device, versions(), factors)


def _absolute(value: Any) -> Any:
    """The same as JSON values, with absolute paths: other processes may stand in other folders."""
    if isinstance(value, Path):
        return str(value.absolute())
    if isinstance(value, dict):
        return {key: _absolute(one) for key, one in value.items()}
    return [*map(_absolute, value)] if isinstance(value, list | tuple) else value


def plan_at(address: Address) -> Plan:
    """The plan of an address, made once a process and state of its files.

    Raises:
        UserError: this process has other versions of what merges, or does not see the same files.
    """
    refuse_other_versions(address.versions)
    return _made(json.dumps(address.recipe), address.identity)  # experts have an order


def refuse_other_versions(wanted: Mapping[str, str]) -> None:
    """In another process: raises UserError if what computes there is not what computes here."""
    own = versions()
    for name, version in wanted.items():
        if own[name] != version:
            raise UserError(
                f"the worker on {platform.node()} has {name} {own[name]}, and here is {version}; install the same there"
            )


@lru_cache(maxsize=8)
def _made(recipe: str, _identity: str) -> Plan:
    plan = make_plan(json.loads(recipe))
    try:
        plan.check()
    except UserError as error:
        raise UserError(
            f"the worker on {platform.node()} does not see what is seen here ({error}); workers need the same files "
            "under the same paths"
        ) from None
    return plan


@contextmanager
def inputs_at(address: Address, plan: Plan, hashes: Hashes) -> Iterator[FileInputs]:
    """What a unit of work reads, on one thread; `hashes` are known."""
    keep_freed_memory()
    store = store_at(address.factors or None)
    with one_thread(plan.is_spectral), FileInputs(plan, address.device, store) as source:
        source.hashes |= hashes
        yield source


def in_units(sizes: Sequence[int]) -> Iterator[list[int]]:
    """The indexes of work in its order, in sets of about the same number of bytes."""
    most = min(_UNIT_BYTES, max(_LEAST_BYTES, sum(sizes) // _UNITS))
    size, unit = 0, []
    for i, own in enumerate(sizes):
        unit.append(i)
        size += own
        if size >= most:
            yield unit
            size, unit = 0, []
    if unit:
        yield unit


@contextmanager
def stopped_together(futures: Iterable[Future[Any]]) -> Iterator[None]:
    """If the block fails, none of these units of work is left running."""
    try:
        yield
    except BaseException:
        for future in futures:
            future.cancel()
        wait(futures)  # nothing may write into a folder that is about to be left or removed
        raise


# ---------------------------------------------------------------------------------------------- looks


class Elsewhere(Runner):
    """The workers of an executor, who answer the questions of a look; `hashes` are told to them, and grow."""

    def __init__(self, executor: Executor, address: Address, hashes: Hashes):
        super().__init__()
        self._executor, self._address, self._hashes = executor, address, hashes
        self._known: list[Any] = []  # what each question gave

    def each(self, function: Callable[[View], Any], views: Sequence[View]) -> list[Any]:
        return self._remembered([found for unit in self._ask(views, False) for found in unit])

    def total(self, function: Callable[[View], Tensor], views: Sequence[View]) -> Tensor:
        return self._remembered(integer_sum(self._ask(views, True)))

    def _remembered(self, found: Any) -> Any:
        self._known.append(deepcopy(found))  # the look may go on with it in place
        return found

    def _ask(self, views: Sequence[View], total: bool) -> Iterator[Any]:
        """What the next question gives in each unit of views, in their order."""
        futures = []
        for unit in in_units([_ITEM_BYTES * view.elements_read * (len(view.experts) + 1) for view in views]):
            names = {views[i].stored_name for i in unit}
            hashes = {key: hash for key, hash in self._hashes.items() if key[1] in names}
            futures.append(
                self._executor.submit(look_unit, self._address, [*self._known], unit, total, hashes)
            )
        with stopped_together(futures):
            for future in as_completed(futures):
                self._hashes |= future.result()[1]
        return (future.result()[0] for future in futures)


class _Answer(BaseException):
    """Ends a look that was run for one of its questions; no look handles it."""

    def __init__(self, found: Any):
        self.found = found


class _Again(Runner):
    """Gives a look what its earlier questions gave, and answers the next one for some of the views."""

    def __init__(self, known: Sequence[Any], unit: Sequence[int], total: bool):
        super().__init__()
        self._known, self._unit, self._total = iter(known), unit, total

    def each(self, function: Callable[[View], Any], views: Sequence[View]) -> Any:
        for found in self._known:
            return found
        answers = (function(views[i]) for i in self._unit)
        raise _Answer(integer_sum(answers) if self._total else list(answers))

    total = each


def look_unit(
    address: Address, known: Sequence[Any], unit: Sequence[int], total: bool, hashes: Hashes
) -> tuple[Any, Hashes]:
    """In another process: the next answer to a look for the views of a unit, and the hashes of what was read for it."""
    plan = plan_at(address)
    with inputs_at(address, plan, hashes) as source:
        views = [source.view(entry) for entry in plan.merged]
        try:
            look_at_model(plan.bound, views, _Again(known, unit, total), {})
        except _Answer as answer:
            return answer.found, {key: hash for key, hash in source.hashes.items() if key not in hashes}
    raise AssertionError("the look asks fewer questions here")
