"""What kinds of adapters do to a tensor of the base, rows [first, last) at a time.

The formulas are those of PEFT 0.21 (`get_delta_weight` and `merge` of its layers).

Shape suffixes: M rows and N columns (all dimensions but the first) of the base's tensor, R the adapter's rank.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING

from mergeline.merging.checkpoints.adapters.tensor import Update
from mergeline.merging.checkpoints.checkpoint import TensorInfo
from mergeline.merging.checkpoints.computed import Elements
from mergeline.merging.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Factor:
    """A matrix that lies in a stored tensor: these rows and columns of it, or the transpose of what they are.

    width: of the stored tensor's rows, of which each has the dimensions after the first.
    """

    info: TensorInfo
    of_rows: range
    of_columns: range
    transposed: bool = False

    @classmethod
    def of(cls, info: TensorInfo, transposed: bool = False, rows: int | None = None) -> Factor:
        """All of a stored tensor; `rows`: how many its matrix has, if not as many as the first dimension."""
        height = info.shape[0] if rows is None else rows
        return cls(info, range(height), range(prod(info.shape) // max(height, 1)), transposed)

    @property
    def height(self) -> int:
        return len(self.of_columns if self.transposed else self.of_rows)

    @property
    def width(self) -> int:
        return len(self.of_rows if self.transposed else self.of_columns)

    @property
    def _stored_width(self) -> int:
        return prod(self.info.shape) // max(self._stored_height, 1)

    @property
    def _stored_height(self) -> int:
        return max(self.of_rows.stop, self.info.shape[0] if self.info.shape else 1)

    def read(self, elements: Elements, first: int = 0, last: int | None = None) -> Tensor:
        """Rows [first, last), in the stored dtype."""
        last = self.height if last is None else last
        width, columns = self._stored_width, self.of_columns
        if self.transposed and (first, last) != (0, self.height) and columns.step == 1:
            places = [r * width + columns.start for r in self.of_rows]
            return torch.stack([elements(self.info, p + first, p + last) for p in places], dim=1)
        if self.transposed:
            whole = self._block(elements, self.of_rows.start, self.of_rows.stop)
            return whole.T if (first, last) == (0, self.height) else whole.T[first:last]
        start = self.of_rows.start
        return self._block(elements, start + first, start + last)

    def _block(self, elements: Elements, first: int, last: int) -> Tensor:
        """Stored rows, of which all are read."""
        width, columns = self._stored_width, self.of_columns
        block = elements(self.info, first * width, last * width).reshape(last - first, width)
        if columns == range(width):
            return block
        return block[:, columns.start : columns.stop : columns.step]


def _onto(base_MN: Tensor | None, added_MN: Tensor) -> Tensor:
    """What is added with the base's rows, in its memory; alone where there is no base."""
    return added_MN if base_MN is None else added_MN.add_(base_MN)


def _number(elements: Elements, alpha: TensorInfo | None) -> float:
    """A number that a file has; 1 where it has none."""
    return elements(alpha, 0, 1).double().item() if alpha else 1.0


@dataclass(frozen=True)
class Added:
    """LoRA (Hu et al. 2021): `scaling * left @ right` is added."""

    left: Factor  # (M, R)
    right: Factor  # (R, N)
    scaling: float
    transposed: bool = False
    alpha: TensorInfo | None = None  # a number that `scaling` is multiplied with

    row_axes = 1
    computing_bytes = 0

    @property
    def parts(self) -> tuple[TensorInfo, ...]:
        return (*([self.alpha] if self.alpha else []), self.right.info, self.left.info)

    @property
    def least_rows(self) -> int:
        return self.right.height

    @property
    def rank(self) -> int | None:
        return self.right.height

    def rows(self, elements: Elements, base_MN: Tensor | None, first: int, last: int) -> Tensor:
        left_MR, right_RN = self.left.read(elements, first, last), self.right.read(elements)
        adapted_MN = (left_MR.double() @ right_RN.double()).mul_(self._scale(elements))
        return _onto(base_MN, adapted_MN)

    def factors(self, elements: Elements) -> tuple[Tensor, Tensor] | None:
        return self.left.read(elements).double() * self._scale(elements), self.right.read(elements).double()

    def _scale(self, elements: Elements) -> float:
        return self.scaling * _number(elements, self.alpha)


