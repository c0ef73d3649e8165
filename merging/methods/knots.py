"""KnOTS: task vectors merged in the basis of their common singular vectors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, Mapping, Sequence

from annotated_types import Ge, Le

from merging import spectral
from merging.keys import Keys, is_matrix
from merging.methods import Inner, method
from merging.methods.dare import drop
from merging.slots import Slot

if TYPE_CHECKING:
    from torch import Tensor


def rotate(x: Slot, *, threshold: float, drop_rate: float, **_: Any) -> Slot:
    """Each task vector in the common basis, around zero; with a random share of the entries dropped."""
    base, basis_MK = x.base.double(), _basis(x, threshold)
    seen = x.instead(
        (basis_MK.shape[1], x.shape[1]),
        x.base.new_zeros(basis_MK.shape[1], x.shape[1]),
        lambda t: (basis_MK.T @ spectral.task_vector(x, t, base)).to(x.dtype),
    )
    return drop(seen, drop_rate=drop_rate, masks="drawn", rescale=True) if drop_rate else seen


def _basis(x: Slot, threshold: float) -> Tensor:
    """The left singular vectors, of all task vectors side by side, that count: (M, K)."""
    energy_K, left_MK = x.remember(
        "common directions", lambda: spectral.common_directions(x, x.base.double(), "pretrained")
    )
    return left_MK[:, energy_K > threshold**2]


def sees(name: str, shape: Sequence[int], params: Mapping[str, Any]) -> bool:
    return is_matrix(name, shape, params["keys"])


def _factors(x: Slot, merge: Inner, *, threshold: float, keys: Keys, **_: Any) -> tuple[Tensor, Tensor]:
    seen = sees(x.name, x.shape, {"keys": keys})
    basis_MK = _basis(x, threshold) if seen else x.base.double().flatten(1)[:, :0]
    return basis_MK, merge(x).double() if basis_MK.shape[1] else x.base.double().flatten(1)[:0]


@method(
    family="wrapper",
    paper="2410.19735",
    code="gstoica27/KnOTS@baa35e85",
    reference="pretrained",
    unit="matrix",
    needs_base=True,
    transform=rotate,
    sees=sees,
    inner_defaults={"scale": 0.6},
    spectral=True,
    beside=lambda rows, columns, experts: 12 * rows * columns + 6 * rows**2,
    as_factors=_factors,
)
def knots(
    x: Slot,
    merge: Inner,
    *,
    inner: Literal["ties", "task_arithmetic", "average"] = "ties",
    drop_rate: Annotated[float, Ge(0), Le(1)] = 0.0,
    threshold: Annotated[float, Ge(0)] = 1e-5,
    keys: Keys = "block_linear",
) -> Tensor:
    """base + U * another merge of the U^T tau_t, U S [V_1 ... V_T]^T the task vectors side by side; others: base.

    Singular values up to `threshold` are left out. The inner method sees all matrices rotated like this, and its
    parameters stand beside these; its `scale` is 0.6 unless it is given. `drop_rate` drops entries of what it sees, as
    dare does. A pre-pass of the inner method decomposes each matrix several times unless there is a factor store.

    Formula:
        U S [V₁ … V_T]ᵀ = [τ₁ … τ_T], the task vectors side by side, where S > threshold
        θ₀ + U · inner merge of the (Uᵀ τₜ)
    Parameters:
        drop_rate: share of the entries of what the inner method sees that is dropped at random, as dare does
        threshold: singular values up to it are left out
    Spectral work:
        an eigendecomposition of the M x M sum of Gram matrices, a matrix, at every look of the inner method;
        `--factors` keeps it
    Trap:
        `threshold` is absolute. With task_arithmetic inside, matrices come out as by task_arithmetic alone;
        ties inside trims over the rotated matrices of the whole model. Other tensors stay the base's.
    """
    base = x.base.double()
    if not sees(x.name, x.shape, {"keys": keys}):
        return base
    left_MK, right_KN = _factors(x, merge, threshold=threshold, keys=keys)
    return base + left_MK @ right_KN if left_MK.shape[1] else base
