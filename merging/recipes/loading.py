"""Recipes in YAML: Mergeline's own, and configurations of mergekit's, blamed by file and line."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Callable, Iterator, Sequence

from pydantic import ValidationError

from mergeline.merging.errors import UserError, plainly
from mergeline.merging.methods import get_method, load_methods
from mergeline.merging.recipes.mergekit_yaml import is_mergekit, translated
from mergeline.merging.recipes.recipe import Part, Recipe
from mergeline.merging.strict_yaml import YamlFile

_NAMES_A_METHOD = re.compile(r"(inner_)*(inner|origin)")


def load_recipe(path: Path, bring: Callable[[str], Path], find: Callable[[str], Any] = get_method) -> Recipe:
    """Read a recipe, or a configuration of mergekit's, from YAML.

    Relative paths are relative to its folder; `bring` makes a URI, or a path, that of a checkpoint on this machine;
    `find` gives the method of an id, or raises UserError.

    Raises:
        UserError: with file and line, for a key or a value that is wrong.
    """
    file = YamlFile(path)
    if is_mergekit(file.data):
        written, blamed = translated(file)
        try:
            recipe = Recipe.model_validate(written)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise file.error(blamed(first["loc"]), f"{where}: {plainly(first)}") from None
    else:
        recipe, written = file.parse(Recipe), file.data
        for defined in recipe.methods:
            load_methods(path.parent / defined)

        def blamed(loc: Sequence[Any]) -> list[Any]:
            """Methods inside may be named by `method`, too."""
            short = loc[0] == "params" and loc[1] not in (written.get("params") or ())
            return ["method"] if short else list(loc)

    for loc, problem in _mistakes(recipe, find):
        raise file.error(blamed(loc), problem)

    def local(where: Any) -> Any:
        if isinstance(where, list):
            return [local(w) for w in where]
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
