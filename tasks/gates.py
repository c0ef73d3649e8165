"""Gates: the rules a candidate must pass to become champion. Pure: numbers in, a verdict in words out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Iterable, Iterator, Literal

from pydantic import BaseModel, ConfigDict, Field

from mergeline.evaluation.measures import Measure, Measures

if TYPE_CHECKING:
    import numpy as np

_DATA = ("none", "unlabelled", "labelled")  # the least first

Fraction = Annotated[float, Field(ge=0, le=1)]


class Gates(BaseModel):
    """`gates` of params.yaml; a rule that is left out is not asked for. Limits are fractions of one, as accuracies are.

    Always asked for: the weights are finite, and the checkpoint opens and has its manifest's digest. A modality may ask
    for more, and redefine limits where its outcomes are no fractions of one.

    minimum_mean: of the mean test score. largest_mean: the same where smaller scores are better.
    minimum_gain: by how much the candidate must be better than the champion, at the worse end of the paired interval of
    the difference of their mean test scores. confidence: of that interval.
    largest_drop: of any task's mean score against the champion, or against the base while there is no champion.
    largest_rise: the same of the tasks on which smaller scores are better.
    largest_norm_ratio: of the leaderboard's norm ratio, which explodes where a merge does.
    largest_data: what the candidate may have seen: no data at all, examples without labels, or with labels, too. Always
    asked for: it was fitted to no test examples.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    minimum_mean: Fraction | None = None
    largest_mean: Fraction | None = None
    minimum_gain: Annotated[float, Field(ge=-1, le=1)] | None = None
    confidence: Annotated[float, Field(gt=0, lt=1)] = 0.95
    largest_drop: Fraction | None = None
    largest_rise: Fraction | None = None
    largest_norm_ratio: Annotated[float, Field(gt=0)] | None = None
    largest_data: Literal["none", "unlabelled", "labelled"] | None = None


def misplaced(gates: Gates, measures: Measures) -> Iterator[tuple[str, str]]:
    """Gates that ask for the wrong direction: which, and what is to be written in its place."""
    each = [*measures.tasks.values()] or [measures.default]
    known = [
        ("minimum_mean", not measures.mean.lower, measures.mean, "largest_mean"),
        ("largest_mean", measures.mean.lower, measures.mean, "minimum_mean"),
        ("largest_drop", not all(measure.lower for measure in each), each[0], "largest_rise"),
        ("largest_rise", any(measure.lower for measure in each), each[0], "largest_drop"),
    ]
    for gate, fits, measure, mend in known:
        if getattr(gates, gate) is not None and not fits:
            yield gate, f"of {measure.name}, {measure.better} is better; write {mend} in its place"


@dataclass(frozen=True)
class Champion:
    """The version to beat: for each task, its outcome on every test example (N).

    `obstacle` says why it cannot be compared, if it cannot; `outcomes` is then empty.
    """

    version: str
    outcomes: dict[str, np.ndarray] = field(default_factory=dict)
    obstacle: str = ""


@dataclass(frozen=True)
class Checks:
    """Facts beside the candidate's row.

    reload_problem: what is wrong with its files ("": nothing). base_accuracy: the base's mean score on each task.
    measures: what scores are.
    """

    reload_problem: str = ""
    base_accuracy: dict[str, float] = field(default_factory=dict)
    measures: Measures = Measures()


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
    outcomes: dict[str, np.ndarray],
    champion: Champion | None,
    gates: Gates,
    checks: Checks,
    own: Iterable[Finding] = (),
) -> Verdict:
    """Hold a candidate against the gates.

    row: its row of the leaderboard. outcomes: for each task, its outcome on every test example (N).
    champion: the version to beat, if there is one. own: what the gates of the modality found.
    """
    findings = list(_findings(row, outcomes, champion, gates, checks, own))
    return Verdict(all(f.passed for f in findings), findings)


