"""The merge step: the setting that the search chose, merged into a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Sequence

from mergeline.merging import merge
from mergeline.tasks.collect import seen_through, statistics_for
from mergeline.tasks.fit import fitted_recipe
from mergeline.tasks.progress import counting


def merge_chosen(
    search: Path,
    fits: Path,
    base: Path,
    experts: dict[str, Path],
    out: Path,
    *,
    build: Path,
    factors: Path,
    dtype: str | None,
    seed: int,
    heads: Sequence[str],
    device: str,
) -> None:
    """Merge `experts` around `base` into the folder `out` as the search result `search` says.

    `fits` is what the fit step made of the merge: a learned method's recipe at the chosen setting is merged.
    heads: names of tensors that are each expert's own.
    `build` has the statistics that methods read; `factors` is a folder that keeps spectral decompositions.

    Raises:
        UserError: as `merging.merge`.
    """
    found = json.loads(search.read_text())
    method, params = found["method"], found["chosen"]
    recipe = fitted_recipe(fits, params)
    if recipe is None:
        statistics = statistics_for(method, params, build, experts)
        recipe = {
            "method": method,
            "params": params,
            "base": base,
            "experts": experts,
            "dtype": dtype,
            "seed": seed,
            "heads": heads,
            "statistics": statistics,
            "fitted": seen_through(method, params, statistics),
        }
    with counting("tensors") as count:
        merge(recipe, out, device=device, workers=1, factors=factors, progress=count)
