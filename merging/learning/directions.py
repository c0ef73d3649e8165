"""The directions of a linear merge as a fit reads them: a piece of a tensor at a time, from files."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Collection, Iterator, Mapping, Sequence

from mergeline.merging.algebra.slots import MatrixView, Slot, View, Views
from mergeline.merging.algebra.sums import mean
from mergeline.merging.architecture import RUNNING_STATISTICS
from mergeline.merging.canonical import text_digest
from mergeline.merging.engine.inputs import contents
from mergeline.merging.engine.plan import Entry, Plan
from mergeline.merging.engine.planning import make_plan
from mergeline.merging.engine.sources import FileInputs
from mergeline.merging.errors import UserError
from mergeline.merging.files import empty, read_object, write_json
from mergeline.merging.lazy import torch
from mergeline.merging.learning.network import Network
from mergeline.merging.learning.task_vectors import TaskVectors
from mergeline.merging.methods.bound import bind
from mergeline.merging.methods.contract import get_method
from mergeline.merging.methods.parts import AROUND_MEAN, Part, owners, parts_of, slopes, summed
from mergeline.merging.recipes.recipe import Recipe

if TYPE_CHECKING:
    from torch import Tensor

_KEY = "key.json"


class Inputs(FileInputs):
    """The checkpoints of a recipe, whatever its method is: what is merged, and states to load."""

    def __init__(self, recipe: Recipe, device: str = "cpu"):
        """Raises UserError for checkpoints that do not fit one another."""
        if recipe.rules:
            raise UserError(f"{recipe.method}: what it fits takes the place of `rules`; leave them out")
        neutral = {"method": "average", "params": {}, "statistics": {}}
        plan = make_plan(Recipe.of({**recipe.model_dump(mode="json"), **neutral}))
        plan.check()
        super().__init__(plan, device)

    @cached_property
    def contents(self) -> dict[str, list[str]]:
        """Digests of the checkpoints' files, by name."""
        return contents(self.plan.checkpoints)

    @property
    def names(self) -> list[str]:
        """The tensors that are merged, and so may be fitted."""
        return [entry.name for entry in self._merged(running=False)]

    def views(self) -> list[View]:
        """Of each tensor that is merged, and so may be fitted."""
        return [self.view(entry) for entry in self._merged(running=False)]

    def _merged(self, running: bool) -> list[Entry]:
        """What is merged: BatchNorm's statistics that are averaged whatever the method is, or all else."""
        plan: Plan = self.plan
        averaged = plan.recipe.running_statistics == "average"
        return [
            entry
            for entry in plan.merged
            if entry.spec.nbytes
            and running == (averaged and self.view(entry).role.role in RUNNING_STATISTICS)
        ]

    def read_like(self, own: Tensor, view: View, origin: str) -> Tensor:
        """A tensor of an expert or the `base`, in the shape and dtype, and on the device, that the network's has."""
        return view.read(origin, 0, view.shape).reshape(own.shape).to(own)

    def load_start(self, network: Network) -> None:
        """Give the network the base's weights, but of what is not fitted those that the merge will have."""
        self.load(network, "base")
        own, means = network.tensors(), {entry.name for entry in self._merged(running=True)}
        with torch.no_grad():
            for entry in self.plan.entries:
                if entry.name not in own:
                    continue
                if entry.name in means:
                    found = mean(next(self.view(entry).blocks("tensor")).experts)
                elif entry.bound is None and entry.base is None and len(entry.sources) == 1:  # kept
                    [origin] = entry.sources
                    found = self.stored(origin, entry.name, 0, self.length(origin, entry.name))
                else:
                    continue
                own[entry.name].copy_(found.reshape(own[entry.name].shape))

    def load(self, network: Network, origin: str, names: Collection[str] | None = None) -> None:
        """Give the network the weights of an expert or the `base`; names: of these tensors alone."""
        own = network.tensors()
        with torch.no_grad():
            for entry in self.plan.entries:
                if entry.name not in own or entry.base is None and origin == "base":
                    continue
                if names is not None and entry.name not in names:
                    continue
                whole = self.stored(origin, entry.name, 0, self.length(origin, entry.name))
                own[entry.name].copy_(whole.reshape(own[entry.name].shape))


