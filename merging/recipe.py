"""A recipe: what to merge, how, into which dtype. It travels inside the merged checkpoint."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Callable, Iterator, Literal, Mapping

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from merging.errors import UserError
from merging.strict_yaml import YamlFile


def _list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Patterns = Annotated[list[str], BeforeValidator(_list)]


class Rule(BaseModel):
    """Other parameters for some tensors: later rules win over earlier ones.

    match: shell patterns of tensor names (`*.attn.*`), any of which is enough. layers: first and last block, counted
    from 0, negative ones from the end. gradient: a parameter's values over the depth, interpolated linearly from the
    first to the last block (of `layers`); tensors outside numbered blocks have no depth and are left alone.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    match: Patterns = ["*"]
    layers: tuple[int, int] | None = None
    params: dict[str, Any] = {}
    gradient: dict[str, Annotated[list[float], Field(min_length=1)]] = {}


class Recipe(BaseModel):
    """Paths are local safetensors files or folders; `experts` is in the order of all per-expert lists.

    Tensors that are not among `include`, or are among `exclude`, are not merged: they become the base's (or the
    `average` of the experts, as `excluded` says).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: str
    params: dict[str, Any] = {}
    experts: dict[str, Path]
    base: Path | None = None
    statistics: dict[str, Path | list[Path]] = {}
    include: Patterns = ["*"]
    exclude: Patterns = []
    excluded: Literal["base", "average"] = "base"
    rules: list[Rule] = []
    dtype: Literal["float32", "float16", "bfloat16", "float64"] | None = (
        None  # None: each tensor keeps its own
    )
    seed: int = 0
    shard_size: Annotated[int, Field(gt=0)] | None = None  # bytes a file; None writes one file
    # Whose configuration and tokenizer are carried over; None: the base's, or the first expert's without a base.
    donor: str | None = None
    vocabulary: Literal["donor", "union"] = "donor"  # whose tokens the merge has, where vocabularies differ

    @classmethod
    def of(cls, value: Recipe | Mapping[str, Any]) -> Recipe:
        """A recipe from a recipe or a mapping (raises UserError if a key or value is wrong)."""
        if isinstance(value, Recipe):
            return value
        try:
            return cls.model_validate(dict(value))
        except ValidationError as error:
            first = error.errors()[0]
            raise UserError(f"recipe: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None

    @property
    def settings(self) -> dict[str, Any]:
        """What decides the result besides the checkpoints, as JSON values."""
        named = (
            "include",
            "exclude",
            "excluded",
            "rules",
            "dtype",
            "seed",
            "shard_size",
            "donor",
            "vocabulary",
        )
        return self.model_dump(mode="json", include=set(named))


def load_recipe(path: Path, bring: Callable[[str], Path]) -> Recipe:
    """Read a recipe from YAML. Relative paths are relative to its folder; `bring` makes a URI a local path.

    Raises:
        UserError: with file and line, for a key or a value that is wrong.
    """
    file = YamlFile(path)
    recipe = file.parse(Recipe)
    for loc, problem in _mistakes(recipe):
        raise file.error(loc, problem)

    def local(where: Any) -> Any:
        if isinstance(where, list):
            return [local(w) for w in where]
        return where and (bring(where) if "://" in where else path.parent / where)

    written = file.data
    return recipe.model_copy(
        update={
            "experts": {name: local(where) for name, where in written["experts"].items()},
            "base": local(written.get("base")),
            "statistics": {kind: local(where) for kind, where in written.get("statistics", {}).items()},
        }
    )


def _mistakes(recipe: Recipe) -> Iterator[tuple[list[Any], str]]:
    """Unknown methods and parameters, and values out of range, as (where, sentence)."""
    from merging.methods import get_method

    try:
        method = get_method(recipe.method)
    except UserError as error:
        yield ["method"], str(error)
        return
    inner = (
        {"inner": recipe.params["inner"]} if "inner" in recipe.params else {}
    )  # whose parameters are known too
    given = [(["params", key], key, value) for key, value in recipe.params.items()]
    for i, rule in enumerate(recipe.rules):
        given += [(["rules", i, "params", key], key, value) for key, value in rule.params.items()]
        given += [(["rules", i, "gradient", key], key, values[0]) for key, values in rule.gradient.items()]
    for loc, key, value in given:
        try:
            method.resolve({**inner, key: value})
        except UserError as error:
            yield loc, str(error)


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no blanks: equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def text_digest(value: Any) -> str:
    """`sha256:...` of the canonical JSON of a value."""
    return "sha256:" + hashlib.sha256(canonical_json(value).encode()).hexdigest()
