"""Layouts: one model under the names, and in the packing, of another.

Experts of a mixture lie packed, (E, ...) in one tensor of a layer, or each in tensors of its own; packed ones have the
axes (E, outputs, inputs) or (E, inputs, outputs). transformers 5 writes the names and the packing that a model was
published with, and with `save_original_format=False`, as trainers do, those that it has in memory. Converted tensors
are computed as they are read: nothing is copied, and no more than one expert's matrices are held.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING, Any, Callable, Iterator, Literal, Mapping, Sequence

from mergeline.merging.architecture import Matrix, PackedExperts, describe, disk_name, in_memory
from mergeline.merging.checkpoints.checkpoint import DTYPES, Checkpoint, TensorInfo, common_dtype
from mergeline.merging.checkpoints.computed import ComputedTensor, Elements
from mergeline.merging.errors import UserError
from mergeline.merging.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

Layout = Literal["as_base", "packed", "per_expert"]


@dataclass(frozen=True)
class _Converted(ComputedTensor):
    """A tensor that is made of others."""

    def _remembered(self, key: Any, make: Callable[[], Tensor], is_last: bool) -> Tensor:
        """`make()`, kept for the next reading unless this is the last one."""
        known = vars(self._last).pop("made", None)
        made: Tensor = known[1] if known and known[0] == key else make()
        if not is_last:
            self._last.made = key, made
        self._noted()
        return made


@dataclass(frozen=True)
class MatrixTensor(_Converted):
    """One matrix (M, N) of packed experts."""

    source: TensorInfo = field(kw_only=True)
    matrix: Matrix = field(kw_only=True)

    @property
    def nbytes(self) -> int:
        """What is read for it."""
        whole = self.matrix.is_contiguous or isinstance(self.source, _Converted)
        return prod(self.shape if whole else self.matrix.slab) * DTYPES[self.dtype][1]

    def read(self, elements: Elements, start: int, stop: int) -> Tensor:
        matrix = self.matrix
        if matrix.is_contiguous:
            first = matrix.start + matrix.first * matrix.slab[1]
            return self.source.read(elements, first + start, first + stop)

        def make() -> Tensor:
            return matrix.read(lambda a, b: self.source.read(elements, a, b)).reshape(-1)

        return self._remembered(None, make, stop == prod(self.shape))[start:stop]


@dataclass(frozen=True)
class PackedTensor(_Converted):
    """Packed experts, put together from the matrices of each, which are in the order of `packed.matrices()`."""

    sources: tuple[TensorInfo, ...] = field(kw_only=True)
    packed: PackedExperts = field(kw_only=True)

    @property
    def nbytes(self) -> int:
        """What is read for it."""
        return sum(source.nbytes for source in self.sources)

    @cached_property
    def _parts(self) -> int:
        return len(self.packed.names)

    def read(self, elements: Elements, start: int, stop: int) -> Tensor:
        dtype, size = getattr(torch, DTYPES[self.dtype][0]), prod(self.packed.slab)
        found = []
        for expert in range(start // size, -(-stop // size)) if stop > start else ():
            first = expert * size
            found.append(self._expert(elements, expert, max(start - first, 0), min(stop - first, size)))
        if not found:
            return self.sources[0].read(elements, 0, 0).to(dtype)
        return (found[0] if len(found) == 1 else torch.cat(found)).to(dtype)

    def _expert(self, elements: Elements, expert: int, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of the slab of an expert."""
        own = self.sources[expert * self._parts : (expert + 1) * self._parts]
        if not self.packed.transposed and not self.packed.interleaved:  # one matrix below the other
            size, found = prod(own[0].shape), []
            for part in range(start // size, -(-stop // size)):
                first = part * size
                found.append(own[part].read(elements, max(start - first, 0), min(stop - first, size)))
            return torch.cat(found)
        last = expert == self.packed.count - 1 and stop == prod(self.packed.slab)
        return self._remembered(expert, lambda: self._slab(elements, own), last)[start:stop]

    def _slab(self, elements: Elements, own: Sequence[TensorInfo]) -> Tensor:
        slab_AB = torch.empty(self.packed.slab, dtype=getattr(torch, DTYPES[self.dtype][0]))
        for source, matrix in zip(own, self.packed.matrices()):
            read = source.read(elements, 0, prod(source.shape)).reshape(source.shape)
            matrix.take(slab_AB).copy_(read)
        return slab_AB.reshape(-1)


@dataclass(frozen=True)
class Layouts:
    """Checkpoints of one layout, and a sentence on each that was converted."""

    checkpoints: dict[str, Checkpoint]
    notes: list[str]


def one_layout(
    checkpoints: Mapping[str, Checkpoint], reference: str, layout: Layout, config: Mapping[str, Any]
) -> Layouts:
    """Give all checkpoints the layout that the one named `reference` has, or is to get.

    config: of the model, its config.json.

    Raises:
        UserError: the layout that is asked for is none of this model.
    """
    like, found = checkpoints[reference], dict[str, Checkpoint]()
    notes: list[str] = []
    if layout != "as_base":
        like = _per_expert(like, config) if layout == "per_expert" else _packed(like, config)
        notes += _note(reference, checkpoints[reference], like, f"layout: {layout}")
    for name, checkpoint in checkpoints.items():
        try:
            found[name] = like if name == reference else _as(like, checkpoint, config)
        except UserError as error:
            raise UserError(f"'{name}': {error}") from None
        if name != reference:
            notes += _note(name, checkpoint, found[name], f"as in '{reference}'")
    return Layouts(found, notes)


def _note(name: str, before: Checkpoint, after: Checkpoint, why: str) -> Iterator[str]:
    new = [info for name, info in after.tensors.items() if before.tensors.get(name) is not info]
    split, packed = (sum(isinstance(info, kind) for info in new) for kind in (MatrixTensor, PackedTensor))
    renamed = len(new) - split - packed
    said = [
        *([f"packed experts become {split} tensors, one a matrix"] if split else []),
        *([f"experts are packed into {packed} tensors"] if packed else []),
        *([f"{renamed} tensors get other names"] if renamed else []),
    ]
    if said:
        yield f"'{name}': {', '.join(said)}, {why}"


def _as(like: Checkpoint, checkpoint: Checkpoint, config: Mapping[str, Any]) -> Checkpoint:
    """A checkpoint in the layout of another."""
    if _shapes(checkpoint) == _shapes(like):
        return checkpoint
    own, theirs = _packings(checkpoint, config), _packings(like, config)
    theirs_by_place = {in_memory(name, config).name: packed for name, packed in theirs.items()}
    tensors = dict(checkpoint.tensors)
    for name, packed in own.items():
        alike = theirs_by_place.get(in_memory(name, config).name)
        if alike is None or alike.form != packed.form:
            _split(tensors, name, packed)
    wanted = {in_memory(name, config): name for name in like.tensors}
    for packed in theirs.values():
        wanted |= {in_memory(matrix.name, config): matrix.name for matrix in packed.matrices()}
    named = set(wanted.values())
    for name in [name for name in tensors if name not in named]:
        new = wanted.get(in_memory(name, config))
        if new is not None and new not in tensors:
            tensors[new] = replace(tensors.pop(name), name=new)
    for name, packed in theirs.items():
        if name not in tensors:
            _pack(tensors, name, packed, like.tensors[name].shape)
    return _view(checkpoint, tensors)


def _per_expert(checkpoint: Checkpoint, config: Mapping[str, Any]) -> Checkpoint:
    """As files have it: with a tensor for each matrix of packed experts (raises UserError)."""
    tensors, places = dict(checkpoint.tensors), _packings(checkpoint, config)
    for name, packed in places.items():
        if in_memory(packed.matrices()[0].name, config).expert is None:
            raise UserError(
                f"layout: per_expert: of '{name}' no form with a tensor for each expert is known; leave `layout` out"
            )
        _split(tensors, name, packed)
    for name in [*tensors] if places else ():
        new = disk_name(name, config)
        if new is not None and new not in tensors:
            tensors[new] = replace(tensors.pop(name), name=new)
    return _view(checkpoint, tensors)


def _packed(checkpoint: Checkpoint, config: Mapping[str, Any]) -> Checkpoint:
    """As transformers has it in memory, with packed experts (raises UserError)."""
    tensors = dict(checkpoint.tensors)
    parts: dict[str, dict[tuple[int, int], str]] = {}
    for name in checkpoint.tensors:
        place = in_memory(name, config)
        if place.expert is not None:
            parts.setdefault(place.name, {})[place.expert, place.part] = name
        elif place.name not in tensors:
            tensors[place.name] = replace(tensors.pop(name), name=place.name)
    if not parts and not _packings(checkpoint, config):
        raise UserError(
            "layout: packed: no experts of a mixture are known by the names and the config.json; leave `layout` out"
        )
    for name, found in parts.items():
        count, width = len({expert for expert, _ in found}), len({part for _, part in found})
        rows, columns = (*tensors[found[min(found)]].shape, 1, 1)[:2]
        singles = [found.get((0, part), "").rpartition(".0.") for part in range(width)]
        names = tuple(f"{before}.{{}}.{after}" for before, _, after in singles)
        packed = PackedExperts("", names, (width * rows, columns), count, transposed=False)
        _pack(tensors, name, packed, (count, width * rows, columns))
    return _view(checkpoint, tensors)


def _packings(checkpoint: Checkpoint, config: Mapping[str, Any]) -> dict[str, PackedExperts]:
    """Tensors of packed experts -> how their matrices lie."""
    roles = describe(_shapes(checkpoint), config).tensors
    return {name: role.packed for name, role in roles.items() if role.packed}


def _shapes(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    return {name: info.shape for name, info in checkpoint.tensors.items()}


def _split(tensors: dict[str, TensorInfo], name: str, packed: PackedExperts) -> None:
    """Replace a tensor of packed experts by their matrices."""
    info = tensors.pop(name)
    for matrix in packed.matrices():
        tensors[matrix.name] = MatrixTensor(
            matrix.name,
            info.dtype,
            matrix.shape,
            info.file,
            info.start,
            info.stop,
            source=info,
            matrix=matrix,
        )


def _pack(tensors: dict[str, TensorInfo], name: str, packed: PackedExperts, shape: tuple[int, ...]) -> None:
    """Replace the matrices of experts by one tensor; nothing where none is there.

    Raises:
        UserError: some are not there, or of another shape.
    """
    matrices = packed.matrices()
    sources = tuple(tensors[matrix.name] for matrix in matrices if matrix.name in tensors)
    if not sources:
        return
    for matrix in matrices:
        info = tensors.get(matrix.name)
        if info is None or info.shape != matrix.shape:
            found = f"has shape {list(info.shape)}, not {list(matrix.shape)}" if info else "is missing"
            raise UserError(f"experts cannot be packed into '{name}': '{matrix.name}' {found}")
    for matrix in matrices:
        del tensors[matrix.name]
    dtype, first = common_dtype(source.dtype for source in sources), sources[0]
    tensors[name] = PackedTensor(
        name, dtype, shape, first.file, first.start, first.stop, sources=sources, packed=packed
    )


def _view(checkpoint: Checkpoint, tensors: Mapping[str, TensorInfo]) -> Checkpoint:
    """A view of these tensors, which hold as many numbers as those of the checkpoint."""
    before, after = (sum(prod(info.shape) for info in t.values()) for t in (checkpoint.tensors, tensors))
    if before != after:
        raise UserError(
            f"{checkpoint.path}: {before} numbers in its tensors, {after} of them in another layout: names of experts "
            "collide; report the names of its tensors"
        )
    return checkpoint if tensors == checkpoint.tensors else checkpoint.view(tensors)
