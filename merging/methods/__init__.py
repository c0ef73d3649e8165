"""The catalogue: every module of this package defines methods, each a plain function whose signature is its schema.

    @method(paper="...", reference="mean", unit="matrix", minimum_experts=3)
    def cart(x: Slot, *, rank: Annotated[float, Gt(0), Le(1)] = 0.12, ...) -> Tensor: ...

A method maps one `Slot` (a block of a tensor of every expert) to the merged block; keyword-only arguments are its
parameters. A wrapper takes a second argument, the `Inner` method that it wraps, which may be a wrapper again; their
parameters stand side by side. A wrapper with a parameter `origin` shows its inner method another base: what the
method of that name makes of the experts.

The docstring of a method is its page in the catalogue: one line, notes, and the sections `SECTIONS`.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from dataclasses import dataclass, field
from functools import cache, cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Callable, Iterator, Literal, Mapping, NamedTuple, Sequence

from merging.errors import UserError, did_you_mean
from merging.keys import is_matrix
from merging.lazy import torch
from merging.recipe import canonical_json
from merging.slots import UNITS, ChangedView, Inputs, Slot, Unit, View

if TYPE_CHECKING:
    from torch import Tensor

Family = Literal[
    "elementwise", "geometric", "spectral", "optimised", "statistics", "adapters", "store", "wrapper"
]
# Of docstrings. Parameters: what those mean that do not mean the same in all methods, `NAME: meaning`. Needs: what the
# declaration does not say. Spectral work: of methods that decompose matrices. Trap: what users get wrong.
SECTIONS = ("Formula", "Parameters", "Needs", "Spectral work", "Trap")

# A parameter whose name is taken further out in a chain of wrappers gets the first prefix, as often as needed; those
# of the method that makes the reference get the second.
_OF_INNER, _OF_ORIGIN = "inner_", "origin_"
# Parameters whose lists have one entry an expert.
_PER_EXPERT = ("weights", "density", "epsilon", "drop_rate", "outlier_rate")


class Store(NamedTuple):
    """How a method that gives one expert back is kept for all of them, in `merging.stores`.

    parts(name, shape, experts, **params): what is kept of a tensor, once and of every expert: names to `Part`s.
    encode(x, [merge,] tasks, **params): the parts of a block, once and of each task, made when they are asked for.
    decode(base_X, once, own, **params): the block as the method gives it; (X), base_X is None without a base.
    """

    parts: Callable[..., Parts]
    encode: Callable[..., Encoded]
    decode: Callable[..., Tensor]


class Part(NamedTuple):
    """What is kept as one tensor, in the shape that it has for a whole tensor.

    kind: `number`, in the dtype of `stored_dtype`; `exact`, what an expert itself holds, in its own; `bits`, a mask;
    `fact`, a number of each expert that the method's pre-pass found, the same for all tensors.
    """

    kind: Literal["number", "exact", "bits", "fact"]
    shape: tuple[int, ...] = ()


Parts = tuple[dict[str, Part], dict[str, Part]]  # kept once, and of each expert
Encoded = tuple[dict[str, "Tensor"], Iterator[dict[str, "Tensor"]]]
Stored = Literal["float32", "float16", "bfloat16"]


def stored_dtype(x: Slot, stored: Stored | None) -> torch.dtype:
    """What numbers of a store are kept in: the dtype asked for, or what the tensor is read as."""
    return getattr(torch, stored) if stored else x.dtype


@dataclass(frozen=True)
class Method:
    """A method with what it declares about itself; see `method`."""

    id: str
    family: Family
    function: Callable[..., Tensor]
    paper: str
    code: str
    reference: str
    unit: Unit | Literal["matrix"] | Callable[[Mapping[str, Any]], Unit]
    needs_base: bool
    minimum_experts: int
    maximum_experts: int | None
    prepass: Callable[..., Any] | None
    prepass_if: Callable[[Mapping[str, Any]], bool] | None
    measure: Callable[..., Any] | None
    transform: Callable[..., Slot] | None
    sees: Callable[[str, Sequence[int], Mapping[str, Any]], bool] | None
    check: Callable[[Mapping[str, Any], int], str | None] | None
    warn: Callable[[int, Mapping[str, Any]], str | None] | None
    base_if: Callable[[Mapping[str, Any]], bool] | None
    statistics: Callable[[Mapping[str, Any]], list[str]] | None
    inner_defaults: Mapping[str, Any]
    spectral: bool
    delta: bool
    beside: Callable[[int, int, int], int] | None
    store: Store | None
    as_factors: Callable[..., tuple[Tensor, Tensor]] | None
    as_factors_if: Callable[[Mapping[str, Any]], bool] | None

    @property
    def summary(self) -> str:
        return (inspect.getdoc(self.function) or "").split("\n")[0]

    @property
    def notes(self) -> str:
        """What its docstring says between the first line and the sections."""
        return _parts_of(self.function)[""].partition("\n")[2].strip()

    @property
    def sections(self) -> dict[str, str]:
        """The sections of its docstring that it has, by their titles."""
        return {title: text for title, text in _parts_of(self.function).items() if title}

    @property
    def citation(self) -> str:
        """The paper, by its arXiv id if it has one."""
        return f"arXiv {self.paper}" if self.paper[:4].isdecimal() else self.paper

    @property
    def wraps(self) -> bool:
        """Whether it is a wrapper: its second argument is the inner method."""
        return (
            len(
                [
                    p
                    for p in inspect.signature(self.function).parameters.values()
                    if p.kind is not p.KEYWORD_ONLY
                ]
            )
            > 1
        )

    @cached_property
    def schema(self) -> Any:
        """A pydantic model of the parameters: names, types, ranges and defaults of the function."""
        from pydantic import ConfigDict, create_model

        namespace = inspect.getmodule(self.function).__dict__
        fields = {
            name: (
                eval(p.annotation, namespace) if isinstance(p.annotation, str) else p.annotation,
                p.default,
            )
            for name, p in inspect.signature(self.function).parameters.items()
            if p.kind is p.KEYWORD_ONLY
        }
        return create_model(self.id, __config__=ConfigDict(extra="forbid", allow_inf_nan=False), **fields)

    @property
    def parameters(self) -> dict[str, Any]:
        """Parameter names and their defaults."""
        return {name: field.default for name, field in self.schema.model_fields.items()}

    def resolve(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """All parameters, defaults filled in; a wrapper's with those of what it wraps.

        Raises:
            UserError: an unknown name, a value of the wrong type or out of range.
        """
        levels = self._levels(params)
        known = [flat for level in levels for flat in level.names.values()]
        for name in params:
            if name not in known:
                raise UserError(f"{self.id}: unknown parameter '{name}'{did_you_mean(name, known)}")
        return {name: value for level in levels for name, value in level.resolve(params).items()}

    def bind(self, params: Mapping[str, Any]) -> Bound:
        """The method with resolved parameters, ready to merge."""
        inner: Bound | None = None
        origin: Bound | None = None
        for level in reversed(self._levels(params)):
            own = {name: params[flat] for name, flat in level.names.items() if flat in params}
            if level.is_origin:
                origin = Bound(level.method, own, level.names)
            else:
                inner, origin = Bound(level.method, own, level.names, inner, origin), None
        assert inner is not None
        return inner

    def _levels(self, params: Mapping[str, Any]) -> list[_Level]:
        """The method and what it wraps, from the outside in, each followed by what makes its origin.

        Raises:
            UserError: a name that is no method's, or that of a wrapper as an origin.
        """
        levels: list[_Level] = []
        taken: set[str] = set()
        defaults: dict[str, Any] = {}

        def add(entry: Method, prefix: str = "") -> dict[str, str]:
            names: dict[str, str] = {}
            for name in entry.parameters:
                flat = prefix + name
                while flat in taken:
                    flat = _OF_INNER + flat
                names[name] = flat
            taken.update(names.values())
            given = {} if prefix else {k: defaults.pop(k) for k in list(defaults) if k in names}
            levels.append(_Level(entry, names, given, bool(prefix)))
            return names

        entry = self
        while True:
            names = add(entry)
            if not entry.wraps:
                return levels
            defaults |= entry.inner_defaults
            if "origin" in names:
                add(entry._named(params, "origin", names), _OF_ORIGIN)
            entry = entry._named(params, "inner", names)

    def _named(self, params: Mapping[str, Any], which: str, names: Mapping[str, str]) -> Method:
        """The method that a parameter names."""
        id = params.get(names[which], self.parameters[which])
        if not isinstance(id, str):
            raise UserError(f"{self.id}: {which} = {id!r}: name a method")
        if which == "inner":
            return get_method(id)
        found = get_method("average" if id == "mean" else id)
        if found.wraps:
            raise UserError(f"{self.id}: origin '{id}' wraps another method; name a plain one")
        return found

    def misuses(
        self,
        params: Mapping[str, Any],
        experts: int,
        has_base: bool,
        statistics: Mapping[str, Any] | None = None,
    ) -> Iterator[str]:
        """What is wrong with resolved parameters for so many experts, a sentence each."""
        wanted: list[str] = []
        for bound in self.bind(params).chain:
            for part in filter(None, (bound.origin, bound)):
                yield from part.method._misuses(part.params, experts, has_base)
                wanted += part.statistics
            has_base = has_base or bound.origin is not None or bound.method.delta  # what it wraps sees one
        given = statistics or {}
        yield from (
            f"{self.id} needs the statistics '{k}': name their file" for k in wanted if k not in given
        )
        yield from (f"{self.id} takes no statistics '{k}'" for k in given if k not in wanted)

    def warnings(self, params: Mapping[str, Any], experts: int) -> Iterator[str]:
        """What is legal but pointless with resolved parameters for so many experts, a sentence each."""
        for bound in self.bind(params).chain:
            yield from filter(None, [bound.method.warn and bound.method.warn(experts, bound.params)])

    def _misuses(self, params: Mapping[str, Any], experts: int, has_base: bool) -> Iterator[str]:
        if not has_base and (self.needs_base or self.base_if and self.base_if(params)):
            yield f"{self.id} measures from the base checkpoint: name it (--base, `base:`)"
        if experts < self.minimum_experts:
            yield f"{self.id} needs at least {self.minimum_experts} expert(s), got {experts}"
        if self.maximum_experts and experts > self.maximum_experts:
            yield f"{self.id} merges at most {self.maximum_experts} expert(s), got {experts}"
        for name in _PER_EXPERT:
            listed = params.get(name)
            if isinstance(listed, list) and len(listed) != experts:
                what = "weights" if name == "weights" else f"numbers in {name}"
                yield f"{self.id}: {len(listed)} {what} for {experts} experts; give one an expert, in order"
        weights = params.get("weights")
        if weights and params.get("normalize") and sum(weights) == 0:
            yield f"{self.id}: the weights sum to 0, so they cannot be normalised; set normalize to false"
        if params.get("task", -1) >= experts:
            yield f"{self.id}: task {params['task']} is none of {experts} experts, counted from 0"
        wrong = self.check and self.check(params, experts)
        if wrong:
            yield f"{self.id}: {wrong}"


@dataclass(frozen=True)
class _Level:
    """One method of a chain of wrappers, and where its parameters stand among those of the chain."""

    method: Method
    names: Mapping[str, str]  # its own name of a parameter -> the chain's
    defaults: Mapping[str, Any]  # that the wrappers around it change
    is_origin: bool  # of the level before it

    def resolve(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Its parameters by the chain's names (raises UserError for a value of the wrong type or out of range)."""
        from pydantic import ValidationError

        own = {**self.defaults, **{name: params[flat] for name, flat in self.names.items() if flat in params}}
        try:
            resolved = self.method.schema.model_validate(own).model_dump()
        except ValidationError as error:
            errors = error.errors()
            # Of a number or a list of them, what is wrong with the kind that was given.
            first = errors[-1 if isinstance(own.get(errors[0]["loc"][0]), list) else 0]
            where = ".".join(str(part) for i, part in enumerate(first["loc"]) if not i or isinstance(part, int))
            raise UserError(f"{self.method.id}: {where} = {first['input']!r}: {first['msg']}") from None
        return {self.names[name]: value for name, value in resolved.items()}


