"""Linear merging: a weighted soup, or a run's checkpoints in place of a decay of its learning rate."""

from __future__ import annotations

from math import cos, pi, sqrt
from typing import TYPE_CHECKING, Any, Callable, Iterator, Literal, Mapping

from mergeline.merging.algebra import directions, sums
from mergeline.merging.algebra.slots import Slot
from mergeline.merging.methods.contract import Factors, method
from mergeline.merging.methods.parameters import Weights

if TYPE_CHECKING:
    from torch import Tensor

Schedule = Literal["linear", "cosine", "1-sqrt"]

# What is left of the learning rate, by the share of the decay that is over.
_DECAYS: dict[str, Callable[[float], float]] = {
    "linear": lambda s: 1 - s,
    "cosine": lambda s: (1 + cos(pi * s)) / 2,
    "1-sqrt": lambda s: 1 - sqrt(s),
}


def decay_weights(schedule: Schedule, count: int) -> list[float]:
    """Weights of `count` checkpoints, (T,), that sum to 1: with them a run at one rate stands for one that decays.

    2507.17634: Σₜ wₜ θₜ = θ₁ + Σₜ d(t/T) (θₜ₊₁ − θₜ), where wₜ = d((t−1)/T) − d(t/T) and d falls from 1 to 0.
    """
    decay = _DECAYS[schedule]
    return [decay(t / count) - decay((t + 1) / count) for t in range(count)]


def _weights(x: Slot, weights: list[float] | None, schedule: Schedule | None) -> list[float] | None:
    return decay_weights(schedule, len(x.experts)) if schedule else weights


def _factors(
    x: Slot, *, weights: list[float] | None, normalize: bool, schedule: Schedule | None
) -> tuple[Tensor, Tensor]:
    weights = _weights(x, weights, schedule) or [1.0] * len(x.experts)
    return directions.weighted_factors(x, [weight / sum(weights) for weight in weights])


def _wrong(params: Mapping[str, Any], _experts: int) -> Iterator[str]:
    if params["weights"] and params["schedule"]:
        yield "weights and schedule say the same; leave one out"


@method(
    paper="2203.05482",
    code="arcee-ai/mergekit@a6e40288",
    reference="none",
    # Not normalised, the base may count more or less than once.
    factors=Factors(_factors, when=lambda params: params["normalize"]),
    check=_wrong,
)
def linear(
    x: Slot, *, weights: Weights | None = None, normalize: bool = True, schedule: Schedule | None = None
) -> Tensor:
    """The sum of weight * expert, by default over the sum of the weights.

    With `schedule`, of the checkpoints of one run at a constant learning rate, from the first to the last: the weights
    are those that stand for a decay of the rate over them (WSM, 2507.17634).

    Formula:
        Σₜ wₜ θₜ / Σₜ wₜ
        schedule: wₜ = d((t−1)/T) − d(t/T), so that the sum is θ₁ + Σₜ d(t/T) (θₜ₊₁ − θₜ)
        linear d(s) = 1 − s;  cosine d(s) = (1 + cos πs)/2;  1-sqrt d(s) = 1 − √s
    Parameters:
        schedule: in place of weights; `linear` is the mean of the checkpoints
    Trap:
        With `normalize: false`, weights that do not sum to 1 stretch or shrink everything, the gains of norms
        too. With `schedule`, the order of the experts is that of time.
    """
    weights = _weights(x, weights, schedule)
    total = sums.weighted_sum(x.experts, weights, x.precision)
    return total / (sum(weights) if weights else len(x.experts)) if normalize else total
