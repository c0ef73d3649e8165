"""Recipes in YAML: Mergeline's own, and configurations of mergekit's, blamed by file and line."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Iterator, Sequence

from pydantic import ValidationError

from mergeline.merging.checkpoints.companions import is_repository
from mergeline.merging.errors import UserError, plainly
from mergeline.merging.methods import get_method, load_methods
from mergeline.merging.recipes.mergekit_yaml import is_mergekit, of_another_command, translated
from mergeline.merging.recipes.recipe import Part, Recipe
from mergeline.merging.strict_yaml import YamlFile, documents

Blamed = Callable[[Sequence[Any]], list[Any]]  # where in a file a part of a recipe is said
_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,99}")
_NAMES_A_METHOD = re.compile(r"(inner_)*(inner|origin)")


@dataclass(frozen=True)
class Merge:
    """One merge of a file of several: its name, None of the one that the others are for; and whose results it takes."""

    name: str | None
    recipe: Recipe
    takes: list[str]


def load_merges(
    path: Path, place: Path, bring: Callable[[str], Path], find: Callable[[str], Any] = get_method
) -> list[Merge]:
    """Read the documents of mergekit-multi, in an order in which each comes after those whose results it takes.

    The results of those that have a name lie in `place`, under it.

    Raises:
        UserError: as `load_recipe`; for a name that two have, or that is none of a folder; for merges that wait for
            each other.
    """
    files = documents(path)
    named: dict[str | None, YamlFile] = {}
    for file in files:
        if not is_mergekit(file.data):
            raise file.error(
                [], "of several documents each must be a configuration of mergekit's, with merge_method"
            )
        name = file.data.get("name")
        if name is not None and (not isinstance(name, str) or not _NAME.fullmatch(name)):
            raise file.error(
                ["name"], f"name: {name!r} is to be that of a folder: letters, digits, '.', '_' and '-'"
            )
        if name in named:
            what = (
                f"two merges have the name '{name}'"
                if name
                else "two merges have no name; name all but the last"
            )
            raise file.error(["name"] if name else [], what)
        named[name] = file
    places = {name: place / name for name in named if name is not None}

    def brought(where: str) -> Path:
        return Path(where) if Path(where) in places.values() else bring(where)

    found: dict[str | None, Merge] = {}
    for name, file in named.items():
        written, blamed, takes = translated(file, brought, places)
        found[name] = Merge(name, _validated(file, written, blamed, brought, find), takes)
    return _ordered(path, found)


def _ordered(path: Path, merges: dict[str | None, Merge]) -> list[Merge]:
    """Each after those whose results it takes (raises UserError where they wait for each other)."""
    done: dict[str | None, Merge] = {}
    while len(done) < len(merges):
        ready = [m for name, m in merges.items() if name not in done and all(t in done for t in m.takes)]
        if not ready:
            waiting = ", ".join(f"'{name}'" if name else "the last" for name in merges if name not in done)
            raise UserError(
                f"{path}: merges wait for each other: {waiting}; take one's result out of another"
            )
        done |= {m.name: m for m in ready}
    return sorted(done.values(), key=lambda merge: merge.name is None)


def load_recipe(path: Path, bring: Callable[[str], Path], find: Callable[[str], Any] = get_method) -> Recipe:
    """Read a recipe, or a configuration of mergekit's, from YAML.

    Relative paths are relative to its folder; where there is none, `org/name` is a repository of the Hub. `bring` makes
    a URI, or a path, that of a checkpoint on this machine; `find` gives the method of an id, or raises UserError.

    Raises:
        UserError: with file and line, for a key or a value that is wrong.
    """
    file = YamlFile(path)
    if is_mergekit(file.data):
        written, blamed, _ = translated(file, bring)
        return _validated(file, written, blamed, bring, find)
    if problem := of_another_command(file.data):
        raise file.error([], f"the file {problem}")
    recipe, written = file.parse(Recipe), file.data
    for defined in recipe.methods:
        load_methods(path.parent / defined)

    def in_file(loc: Sequence[Any]) -> list[Any]:
        """Methods inside may be named by `method`, too."""
        short = loc[0] == "params" and loc[1] not in (written.get("params") or ())
        return ["method"] if short else list(loc)

    return _brought(file, recipe, written, in_file, bring, find)


def _validated(
    file: YamlFile,
    written: dict[str, Any],
    blamed: Blamed,
    bring: Callable[[str], Path],
    find: Callable[[str], Any],
) -> Recipe:
    """The recipe that a configuration of mergekit's became (raises UserError by its lines)."""
    try:
        recipe = Recipe.model_validate(written)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise file.error(blamed(first["loc"]), f"{where}: {plainly(first)}") from None
    return _brought(file, recipe, written, blamed, bring, find)


def _brought(
    file: YamlFile,
    recipe: Recipe,
    written: dict[str, Any],
    blamed: Blamed,
    bring: Callable[[str], Path],
    find: Callable[[str], Any],
) -> Recipe:
    """The recipe of checkpoints on this machine, after a look at its parameters (raises UserError by their lines)."""
    path = file.path
    for loc, problem in _mistakes(recipe, find):
        raise file.error(blamed(loc), problem)

    def local(where: Any) -> Any:
        if isinstance(where, list):
            return [local(w) for w in where]
        if where and is_repository(where, path.parent / where):
            where = f"hf://{where}"
        return where and bring(where if "://" in where else str(path.parent / where))

    return recipe.model_copy(
        update={
            "experts": {name: local(where) for name, where in written["experts"].items()},
            "base": local(written.get("base")),
            "onto": {name: local(where) for name, where in (written.get("onto") or {}).items()},
            "statistics": {kind: local(where) for kind, where in written.get("statistics", {}).items()},
            "methods": [path.parent / defined for defined in recipe.methods],
            "adapters": {task: path.parent / file for task, file in recipe.adapters.items()},
            "router": recipe.router and path.parent / recipe.router,
        }
    )


def _mistakes(recipe: Recipe, find: Callable[[str], Any]) -> Iterator[tuple[list[Any], str]]:
    """Unknown methods and parameters, and values out of range, as (where, sentence)."""
    # Which methods are meant decides which parameters are known.
    chain: dict[str, Any] = {}
    try:
        method = find(recipe.method)
    except UserError as error:
        yield ["method"], str(error)
        return
    for key in sorted(filter(_NAMES_A_METHOD.fullmatch, recipe.params if method.wraps else ()), key=len):
        chain[key] = recipe.params[key]
        try:
            method.resolve(chain)
        except UserError as error:
            yield ["params", key], str(error)
            return
    given = list(_settings([], recipe))
    for i, part in enumerate(recipe.stack):
        given += _settings(["stack", i], part)
    for loc, key, value in given:
        try:
            method.resolve({**chain, key: value})
        except UserError as error:
            yield loc, str(error)


def _settings(loc: list[Any], of: Recipe | Part) -> Iterator[tuple[list[Any], str, Any]]:
    """Where a parameter stands in a recipe or a part of its stack, its name, and a value."""
    for key, value in of.params.items():
        yield [*loc, "params", key], key, value
    for i, rule in enumerate(of.rules):
        for kind, values in (
            ("params", rule.params),
            ("gradient", {k: v[0] for k, v in rule.gradient.items()}),
        ):
            for key, value in values.items():
                yield [*loc, "rules", i, kind, key], key, value if rule.expert is None else [value]