@dataclass(frozen=True)
class Bound:
    """A method with its parameters, the method that it wraps, and the one that makes the base which that sees.

    What is found before the first block is merged, by pre-passes (`facts`) and in each tensor (`measured`), are for
    a wrapper the findings of its `own`, of its `inner` method and of its `origin`.
    """

    method: Method
    params: Mapping[str, Any]
    names: Mapping[str, str] = field(default_factory=dict)  # of its parameters among those of the whole chain
    inner: Bound | None = None
    origin: Bound | None = None

    @property
    def chain(self) -> Iterator[Bound]:
        """This and what it wraps, from the outside in."""
        bound: Bound | None = self
        while bound:
            yield bound
            bound = bound.inner

    @property
    def flat(self) -> dict[str, Any]:
        """All parameters in one mapping, as recipes have them."""
        parts = [part for bound in self.chain for part in (bound, bound.origin) if part]
        return {part.names.get(k, k): v for part in parts for k, v in part.params.items()}

    @property
    def is_spectral(self) -> bool:
        """Whether matrices are decomposed."""
        return any(b.method.spectral or b.origin and b.origin.is_spectral for b in self.chain)

    @property
    def statistics(self) -> list[str]:
        """The kinds of statistics that the method itself reads."""
        return self.method.statistics(self.params) if self.method.statistics else []

    def beside(self, shape: Sequence[int], experts: int) -> int:
        """Float64 numbers that are held at once of a matrix, beyond what any method holds."""
        own = self.method.beside(*shape, experts) if self.method.beside and len(shape) == 2 else 0
        return own + (self.inner.beside(shape, experts) if self.inner else 0)

    @property
    def own_unit(self) -> Unit | Literal["matrix"]:
        """What the method declares, with these parameters."""
        return self.method.unit if isinstance(self.method.unit, str) else self.method.unit(self.params)

    def unit(self, name: str, shape: Sequence[int]) -> Unit:
        """The smallest blocks of a tensor that the method, and what it wraps, can be given."""
        own = self._seen_unit(name, shape)
        return max(own, self.inner.unit(name, shape) if self.inner else own, key=UNITS.index)

    def _seen_unit(self, name: str, shape: Sequence[int]) -> Unit:
        """The smallest blocks from which it can tell what the inner method sees."""
        own = self.own_unit
        if own == "matrix":
            own = "tensor" if is_matrix(name, shape, self.params["keys"]) else "element"
        return max(own, self.origin.unit(name, shape) if self.origin else own, key=UNITS.index)

    @property
    def changes(self) -> bool:
        """Whether what is wrapped sees other experts, or another base, than there are."""
        return any(bound.origin or bound.method.transform for bound in self.chain)

    @property
    def has_prepass(self) -> bool:
        """Whether the whole model must be read before the first tensor is merged."""
        parts = [part for bound in self.chain for part in (bound, bound.origin) if part]
        return any(part.own_prepass for part in parts)

    @property
    def own_prepass(self) -> bool:
        """Whether the method itself reads the whole model."""
        method = self.method
        return bool(method.prepass) and (method.prepass_if is None or method.prepass_if(self.params))

    @property
    def prepass_setting(self) -> str:
        """Equal for points of a sweep that find the same in the same model: those that differ in `scale` alone.

        No method's own pre-pass asks for it; but a wrapper's may merge.
        """
        merges = any(bound.inner and bound.own_prepass for bound in self.chain)
        params = {key: value for key, value in self.flat.items() if merges or key != "scale"}
        return canonical_json([[bound.method.id for bound in self.chain], params])

    def prepass(self, inputs: Inputs) -> Any:
        """What must be known of the whole model, as plain JSON values; None if nothing."""
        if not inputs.views or not self.has_prepass:
            return None
        if not self.inner:
            return self.method.prepass(inputs, **self.params)
        found = {"inner": None}
        if self.origin and self.origin.has_prepass:
            found["origin"] = self.origin.prepass(inputs)
        if self.inner.has_prepass:
            seen = inputs.only(lambda view: self._is_seen(view.name, view.shape))
            found["inner"] = self.inner.prepass(seen.changed(lambda view: self._seen(view, found)))
        if self.own_prepass:
            found["own"] = self.method.prepass(inputs, Inner(self, found), **self.params)
        return found

    def measure(self, view: View, facts: Any) -> Any:
        """What must be known of one tensor before its blocks are merged; nothing, if it has none."""
        return self._measure(view, facts) if view.elements else None

    def _measure(self, view: View, facts: Any) -> Any:
        if not self.inner:
            return self._own_measure(view)
        found = self._measure_outside(view, facts)
        if not self._is_seen(view.name, view.shape):
            return found | {"inner": None}
        seen = self._changed(view, facts, found, keep=True)
        return found | {"inner": self.inner._measure(seen, _part(facts, "inner"))}

    def __call__(self, x: Slot, facts: Any, measured: Any) -> Tensor:
        """The merged block."""
        return self.method.function(*self._arguments(x, facts, measured), **self.params)

    def encode(self, x: Slot, facts: Any, measured: Any, tasks: Sequence[int]) -> Encoded:
        """The parts of the block in a compressed store; see `Store`."""
        return self.method.store.encode(*self._arguments(x, facts, measured), tasks, **self.params)

    @property
    def gives_factors(self) -> bool:
        """Whether of adapters it can say what it adds to the base as factors."""
        method = self.method
        return bool(method.as_factors) and (method.as_factors_if is None or method.as_factors_if(self.params))

    def as_factors(self, x: Slot, facts: Any, measured: Any) -> tuple[Tensor, Tensor]:
        """What it adds to a whole tensor of the base: the product of (M, K) and (K, N), float64."""
        return self.method.as_factors(*self._arguments(x, facts, measured), **self.params)

    def _arguments(self, x: Slot, facts: Any, measured: Any) -> tuple[Any, ...]:
        """The block as the method sees it, and what it wraps."""
        if not self.inner:
            return (x.given(facts, measured),)
        return x.given(_part(facts, "own"), _part(measured, "own")), Inner(self, facts, measured)

    def merged(self, x: Slot, facts: Any, measured: Any) -> Tensor:
        """The merged block, from blocks of the method's own unit."""
        parts = [self(part, facts, measured) for part in x.blocks(self.unit(x.name, x.tensor_shape))]
        whole = parts[0] if len(parts) == 1 else torch.cat([part.reshape(-1) for part in parts])
        return whole.reshape(x.shape)

    def _own_measure(self, view: View) -> Any:
        return self.method.measure(view, **self.params) if self.method.measure else None

    def _is_seen(self, name: str, shape: Sequence[int]) -> bool:
        return self.method.sees is None or self.method.sees(name, shape, self.params)

    def _measure_outside(self, view: View, facts: Any) -> dict[str, Any]:
        """What must be known of a tensor to tell what the inner method sees."""
        found = {"own": self._own_measure(view)}
        if self.origin:
            found["origin"] = self.origin.measure(view, _part(facts, "origin"))
        return found

    def _seen(self, view: View, facts: Any) -> View:
        return self._changed(view, facts, self._measure_outside(view, facts))

    def _changed(self, view: View, facts: Any, measured: Any, keep: bool = False) -> View:
        """The tensor as the inner method sees it; `keep`: for one that is let go soon."""
        if not self.origin and not self.method.transform:
            return view
        reshapes = self.method.sees is not None
        unit = "tensor" if reshapes else self._seen_unit(view.name, view.shape)
        return ChangedView(view, lambda x: self.transformed(x, facts, measured), unit, keep, reshapes)

    def transformed(self, x: Slot, facts: Any, measured: Any) -> Slot:
        """The block as the inner method sees it; points of a sweep share it."""
        if self.origin:
            origin, found = self.origin, (_part(facts, "origin"), _part(measured, "origin"))
            told = origin._told(x, found[0])
            reference = "mean" if told and origin.method.id == "average" else told
            key = ("around", origin.method.id, canonical_json([dict(origin.params), found[0]]))
            return x.share(key, lambda: x.with_base(origin.merged(x, *found), reference))
        if self.method.transform:
            return x.share(
                (self.method.id, canonical_json(dict(self.params))), lambda: self._transform(x, measured)
            )
        return x

    def _transform(self, x: Slot, measured: Any) -> Slot:
        seen = self.method.transform(x.given(None, _part(measured, "own")), **self.params)
        told = self._told(x, None)
        seen.changes = None if told is None or x.changes is None else [*x.changes, told]
        return seen

    def _told(self, x: Slot, facts: Any) -> Any:
        """What its result depends on besides a tensor's bytes, as JSON values; None if that cannot be said."""
        if self.statistics or x.reference is None:
            return None
        return [self.method.id, dict(self.params), facts, x.reference]


