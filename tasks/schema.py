"""What every params.yaml holds, whatever its models are measured with; modalities add sections of their own."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from datetime import timedelta
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Callable, Iterator, Literal, Mapping, Sequence

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

from mergeline.merging.engine.machine import check_device_name
from mergeline.merging.errors import UserError, did_you_mean
from mergeline.merging.learning.contract import LearnedMethod, any_method
from mergeline.merging.learning.gathering import KINDS, SETTINGS, Gathering, Kind
from mergeline.merging.methods import get_method
from mergeline.merging.recipes.recipe import Patterns, Rule, Seed, too_many_points, unfolded, unfolded_recipe
from mergeline.tasks.credentials import holds_credentials, without_credentials
from mergeline.tasks.executors import place_of
from mergeline.tasks.gates import Gates
from mergeline.tasks.search_space import (
    Branch,
    Each,
    Range,
    Search,
    Setting,
    edges,
    holds,
    is_ordered,
    kind_of_search,
    numbers,
)

Problem = tuple[list[Any], str]  # where in params.yaml, as keys and indexes; what is wrong there

_NO_SECRETS = (
    "a password, token or signature, which dvc.lock would record; leave it out here, and give it by environment "
    "variables (such as HF_TOKEN), ~/.netrc, or fsspec's configuration (~/.config/fsspec/)"
)


def _plain_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
        raise ValueError(f"'{name}' must be letters, digits, '_' and '-', for it names files and stages")
    return name


Name = Annotated[str, AfterValidator(_plain_name)]
Grid = dict[str, Annotated[list[Any], Field(min_length=1)]]

OF_MERGE = "merge:"  # what stands before the name of a merge whose result another takes

# What a merge says as a recipe does.
_AS_RECIPES = (
    "include", "exclude", "excluded", "keep", "rules", "running_statistics", "layout", "requantise"
)  # fmt: skip


class Strict(BaseModel):
    """A part of params.yaml: unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Sources(Strict):
    """Where files come from: `files` are watched by content, `uris` are fixed by what they name."""

    files: dict[Name, str]
    uris: dict[Name, str]

    @cached_property
    def all(self) -> dict[str, str]:
        """Name -> path or URI."""
        return {**self.files, **self.uris}

    def place(self, name: str) -> list[str]:
        """Where one stands, in the section that has these as `data`."""
        return ["data", "files" if name in self.files else "uris", name]

    def problems(self, section: str) -> Iterator[Problem]:
        """What is wrong with this section."""
        for name in self.files.keys() & self.uris.keys():
            yield (
                [section, "uris", name],
                f"'{name}' is among the files and the uris of {section}; name it once",
            )
        if not self.all:
            yield [section], f"{section} are empty; list some under files: or uris:"
        for name, source in self.files.items():
            if "://" in source:
                shown = without_credentials(source)
                yield [section, "files", name], f"'{shown}' is a URI; list it under {section}.uris"
        for name, source in self.uris.items():
            if holds_credentials(source):
                shown = without_credentials(source)
                yield [section, "uris", name], f"'{shown}' is given with {_NO_SECRETS}"


class Checkpoints(Sources):
    """Where checkpoints come from.

    `layout: open_clip` gives CLIP checkpoints of Hugging Face transformers the names and packing of open_clip.
    """

    layout: Literal["as_is", "open_clip"]
    allow_pickle: bool = False


