"""mergekit's YAML configurations (github.com/arcee-ai/mergekit, 0.1.5) read as recipes.

Its parameters are settings: a number, a list of numbers over the depth, or a list of {filter, value}, of which the
first whose filter is in the tensor's name counts; of the whole configuration, a slice or a model, of which the last
that says something counts. They become parameters of the recipe and rules; slices become the parts of a stack. What
mergekit reads and does not use is named in the recipe's notes. Results are rounded once: mergekit rounds every step to
`dtype`, here it is the dtype that is written, unless `out_dtype` says so.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Callable, Iterator, Literal, Mapping, Sequence

from pydantic import BaseModel, ConfigDict

from mergeline.merging.checkpoints.chat_templates import NAMED, most_common
from mergeline.merging.checkpoints.checkpoint import open_checkpoint
from mergeline.merging.checkpoints.quantised.formats import dequantised
from mergeline.merging.errors import UserError, did_you_mean
from mergeline.merging.recipes import mergekit_modules
from mergeline.merging.strict_yaml import YamlFile

Loc = list[Any]
Settings = Mapping[str, Any]
_REQUIRED = object()
_WHOLE = "default"  # the one module of models that have no others
_NUMBERED = re.compile(r"(?:^|\.)\d+(?:\.|$)")
_OF_LAYER = re.compile(r"(?:^|\.)(?:layers|blocks|block|h)\.(\d+)(\.|$)")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class _Model(_Strict):
    model: str | dict[str, Any]
    parameters: dict[str, Any] | None = None


class _Source(_Model):
    layer_range: tuple[int, int]


class _Slice(_Strict):
    sources: list[_Source]
    base_model: str | dict[str, Any] | None = None
    residual_weight: float | None = None
    parameters: dict[str, Any] | None = None


class _Module(_Strict):
    models: list[_Model] | None = None
    slices: list[_Slice] | None = None
    parameters: dict[str, Any] | None = None


class _Token(_Strict):
    source: str | dict[str, Any] | None = None
    force: bool = False


class _Tokenizer(_Strict):
    source: str | dict[str, Any] = "union"
    tokens: dict[str, _Token] | None = None
    pad_to_multiple_of: int | None = None


class _Configuration(_Strict):
    name: str | None = None
    merge_method: str
    base_model: str | dict[str, Any] | None = None
    models: list[_Model] | None = None
    slices: list[_Slice] | None = None
    modules: dict[str, _Module] | None = None
    parameters: dict[str, Any] | None = None
    dtype: str | None = None
    out_dtype: str | None = None
    tokenizer_source: str | dict[str, Any] | None = None
    tokenizer: _Tokenizer | None = None
    chat_template: str | None = None


# ---------------------------------------------------------------------------------------------- methods


@dataclass(frozen=True)
class _Parameter:
    """What one of mergekit's parameters is called here.

    of: `merge`: one value; `expert`: one for each, in a list; `only`: the only model's. plain: no filters, no lists.
    """

    ours: str | None = None  # None: it changes no result, or `finish` reads it
    default: Any = None
    of: Literal["merge", "expert", "only"] = "merge"
    convert: Callable[[Any], Any] = lambda value: value
    plain: bool = False


@dataclass(frozen=True)
class _Method:
    """A method of mergekit's.

    inputs: `experts` beside a base; `all`, with the base among them; `base_first`. base: whether it must have one.
    """

    id: str
    inputs: Literal["experts", "all", "base_first"]
    parameters: dict[str, _Parameter] = field(default_factory=dict)
    params: dict[str, Any] = field(default_factory=dict)  # that it always has here
    finish: Callable[[dict[str, Any]], dict[str, Any]] = lambda plain: {}  # of plain parameters
    base: bool = True


_WEIGHT = _Parameter("weights", _REQUIRED, "expert")
_DENSITY = _Parameter("density", 1.0, "expert")
_MERGEKIT = {"variant": "mergekit"}


def _arithmetic(normalize: bool, rescale: _Parameter, **more: _Parameter) -> dict[str, _Parameter]:
    return {
        "weight": _WEIGHT,
        "lambda": _Parameter("scale", 1.0),
        "normalize": _Parameter("normalize", normalize),
        "rescale": rescale,
        **more,
    }


_NO_RESCALE, _RESCALE = _Parameter("rescale", False), _Parameter("rescale", True)
_DARE = {"density": _Parameter("drop_rate", 0.0, "expert", lambda density: 1 - density)}
_DELLA = {"density": _DENSITY, "epsilon": _Parameter("epsilon", 0.15, "expert")}
_CRUMBS = {"density": _DENSITY, "gamma": _Parameter("outlier_rate", 0.01, "expert")}
_RAM = {"epsilon": _Parameter("threshold", 1e-5)}


def _nuslerp_scope(plain: dict[str, Any]) -> dict[str, Any]:
    if plain["nuslerp_flatten"]:
        return {"scope": "tensor"}
    return {"scope": "column" if plain["nuslerp_row_wise"] else "row"}  # its rows are dimension 0


METHODS = {
    "linear": _Method(
        "linear", "all", {"weight": _WEIGHT, "normalize": _Parameter("normalize", True)}, base=False
    ),
    "slerp": _Method("slerp", "base_first", {"t": _Parameter("t", _REQUIRED)}),
    "nuslerp": _Method(
        "nuslerp", "experts",
        {"weight": _WEIGHT, "nuslerp_flatten": _Parameter(default=True, plain=True),
         "nuslerp_row_wise": _Parameter(default=False, plain=True)},
        finish=_nuslerp_scope, base=False,
    ),
    "multislerp": _Method(
        "multislerp", "experts",
        {"weight": _WEIGHT, "normalize_weights": _Parameter("normalize", True), "eps": _Parameter("epsilon", 1e-8)},
        base=False,
    ),
    "karcher": _Method(
        "karcher", "all", {"max_iter": _Parameter("iterations", 10), "tol": _Parameter("tolerance", 1e-5)},
        base=False,
    ),
    "task_arithmetic": _Method(
        "task_arithmetic", "experts", _arithmetic(False, _Parameter(), density=_Parameter(of="expert"))
    ),
    "ties": _Method("ties", "experts", _arithmetic(True, _NO_RESCALE, density=_DENSITY), _MERGEKIT),
    "dare_linear": _Method("dare", "experts", _arithmetic(False, _RESCALE, **_DARE), _MERGEKIT),
    "dare_ties": _Method(
        "dare", "experts", _arithmetic(False, _RESCALE, **_DARE),
        {**_MERGEKIT, "inner": "ties", "inner_variant": "mergekit", "density": 1.0},
    ),
    "della": _Method("della", "experts", _arithmetic(True, _RESCALE, **_DELLA), _MERGEKIT),
    "della_linear": _Method(
        "della", "experts", _arithmetic(False, _RESCALE, **_DELLA), {**_MERGEKIT, "elect": False}
    ),
    "breadcrumbs": _Method(
        "breadcrumbs", "experts", _arithmetic(False, _NO_RESCALE, **_CRUMBS), {**_MERGEKIT, "scope": "tensor"}
    ),
    "breadcrumbs_ties": _Method(
        "breadcrumbs", "experts", _arithmetic(False, _NO_RESCALE, **_CRUMBS),
        {**_MERGEKIT, "scope": "tensor", "elect": True},
    ),
    "sce": _Method("sce", "experts", {"select_topk": _Parameter("density", 1.0)}),
    "model_stock": _Method(
        "model_stock", "experts", {"filter_wise": _Parameter(default=False, plain=True)},
        finish=lambda plain: {"scope": "row" if plain["filter_wise"] else "tensor"},
    ),
    "nearswap": _Method("nearswap", "experts", {"t": _Parameter("threshold", _REQUIRED)}),
    "arcee_fusion": _Method("arcee_fusion", "experts"),
    "passthrough": _Method("passthrough", "all", {"scale": _Parameter("scale", 1.0, "only")}, base=False),
    "ram": _Method("ram", "experts", _RAM, {"variant": "ram"}),
    "ramplus_tl": _Method(
        "ram", "experts",
        {**_RAM, "r": _Parameter("rescale_factor", 0.1), "alpha": _Parameter("rescale_cap", 0.2)},
        {"variant": "ram_plus"},
    ),
}  # fmt: skip
# The same of modules that take different models: of each tensor one has all the weight.
_PASSTHROUGH_BY_MODULES = _Method(
    "linear", "all", {"scale": _Parameter("weights", 1.0, "expert")}, {"normalize": False}, base=False
)
# Where a weight of 0 leaves a model out.
_LEAVES_OUT = (
    "linear", "task_arithmetic", "ties", "dare_linear", "dare_ties", "della", "della_linear", "breadcrumbs",
    "breadcrumbs_ties", "passthrough",
)  # fmt: skip
# What mergekit takes anywhere, and uses in some methods alone; the last is of versions before 0.1.
_ALL_PARAMETERS = {name for method in METHODS.values() for name in method.parameters} | {
    "int8_mask",
    "rescale_norm",
}


# ---------------------------------------------------------------------------------------------- translation


def is_mergekit(data: Any) -> bool:
    """Whether this is a configuration of mergekit's, and no recipe."""
    return isinstance(data, dict) and "merge_method" in data


