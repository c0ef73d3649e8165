"""What changed from one run of a pipeline to the next: merges, settings, inputs, and scores by a paired test."""

from __future__ import annotations

from typing import Any, Callable

from mergeline.evaluation.measures import Measure, measures_of
from mergeline.evaluation.metrics import Outcomes, in_scores, paired

Json = dict[str, Any]

_SETTINGS = ("method", "params", "experts", "searched")  # of a row of the leaderboard


def changes(
    now: Json, before: Json, outcomes: Callable[[str], Outcomes], earlier: Callable[[str], Outcomes]
) -> Json:
    """What `now`, a leaderboard, has that `before` had otherwise.

    outcomes, earlier: of a merge of the one and the other, the outcome of every test example by task, (N). Merges are
    compared by them where both were measured on the same examples; `pair` of a merge is None where they were not. Of
    `means`, the one before is None where it measured something else.

    Returns:
        {"candidates": [before, now], "added": [...], "removed": [...], "inputs": [...],
        "merges": [{"name", "settings": [before, now], "means": [before, now], "pair": {...} or None}, ...],
        "same": [names of merges that are as they were]}
    """
    rows, old = (
        {row["name"]: row for row in board["rows"] if row["kind"] == "merge"} for board in (now, before)
    )
    (measure, of), was = ((found.mean, found.mean_of) for found in (measures_of(now), measures_of(before)))
    alike = (measure, of) == was
    both = [name for name in rows if name in old]
    same = [name for name in both if _is_same(rows[name], old[name])]
    return {
        "candidates": [before["candidate"], now["candidate"]],
        "added": [name for name in rows if name not in old],
        "removed": [name for name in old if name not in rows],
        "inputs": _inputs(now["lineage"], before["lineage"]),
        "merges": [
            {
                "name": name,
                "settings": [{key: row.get(key) for key in _SETTINGS} for row in (old[name], rows[name])],
                "means": [old[name]["mean"] if alike else None, rows[name]["mean"]],
                "pair": _pair(outcomes(name), earlier(name), measure),
            }
            for name in both
            if name not in same
        ],
        "same": same,
    }


def _is_same(row: Json, old: Json) -> bool:
    keys = (*_SETTINGS, "digest", "mean", "tasks")
    return all(row.get(key) == old.get(key) for key in keys)


def _pair(now: Outcomes, before: Outcomes, measure: Measure) -> Json | None:
    try:
        return in_scores(paired(now, before), measure)._asdict() if now else None
    except ValueError:  # of other tasks or examples
        return None


def _inputs(now: Json, before: Json) -> list[str]:
    """The names of base and experts that came, went, or have other contents."""
    digests, old = (
        {side["base"]["name"]: side["base"]["digest"]}
        | {name: origin["digest"] for name, origin in side["experts"].items()}
        for side in (now, before)
    )
    return [name for name in {**digests, **old} if digests.get(name) != old.get(name)]