class Merge(Strict):
    """One merge: fixed `params`, and a `search` whose best point on the validation split is taken: every one of a grid,
    or those that are proposed within a budget (`tasks.search_space.Search`), maybe of several methods.

    experts: those of the pipeline's that it merges, in its own order; None for all. Either way a point is scored on
    all tasks. Those of `merges_of_merges` may be `merge:NAME`, the result of one of `merges`, and so may `base`, which
    others leave out.

    include, exclude, excluded, keep, rules, running_statistics, layout, requantise: what is merged of the models, and
    how it is written, as in a recipe (`merging.recipes.recipe.Recipe`). Points of a search are scored as they are
    written.

    examples (or images): for a learned method, how many of each task it is fitted to, the first ones; None for all.
    split: of which part of the data; `test` must be asked for, and its score is then no measure.
    """

    method: str
    base: str | None = None
    experts: list[str] | None = None
    params: dict[str, Any] = {}
    search: Annotated[
        Annotated[Grid, Tag("[grid]")] | Annotated[Search, Tag("[budget]")], Discriminator(kind_of_search)
    ] = {}
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    include: Patterns = ["*"]
    exclude: Patterns = []
    excluded: Literal["base", "average"] = "base"
    keep: dict[str, str] = {}
    rules: list[Rule] = []
    running_statistics: Literal["average", "merge"] = "average"
    layout: Literal["as_base", "packed", "per_expert"] = "as_base"
    requantise: bool = False
    examples: Annotated[int, Field(gt=0)] | None = None
    images: Annotated[int, Field(gt=0)] | None = None
    split: Literal["fit", "test"] = "fit"

    @model_validator(mode="before")
    @classmethod
    def _unfold(cls, data: Any) -> Any:
        return unfolded_recipe(_with_first_method(data))

    @property
    def grid(self) -> Grid:
        """The values of each parameter of a grid; none where the search has a budget, or there is none."""
        return self.search if isinstance(self.search, dict) else {}

    @property
    def within(self) -> Search | None:
        """The search with a budget."""
        return self.search if isinstance(self.search, Search) else None

    @property
    def branches(self) -> list[Branch]:
        """The methods of a search with a budget; its own alone where there is none."""
        if self.within:
            return self.within.branches(self.method, self.params)
        return [Branch(method=self.method, params=self.params)]

    @property
    def in_recipe(self) -> dict[str, Any]:
        """What its recipe says of tensors and how they are written, where params.yaml says it."""
        return {key: getattr(self, key) for key in _AS_RECIPES if key in self.model_fields_set}

    @property
    def first(self) -> int | None:
        """How many examples of each task it is fitted to; None for all."""
        return self.examples or self.images

    @property
    def takes(self) -> list[str]:
        """The merges whose results it takes, each once."""
        named = [*(self.experts or ()), self.base or ""]
        found = (one.removeprefix(OF_MERGE) for one in named if one.startswith(OF_MERGE))
        return list(dict.fromkeys(found))

    @cached_property
    def is_learned(self) -> bool:
        """Whether its method is fitted to examples."""
        return isinstance(any_method(self.method), LearnedMethod)

    @property
    def points(self) -> Iterator[dict[str, Any]]:
        """Every setting of the grid; the fixed params alone where there is none."""
        for values in product(*self.grid.values()):
            yield {**self.params, **dict(zip(self.grid, values))}


class Statistics(Strict):
    """How statistics of one kind are collected; `images` and `examples` of a task are the same. See `Gathering`."""

    images: Annotated[int, Field(ge=1)] | None = None
    examples: Annotated[int, Field(ge=1)] | None = None
    memory: Literal["layer"] | Annotated[int, Field(ge=1)] | None = None
    labels: Literal["true", "sampled", "empirical"] = "true"
    draws: Annotated[int, Field(ge=1)] = 1
    normalise: Literal["none", "global", "trace"] = "none"
    outputs: bool = False

    @property
    def gathering(self) -> Gathering:
        """The same as `collect` takes it."""
        given = self.model_dump(exclude={"images", "examples"})
        return Gathering(examples=self.images or self.examples, **given)

    def problems(self, kind: Kind) -> Iterator[Problem]:
        """What is wrong with this section of a kind."""
        if self.images and self.examples:
            yield ["images"], "images and examples say the same; leave one out"
        for key in sorted(self.model_fields_set - {"images", "examples", *SETTINGS[kind]}):
            yield [key], f"'{key}' is no setting of {kind}; leave it out"


