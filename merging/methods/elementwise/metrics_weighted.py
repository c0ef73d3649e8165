"""Metrics-weighted averaging: checkpoints weighted by loss or by training step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Iterator, Literal, Mapping

from mergeline.merging.algebra import sums
from mergeline.merging.algebra.slots import Slot
from mergeline.merging.methods.contract import method
from mergeline.merging.methods.parameters import NotNegative, OneAnExpert, Positive

if TYPE_CHECKING:
    from torch import Tensor


def _wrong(params: Mapping[str, Any], _experts: int) -> Iterator[str]:
    if params["values"] is None and params["metric"] == "loss":
        yield "values are missing: give each expert's loss, in order"


@method(paper="2504.18580", reference="none", check=_wrong)
def metrics_weighted(
    x: Slot,
    *,
    metric: Literal["loss", "steps"] = "steps",
    values: Annotated[list[Positive], OneAnExpert()] | None = None,
    power: NotNegative = 1.0,
) -> Tensor:
    """The mean of the experts, weighted by (1 / loss)^power or step^power.

    Formula:
        wₜ = (1 / lossₜ)^power or stepₜ^power
        Σₜ wₜ θₜ / Σₜ wₜ
    Parameters:
        metric: what `values` are
        values: one number an expert, in their order; steps are 1, 2, ... by default
        power: 0 weighs all alike, large ones only the best
    Needs:
        the experts' losses as `values`, with metric: loss
    Trap:
        Reconstructed: the paper's formula was not read. Of LoRA factors, averaging A and B by themselves is
        not averaging BA.
    """
    values = values or [t + 1.0 for t in range(len(x.experts))]
    best = min(values) if metric == "loss" else max(values)
    weights = [(best / v if metric == "loss" else v / best) ** power for v in values]
    return sums.weighted_mean(x.experts, weights, x.precision)
