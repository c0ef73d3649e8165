"""ESM: the directions in which each expert moves its layers' outputs most, made orthogonal before they are added."""

from __future__ import annotations

from typing import TYPE_CHECKING, Iterable, Literal

from mergeline.merging.algebra import decompositions, directions
from mergeline.merging.algebra.slots import Slot, Views
from mergeline.merging.lazy import torch
from mergeline.merging.methods.contract import Look, method
from mergeline.merging.methods.parameters import NotNegative, TaskRank

if TYPE_CHECKING:
    from torch import Tensor


Variant = Literal["vision", "language"]


def _mean_norms(
    views: Views, *, rank: TaskRank, polarization: float, eigenvalue_power: float, variant: Variant
) -> dict[str, float]:
    """For each kind of matrix in blocks the mean norm of what is added to it, before polarization over layers."""
    setting = (rank, polarization, eigenvalue_power, variant)
    views = views.only(lambda view: view.is_matrix and bool(view.matrices("block_linear", True)))
    norms_of: dict[str, list[float]] = {}
    norms = views.each(lambda view: [float(_update(x, *setting).norm()) for x in view.blocks("tensor")])
    for view, found in zip(views.views, norms):
        norms_of.setdefault(view.kind, []).extend(found)
    return {kind: sum(norms) / len(norms) for kind, norms in norms_of.items()}


@method(
    paper="2602.20208",
    code="kiddo127/ESM@fc82fe76",
    scale=1.0,
    keys="matrices",
    other="mean",
    needs=("base", "gram"),
    measure=Look(_mean_norms, over=lambda params: "model" if params["polarization"] > 0 else None),
    spectral=lambda rows, columns, experts: 5 * rows**2 + 6 * rows * columns + 4 * columns**2,
)
def esm(
    x: Slot,
    *,
    rank: TaskRank = "1/T",
    polarization: NotNegative = 2.0,
    eigenvalue_power: NotNegative = 0.15,
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
    update_MN = x.shared(_update, rank, polarization, eigenvalue_power, variant)
    mean = (x.found or {}).get(x.view.kind, 0.0)
    return update_MN * (float(update_MN.norm()) / mean) ** polarization if mean else update_MN


def _update(
    x: Slot, rank: TaskRank, polarization: float, eigenvalue_power: float, variant: Variant
) -> Tensor:
    """What is added to a matrix, before it is polarized over layers: (M, N) float64."""
    count, vision = len(x.experts), variant == "vision"
    by_outputs = x.has_statistic("gram", 0)
    from_left = by_outputs and x.view.inputs == 0  # applied as x @ W: the outputs are its columns
    side = x.shape[1 if from_left else 0] if by_outputs else min(x.shape)
    k = max(1, int(side * (1 / count if isinstance(rank, str) else rank)))
    if not by_outputs:
        factors = directions.triplets_of_tasks(x, k)
        return decompositions.orthogonal_sum(factors) if vision else _evened_sum(factors)
    lefts, rights, norms = [], [], []
    for t in range(count):
        tau_MN = directions.task_vector(x, t)
        tau_MN = tau_MN.T if from_left else tau_MN
        energy_K, u_MK = _output_directions(tau_MN, x.statistic("gram", t).double(), k)
        weight_K = (energy_K / energy_K.mean()) ** eigenvalue_power
        lefts.append(u_MK * (weight_K / weight_K.mean()))
        rights.append(lefts[-1].T @ tau_MN)
        norms.append(float(tau_MN.norm()))
    u_MK, v_KN = torch.cat(lefts, dim=1), torch.cat(rights)
    if not len(v_KN):
        return torch.zeros(x.shape, dtype=torch.float64, device=v_KN.device)
    if vision:
        for right_KN, norm in zip(v_KN.split([len(right_KN) for right_KN in rights]), norms):
            right_KN *= (norm * count / sum(norms)) ** polarization
        norm_N = v_KN.norm(dim=0)
        v_KN *= (norm_N / norm_N.mean()) ** polarization
    update_MN = decompositions.evened(u_MK) @ decompositions.evened(v_KN)
    update_MN = update_MN.mul_(2) if vision else update_MN
    return update_MN.T if from_left else update_MN


def _output_directions(tau_MN: Tensor, gram_NN: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k leading eigenvalues (K,) and eigenvectors (M, K) of tau G tau^T; fewer, if the others are noise."""
    if tau_MN.shape[0] > tau_MN.shape[1]:
        energy_N, q_NN = decompositions.eigenpairs(gram_NN)
        rooted_NN = q_NN * energy_N.clamp(min=0).sqrt()
        u_MK, s_K, _ = decompositions.singular_triplets(tau_MN @ rooted_NN, k)
        return s_K.square(), u_MK
    energy_K, q_MK = decompositions.leading(tau_MN @ gram_NN @ tau_MN.T, k)
    kept_K = decompositions.above_noise(energy_K, energy_K.sum())
    return energy_K[kept_K], q_MK[:, kept_K]


def _evened_sum(factors: Iterable[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """TSV-M's sum with both factors evened: of U (M, K), s (K,), V (N, K)."""
    us, ss, vs = zip(*factors)
    left_MK = decompositions.evened(torch.cat(us, dim=1)) * torch.cat(ss)
    return left_MK @ decompositions.evened(torch.cat(vs, dim=1)).T
