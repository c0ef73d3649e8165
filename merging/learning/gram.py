"""What linear maps see: the Gram matrices of their inputs, and how often embeddings are looked up."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any, Callable, Iterator, Mapping

from mergeline.merging.lazy import torch
from mergeline.merging.learning.gathering import Collected, Gathering, Subject, refuse_nonfinite
from mergeline.merging.learning.squares import ROWS, mirrored, strips
from mergeline.merging.learning.watching import Applied, watched

if TYPE_CHECKING:
    from torch import Tensor

    from mergeline.merging.architecture import Model

Place = tuple[str, int | None]  # a tensor, and which slice of it where it is packed experts


class _Sums:
    """Sums of x x^T over the rows x of the inputs of some maps, and how many rows there were.

    float64 (N, N), of which what is on and above the diagonal counts. Products are float32 of some thousand rows, or
    float64 where the inputs are.
    """

    def __init__(self, wanted: Callable[[Place], bool]):
        self.sums: dict[Place, Tensor] = {}
        self.rows: dict[Place, int] = {}
        self._wanted = wanted
        self._last: tuple[Tensor, list[tuple[slice, slice, Tensor]]] | None = None

    def see(self, use: Applied) -> None:
        place = (use.tensor, use.part)
        if use.kind == "embedding" or not self._wanted(place):
            return
        # Queries, keys and values have one input.
        if self._last is None or self._last[0] is not use.inputs:
            self._last = use.inputs, list(_squared(use.inputs))
        if place not in self.sums:
            sides = (use.inputs.shape[-1],) * 2
            self.sums[place] = torch.zeros(sides, dtype=torch.float64, device=use.inputs.device)
        for rows, columns, product in self._last[1]:
            self.sums[place][rows, columns] += product
        self.rows[place] = self.rows.get(place, 0) + prod(use.inputs.shape[:-1])

    def forget_inputs(self) -> None:
        self._last = None


def _squared(inputs: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
    """X^T X of rows (..., N), as what is to be added up."""
    x_RN = inputs.detach().reshape(-1, inputs.shape[-1])
    for part_RN in x_RN.split(ROWS):
        yield from strips(part_RN if part_RN.dtype == torch.float64 else part_RN.float())


def gram(subject: Subject, gathering: Gathering) -> Collected:
    """The Gram matrix of the inputs of every linear map of an expert, over their number of rows; see `collect`.

    With `memory` the examples are passed once to see which maps there are, and once for each group of them.
    """
    model = subject.plan.model
    assert model is not None, "a plan without problems knows its tensors"
    if gathering.memory is None:
        sums = _Sums(lambda place: True)
        _watch(subject, sums.see, sums.forget_inputs)
        rows, widths, groups = sums.rows, {p: len(s) for p, s in sums.sums.items()}, None
    else:
        sums = None
        rows, widths = _measured(subject)
        groups = _groups(widths, model, gathering.memory)
    keys = {place: _keys(model, *place) for place in widths}
    silent = _silent(model, keys)
    shapes = {key: (widths[place],) * 2 for place, found in keys.items() for key in found} | silent
    told = {
        "rows": {key: rows[place] for place, found in keys.items() for key in found},
        "no_matrix": sorted({tensor for (tensor, _), found in keys.items() if not found}),
    }

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for group in [list(widths)] if groups is None else groups:
            found = sums
            if found is None:
                found = _Sums(set(group).__contains__)
                _watch(subject, found.see, found.forget_inputs)
            for place in group:
                mean_NN = mirrored(found.sums.pop(place).div_(rows[place]).float())
                yield from ((key, mean_NN) for key in keys[place])
        yield from ((key, torch.zeros(shape)) for key, shape in silent.items())

    return Collected(shapes, tensors(), told)


def usage(subject: Subject, gathering: Gathering) -> Collected:
    """How often each row of every embedding was looked up, (V,); see `collect`."""
    counts: dict[str, Tensor] = {}

    def see(use: Applied) -> None:
        if use.kind == "embedding":
            vocabulary = len(subject.tensors[use.tensor])
            found = torch.bincount(use.inputs.flatten(), minlength=vocabulary).double()
            counts[use.tensor] = counts[use.tensor] + found if use.tensor in counts else found

    _watch(subject, see)
    shapes = {name: tuple(found.shape) for name, found in counts.items()}
    return Collected(shapes, iter(counts.items()), {"rows": {k: int(c.sum()) for k, c in counts.items()}})


def _watch(
    subject: Subject, see: Callable[[Applied], None], after: Callable[[], None] = lambda: None
) -> None:
    """Run all examples, and tell of every linear map of the expert's own tensors."""
    with torch.no_grad():
        for task, batches in subject.batches.items():
            for batch, numbers in batches():
                with watched(subject.tensors, see):
                    features = subject.network.features(batch)
                refuse_nonfinite(subject, task, features, "features")
                after()
                subject.step(len(numbers))


def _measured(subject: Subject) -> tuple[dict[Place, int], dict[Place, int]]:
    """The number of rows, and of inputs, of every map that the examples reach."""
    rows: dict[Place, int] = {}
    widths: dict[Place, int] = {}

    def see(use: Applied) -> None:
        if use.kind != "embedding":
            place = (use.tensor, use.part)
            rows[place] = rows.get(place, 0) + prod(use.inputs.shape[:-1])
            widths[place] = use.inputs.shape[-1]

    _watch(subject, see)
    return rows, widths


def _groups(widths: Mapping[Place, int], model: Model, memory: Any) -> list[list[Place]]:
    """The maps in groups that are summed up together: those of a layer, or as many as take so many bytes."""
    groups: list[list[Place]] = []
    held = 0
    last: Any = None
    for place, width in widths.items():
        role = model.tensors.get(place[0])
        layer = (role.tower, role.layer) if role and role.layer is not None else place[0]
        size = 8 * width**2
        together = layer == last if memory == "layer" else held + size <= memory
        if groups and together:
            groups[-1].append(place)
            held += size
        else:
            groups.append([place])
            held = size
        last = layer
    return groups


def _keys(model: Model, tensor: str, part: int | None) -> list[str]:
    """The names of the matrices that a map is, as methods ask for them; [] where they see none in it."""
    role = model.tensors.get(tensor)
    if role is not None and role.packed is not None:
        size = prod(role.packed.slab)
        return [m.name for m in role.packed.matrices() if part is not None and m.start // size == part]
    return [tensor] if part is None else []


def _silent(model: Model, keys: Mapping[Place, list[str]]) -> dict[str, tuple[int, int]]:
    """Matrices of packed experts that no token was sent to, while it was to others: without inputs, but seen."""
    seen = {key for found in keys.values() for key in found}
    packed = {tensor: model.tensors[tensor].packed for tensor, _ in keys if tensor in model.tensors}
    return {
        matrix.name: (matrix.shape[1],) * 2
        for tensor, found in packed.items()
        if found and any(keys[place] for place in keys if place[0] == tensor)
        for matrix in found.matrices()
        if matrix.name not in seen
    }
