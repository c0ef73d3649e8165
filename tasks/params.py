"""params.yaml: the only parameters of a pipeline, read, checked, and blamed by line."""

from __future__ import annotations

import re
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Iterator, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from evaluation.language import Language
from merging.errors import UserError, did_you_mean
from merging.methods import get_method
from merging.recipe import unfolded_recipe
from merging.strict_yaml import YamlFile
from tasks.gates import Gates


def _plain_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
        raise ValueError(f"'{name}' must be letters, digits, '_' and '-', for it names files and stages")
    return name


Name = Annotated[str, AfterValidator(_plain_name)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Checkpoints(_Strict):
    """Where checkpoints come from: `files` are watched by content, `uris` are fixed by what they name.

    `layout: open_clip` gives CLIP checkpoints of Hugging Face transformers the names and packing of open_clip.
    """

    layout: Literal["as_is", "open_clip"]
    files: dict[Name, str]
    uris: dict[Name, str]
    allow_pickle: bool = False


class Datasets(_Strict):
    """Where the images of each task come from; they are stored at image_size x image_size pixels."""

    image_size: Annotated[int, Field(ge=8)]
    files: dict[Name, str]
    uris: dict[Name, str]


class Merge(_Strict):
    """One merge: fixed `params`, and a grid `search` whose best point on the validation split is taken.

    experts: those of the pipeline's that it merges, in its own order; None for all. Either way a point is scored on
    all tasks.
    """

    method: str
    experts: list[str] | None = None
    params: dict[str, Any] = {}
    search: dict[str, Annotated[list[Any], Field(min_length=1)]] = {}
    dtype: Literal["float32", "float16", "bfloat16"] | None = None

    @model_validator(mode="before")
    @classmethod
    def _unfold(cls, data: Any) -> Any:
        return unfolded_recipe(data)

    @property
    def points(self) -> Iterator[dict[str, Any]]:
        """Every setting of the grid; the fixed params alone where there is none."""
        for values in product(*self.search.values()):
            yield {**self.params, **dict(zip(self.search, values))}


class Params(_Strict):
    """The whole of params.yaml. What dvc.yaml names has no default, for DVC knows none.

    Image models are measured on `datasets` with the prompts of `suite`, language models on `language`.
    """

    name: Name
    seed: int
    device: str = "cpu"
    checkpoints: Checkpoints
    base: str
    experts: Annotated[list[str], Field(min_length=1)]
    datasets: Datasets | None = None
    suite: str | None = None
    language: Language | None = None
    merges: Annotated[dict[Name, Merge], Field(min_length=1)]
    gates: Gates = Gates()

    @cached_property
    def sources(self) -> dict[str, str]:
        """Checkpoint name -> path or URI."""
        return {**self.checkpoints.files, **self.checkpoints.uris}

    @cached_property
    def tasks(self) -> list[str]:
        """The evaluation tasks, in the order of params.yaml."""
        if self.language:
            return self.language.scored
        return [*self.datasets.files, *self.datasets.uris]

    def experts_of(self, merge: str) -> list[str]:
        """The experts that a merge is made of, in its order."""
        own = self.merges[merge].experts
        return self.experts if own is None else own

    @cached_property
    def owners(self) -> dict[str, str]:
        """Task -> the expert that it is held in for: of its name, or of the name of its suite."""
        suites = self.language.suites if self.language else {}
        return {task: e for e in self.experts for task in suites.get(e, [e]) if task in self.tasks}


def load_params(path: Path) -> Params:
    """Read and check a params.yaml.

    Raises:
        UserError: `file:line: what is wrong`, with the nearest known name for a typo.
    """
    file = YamlFile(path)
    params = file.parse(Params)
    for loc, problem in _inconsistencies(params):
        raise file.error(loc, problem)
    return params


def raw_params(path: Path) -> dict[str, Any]:
    """params.yaml as plain data, the way DVC records it."""
    return YamlFile(path).data


def lookup(data: dict[str, Any], key: str) -> Any:
    """The value under a dotted key such as `merges.cart`."""
    value: Any = data
    for part in key.split("."):
        value = value[part]
    return value


def _inconsistencies(params: Params) -> Iterator[tuple[list[Any], str]]:
    """What the types cannot say, as (where, sentence)."""
    if params.language is None:
        for key in ("datasets", "suite"):
            if getattr(params, key) is None:
                yield [], f"'{key}' is required: image models are measured on datasets with the prompts of a suite"
                return
    elif params.datasets or params.suite:
        yield ["language"], "measure image models with datasets and suite, or language models with language"
        return
    for section in ("checkpoints", "datasets"):
        sources = getattr(params, section)
        if sources is None:
            continue
        for name in sources.files.keys() & sources.uris.keys():
            yield (
                [section, "uris", name],
                f"'{name}' is among the files and the uris of {section}; name it once",
            )
        if not (sources.files or sources.uris):
            yield [section], f"{section} are empty; list some under files: or uris:"
        for name, source in sources.files.items():
            if "://" in source:
                yield [section, "files", name], f"'{source}' is a URI; list it under {section}.uris"
    for loc, name in [(["base"], params.base), *((["experts", i], e) for i, e in enumerate(params.experts))]:
        if name not in params.sources:
            yield loc, f"'{name}' is not among the checkpoints{did_you_mean(name, params.sources)}"
    if len(set(params.experts)) != len(params.experts) or params.base in params.experts:
        yield ["experts"], "an expert is listed twice, or is the base"
    for name, merge in params.merges.items():
        if name == "baselines":
            yield ["merges", name], "'baselines' names the base and the experts; choose another name"
        for i, expert in enumerate(merge.experts or ()):
            if expert not in params.experts:
                place = ["merges", name, "experts", i]
                yield place, f"'{expert}' is not among the experts{did_you_mean(expert, params.experts)}"
        if len(set(merge.experts or ())) != len(merge.experts or ()):
            yield ["merges", name, "experts"], "an expert is listed twice"
        try:
            method = get_method(merge.method)
        except UserError as error:
            yield ["merges", name, "method"], str(error)
            continue
        for key in merge.search:
            if key in merge.params:
                yield (
                    ["merges", name, "search", key],
                    f"'{key}' is fixed in params and listed in search; keep one",
                )
        alone = [(["search", key], {key: value}) for key, values in merge.search.items() for value in values]
        for where, values in [(["params"], {}), *alone]:
            try:
                resolved = method.resolve({**merge.params, **values})
            except UserError as error:
                yield ["merges", name, *where], str(error)
                continue
            for misuse in method.misuses(resolved, len(params.experts_of(name)), has_base=True):
                yield ["merges", name, *(["experts"] if merge.experts is not None else where)], misuse
