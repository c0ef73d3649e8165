"""Gates: the rules a candidate must pass to become champion. Pure: numbers in, a verdict in words out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Iterator

from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    import numpy as np

# What a language model does not do, for each check that it may fail.
_WORKS = {
    "finite": "computes NaN or Inf",
    "round_trip": "has a tokenizer that does not give back a text",
    "generates": "generates nothing",
}
Fraction = Annotated[float, Field(ge=0, le=1)]


class Gates(BaseModel):
    """`gates` of params.yaml; a rule that is left out is not asked for. Accuracies are fractions of one.

    Always asked for: the weights are finite, and the checkpoint opens and has its manifest's digest. A language
    model must compute finite logits and generate, and its tokenizer must give back a text.

    minimum_mean: of the mean test accuracy.
    minimum_gain: what the lower end of the paired interval of (candidate - champion) must exceed.
    confidence: of that interval.
    largest_drop: of any task's accuracy against the champion, or against the base while there is no champion.
    largest_norm_ratio: of the leaderboard's norm ratio, which explodes where a merge does.
    largest_perplexity_ratio: of a language model's perplexity to the base's, on every perplexity task.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    minimum_mean: Fraction | None = None
    minimum_gain: Annotated[float, Field(ge=-1, le=1)] | None = None
    confidence: Annotated[float, Field(gt=0, lt=1)] = 0.95
    largest_drop: Fraction | None = None
    largest_norm_ratio: Annotated[float, Field(gt=0)] | None = None
    largest_perplexity_ratio: Annotated[float, Field(gt=0)] | None = None


@dataclass(frozen=True)
class Champion:
    """The version to beat: for each task, which test examples it gets right (bool, N).

    `obstacle` says why it cannot be compared, if it cannot; `correct` is then empty.
    """

    version: str
    correct: dict[str, np.ndarray] = field(default_factory=dict)
    obstacle: str = ""


@dataclass(frozen=True)
class Checks:
    """Facts beside the candidate's row: what is wrong with its files ("": nothing), the base's scores by task."""

    reload_problem: str = ""
    base_accuracy: dict[str, float] = field(default_factory=dict)
    base_perplexity: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Finding:
    """What one gate found, in a sentence."""

    gate: str
    passed: bool
    sentence: str


@dataclass(frozen=True)
class Verdict:
    """All findings; passed if every one did."""

    passed: bool
    findings: list[Finding]


def judge(
    row: dict[str, Any],
    correct: dict[str, np.ndarray],
    champion: Champion | None,
    gates: Gates,
    checks: Checks,
) -> Verdict:
    """Hold a candidate against the gates.

    row: its row of the leaderboard. correct: for each task, which test examples it gets right (bool, N).
    champion: the version to beat, if there is one.
    """
    findings = list(_findings(row, correct, champion, gates, checks))
    return Verdict(all(f.passed for f in findings), findings)


def _findings(
    row: dict[str, Any],
    correct: dict[str, np.ndarray],
    champion: Champion | None,
    gates: Gates,
    checks: Checks,
) -> Iterator[Finding]:
    problem = checks.reload_problem
    yield Finding(
        "reload",
        not problem,
        problem or "The checkpoint opens and its bytes have the digest of its manifest.",
    )
    yield Finding("finite", row["finite"], f"The weights are {'all' if row['finite'] else 'not all'} finite.")
    if "checks" in row:
        failed = [_WORKS[name] for name, passed in row["checks"].items() if not passed]
        sentence = f"The language model {'; '.join(failed) or 'loads, gives back a text, and generates'}."
        yield Finding("works", not failed, sentence)
    if gates.largest_norm_ratio is not None and row["finite"]:
        ratio, limit = row["norm_ratio"], gates.largest_norm_ratio
        sentence = f"The norm ratio is {ratio:.3f}; at most {limit:.3f} is allowed."
        yield Finding("largest_norm_ratio", ratio <= limit, sentence)
    if gates.minimum_mean is not None:
        mean, limit = row["mean"], gates.minimum_mean
        sentence = f"The mean test accuracy is {mean:.4f}; at least {limit:.4f} is required."
        yield Finding("minimum_mean", mean >= limit, sentence)
    if gates.largest_perplexity_ratio is not None:
        yield _perplexity(row.get("perplexity", {}), checks.base_perplexity, gates.largest_perplexity_ratio)
    if gates.minimum_gain is not None:
        yield _gain(correct, champion, gates.minimum_gain, gates.confidence)
    if gates.largest_drop is not None:
        yield _drop(correct, champion, gates.largest_drop, checks.base_accuracy)


def _perplexity(found: dict[str, Any], base: dict[str, float], limit: float) -> Finding:
    ratios = {task: scores["value"] / base[task] for task, scores in found.items()}
    if not ratios:
        return Finding("largest_perplexity_ratio", False, "No perplexity was measured: list tasks under language.")
    worst = max(ratios, key=lambda task: (ratios[task] != ratios[task], ratios[task]))
    sentence = (
        f"The perplexity of task {worst} is {found[worst]['value']:.2f}, {ratios[worst]:.3f} times the base's; "
        f"at most {limit:.3f} is allowed."
    )
    return Finding("largest_perplexity_ratio", bool(ratios[worst] <= limit), sentence)


def _gain(
    correct: dict[str, np.ndarray], champion: Champion | None, minimum: float, confidence: float
) -> Finding:
    from evaluation.metrics import paired

    if champion is None:
        return Finding("minimum_gain", True, "There is no champion yet, so no gain over one is required.")
    if champion.obstacle:
        return Finding("minimum_gain", False, champion.obstacle)
    gain = paired(correct, champion.correct, confidence=confidence)
    sentence = (
        f"Against champion version {champion.version} the mean test accuracy changes by "
        f"{gain.difference:+.4f} ({confidence:.0%} paired interval {gain.lower:+.4f} to {gain.upper:+.4f}, "
        f"p = {gain.p:.3g}); its lower end must exceed {minimum:+.4f}."
    )
    return Finding("minimum_gain", gain.lower > minimum, sentence)


def _drop(
    correct: dict[str, np.ndarray], champion: Champion | None, limit: float, base_accuracy: dict[str, float]
) -> Finding:
    if champion and champion.obstacle:
        return Finding("largest_drop", False, champion.obstacle)
    if champion:
        rival = f"champion version {champion.version}"
        before = {task: hits.mean() for task, hits in champion.correct.items()}
    else:
        rival, before = "the base", base_accuracy
    drops = {task: before[task] - hits.mean() for task, hits in correct.items()}
    worst = max(drops, key=drops.__getitem__)
    sentence = (
        f"Against {rival} the largest drop in accuracy is {max(drops[worst], 0):.4f} (task {worst}); "
        f"at most {limit:.4f} is allowed."
    )
    return Finding("largest_drop", bool(drops[worst] <= limit), sentence)
