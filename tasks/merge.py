"""The merge step: the setting that the search chose, merged into a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Sequence

from mergeline.merging import merge
from mergeline.merging.engine.manifest import manifest_path, read_manifest
from mergeline.merging.files import write_json
from mergeline.merging.reading import sha256_of
from mergeline.tasks.collect import seen_through, statistics_for
from mergeline.tasks.fit import fitted_recipe
from mergeline.tasks.progress import counting
from mergeline.tasks.seen import seen_by_parts

if TYPE_CHECKING:
    from mergeline.tasks.schema import Params


def merge_chosen(
    params: Params, name: str, build: Path, out: Path, *, factors: Path, heads: Sequence[str]
) -> None:
    """Merge the experts of a merge into the folder `out`, at the setting that its search in `build` chose.

    What a fit in `build` made of a learned method at that setting is merged in its place. `factors` is a folder that
    keeps spectral decompositions. heads: names of tensors that are each expert's own.

    Raises:
        UserError: as `merging.merge`.
    """
    own = params.all_merges[name]
    chosen = json.loads((build / "search" / f"{name}.json").read_text())["chosen"]
    recipe = fitted_recipe(build / "fits" / name, chosen)
    if recipe is None:
        plain = params.recipe(name, build, heads)
        statistics = statistics_for(plain["method"], chosen, build, plain["experts"])
        recipe = {
            **plain,
            "params": chosen,
            "statistics": statistics,
            "fitted": seen_through(plain["method"], chosen, statistics)
            or seen_by_parts(
                own.method, chosen, [read_manifest(build / "merges" / one) for one in own.takes]
            ),
        }
    with counting("tensors") as count:
        merge(recipe, out, device=params.device, workers=1, factors=factors, progress=count)


def note_digest(merged: Path, out: Path) -> None:
    """Write to the JSON file `out` the digest of a merge's manifest, and so of all that lies there: merges of merges
    wait for these files, and are stale where those of what they take changed.
    """
    write_json(out, {"manifest": sha256_of(manifest_path(merged))})
