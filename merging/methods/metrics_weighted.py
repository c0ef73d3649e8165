"""Metrics-weighted averaging: checkpoints weighted by loss or by training step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, Mapping

from annotated_types import Ge, Gt

from merging import operators as ops
from merging.methods import method
from merging.slots import Slot

if TYPE_CHECKING:
    from torch import Tensor


def _wrong(params: Mapping[str, Any], experts: int) -> str | None:
    values = params["values"]
    if values is None and params["metric"] == "loss":
        return "values are missing: give each expert's loss, in order"
    if values is not None and len(values) != experts:
        return f"{len(values)} values for {experts} experts; give one an expert, in order"
    return None


@method(family="elementwise", paper="2504.18580", reference="mean", check=_wrong)
def metrics_weighted(
    x: Slot,
    *,
    metric: Literal["loss", "steps"] = "steps",
    values: list[Annotated[float, Gt(0)]] | None = None,
    power: Annotated[float, Ge(0)] = 1.0,
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
    return ops.weighted_sum(x.experts, [w / sum(weights) for w in weights], x.precision)