@dataclass(frozen=True)
class _NoProduct:
    """What kinds have in common that add no product of factors; most need nothing but the rows themselves."""

    row_axes = 1
    computing_bytes = 0

    @property
    def least_rows(self) -> int:
        return 1

    @property
    def rank(self) -> int | None:
        return None

    @property
    def transposed(self) -> bool:
        return False

    def factors(self, elements: Elements) -> tuple[Tensor, Tensor] | None:
        return None


@dataclass(frozen=True)
class Nothing:
    """What an adapter adds to a tensor that it does not change, where there is no base: nothing."""

    shape: tuple[int, int]  # (M, N)
    like: TensorInfo  # where something is read, of which nothing is taken
    transposed: bool = False

    row_axes = 1
    least_rows = 1
    computing_bytes = 0

    @property
    def parts(self) -> tuple[TensorInfo, ...]:
        return (self.like,)

    @property
    def rank(self) -> int | None:
        return 0

    def rows(self, elements: Elements, base_MN: Tensor | None, first: int, last: int) -> Tensor:
        return torch.zeros(last - first, self.shape[1], dtype=torch.float64)

    def factors(self, elements: Elements) -> tuple[Tensor, Tensor] | None:
        none = torch.zeros(self.shape[0], 0, dtype=torch.float64)
        return none, torch.zeros(0, self.shape[1], dtype=torch.float64)


