"""Which errors of a linear map's outputs what comes out of a model feels: weights of the outputs for least squares.

H = E (df/dy)^T (df/dy), y the outputs of the map, is how much f moves, in squares, when they do: the Gauss-Newton
matrix of which K-FAC (1503.05671) keeps the same factor. f are directions that are drawn: of the features' unit vector,
or from the likeliest class to another one, in logits; of logits that are numbers, as they are for the features.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Iterable, Literal

from mergeline.merging.errors import UserError
from mergeline.merging.lazy import torch
from mergeline.merging.learning.network import Batch, Network
from mergeline.merging.learning.squares import NOT_FINITE
from mergeline.merging.learning.watching import Applied, watched

if TYPE_CHECKING:
    from torch import Tensor

Felt = Literal["features", "classes"]

_FLOOR = 0.1  # of the mean diagonal: few examples do not show all that is felt
_FLAT = 0.25  # the power of probabilities that the other class is drawn by
_CERTAIN = 1e-6  # of the mean diagonal: what is preconditioned by has an inverse without a ridge, too
_STEPS, _NEAR = 12, 3e-2  # of conjugate gradients


def sensitivities(
    network: Network, batches: Iterable[Batch], task: str, of: Felt, draws: int, seed: int = 0
) -> dict[str, Tensor]:
    """H (M, M) of every linear map of the model as its weights are, float32, of mean diagonal 1 and a floor.

    draws: directions for each row of features (R, d), or of the task's logits (R, C). Convolutions, and maps that
    nothing depends on, have none.

    Raises:
        UserError: classes are asked for of models without logits; features or logits are NaN or Inf.
    """
    own = {name: t for name, t in network.tensors().items() if t.is_floating_point()}
    generator = torch.Generator().manual_seed(seed)
    sums: dict[str, Tensor] = {}
    leaves = [parameter for parameter in network.module.parameters() if not parameter.requires_grad]
    try:
        for leaf in leaves:
            leaf.requires_grad_(True)
        for batch in batches:
            uses: list[Applied] = []
            with torch.enable_grad(), watched(own, uses.append):
                features_RD = network.features(batch)
                if of == "features":
                    given = torch.nn.functional.normalize(features_RD, dim=-1)
                else:
                    given = network.logits(features_RD, task)
            if not bool(torch.isfinite(given).all()):
                raise UserError(NOT_FINITE)
            uses = [use for use in uses if use.kind == "linear" and use.part is None]
            for draw in range(draws):
                if of == "features" or task in network.numbers:
                    along = torch.randn(given.shape, generator=generator).to(given.device)
                else:
                    along = _between_classes(given.detach(), generator)
                outputs = [use.outputs for use in uses]
                slopes = torch.autograd.grad(given, outputs, along, draw + 1 < draws, allow_unused=True)
                for use, slope in zip(uses, slopes):
                    if slope is not None:
                        slope_RM = slope.flatten(0, -2)
                        sums[use.tensor] = sums.get(use.tensor, 0) + slope_RM.T @ slope_RM
    finally:
        for leaf in leaves:
            leaf.requires_grad_(False)
    sizes = {name: float(sum_MM.diagonal().mean()) for name, sum_MM in sums.items()}
    return {
        name: sum_MM / sizes[name] + _FLOOR * torch.eye(len(sum_MM), device=sum_MM.device)
        for name, sum_MM in sums.items()
        if sizes[name] > 0
    }


def _between_classes(logits_RC: Tensor, generator: torch.Generator) -> Tensor:
    """(R, C): the likeliest class of each row less another one, which is drawn, or less itself."""
    odds_RC = (logits_RC.softmax(-1) ** _FLAT).cpu()  # where the generator is
    others_R1 = torch.multinomial(odds_RC, 1, generator=generator).to(logits_RC.device)
    found_RC = torch.zeros_like(logits_RC).scatter_(1, logits_RC.argmax(-1, keepdim=True), 1.0)
    return found_RC.scatter_add_(1, others_R1, -torch.ones_like(others_R1, dtype=found_RC.dtype))


def weighted_minimum(
    systems: list[tuple[Tensor, Tensor, Tensor]],
    start_MK: Tensor,
    ridge: float,
    metric_KK: Tensor,
    steps: int = _STEPS,
    near: float = _NEAR,
) -> Tensor:
    """argmin over P (M, K) of sum_t [tr(H_t P G_t P^T) - 2 <H_t C_t, P>] + ridge * size * tr(H (P - P0) R (P - P0)^T).

    systems: G (K, K), C (M, K) and H (M, M) of each task. size: mean(diag sum_t G_t); H without an index: the mean.
    With one H for all tasks this is `minimum` of least_squares.py. Conjugate gradients from P0, preconditioned by
    H (x) (sum_t G_t + ridge * size * R), in float32, until the residual is `near` of the first one's norm, at most so
    many steps.
    """
    gram_KK = torch.stack([gram_KK for gram_KK, _, _ in systems]).sum(0)
    mean_MM = torch.stack([h_MM for *_, h_MM in systems]).mean(0)
    scale = float(gram_KK.diagonal().mean())
    if not scale > 0:
        return start_MK.clone()
    held_KK = ridge * scale * metric_KK
    left = [(h.float(), (g + held_KK / len(systems)).float()) for g, _, h in systems]
    rest_MK = torch.stack([h.double() @ (c - start_MK @ g) for g, c, h in systems]).sum(0).float()
    before_MM = torch.cholesky_inverse(torch.linalg.cholesky(mean_MM.double())).float()
    certain_KK = _CERTAIN * scale * torch.eye(len(gram_KK), dtype=torch.float64, device=gram_KK.device)
    behind_KK = torch.cholesky_inverse(torch.linalg.cholesky(gram_KK + held_KK + certain_KK)).float()
    moved_MK = torch.zeros_like(rest_MK)
    along_MK = turned_MK = before_MM @ rest_MK @ behind_KK
    first = size = float((rest_MK * turned_MK).sum())
    for _ in range(steps):
        if not size > near**2 * first or size == 0:
            break
        product_MK = sum(h @ along_MK @ g for h, g in left)
        step = size / float((along_MK * product_MK).sum())
        moved_MK = moved_MK + step * along_MK
        rest_MK = rest_MK - step * product_MK
        turned_MK = before_MM @ rest_MK @ behind_KK
        size, last = float((rest_MK * turned_MK).sum()), size
        along_MK = turned_MK + size / last * along_MK
    return start_MK + moved_MK.double()
