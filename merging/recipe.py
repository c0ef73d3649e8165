"""A recipe: what to merge, how, into which dtype. It travels inside the merged checkpoint."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Annotated, Any, Callable, Iterator, Literal, Mapping

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_serializer,
    model_validator,
)

from merging.errors import UserError, did_you_mean
from merging.mergekit_yaml import is_mergekit, translated
from merging.strict_yaml import YamlFile


def _list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


_NAMES_A_METHOD = re.compile(r"(inner_)*(inner|origin)")

Patterns = Annotated[list[str], BeforeValidator(_list)]


def unfolded(method: str, params: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """A chain such as `lines(dare(ties))` as its outermost method and the parameters inner: dare, inner_inner: ties.

    Raises:
        ValueError: parentheses that do not match, or params that name other methods.
    """
    ids = [part.strip() for part in method.rstrip(") ").split("(")]
    if len(ids) == 1 and ")" not in method:
        return method, dict(params)
    if re.sub(r"[^()]", "", method) != "(" * (len(ids) - 1) + ")" * (len(ids) - 1) or not all(ids):
        raise ValueError(f"'{method}' is no chain of methods; write one such as lines(dare(ties))")
    named = {"inner_" * i + "inner": id for i, id in enumerate(ids[1:])}
    for key, id in named.items():
        if params.get(key, id) != id:
            raise ValueError(f"'{method}' names {id}, {key} names {params[key]}; leave one out")
    return ids[0], {**params, **named}


def unfolded_recipe(data: Any) -> Any:
    """What is written of a recipe, its `method` unfolded (raises ValueError as `unfolded`)."""
    if not isinstance(data, dict) or not isinstance(data.get("method"), str):
        return data
    params = data.get("params", {})
    if not isinstance(params, dict):
        return data
    method, params = unfolded(data["method"], params)
    return {**data, "method": method, "params": params}


class Rule(BaseModel):
    """Other parameters for some tensors: later rules win over earlier ones.

    match: shell patterns of tensor names (`*.attn.*`), any of which is enough. layers: first and last block, counted
    from 0, negative ones from the end. gradient: a parameter's values over the depth, interpolated linearly from the
    first to the last block (of `layers`); tensors outside numbered blocks have no depth and are left alone.
    expert: the values are this expert's entries in parameters that are lists of one an expert.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    match: Patterns = ["*"]
    layers: tuple[int, int] | None = None
    params: dict[str, Any] = {}
    gradient: dict[str, Annotated[list[float], Field(min_length=1)]] = {}
    expert: str | None = None

    @model_serializer(mode="wrap")
    def _brief(self, dump: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        return {key: value for key, value in dump(self).items() if key != "expert" or value is not None}


class Range(BaseModel):
    """Layers of one expert: the first and the last, counted from 0, negative ones from the end."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    expert: str
    layers: tuple[int, int]


class Recipe(BaseModel):
    """Paths are local safetensors files or folders; `experts` is in the order of all per-expert lists.

    `method: lines(dare(ties))` is short for `method: lines` with `params: {inner: dare, inner_inner: ties}`.

    Tensors that are not among `include`, or are among `exclude`, are not merged: they become the base's (or the
    `average` of the experts, as `excluded` says).

    `stack` makes a model of ranges of the experts' layers, one after the other, with `method: passthrough`.

    `allow_locked` merges experts that are locked against it (see `merging.mergelock`), as their owner must permit.
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
    stack: list[Range] = []
    dtype: Literal["float32", "float16", "bfloat16", "float64"] | None = (
        None  # None: each tensor keeps its own
    )
    seed: int = 0
    shard_size: Annotated[int, Field(gt=0)] | None = None  # bytes a file; None writes one file
    # Whose configuration and tokenizer are carried over; None: the base's, or the first expert's without a base.
    donor: str | None = None
    vocabulary: Literal["donor", "union"] = "donor"  # whose tokens the merge has, where vocabularies differ
    allow_locked: bool = False

    @model_serializer(mode="wrap")
    def _brief(self, dump: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        return {key: value for key, value in dump(self).items() if key != "allow_locked" or value}

    @model_validator(mode="before")
    @classmethod
    def _unfold(cls, data: Any) -> Any:
        return unfolded_recipe(data)

    @model_validator(mode="after")
    def _lists(self) -> Recipe:
        if self.stack and (self.method != "passthrough" or self.base or self.rules or self.statistics):
            raise ValueError("stack: copies layers as they are: method passthrough, without base, rules and statistics")
        for rule in self.rules:
            if rule.expert is None:
                continue
            if rule.expert not in self.experts:
                near = did_you_mean(rule.expert, self.experts)
                raise ValueError(f"rules: no expert is named '{rule.expert}'{near}")
            for key in (*rule.params, *rule.gradient):
                listed = self.params.get(key)
                if not isinstance(listed, list) or len(listed) != len(self.experts):
                    raise ValueError(f"rules: list '{key}' of every expert in params, of which a rule changes one")
        return self

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
            "stack",
            "dtype",
            "seed",
            "shard_size",
            "donor",
            "vocabulary",
            "allow_locked",
        )
        return self.model_dump(mode="json", include=set(named))


def load_recipe(path: Path, bring: Callable[[str], Path]) -> Recipe:
    """Read a recipe, or a configuration of mergekit's, from YAML.

    Relative paths are relative to its folder; `bring` makes a URI a local path.

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
            raise file.error(blamed(first["loc"]), f"{where}: {first['msg']}") from None
    else:
        recipe, written = file.parse(Recipe), file.data

        def blamed(loc: list[Any]) -> list[Any]:
            """Methods inside may be named by `method`, too."""
            short = loc[0] == "params" and loc[1] not in (written.get("params") or ())
            return ["method"] if short else loc

    for loc, problem in _mistakes(recipe):
        raise file.error(blamed(loc), problem)

    def local(where: Any) -> Any:
        if isinstance(where, list):
            return [local(w) for w in where]
        return where and (bring(where) if "://" in where else path.parent / where)

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

    # Which methods are meant decides which parameters are known.
    chain: dict[str, Any] = {}
    try:
        method = get_method(recipe.method)
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
    given = [(["params", key], key, value) for key, value in recipe.params.items()]
    for i, rule in enumerate(recipe.rules):
        for kind, values in (("params", rule.params), ("gradient", {k: v[0] for k, v in rule.gradient.items()})):
            for key, value in values.items():
                given.append((["rules", i, kind, key], key, value if rule.expert is None else [value]))
    for loc, key, value in given:
        try:
            method.resolve({**chain, key: value})
        except UserError as error:
            yield loc, str(error)


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no blanks: equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def text_digest(value: Any) -> str:
    """`sha256:...` of the canonical JSON of a value."""
    return "sha256:" + hashlib.sha256(canonical_json(value).encode()).hexdigest()
