"""PLeaS without wider layers: aligned models merged, and each map solved for by least squares."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Iterator, Mapping

from mergeline.merging.engine.work import Count
from mergeline.merging.errors import UserError
from mergeline.merging.lazy import torch
from mergeline.merging.learning.activation_statistics import begun
from mergeline.merging.learning.contract import Job, learned
from mergeline.merging.learning.directions import Inputs
from mergeline.merging.learning.least_squares import minimum
from mergeline.merging.learning.network import Batch, batch_size, mask_of
from mergeline.merging.learning.spaces import SOLVED, replacing
from mergeline.merging.learning.squares import ROWS
from mergeline.merging.learning.watching import Applied, watched
from mergeline.merging.methods.parameters import NotNegative
from mergeline.merging.recipes.recipe import Recipe

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class _Sums:
    """Of one map, over rows: of [x 1]^T [x 1], (N + 1, N + 1), and of y^T [x 1], (M, N + 1); float64."""

    gram: Any = 0.0
    cross: Any = 0.0

    def add(self, x_RN: Tensor, y_RM: Tensor) -> None:
        for start in range(0, len(x_RN), ROWS):
            x, y = (rows[start : start + ROWS].double() for rows in (x_RN, y_RM))
            x = torch.cat([x, x.new_ones(len(x), 1)], 1)
            self.gram, self.cross = self.gram + x.T @ x, self.cross + y.T @ x


@dataclass
class _Seen:
    """What the experts' maps are given and give on one batch: sums over experts, by name and number of the use."""

    inputs: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    outputs: dict[tuple[str, int], Tensor] = field(default_factory=dict)


@learned(paper="2407.02447", code="SewoongLab/PLeaS-Merging@8662119892dc", pool=True)
def pleas(job: Job, *, inner: str = "average", ridge: NotNegative = 0.01, **params: Any) -> Recipe:
    """The merge of aligned models, whose linear maps give from the means of their inputs the means of their outputs.

    Every example passes through every expert by itself. Of each map and convolution, x are the means over the experts
    of what it is given there, y of what it gives: [W b] is solved for in closed form, where the official code takes
    some hundred steps of Adam.

    Formula:
        [W b] = argmin Σ |W x + b − y|² + ridge · mean(diag G) · |[W b] − [W₀ b₀]|²,  G = Σ [x 1]ᵀ[x 1]
    Parameters:
        inner: what makes W₀ and all other tensors; its parameters stand beside these
        ridge: how near to W₀, in mean diagonals of G
    Needs:
        unlabelled examples, and experts in one order (`mergeline align`)
    Trap:
        All layers stay as wide as they are: units that no other is like, which the paper keeps apart, are merged, too.
        BatchNorm keeps the means of the experts' statistics, which are too large for means of activations: put
        `reset_batch_norm` around it. Memory holds all experts, and N x N sums of every map.
    """
    inputs = Inputs(job.recipe.model_copy(update={"rules": []}), job.device)
    experts = []
    for expert in inputs.experts:
        inputs.load(job.network, expert)
        experts.append({name: tensor.detach().clone() for name, tensor in job.network.tensors().items()})
    recipe = begun(job, inner, params)
    own, merged = job.network.tensors(), set(inputs.names)
    weights = {name: t for name, t in own.items() if name in merged and t.ndim > 1}
    sums: dict[str, _Sums] = {}
    done, total = 0, sum(map(job.examples.count, job.examples.counts))
    if job.progress:
        job.progress(Count.of(0, 0), Count.of(total, 0))
    with torch.no_grad():
        for batch in _batches(job):
            seen = _seen(job, weights, experts, batch)
            for key, x_RN in seen.inputs.items():
                sums.setdefault(key[0], _Sums()).add(x_RN / len(experts), seen.outputs[key] / len(experts))
            done += batch_size(batch)
            if job.progress:
                job.progress(Count.of(done, 0), Count.of(total, 0))
    if not sums:
        raise UserError(f"pleas: no linear map of these models is seen; merge by {inner} alone")
    assert inputs.plan.model is not None
    roles, solved = inputs.plan.model.tensors, dict[str, Any]()
    for name, found in sums.items():
        transposed = roles[name].transposed or roles[name].multiplied_from_left
        solved |= _solved(name, transposed, own, merged, found, ridge)
    job.notes["kept"] = sorted(weights.keys() - solved.keys())
    return replacing(recipe, solved, job.folder / SOLVED)


def _batches(job: Job) -> Iterator[Batch]:
    for task in job.examples.counts:
        yield from job.examples.of(task)


def _seen(job: Job, weights: Mapping[str, Tensor], experts: list[dict[str, Tensor]], batch: Batch) -> _Seen:
    """What all experts' maps are given and give on a batch."""
    found = _Seen()
    mask = mask_of(batch)
    counts: dict[str, int] = {}

    def see(applied: Applied) -> None:
        if applied.kind == "embedding" or applied.part is not None:
            return
        key = applied.tensor, counts.get(applied.tensor, 0)
        counts[applied.tensor] = key[1] + 1
        for kept, rows in ((found.inputs, applied.inputs), (found.outputs, applied.outputs)):
            rows = rows[mask.bool()] if mask is not None and rows.shape[:2] == mask.shape else rows
            rows = rows.reshape(-1, rows.shape[-1])
            kept[key] = kept[key] + rows if key in kept else rows.clone()

    for expert in experts:
        counts.clear()
        with job.network.lent(expert), watched(weights, see):
            job.network.features(batch)
    return found


def _solved(
    name: str, transposed: bool, own: Mapping[str, Tensor], merged: set[str], found: _Sums, ridge: float
) -> dict[str, Tensor]:
    """A map's weight and bias, by name; nothing of one that is not of the usual form."""
    weight, outputs = own[name], len(found.cross)
    start_MN = (weight.T if transposed else weight.flatten(1)).double()
    inputs = start_MN.shape[1]
    if start_MN.shape[0] != outputs or len(found.gram) != inputs + 1:
        return {}
    before, _, last = name.rpartition("weight")
    bias = f"{before}bias" if f"{before}bias" in own and not last else None
    if bias is None or bias not in merged:
        fixed_M = own[bias].double() if bias else start_MN.new_zeros(outputs)
        cross = found.cross[:, :inputs] - fixed_M[:, None] * found.gram[-1, :inputs]
        result = minimum(found.gram[:inputs, :inputs], cross, start_MN, ridge)
    else:
        start_MN = torch.cat([start_MN, own[bias].double()[:, None]], 1)
        result = minimum(found.gram, found.cross, start_MN, ridge)
    matrix = result[:, :inputs]
    solved = {name: (matrix.T if transposed else matrix).reshape(weight.shape).to(weight)}
    return solved | ({bias: result[:, inputs].to(own[bias])} if bias in merged and bias else {})
