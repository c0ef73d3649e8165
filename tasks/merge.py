"""The merge step: the setting that the search chose, merged into a checkpoint."""

from __future__ import annotations

import json
from glob import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, Mapping, Sequence

from mergeline.merging import merge
from mergeline.merging.checkpoints.adapters import is_adapter
from mergeline.merging.checkpoints.checkpoint import open_checkpoint
from mergeline.merging.checkpoints.quantised.formats import dequantised
from mergeline.merging.engine.manifest import manifest_path, read_manifest
from mergeline.merging.files import write_json
from mergeline.merging.reading import sha256_of
from mergeline.tasks import spread
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
    found = json.loads((build / "search" / f"{name}.json").read_text())
    recipe = recipe_at(params, name, build, heads, found["method"], found["chosen"])
    with counting("tensors") as count:
        merge(
            recipe, out, device=params.device, workers=1, factors=factors, progress=count, executor=spread.executor()
        )  # fmt: skip


def recipe_at(
    params: Params, name: str, build: Path, heads: Sequence[str], method: str, point: Mapping[str, Any]
) -> dict[str, Any]:
    """The recipe of a merge at a point of its search; what a fit made of a learned method there in its place.

    Raises:
        UserError: statistics that it reads were not collected.
    """
    if recipe := fitted_recipe(build / "fits" / name, point):
        return recipe
    plain = {**recipe_of(params, name, build, heads), "method": method}
    statistics = statistics_for(method, point, build, plain["experts"])
    taken = params.all_merges[name].takes
    return {
        **plain,
        "params": point,
        "statistics": statistics,
        "fitted": seen_through(method, point, statistics)
        or seen_by_parts(method, point, [read_manifest(build / "merges" / one) for one in taken]),
    }


def recipe_of(params: Params, name: str, build: Path, heads: Sequence[str]) -> dict[str, Any]:
    """As `Params.recipe`; of merges and experts together, tensors that an expert lacks are as in the base.

    Where experts are a part of a model, such as the vision tower of CLIP, merges of them hold the base's other tensors.
    """
    recipe = params.recipe(name, build, heads)
    taken = params.all_merges[name].takes
    experts = {
        expert: dequantised(open_checkpoint(path))[0] for expert, path in recipe["experts"].items() if taken
    }
    own = [c.tensors.keys() for expert, c in experts.items() if expert not in taken and not is_adapter(c)]
    merged = {tensor for expert in taken if expert in experts for tensor in experts[expert].tensors}
    lacking = {tensor for tensors in own for tensor in merged - tensors}
    if not lacking:
        return recipe
    modules = {tensor: tensor.partition(".")[0] for tensor in merged}
    whole = set(modules.values()) - {modules[tensor] for tensor in merged - lacking}
    patterns = {f"{escape(modules[t])}.*" if modules[t] in whole and "." in t else escape(t) for t in lacking}
    return {**recipe, "exclude": [*recipe.get("exclude", ()), *sorted(patterns)]}


def note_digest(merged: Path, out: Path) -> None:
    """Write to the JSON file `out` the digest of a merge's manifest, and so of all that lies there: merges of merges
    wait for these files, and are stale where those of what they take changed.
    """
    write_json(out, {"manifest": sha256_of(manifest_path(merged))})
