"""mergekit's YAML configurations (github.com/arcee-ai/mergekit, 0.1.5) read as recipes.

Its parameters are settings: a number, a list of numbers over the depth, or a list of {filter, value}, of which the
first whose filter is in the tensor's name counts; of the whole configuration, a slice or a model, of which the last
that says something counts. They become parameters of the recipe and rules. Results are rounded once: mergekit rounds
every step to `dtype`, here it is the dtype that is written, unless `out_dtype` says so.
"""

from __future__ import annotations

import glob
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Iterator, Literal, Mapping, Sequence

from pydantic import BaseModel, ConfigDict

from mergeline.merging.checkpoints.companions import read_config
from mergeline.merging.errors import did_you_mean
from mergeline.merging.strict_yaml import YamlFile

Loc = list[Any]
Settings = Mapping[str, Any]
_REQUIRED = object()
# What stands before the first block of a language model, which belongs to the first slice; the rest to the last.
_BEFORE = [
    "model.embed_tokens.weight", "model.language_model.embed_tokens.weight", "model.tok_embeddings.weight",
    "transformer.wte.weight", "transformer.wpe.weight", "transformer.word_embeddings.weight",
    "transformer.embd.wte.weight", "transformer.embedding.word_embeddings.weight", "gpt_neox.embed_in.weight",
    "backbone.embeddings.weight",
]  # fmt: skip


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


class _Configuration(_Strict):
    merge_method: str
    base_model: str | dict[str, Any] | None = None
    models: list[_Model] | None = None
    slices: list[_Slice] | None = None
    modules: dict[str, Any] | None = None
    parameters: dict[str, Any] | None = None
    dtype: str | None = None
    out_dtype: str | None = None
    tokenizer_source: str | None = None
    tokenizer: dict[str, Any] | None = None
    chat_template: str | None = None


# ---------------------------------------------------------------------------------------------- methods


@dataclass(frozen=True)
class _Parameter:
    """What one of mergekit's parameters is called here.

    of: `merge`: one value; `expert`: one for each, in a list; `only`: the only model's. fixed: its only value that is
    known here. plain: neither filters nor lists are.
    """

    ours: str | None = None  # None: it changes no result, or `finish` reads it
    default: Any = None
    of: Literal["merge", "expert", "only"] = "merge"
    convert: Callable[[Any], Any] = lambda value: value
    plain: bool = False
    fixed: bool = False


@dataclass(frozen=True)
class _Method:
    """A method of mergekit's. inputs: `experts` beside a base; `all`, with the base among them; `base_first`."""

    id: str
    inputs: Literal["experts", "all", "base_first"]
    parameters: dict[str, _Parameter] = field(default_factory=dict)
    params: dict[str, Any] = field(default_factory=dict)  # that it always has here
    finish: Callable[[dict[str, Any]], dict[str, Any]] = lambda plain: {}  # of plain parameters


_WEIGHT = _Parameter("weights", _REQUIRED, "expert")
_DENSITY = _Parameter("density", 1.0, "expert")
_MERGEKIT = {"variant": "mergekit"}


def _arithmetic(normalize: bool, rescale: _Parameter, **more: _Parameter) -> dict[str, _Parameter]:
    return {
        "weight": _WEIGHT,
        "lambda": _Parameter("scale", 1.0),
        "normalize": _Parameter("normalize", normalize),
        "rescale": rescale,
        "int8_mask": _Parameter(),
        **more,
    }


_NO_RESCALE = _Parameter(default=False, plain=True, fixed=True)
_RESCALE = _Parameter("rescale", True)
_DARE = {"density": _Parameter("drop_rate", 0.0, "expert", lambda density: 1 - density)}
_DELLA = {"density": _DENSITY, "epsilon": _Parameter("epsilon", 0.15, "expert")}
_CRUMBS = {"density": _DENSITY, "gamma": _Parameter("outlier_rate", 0.01, "expert")}
_RAM = {"epsilon": _Parameter("threshold", 1e-5)}