@dataclass(frozen=True)
class WithMagnitude(_NoProduct):
    """DoRA (Liu et al. 2024): what LoRA makes of the base, each output with a norm of its own.

    base: the tensor that is changed. magnitude: of each output, a row; a column if the update is transposed.
    """

    update: Added
    base: TensorInfo
    magnitude: TensorInfo
    _norms: list[Tensor] = field(default_factory=list, repr=False, compare=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    @property
    def parts(self) -> tuple[TensorInfo, ...]:
        return self.magnitude, *self.update.parts

    @property
    def least_rows(self) -> int:
        return self.update.least_rows

    @property
    def transposed(self) -> bool:
        return self.update.transposed

    def rows(self, elements: Elements, base_MN: Tensor | None, first: int, last: int) -> Tensor:
        adapted_MN = self.update.rows(elements, base_MN, first, last)
        if self.transposed:
            length_N = elements(self.magnitude, 0, prod(self.magnitude.shape)).double()
            return adapted_MN.mul_(length_N / self._of_columns(elements))
        length_M = elements(self.magnitude, first, last).double()
        return adapted_MN.mul_((length_M / adapted_MN.norm(dim=1))[:, None])

    def _of_columns(self, elements: Elements) -> Tensor:
        """The norm of each column, for which all of it is read once before."""
        with self._lock:
            if not self._norms:
                height, width = self.base.shape[0], prod(self.base.shape[1:])
                step = max(self.least_rows, -(-(1 << 16) // max(width, 1)))
                squares_N = torch.zeros(width, dtype=torch.float64)
                for first in range(0, height, step):
                    last = min(first + step, height)
                    read = self.base.read(elements, first * width, last * width)
                    base_MN = read.to(torch.float64, copy=True).reshape(-1, width)
                    block_MN = self.update.rows(elements, base_MN, first, last)
                    squares_N += block_MN.square().sum(dim=0)
                self._norms.append(squares_N.sqrt())
        return self._norms[0]


@dataclass(frozen=True)
class Shifted(_NoProduct):
    """A vector is added to a bias: the bias of LoRA's second factor (`lora_bias`)."""

    shift: TensorInfo  # (M,)
    scaling: float

    @property
    def parts(self) -> tuple[TensorInfo, ...]:
        return (self.shift,)

    def rows(self, elements: Elements, base_MN: Tensor | None, first: int, last: int) -> Tensor:
        shift_M1 = elements(self.shift, first, last).double().mul_(self.scaling)[:, None]
        return _onto(base_MN, shift_M1)


@dataclass(frozen=True)
class Tokens(_NoProduct):
    """Rows of some tokens are replaced (`trainable_token_indices`, TRAINABLE_TOKENS)."""

    values: TensorInfo  # (len(indices), N)
    indices: tuple[int, ...]

    @property
    def parts(self) -> tuple[TensorInfo, ...]:
        return (self.values,)

    def rows(self, elements: Elements, base_MN: Tensor | None, first: int, last: int) -> Tensor:
        assert base_MN is not None, "rows of a base are replaced"
        width = base_MN.shape[1]
        for i, token in enumerate(self.indices):
            if first <= token < last:
                base_MN[token - first] = elements(self.values, i * width, (i + 1) * width).double()
        return base_MN


@dataclass(frozen=True)
class Scaled(_NoProduct):
    """(IA)3 (Liu et al. 2022): each output is scaled, a row; or each input, a column."""

    scale: TensorInfo  # M or N elements
    by_row: bool

    @property
    def parts(self) -> tuple[TensorInfo, ...]:
        return (self.scale,)

    def rows(self, elements: Elements, base_MN: Tensor | None, first: int, last: int) -> Tensor:
        assert base_MN is not None, "a base is scaled"
        if self.by_row:
            return base_MN.mul_(elements(self.scale, first, last).double()[:, None])
        return base_MN.mul_(elements(self.scale, 0, base_MN.shape[1]).double())


@dataclass(frozen=True)
class Vera(_NoProduct):
    """VeRA (Kopiczko et al. 2023): `diag(outer) @ left @ diag(inner) @ right`, the factors being random ones of all."""

    left: Factor  # (O, R)
    right: Factor  # (R, I)
    outer: TensorInfo  # (O,)
    inner: TensorInfo  # (R,)
    swapped: bool = False  # the base's tensor is (I, O)

    @property
    def parts(self) -> tuple[TensorInfo, ...]:
        return self.right.info, self.left.info, self.inner, self.outer

    @property
    def least_rows(self) -> int:
        return self.right.height

    @property
    def rank(self) -> int | None:
        return self.right.height

    @property
    def transposed(self) -> bool:
        return self.swapped

    def rows(self, elements: Elements, base_MN: Tensor | None, first: int, last: int) -> Tensor:
        left_MR, right_RN = self._factors(elements, first, last)
        adapted_MN = left_MR @ right_RN
        return _onto(base_MN, adapted_MN)

    def factors(self, elements: Elements) -> tuple[Tensor, Tensor] | None:
        return self._factors(elements, 0, (self.right.width if self.swapped else self.left.height))

    def _factors(self, elements: Elements, first: int, last: int) -> tuple[Tensor, Tensor]:
        inner_R = elements(self.inner, 0, self.right.height).double()
        outer_O = elements(self.outer, 0, self.left.height).double()
        if self.swapped:
            right_RI = self.right.read(elements).double() * inner_R[:, None]
            left_OR = self.left.read(elements).double() * outer_O[:, None]
            return right_RI.T[first:last], left_OR.T
        left_MR = self.left.read(elements, first, last).double() * outer_O[first:last, None]
        return left_MR, self.right.read(elements).double() * inner_R[:, None]


@dataclass(frozen=True)
class Product:
    """A matrix of LoHa or LoKr: `left @ right`, or with a core (R, R, *kernel) CP's tensor of the three."""

    left: Factor  # (M, R)
    right: Factor  # (R, N without the kernel)
    core: TensorInfo | None = None

    @property
    def parts(self) -> tuple[TensorInfo, ...]:
        return (self.left.info, self.right.info, *([self.core] if self.core else []))

    def read(self, elements: Elements, first: int, last: int) -> Tensor:
        """Rows [first, last), float64."""
        left_MR = self.left.read(elements, first, last).double()
        right_RN = self.right.read(elements).double()
        if self.core is None:
            return left_MR @ right_RN
        core_IJK = elements(self.core, 0, prod(self.core.shape)).double().reshape(*self.core.shape[:2], -1)
        return torch.einsum("ijk,jn,mi->mnk", core_IJK, right_RN, left_MR).flatten(1)


@dataclass(frozen=True)
class Hadamard(_NoProduct):
    """LoHa (Hyeon-Woo et al. 2021): the entrywise product of two products."""

    one: Product
    two: Product
    scaling: float

    @property
    def parts(self) -> tuple[TensorInfo, ...]:
        return *self.one.parts, *self.two.parts

    @property
    def least_rows(self) -> int:
        return self.one.left.width

    def rows(self, elements: Elements, base_MN: Tensor | None, first: int, last: int) -> Tensor:
        adapted_MN = self.one.read(elements, first, last).mul_(self.two.read(elements, first, last))
        adapted_MN.mul_(self.scaling)
        return _onto(base_MN, adapted_MN)


@dataclass(frozen=True)
class Kronecker(_NoProduct):
    """LoKr (Yeh et al. 2023): the Kronecker product of `outer` (P, Q) and `inner` (M/P, N/Q).

    height: M/P. kernel: how many elements of a convolution belong to one input.
    """

    outer: Factor | Product
    inner: Factor | Product
    height: int
    kernel: int
    scaling: float

    @property
    def parts(self) -> tuple[TensorInfo, ...]:
        return tuple(
            part
            for side in (self.outer, self.inner)
            for part in ((side.info,) if isinstance(side, Factor) else side.parts)
        )

    @property
    def least_rows(self) -> int:
        return 64

    def rows(self, elements: Elements, base_MN: Tensor | None, first: int, last: int) -> Tensor:
        done, at = [], first
        while at < last:  # whole multiples of the inner matrix, and parts of it before and after
            low = at % self.height
            whole = (last - at) // self.height * self.height if not low else 0
            high = min(low + last - at, self.height)
            done.append(self._rows(elements, at // self.height, max(whole // self.height, 1), low, high))
            at += whole or high - low
        adapted_MN = torch.cat(done).mul_(self.scaling)
        return _onto(base_MN, adapted_MN)

    def _rows(self, elements: Elements, start: int, count: int, low: int, high: int) -> Tensor:
        """Rows [low, high) of the inner matrix by `count` rows of the outer one."""
        outer_PQ = self.outer.read(elements, start, start + count).double()
        inner_CDK = self.inner.read(elements, low, high).double().reshape(high - low, -1, self.kernel)
        return torch.einsum("pq,cdk->pcqdk", outer_PQ, inner_CDK).reshape(count * (high - low), -1)


@dataclass(frozen=True)
class Tucker(_NoProduct):
    """LoCon with `lora_mid` (LyCORIS, Yeh et al. 2023): three factors of a convolution, one of which has its kernel."""

    product: Product

    @property
    def parts(self) -> tuple[TensorInfo, ...]:
        return self.product.parts

    @property
    def least_rows(self) -> int:
        return self.product.left.width

    def rows(self, elements: Elements, base_MN: Tensor | None, first: int, last: int) -> Tensor:
        return _onto(base_MN, self.product.read(elements, first, last))


@dataclass(frozen=True)
class Part(_NoProduct):
    """Rows of what is added to several layers that lie one after the other, times `scaling`.

    start: the first of these rows. alpha: a number that `scaling` is multiplied with.
    """

    update: Hadamard | Kronecker | Tucker
    start: int
    scaling: float
    alpha: TensorInfo | None

    @property
    def parts(self) -> tuple[TensorInfo, ...]:
        return (*([self.alpha] if self.alpha else []), *self.update.parts)

    @property
    def least_rows(self) -> int:
        return self.update.least_rows

    def rows(self, elements: Elements, base_MN: Tensor | None, first: int, last: int) -> Tensor:
        added_MN = self.update.rows(elements, None, self.start + first, self.start + last)
        return _onto(base_MN, added_MN.mul_(self.scaling * _number(elements, self.alpha)))


@dataclass(frozen=True)
class Rotated(_NoProduct):
    """OFT (Qiu et al. 2023): blocks of inputs are rotated, each by what Cayley makes of a skew matrix.

    angles: (blocks or 1, B (B - 1) / 2), what lies above the diagonals. size: B. terms: of Neumann's series in place
    of an inverse; None: the inverse. limit: the largest norm of a skew matrix, of COFT. embedding: its rows are
    rotated the other way round.
    """

    angles: TensorInfo
    size: int
    terms: int | None
    limit: float | None = None
    embedding: bool = False

    @property
    def parts(self) -> tuple[TensorInfo, ...]:
        return (self.angles,)

    @property
    def least_rows(self) -> int:
        return 4 * self.size

    def rows(self, elements: Elements, base_MN: Tensor | None, first: int, last: int) -> Tensor:
        assert base_MN is not None, "a base is rotated"
        turns_DBB = self._rotations(elements)
        blocks = base_MN.reshape(last - first, -1, self.size)
        sides = "mdb,dbc->mdc" if self.embedding else "mdb,dcb->mdc"
        turns_DBB = turns_DBB.expand(blocks.shape[1], -1, -1)
        return torch.einsum(sides, blocks, turns_DBB).reshape(base_MN.shape)

    def _rotations(self, elements: Elements) -> Tensor:
        angles_DE = elements(self.angles, 0, prod(self.angles.shape)).double().reshape(self.angles.shape)
        above = torch.triu_indices(self.size, self.size, 1)
        skew_DBB = torch.zeros(len(angles_DE), self.size, self.size, dtype=torch.float64)
        skew_DBB[:, above[0], above[1]] = angles_DE
        skew_DBB = skew_DBB - skew_DBB.mT
        if self.limit is not None:
            most = self.limit / len(skew_DBB) ** 0.5
            norm_D11 = skew_DBB.norm(dim=(1, 2), keepdim=True)
            skew_DBB = torch.where(norm_D11 <= most, skew_DBB, most * skew_DBB / norm_D11)
        one_BB = torch.eye(self.size, dtype=torch.float64)
        if self.terms is None:
            return torch.linalg.solve(one_BB + skew_DBB, one_BB - skew_DBB, left=False)
        # 1 + 2 Q + 2 Q^2 + ..., the last power once
        turns_DBB, power_DBB = one_BB.repeat(len(skew_DBB), 1, 1), one_BB
        powers = [1, *range(2, max(self.terms, 4))] if self.terms > 2 else [1] if self.terms == 2 else []
        for i in powers:
            power_DBB = power_DBB @ skew_DBB
            turns_DBB = turns_DBB + (1.0 if self.terms > 2 and i == powers[-1] else 2.0) * power_DBB
        return turns_DBB


@dataclass(frozen=True)
class Reflected(_NoProduct):
    """HRA (Yuan et al. 2024): inputs are reflected at one hyperplane after the other.

    normals: (N, R). orthogonal: they are made orthogonal first (Gram and Schmidt).
    """

    normals: TensorInfo
    orthogonal: bool

    @property
    def parts(self) -> tuple[TensorInfo, ...]:
        return (self.normals,)

    @property
    def least_rows(self) -> int:
        return self.normals.shape[1]

    def rows(self, elements: Elements, base_MN: Tensor | None, first: int, last: int) -> Tensor:
        assert base_MN is not None, "a base is reflected"
        normals_NR = elements(self.normals, 0, prod(self.normals.shape)).double().reshape(self.normals.shape)
        if self.orthogonal:
            for i in range(normals_NR.shape[1]):
                for j in range(i):
                    normals_NR[:, i] -= (normals_NR[:, j] @ normals_NR[:, i]) * normals_NR[:, j]
                normals_NR[:, i] /= normals_NR[:, i].norm()
        else:
            normals_NR = normals_NR / normals_NR.norm(dim=0)
        for normal_N in normals_NR.T:
            base_MN = base_MN - 2.0 * torch.outer(base_MN @ normal_N, normal_N)
        return base_MN


@dataclass(frozen=True)
class Packed(_NoProduct):
    """Packed experts (E, A, B): an update of each expert's (A, B), in order."""

    experts: tuple[Update, ...]
    height: int  # A

    row_axes = 2

    @property
    def parts(self) -> tuple[TensorInfo, ...]:
        return self.experts[0].parts  # all lie in the same tensors

    @property
    def least_rows(self) -> int:
        return self.experts[0].least_rows

    def rows(self, elements: Elements, base_MN: Tensor | None, first: int, last: int) -> Tensor:
        done = []
        for expert in range(first // self.height, -(-last // self.height)):
            start = expert * self.height
            low, high = max(first - start, 0), min(last - start, self.height)
            base = None if base_MN is None else base_MN[start + low - first : start + high - first]
            done.append(self.experts[expert].rows(elements, base, low, high))
        return torch.cat(done)
