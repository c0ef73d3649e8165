"""ESM: the directions in which each expert moves its layers' outputs most, made orthogonal before they are added."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Any, Iterable, Literal

from annotated_types import Ge, Gt, Le

from merging import operators as ops
from merging import spectral
from merging.keys import Keys, is_matrix
from merging.lazy import torch
from merging.methods import method
from merging.methods.regmean import needs_gram
from merging.slots import Inputs, Slot

if TYPE_CHECKING:
    from torch import Tensor

Rank = Annotated[float, Gt(0), Le(1)] | Literal["1/T"]
Variant = Literal["vision", "language"]


def _kind(name: str) -> str:
    """The name without the numbers of layers: the same for tensors that do the same in each."""
    return re.sub(r"(?<![^.])\d+(?=\.)", "*", name)


def _mean_norms(inputs: Inputs, *, scale: float, **params: Any) -> dict[str, float]:
    """For each kind of matrix in blocks the mean norm of what is added to it, before polarization over layers."""
    keys = ("block_linear", params["keys"])
    inputs = inputs.only(lambda view: all(is_matrix(view.name, view.shape, k) for k in keys))
    norms_of: dict[str, list[float]] = {}
    norms = inputs.each(lambda view: [float(_update(x, **params).norm()) for x in view.blocks("tensor")])
    for view, found in zip(inputs.views, norms):
        norms_of.setdefault(_kind(view.name), []).extend(found)
    return {kind: sum(norms) / len(norms) for kind, norms in norms_of.items()}


@method(
    family="statistics",
    paper="2602.20208",
    code="kiddo127/ESM@fc82fe76",
    reference="pretrained",
    unit="matrix",
    needs_base=True,
    prepass=_mean_norms,
    prepass_if=lambda params: params["polarization"] > 0,
    statistics=needs_gram,
    spectral=True,
    beside=lambda rows, columns, experts: 5 * rows**2 + 6 * rows * columns + 4 * columns**2,
)
def esm(
    x: Slot,
    *,
    rank: Rank = "1/T",
    scale: float = 1.0,
    keys: Keys = "matrices",
    polarization: Annotated[float, Ge(0)] = 2.0,
    eigenvalue_power: Annotated[float, Ge(0)] = 0.15,
    variant: Variant = "vision",
) -> Tensor:
    """base + scale * U V, evened: the directions in which experts move outputs most, and what moves outputs there.

    An expert's output directions are the principal components of X tau^T, X the inputs that an expert's layer sees of
    a few unlabelled samples: the eigenvectors of tau G tau^T, G their Gram matrix (statistics `gram`, (N, N) for a
    weight (M, N), as of `regmean`). Matrices without one are merged as `tsv_merge` does, other tensors add the mean
    task vector. k = max(1, int(rank * M)), of matrices without one of min(M, N), where `1/T` is 1 / T.

    The scalings of the official vision code are by powers of norms over their mean: of task vectors, of columns of V,
    and of what is added to a matrix among those of its kind in all layers. Its code for language models scales over
    layers alone, does not double, and evens the factors of `tsv_merge` too. Directions that are only rounding are left
    out. Where X has fewer rows than outputs, the official code fills the directions up with unit vectors, which enter
    the norms of task vectors; here these are exact.

    Formula:
        eₜ, Qₜ = the k leading eigenvalues and eigenvectors of τₜ Gₜ τₜᵀ
        dₜ = (eₜ / mean eₜ)^eigenvalue_power over its own mean;  p = polarization
        U = [Q₁ d₁ … Q_T d_T];  V has the rows dₜ Qₜᵀ τₜ · (‖τₜ‖ / mean ‖τ‖)ᵖ, then its columns v times (‖v‖ / mean)ᵖ
        Δ = 2 · s(U) polar(U) · s(V) polar(V), s the mean singular value
        θ₀ + scale · Δ · (‖Δ‖ / mean ‖Δ‖ of its kind)ᵖ
    Parameters:
        rank: share of the output directions that is kept of each expert
        polarization: the power of all scalings by norms; 0 for none
        eigenvalue_power: of the eigenvalues by which an expert's directions are weighed
        variant: scale tasks, columns and layers, and double (vision), or layers alone (language)
    Needs:
        a Gram matrix (N, N) of the inputs of every linear layer that is to be merged by its outputs; 32 unlabelled
        samples a task are enough for the paper
    Spectral work:
        an eigendecomposition of the smaller side of every matrix and expert, and of the Gram matrix where a layer
        has more outputs than inputs; two polar factors a matrix; all of it twice, for the pre-pass needs the norms
    Trap:
        The unit of a Gram matrix does not matter, but the samples do: they must be of the expert's own task, and
        pass through that expert. Two experts keep half of all directions each, and little is left of the idea.
    """
    base = x.base.double()
    if not is_matrix(x.name, x.shape, keys):
        return base + scale * ops.plain_update(x.experts, base, "mean")
    setting = (rank, keys, polarization, eigenvalue_power, variant)
    update_MN = x.share(("esm", *setting), lambda: _update(x, *setting))
    mean = (x.facts or {}).get(_kind(x.name), 0.0)
    factor = (float(update_MN.norm()) / mean) ** polarization if mean else 1.0
    return torch.add(base, update_MN, alpha=scale * factor)


def _update(
    x: Slot, rank: Rank, keys: Keys, polarization: float, eigenvalue_power: float, variant: Variant
) -> Tensor:
    """What is added to a matrix, before it is polarized over layers: (M, N) float64."""
    base, count, vision = x.base.double(), len(x.experts), variant == "vision"
    by_outputs = x.has_statistic("gram", 0)
    side = x.shape[0] if by_outputs else min(x.shape)
    k = max(1, int(side * (1 / count if rank == "1/T" else rank)))
    if not by_outputs:
        factors = spectral.triplets_of_tasks(x, base, k)
        return spectral.orthogonal_sum(factors) if vision else _evened_sum(factors)
    lefts, rights, norms = [], [], []
    for t in range(count):
        tau_MN = spectral.task_vector(x, t, base)
        energy_K, u_MK = _output_directions(tau_MN, x.statistic("gram", t).double(), k)
        weight_K = (energy_K / energy_K.mean()) ** eigenvalue_power
        lefts.append(u_MK * (weight_K / weight_K.mean()))
        rights.append(lefts[-1].T @ tau_MN)
        norms.append(float(tau_MN.norm()))
    u_MK, v_KN = torch.cat(lefts, dim=1), torch.cat(rights)
    if not len(v_KN):
        return torch.zeros_like(base)
    if vision:
        for right_KN, norm in zip(v_KN.split([len(right_KN) for right_KN in rights]), norms):
            right_KN *= (norm * count / sum(norms)) ** polarization
        norm_N = v_KN.norm(dim=0)
        v_KN *= (norm_N / norm_N.mean()) ** polarization
    update_MN = spectral.evened(u_MK) @ spectral.evened(v_KN)
    return update_MN.mul_(2) if vision else update_MN


def _output_directions(tau_MN: Tensor, gram_NN: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k leading eigenvalues (K,) and eigenvectors (M, K) of tau G tau^T; fewer, if the others are noise."""
    if tau_MN.shape[0] > tau_MN.shape[1]:
        energy_N, q_NN = spectral.eigenpairs(gram_NN)
        u_MK, s_K, _ = spectral.singular_triplets(tau_MN @ (q_NN * energy_N.clamp(min=0).sqrt()), k)
        return s_K.square(), u_MK
    energy_K, q_MK = spectral.leading(tau_MN @ gram_NN @ tau_MN.T, k)
    kept_K = spectral.above_noise(energy_K, energy_K.sum())
    return energy_K[kept_K], q_MK[:, kept_K]


def _evened_sum(factors: Iterable[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """TSV-M's sum with both factors evened: of U (M, K), s (K,), V (N, K)."""
    us, ss, vs = zip(*factors)
    return (spectral.evened(torch.cat(us, dim=1)) * torch.cat(ss)) @ spectral.evened(torch.cat(vs, dim=1)).T
