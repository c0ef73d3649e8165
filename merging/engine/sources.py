"""Where the tensors of a merge come from: checkpoint files, or state dicts in memory.

Everything is hashed, and looked at for NaN and Inf, the first time it is read from its beginning to its end.
"""

from __future__ import annotations

import threading
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING, Iterator, Mapping, Sequence

from mergeline.merging.algebra.slots import View, all_finite, block_elements
from mergeline.merging.architecture import Model, describe
from mergeline.merging.checkpoints.adapters import AdaptedTensor, composed, is_bare
from mergeline.merging.checkpoints.checkpoint import (
    DTYPES,
    Checkpoint,
    Files,
    TensorInfo,
    content_digest,
    hasher,
)
from mergeline.merging.errors import UserError
from mergeline.merging.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from mergeline.merging.algebra.slots import FactorStore
    from mergeline.merging.engine.plan import Entry, Plan

State = Mapping[str, "Tensor"]


class _FirstReading:
    """Watches the first sequential reading of a tensor, whichever threads read it."""

    def __init__(self) -> None:
        self.position = 0
        self.hash = hasher()
        self.lock = threading.Lock()


class _Source:
    """What files and memory have in common; subclasses give the stored elements."""

    experts: Sequence[str]
    has_base: bool

    def __init__(self, seed: int, device: str, store: FactorStore | None):
        self.seed, self.device, self.store = seed, device, store
        self.hashes: dict[tuple[str, str], str] = {}
        self._readings: dict[tuple[str, str], _FirstReading] = {}

    def stored(self, origin: str, name: str, start: int, stop: int) -> Tensor:
        raise NotImplementedError

    def length(self, origin: str, name: str) -> int:
        raise NotImplementedError

    def dtype(self, name: str) -> torch.dtype:
        raise NotImplementedError

    def precision(self, name: str) -> torch.dtype:
        raise NotImplementedError

    def raw(self, origin: str, name: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) in their stored dtype, hashed if this continues the first reading."""
        return self._watched(origin, name, start, stop, None)[0]

    def read(self, origin: str, name: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) as the float32 or float64 that is computed in, on the device.

        Raises:
            UserError: NaN or Inf among them.
        """
        value = self._watched(origin, name, start, stop, self.dtype(name))[1]
        assert value is not None, "it is there if a dtype is asked for"
        return value

    def _watched(
        self, origin: str, name: str, start: int, stop: int, dtype: torch.dtype | None
    ) -> tuple[Tensor, Tensor | None]:
        key = (origin, name)
        stored = self.stored(origin, name, start, stop)
        value = None if dtype is None else stored.to(self.device, dtype, non_blocking=True)
        if key in self.hashes:
            return stored, value
        reading = self._readings.setdefault(key, _FirstReading())
        with reading.lock:
            if reading.position == start:
                if value is not None:
                    refuse_nonfinite(origin, name, value)
                reading.hash.update(stored.view(torch.uint8).numpy().data)
                reading.position = stop
                if stop == self.length(origin, name):
                    self.hashes[key] = reading.hash.hexdigest()
                    self._readings.pop(key, None)
        return stored, value

    def digest(self, origin: str, name: str) -> str:
        """The hash of a tensor's bytes; reads it if that was not yet done."""
        if (origin, name) not in self.hashes:
            self._readings.pop((origin, name), None)
            read = self.read if self.stored(origin, name, 0, 0).is_floating_point() else self.raw
            for start, stop in _blocks(self.length(origin, name)):
                read(origin, name, start, stop)
        return self.hashes[origin, name]

    def copied(self, origins: Sequence[str], name: str, largest: bool) -> Iterator[Tensor]:
        """A tensor that is copied, block by block; of an integer counter the `largest` values.

        Raises:
            UserError: the origins differ in what is no counter; NaN or Inf in one.
        """
        for start, stop in _blocks(self.length(origins[0], name)):
            value, *others = (self.raw(origin, name, start, stop) for origin in origins)
            for origin, copied in zip(origins, (value, *others)):
                refuse_nonfinite(origin, name, copied)
            for origin, other in zip(origins[1:], others):
                if largest:
                    value = torch.maximum(value, other)
                elif not torch.equal(other, value):
                    raise UserError(
                        f"'{origin}': the integer tensor '{name}' differs from the others; only floats can be merged; "
                        f"take one's with `keep`, or leave it out with --exclude '{name}'"
                    )
            yield value


def no_factors(shape: Sequence[int], device: str) -> tuple[Tensor, Tensor]:
    """Factors (M, 0) and (0, N): of what an adapter does not change."""
    left_M0 = torch.zeros(shape[0] if shape else 1, 0, dtype=torch.float64, device=device)
    return left_M0, torch.zeros(0, prod(shape[1:]), dtype=torch.float64, device=device)