def _findings(
    row: dict[str, Any],
    outcomes: dict[str, np.ndarray],
    champion: Champion | None,
    gates: Gates,
    checks: Checks,
    own: Iterable[Finding],
) -> Iterator[Finding]:
    problem = checks.reload_problem
    yield Finding(
        "reload",
        not problem,
        problem or "The checkpoint opens and its bytes have the digest of its manifest.",
    )
    yield Finding("finite", row["finite"], f"The weights are {'all' if row['finite'] else 'not all'} finite.")
    yield from own
    yield from _data(row, gates)
    if "at_use" in row:
        how = row["at_use"]["task"]
        sentence = (
            f"The task of an input is {how} to it at use: it is compared with merges of this class alone."
        )
        yield Finding("at_use", True, sentence)
    if gates.largest_norm_ratio is not None and row["finite"]:
        ratio, limit = row["norm_ratio"], gates.largest_norm_ratio
        told = "A store of experts has no norm ratio" if ratio is None else f"The norm ratio is {ratio:.3f}"
        sentence = f"{told}; at most {limit:.3f} is allowed."
        yield Finding("largest_norm_ratio", ratio is not None and ratio <= limit, sentence)
    measure = checks.measures.mean
    mean = f"The mean test {measure.name} is {measure.said(row['mean'])}"
    if gates.minimum_mean is not None:
        sentence = f"{mean}; at least {measure.said(gates.minimum_mean)} is required."
        yield Finding("minimum_mean", row["mean"] >= gates.minimum_mean, sentence)
    if gates.largest_mean is not None:
        sentence = f"{mean}; at most {measure.said(gates.largest_mean)} is allowed."
        yield Finding("largest_mean", row["mean"] <= gates.largest_mean, sentence)
    if gates.minimum_gain is not None:
        yield _gain(outcomes, champion, gates.minimum_gain, gates.confidence, measure)
    if gates.largest_drop is not None:
        yield _worse("drop", outcomes, champion, gates.largest_drop, checks)
    if gates.largest_rise is not None:
        yield _worse("rise", outcomes, champion, gates.largest_rise, checks)


def _data(row: dict[str, Any], gates: Gates) -> Iterator[Finding]:
    """What the candidate was fitted to; a row of an earlier version says nothing, for then nothing was fitted."""
    seen = row.get("seen", {"data": "none", "words": "none"})
    if seen.get("split") == "test":
        yield Finding(
            "unseen_test", False, "It was fitted to test examples, so that its test scores say nothing."
        )
    if gates.largest_data is not None:
        sentence = f"The data that it has seen: {seen['words']}; at most {gates.largest_data} is allowed."
        passed = _DATA.index(seen["data"]) <= _DATA.index(gates.largest_data)
        yield Finding("largest_data", passed, sentence)


def _gain(
    outcomes: dict[str, np.ndarray],
    champion: Champion | None,
    minimum: float,
    confidence: float,
    measure: Measure,
) -> Finding:
    from mergeline.evaluation.metrics import paired

    if champion is None:
        return Finding(
            "minimum_gain", True, "There was no champion to compare with, so no gain over one was required."
        )
    if champion.obstacle:
        return Finding("minimum_gain", False, champion.obstacle)
    gain = paired(outcomes, champion.outcomes, confidence=confidence)
    lower, upper = measure.turned_interval(gain.lower, gain.upper)
    end = "upper end must be below" if measure.lower else "lower end must exceed"
    sentence = (
        f"Against champion version {champion.version} the mean test {measure.name} changes by "
        f"{measure.said(measure.turned(gain.difference), '+.4f')} ({confidence:.0%} paired interval {lower:+.4f} to "
        f"{upper:+.4f}, p = {gain.p:.3g}); its {end} {measure.turned(minimum):+.4f}."
    )
    return Finding("minimum_gain", gain.lower > minimum, sentence)


def _worse(
    how: Literal["drop", "rise"],
    outcomes: dict[str, np.ndarray],
    champion: Champion | None,
    limit: float,
    checks: Checks,
) -> Finding:
    """How much worse any task became: scores drop where larger ones are better, and rise where smaller ones are."""
    gate = f"largest_{how}"
    if champion and champion.obstacle:
        return Finding(gate, False, champion.obstacle)
    measures = {task: checks.measures.of(task) for task in outcomes}
    if champion:
        rival = f"champion version {champion.version}"
        before = {task: outcome_N.mean() for task, outcome_N in champion.outcomes.items()}
    else:
        rival = "the base"
        before = {task: measures[task].turned(score) for task, score in checks.base_accuracy.items()}
    losses = {
        task: before[task] - outcome_N.mean()
        for task, outcome_N in outcomes.items()
        if measures[task].lower == (how == "rise")
    }
    worst = max(losses, key=losses.__getitem__)
    measure = measures[worst]
    sentence = (
        f"Against {rival} the largest {how} in {measure.name} is {measure.said(max(losses[worst], 0))} (task {worst}); "
        f"at most {measure.said(limit)} is allowed."
    )
    return Finding(gate, bool(losses[worst] <= limit), sentence)
