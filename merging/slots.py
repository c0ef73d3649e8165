"""What methods see: one tensor of the merge at a time, block by block, read when it is asked for.

A method names its `unit`: `element` (any stretch of a flattened tensor will do), `row` (whole rows of the last
dimension) or `tensor` (the whole). Blocks of elements and rows are cut at places that depend on the tensor's shape
alone, so that sums over blocks come out the same whatever memory and workers a merge has.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from math import isfinite, prod
from typing import TYPE_CHECKING, Any, Callable, Iterable, Iterator, Literal, Protocol

from merging.errors import UserError
from merging.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from merging.factors import FactorStore

Unit = Literal["element", "row", "tensor"]
UNITS: tuple[Unit, ...] = ("element", "row", "tensor")
# Elements in a block, of all experts together: near a core's caches, or enough to keep an accelerator busy.
_BLOCK, _DEVICE_BLOCK = 1 << 19, 1 << 26
MASK_BYTES = 1 << 26  # what all masks of one tensor may take that are left for another reading of it


def block_elements(experts: int, device: str = "cpu") -> int:
    """About how many elements of a tensor are in a block; all experts' blocks take the same for any number of them."""
    return max(1, (_BLOCK if device == "cpu" else _DEVICE_BLOCK) // max(experts, 1))


def statistic_shape(kind: str, shape: Sequence[int]) -> tuple[int, ...]:
    """The shape of a tensor's statistics: its own; `gram` has a row and a column for each of its columns."""
    return (shape[-1], shape[-1]) if kind == "gram" and shape else tuple(shape)


def all_finite(value: Tensor) -> bool:
    """Whether no element is NaN or Inf."""
    # The sum of finite numbers may overflow, but no sum hides a NaN or Inf; it is six times cheaper than isfinite.
    return isfinite(value.sum().item()) or bool(torch.isfinite(value).all())


class Source(Protocol):
    """Where tensors come from: files, or state dicts in memory."""

    experts: Sequence[str]
    has_base: bool
    seed: int
    device: str
    store: FactorStore | None

    def read(self, origin: str, name: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of a float tensor of an expert or `base`, in the dtype that is computed in."""

    def dtype(self, name: str) -> torch.dtype:
        """What a tensor is read as."""

    def precision(self, name: str) -> torch.dtype:
        """What sums of a tensor over experts are accumulated in."""

    def statistic(self, kind: str, key: str, start: int, stop: int) -> Tensor:
        """Elements of a tensor of the statistics `kind`; the key is `EXPERT INDEX/TENSOR`, or the tensor's name."""

    def has_statistic(self, kind: str, key: str) -> bool:
        """Whether there is such a tensor."""

    def factors(self, origin: str, name: str) -> tuple[Tensor, Tensor] | None:
        """(M, R) and (R, N) in float64, whose product an adapter adds to a tensor; None if that is none."""

    def digest(self, origin: str, name: str) -> str:
        """The hash of a tensor's bytes."""


class Experts(Sequence):
    """The same block of every expert; read one by one, and kept where blocks are small."""

    def __init__(self, count: int, get: Callable[[int], Tensor], keep: bool):
        self._count, self._get = count, get
        self._kept: list[Tensor | None] | None = [None] * count if keep else None
        self._stack: Tensor | None = None

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Tensor]:
        # Not Sequence's own, which would take an IndexError of a method for its end.
        return map(self.__getitem__, range(self._count))

    def __getitem__(self, t: int) -> Tensor:
        if self._kept is None:
            return self._get(t)
        if self._kept[t] is None:
            self._kept[t] = self._get(t)
        return self._kept[t]

    @property
    def stacked(self) -> Tensor:
        """All experts at once: (T, *X)."""
        if self._kept is None:
            return torch.stack(list(self))
        if self._stack is None:
            self._stack = torch.stack(list(self))
            self._kept = list(self._stack)
        return self._stack


class Slot:
    """One block of one tensor, of shape X, in float32 (float64 if an input is).

    name, tensor_shape: of the tensor (0-d tensors have shape (1,)). start: its first element in the flattened
    tensor. base: (X) or None. experts: T times (X). store: for decompositions of the tensor, or None. facts: what the
    method's pre-pass found in the whole model; measured: what it measured in this tensor. reference, changes: what
    base and experts are where a wrapper changed them, as JSON values for the factor store; None if that cannot be said.
    """

    reference: Any = "pretrained"
    changes: list[Any] | None = []
    _wide = False
    _depth = 0  # how often wrappers changed it

    def __init__(self, view: View, start: int, shape: tuple[int, ...], unit: Unit):
        self.view, self.start, self.shape, self.unit = view, start, shape, unit
        self.name, self.tensor_shape = view.name, view.shape
        self.facts: Any = None
        self.measured: Any = None
        self._memo: dict[Any, Any] = {}
        self.store = view.source.store
        stop = start + prod(shape)
        source, keep = view.source, unit != "tensor"

        def read(origin: str) -> Tensor:
            return source.read(origin, view.name, start, stop).reshape(shape)

        names = source.experts
        self.experts = Experts(len(names), lambda t: read(names[t]), keep)
        self._base = (lambda: read("base")) if source.has_base else None
        self._keep = keep

    @property
    def base(self) -> Tensor | None:
        if self._base is None:
            return None
        return self.remember("base", self._base) if self._keep else self._base()

    @property
    def task_vectors(self) -> Tensor:
        """expert - base of all experts: (T, *X)."""

        def subtract() -> Tensor:
            base = self.base
            tau_TX = base.new_empty((len(self.experts), *self.shape))
            for t, expert in enumerate(self.experts):
                torch.sub(expert, base, out=tau_TX[t])
            return tau_TX

        return self.remember("task_vectors", subtract)

    @property
    def elements(self) -> int:
        return prod(self.shape)

    @property
    def dtype(self) -> torch.dtype:
        """What tensors are read as: float32, or float64 if an input is; what a wrapper changed is float64."""
        return torch.float64 if self._wide else self.view.source.dtype(self.name)

    @property
    def precision(self) -> torch.dtype:
        """What sums over experts are accumulated in: float64, or float32 where all inputs have 16 bits."""
        return torch.float64 if self._wide else self.view.source.precision(self.name)

    def remember(self, key: Any, make: Callable[[], Any]) -> Any:
        """`make()`, once a slot."""
        if key not in self._memo:
            self._memo[key] = make()
        return self._memo[key]

    def share(self, key: Any, make: Callable[[], Any]) -> Any:
        """`make()`, once a slot if several points of a sweep are merged from it; a single merge keeps nothing."""
        return self.remember(key, make) if self.view.shared else make()

    def leave_mask(self, key: Any, mask_X: Tensor) -> None:
        """Keep a mask of 0 and 1 until this block is read again, if all of the tensor's take `MASK_BYTES` or less."""
        import numpy as np

        view, key = self.view, self._mask_key(key)
        bits = np.packbits(mask_X.reshape(-1).bool().cpu().numpy())
        if key not in view.masks and view.mask_bytes + bits.nbytes <= MASK_BYTES:
            view.mask_bytes += bits.nbytes
            view.masks[key] = bits

    def left_mask(self, key: Any) -> Tensor | None:
        """The mask that was left, once: (X); None if there is none."""
        import numpy as np

        bits = self.view.masks.pop(self._mask_key(key), None)
        if bits is None:
            return None
        self.view.mask_bytes -= bits.nbytes
        mask_X = torch.from_numpy(np.unpackbits(bits, count=self.elements)).reshape(self.shape)
        return mask_X.to(self.experts[0])

    def _mask_key(self, key: Any) -> Any:
        return self.start, self.elements, self._depth, key

    def statistic(self, kind: str, expert: int | None = None) -> Tensor:
        """This block of a statistics tensor, of one expert or of all: (X); one of another shape as a whole.

        Raises:
            UserError: NaN or Inf among it.
        """
        shape, start = statistic_shape(kind, self.tensor_shape), 0
        if shape == self.tensor_shape:
            shape, start = self.shape, self.start
        key = self._key(expert)
        found = self.view.source.statistic(kind, key, start, start + prod(shape)).reshape(shape)
        if not all_finite(found):
            raise UserError(f"statistics '{kind}': tensor '{key}' holds NaN or Inf; gather them again")
        return found

    def positive_statistic(self, kind: str, expert: int) -> Tensor:
        """`statistic` of squares (raises UserError if one is negative), in the dtype that is computed in: (X)."""
        found = self.statistic(kind, expert)
        if found.min() < 0:
            raise UserError(
                f"statistics '{kind}': tensor '{self._key(expert)}' holds negative numbers, but squares are expected"
            )
        return found.to(torch.promote_types(found.dtype, self.dtype))

    def has_statistic(self, kind: str, expert: int | None = None) -> bool:
        """Whether the statistics hold this tensor."""
        return self.view.source.has_statistic(kind, self._key(expert))

    def _key(self, expert: int | None) -> str:
        return self.name if expert is None else f"{expert}/{self.name}"

    def factors(self, t: int) -> tuple[Tensor, Tensor] | None:
        """(M, R) and (R, N) in float64, whose product expert t, an adapter, adds to this whole tensor.

        R is 0 if it leaves it as it is; None if what it adds is no product, or it is no adapter.
        """
        source = self.view.source
        return source.factors(source.experts[t], self.name)

    def given(self, facts: Any, measured: Any) -> Slot:
        """The same block with other facts."""
        other = Slot.__new__(Slot)
        other.__dict__ |= self.__dict__
        other.facts, other.measured = facts, measured
        return other

    def with_experts(
        self, change: Callable[[int, Tensor], Tensor], wide: bool = False, keep: bool = False
    ) -> Slot:
        """The same block of changed experts: `change(index, expert)`; `wide`: in float64; `keep`: computed once."""
        other = self.given(self.facts, self.measured)
        other._memo, other._depth = {}, self._depth + 1
        other._wide = self._wide or wide
        other.experts = Experts(
            len(self.experts), lambda t: change(t, self.experts[t]), self._keep or keep
        )
        if wide and not self._wide and self._base:
            other._base = lambda: self.base.double()
        return other

    def with_base(self, base_X: Tensor, reference: Any) -> Slot:
        """The same block around another base, in float64."""
        other = self.with_experts(lambda _, expert_X: expert_X.double(), wide=True)
        base_X = base_X.double()
        other._base, other.reference = lambda: base_X, reference
        return other

    def instead(self, shape: tuple[int, ...], base: Tensor, expert: Callable[[int], Tensor]) -> Slot:
        """Other tensors in the place of this whole one: `expert(index)`, and what stands for the base."""
        other = self.given(self.facts, self.measured)
        other._memo, other._depth = {}, self._depth + 1
        other.store = None  # whose entries are of the tensors themselves
        other.shape = other.tensor_shape = shape
        other._base = lambda: base
        other.experts = Experts(len(self.experts), expert, keep=False)
        return other

    def blocks(self, unit: Unit) -> Iterator[Slot]:
        """The block cut into those of a smaller unit, at the places where its tensor is cut."""
        if UNITS.index(unit) >= UNITS.index(self.unit):
            yield self
            return
        experts, base_X = Experts(len(self.experts), self.experts.__getitem__, keep=True), self.base
        for start, shape in _cuts(self.view, self.elements, unit, self.tensor_shape[-1]):

            def part(whole_X: Tensor, first: int = start, shape: tuple[int, ...] = shape) -> Tensor:
                return whole_X.reshape(-1)[first : first + prod(shape)].reshape(shape)

            other = self.given(self.facts, self.measured)
            other.start, other.shape, other.unit, other._memo = self.start + start, shape, unit, {}
            other.experts = Experts(len(experts), lambda t, part=part: part(experts[t]), keep=True)
            other._base = None if base_X is None else lambda part=part: part(base_X)
            other._keep = True
            yield other


def _cuts(view: View, elements: int, unit: Unit, last: int) -> Iterator[tuple[int, tuple[int, ...]]]:
    """Where blocks of elements or rows of length `last` begin in so many elements, and their shapes."""
    width = last if unit == "row" else 1
    step = max(1, block_elements(len(view.source.experts), view.source.device) // width) * width
    for start in range(0, elements, step):
        size = min(step, elements - start)
        yield start, (size // width, width) if unit == "row" else (size,)


class View:
    """One tensor of a merge, to be read block by block as often as needed."""

    def __init__(self, source: Source, name: str, shape: Sequence[int], shared: bool = False):
        self.source, self.name, self.shared = source, name, shared
        self.shape = tuple(shape) or (1,)
        self.masks: dict[Any, Any] = {}  # bits that slots leave for each other
        self.mask_bytes = 0

    @property
    def elements(self) -> int:
        return prod(self.shape)

    def blocks(self, unit: Unit) -> Iterator[Slot]:
        """The tensor cut into blocks: (n,), (rows, last dimension), or the tensor's own shape."""
        if not self.elements:
            return
        if unit == "tensor":
            yield Slot(self, 0, self.shape, unit)
            return
        for start, shape in _cuts(self, self.elements, unit, self.shape[-1]):
            yield Slot(self, start, shape, unit)


class ChangedView(View):
    """A view whose blocks pass through `change` first, which needs them to be of `unit` or larger.

    `keep`: the changed tensor is kept, if it is one block, to be cut again. `reshapes`: it may come out in another
    shape, which is found out when it is asked for.
    """

    def __init__(
        self,
        view: View,
        change: Callable[[Slot], Slot],
        unit: Unit = "element",
        keep: bool = False,
        reshapes: bool = False,
    ):
        super().__init__(view.source, view.name, view.shape, view.shared)
        self._view, self._unit, self._change = view, unit, change
        self._keep = keep and unit == "tensor"
        self._kept: list[Slot] | None = None
        if reshapes:
            del self.shape

    @cached_property
    def shape(self) -> tuple[int, ...]:
        return next((x.shape for x in self.blocks("tensor")), (0,))

    def blocks(self, unit: Unit) -> Iterator[Slot]:
        larger = max(unit, self._unit, key=UNITS.index)
        changed: Iterable[Slot] = map(self._change, self._view.blocks(larger))
        if self._keep:
            changed = self._kept = self._kept or list(changed)
        for x in changed:
            if x.elements:
                yield from x.blocks(unit)


class Inputs:
    """All float tensors that a merge merges, but empty ones: what a pre-pass may read, as often as it likes."""

    def __init__(self, views: Iterable[View], run: Callable[[Callable, Iterable], Iterable]):
        self.views = [view for view in views if view.elements]
        self._run = run

    @property
    def elements(self) -> int:
        return sum(self.each(lambda view: view.elements))

    def each(self, function: Callable[[View], Any]) -> Iterable[Any]:
        """`function` of every view, in their order; computed by all workers."""
        return self._run(function, self.views)

    def only(self, wanted: Callable[[View], bool]) -> Inputs:
        """Some of the tensors."""
        return Inputs(filter(wanted, self.views), self._run)

    def changed(self, change: Callable[[View], View]) -> Inputs:
        other = Inputs([], self._run)
        other.views = [change(view) for view in self.views]  # whose shapes are not asked for yet
        return other
