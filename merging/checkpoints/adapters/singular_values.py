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
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from mergeline.merging.checkpoints.checkpoint import Files, TensorInfo, hasher
from mergeline.merging.checkpoints.computed import Elements
from mergeline.merging.errors import UserError
from mergeline.merging.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

_LEAST_GAP = 1e-8  # of two values over the largest, below which vectors are known to less than float32
_BUFFERS = 8  # float64 matrices of the base's size, while it is decomposed: 7.3 were measured of a square one

_Basis = tuple["Tensor", "Tensor", "Tensor"]


class _Last(threading.local):
    """What a thread decomposed last, which the other adapters of this base need next.

    key: the digest and the shape of what was decomposed.
    """

    key: tuple[str, tuple[int, ...]] | None = None
    basis: _Basis | None = None

    def holds(self, key: tuple[str, tuple[int, ...]], count: int) -> bool:
        """Whether the vectors of so many values are there."""
        return self.basis is not None and self.key == key and len(self.basis[2]) >= count

    def forget(self) -> None:
        self.key = self.basis = None


_LAST = _Last()
Files.on_close.append(_LAST.forget)


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
        u_MK, s_L, v_KN = self._basis(elements, count)
        self._refuse_equal(s_L, count)
        values_R = elements(self.values, 0, count).double()
        left_MR = u_MK[:, :count] * (values_R - s_L[:count])
        return left_MR.contiguous(), v_KN[:count]  # bits of a product depend on how its factors lie

    def _basis(self, elements: Elements, count: int) -> _Basis:
        """U (M, K), s (L,) and V^T (K, N) of the base, float64: all values, the vectors of at least `count` of them."""
        key = self.digest, self.base.shape
        if not (self._is_base.is_set() and _LAST.holds(key, count)):
            base = self.base.read(elements, 0, prod(self.base.shape))
            if f"blake3:{_hash_of(base)}" != self.digest:
                raise UserError(
                    f"{self.config}: the adapter was not trained on this base, whose '{self.base.name}' is another "
                    "(base_digests); name the base that it was trained on, in the same dtype"
                )
            self._is_base.set()
            if not _LAST.holds(key, count):
                base_MN = base.double().reshape(self.base.shape[0], -1)
                if not base_MN.isfinite().all():
                    raise UserError(f"'base': tensor '{self.base.name}' holds NaN or Inf; repair it")
                u_ML, s_L, v_LN = torch.linalg.svd(base_MN, full_matrices=False)
                _LAST.key, _LAST.basis = key, (u_ML[:, :count].contiguous(), s_L, v_LN[:count].clone())
        assert _LAST.basis is not None, "it is there now"
        return _LAST.basis

    def _refuse_equal(self, s_L: Tensor, count: int) -> None:
        """Raises UserError where vectors of two singular values may be any that span the same plane."""
        gaps = s_L[:-1][:count] - s_L[1 : count + 1]
        close = (gaps <= _LEAST_GAP * s_L[0]).nonzero()
        if len(close):
            i = int(close[0])
            raise UserError(
                f"{self.config}: singular values {i + 1} and {i + 2} of the base's '{self.base.name}' are equal "
                f"({float(s_L[i]):.6g}), so that values in their places belong to no certain vectors; merge the "
                "adapter into its base with the program that trained it"
            )


def _hash_of(tensor: Tensor) -> str:
    """The BLAKE3 of the bytes of a tensor."""
    hash = hasher()
    hash.update(tensor.contiguous().view(torch.uint8).numpy().data)
    return hash.hexdigest()