def _nuslerp_scope(plain: dict[str, Any]) -> dict[str, Any]:
    if plain["nuslerp_flatten"]:
        return {"scope": "tensor"}
    return {"scope": "column" if plain["nuslerp_row_wise"] else "row"}  # its rows are dimension 0


METHODS = {
    "linear": _Method("linear", "all", {"weight": _WEIGHT, "normalize": _Parameter("normalize", True)}),
    "slerp": _Method("slerp", "base_first", {"t": _Parameter("t", _REQUIRED)}),
    "nuslerp": _Method(
        "nuslerp", "experts",
        {"weight": _WEIGHT, "nuslerp_flatten": _Parameter(default=True, plain=True),
         "nuslerp_row_wise": _Parameter(default=False, plain=True)},
        finish=_nuslerp_scope,
    ),
    "multislerp": _Method(
        "multislerp", "experts",
        {"weight": _WEIGHT, "normalize_weights": _Parameter(default=True, plain=True, fixed=True),
         "eps": _Parameter("epsilon", 1e-8)},
    ),
    "karcher": _Method(
        "karcher", "all", {"max_iter": _Parameter("iterations", 10), "tol": _Parameter("tolerance", 1e-5)}
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
    "sce": _Method("sce", "experts", {"select_topk": _Parameter("density", 1.0), "int8_mask": _Parameter()}),
    "model_stock": _Method(
        "model_stock", "experts", {"filter_wise": _Parameter(default=False, plain=True)},
        finish=lambda plain: {"scope": "row" if plain["filter_wise"] else "tensor"},
    ),
    "nearswap": _Method("nearswap", "experts", {"t": _Parameter("threshold", _REQUIRED)}),
    "arcee_fusion": _Method("arcee_fusion", "experts"),
    "passthrough": _Method("passthrough", "all", {"scale": _Parameter("scale", 1.0, "only")}),
    "ram": _Method("ram", "experts", _RAM, {"variant": "ram"}),
    "ramplus_tl": _Method(
        "ram", "experts",
        {**_RAM, "r": _Parameter("rescale_factor", 0.1), "alpha": _Parameter("rescale_cap", 0.2)},
        {"variant": "ram_plus"},
    ),
}  # fmt: skip


# ---------------------------------------------------------------------------------------------- translation


def is_mergekit(data: Any) -> bool:
    """Whether this is a configuration of mergekit's, and no recipe."""
    return isinstance(data, dict) and "merge_method" in data


def translated(file: YamlFile) -> tuple[dict[str, Any], Callable[[Sequence[Any]], Loc]]:
    """The recipe as a mapping, with paths or URIs as text; and where in the file a part of it is blamed.

    Raises:
        UserError: with file and line, for what is wrong, or is not supported.
    """
    return _Translation(file).recipe()


@dataclass(frozen=True)
class _Region:
    """Tensors with settings of their own: a slice's layers, or what stands before (names) and behind all slices."""

    slice: int | None
    layers: tuple[int, int] | None = None
    names: list[str] | None = None


class _Translation:
    def __init__(self, file: YamlFile):
        self.file = file
        self.config = file.parse(_Configuration)
        self.slices: Sequence[_Slice] = self.config.slices or ()
        if self.config.merge_method not in METHODS:
            near = did_you_mean(self.config.merge_method, METHODS)
            raise file.error(["merge_method"], f"unknown merge_method '{self.config.merge_method}'{near}")
        self.method = METHODS[self.config.merge_method]
        self.blame: dict[str, Loc] = {}
        self.rules: list[dict[str, Any]] = []

    def recipe(self) -> tuple[dict[str, Any], Callable[[Sequence[Any]], Loc]]:
        config, method = self.config, self.method
        self._refuse_unsupported()
        self.models = (
            self._models()
        )  # what a model is called in the file -> (where it is among it, its settings)
        experts = self._experts()
        written: dict[str, Any] = {
            "method": method.id,
            "experts": {n: self._path(m) for n, m in experts.items()},
        }
        if method.inputs == "experts" and config.base_model is not None:
            written["base"] = self._path(_key(config.base_model))
        self.experts = experts
        plain = {name: self._plain(name) for name, p in method.parameters.items() if p.plain}
        written["params"] = {**method.params, **method.finish(plain), **self._parameters()}
        written["rules"] = self.rules
        self.blame["dtype"] = ["out_dtype" if config.out_dtype else "dtype"]
        written |= {"dtype": config.out_dtype or config.dtype, **self._tokenizer(written)}
        return written, lambda loc: self.blame.get(str(loc[-1]), ["merge_method"])

    def _refuse_unsupported(self) -> None:
        config = self.config
        given = [key for key in ("models", "slices", "modules") if getattr(config, key)]
        if len(given) != 1:
            raise self.file.error(given[-1:], "give exactly one of models, slices and modules")
        if config.modules:
            raise self.file.error(["modules"], "modules are not supported; write models or slices")
        if config.chat_template is not None:
            raise self.file.error(
                ["chat_template"],
                "chat_template is not supported: the tokenizer's own is carried over; leave it out",
            )
        if config.base_model is None and self.config.merge_method not in (
            "linear", "karcher", "passthrough", "nuslerp", "multislerp"
        ):  # fmt: skip
            raise self.file.error(["merge_method"], f"{config.merge_method} needs a base_model")
        scopes: list[tuple[Loc, Settings | None]] = [(["parameters"], config.parameters)]
        for i, part in enumerate(self.slices):
            scopes.append((["slices", i, "parameters"], part.parameters))
        for loc, settings in scopes:
            self._refuse_unknown(loc, settings, list(self.method.parameters))
        self._refuse_stacking()

    def _refuse_unknown(self, loc: Loc, settings: Settings | None, known: Sequence[str]) -> None:
        for name in settings or {}:
            if name not in self.method.parameters:
                raise self.file.error(
                    [*loc, name],
                    f"{self.config.merge_method} has no parameter '{name}'{did_you_mean(name, known)}",
                )
            if name not in known:
                raise self.file.error([*loc, name], f"'{name}' is one for the whole merge, not a model's")

    def _refuse_stacking(self) -> None:
        """Slices must be the model's own layers, in order, from the same models."""
        end, first = 0, [_key(s.model) for s in self.slices[0].sources] if self.slices else []
        for i, part in enumerate(self.slices):
            loc: Loc = ["slices", i]
            if part.residual_weight is not None:
                raise self.file.error([*loc, "residual_weight"], "residual_weight is not supported")
            if part.base_model not in (None, self.config.base_model):
                raise self.file.error([*loc, "base_model"], "a slice cannot have a base_model of its own")
            if not part.sources or sorted(_key(s.model) for s in part.sources) != sorted(first):
                raise self.file.error(
                    loc, "slices of different models are not supported: each names all of them"
                )
            for j, source in enumerate(part.sources):
                start, stop = source.layer_range
                if start != end or stop <= start or source.layer_range != part.sources[0].layer_range:
                    raise self.file.error(
                        [*loc, "sources", j, "layer_range"],
                        f"layers are not stacked, repeated or left out here: this slice begins at layer {end}, "
                        "for all its models",
                    )
            end = part.sources[0].layer_range[1]
        for source in self.slices[-1].sources if self.slices else ():
            folder = Path(self._path(_key(source.model)))
            count = read_config(folder).get("num_hidden_layers", end) if folder.is_dir() else end
            if count != end:
                last = len(self.slices) - 1
                problem = f"the slices end at layer {end}, {folder} has {count}; layers cannot be left out"
                raise self.file.error(["slices", last], problem)

    # ------------------------------------------------------------------------------------------ models

    def _models(self) -> dict[str, list[tuple[Loc, Settings]]]:
        """The models in order; for each its settings in every slice, and where they stand."""
        found: dict[str, list[tuple[Loc, Settings]]] = {}
        slices: list[tuple[Loc, Sequence[_Model]]] = [
            (["slices", i, "sources"], part.sources) for i, part in enumerate(self.slices)
        ]
        for loc, inputs in slices or [(["models"], self.config.models or [])]:
            for i, model in enumerate(inputs):
                key, where = _key(model.model), [*loc, i, "parameters"]
                if len(found.setdefault(key, [])) > (loc[1] if slices else 0):
                    raise self.file.error([*loc, i], f"{key} is there twice")
                known = [name for name, p in self.method.parameters.items() if p.of != "merge"]
                self._refuse_unknown(where, model.parameters, known)
                found[key].append((where, model.parameters or {}))
        return found

    def _experts(self) -> dict[str, str]:
        """Name of each expert -> model."""
        base = None if self.config.base_model is None else _key(self.config.base_model)
        keys = [key for key in self.models if key != base]
        if self.method.inputs == "base_first":
            assert base is not None, "refused without one"
            keys.insert(0, base)
        elif self.method.inputs == "all" and base is not None:
            keys = list(self.models) if base in self.models else [*self.models, base]
        names: dict[str, str] = {}
        for key in keys:
            stem = re.sub(r"[^\w.-]", "_", key.rstrip("/").rsplit("/")[-1].partition("@")[0]) or "model"
            stem = "base_model" if stem == "base" else stem
            number = 1
            while (name := stem if number == 1 else f"{stem}_{number}") in names:
                number += 1
            names[name] = key
        return names

    def _path(self, key: str) -> str:
        """A local path, or the URI of what the Hugging Face hub has."""
        model, plus, lora = key.partition("+")
        if plus:
            if self.config.base_model is None or model != _key(self.config.base_model):
                problem = f"the adapter {lora} is for {model}, which is not the base_model; merge it into that first"
                raise self.file.error(self._loc_of(key), problem)
            model = lora
        for folder in (self.file.path.parent, Path.cwd()):
            if (folder / model).exists():
                return str(folder / model)
        if "://" not in model and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+(@[\w./-]+)?", model):
            return f"hf://{model}"
        return model

    def _loc_of(self, key: str) -> Loc:
        return self.models[key][0][0][:-1] if key in getattr(self, "models", ()) else ["base_model"]

    # ------------------------------------------------------------------------------------------ settings

    def _parameters(self) -> dict[str, Any]:
        """The parameters where nothing else is said; what is said becomes rules."""
        count = len(self.slices)
        if count < 2:
            return self._region(_Region(0 if count else None))
        first = self._region(_Region(count - 1))
        self._region(_Region(0, names=_BEFORE))
        for i, part in enumerate(self.slices):
            start, stop = part.sources[0].layer_range
            self._region(_Region(i, layers=(start, stop - 1)))
        return first

    def _region(self, region: _Region) -> dict[str, Any]:
        """What the parameters of a region are to begin with, and the rules that change them."""
        everywhere = region.layers is None and region.names is None
        params: dict[str, Any] = {}
        changes: list[dict[str, Any]] = []
        for name, parameter in self.method.parameters.items():
            if parameter.ours is None or parameter.plain:
                continue
            experts: list[str | None] = list(self.experts) if parameter.of == "expert" else [None]
            starts = []
            for expert in experts:
                start, *others = self._said(name, region, expert)
                starts.append(start[1][0])
                changes += self._rules(parameter.ours, region, expert, [start] if len(start[1]) > 1 else [])
                changes += self._rules(parameter.ours, region, expert, others)
            params[parameter.ours] = starts if parameter.of == "expert" else starts[0]
        if not everywhere and params:
            self.rules.append({**_place(region, None), "params": params})
        self.rules += changes
        return params

    def _said(self, name: str, region: _Region, expert: str | None) -> list[tuple[str | None, list[Any]]]:
        """Filters and values of one parameter that count, the first for all tensors, later ones over earlier ones."""
        parameter = self.method.parameters[name]
        ours = parameter.ours
        assert ours is not None, "a parameter that changes no result has no rules"
        scopes: list[tuple[Loc, Settings]] = [(["parameters"], self.config.parameters or {})]
        if region.slice is not None:
            part = self.slices[region.slice]
            scopes.append((["slices", region.slice, "parameters"], part.parameters or {}))
        if parameter.of == "only":
            expert = next(iter(self.experts))
        if expert is not None and self.experts[expert] in self.models:
            scopes.append(self.models[self.experts[expert]][region.slice or 0])
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
            of = f" of {self.experts[expert]}" if expert else ""
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
        self, ours: str, region: _Region, expert: str | None, said: list[tuple[str | None, list[Any]]]
    ) -> Iterator[dict[str, Any]]:
        for filter, values in said:
            if region.names is not None and not any((filter or "") in name for name in region.names):
                continue
            single = region.layers is not None and region.layers[0] == region.layers[1]
            if single or region.names is not None:
                values = values[-1:] if single else values[:1]
            rule = {**_place(region, filter), "params": {ours: values[0]}}
            if len(values) > 1:
                rule["gradient"] = {ours: values}
            yield rule if expert is None else {**rule, "expert": expert}

    def _plain(self, name: str) -> Any:
        """The one value of a parameter that nothing may depend on."""
        parameter, loc = self.method.parameters[name], ["parameters", name]
        for i, part in enumerate(self.slices):
            if name in (part.parameters or {}):
                raise self.file.error(
                    ["slices", i, "parameters", name], f"'{name}' is one for the whole merge"
                )
        value = (self.config.parameters or {}).get(name, parameter.default)
        if not isinstance(value, bool):
            raise self.file.error(loc, f"'{name}' must be true or false for the whole merge")
        if parameter.fixed and value != parameter.default:
            raise self.file.error(loc, f"{name}: {str(value).lower()} is not supported; leave it out")
        return value

    # ------------------------------------------------------------------------------------------ tokenizer

    def _tokenizer(self, written: Mapping[str, Any]) -> dict[str, Any]:
        """Whose configuration and tokenizer are carried, and whose vocabulary the merge has."""
        config = self.config
        base = None if config.base_model is None else _key(config.base_model)
        names = {key: name for name, key in self.experts.items()}
        if base is not None and "base" in written:
            names[base] = "base"
        found = {"donor": names[base]} if base in names and names[base] != "base" else {}
        loc: Loc = ["tokenizer_source"]
        source: Any = config.tokenizer_source
        if config.tokenizer is not None:
            if source is not None:
                raise self.file.error(["tokenizer"], "give tokenizer or tokenizer_source, not both")
            for setting in config.tokenizer:
                if setting != "source":
                    raise self.file.error(
                        ["tokenizer", setting], f"'{setting}' of tokenizers is not supported"
                    )
            loc, source = ["tokenizer", "source"], config.tokenizer.get("source", "union")
        if source is None:
            return found
        if source == "union":
            return {**found, "vocabulary": "union"}
        key = base if source == "base" else _key(source)
        if key not in names:
            raise self.file.error(loc, f"the tokenizer of {source} cannot be had: it is none of the models")
        return {**found, "donor": names[key]}


def _key(model: str | dict[str, Any]) -> str:
    """The text of a model's reference: PATH[@REVISION][+ADAPTER]."""
    if isinstance(model, str):
        return model
    if "model" in model:
        lora = model.get("lora")
        return _key(model["model"]) + (f"+{_key(lora)}" if lora else "")
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


def _place(region: _Region, filter: str | None) -> dict[str, Any]:
    """Which tensors of a region a rule is for."""
    if region.names is not None:
        return {"match": [name for name in region.names if (filter or "") in name]}
    match = {} if filter is None else {"match": [f"*{glob.escape(filter)}*"]}
    return {**match, **({"layers": region.layers} if region.layers else {})}
