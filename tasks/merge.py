"""The merge step: the setting that the search chose, merged into a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

from merging import merge


def merge_chosen(
    search: Path,
    base: Path,
    experts: dict[str, Path],
    out: Path,
    *,
    factors: Path,
    dtype: str | None,
    seed: int,
    device: str,
) -> None:
    """Merge `experts` around `base` into the folder `out` as the search result `search` says.

    `factors` is a folder that keeps spectral decompositions.

    Raises:
        UserError: as `merging.merge`.
    """
    found = json.loads(search.read_text())
    recipe = {
        "method": found["method"],
        "params": found["chosen"],
        "base": base,
        "experts": experts,
        "dtype": dtype,
        "seed": seed,
    }
    merge(recipe, out, device=device, workers=1, factors=factors)
