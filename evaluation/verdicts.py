"""What the gates decided, in words that stay true: a verdict is of the moment when it was given."""

from __future__ import annotations

from typing import Any

Json = dict[str, Any]


def told(verdict: Json, candidate: str) -> str:
    """What became of the candidate that was judged, and of the champion.

    verdict: as the register step leaves it. candidate: the leaderboard's own, which may be another by now.
    """
    judged, version = verdict["candidate"], verdict["version"]
    before, after = verdict["champion_before"], verdict["champion_after"]
    failed = sum(not finding["passed"] for finding in verdict["findings"])
    if not verdict["passed"]:
        what = (
            f"{judged}, registered as version {version}," if version else f"{judged} was not registered and"
        )
        stayed = f"Version {after} stayed champion." if after else "There was no champion."
        sentence = f"{what} did not pass: {failed} of {len(verdict['findings'])} gates failed. {stayed}"
    elif before == after:
        sentence = f"{judged} is version {version}, which was champion already."
    elif before:
        sentence = (
            f"{judged} passed every gate: version {version} became champion, in place of version {before}."
        )
    else:
        sentence = f"{judged} passed every gate: version {version} became the first champion."
    if judged != candidate:
        sentence += f" This verdict is older than the leaderboard, whose candidate is {candidate}."
    return sentence
