"""SVFit (Sun et al. 2024, arXiv 2409.05926): leading singular values of the base's matrices, in the base's own basis.

No official code or format was found: the method is reconstructed from its description, and the format is ours. It
lies as PEFT's adapters do. `adapter_model.safetensors` has `base_model.model.MODULE.svfit_values` (R,): what training
made of the R largest singular values of the module's weight, in the order of what they were. In `adapter_config.json`
`peft_type` is SVFIT, and `base_digests` has of each MODULE `blake3:` and the hash of the bytes of the base's tensor,
in the dtype in which it is read. Singular vectors are not stored: they are those of that tensor. A pair of them is
known up to one sign of both, which their product does not show.

Shape suffixes: M rows and N columns (all dimensions but the first) of the base's tensor, R singular values.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from mergeline.merging.checkpoints.checkpoint import TensorInfo, hasher
from mergeline.merging.checkpoints.computed import Elements
from mergeline.merging.errors import UserError
from mergeline.merging.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

_LEAST_GAP = (
    1e-8  # of two singular values over the largest, below which vectors are known to less than float32
)
_BUFFERS = 6  # float64 matrices of the base's size, while it is decomposed
_MOST_BASES = 16  # that are kept for the other adapters of the same base

_Basis = tuple["Tensor", "Tensor", "Tensor"]  # U (M, R), s (R,), V^T (R, N)
_bases: OrderedDict[tuple[str, int], _Basis] = (
    OrderedDict()
)  # by digests, which name what was decomposed, and R


@dataclass(frozen=True)
class SingularValues:
    """`U diag(values - s) V^T` is added, with the R leading singular triplets of the base.

    digest: of the base's tensor that the values are for. config: where that is said.
    """

    values: TensorInfo  # (R,)
    base: TensorInfo
    digest: str
    config: Path
    transposed: bool = False
    _is_base: threading.Event = field(default_factory=threading.Event, repr=False, compare=False)

    row_axes = 1

    @property
    def parts(self) -> tuple[TensorInfo, ...]:
        return (self.values,)

    @property
    def least_rows(self) -> int:
        return prod(self.values.shape)

    @property
    def rank(self) -> int | None:
        return prod(self.values.shape)

    @property
    def computing_bytes(self) -> int:
        """Memory that decomposing the base takes."""
        return 8 * _BUFFERS * prod(self.base.shape)

    def rows(self, elements: Elements, base_MN: Tensor | None, first: int, last: int) -> Tensor:
        left_MR, right_RN = self.factors(elements)
        added_MN = left_MR[first:last] @ right_RN
        return added_MN if base_MN is None else added_MN.add_(base_MN)

    def factors(self, elements: Elements) -> tuple[Tensor, Tensor]:
        """(M, R) and (R, N) (raises UserError for another base, or one whose singular vectors are not unique)."""
        count = prod(self.values.shape)
        u_MR, s_R, v_RN = self._basis(elements, count)
        return u_MR * (elements(self.values, 0, count).double() - s_R), v_RN

    def _basis(self, elements: Elements, count: int) -> _Basis:
        """U (M, R), s (R,) and V^T (R, N) of the base, float64."""
        known = _bases.get((self.digest, count)) if self._is_base.is_set() else None
        if known is None:
            base = self.base.read(elements, 0, prod(self.base.shape))
            if f"blake3:{_hash_of(base)}" != self.digest:
                raise UserError(
                    f"{self.config}: the adapter was not trained on this base, whose '{self.base.name}' is another "
                    "(base_digests); name the base that it was trained on, in the same dtype"
                )
            self._is_base.set()
            known = _bases.get((self.digest, count)) or self._decomposed(base, count)
            _bases[self.digest, count] = known
            while len(_bases) > _MOST_BASES:
                _bases.popitem(last=False)
        return known

    def _decomposed(self, base: Tensor, count: int) -> _Basis:
        base_MN = base.double().reshape(self.base.shape[0], -1)
        if not base_MN.isfinite().all():
            raise UserError(f"'base': tensor '{self.base.name}' holds NaN or Inf; repair it")
        u_ML, s_L, v_LN = torch.linalg.svd(base_MN, full_matrices=False)
        gaps = s_L[:count][: len(s_L) - 1] - s_L[1 : count + 1]
        close = (gaps <= _LEAST_GAP * s_L[0]).nonzero()
        if len(close):
            i = int(close[0])
            raise UserError(
                f"{self.config}: singular values {i + 1} and {i + 2} of the base's '{self.base.name}' are equal "
                f"({float(s_L[i]):.6g}), so that values in their places belong to no certain vectors; merge the "
                "adapter into its base with the program that trained it"
            )
        return u_ML[:, :count].contiguous(), s_L[:count].clone(), v_LN[:count].contiguous()


def _hash_of(tensor: Tensor) -> str:
    """The BLAKE3 of the bytes of a tensor."""
    hash = hasher()
    hash.update(tensor.contiguous().view(torch.uint8).numpy().data)
    return hash.hexdigest()
