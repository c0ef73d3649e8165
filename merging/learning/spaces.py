"""What is fitted, and how gradients of weights become gradients of it: never by a graph through the merge.

The network's parameters are leaves. Where they are W = origin + sum c_d D_d, the derivative by a coefficient is an
inner product <gradient of W, D_d>, taken tensor by tensor with the directions read from files. From there to the
numbers that are fitted (clamped, squashed, rounded to bits, rescaled by a mean) autograd goes, through small tensors
or one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Iterator, Literal, Mapping, Protocol

from mergeline.merging.algebra import draws
from mergeline.merging.lazy import torch
from mergeline.merging.learning.directions import Directions, Piece
from mergeline.merging.learning.network import Network
from mergeline.merging.methods.parts import summed
from mergeline.merging.recipes.recipe import Recipe

if TYPE_CHECKING:
    from torch import Tensor

SOLVED = "solved.safetensors"  # merged tensors of a fit, in its folder

Squash = Literal["none", "clamp", "sigmoid", "softmax"]
Penalty = Callable[["Tensor", int], "Tensor"]


class Space(Protocol):
    """What is fitted.

    numbers: the tensors that an optimiser changes, leaves.
    """

    numbers: dict[str, Tensor]

    def put(self, step: int | None) -> None:
        """Give the network the weights that the numbers stand for at a step; None: those of the result."""
        ...

    def pull(self, step: int) -> Tensor | None:
        """Add the derivatives by the numbers to their `.grad`, from those of the network's weights.

        Returns a penalty on the numbers, which was added to the loss, or None.
        """
        ...


class Mergeable(Space, Protocol):
    """What is fitted, and can be merged."""

    def recipe(self, folder: Path) -> Recipe:
        """What merges into the weights that the numbers stand for; files that it names are written to the folder."""
        ...


class Form(Protocol):
    """How coefficients (D, K) of a piece are made of numbers."""

    def start(self, piece: Piece, over: str, dtype: torch.dtype) -> dict[str, Tensor]:
        """The numbers of a piece by name; pieces may share some."""
        ...

    def coefficients(self, piece: Piece, numbers: Mapping[str, Tensor]) -> Tensor:
        """The coefficients (D, K), differentiable in the numbers."""
        ...


@dataclass(frozen=True)
class Numbers:
    """Coefficients are numbers, or squashed ones.

    initial: of one direction, by whether it is of a matrix and its place. shared: all tensors have the same.
    count: for chunks and partitions, how many a direction has (by the tensor's name).
    """

    initial: Callable[[Piece, int], float]
    shared: bool = False
    squash: Squash = "none"
    count: Callable[[str], int] = lambda name: 1

    def start(self, piece: Piece, over: str, dtype: torch.dtype) -> dict[str, Tensor]:
        width = max(piece.counts) if over == "singular" else self.count(piece.name)
        values = [[self.initial(piece, d)] * width for d in range(len(piece.counts))]
        start_DK = torch.tensor(values, dtype=dtype)
        if self.squash == "sigmoid":
            start_DK = start_DK.logit()
        elif self.squash == "softmax":
            start_DK = start_DK.clamp(min=1e-12).log()
        return {self._name(piece): start_DK}

    def _name(self, piece: Piece) -> str:
        return "all" if self.shared else piece.name

    def coefficients(self, piece: Piece, numbers: Mapping[str, Tensor]) -> Tensor:
        raw_DK = numbers[self._name(piece)][: len(piece.counts)]
        if self.squash == "clamp":
            return raw_DK.clamp(0, 1)
        if self.squash == "sigmoid":
            return raw_DK.sigmoid()
        return raw_DK.softmax(0) if self.squash == "softmax" else raw_DK


@dataclass(frozen=True)
class Bits:
    """Each singular triplet is in or out, times a number for the direction: AdaRank's straight-through gates.

    A gate is in if sigmoid(logit / temperature) > 0.5; its derivative is the sigmoid's. kept: how many are in at the
    start, of so many. margin: where logits begin, on either side of 0.
    """

    initial: float
    kept: Callable[[int], int]
    temperature: float = 10.0
    margin: float = 0.1

    def start(self, piece: Piece, over: str, dtype: torch.dtype) -> dict[str, Tensor]:
        directions, width = len(piece.counts), max(piece.counts)
        found = {f"weight/{piece.name}": torch.full((directions, 1), self.initial, dtype=dtype)}
        if piece.matrix:
            logits_DK = torch.full((directions, width), -self.margin, dtype=dtype)
            logits_DK[:, : self.kept(min(piece.view.shape))] = self.margin
            found[f"bits/{piece.name}"] = logits_DK
        return found

    def coefficients(self, piece: Piece, numbers: Mapping[str, Tensor]) -> Tensor:
        weight_D1 = numbers[f"weight/{piece.name}"]
        if not piece.matrix:
            return weight_D1
        soft_DK = (numbers[f"bits/{piece.name}"] / self.temperature).sigmoid()
        hard_DK = (soft_DK.detach() > 0.5).to(soft_DK.dtype)
        return weight_D1 * (soft_DK + (hard_DK - soft_DK).detach())


def leaves(found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors that an optimiser can change."""
    return {name: tensor.detach().clone().requires_grad_() for name, tensor in found.items()}


class Coefficients:
    """Coefficients of directions; see `Form`.

    penalty: of the coefficients (D, K) of a piece, and of how many there are in all, a scalar that is added to the
    loss. multipliers: of each piece, (X), what the sum of its directions is multiplied by, entry by entry.
    """

    def __init__(
        self,
        directions: Directions,
        network: Network,
        form: Form,
        recipe: Recipe,
        penalty: Penalty | None = None,
        multipliers: Mapping[str, Tensor] | None = None,
    ):
        self._directions, self._network, self._form, self._recipe = directions, network, form, recipe
        self._penalty, self._multipliers = penalty, multipliers
        found: dict[str, Tensor] = {}
        for piece in directions.pieces:
            for name, tensor in form.start(piece, directions.over, directions.dtype).items():
                if name not in found or len(tensor) > len(found[name]):
                    found[name] = tensor
        self.numbers = leaves({name: tensor.to(directions.device) for name, tensor in found.items()})
        self._count = sum(self.coefficients(piece).numel() for piece in directions.pieces)

    def coefficients(self, piece: Piece) -> Tensor:
        """(D, K), differentiable in the numbers."""
        return self._form.coefficients(piece, self.numbers)

    def put(self, step: int | None) -> None:
        own = self._network.tensors()
        with torch.no_grad():
            for number, piece in enumerate(self._directions.pieces):
                self._directions.put(
                    number, self.coefficients(piece), own[piece.tensor], self._multiplier(piece)
                )

    def _multiplier(self, piece: Piece) -> Tensor | None:
        return None if self._multipliers is None else self._multipliers[piece.name]

    def pull(self, step: int) -> Tensor | None:
        own, total = self._network.tensors(), None
        found: list[tuple[Tensor, Tensor]] = []
        for number, piece in enumerate(self._directions.pieces):
            c_DK = self.coefficients(piece)
            if self._penalty is not None:
                penalty = self._penalty(c_DK, self._count)
                total = penalty.detach() if total is None else total + penalty.detach()
                penalty.backward(retain_graph=True)
            gradient = own[piece.tensor].grad
            if gradient is not None:
                slope_DK = self._directions.slopes(number, c_DK.shape[1], gradient, self._multiplier(piece))
                found.append((c_DK, slope_DK))
        if found:
            # All at once: the engine starts once.
            torch.autograd.backward([c_DK for c_DK, _ in found], [slope_DK for _, slope_DK in found])
        return total

    def recipe(self, folder: Path) -> Recipe:
        found = {piece.name: self.coefficients(piece).detach() for piece in self._directions.pieces}
        params, files = dict(self._directions.params), {"coefficients": folder / "coefficients.safetensors"}
        write_tensors(files["coefficients"], found)
        if self._multipliers is not None:
            params["masked"], files["multipliers"] = True, folder / "multipliers.safetensors"
            write_tensors(files["multipliers"], self._multipliers)
        return merged_by(self._recipe, "weighted", params, files)


@dataclass
class Masks:
    """One mask for all entries of the merge of fixed weights, m / mean(m) of each tensor: Concrete masks (2312.06173).

    m = sigmoid((logit(u) + x) / temperature), u drawn anew each step; at the end without noise, sigmoid(x).
    directions: of which there is one, the update of the fixed weights.
    """

    directions: Directions
    network: Network
    base_recipe: Recipe
    params: Mapping[str, Any]
    initial: float = 0.0
    temperature: float = 0.5
    seed: int = 0
    numbers: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        pieces, dtype = self.directions.pieces, self.directions.dtype
        start = {p.name: torch.full(p.view.shape, self.initial, dtype=dtype) for p in pieces}
        self.numbers = leaves({name: logits.to(self.directions.device) for name, logits in start.items()})

    def _multiplier(self, piece: Piece, step: int | None) -> Tensor:
        return multiplier(self.numbers[piece.name], self.temperature, self.seed, piece.name, step)

    def put(self, step: int | None) -> None:
        own = self.network.tensors()
        with torch.no_grad():
            for number, piece in enumerate(self.directions.pieces):
                origin_X, [part] = self.directions.read(number)
                piece.put(own[piece.tensor], origin_X + part.full() * self._multiplier(piece, step))

    def pull(self, step: int) -> Tensor | None:
        own = self.network.tensors()
        for number, piece in enumerate(self.directions.pieces):
            gradient = own[piece.tensor].grad
            if gradient is not None:
                _, [part] = self.directions.read(number)
                self._multiplier(piece, step).backward(piece.of(gradient) * part.full())
        return None

    def recipe(self, folder: Path) -> Recipe:
        file, empty = folder / "multipliers.safetensors", folder / "coefficients.safetensors"
        with torch.no_grad():
            write_tensors(file, {p.name: self._multiplier(p, None) for p in self.directions.pieces})
        # No tensor has coefficients of its own, so that all have `initial`.
        write_tensors(empty, {})
        files = {"multipliers": file, "coefficients": empty}
        return merged_by(self.base_recipe, "weighted", {**self.params, "masked": True}, files)


class MetaMasks:
    """A mask for all entries of a merge whose coefficients have taken one step of their own: Concrete AdaMerging.

    Even steps of a fit begin anew with the coefficients (D, 1) of the form and move them alone; odd steps see the same
    mask, and move its logits alone.
    """

    def __init__(
        self, directions: Directions, network: Network, form: Form, initial: float, temperature: float, seed: int
    ):  # fmt: skip
        self._directions, self._network, self._form = directions, network, form
        self._temperature, self._seed = temperature, seed
        dtype = directions.dtype
        self._start: dict[str, Tensor] = {}
        for piece in directions.pieces:
            self._start |= {f"coefficients/{k}": v for k, v in form.start(piece, "whole", dtype).items()}
        masks = {p.name: torch.full(p.view.shape, initial, dtype=dtype) for p in directions.pieces}
        found = {**self._start, **{f"mask/{name}": logits for name, logits in masks.items()}}
        self.numbers = leaves({name: tensor.to(directions.device) for name, tensor in found.items()})

    def _coefficients(self, piece: Piece) -> Tensor:
        own = {k.removeprefix("coefficients/"): v for k, v in self.numbers.items() if k in self._start}
        return self._form.coefficients(piece, own)

    def multiplier(self, piece: Piece, step: int | None = None) -> Tensor:
        """(X), without noise unless for a step; differentiable in the mask's logits."""
        at = None if step is None else step // 2
        return multiplier(self.numbers[f"mask/{piece.name}"], self._temperature, self._seed, piece.name, at)

    def put(self, step: int | None) -> None:
        own = self._network.tensors()
        with torch.no_grad():
            if step is None or step % 2 == 0:
                for name, start in self._start.items():
                    self.numbers[name].copy_(start)
            for number, piece in enumerate(self._directions.pieces):
                c_D1, mask_X = self._coefficients(piece), self.multiplier(piece, step)
                self._directions.put(number, c_D1, own[piece.tensor], mask_X)

    def pull(self, step: int) -> Tensor | None:
        own = self._network.tensors()
        for number, piece in enumerate(self._directions.pieces):
            gradient = own[piece.tensor].grad
            if gradient is None:
                continue
            c_D1 = self._coefficients(piece)
            if step % 2 == 0:
                mask_X = self.multiplier(piece, step).detach()
                c_D1.backward(self._directions.slopes(number, 1, gradient, mask_X))
                continue
            _, parts = self._directions.read(number)
            update_X = summed(parts, c_D1.detach(), "whole")
            if update_X is not None:
                self.multiplier(piece, step).backward(piece.of(gradient) * update_X)
        return None


def multiplier(logits_X: Tensor, temperature: float, seed: int, name: str, step: int | None) -> Tensor:
    """m / mean(m) of a mask (X): m = sigmoid(logits), or a relaxed sample with noise drawn for the step."""
    if step is None:
        mask_X = logits_X.sigmoid()
    else:
        u_X = draws.uniform(seed, f"mask {step}", name, 0, logits_X.numel())
        mask_X = concrete(logits_X, u_X.reshape(logits_X.shape).to(logits_X), temperature)
    return mask_X / mask_X.mean()


def concrete(logits_X: Tensor, u_X: Tensor, temperature: float) -> Tensor:
    """A relaxed Bernoulli sample from uniform noise: (X) in (0, 1)."""
    tiny = torch.finfo(u_X.dtype).eps
    return ((u_X.clamp(tiny, 1 - tiny).logit() + logits_X) / temperature).sigmoid()


class Weights:
    """All weights themselves, from those that the network has."""

    def __init__(self, network: Network, names: list[str], recipe: Recipe):
        """names: the tensors that are merged, of which those that the network has are fitted."""
        own = network.tensors()
        self.numbers = {name: own[name] for name in names if name in own and own[name].requires_grad}
        self._recipe = recipe

    def put(self, step: int | None) -> None:
        pass

    def pull(self, step: int) -> Tensor | None:
        return None

    def recipe(self, folder: Path) -> Recipe:
        return replacing(self._recipe, self.numbers, folder / SOLVED)


def replacing(begun: Recipe, tensors: Mapping[str, Tensor], file: Path) -> Recipe:
    """A recipe with merged tensors in the place of its own; they go to `file`, with those that it had in it before."""
    params, statistics = dict(begun.params), dict(begun.statistics)
    if begun.method == "solved":
        tensors = load_tensors(Path(str(statistics["solved"]))) | dict(tensors)
    else:
        params = {"inner": begun.method, **params}
    write_tensors(file, tensors)
    update = {"method": "solved", "params": params, "statistics": {**statistics, "solved": file}}
    return begun.model_copy(update=update)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors as a checkpoint in float32, whole or not at all."""
    from safetensors.torch import save

    from mergeline.merging.files import write_bytes

    write_bytes(
        path, save({name: t.detach().cpu().float().contiguous().clone() for name, t in tensors.items()})
    )


def load_tensors(path: Path) -> dict[str, Tensor]:
    """What `write_tensors` wrote."""
    from safetensors.torch import load_file

    return load_file(path)


def merged_by(
    recipe: Recipe, method: str, params: Mapping[str, Any], statistics: Mapping[str, Path]
) -> Recipe:
    """The same merge by another method."""
    # `other` and the like stand among resolved parameters, too.
    update = {"method": method, "params": dict(params), "statistics": dict(statistics), "rules": []}
    return recipe.model_copy(update=update)


def fitted_tensors(network: Network, names: Iterator[str] | list[str]) -> None:
    """Let gradients of these tensors be computed, and of no others."""
    wanted = set(names)
    for name, tensor in network.tensors().items():
        if tensor.is_floating_point():
            tensor.requires_grad_(name in wanted and tensor.is_leaf and not _is_buffer(network, name))


def _is_buffer(network: Network, name: str) -> bool:
    return network.inside(name) in dict(network.module.named_buffers())