def of_another_command(data: Any) -> str | None:
    """What a file for another of mergekit's commands is, and what to do; None for any other."""
    if not isinstance(data, dict):
        return None
    if isinstance(data.get("experts"), list) and "base_model" in data:
        return (
            "is for mergekit-moe, which makes a mixture of experts out of dense models: `mergeline moe` does that; to "
            "merge the same models write merge_method and models"
        )
    if "genome" in data:
        return "is for mergekit-evolve, which searches for parameters: name them in `search` of a params.yaml"
    if "layer_slices" in data:
        return (
            "is for bakllama, an earlier command of mergekit's: write its layers as slices, with merge_method"
        )
    return None


def translated(
    file: YamlFile, bring: Callable[[str], Path], merges: Mapping[str, Path] | None = None
) -> tuple[dict[str, Any], Callable[[Sequence[Any]], Loc], list[str]]:
    """The recipe as a mapping, with paths or URIs as text; where in the file a part of it is blamed; and whose results
    it takes.

    bring: makes a URI, or a path, that of a checkpoint on this machine; it is asked where modules differ.
    merges: other merges, by the names under which their results are models here -> where these lie.

    Raises:
        UserError: with file and line, for what is wrong, or is not supported.
    """
    translation = _Translation(file, bring, merges or {})
    written, blamed = translation.recipe()
    return written, blamed, list(dict.fromkeys(translation.taken))


