"""What methods see: one tensor of the merge at a time, block by block, read when it is asked for.

A block is of a `unit`: `element` (any stretch of a flattened tensor), `row` (whole rows of the last dimension) or
`tensor` (the whole). Blocks of elements and rows are cut at places that depend on the tensor's shape alone, so that
sums over blocks come out the same whatever memory and workers a merge has.

What a slot gives is read-only.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property, partial
from itertools import groupby
from math import isfinite, prod
from typing import TYPE_CHECKING, Any, Callable, Iterable, Iterator, Literal, Protocol

from mergeline.merging.algebra.statistics import STATISTICS
from mergeline.merging.algebra.sums import mean
from mergeline.merging.architecture import Keys, Matrix, Model, TensorRole, describe, layer_of
from mergeline.merging.errors import UserError
from mergeline.merging.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

Unit = Literal["element", "row", "tensor"]
UNITS: tuple[Unit, ...] = ("element", "row", "tensor")
# Elements in a block, of all experts together: near a core's caches, or enough to keep an accelerator busy.
_BLOCK, _DEVICE_BLOCK = 1 << 19, 1 << 26
MASK_BYTES = 1 << 26  # what all masks of one tensor may take that are left for another reading of it


def block_elements(experts: int, device: str = "cpu") -> int:
    """About how many elements of a tensor are in a block; all experts' blocks take the same for any number of them."""
    return max(1, (_BLOCK if device == "cpu" else _DEVICE_BLOCK) // max(experts, 1))


def all_finite(value: Tensor) -> bool:
    """Whether no element is NaN or Inf."""
    # The sum of finite numbers may overflow, but no sum hides a NaN or Inf; it is six times cheaper than isfinite.
    return isfinite(value.sum().item()) or bool(torch.isfinite(value).all())


class FactorStore(Protocol):
    """What costs much to compute, kept by a key that is plain JSON data."""

    def recall(self, key: Any, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """What is kept under `key`; if nothing is, `make()`, which is kept."""
        ...


class Source(Protocol):
    """Where tensors come from: files, or state dicts in memory."""

    experts: Sequence[str]
    has_base: bool
    seed: int
    device: str
    store: FactorStore | None

    def read(self, origin: str, name: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of a float tensor of an expert or `base`, in the dtype that is computed in."""
        ...

    def dtype(self, name: str) -> torch.dtype:
        """What a tensor is read as."""
        ...

    def precision(self, name: str) -> torch.dtype:
        """What sums of a tensor over experts are accumulated in."""
        ...

    def statistic(self, kind: str, key: str, start: int, stop: int) -> Tensor:
        """Elements of a tensor of the statistics `kind`; the key is `EXPERT INDEX/TENSOR`, or the tensor's name."""
        ...

    def has_statistic(self, kind: str, key: str) -> bool:
        """Whether there is such a tensor."""
        ...

    def statistic_shape(self, kind: str, key: str) -> tuple[int, ...]:
        """The shape of such a tensor."""
        ...

    def factors(self, origin: str, name: str) -> tuple[Tensor, Tensor] | None:
        """(M, R) and (R, N) in float64, whose product an adapter adds to a tensor; None if that is none."""
        ...

    def digest(self, origin: str, name: str) -> str:
        """The hash of a tensor's bytes."""
        ...


class Experts:
    """The same block of every expert; read one by one, and kept where blocks are small."""

    def __init__(self, count: int, get: Callable[[int], Tensor], keep: bool):
        self._count, self._get = count, get
        self._kept: list[Tensor | None] | None = [None] * count if keep else None
        self._stack: Tensor | None = None

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Tensor]:
        # Not Python's own by index, which would take an IndexError of a method for its end.
        return map(self.__getitem__, range(self._count))

    def __getitem__(self, t: int) -> Tensor:
        if self._kept is None:
            return self._get(t)
        found = self._kept[t]
        if found is None:
            found = self._kept[t] = self._get(t)
        return found

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

    name, tensor_shape: of the tensor (0-d tensors have shape (1,)). start: its first element in the flattened tensor.
    base: (X) or None. experts: T times (X). reference: what task vectors are measured from, (X): the base, unless the
    method declares another. store: for decompositions of the tensor, or None. found: what the method's look found.
    setting: the method with its parameters but the scale, as text. base_is, reference_is, changes: what base,
    reference and experts are where they are not the model's own, as JSON values; None if that cannot be said.
    """

    base_is: Any = "pretrained"
    reference_is: Any = "pretrained"
    changes: list[Any] | None = []
    setting = ""
    found: Any = None
    _make_reference: Callable[[], Tensor] | None = None
    _wide = False
    _depth = 0  # how often wrappers changed it

    def __init__(self, view: View, start: int, shape: tuple[int, ...], unit: Unit):
        self.view, self.start, self.shape, self.unit = view, start, shape, unit
        self.name, self.tensor_shape = view.name, view.shape
        self._memo: dict[Any, Any] = {}
        self.store = view.source.store
        names, keep = view.experts, unit != "tensor"
        self.experts = Experts(len(names), lambda t: view.read(names[t], start, shape), keep)
        self._base = (lambda: view.read("base", start, shape)) if view.has_base else None
        self._keep = keep

    @property
    def base(self) -> Tensor | None:
        if self._base is None:
            return None
        return self.remember("base", self._base) if self._keep else self._base()

    @cached_property
    def reference(self) -> Tensor:
        made = self._make_reference() if self._make_reference else self.base
        if made is None:
            raise UserError(
                f"tensor '{self.name}': its method measures from a base, and there is none: name it (--base)"
            )
        return made

    @property
    def has_base(self) -> bool:
        return self._base is not None

    @property
    def task_vectors(self) -> Tensor:
        """expert - reference of all experts: (T, *X)."""

        def subtract() -> Tensor:
            reference = self.reference
            tau_TX = reference.new_empty((len(self.experts), *self.shape))
            for t, expert in enumerate(self.experts):
                torch.sub(expert, reference, out=tau_TX[t])
            return tau_TX

        return self.remember(("task vectors", json.dumps(self.reference_is)), subtract)

    @property
    def elements(self) -> int:
        return prod(self.shape)

    @property
    def dtype(self) -> torch.dtype:
        """What tensors are read as: float32, or float64 if an input is; what a wrapper changed is float64."""
        return torch.float64 if self._wide else self.view.source.dtype(self.view.stored_name)

    @property
    def precision(self) -> torch.dtype:
        """What sums over experts are accumulated in: float64, or float32 where all inputs have 16 bits."""
        return torch.float64 if self._wide else self.view.source.precision(self.view.stored_name)

    # ------------------------------------------------------------------------------------------ remembered

    def once(self, function: Callable[..., Any], *args: Any) -> Any:
        """`function(slot, *args)`, computed once a slot and reference."""
        return self.remember(self._key_of(function, args), lambda: function(self, *args))

    def shared(self, function: Callable[..., Any], *args: Any) -> Any:
        """The same if several points of a sweep are merged from the slot; of a single merge nothing is kept."""
        return self.once(function, *args) if self.view.shared else function(self, *args)

    def remember(self, key: Any, make: Callable[[], Any]) -> Any:
        """`make()`, once a slot and key."""
        if key not in self._memo:
            self._memo[key] = make()
        return self._memo[key]

    def _key_of(self, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        # 1, 1.0 and True are equal, and mean different things.
        return function, tuple((type(arg), arg) for arg in args), json.dumps(self.reference_is)

    def leave_mask(self, t: int, mask_X: Tensor) -> None:
        """Keep a mask of 0 and 1 until this block is read again, if all of the tensor's take `MASK_BYTES` or less."""
        import numpy as np

        view, key = self.view, self._mask_key(t)
        bits = np.packbits(mask_X.reshape(-1).bool().cpu().numpy())
        if key not in view.masks and view.mask_bytes + bits.nbytes <= MASK_BYTES:
            view.mask_bytes += bits.nbytes
            view.masks[key] = bits

    def left_mask(self, t: int) -> Tensor | None:
        """The mask that was left under a number, once: (X); None if there is none."""
        import numpy as np

        bits = self.view.masks.pop(self._mask_key(t), None)
        if bits is None:
            return None
        self.view.mask_bytes -= bits.nbytes
        mask_X = torch.from_numpy(np.unpackbits(bits, count=self.elements)).reshape(self.shape)
        return mask_X.to(self.experts[0])

    def _mask_key(self, t: int) -> Any:
        return self.start, self.elements, self._depth, self.setting, t

    # ------------------------------------------------------------------------------------------ statistics, adapters

    def statistic(self, kind: str, expert: int | None = None) -> Tensor:
        """This block of a statistics tensor, of one expert or of all: (X); one of another shape as a whole.

        Raises:
            UserError: NaN or Inf among it, or a negative number where its kind has none.
        """
        declared, key = STATISTICS[kind], self._key(expert)
        found = self.view.statistic(kind, key, self.start, self.shape)
        if not all_finite(found):
            raise UserError(f"statistics '{kind}': tensor '{key}' holds NaN or Inf; gather them again")
        if not declared.positive:
            return found
        if found.numel() and found.min() < 0:
            raise UserError(
                f"statistics '{kind}': tensor '{key}' holds negative numbers, but squares are expected"
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
        return self.view.factors(t)

    def digest(self, origin: str) -> str:
        """The hash of the bytes that the tensor is read from, of an expert or `base`."""
        return self.view.source.digest(origin, self.view.stored_name)

    # ------------------------------------------------------------------------------------------ other slots

    def _copy(self) -> Slot:
        other = Slot.__new__(Slot)
        other.__dict__ |= self.__dict__
        other.__dict__.pop("reference", None)
        return other

    def _fresh(self) -> Slot:
        """A copy that remembers nothing, and whose reference is its base."""
        other = self._copy()
        other._memo, other._depth = {}, self._depth + 1
        other._make_reference, other.reference_is = None, "pretrained"
        return other

    def given(self, found: Any, setting: str) -> Slot:
        """The same block as a method with this setting sees it, with what its look found."""
        other = self._copy()
        other.found, other.setting = found, setting
        return other

    def measured_from(self, reference: Callable[[], Tensor], reference_is: Any) -> Slot:
        """The same block with another reference, which is made when it is asked for."""
        other = self._copy()
        other._make_reference, other.reference_is = reference, reference_is
        return other

    def from_mean(self) -> Slot:
        """The same block, its task vectors measured from the mean of the experts, float64."""
        return self.measured_from(lambda: self.shared(_mean), "mean")

    def from_base(self) -> Slot:
        """The same block, its task vectors measured from the base, float64."""
        return self.measured_from(self._base_in_float64, "pretrained")

    def _base_in_float64(self) -> Tensor:
        base = self.base
        assert base is not None, "there is no base"
        return base.double()

    def with_experts(
        self, change: Callable[[int, Tensor], Tensor], wide: bool = False, keep: bool = False
    ) -> Slot:
        """The same block of changed experts: `change(index, expert)`; `wide`: in float64; `keep`: computed once."""
        other = self._fresh()
        other._wide = self._wide or wide
        other.experts = Experts(len(self.experts), lambda t: change(t, self.experts[t]), self._keep or keep)
        if wide and not self._wide and self._base:
            other._base = self._base_in_float64
        return other

    def with_task_vectors(
        self, vector: Callable[[int], Tensor], wide: bool = False, keep: bool = False
    ) -> Slot:
        """The same block of experts whose task vectors are `vector(index)`, new tensors; see `with_experts`."""
        return self.with_experts(lambda t, _: vector(t).add_(self.reference), wide, keep)

    def moved_by(self, update_X: Tensor) -> Slot:
        """The same block, its task vectors measured from the reference with an update added, float64."""
        return self.measured_from(lambda: self.reference + update_X.double(), None)

    def with_base(self, base_X: Tensor, base_is: Any) -> Slot:
        """The same block around another base, in float64."""
        other = self.with_experts(lambda _, expert_X: expert_X.double(), wide=True)
        base_X = base_X.double()
        other._base, other.base_is = lambda: base_X, base_is
        return other

    def replaced(self, shape: tuple[int, ...], base: Tensor, expert: Callable[[int], Tensor]) -> Slot:
        """Other tensors in the place of this whole one: `expert(index)`, and what stands for the base."""
        other = self._fresh()
        other.store = None  # whose entries are of the tensors themselves
        other.shape = other.tensor_shape = shape
        other._base = lambda: base
        other.experts = Experts(len(self.experts), expert, keep=False)
        return other

    def alike(self, name: str) -> Slot:
        """The whole matrix of this name, as `View.alike` has it.

        Raises:
            UserError: this one is what a wrapper made of its tensor, which says nothing of another.
        """
        if self.changes != [] or self.base_is != "pretrained":
            raise UserError(
                f"'{self.name}': a method that joins layers does not see what a wrapper makes of them; take it alone"
            )
        return next(self.view.alike(name).blocks("tensor"))

    def blocks(self, unit: Unit) -> Iterator[Slot]:
        """The block cut into those of a smaller unit, at the places where its tensor is cut."""
        if UNITS.index(unit) >= UNITS.index(self.unit):
            yield self
            return
        experts, base_X = Experts(len(self.experts), self.experts.__getitem__, keep=True), self.base
        for start, shape in _cuts(self.view, self.elements, unit, self.tensor_shape[-1]):
            yield self._cut(experts, base_X, start, shape, unit)

    def _cut(
        self, experts: Experts, base_X: Tensor | None, start: int, shape: tuple[int, ...], unit: Unit
    ) -> Slot:
        """The smaller block of this shape that begins at an element of this one."""

        def part(whole_X: Tensor) -> Tensor:
            return whole_X.reshape(-1)[start : start + prod(shape)].reshape(shape)

        other = self._copy()
        other.start, other.shape, other.unit, other._memo = self.start + start, shape, unit, {}
        other.experts = Experts(len(experts), lambda t: part(experts[t]), keep=True)
        other._base = None if base_X is None else lambda: part(base_X)
        other._make_reference, other.reference_is, other._keep = None, "pretrained", True
        return other


def _mean(x: Slot) -> Tensor:
    return mean(x.experts)


def _cuts(view: View, elements: int, unit: Unit, last: int) -> Iterator[tuple[int, tuple[int, ...]]]:
    """Where blocks of elements or rows of length `last` begin in so many elements, and their shapes."""
    width = last if unit == "row" else 1
    step = max(1, block_elements(len(view.experts), view.source.device) // width) * width
    for start in range(0, elements, step):
        size = min(step, elements - start)
        yield start, (size // width, width) if unit == "row" else (size,)


# ---------------------------------------------------------------------------------------------- views


class View:
    """One tensor of a merge, to be read block by block as often as needed.

    stored_name: of the tensor that it lies in. role: what it is. experts: of whom it is merged. shared: whether
    several points of a sweep are merged from its slots. Without a source it is a header, of which nothing is read.
    reshaped: whether it must be read to know its shape.
    """

    reshaped = False

    def __init__(
        self,
        source: Source | None,
        name: str,
        shape: Sequence[int],
        *,
        experts: Sequence[str] | None = None,
        has_base: bool | None = None,
        model: Model | None = None,
        shared: bool = False,
    ):
        self._source, self.name, self.shared = source, name, shared
        self.stored_name, self.stored_shape = name, tuple(shape)
        self.shape = tuple(shape) or (1,)
        self.experts: Sequence[str] = self.source.experts if experts is None else experts
        self.has_base: bool = self.source.has_base if has_base is None else has_base
        self.model = model or describe({name: tuple(shape)})
        self.is_matrix = False  # to the method that looks at it
        self._matrices: dict[Any, tuple[Matrix, ...]] = {}
        self.masks: dict[Any, Any] = {}  # bits that slots leave for each other
        self.mask_bytes = 0

    @property
    def source(self) -> Source:
        assert self._source is not None, "a header has no data"
        return self._source

    @property
    def elements(self) -> int:
        return prod(self.shape)

    @property
    def elements_read(self) -> int:
        """How many elements of each input it is made from."""
        return self.elements

    @property
    def role(self) -> TensorRole:
        return self.model.tensors[self.stored_name]

    @property
    def kind(self) -> str:
        """The name without the numbers of layers and experts."""
        return self.role.kind

    @property
    def inputs(self) -> int:
        """The axis of a matrix (M, N) that counts its inputs: the last, but for what is stored (N, M) and seen so."""
        return 0 if self.role.multiplied_from_left else -1

    @property
    def depth(self) -> float | None:
        """From 0 for the first layer of its tower to 1 for the last; None outside of layers."""
        return self.model.depth(self.stored_name)

    def matrices(self, keys: Keys, convolutions: bool) -> tuple[Matrix, ...]:
        """The matrices that it consists of, to a method with these parameters; none if it is no matrix to it."""
        if (keys, convolutions) not in self._matrices:
            self._matrices[keys, convolutions] = self.role.matrices(keys, convolutions)
        return self._matrices[keys, convolutions]

    @property
    def packed(self) -> tuple[Matrix, ...]:
        """The matrices of packed experts; none of other tensors."""
        packed = self.role.packed
        return packed.matrices() if packed else ()

    def pieces(self, matrices: Sequence[Matrix]) -> list[View]:
        """A view of each of its matrices, or itself if it is one as it is stored."""
        whole = len(matrices) == 1 and matrices[0].shape == self.stored_shape and not matrices[0].transposed
        assert not matrices or sum(prod(m.shape) for m in matrices) == self.elements, (
            f"{self.name}: parts are missing"
        )
        return [self] if whole or not matrices else [MatrixView(self, matrix) for matrix in matrices]

    def alike(self, name: str) -> View:
        """The matrix of this name, which is of the same kind and shape, and in another layer of the same tower."""
        return View(
            self._source, self._stored_alike(name), self.stored_shape,
            experts=self.experts, has_base=self.has_base, model=self.model, shared=self.shared,
        )  # fmt: skip

    def _stored_alike(self, name: str) -> str:
        """The stored tensor in which it lies."""
        tower = layer_of(self.name)[0] or ""
        own, other = (text[len(tower) :].partition(".")[0] for text in (self.name, name))
        return f"{tower}{other}{self.stored_name[len(tower) + len(own) :]}"

    def read(self, origin: str, start: int, shape: tuple[int, ...]) -> Tensor:
        """Elements from `start` on, of an expert or the base."""
        return self.source.read(origin, self.stored_name, start, start + prod(shape)).reshape(shape)

    def statistic(self, kind: str, key: str, start: int, shape: tuple[int, ...]) -> Tensor:
        """The statistics of the elements from `start` on; those of another shape as a whole."""
        declared = STATISTICS[kind]
        if declared.free:
            of = self.source.statistic_shape(kind, key)
        else:
            of = declared.shape(self.shape, self.inputs)
        whole = declared.free or declared.squared_side or of != self.shape
        start, shape = (0, of) if whole else (start, shape)
        return self.source.statistic(kind, key, start, start + prod(shape)).reshape(shape)

    def factors(self, t: int) -> tuple[Tensor, Tensor] | None:
        """See `Slot.factors`."""
        return self.source.factors(self.experts[t], self.stored_name)

    def blocks(self, unit: Unit) -> Iterator[Slot]:
        """The tensor cut into blocks: (n,), (rows, last dimension), or the tensor's own shape."""
        if not self.elements:
            return
        if unit == "tensor":
            yield Slot(self, 0, self.shape, unit)
            return
        for start, shape in _cuts(self, self.elements, unit, self.shape[-1]):
            yield Slot(self, start, shape, unit)


class MatrixView(View):
    """One matrix (M outputs, N inputs) inside a stored tensor: of packed experts, a convolution, a transposed layer."""

    def __init__(self, view: View, matrix: Matrix):
        super().__init__(
            view._source, view.stored_name, view.stored_shape,
            experts=view.experts, has_base=view.has_base, model=view.model, shared=view.shared,
        )  # fmt: skip
        self.name, self.shape, self.matrix = matrix.name, matrix.shape, matrix

    @property
    def kind(self) -> str:
        return self.matrix.kind

    def alike(self, name: str) -> View:
        return MatrixView(super().alike(name), replace(self.matrix, name=name))

    def pieces(self, matrices: Sequence[Matrix]) -> list[View]:
        return [self]

    def read(self, origin: str, start: int, shape: tuple[int, ...]) -> Tensor:
        return self.matrix.read(partial(self.source.read, origin, self.stored_name)).contiguous()

    def statistic(self, kind: str, key: str, start: int, shape: tuple[int, ...]) -> Tensor:
        of_all = (
            key.removesuffix(self.name) + self.stored_name
        )  # packed experts', where there is none of this one
        packed = not self.is_whole and not self.source.has_statistic(kind, key)
        if not (STATISTICS[kind].by_entry and (packed or self.is_whole and self.matrix.transposed)):
            return super().statistic(kind, key, start, shape)
        found = self.matrix.read(partial(self.source.statistic, kind, of_all if packed else key))
        return found.flatten()[start : start + prod(shape)].reshape(shape)

    @property
    def is_whole(self) -> bool:
        """Whether its entries are those of the stored tensor, whose statistics by entry lie as it does."""
        return prod(self.shape) == prod(self.stored_shape)

    def factors(self, t: int) -> tuple[Tensor, Tensor] | None:
        pair = super().factors(t)
        plain = self.matrix.start == 0 and prod(self.matrix.slab) == prod(self.stored_shape)
        if pair is None or not plain or self.matrix.count != self.matrix.slab[self.matrix.axis]:
            return None
        return (pair[1].T, pair[0].T) if self.matrix.transposed else pair

    def blocks(self, unit: Unit) -> Iterator[Slot]:
        for x in super().blocks("tensor"):
            yield from x.blocks(unit)


def by_stretch(pieces: Iterable[View]) -> Iterator[tuple[tuple[int, ...], list[MatrixView]]]:
    """The matrices of a tensor, together those that lie in one stretch of it, and the stretch's shape."""
    matrices = [piece for piece in pieces if isinstance(piece, MatrixView)]
    for (_, slab), parts in groupby(matrices, key=lambda piece: (piece.matrix.start, piece.matrix.slab)):
        yield slab, list(parts)


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
        super().__init__(
            view._source, view.stored_name, view.stored_shape,
            experts=view.experts, has_base=view.has_base, model=view.model, shared=view.shared,
        )  # fmt: skip
        self.name = view.name
        self._view, self._unit, self._change = view, unit, change
        self._keep = keep and unit == "tensor"
        self._kept: list[Slot] | None = None
        self._reshapes, self.reshaped = reshapes, reshapes or view.reshaped
        self.__dict__.pop("shape")

    @cached_property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        if not self._reshapes:
            return self._view.shape
        return next((x.shape for x in self.blocks("tensor")), (0,))

    @property
    def elements_read(self) -> int:
        return self._view.elements_read

    def pieces(self, matrices: Sequence[Matrix]) -> list[View]:
        return [self]

    def blocks(self, unit: Unit) -> Iterator[Slot]:
        larger = max(unit, self._unit, key=UNITS.index)
        changed: Iterable[Slot] = map(self._change, self._view.blocks(larger))
        if self._keep:
            changed = self._kept = self._kept or list(changed)
        for x in changed:
            if x.elements:
                yield from x.blocks(unit)


class Runner:
    """Who computes a function of many views: the workers whose `map` it has."""

    def __init__(self, map: Callable[[Callable, Iterable], Iterable] = map):
        self._map = map

    def each(self, function: Callable[[View], Any], views: Sequence[View]) -> Iterable[Any]:
        """`function` of every view, in their order."""
        return self._map(function, views)

    def total(self, function: Callable[[View], Tensor], views: Sequence[View]) -> Tensor:
        """The sum of what `function` gives of every view: integers, which any order sums up to the same."""
        return integer_sum(self._map(function, views))


def integer_sum(tensors: Iterable[Tensor]) -> Tensor:
    """The sum of one or more tensors of integers, of which the first is used up."""
    total: Tensor | None = None
    for tensor in tensors:
        total = tensor if total is None else total.add_(tensor)
    assert total is not None
    return total


class Views:
    """What a look reads, as often as it likes: all float tensors that are merged, but empty ones, or one of them.

    A look that asks for `each` or `total` may be run again elsewhere, from its start to such a question: what it does
    between two of them depends on nothing but what they gave, and reads no tensor.
    """

    def __init__(self, views: Iterable[View], runner: Runner | None = None):
        self.views = [view for view in views if view.elements]
        self._runner = runner or Runner()

    @cached_property
    def elements(self) -> int:
        if any(view.reshaped for view in self.views):
            return sum(self.each(lambda view: view.elements))
        return sum(view.elements for view in self.views)

    @property
    def experts(self) -> int:
        """How many experts there are."""
        return len(self.views[0].experts)

    def each(self, function: Callable[[View], Any]) -> Iterable[Any]:
        """`function` of every view, in their order; computed by all workers."""
        return self._runner.each(function, self.views)

    def total(self, function: Callable[[View], Tensor]) -> Tensor:
        """The sum of the tensors of integers that `function` gives of every view; computed by all workers."""
        return self._runner.total(function, self.views)

    def only(self, wanted: Callable[[View], bool]) -> Views:
        """Some of the tensors."""
        return self.of([view for view in self.views if wanted(view)])

    def changed(self, change: Callable[[View], View]) -> Views:
        """Other tensors in their place, whose shapes are not asked for yet."""
        return self.of([change(view) for view in self.views])

    def of(self, views: list[View]) -> Views:
        """These tensors in the place of its own."""
        other = Views([], self._runner)
        other.views = views
        return other
