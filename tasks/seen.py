"""What a merge has seen of data, by its manifest."""

from __future__ import annotations

from typing import Any, Mapping

from mergeline.merging.recipes.recipe import Fitted

NOTHING = {"data": "none", "words": "none"}


def seen(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """`data`: none, unlabelled or labelled; `words`; and where a merge was fitted to examples, what `Fitted` has."""
    fitted = manifest["recipe"].get("fitted")
    if not fitted:
        return dict(NOTHING)
    found = Fitted.model_validate(fitted)
    return {**found.model_dump(mode="json", exclude={"params", "digests"}), "words": found.words}
