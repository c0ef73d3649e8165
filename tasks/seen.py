"""What a merge has seen of data, by its manifest."""

from __future__ import annotations

from typing import Any, Mapping, Sequence

from mergeline.merging.recipes.recipe import Fitted

_DATA = ("none", "unlabelled", "labelled")  # each more than those before
NOTHING = {"data": "none", "words": "none"}


def seen(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """`data`: none, unlabelled or labelled; `words`; and where a merge was fitted to examples, what `Fitted` has."""
    fitted = manifest["recipe"].get("fitted")
    if not fitted:
        return dict(NOTHING)
    found = Fitted.model_validate(fitted)
    return {**found.model_dump(mode="json", exclude={"params", "digests"}), "words": found.words}


def seen_by_parts(
    method: str, params: Mapping[str, Any], manifests: Sequence[Mapping[str, Any]]
) -> dict[str, Any] | None:
    """What a merge of merges has seen through these, as a recipe's `fitted` has it: of each task the most; None where
    none was fitted to anything.
    """
    made = [Fitted.model_validate(m["recipe"]["fitted"]) for m in manifests if m["recipe"].get("fitted")]
    if not made:
        return None
    examples: dict[str, int] = {}
    for one in made:
        examples |= {task: max(count, examples.get(task, 0)) for task, count in one.examples.items()}
    splits = [one.split for one in made]
    return Fitted(
        method=method,
        params=dict(params),
        data=max((one.data for one in made), key=_DATA.index),
        split="test" if "test" in splits else splits[0],
        examples=examples,
        digests={task: digest for one in made for task, digest in one.digests.items()},
        trains=any(one.trains for one in made),
        task_known=any(one.task_known for one in made),
        stand_in="; ".join(dict.fromkeys(one.stand_in for one in made if one.stand_in)),
        chosen_on="; ".join(dict.fromkeys(one.chosen_on for one in made if one.chosen_on)),
    ).model_dump(mode="json")
