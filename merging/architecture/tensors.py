"""What one stored tensor of a model is, and which matrices lie in it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from math import prod
from typing import TYPE_CHECKING, Any, Callable, Iterator, Literal, Sequence

if TYPE_CHECKING:
    from torch import Tensor

Keys = Literal["block_linear", "matrices", "block_linear+proj"]

_PROJECTION = re.compile(r"(^|[._])proj(ection)?(\.weight)?$")
_IN_LAYER = re.compile(r"(^|\.)\d+\.")
_NOT_LINEAR = re.compile(r"(^|[._])(ln|norm|layernorm|bias|embed\w*)([._\d]|$)", re.IGNORECASE)
_EARLY_NORM = re.compile(r"(^|\.)(ln_pre|norm_pre|pre_layr?norm)\.")
_NUMBER = re.compile(r"(?<![^.])\d+(?=\.)")


class Role(StrEnum):
    """What a tensor does in a model."""

    QUERY = "attention query"
    KEY = "attention key"
    VALUE = "attention value"
    QKV_THIRDS = "attention query, key and value in equal thirds"
    QKV_GROUPED = "attention query, key and value, fewer heads of the last two"
    QKV_INTERLEAVED = "attention query, key and value head by head"
    ATTENTION_OUTPUT = "attention output"
    MLP_UP = "mlp up"
    MLP_GATE = "mlp gate"
    MLP_GATE_UP = "mlp gate and up in equal halves"
    MLP_DOWN = "mlp down"
    LINEAR = "other linear"
    EMBEDDING = "embedding by token"
    HEAD = "output by token"
    POSITION = "position, relative position or segment embedding"
    TOKEN = "learned token"
    PROMPT = "soft prompt by position"
    UNORDERED_PROMPT = "soft prompt without order"  # beside image patches that have positions already
    CLASSIFIER = "classifier"
    PROJECTION = "projection between towers"
    NORM = "norm"  # its scale and its shift
    BIAS = "bias"
    SCALE = "learned scale"
    ROUTER = "router"
    EXPERTS = "packed MoE experts"
    CONVOLUTION = "convolution"
    PATCH_EMBEDDING = "patch embedding"
    STEM = "stem"  # the convolutions before the first layer
    RUNNING_MEAN = "running mean"
    RUNNING_VARIANCE = "running variance"
    COUNTER = "integer counter"
    CONSTANT = "computed constant"  # positions, frequencies and masks that some checkpoints hold
    OTHER = "other"


# Modules of transformers that are heads with all that lies in them.
CLASSIFIERS = ("classifier", "classification_head", "score")
RUNNING_STATISTICS = (Role.RUNNING_MEAN, Role.RUNNING_VARIANCE)  # of BatchNorm
_BEFORE_LAYERS = {Role.EMBEDDING, Role.POSITION, Role.TOKEN, Role.PATCH_EMBEDDING, Role.STEM}


def is_matrix(name: str, shape: Sequence[int], keys: Keys) -> bool:
    """Whether a tensor that holds one matrix gets the matrix treatment of a spectral method.

    `matrices`: every 2-D tensor but a text tower's projection. `block_linear`: the 2-D weights of linear layers inside
    numbered layers, no norms, biases or embeddings; on open_clip names the same set as the official substring rule.
    `block_linear+proj`: these, and what projects the last layer's output into the space of both towers.
    """
    if len(shape) != 2:
        return False
    if keys == "matrices":
        return "text_projection" not in name
    if keys == "block_linear+proj" and _PROJECTION.search(name):
        return True
    return bool(_IN_LAYER.search(name)) and not _NOT_LINEAR.search(name)


def kind_of(name: str) -> str:
    """The name with `*` for the numbers of layers and experts: one for tensors that do the same in each."""
    return _NUMBER.sub("*", name)


@dataclass(frozen=True)
class Matrix:
    """One matrix (M outputs, N inputs) inside a stored tensor.

    name: what a layout with one tensor a matrix calls it; the tensor's own name where it holds but one.
    start: the first element, in the flattened tensor, of the contiguous stretch in which the matrix lies.
    slab: the shape (A, B) of that stretch.
    axis, first, step, count: it takes the indices first, first + step, ... (count of them) of that axis of the slab.
    transposed: the slab's axes are (inputs, outputs).
    """

    name: str
    start: int
    slab: tuple[int, int]
    axis: int
    first: int
    step: int
    count: int
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """(M, N)."""
        rows, columns = (self.count, self.slab[1]) if self.axis == 0 else (self.slab[0], self.count)
        return (columns, rows) if self.transposed else (rows, columns)

    @property
    def kind(self) -> str:
        """As of `kind_of`."""
        return kind_of(self.name)

    @property
    def is_contiguous(self) -> bool:
        """Whether its elements follow one another in the flattened tensor, row by row."""
        return self.axis == 0 and self.step == 1 and not self.transposed

    def take(self, slab_AB: Tensor) -> Tensor:
        """The matrix (M, N), a view of the slab (A, B)."""
        indices = slice(self.first, self.first + self.step * self.count, self.step)
        taken = slab_AB[indices] if self.axis == 0 else slab_AB[:, indices]
        return taken.T if self.transposed else taken

    def read(self, elements: Callable[[int, int], Tensor]) -> Tensor:
        """The matrix (M, N) of a tensor whose flattened elements [start, stop) are `elements(start, stop)`."""
        return self.take(elements(self.start, self.start + prod(self.slab)).reshape(self.slab))

    def put(self, slab_AB: Tensor, matrix_MN: Tensor) -> None:
        """Write the matrix (M, N) back into the slab (A, B)."""
        self.take(slab_AB).copy_(matrix_MN)


def whole(name: str, slab: tuple[int, int], start: int = 0, transposed: bool = False) -> Matrix:
    """The matrix that fills its slab."""
    return Matrix(name, start, slab, axis=0, first=0, step=1, count=slab[0], transposed=transposed)


@dataclass(frozen=True)
class PackedExperts:
    """How the matrices of E experts lie in one tensor, (E, A, B) or its first two dimensions as one.

    names: of each part of an expert after `prefix`, with `{}` for its number. One part is the whole (A, B); two are
        gate and up, one after the other along the axis of outputs, or alternating where they are interleaved.
    """

    prefix: str
    names: tuple[str, ...]
    slab: tuple[int, int]
    count: int
    transposed: bool
    interleaved: bool = False

    @property
    def form(self) -> tuple[Any, ...]:
        """The same of two tensors in which matrices of the same shapes lie in the same places."""
        return self.slab, self.count, len(self.names), self.transposed, self.interleaved

    def matrices(self) -> tuple[Matrix, ...]:
        """Expert by expert, gate before up."""
        return tuple(part for expert in range(self.count) for part in self._of_expert(expert))

    def _of_expert(self, expert: int) -> Iterator[Matrix]:
        parts, columns, start = len(self.names), self.slab[1], expert * prod(self.slab)
        axis = 1 if self.transposed else 0
        count = self.slab[axis] // parts
        for part, name in enumerate(self.names):
            name = self.prefix + name.format(expert)
            if axis == 0 and not self.interleaved:  # contiguous: no more than the matrix needs to be read
                yield whole(name, (count, columns), start + part * count * columns)
            else:
                first, step = (part, parts) if self.interleaved else (part * count, 1)
                yield Matrix(name, start, self.slab, axis, first, step, count, self.transposed)


@dataclass(frozen=True)
class TensorRole:
    """What a tensor of a model is.

    tower, layer: what stands before the first number in its name, and that number; None outside of numbered layers.
    expert: the number of the MoE expert, in layouts that have tensors of their own for each.
    kind: the name without the numbers of layers and experts.
    axes: a label for each dimension; dimensions of different tensors with one label move together under a
        permutation of what they count. None where that is not known.
    module: the attention or MLP that it is a part of, a name; None for other tensors.
    of: of a bias, what the weight is whose outputs it is added to, if that is known.
    transposed: a weight with the axes (inputs, outputs), as of transformers' Conv1D.
    parts: how many matrices of equal heights a fused weight or its bias has one below the other (one beside the other
        if it is transposed), whose outputs move together.
    query_rows: how many outputs of a fused attention weight are queries, if they come first.
    packed: of packed experts, how they lie; None where neither the configuration nor the shapes say it.
    unsplit: why the matrices of packed experts are not known, a clause for a warning.
    """

    name: str
    shape: tuple[int, ...]
    role: Role
    tower: str | None
    layer: int | None
    expert: int | None
    kind: str
    axes: tuple[str | None, ...]
    module: str | None = None
    of: Role | None = None
    transposed: bool = False
    parts: int = 1
    query_rows: int | None = None
    packed: PackedExperts | None = None
    unsplit: str | None = None

    @property
    def by_token(self) -> bool:
        """Whether its first dimension has an entry for every token of a vocabulary."""
        return bool(self.shape) and (self.role is Role.EMBEDDING or Role.HEAD in (self.role, self.of))

    @property
    def before_layers(self) -> bool:
        """Whether it is outside of the layers and used before the first of them."""
        if self.layer is not None or Role.HEAD in (self.role, self.of):
            return False
        return self.role in _BEFORE_LAYERS or "embed" in self.name or bool(_EARLY_NORM.search(self.name))

    @property
    def multiplied_from_left(self) -> bool:
        """Whether it is a bare parameter P (N, M) that is applied as `x @ P`: open_clip's projections."""
        return self.role is Role.PROJECTION and len(self.shape) == 2 and not self.name.endswith(".weight")

    @property
    def outputs(self) -> int:
        """The dimension that counts the outputs of a weight with two axes, or of a bias."""
        return 1 if self.transposed and len(self.shape) == 2 else 0

    @property
    def inputs(self) -> int:
        """The dimension that counts the inputs of a weight with two axes."""
        return 1 - self.outputs

    def matrices(self, keys: Keys, convolutions: bool = True) -> tuple[Matrix, ...]:
        """The matrices that get the treatment of a spectral method; () if there are none.

        A convolution (O, I, *kernel) inside of numbered layers is a matrix (O, I * prod(kernel)) for all `keys` if
        `convolutions` says so, but for depthwise ones. What is fused is one matrix, as the official codes have it, but
        packed experts are the matrices that a layout with a tensor for each would have.
        """
        if self.packed:
            return tuple(part for part in self.packed.matrices() if is_matrix(part.name, part.shape, keys))
        if self.role is Role.CONVOLUTION:
            if not convolutions or self.layer is None or self.shape[1] == 1:
                return ()
            return (whole(self.name, (self.shape[0], prod(self.shape[1:]))),)
        if len(self.shape) != 2 or self.of is Role.EXPERTS or not is_matrix(self.name, self.shape, keys):
            return ()
        rows, columns = self.shape
        return (whole(self.name, (rows, columns), transposed=self.transposed),)

    def attention_parts(self) -> tuple[Matrix, ...]:
        """Queries, keys and values of a fused weight; () where they do not lie one after the other."""
        if self.role not in (Role.QKV_THIRDS, Role.QKV_GROUPED) or self.query_rows is None:
            return ()
        (rows, columns), axis = self.shape, self.outputs
        others = (self.shape[axis] - self.query_rows) // 2
        found, first = [], 0
        for part, count in (("query", self.query_rows), ("key", others), ("value", others)):
            name = f"{self.name}.{part}"
            if axis == 0:
                found.append(whole(name, (count, columns), first * columns))
            else:
                found.append(Matrix(name, 0, (rows, columns), axis, first, 1, count, transposed=True))
            first += count
        return tuple(found)

    def moved(self, axis: int, order: Sequence[int]) -> list[int]:
        """The indices of a dimension after a permutation of what its label counts.

        order: the permutation of the label's units (`Model.units`). A unit may be several indices (a head), and is
        there once in every part of a fused tensor.
        """
        parts = self.parts if axis == self.outputs else 1
        length = self.shape[axis] // parts
        width = length // len(order)
        return [
            part * length + unit * width + i for part in range(parts) for unit in order for i in range(width)
        ]