class Retention(Strict):
    """How long, and how much of, `.mergeline` keeps what makes later runs quicker."""

    days: Annotated[float, Field(gt=0.05)] = 30.0
    gigabytes: Annotated[float, Field(ge=0)] = 20.0

    @property
    def age(self) -> timedelta:
        """What was not used for longer may go."""
        return timedelta(days=self.days)

    @property
    def bytes(self) -> int:
        """As much may stay."""
        return int(self.gigabytes * 10**9)


class Registering(Strict):
    """What becomes of the files of registered versions, besides that they are kept here.

    push: they go to DVC's default remote, if there is one, so that other checkouts can roll back to them.
    upload_gigabytes: where MLflow's artifact store is seen from this machine, it gets hard links; elsewhere the files
    of a champion of no more than so many gigabytes are uploaded.
    """

    push: bool = True
    upload_gigabytes: Annotated[float, Field(ge=0)] = 5.0

    @property
    def most_bytes(self) -> int:
        """That are uploaded."""
        return int(self.upload_gigabytes * 10**9)


def _variable(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        shown = without_credentials(name)
        raise ValueError(f"'{shown}' is no name of an environment variable; name one that holds the address")
    return name


class Alerts(Strict):
    """Who is told of what: names of environment variables that hold addresses of apprise's, which are secrets.

    failure: a run failed, or was killed. promotion: a version became champion. held_back: a gate held one back.
    """

    failure: list[Annotated[str, AfterValidator(_variable)]] = []
    promotion: list[Annotated[str, AfterValidator(_variable)]] = []
    held_back: list[Annotated[str, AfterValidator(_variable)]] = []

    @property
    def all(self) -> list[str]:
        """Whoever is told of anything."""
        return [*self.failure, *self.promotion, *self.held_back]


class Params(Strict, ABC):
    """What every params.yaml holds. What dvc.yaml names has no default, for DVC knows none.

    A modality's own class adds its sections and says its tasks. Paths are seen from the workspace.

    merges_of_merges: merges that take the results of others as experts or base. They are sections of their own because
    DVC states the same dependencies for all entries of one.
    statistics: what is collected of every expert on examples of its own tasks, for merges whose methods read it.
    executor: where stages compute, as tasks/executors.py has it; None for this machine.
    methods: Python files that define methods, and are run. Fits, searches and merges are stale where one changes; in
    dvc.yaml they belong to the `deps` of these three.
    """

    name: Name
    seed: Seed
    device: str = "cpu"
    executor: str | None = None
    checkpoints: Checkpoints
    base: str
    experts: Annotated[list[str], Field(min_length=1)]
    merges: Annotated[dict[Name, Merge], Field(min_length=1)]
    merges_of_merges: dict[Name, Merge] = {}
    statistics: dict[Kind, Statistics] = {}
    methods: list[str] = []
    gates: Gates = Gates()
    retention: Retention = Retention()
    registry: Registering = Registering()
    alerts: Alerts = Alerts()

    @property
    @abstractmethod
    def tasks(self) -> list[str]:
        """The evaluation tasks, in the order of params.yaml."""

    @cached_property
    def owners(self) -> dict[str, str]:
        """Task -> the expert that it is held in for: here that of its name."""
        return {expert: expert for expert in self.experts if expert in self.tasks}

    def owned(self, suites: Mapping[str, list[str]], by_name: bool = True) -> dict[str, str]:
        """Task -> the expert in whose suite it is.

        by_name: an expert without a suite of its name has the task of its name.
        """
        own = {e: suites.get(e, [e] if by_name else []) for e in self.experts}
        return {task: e for e, tasks in own.items() for task in tasks if task in self.tasks}

    def headless(
        self,
        section: str,
        suites: Mapping[str, list[str]],
        place: Callable[[str], Sequence[Any]],
        among: str = "data",
    ) -> Iterator[Problem]:
        """What is wrong with suites where each task is measured with the head of its own expert.

        section: that has the suites. place: where it names a task; among: what these are called.
        """
        for expert, tasks in suites.items():
            if expert not in self.experts:
                hint = did_you_mean(expert, self.experts)
                yield [section, "suites", expert], f"'{expert}' is no expert{hint}"
            for i, task in enumerate(tasks):
                if task not in self.tasks:
                    hint = did_you_mean(task, self.tasks)
                    yield [section, "suites", expert, i], f"'{task}' is not among the {among}{hint}"
        for task in self.tasks:
            if task not in self.owners:
                yield (
                    [section, *place(task)],
                    f"'{task}' is no expert's, so there is no head for it; name it in suites",
                )

    def recipe(self, merge: str, build: Path, heads: Sequence[str]) -> dict[str, Any]:
        """The recipe of a merge of the checkpoints in `build`, but for its `params` and statistics.

        heads: names of tensors that are each expert's own.
        """
        own = self.all_merges[merge]
        return {
            "method": own.method,
            "base": _place(build, own.base or self.base),
            "experts": self.places_of(merge, build),
            "dtype": own.dtype,
            "seed": self.seed,
            "heads": heads,
            **own.in_recipe,
        }

    @cached_property
    def sources(self) -> dict[str, str]:
        """Checkpoint name -> path or URI."""
        return self.checkpoints.all

    @cached_property
    def all_merges(self) -> dict[str, Merge]:
        """Merges, then merges of merges: each after those that it takes."""
        return {**self.merges, **self.merges_of_merges}

    @property
    def learns(self) -> bool:
        """Whether any merge looks at examples."""
        return bool(self.statistics) or any(merge.is_learned for merge in self.merges.values())

    def looks(self, merge: str) -> bool:
        """Whether a merge, or one that it takes, looks at examples."""
        own = self.all_merges[merge]
        return own.is_learned or bool(self.kinds_of(merge)) or any(map(self.looks, own.takes))

    def experts_of(self, merge: str) -> list[str]:
        """What a merge merges, in its order: experts, and `merge:NAME`."""
        own = self.all_merges[merge].experts
        return self.experts if own is None else own

    def made_of(self, merge: str) -> list[str]:
        """The experts that a merge is made of, by itself or through merges that it takes; each once."""
        found: dict[str, None] = {}
        for expert in [*self.experts_of(merge), self.all_merges[merge].base or ""]:
            if expert.startswith(OF_MERGE):
                found |= dict.fromkeys(self.made_of(expert.removeprefix(OF_MERGE)))
            elif expert in self.experts:
                found[expert] = None
        return list(found)

    def places_of(self, merge: str, build: Path) -> dict[str, Path]:
        """Where what a merge merges lies in `build`, in its order; results of merges go by the merge's name."""
        return {e.removeprefix(OF_MERGE): _place(build, e) for e in self.experts_of(merge)}

    def kinds_of(self, merge: str) -> list[str]:
        """The kinds of statistics that a merge reads, at any point of its grid."""
        if self.all_merges[merge].is_learned:
            return []
        settings = ((get_method(id), params) for id, params in self.settings_of(merge))
        return sorted({k for method, params in settings for k in method.kinds(method.resolve(params))})

    def settings_of(self, merge: str) -> Iterator[Setting]:
        """Every setting of a grid; of a search with a budget one for each that may need something else."""
        own = self.all_merges[merge]
        if own.within:
            for branch in own.branches:
                yield from branch.settings(len(self.experts_of(merge)))
        else:
            yield from (Setting(own.method, point) for point in own.points)

    def takes(self, merge: str, setting: Setting) -> bool:
        """Whether a setting that a search proposes is one that its method takes."""
        return not any(self._setting_problems(merge, self.all_merges[merge], setting, []))

    def problems(self) -> Iterator[Problem]:
        """What the types cannot say."""
        try:
            check_device_name(self.device)
        except UserError as error:
            yield ["device"], str(error)
        try:
            place_of(self.executor or "dask")
        except UserError as error:
            yield ["executor"], str(error)
        yield from self.checkpoints.problems("checkpoints")
        yield from self._family_problems()
        for kind, statistics in self.statistics.items():
            yield from ((["statistics", kind, *loc], wrong) for loc, wrong in statistics.problems(kind))
        for name, merge in self.merges.items():
            yield from ((["merges", *loc], wrong) for loc, wrong in self._merge_problems(name, merge))
        for name in self.merges_of_merges.keys() & self.merges.keys():
            yield ["merges_of_merges", name], f"'{name}' is among the merges, too; choose another name"
        for name, merge in self.merges_of_merges.items():
            yield from (
                (["merges_of_merges", *loc], wrong) for loc, wrong in self._chain_problems(name, merge)
            )

    def _family_problems(self) -> Iterator[Problem]:
        places: list[tuple[list[Any], str]] = [(["base"], self.base)]
        places += [(["experts", i], expert) for i, expert in enumerate(self.experts)]
        for loc, name in places:
            if name not in self.sources:
                yield loc, f"'{name}' is not among the checkpoints{did_you_mean(name, self.sources)}"
        if len(set(self.experts)) != len(self.experts) or self.base in self.experts:
            yield ["experts"], "an expert is listed twice, or is the base"

    def _merge_problems(self, name: str, merge: Merge) -> Iterator[Problem]:
        """What is wrong with one merge; places are seen from its section."""
        if name == "baselines":
            yield [name], "'baselines' names the base and the experts; choose another name"
        named: list[tuple[list[Any], str]] = [([name, "base"], merge.base)] if merge.base is not None else []
        named += [([name, "experts", i], expert) for i, expert in enumerate(merge.experts or ())]
        for place, one in named:
            if one.startswith(OF_MERGE):
                if name not in self.merges_of_merges:
                    yield (
                        place,
                        f"{one}: results of merges are taken by merges_of_merges; move '{name}' there",
                    )
            elif place[1] == "base":
                yield place, f"'{one}' is no result of a merge (merge:NAME); the base is that of the pipeline"
            elif one not in self.experts:
                yield place, f"'{one}' is not among the experts{did_you_mean(one, self.experts)}"
        if len(set(merge.experts or ())) != len(merge.experts or ()):
            yield [name, "experts"], "an expert is listed twice"
        own = [*(e.removeprefix(OF_MERGE) for e in merge.experts or self.experts), "base"]
        for pattern, origin in merge.keep.items():
            if origin not in own:
                hint = did_you_mean(origin, own)
                yield [name, "keep", pattern], f"'{origin}' is none of its experts, nor base{hint}"
        try:
            method = any_method(merge.method)
        except UserError as error:
            yield [name, "method"], str(error)
            return
        learned = isinstance(method, LearnedMethod)
        if learned and merge.takes:
            yield (
                [name, "method"],
                f"{merge.method} is fitted to examples, which merges of merges are not; choose another",
            )
        if learned and merge.requantise:
            yield (
                [name, "requantise"],
                f"{merge.method} is fitted to models of floats, and so is what it gives; leave requantise out",
            )
        for key in ("examples", "images", "split"):
            if key in merge.model_fields_set and not learned:
                yield [name, key], f"{merge.method} is fitted to no examples; leave '{key}' out"
        if merge.examples and merge.images:
            yield [name, "images"], "images are the examples; say one of the two"
        if merge.within:
            yield from self._search_problems(name, merge, merge.within)
            return
        for key in merge.grid:
            if key in merge.params:
                yield (
                    [name, "search", key],
                    f"'{key}' is fixed in params and listed in search; keep one",
                )
        if problem := too_many_points(merge.grid):
            yield [name, "search"], problem
            return
        alone = [(["search", key], {key: value}) for key, values in merge.grid.items() for value in values]
        for where, values in [(["params"], {}), *alone]:
            yield from self._setting_problems(
                name, merge, Setting(merge.method, {**merge.params, **values}), where
            )

    def _setting_problems(
        self, name: str, merge: Merge, setting: Setting, where: list[Any]
    ) -> Iterator[Problem]:
        """What is wrong with one setting of a merge; `where` it stands, seen from the merge."""
        method = any_method(setting.method)
        try:
            resolved = method.resolve(setting.params)
        except UserError as error:
            yield [name, *where], str(error)
            return
        if isinstance(method, LearnedMethod):
            return
        kinds = method.kinds(resolved)
        if kinds and merge.takes:
            yield (
                [name, *where],
                f"{setting.method} needs statistics, which merges have none of; choose another",
            )
            return
        yield from (([name, *where], wrong) for wrong in self._lacking(setting.method, kinds))
        given = dict.fromkeys(kinds)
        for misuse in method.misuses(resolved, len(self.experts_of(name)), True, given):
            yield [name, *(["experts"] if merge.experts is not None else where)], misuse

    def _search_problems(self, name: str, merge: Merge, search: Search) -> Iterator[Problem]:
        """What is wrong with a search with a budget."""
        if search.methods and merge.params:
            yield [name, "params"], "several methods have params each; say them there"
        for i, branch in enumerate(merge.branches):
            place: list[Any] = ["search", "methods", i] if search.methods else ["search"]
            yield from self._branch_problems(name, merge, branch, place)
        if search.sampler == "map":
            yield from (
                ([name, "search", *where], wrong) for where, wrong in self._map_problems(name, search)
            )
        if search.sampler != "cmaes":
            return
        [branch, *others] = merge.branches
        unordered = [key for key, entry in branch.space.items() if not is_ordered(entry)]
        if others or unordered:
            wrong = "several methods" if others else f"'{unordered[0]}', which is no ascending numbers"
            yield [name, "search", "sampler"], f"cmaes proposes numbers alone, not {wrong}; choose tpe"
        elif numbers(branch.space, len(self.experts_of(name))) < 2:
            yield [name, "search", "sampler"], "cmaes needs two parameters or more; choose tpe"

    def _map_problems(self, name: str, search: Search) -> Iterator[Problem]:
        """What a search by MAP cannot be fitted to."""
        if search.methods:
            yield (
                ["sampler"],
                "map fits quadratics to the numbers of one method, not of several; choose nsga2",
            )
            return
        for key, entry in search.space.items():
            if not isinstance(entry.each if isinstance(entry, Each) else entry, Range):
                yield ["space", key], "map fits quadratics to numbers of ranges {low, high}; choose nsga2"
                return
        if search.budget.points is None:
            yield ["budget"], "map divides a number of points; write one, such as 60"
            return
        from mergeline.merging.algebra import surrogate

        varied = numbers(search.space, len(self.experts_of(name)))
        least = surrogate.enough(varied)
        if search.budget.points <= least:
            yield (
                ["budget"],
                f"map fits the {surrogate.count(varied)} coefficients of a quadratic in {varied} numbers to {least} "
                f"points, and then measures its front; give {least + 1} points or more, or vary fewer numbers",
            )

    def _branch_problems(
        self, name: str, merge: Merge, branch: Branch, place: list[Any]
    ) -> Iterator[Problem]:
        """What is wrong with one method of a search with a budget; `place` is seen from the merge."""
        try:
            learned = isinstance(any_method(branch.method), LearnedMethod)
        except UserError as error:
            yield [name, *place, "method"], str(error)
            return
        if learned:
            wrong = "is fitted to examples at every point before any is scored; list its points as a grid"
            yield [name, *place], f"{branch.method} {wrong}"
            return
        experts = len(self.experts_of(name))
        for key in branch.space.keys() & branch.params.keys():
            yield [name, *place, "space", key], f"'{key}' is fixed in params and varied in space; keep one"
        at = {key: edges(entry, experts) for key, entry in branch.space.items()}
        named = {key: values for key, values in at.items() if not is_ordered(branch.space[key])}
        if problem := too_many_points(named):
            yield [name, *place, "space"], problem
            return
        if not branch.space:
            yield from self._setting_problems(name, merge, Setting(branch.method, branch.params), place)
        for key, values in at.items():
            settings = [Setting(branch.method, {**branch.params, key: value}) for value in values]
            where = [*place, "space", key]
            found = [[*self._setting_problems(name, merge, setting, where)] for setting in settings]
            # Weights of no expert at all may be wrong where others are not.
            if all(found) or not isinstance(branch.space[key], Each):
                yield from (problem for problems in found for problem in problems)
        for j, point in enumerate(branch.first_points):
            spot = [name, *place, "first", *([j] if isinstance(branch.first, list) else [])]
            for key, value in point.items():
                if key not in branch.space:
                    yield [*spot, key], f"'{key}' is not in the space{did_you_mean(key, branch.space)}"
                elif not holds(branch.space[key], value, experts):
                    yield [*spot, key], f"'{key}' is {value}, which is not in its space"

    def _chain_problems(self, name: str, merge: Merge) -> Iterator[Problem]:
        """What is wrong with one merge of merges; places are seen from its section."""
        if not merge.takes:
            yield [name], f"'{name}' takes the result of no merge (merge:NAME); move it to merges"
        for one in merge.takes:
            place: list[Any] = [name, "base"]
            if f"{OF_MERGE}{one}" in (merge.experts or ()):
                place = [name, "experts", (merge.experts or []).index(f"{OF_MERGE}{one}")]
            if one in self.merges_of_merges:
                yield (
                    place,
                    f"merge:{one}: is a merge of merges itself; only results of `merges` can be taken",
                )
            elif one not in self.merges:
                yield place, f"merge:{one}: no merge has this name{did_you_mean(one, self.merges)}"
            elif one in (merge.experts or ()):
                yield place, f"merge:{one}: an expert that it merges has that name, too; rename the merge"
            else:
                for method in dict.fromkeys(branch.method for branch in self.merges[one].branches):
                    if unplain := _no_checkpoint(method):
                        yield place, f"merge:{one}: {method} {unplain}"
        yield from self._merge_problems(name, merge)

    def _lacking(self, method: str, kinds: list[str]) -> Iterator[str]:
        """A sentence for each kind of statistics that a method reads and that is not collected, with what mends it."""
        for kind in kinds:
            if kind not in KINDS:
                yield (
                    f"{method} needs the statistics '{kind}', which are not collected from examples; merge by a "
                    "recipe that names their file"
                )
            elif kind not in self.statistics:
                yield (
                    f"{method} needs the statistics '{kind}' of examples; add `{kind}: {{examples: 32}}` to the "
                    "section `statistics:`"
                )


def _with_first_method(data: Any) -> Any:
    """A merge that searches among methods, with the first of them as its own (raises ValueError: it names another)."""
    search = data.get("search") if isinstance(data, dict) else None
    methods = search.get("methods") if isinstance(search, dict) else None
    if not isinstance(methods, list) or not methods or not isinstance(methods[0], dict):
        return data
    if "method" in data:
        raise ValueError("name one method, or several under search; not both")
    first = methods[0].get("method")
    return {**data, "method": unfolded(first, {})[0]} if isinstance(first, str) else data


def _no_checkpoint(method: str) -> str:
    """Why the result of a method is no checkpoint that can be merged; "" where it is one."""
    try:
        found = any_method(method)
    except UserError:
        return ""  # which is a problem of its own
    if isinstance(found, LearnedMethod):
        needs_more = found.task_known or found.routed
    else:
        needs_more = found.store is not None
    return "makes no model of one set of weights, which alone can be merged" if needs_more else ""


def _place(build: Path, name: str) -> Path:
    """Where a checkpoint of the pipeline, or the result of a merge (merge:NAME), lies."""
    if name.startswith(OF_MERGE):
        return build / "merges" / name.removeprefix(OF_MERGE)
    return build / "checkpoints" / name