class Inner:
    """The wrapped method, as its wrapper calls it."""

    def __init__(self, wrapper: Bound, facts: Any, measured: Any = None):
        self._wrapper, self._facts, self._measured = wrapper, facts, measured

    def __call__(self, x: Slot) -> Tensor:
        """The block as the inner method merges it."""
        seen = self._wrapper.transformed(x, self._facts, self._measured)
        return self._wrapper.inner.merged(seen, _part(self._facts, "inner"), _part(self._measured, "inner"))

    def merged(self, view: View) -> Iterator[tuple[Slot, Tensor]]:
        """All blocks of a tensor and what the inner method makes of them."""
        inner = Inner(self._wrapper, self._facts, self._wrapper.measure(view, self._facts))
        for x in view.blocks(self._wrapper.unit(view.name, view.shape)):
            yield x, inner(x)


def _part(value: Any, name: str) -> Any:
    return None if value is None else value.get(name)


def _parts_of(function: Callable[..., Any]) -> dict[str, str]:
    """A docstring, cut where the sections begin: titles to texts, what is before the first one under ""."""
    parts: dict[str, list[str]] = {"": []}
    for line in (inspect.getdoc(function) or "").split("\n"):
        title = line.removesuffix(":")
        if line.endswith(":") and title in SECTIONS:
            parts[title] = []
        else:
            parts[list(parts)[-1]].append(line)
    return {title: inspect.cleandoc("\n".join(["", *lines])) for title, lines in parts.items()}


