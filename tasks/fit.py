"""The fit step: merges of learned methods are fitted to examples, at every point of their grid.

build/fits/MERGE/points.json lists the points; each has a folder of its own with the recipe that its fit gave. Of other
methods there are none, but the digests of the statistics that they read and of the merges that they take: where these
change, so does what searches and merges depend on, and only there.
"""

from __future__ import annotations

import shutil
import sys
import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Iterator, Mapping

from mergeline.merging.canonical import text_digest
from mergeline.merging.errors import UserError, printable
from mergeline.merging.files import read_object, write_json
from mergeline.tasks.collect import digests_read
from mergeline.tasks.progress import counting

if TYPE_CHECKING:
    from mergeline.merging.learning.network import Examples
    from mergeline.merging.recipes.recipe import Recipe
    from mergeline.tasks.modality import Modality
    from mergeline.tasks.schema import Params

_POINTS, _RECIPE = "points.json", "fit.json"
_NAME = 12  # letters of a point's folder


def fit_merge(modality: Modality, params: Params, name: str, build: Path, out: Path) -> None:
    """Fit a merge at every point of its grid into the folder `out`; points that are fitted already stay.

    Raises:
        UserError: as `merging.learning.fitting.fit`; models of this kind cannot be fitted; statistics that the merge
            reads were not collected.
    """
    merge = params.all_merges[name]
    if merge.takes and modality.heads(params, build):
        raise UserError(
            f"{name}: models whose experts have heads of their own are not merged twice, for the heads of a merge lie "
            "beside it; merge the experts at once"
        )
    points = list(merge.points) if merge.is_learned else []
    folders = {_folder(point): point for point in points}
    out.mkdir(parents=True, exist_ok=True)
    for entry in out.iterdir():
        if entry.name not in folders and entry.name != _POINTS:
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    for i, (folder, point) in enumerate(folders.items()):
        recipe = {**params.recipe(name, build, modality.heads(params, build)), "params": point}
        part = f"steps of fit {i + 1} of {len(points)}" if len(points) > 1 else "steps"
        fit_recipe(modality, params, build, recipe, out / folder, merge.first, merge.split, part)
    read = digests_read(params, name, build)
    taken = {one: read_object(build / "digests" / f"{one}.json") for one in merge.takes}
    write_json(
        out / _POINTS,
        {
            "points": [{"params": p, "folder": f} for f, p in folders.items()],
            **({"statistics": read} if read else {}),
            **({"merges": taken} if taken else {}),
        },
    )


def fit_recipe(
    modality: Modality,
    params: Params,
    build: Path,
    recipe: Recipe | Mapping[str, Any],
    out: Path,
    first: int | None = None,
    split: str = "fit",
    unit: str = "steps",
    progress: Callable[[int, int], None] | None = None,
) -> Recipe:
    """Fit one recipe of a learned method to the examples of a pipeline into the folder `out`.

    first: how many examples of each task, None for all. split: `fit`, or `test` where it is asked for. unit: what is
    counted while it runs, for the stage; progress: who else is told.

    Raises:
        UserError: as `merging.learning.fitting.fit`; models of this kind cannot be fitted.
    """
    from mergeline.merging.learning.fitting import fit

    network = modality.network
    if network is None:
        raise UserError(f"{modality.models} cannot be fitted to examples; choose methods that look at none")
    examples = examples_of(modality, params, build, first, split)
    with counting(unit) as count, _notes_printed():
        return fit(
            recipe,
            network(params, build, build / "checkpoints" / params.base),
            examples,
            out,
            device=params.device,
            progress=progress or count,
            transductive=split == "test",
        )


@contextmanager
def _notes_printed() -> Iterator[None]:
    """What is to be known of a fit is printed as notes on other things are."""
    from mergeline.merging.learning.fitting import FitNote

    with warnings.catch_warnings():
        show = warnings.showwarning

        def plainly(message: Warning | str, category: type[Warning], *where: Any) -> None:
            if issubclass(category, FitNote):
                print(f"note: {printable(str(message))}", file=sys.stderr)
            else:
                show(message, category, *where)

        warnings.showwarning = plainly  # type: ignore[assignment]
        warnings.simplefilter("always", FitNote)
        yield


def examples_of(
    modality: Modality, params: Params, build: Path, first: int | None = None, split: str = "fit"
) -> Examples:
    """The examples of a pipeline that merges are fitted to; `first` of each task, None for as many as is usual.

    Raises:
        UserError: there are none for models of this kind.
    """
    from dataclasses import replace

    if modality.examples is None:
        raise UserError(
            f"{modality.models} have no examples to be fitted to; choose methods that look at none"
        )
    found = modality.examples(params, build, split)
    return replace(found, first=first or found.first)


def fitted_recipe(fits: Path, params: Mapping[str, Any]) -> dict[str, Any] | None:
    """The recipe that was fitted at a point, by the folder that `fit_merge` made; None where nothing is fitted."""
    for point in read_object(fits / _POINTS)["points"]:
        if point["params"] == params:
            return read_object(fits / point["folder"] / _RECIPE)["recipe"]
    return None


def _folder(point: Mapping[str, Any]) -> str:
    return text_digest(point).removeprefix("sha256:")[:_NAME]