def _blocks(length: int) -> Iterator[tuple[int, int]]:
    step = block_elements(1)
    for start in range(0, max(length, 1), step):
        yield start, min(start + step, length)


def refuse_nonfinite(origin: str, name: str, value: Tensor) -> None:
    """Raises UserError for NaN or Inf in the tensor `name` of a checkpoint."""
    if not value.is_floating_point() or all_finite(value.float() if value.dtype.itemsize == 1 else value):
        return  # torch adds up no 8-bit floats
    kind = "NaN" if torch.isnan(value).any() else "Inf"
    raise UserError(f"'{origin}': tensor '{name}' holds {kind}; leave this checkpoint out or repair it")


class FileInputs(_Source, Files):
    """The checkpoints of a plan."""

    def __init__(self, plan: Plan, device: str = "cpu", store: FactorStore | None = None):
        _Source.__init__(self, plan.recipe.seed, device, store)
        Files.__init__(self)
        self.plan = plan
        self.experts = list(plan.experts)
        self.has_base = plan.base is not None
        self._checkpoints = plan.checkpoints
        self._entries = {entry.name: entry for entry in plan.entries}

    def view(self, entry: Entry) -> View:
        experts, has_base = list(entry.sources), entry.base is not None
        return View(self, entry.name, entry.spec.shape, experts=experts, has_base=has_base, model=entry.model)

    def _info(self, origin: str, name: str) -> TensorInfo:
        """Where a tensor of the plan is read, of an expert or the base."""
        entry = self._entries.get(name)
        info = entry and (entry.base if origin == "base" else entry.sources.get(origin))
        return info or self._checkpoints[origin].tensors[name]

    def stored(self, origin: str, name: str, start: int, stop: int) -> Tensor:
        return self._info(origin, name).read(self.elements, start, stop)

    def read_into(self, out: Tensor, origin: str, name: str, start: int) -> None:
        """Elements from `start` on as `read` gives them, into all of a contiguous tensor (n,)."""
        info = self._info(origin, name)
        # What was looked at before, and needs no conversion, is read to its place.
        seen, plain = (origin, name) in self.hashes, info.is_stored and out.device.type == "cpu"
        if seen and plain and getattr(torch, DTYPES[info.dtype][0]) == out.dtype:
            self.fill(out.view(torch.uint8), info, start * out.itemsize)
        else:
            out.copy_(self.read(origin, name, start, start + len(out)))

    def statistic(self, kind: str, key: str, start: int, stop: int) -> Tensor:
        return self.plan.statistic(kind, key).read(self.elements, start, stop).to(self.device)

    def has_statistic(self, kind: str, key: str) -> bool:
        checkpoint, key = self.plan.statistics_of(kind, key)
        return key in checkpoint.tensors

    def statistic_shape(self, kind: str, key: str) -> tuple[int, ...]:
        return self.plan.statistic(kind, key).shape

    def factors(self, origin: str, name: str) -> tuple[Tensor, Tensor] | None:
        info = self._info(origin, name)
        if self.plan.onto or self.plan.stack:  # what they add is not added to this base
            return None
        if self.has_base and info is self._checkpoints["base"].tensors.get(name):
            return no_factors(info.shape, self.device)
        found = info.factors(self.elements) if isinstance(info, AdaptedTensor) else None
        for factor in found or ():
            refuse_nonfinite(origin, name, factor)
        return found and (found[0].to(self.device), found[1].to(self.device))

    def length(self, origin: str, name: str) -> int:
        return prod(self._info(origin, name).shape)

    def dtype(self, name: str) -> torch.dtype:
        return torch.float64 if "F64" in self._dtypes(name) else torch.float32

    def precision(self, name: str) -> torch.dtype:
        return torch.float32 if self._dtypes(name) <= {"BF16", "F16"} else torch.float64

    def _dtypes(self, name: str) -> set[str]:
        return self._entries[name].dtypes if name in self._entries else set()

    def whole(self, origin: str, name: str) -> Tensor:
        """A tensor as it is stored (raises UserError for NaN or Inf)."""
        value = self.raw(origin, name, 0, self.length(origin, name))
        refuse_nonfinite(origin, name, value)
        info = self._info(origin, name)
        return value.to(getattr(torch, DTYPES[info.dtype][0])).reshape(info.shape)

    def checkpoint_digest(self, origin: str) -> str:
        """The digest of a whole checkpoint, of which everything was read."""
        checkpoint: Checkpoint = self._checkpoints[origin]
        stored = checkpoint.stored
        # Of a stack a tensor may have been read under other names, or as the base of some of its parts.
        read = {(t.file, t.start, t.stop): n for n, t in checkpoint.tensors.items() if t.is_stored}
        names = {name: read.get((t.file, t.start, t.stop)) for name, t in stored.tensors.items()}
        return content_digest(
            (t.name, t.dtype, t.shape,
             self._read_as_base(origin, t)
             or (self.digest(origin, own) if (own := names[name]) else stored.tensor_hash(name)))
            for name, t in stored.tensors.items()
        )  # fmt: skip

    def _read_as_base(self, origin: str, info: TensorInfo) -> str | None:
        """The hash of an expert's tensor that was read as the base of a stack's part."""
        if origin == "base" or not self.plan.stack:
            return None
        return self._hashes_of_bases.get(id(info))

    @cached_property
    def _hashes_of_bases(self) -> dict[int, str]:
        read = [(id(e.base), ("base", e.name)) for e in self.plan.entries if e.base]
        return {info: self.hashes[key] for info, key in read if key in self.hashes}