def method(
    *,
    family: Family,
    paper: str,
    reference: str,
    code: str = "",
    unit: Unit | Literal["matrix"] | Callable[[Mapping[str, Any]], Unit] = "element",
    needs_base: bool = False,
    minimum_experts: int = 1,
    maximum_experts: int | None = None,
    prepass: Callable[..., Any] | None = None,
    prepass_if: Callable[[Mapping[str, Any]], bool] | None = None,
    measure: Callable[..., Any] | None = None,
    transform: Callable[..., Slot] | None = None,
    sees: Callable[[str, Sequence[int], Mapping[str, Any]], bool] | None = None,
    check: Callable[[Mapping[str, Any], int], str | None] | None = None,
    warn: Callable[[int, Mapping[str, Any]], str | None] | None = None,
    base_if: Callable[[Mapping[str, Any]], bool] | None = None,
    statistics: Callable[[Mapping[str, Any]], list[str]] | None = None,
    inner_defaults: Mapping[str, Any] = MappingProxyType({}),
    spectral: bool = False,
    delta: bool = False,
    beside: Callable[[int, int, int], int] | None = None,
    store: Store | None = None,
    as_factors: Callable[..., tuple[Tensor, Tensor]] | None = None,
    as_factors_if: Callable[[Mapping[str, Any]], bool] | None = None,
) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Add a function to the catalogue under its own name.

    family: where it stands in the catalogue.
    paper, code: where it comes from (arXiv id or reference; repository@commit).
    reference: what task vectors are measured from.
    unit: the blocks it can be given (see `merging.slots`), or a function of the parameters; `matrix`: whole tensors
        where its `keys` say so (see `merging.keys`), any stretch of the others.
    prepass(inputs, **params): JSON values found in the whole model, as `x.facts`; prepass_if(params): whether needed.
    measure(view, **params): what it must know of a tensor before its blocks, as `x.measured`.
    transform(x, **params): for a wrapper, the slot that the inner method sees; a new one.
    sees(name, shape, params): for a wrapper that transforms whole tensors, also to other shapes: which of them.
    check(params, experts): what is wrong beyond types and ranges, as a sentence.
    warn(experts, params): a sentence for a legal but pointless use.
    base_if(params): whether parameters make a base necessary.
    statistics(params): the kinds of statistics it reads.
    inner_defaults: for a wrapper, defaults of the inner method that differ under it.
    spectral: it decomposes matrices.
    delta: without a base, it merges what bare factors of adapters add.
    beside(rows, columns, experts): float64 numbers that it holds of a matrix beyond what any does (`Entry.peak_bytes`).
    store: how it is kept for all experts, if it gives the expert of its parameter `task` back.
    as_factors(x, [merge,] **params): of experts that are adapters, factors (M, K) and (K, N) of what it adds to the
        base, of no higher rank than all of theirs together; as_factors_if(params): whether it can.
    """

    def register(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        entry = Method(
            id=function.__name__,
            family=family,
            function=function,
            paper=paper,
            code=code,
            reference=reference,
            unit=unit,
            needs_base=needs_base,
            minimum_experts=minimum_experts,
            maximum_experts=maximum_experts,
            prepass=prepass,
            prepass_if=prepass_if,
            measure=measure,
            transform=transform,
            sees=sees,
            check=check,
            warn=warn,
            base_if=base_if,
            statistics=statistics,
            inner_defaults=inner_defaults,
            spectral=spectral,
            delta=delta,
            beside=beside,
            store=store,
            as_factors=as_factors,
            as_factors_if=as_factors_if,
        )
        assert entry.id not in _METHODS, f"method '{entry.id}' is defined twice"
        _METHODS[entry.id] = entry
        return function

    return register


_METHODS: dict[str, Method] = {}


@cache
def catalogue() -> dict[str, Method]:
    """All methods by id, sorted."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    return dict(sorted(_METHODS.items()))


def get_method(id: str) -> Method:
    """The method `id` (raises UserError with the nearest name if there is none)."""
    methods = catalogue()
    if id not in methods:
        raise UserError(f"unknown method '{id}'{did_you_mean(id, methods)}")
    return methods[id]