@dataclass(frozen=True)
class Piece:
    """A tensor, or one of the matrices that it consists of.

    name: of its coefficients. tensor: where it lies. matrix: whether it is one to the method. counts: how many
    triplets each direction has, 1 where it is whole.
    """

    name: str
    tensor: str
    view: View
    matrix: bool
    counts: Sequence[int]

    def of(self, whole: Tensor) -> Tensor:
        """The piece of a tensor of the shape that is stored: (X), read-only."""
        if isinstance(self.view, MatrixView):
            flat = whole.reshape(-1)
            return self.view.matrix.read(lambda start, stop: flat[start:stop]).contiguous()
        return whole.reshape(self.view.shape)

    def put(self, whole: Tensor, piece_X: Tensor) -> None:
        """Write the piece to its place in a contiguous tensor."""
        if isinstance(self.view, MatrixView):
            matrix = self.view.matrix
            size = matrix.slab[0] * matrix.slab[1]
            slab = whole.view(-1)[matrix.start : matrix.start + size].view(matrix.slab)
            matrix.put(slab, piece_X.to(slab.dtype))
        else:
            whole.copy_(piece_X.reshape(whole.shape))


class Directions:
    """What is added up of each tensor: an origin, and directions of which one at a time is in memory.

    Task vectors are read from the experts' files. What must be computed, such as singular vectors, is computed once and
    kept in the folder, in the dtype of the network.
    """

    def __init__(
        self,
        inputs: Inputs,
        network: Network,
        folder: Path,
        params: Mapping[str, Any],
        together: Sequence[float] | None = None,
    ):
        """params: of `weighted`. together: the directions are but one, their sum with these weights."""
        self.method = get_method("weighted")
        self.params = self.method.resolve(params)
        self.inputs, self.folder, self._together = inputs, folder / "directions", together
        self._bound = bind(self.method, self.params)
        self._around_mean = self.params["directions"] in AROUND_MEAN
        self._own = network.tensors()
        first = next(t for t in self._own.values() if t.is_floating_point())
        self.dtype, self.device = first.dtype, first.device
        self._plain = (
            self.params["directions"] == "task_vectors"
            and self.params["over"] != "singular"
            and together is None
        )
        streamed = self._plain and self.over == "whole" and self.device.type == "cpu"
        self._task_vectors = TaskVectors(inputs, self.dtype) if streamed else None
        self._found: Any = None
        self.pieces = self._prepared()

    @property
    def over(self) -> Any:
        return self.params["over"]

    def _views(self) -> Iterator[tuple[str, View, bool]]:
        for view in self.inputs.views():
            if view.name in self._own:
                matrix = self._bound.treats(view)
                for piece in self._bound.pieces(view):
                    yield view.name, piece, matrix

    def _prepared(self) -> list[Piece]:
        if self._plain:
            count = len(self.inputs.experts)
            return [
                Piece(view.name, tensor, view, matrix, [1] * count) for tensor, view, matrix in self._views()
            ]
        given = self.inputs.contents
        found = text_digest([self.params, self.method.digest, self._together, str(self.dtype), given])
        key = self.folder / _KEY
        if not (key.is_file() and read_object(key).get("key") == found):
            self.folder.mkdir(parents=True, exist_ok=True)
            empty(self.folder)
            counts = self._compute()
            write_json(key, {"key": found, "counts": counts})
        kept = read_object(key)["counts"]
        return [
            Piece(view.name, tensor, view, matrix, kept[view.name]) for tensor, view, matrix in self._views()
        ]

    def _compute(self) -> dict[str, list[int]]:
        """Write the origin and the directions of each piece; returns how many triplets each has."""
        from safetensors.torch import save_file

        if self._bound.looks_at_model:
            self._found = self._bound.look_at_model(Views(self.inputs.views()))
        counts: dict[str, list[int]] = {}
        for _, view, matrix in self._views():
            x = self._slot(view)
            parts = list(self._made(x, matrix))
            held: dict[str, Tensor] = {"origin": x.reference.to(self.dtype)}
            for d, part in enumerate(parts):
                part = part.to(self.dtype)
                if part.triplets is None:
                    held[f"{d}.whole"] = part.full()
                else:
                    held |= {f"{d}.{key}": value for key, value in zip("usv", part.triplets)}
            held = {key: value.contiguous().clone() for key, value in held.items()}
            save_file(held, self._file(len(counts)))
            counts[view.name] = [part.values for part in parts]
        return counts

    def _slot(self, view: View) -> Slot:
        x = next(view.blocks("tensor"))
        return x.from_mean() if self._around_mean else x.from_base()

    def _made(self, x: Slot, matrix: bool) -> Iterator[Part]:
        own = {key: self.params[key] for key in ("rank", "damping", "power")}
        parts = parts_of(
            x, self.params["directions"], matrix=matrix, found=self._found,
            singular=self.over == "singular", **own,
        )  # fmt: skip
        if self._together is None:
            yield from parts
            return
        sum_X = torch.zeros(x.shape, dtype=torch.float64, device=self.device)
        for weight, part in zip(self._together, parts, strict=True):
            sum_X.add_(part.full(), alpha=weight)
        yield Part(sum_X)

    def _file(self, number: int) -> Path:
        return self.folder / f"{number:05}.safetensors"

    def read(self, number: int) -> tuple[Tensor, Iterator[Part]]:
        """The origin (X) of a piece, and its directions, each read when it is asked for."""
        piece = self.pieces[number]
        if self._plain:
            view, names = piece.view, self.inputs.experts
            origin = view.read("base", 0, view.shape).to(self.dtype)
            experts = (view.read(name, 0, view.shape).to(self.dtype) for name in names)
            return origin, (Part(expert.sub_(origin)) for expert in experts)
        return self._kept(number, len(piece.counts))

    def put(self, number: int, c_DK: Tensor, whole: Tensor, multiplier_X: Tensor | None = None) -> None:
        """Write origin + multiplier * the sum of directions, times their numbers, to a piece's place in a tensor."""
        piece = self.pieces[number]
        if (vectors := self._streamed(piece, whole)) is not None:
            flat_X = None if multiplier_X is None else multiplier_X.reshape(-1)
            vectors.put(piece.view, c_DK[:, 0], whole.view(-1), flat_X)
            return
        origin_X, parts = self.read(number)
        update_X = summed(parts, c_DK, self.over, self.owner(piece, c_DK.shape[1]))
        if update_X is not None:
            piece.put(whole, origin_X + (update_X if multiplier_X is None else update_X * multiplier_X))

    def slopes(self, number: int, count: int, gradient: Tensor, multiplier_X: Tensor | None = None) -> Tensor:
        """The derivative by the numbers of `put`, (D, K), from the gradient by the tensor.

        count: K.
        """
        piece = self.pieces[number]
        gradient_X = piece.of(gradient)
        if multiplier_X is not None:
            gradient_X = gradient_X * multiplier_X
        if (vectors := self._streamed(piece, gradient)) is not None:
            return vectors.along(piece.view, gradient_X.reshape(-1))[:, None]
        _, parts = self.read(number)
        return slopes(parts, gradient_X, self.over, count, self.owner(piece, count))

    def _streamed(self, piece: Piece, whole: Tensor) -> TaskVectors | None:
        """What reads the directions in blocks, where they are whole task vectors of a tensor as it is stored."""
        fits = type(piece.view) is View and whole.is_contiguous() and whole.dtype == self.dtype
        return self._task_vectors if fits else None

    def _kept(self, number: int, count: int) -> tuple[Tensor, Iterator[Part]]:
        from safetensors import safe_open

        file = safe_open(self._file(number), framework="pt")
        names = set(file.keys())

        def read(name: str) -> Tensor:
            return file.get_tensor(name).to(self.device)

        def parts() -> Iterator[Part]:
            for d in range(count):
                if f"{d}.whole" in names:
                    yield Part(read(f"{d}.whole"))
                else:
                    yield Part(None, (read(f"{d}.u"), read(f"{d}.s"), read(f"{d}.v")))

        return read("origin"), parts()

    def owner(self, piece: Piece, count: int) -> Tensor | None:
        """Which of a direction's numbers multiplies each entry of the piece; None where there is but one."""
        if self.over not in ("chunks", "partition") or count == 1:
            return None
        size = piece.view.elements
        seed = self.params["partition_seed"]
        return owners(self.over, count, size, 0, size, seed, piece.name).to(self.device)