@dataclass(frozen=True)
class _Group:
    """Tensors that are merged of the same models, with settings of their own: all of them, or those of a slice.

    models: key -> where it stands and its own settings, in the order in which they are merged; base: key.
    ranges: key -> first layer, and the one after the last; of no model: all layers. first: which layer the first one
    becomes. module: whose slice it is, where there are several. prefix: how the names of the tensors begin, where not
    all are of it.
    """

    shared: list[tuple[Loc, Settings]]  # of the configuration first
    models: dict[str, tuple[Loc, Settings]]
    base: str | None
    ranges: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    first: int = 0
    module: str = _WHOLE
    prefix: str = ""

    @property
    def layers(self) -> int | None:
        """How many of each model; None: all."""
        return next((stop - start for start, stop in self.ranges.values()), None)


@dataclass(frozen=True)
class _Run:
    """A slice, where it stands, what is set for all of its module, and which layer of that its first one becomes."""

    loc: Loc
    slice: _Slice
    shared: list[tuple[Loc, Settings]]
    first: int
    module: str


class _Translation:
    def __init__(self, file: YamlFile, bring: Callable[[str], Path], merges: Mapping[str, Path]):
        self.file, self.bring, self.merges = file, bring, merges
        self.taken: list[str] = []
        self.notes: list[str] = []
        self.config = file.parse(_Configuration)
        self.inside: Loc = []  # where models and slices stand
        self.part: _Configuration | _Module = self.config
        self.modules = dict(self.config.modules or {})  # that differ
        if self.modules and (list(self.modules) == [_WHOLE] or self._are_alike()):
            name, self.part = next(iter(self.modules.items()))
            self.inside, self.modules = ["modules", name], {}
        self.slices = list(self._runs(_WHOLE, self.inside, self.part))
        for name, module in self.modules.items():
            self.slices += self._runs(name, ["modules", name], module)
        if self.config.merge_method not in METHODS:
            near = did_you_mean(self.config.merge_method, METHODS)
            raise file.error(["merge_method"], f"unknown merge_method '{self.config.merge_method}'{near}")
        self.method = METHODS[self.config.merge_method]
        self.blame: dict[str, Loc] = {}

    def recipe(self) -> tuple[dict[str, Any], Callable[[Sequence[Any]], Loc]]:
        config = self.config
        self._refuse_unsupported()
        if self.slices:
            groups = [self._group(run) for run in self.slices] + list(self._modules_without_slices())
        else:
            groups = self._groups_of_modules() or [self._whole(self.inside, self.part)]
        method = self.method
        self.base = self._base(groups)
        self.names = self._names(groups)
        written: dict[str, Any] = {"method": method.id}
        self.onto: dict[str, str] = {}
        written["experts"] = {
            name: self._path(key, name) for key, name in self.names.items() if name != "base"
        }
        if self.base is not None:
            written["base"] = self._path(self.base, "base")
        written["onto"] = self.onto
        plain = {name: self._plain(name) for name, p in method.parameters.items() if p.plain}
        written["params"] = {**method.params, **method.finish(plain)}
        if self.slices:
            written["stack"] = self._stack(groups)
        elif self.modules:
            found = self._by_modules(dict(zip(self.modules, groups)))
            written |= {**found, "params": written["params"] | found["params"]}
        else:
            params, written["rules"] = self._settings(groups[0])
            written["params"] |= params
        self.blame["dtype"] = ["out_dtype" if config.out_dtype else "dtype"]
        written |= {"dtype": (config.out_dtype or config.dtype or "widest").removeprefix("torch.")}
        written |= self._tokenizer(written)
        written["notes"] = list(dict.fromkeys(self.notes))
        return written, lambda loc: self.blame.get(str(loc[-1]), ["merge_method"])

    def _refuse_unsupported(self) -> None:
        config = self.config
        given = [key for key in ("models", "slices", "modules") if getattr(config, key)]
        if len(given) != 1:
            raise self.file.error(given[-1:], "give exactly one of models, slices and modules")
        for name, module in (config.modules or {}).items():
            if bool(module.models) == bool(module.slices):
                raise self.file.error(["modules", name], "give either models or slices")
        if config.name is not None and not self.merges:
            self.notes.append(f"name: {config.name} is for mergekit-multi, and changes nothing here")
        self._look_at_names(["parameters"], config.parameters, None)
        for name, module in (config.modules or {}).items():
            self._look_at_names(["modules", name, "parameters"], module.parameters, None)

    def _are_alike(self) -> bool:
        """Whether all modules are merged in one way, which is what mergekit makes of `models`."""
        first, *others = self.modules.values()
        alike = bool(others) and all(module == first for module in others) and first.models is not None
        if alike:
            self.notes.append(
                "modules are all alike: all tensors are merged so, those of modules not named here, too"
            )
        return alike

    def _look_at_names(self, loc: Loc, settings: Settings | None, model: str | None) -> None:
        """Refuse what is no parameter of any method; note what this one, or a model, does not use."""
        for name in settings or {}:
            if name not in _ALL_PARAMETERS:
                near = did_you_mean(name, list(self.method.parameters))
                raise self.file.error(
                    [*loc, name], f"{self.config.merge_method} has no parameter '{name}'{near}"
                )
            parameter = self.method.parameters.get(name)
            if name == "int8_mask":  # saves mergekit memory
                continue
            if parameter is None or parameter == _Parameter():
                self.notes.append(
                    f"mergekit's {self.config.merge_method} does not use '{name}': it is ignored"
                )
            elif model is not None and parameter.of == "merge":
                self.notes.append(f"'{name}' is one for the whole merge: mergekit ignores that of {model}")

    # ------------------------------------------------------------------------------------------ models

    def _whole(self, inside: Loc, part: _Configuration | _Module) -> _Group:
        """All tensors of all models of a part; a base that is not among them is added, as mergekit does."""
        config = self.config
        base = None if config.base_model is None else _key(self.file, ["base_model"], config.base_model)
        models = self._listed([*inside, "models"], part.models or [])
        if base is not None and base not in models:
            models[base] = (["base_model"], {})
        return self._ordered(self._shared(inside, part), ["merge_method"], models, base)

    def _shared(self, inside: Loc, part: _Configuration | _Module) -> list[tuple[Loc, Settings]]:
        """What is set for all tensors of a part: for the whole configuration, then for the module."""
        found: list[tuple[Loc, Settings]] = [(["parameters"], self.config.parameters or {})]
        if inside:
            found.append(([*inside, "parameters"], part.parameters or {}))
        return found

    def _groups_of_modules(self) -> list[_Group]:
        """What each of the modules that differ is merged of: all models, those that it does not name without weight."""
        groups = {name: self._whole(["modules", name], module) for name, module in self.modules.items()}
        every = dict.fromkeys(key for group in groups.values() for key in group.models)
        named = self.config.merge_method
        if named == "passthrough" and len(every) > 1:
            self.method = _PASSTHROUGH_BY_MODULES
        weight = next((n for n, p in self.method.parameters.items() if p.ours == "weights"), "")
        found = []
        for name, group in groups.items():
            lacking = [key for key in every if key not in group.models]
            if named == "passthrough" and len(group.models) > 1:
                raise self.file.error(["modules", name], "passthrough takes one model a module")
            if lacking and named not in _LEAVES_OUT:
                raise self.file.error(
                    ["modules", name],
                    f"{named} has no weights by which a model is left out, so every module needs the same ones: add "
                    f"{lacking[0]}, or merge the modules one by one",
                )
            absent: tuple[Loc, Settings] = (["modules", name], {weight: 0.0})
            found.append(replace(group, models={key: group.models.get(key, absent) for key in every}))
        return found

    def _by_modules(self, groups: Mapping[str, _Group]) -> dict[str, Any]:
        """Parameters, rules and what is merged at all, of modules that differ; whose tensors are whose a model says."""
        tensors, beginnings = self._beginnings()
        places = [(prefix, groups[name]) for name, begin in beginnings.items() for prefix in begin]
        found: dict[str, Any] = {"params": {}, "rules": []}
        for prefix, group in sorted(places, key=lambda place: len(place[0])):
            params, rules = self._settings(replace(group, prefix=prefix))
            found["params"] = params | found["params"]
            found["rules"] += [{"match": mergekit_modules.patterns(prefix), "params": params}, *rules]
        rest = [name for name in tensors if not name.startswith(tuple(prefix for prefix, _ in places))]
        if rest:
            left = f"{len(rest)} tensors are of no module that is named, '{rest[0]}' first"
            if self.base is None:
                mend = "name their modules, too; mergekit leaves them out"
                raise self.file.error(["modules"], f"{left}, and there is no base to take them from: {mend}")
            self.notes.append(f"{left}: they stay the base's; mergekit leaves them out")
            found["include"] = [p for prefix, _ in places for p in mergekit_modules.patterns(prefix)]
        return found

    def _beginnings(self) -> tuple[list[str], dict[str, list[str]]]:
        """The names of a model's tensors, and how those of each module begin (raises UserError)."""
        model = self.base or next(iter(self.names))
        tensors, found = self._tensors(model), {}
        for name in self.modules:
            found[name] = mergekit_modules.prefixes(name, tensors)
            if not found[name]:
                near = did_you_mean(name, mergekit_modules.NAMED)
                raise self.file.error(
                    ["modules", name], f"no tensor of {model} is of a module '{name}'{near}"
                )
        return tensors, found

    def _tensors(self, model: str) -> list[str]:
        """The names of a model's tensors (raises UserError)."""
        try:
            place = self.bring(self._where(model.partition("+")[0]))
            return list(dequantised(open_checkpoint(place))[0].tensors)
        except UserError as error:
            raise self.file.error(
                ["modules"], f"which tensors are whose is seen from {model}: {error}"
            ) from None

    def _runs(self, name: str, inside: Loc, part: _Configuration | _Module) -> Iterator[_Run]:
        """The slices of a part."""
        first = 0
        for i, slice in enumerate(part.slices or ()):
            yield _Run([*inside, "slices", i], slice, self._shared(inside, part), first, name)
            for start, stop in (source.layer_range for source in slice.sources[:1]):
                first += stop - start

    def _modules_without_slices(self) -> Iterator[_Group]:
        """Modules that are merged layer by layer beside one that has slices."""
        for name, module in self.modules.items():
            if module.models:
                yield replace(self._whole(["modules", name], module), module=name)

    def _group(self, run: _Run) -> _Group:
        """A slice."""
        config, part, loc = self.config, run.slice, run.loc
        if not part.sources:
            raise self.file.error(loc, "a slice needs sources")
        if part.residual_weight is not None:
            self.notes.append("mergekit does not use 'residual_weight': it is ignored")
        own_base = part.base_model is not None
        reference = part.base_model if own_base else config.base_model
        where = [*loc, "base_model"] if own_base else ["base_model"]
        base = None if reference is None else _key(self.file, where, reference)
        self._look_at_names([*loc, "parameters"], part.parameters, None)
        models = self._listed([*loc, "sources"], part.sources)
        if base not in models and base is not None:
            if self.method.inputs != "all":
                raise self.file.error(loc, f"the base_model, {base}, is not among the sources of this slice")
            base = None
        ranges = {}
        for j, source in enumerate(part.sources):
            if not 0 <= source.layer_range[0] < source.layer_range[1]:
                raise self.file.error(
                    [*loc, "sources", j, "layer_range"], "is [FIRST, END]: from 0, and without END itself"
                )
            ranges[_key(self.file, [], source.model)] = source.layer_range
        if len({stop - start for start, stop in ranges.values()}) > 1:
            raise self.file.error(loc, "all sources of a slice must have equally many layers")
        shared = [*run.shared, ([*loc, "parameters"], part.parameters or {})]
        group = self._ordered(shared, loc, models, base)
        return replace(group, ranges=ranges, first=run.first, module=run.module)

    def _listed(self, loc: Loc, inputs: Sequence[_Model]) -> dict[str, tuple[Loc, Settings]]:
        """The models of a list: key -> where it stands, and its settings."""
        found: dict[str, tuple[Loc, Settings]] = {}
        for i, model in enumerate(inputs):
            key = _key(self.file, [*loc, i], model.model)
            if key in found:
                raise self.file.error([*loc, i], f"{key} is there twice")
            self._look_at_names([*loc, i, "parameters"], model.parameters, key)
            found[key] = ([*loc, i], model.parameters or {})
        return found

    def _ordered(
        self,
        shared: list[tuple[Loc, Settings]],
        loc: Loc,
        models: dict[str, tuple[Loc, Settings]],
        base: str | None,
    ) -> _Group:
        """A group whose models stand in the order in which our method takes them."""
        name = self.config.merge_method
        if base is None and self.method.base:
            raise self.file.error(loc, f"{name} needs a base_model")
        if self.method.inputs == "all":
            return _Group(shared, models, None)
        if self.method.inputs == "base_first":
            assert base is not None, "refused without one"
            return _Group(shared, {base: models[base], **models}, None)
        if base is not None:
            for setting in models[base][1]:
                self.notes.append(f"'{setting}' of the base model {base} is ignored, as by mergekit")
        return _Group(shared, {key: found for key, found in models.items() if key != base}, base)

    def _base(self, groups: Sequence[_Group]) -> str | None:
        """The model that is the base of all groups, and of none an expert: the base of the recipe."""
        bases = {group.base for group in groups}
        if len(bases) != 1 or any(key in group.models for key in bases for group in groups):
            return None
        return bases.pop()

    def _names(self, groups: Sequence[_Group]) -> dict[str, str]:
        """What the recipe calls each model: `base`, or the name of an expert."""
        keys = dict.fromkeys(key for group in groups for key in group.models)
        keys |= dict.fromkeys(group.base for group in groups if group.base is not None)
        if self.config.base_model is not None:  # whose configuration is carried
            keys[_key(self.file, ["base_model"], self.config.base_model)] = None
        names: dict[str, str] = {} if self.base is None else {self.base: "base"}
        for key in keys:
            if key in names:
                continue
            stem = re.sub(r"[^\w.-]", "_", key.rstrip("/").rsplit("/")[-1].partition("@")[0]) or "model"
            stem = "base_model" if stem == "base" else stem
            number = 1
            while (name := stem if number == 1 else f"{stem}_{number}") in names.values():
                number += 1
            names[key] = name
        return names

    def _path(self, key: str, name: str) -> str:
        """A local path, or the URI of what the Hugging Face hub has; of an adapter, that of the adapter."""
        model, plus, lora = key.partition("+")
        if plus:
            if self.base is None or model != self.base or name == "base":
                self.onto[name] = self._where(model)
            model = lora
        return self._where(model)

    def _where(self, model: str) -> str:
        if model in self.merges:
            self.taken.append(model)
            return str(self.merges[model].absolute())
        for folder in (self.file.path.parent, Path.cwd()):
            if (folder / model).exists():
                return str(folder / model)
        if "://" not in model and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+(@[\w./-]+)?", model):
            return f"hf://{model}"
        return model

    # ------------------------------------------------------------------------------------------ settings

    def _stack(self, groups: Sequence[_Group]) -> list[dict[str, Any]]:
        """The parts of a stack; those of modules follow the ones whose names begin theirs."""
        if not self.modules:
            return [self._part(group, {}) for group in groups]
        _, beginnings = self._beginnings()
        ordered = sorted(groups, key=lambda group: min(map(len, beginnings[group.module])))
        matched = {
            name: [pattern for prefix in begin for pattern in mergekit_modules.patterns(prefix)]
            for name, begin in beginnings.items()
        }
        return [self._part(group, {"match": matched[group.module]}) for group in ordered]

    def _part(self, group: _Group, of: dict[str, Any]) -> dict[str, Any]:
        """A slice, or a whole module, as a part of a stack."""
        order = [*group.models, *([group.base] if group.base is not None else [])]
        ranges = {key: group.ranges.get(key, (0, 0)) for key in order}
        part = {**of, "layers": {self.names[k]: (first, stop - 1) for k, (first, stop) in ranges.items()}}
        if group.base is not None and group.base != self.base:
            part["base"] = self.names[group.base]
        part["params"], part["rules"] = self._settings(group)
        return part

    def _settings(self, group: _Group) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """What the parameters of a group are to begin with, and the rules that change them."""
        params: dict[str, Any] = {}
        rules: list[dict[str, Any]] = []
        for name, parameter in self.method.parameters.items():
            if parameter.ours is None or parameter.plain:
                continue
            experts: list[str | None] = list(group.models) if parameter.of == "expert" else [None]
            starts = []
            for expert in experts:
                start, *others = self._said(name, group, expert)
                starts.append(start[1][0])
                model = next(iter(group.models)) if parameter.of == "only" else expert
                for said in ([start] if len(start[1]) > 1 else []) + others:
                    rules += self._rules(parameter.ours, group, expert, model, *said)
            params[parameter.ours] = starts if parameter.of == "expert" else starts[0]
        return params, rules

    def _said(self, name: str, group: _Group, expert: str | None) -> list[tuple[str | None, list[Any]]]:
        """Filters and values of one parameter that count, the first for all tensors, later ones over earlier ones."""
        parameter = self.method.parameters[name]
        ours = parameter.ours
        assert ours is not None, "a parameter that changes no result has no rules"
        scopes = [*group.shared]
        if parameter.of == "only":
            expert = next(iter(group.models))
        if expert is not None:
            loc, settings = group.models[expert]
            scopes.append(([*loc, "parameters"], settings))
        said: list[tuple[str | None, list[Any]]] = []
        if parameter.default is not _REQUIRED:
            said.append((None, [parameter.default]))
        for loc, settings in scopes:
            if settings.get(name) is not None:
                self.blame[ours] = [*loc, name]
                for filter, value in self._setting([*loc, name], settings[name]):
                    said.append((filter, [parameter.convert(v) for v in value]))
        last = max((i for i, (filter, _) in enumerate(said) if filter is None), default=None)
        if last is None:
            of = f" of {expert}" if expert else ""
            raise self.file.error(
                self.blame.get(ours, ["merge_method"]),
                f"{self.config.merge_method} needs '{name}'{of} for every tensor: give one without a filter",
            )
        return said[last:]

    def _setting(self, loc: Loc, setting: Any) -> Iterator[tuple[str | None, list[Any]]]:
        """Filters (None: any tensor) and values (several: over the depth), the first that counts last."""
        conditions = [setting] if isinstance(setting, dict) else setting
        if isinstance(conditions, list) and conditions and all(isinstance(c, dict) for c in conditions):
            for i, condition in reversed(list(enumerate(conditions))):
                at = [*loc, i] if isinstance(setting, list) else loc
                odd = [key for key in condition if key not in ("filter", "value")]
                if odd or "value" not in condition:
                    raise self.file.error(
                        [*at, *odd[:1]], "write {value: ..., filter: ...}, or a value alone"
                    )
                filter = condition.get("filter")
                yield (None if filter in (None, "*") else str(filter)), self._values(at, condition["value"])
        else:
            yield None, self._values(loc, setting)

    def _values(self, loc: Loc, value: Any) -> list[Any]:
        values = value if isinstance(value, list) else [value]
        found = [_number(v) for v in values]
        if not found or None in found or len(found) > 1 and any(isinstance(v, bool) for v in found):
            raise self.file.error(loc, f"{value!r} is no number, and no list of numbers over the depth")
        return found

    def _rules(
        self,
        ours: str,
        group: _Group,
        expert: str | None,
        model: str | None,
        filter: str | None,
        values: list[Any],
    ) -> Iterator[dict[str, Any]]:
        """The rule of one filter; over the depth of a single layer mergekit takes the last value, outside the first."""
        everywhere = filter is None and not group.prefix
        filters = [filter]
        if filter is not None and model is not None:  # else it is of the output's names
            filters = [*self._in_output(filter, ours, group, model)]
        match = [p for within in filters for p in mergekit_modules.patterns(group.prefix, within)]
        if not match:
            return
        place = {} if everywhere else {"match": match}
        of = {} if expert is None else {"expert": self.names[expert]}
        rule = {**place, "params": {ours: values[0]}, **of}
        if len(values) > 1 and group.layers == 1:
            yield rule
            yield {**place, "layers": (0, 0), "params": {ours: values[-1]}, **of}
        else:
            yield {**rule, "gradient": {ours: values}} if len(values) > 1 else rule

    def _in_output(self, filter: str, ours: str, group: _Group, model: str) -> list[str]:
        """A filter, which mergekit holds against a model's own names, as filters of the output's names."""
        start, stop = group.ranges.get(model, (group.first, group.first))
        if start == group.first or not _NUMBERED.search(filter):
            return [filter]
        named = _OF_LAYER.search(filter)
        if not named:
            raise self.file.error(
                self.blame[ours],
                f"the filter '{filter}' has a number, and a slice moves layers: write which layer it means, such as "
                "'layers.3.'",
            )
        before, number, rest = filter[: named.start(1)], named[1], filter[named.end() :]
        ends = named[2] == "."  # else it is the beginning of a number
        layers = [n for n in range(start, stop) if (str(n) == number if ends else str(n).startswith(number))]
        return [f"{before}{layer - start + group.first}.{rest}" for layer in layers]

    def _plain(self, name: str) -> Any:
        """The one value of a parameter that nothing may depend on."""
        parameter, loc = self.method.parameters[name], ["parameters", name]
        for run in self.slices:
            if name in (run.slice.parameters or {}):
                raise self.file.error([*run.loc, "parameters", name], f"'{name}' is one for the whole merge")
        for module, own in self.modules.items():
            if name in (own.parameters or {}):
                raise self.file.error(
                    ["modules", module, "parameters", name], f"'{name}' is one for the whole merge"
                )
        value = parameter.default
        for _, settings in self._shared(self.inside, self.part):
            value = settings.get(name, value)
        if not isinstance(value, bool):
            raise self.file.error(loc, f"'{name}' must be true or false for the whole merge")
        return value

    # ------------------------------------------------------------------------------------------ tokenizer

    def _tokenizer(self, written: Mapping[str, Any]) -> dict[str, Any]:
        """Whose configuration and tokenizer are carried, and whose vocabulary the merge has."""
        config = self.config
        base = None if config.base_model is None else _key(self.file, ["base_model"], config.base_model)
        found: dict[str, Any] = {}
        if base is not None and self.names[base] != "base":
            found["donor"] = self.names[base]
        if config.chat_template is not None:
            found["chat_template"] = self._chat_template(config.chat_template)
        loc: Loc = ["tokenizer_source"]
        source: Any = config.tokenizer_source
        if config.tokenizer is not None:
            if source is not None:
                raise self.file.error(["tokenizer"], "give tokenizer or tokenizer_source, not both")
            loc, source = ["tokenizer", "source"], config.tokenizer.source
            found["tokens"] = self._tokens(config.tokenizer.tokens or {})
        if source is None:
            return found
        # mergekit's embeddings have as many rows as tokens, and the base's rows for those that another model lacks.
        found["pad_to_multiple_of"] = (config.tokenizer.pad_to_multiple_of if config.tokenizer else None) or 1
        found["missing_tokens"] = "mean" if base is None else self.names[base]
        if source == "union":
            return {**found, "vocabulary": "union"}
        key = base if source == "base" else _key(self.file, loc, source)
        if key is None and source == "base":
            key = next(iter(self.names))
            self.notes.append(f"tokenizer source: there is no base_model, so it is that of {key}")
        if key not in self.names:
            raise self.file.error(loc, f"the tokenizer of {source} cannot be had: it is none of the models")
        return {**found, "donor": self.names[key]}

    def _tokens(self, tokens: Mapping[str, _Token]) -> dict[str, dict[str, Any]]:
        """Where rows of tokens come from, as the recipe says it."""
        found: dict[str, dict[str, Any]] = {}
        for token, asked in tokens.items():
            loc: Loc = ["tokenizer", "tokens", token]
            source = asked.source
            kind = source.get("kind") if isinstance(source, dict) else None
            if source is None or kind not in (None, "zero", "model_token"):
                raise self.file.error(loc, f"{token!r} needs a source: a model, model_token or zero")
            row: dict[str, Any] = {"force": asked.force}
            if kind == "zero":
                row["zero"] = True
            else:
                model = source.get("model") if isinstance(source, dict) and kind else source
                key = _key(self.file, loc, model or "")
                if key not in self.names:
                    raise self.file.error(
                        loc, f"the row of {token!r} cannot be had: {key} is none of the models"
                    )
                row["expert"] = self.names[key]
            if isinstance(source, dict) and kind == "model_token":
                if (source.get("token") is None) == (source.get("token_id") is None):
                    raise self.file.error(loc, f"{token!r}: give one of token and token_id")
                row |= {"token": source.get("token"), "id": source.get("token_id")}
            found[token] = row
        return found

    def _chat_template(self, given: str) -> str | None:
        """A template's text, of a name, or of most models for `auto`; None if these have none."""
        if given == "auto":
            folders = [Path(self._where(key.partition("+")[0])) for key in self.names]
            if away := [str(folder) for folder in folders if not folder.is_dir()]:
                raise self.file.error(
                    ["chat_template"],
                    f"auto is for models on this machine, and {away[0]} is none; fetch it, or write the template",
                )
            found = most_common(folders)
            if found is None:
                self.notes.append("chat_template: auto finds no template in any of the models")
            return found
        if given in NAMED:
            return NAMED[given]
        if "{" not in given:
            near = did_you_mean(given, NAMED)
            raise self.file.error(["chat_template"], f"{given!r} is no template, and no name of one{near}")
        return given


def _key(file: YamlFile, loc: Loc, model: str | dict[str, Any]) -> str:
    """The text of a model's reference, PATH[@REVISION][+ADAPTER] (raises UserError for another mapping)."""
    if isinstance(model, str):
        if model.count("+") > 1:
            raise file.error(loc, f"{model}: is more than a model and an adapter, MODEL+ADAPTER")
        return model
    known = ("model", "lora", "override_architecture") if "model" in model else ("path", "revision")
    if odd := [key for key in model if key not in known]:
        raise file.error([*loc, odd[0]], f"{odd[0]}: unknown key{did_you_mean(odd[0], known)}")
    if model.get("override_architecture"):
        raise file.error(
            loc, "override_architecture is not supported: tensors are known by their names; leave it out"
        )
    if "model" in model:
        lora = model.get("lora")
        return _key(file, loc, model["model"]) + (f"+{_key(file, loc, lora)}" if lora else "")
    revision = model.get("revision")
    return str(model.get("path", "")) + (f"@{revision}" if revision else "")


def _number(value: Any) -> float | int | bool | None:
    """YAML's 1e-5 is text to some."""
    if isinstance(value, (bool, int, float)):
        return value
    try:
        return float(value)
    except (TypeError, ValueError):
        return None
