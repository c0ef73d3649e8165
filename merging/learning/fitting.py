"""`fit`: a recipe of a learned method and examples in, a recipe that can be merged out."""

from __future__ import annotations

import os
import shutil
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, Mapping

from mergeline.merging.engine.inputs import contents
from mergeline.merging.engine.machine import one_thread
from mergeline.merging.engine.planning import make_plan
from mergeline.merging.errors import UserError, did_you_mean
from mergeline.merging.files import read_object, remove_halves, write_json
from mergeline.merging.learning.contract import SAID, Job, LearnedMethod, learned_methods
from mergeline.merging.learning.network import Examples, Network
from mergeline.merging.recipes.recipe import Fitted, Recipe

if TYPE_CHECKING:
    from mergeline.merging.engine.work import Progress

_FITTED, _BEGUN = "fit.json", "begun.json"
_PLACES = ("base", "experts", "statistics", "adapters", "router")  # of a recipe


class FitNote(UserWarning):
    """What is to be known of a fit beside its result."""


def fit(
    recipe: Recipe | Mapping[str, Any],
    network: Network,
    examples: Examples,
    folder: str | os.PathLike,
    *,
    device: str = "cpu",
    progress: Progress | None = None,
    transductive: bool = False,
) -> Recipe:
    """Fit a recipe of a learned method to examples; returns one of ordinary methods, which `merge` takes.

    `folder` keeps what the result names, and fit.json: what was fitted to what. The same recipe, files and examples are
    fitted once: a second call returns the first one's result, and one that was killed goes on where it was. What the
    folder holds of another fit is removed, and at the end what was kept to go on with. The result's `fitted` says what
    was seen; a `FitNote` is warned of what else is to be known of it.

    transductive: whether examples of the test split may be fitted to.

    Raises:
        UserError: no learned method of this name, wrong parameters, checkpoints that do not fit one another, examples
            of no use to it (none, or without labels) or of the test split, a loss that is no longer finite.
    """
    recipe, folder = Recipe.of(recipe), Path(folder)
    known = learned_methods()
    if recipe.method not in known:
        raise UserError(f"'{recipe.method}' is no learned method{did_you_mean(recipe.method, known)}")
    method = known[recipe.method]
    params = method.resolve(recipe.params)
    if recipe.base is None:
        raise UserError(f"{method.id} measures from the base checkpoint: name it (--base, `base:`)")
    if recipe.stack or recipe.onto:
        what = "stack" if recipe.stack else "onto"
        raise UserError(
            f"{method.id} is fitted to models as they are: merge what {what} makes first, and fit to that"
        )
    if examples.split == "test" and not transductive:
        raise UserError(
            f"{method.id} would be fitted to test examples, which then report nothing; fit to others, or ask for "
            "`split: test`"
        )
    data = method.data_of(params)
    if data != "none":
        _check_examples(recipe, examples, data == "labelled", method)
    facts = _facts(method, recipe, params, examples)
    done, begun = folder / _FITTED, folder / _BEGUN
    if done.is_file() and (found := read_object(done)).get("facts") == facts:
        _warn(found["notes"])
        return _moved(found, recipe, folder)
    if done.is_file() or (begun.is_file() and read_object(begun) != facts):
        shutil.rmtree(folder)  # of another fit, which this one must not go on with
    folder.mkdir(parents=True, exist_ok=True)
    write_json(begun, facts)
    job = Job(recipe, network, examples, folder, progress, device, facts)
    with one_thread():
        result = method.function(job, **params)
    seen = Fitted(
        method=method.id,
        params=params,
        trains=method.trains,
        task_known=method.task_known,
        stand_in=method.stand_in_of(params),
        chosen_on=method.chosen_on,
        **{"split": examples.split, "examples": {}, "digests": {}, **facts["seen"]},
    )
    result = result.model_copy(update={"fitted": seen})
    plain = result.model_dump(mode="json")
    write_json(done, {"facts": facts, "given": _given(recipe, folder), "recipe": plain, "notes": job.notes})
    begun.unlink()
    _tidy(folder, result)
    _warn(job.notes)
    return result


def _warn(notes: Mapping[str, Any]) -> None:
    for line in notes.get(SAID, ()):
        warnings.warn(line, FitNote, stacklevel=3)


def _given(recipe: Recipe, folder: Path) -> dict[str, str]:
    """Where what a fit's result may name lies: its folder and the checkpoints, by name."""
    places = {"folder": folder, "base": recipe.base, **{f"expert {n}": p for n, p in recipe.experts.items()}}
    return {name: str(path) for name, path in places.items()}


def _moved(found: dict[str, Any], recipe: Recipe, folder: Path) -> Recipe:
    """The result of a fit that was done, where its checkpoints and its folder are by now."""
    given = _given(recipe, folder)
    before = found.get("given", given)
    if before != given:
        now = {before[name]: path for name, path in given.items() if name != "folder"}

        def place(value: Any) -> Any:
            if isinstance(value, dict):
                return {key: place(each) for key, each in value.items()}
            if isinstance(value, list):
                return [place(each) for each in value]
            if isinstance(value, str) and Path(value).is_relative_to(before["folder"]):
                return str(folder / Path(value).relative_to(before["folder"]))
            return now.get(value, value) if isinstance(value, str) else value

        plain = found["recipe"]
        named = {key: plain[key] for key in _PLACES if plain.get(key)}
        found = {**found, "given": given, "recipe": {**plain, **place(named)}}
        write_json(folder / _FITTED, found)
    return Recipe.of(found["recipe"])


def _tidy(folder: Path, result: Recipe) -> None:
    """Remove halves of files, and what a fit kept to go on with: the folders that the result names nothing of."""
    remove_halves(folder)
    statistics = [
        f for given in result.statistics.values() for f in (given if isinstance(given, list) else [given])
    ]
    named = [result.base, result.router, *result.experts.values(), *result.adapters.values(), *statistics]
    kept = {path.absolute() for path in named if path}
    for entry in folder.absolute().iterdir():
        if entry.is_dir() and not any(entry in (path, *path.parents) for path in kept):
            shutil.rmtree(entry)


def _check_examples(recipe: Recipe, examples: Examples, labels: bool, method: LearnedMethod) -> None:
    if labels and not examples.labelled:
        raise UserError(
            f"{method.id} is fitted to labels, and the examples have none; choose a method without"
        )
    counts = {e: sum(examples.count(task) for task in examples.tasks_of(e)) for e in recipe.experts}
    if method.pool and any(counts.values()):
        return
    for expert, count in counts.items():
        if not count:
            raise UserError(
                f"'{expert}' has no examples of its own task; leave the expert out, or bring some"
            )


def _facts(
    method: LearnedMethod, recipe: Recipe, params: Mapping[str, Any], examples: Examples
) -> dict[str, Any]:
    """What decides the result, and what the merge has seen."""
    plan = make_plan(Recipe.of({**recipe.model_dump(mode="json"), "method": "average", "params": {}}))
    plan.check()
    return {
        "method": method.id,
        "digest": method.digest,
        "params": dict(params),
        "settings": recipe.settings,
        "inputs": contents(plan.checkpoints),
        "seen": {
            "data": method.data_of(params),
            **({} if method.data_of(params) == "none" else _seen(examples)),
        },
    }


def _seen(examples: Examples) -> dict[str, Any]:
    return {
        "split": examples.split,
        "examples": {task: examples.count(task) for task in examples.counts},
        "digests": dict(examples.digests),
    }