class MemoryInputs(_Source):
    """State dicts."""

    def __init__(
        self,
        experts: Mapping[str, State],
        base: State | None,
        statistics: Mapping[str, State | Sequence[State]],
        seed: int,
        store: FactorStore | None = None,
        delta: bool = False,
        device: str = "cpu",
    ):
        """delta: bare factors of adapters stand for what they add, where there is no base."""
        super().__init__(seed, device, store)
        self._factors: dict[str, dict[str, tuple[Tensor, Tensor]]] = {}
        for name, state in experts.items():
            if is_bare(state) and (delta or base is not None):
                state, self._factors[name] = composed(state, base)
                experts = {**experts, name: state}
        self.experts = list(experts)
        self.has_base = base is not None
        self.states = {**experts, **({} if base is None else {"base": base})}
        self._statistics = statistics
        self._flat: dict[tuple[str, str], Tensor] = {}
        self.first = experts[self.experts[0]] if self.experts else {}
        self.names = sorted(self.first)
        for name in self.experts:
            self._match(name, experts[name])
        if base is not None:
            self._match("base", {k: base[k] for k in base if k in self.first})

    def _match(self, source: str, state: State) -> None:
        odd = sorted(set(state) ^ set(self.first))
        if odd:
            raise UserError(f"'{source}': tensor '{odd[0]}' is not in every state dict")
        for name, tensor in state.items():
            like = self.first[name]
            if tensor.shape != like.shape:
                raise UserError(
                    f"tensor '{name}': shape {list(tensor.shape)} in '{source}', {list(like.shape)} elsewhere"
                )
            if tensor.is_floating_point() != like.is_floating_point():
                raise UserError(f"tensor '{name}': {tensor.dtype} in '{source}', {like.dtype} elsewhere")

    @cached_property
    def model(self) -> Model:
        """What the tensors are."""
        return describe({name: tuple(tensor.shape) for name, tensor in self.first.items()})

    def view(self, name: str) -> View:
        return View(self, name, self.first[name].shape, model=self.model)

    def stored(self, origin: str, name: str, start: int, stop: int) -> Tensor:
        key = (origin, name)
        if key not in self._flat:
            self._flat[key] = self.states[origin][name].detach().cpu().reshape(-1)
        return self._flat[key][start:stop]

    def statistic(self, kind: str, key: str, start: int, stop: int) -> Tensor:
        state, name = self._statistics_of(kind, key)
        if name not in state:
            raise UserError(f"statistics '{kind}': tensor '{key}' is missing")
        return state[name].detach().cpu().reshape(-1)[start:stop].to(self.device)

    def has_statistic(self, kind: str, key: str) -> bool:
        state, name = self._statistics_of(kind, key)
        return name in state

    def statistic_shape(self, kind: str, key: str) -> tuple[int, ...]:
        state, name = self._statistics_of(kind, key)
        return tuple(state[name].shape)

    def _statistics_of(self, kind: str, key: str) -> tuple[State, str]:
        given = self._statistics[kind]
        if isinstance(given, Mapping):
            return given, key
        expert, _, name = key.partition("/")
        return given[int(expert)], name

    def factors(self, origin: str, name: str) -> tuple[Tensor, Tensor] | None:
        factors = self._factors.get(origin)
        if factors is None:
            return None
        left_MR, right_RN = factors.get(name) or no_factors(self.states[origin][name].shape, self.device)
        return left_MR.to(self.device), right_RN.to(self.device)

    def length(self, origin: str, name: str) -> int:
        return self.states[origin][name].numel()

    def dtype(self, name: str) -> torch.dtype:
        return torch.float64 if torch.float64 in self._dtypes(name) else torch.float32

    def precision(self, name: str) -> torch.dtype:
        return torch.float32 if self._dtypes(name) <= {torch.bfloat16, torch.float16} else torch.float64

    def _dtypes(self, name: str) -> set[torch.dtype]:
        return {state[name].dtype for state in self.states.values() if name in state}
