"""Merges of merges: the documents of one file (mergekit-multi), merged in their order into places beside the last."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Callable, Iterator

from mergeline.merging.api import merge
from mergeline.merging.engine.manifest import Manifest, lineage_of, read_manifest, versions
from mergeline.merging.engine.plan import Plan
from mergeline.merging.engine.planning import make_plan
from mergeline.merging.engine.sources import FileInputs
from mergeline.merging.errors import UserError
from mergeline.merging.recipes.loading import Merge
from mergeline.merging.verify import verify


def place_of(out: Path) -> Path:
    """The folder where merges lie whose results other merges take: beside what is made of them, and kept."""
    return out.with_name(f"{out.name}.merges")


def plans(merges: list[Merge], place: Path) -> Iterator[tuple[str | None, Plan | None]]:
    """The plan of each merge; None where what it takes is not there yet."""
    for one in merges:
        there = all((place / name).is_dir() for name in one.takes)
        yield one.name, make_plan(one.recipe) if there else None


def merge_chain(
    merges: list[Merge],
    out: Path,
    place: Path,
    tell: Callable[[str | None, Path, Plan], None] | None = None,
    **options: Any,
) -> list[tuple[Path, Manifest]]:
    """Merge one after the other: those that have a name into `place`, the one without into `out`.

    What `place` has of a merge is kept where recipe, inputs, device and versions are the same, as its manifest and its
    files say: a chain that was killed goes on where it was. tell: before each is merged. options: those of `merge`.

    Raises:
        UserError: as `merge`.
    """
    for one in merges:  # before hours of work
        if not one.takes:
            make_plan(one.recipe).check()
    made = []
    for one in merges:
        target = out if one.name is None else place / one.name
        plan = make_plan(one.recipe)
        if tell:
            tell(one.name, target, plan)
        plan.check()
        kept = _kept(plan, target, str(options.get("device", "cpu"))) if one.name is not None else None
        if kept is None:
            os.makedirs(target.parent, exist_ok=True)
        made.append((target, kept or merge(plan, target, **options)))
    return made


def _kept(plan: Plan, target: Path, device: str) -> Manifest | None:
    """The manifest of an earlier result of the same merge, if it is there and whole."""
    try:
        manifest = read_manifest(target)
        if manifest.get("versions") != versions() or manifest.get("device") != device.split(":")[0]:
            return None
        with FileInputs(plan, "cpu") as source:
            if manifest.get("recipe_digest") != lineage_of(plan, source, target)[1]:
                return None
        verify(target, again=False)
    except (UserError, OSError):
        return None
    return manifest
