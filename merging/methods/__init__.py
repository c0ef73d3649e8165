"""The catalogue: every module of this package defines methods, each a plain function whose signature is its schema.

    @method(paper="...", reference="mean", unit="matrix", minimum_experts=3)
    def cart(x: Slot, *, rank: Annotated[float, Gt(0), Le(1)] = 0.12, ...) -> Tensor: ...

A method maps one `Slot` (a block of a tensor of every expert) to the merged block; keyword-only arguments are its
parameters. A wrapper takes a second argument, the `Inner` method that it wraps, and hands it the parameters that
are not its own.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from dataclasses import dataclass
from functools import cache, cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Callable, Iterator, Literal, Mapping, Sequence

from merging.errors import UserError, did_you_mean
from merging.keys import is_matrix
from merging.slots import ChangedView, Inputs, Slot, Unit, View

if TYPE_CHECKING:
    from torch import Tensor

_UNITS: tuple[Unit, ...] = ("element", "row", "tensor")
# Parameters that mean the same to a wrapper and to what it wraps: the inner one's get this prefix.
_OF_INNER = "inner_"


@dataclass(frozen=True)
class Method:
    """A method with what it declares about itself; see `method`."""

    id: str
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

    @property
    def summary(self) -> str:
        return (inspect.getdoc(self.function) or "").split("\n")[0]

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
        from pydantic import ValidationError

        own = {k: v for k, v in params.items() if not self.wraps or k in self.parameters}
        for name in own:
            if name not in self.parameters:
                raise UserError(f"{self.id}: unknown parameter '{name}'{did_you_mean(name, self.parameters)}")
        try:
            resolved = self.schema.model_validate(dict(own)).model_dump()
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise UserError(f"{self.id}: {where} = {first['input']!r}: {first['msg']}") from None
        if not self.wraps:
            return resolved
        inner = get_method(resolved["inner"])
        if inner.wraps:
            raise UserError(f"{self.id}: wraps {inner.id}, which wraps another method; name a plain method")
        known = [*self.parameters, *map(self._flat_name, inner.parameters)]
        for name in params:
            if name not in known:
                raise UserError(f"{self.id}: unknown parameter '{name}'{did_you_mean(name, known)}")
        rest = {k: v for k, v in self.inner_defaults.items() if k in inner.parameters}
        rest |= {self._inner_name(k): v for k, v in params.items() if k not in own}
        return resolved | {self._flat_name(k): v for k, v in inner.resolve(rest).items()}

    def _inner_name(self, name: str) -> str:
        short = name.removeprefix(_OF_INNER)
        return short if short in self.parameters else name

    def _flat_name(self, name: str) -> str:
        return _OF_INNER + name if name in self.parameters else name

    def bind(self, params: Mapping[str, Any]) -> Bound:
        """The method with resolved parameters, ready to merge."""
        own = {k: v for k, v in params.items() if k in self.parameters}
        if not self.wraps:
            return Bound(self, own)
        rest = {self._inner_name(k): v for k, v in params.items() if k not in own}
        return Bound(self, own, get_method(own["inner"]).bind(rest))

    def misuses(
        self,
        params: Mapping[str, Any],
        experts: int,
        has_base: bool,
        statistics: Mapping[str, Any] | None = None,
    ) -> Iterator[str]:
        """What is wrong with resolved parameters for so many experts, a sentence each."""
        wanted: list[str] = []
        bound: Bound | None = self.bind(params)
        while bound:
            yield from bound.method._misuses(bound.params, experts, has_base)
            wanted += bound.method.statistics(bound.params) if bound.method.statistics else []
            has_base = has_base or bound.method.delta  # what it wraps sees one
            bound = bound.inner
        given = statistics or {}
        yield from (
            f"{self.id} needs the statistics '{k}': name their file" for k in wanted if k not in given
        )
        yield from (f"{self.id} takes no statistics '{k}'" for k in given if k not in wanted)

    def _misuses(self, params: Mapping[str, Any], experts: int, has_base: bool) -> Iterator[str]:
        if not has_base and (self.needs_base or self.base_if and self.base_if(params)):
            yield f"{self.id} measures from the base checkpoint: name it (--base, `base:`)"
        if experts < self.minimum_experts:
            yield f"{self.id} needs at least {self.minimum_experts} expert(s), got {experts}"
        if self.maximum_experts and experts > self.maximum_experts:
            yield f"{self.id} merges at most {self.maximum_experts} expert(s), got {experts}"
        weights = params.get("weights")
        if weights is not None and len(weights) != experts:
            yield f"{self.id}: {len(weights)} weights for {experts} experts; give one an expert, in order"
        if weights and params.get("normalize") and sum(weights) == 0:
            yield f"{self.id}: the weights sum to 0, so they cannot be normalised; set normalize to false"
        wrong = self.check and self.check(params, experts)
        if wrong:
            yield f"{self.id}: {wrong}"


@dataclass(frozen=True)
class Bound:
    """A method with its parameters, and those of the method that it wraps."""

    method: Method
    params: Mapping[str, Any]
    inner: Bound | None = None

    @property
    def flat(self) -> dict[str, Any]:
        """All parameters in one mapping, as recipes have them."""
        inner = {self.method._flat_name(k): v for k, v in self.inner.flat.items()} if self.inner else {}
        return {**self.params, **inner}

    @property
    def is_spectral(self) -> bool:
        """Whether matrices are decomposed."""
        return self.method.spectral or bool(self.inner and self.inner.is_spectral)

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
        own = self.own_unit
        if own == "matrix":
            own = "tensor" if is_matrix(name, shape, self.params["keys"]) else "element"
        return max(own, self.inner.unit(name, shape) if self.inner else own, key=_UNITS.index)

    @property
    def has_prepass(self) -> bool:
        """Whether the whole model must be read before the first tensor is merged."""
        return self._own_prepass or bool(self.inner and self.inner.has_prepass)

    @property
    def _own_prepass(self) -> bool:
        method = self.method
        return bool(method.prepass) and (method.prepass_if is None or method.prepass_if(self.params))

    def prepass(self, inputs: Inputs) -> Any:
        """What must be known of the whole model, as plain JSON values; None if nothing."""
        if not inputs.views or not self.has_prepass:
            return None
        if not self.inner:
            return self.method.prepass(inputs, **self.params)
        found = {"inner": None}
        if self.inner.has_prepass:
            seen = inputs.only(lambda view: self._is_seen(view.name, view.shape))
            found["inner"] = self.inner.prepass(seen.changed(self._seen))
        if self._own_prepass:
            found["own"] = self.method.prepass(inputs, Inner(self, found), **self.params)
        return found

    def measure(self, view: View, facts: Any) -> Any:
        """What must be known of one tensor before its blocks are merged; nothing, if it has none."""
        return self._measure(view, facts) if view.elements else None

    def _measure(self, view: View, facts: Any) -> Any:
        own = self._own_measure(view)
        if not self.inner:
            return own
        if not self._is_seen(view.name, view.shape):
            return {"own": own, "inner": None}
        return {"own": own, "inner": self.inner._measure(self._changed(view, own), _part(facts, "inner"))}

    def __call__(self, x: Slot, facts: Any, measured: Any) -> Tensor:
        """The merged block."""
        if not self.inner:
            return self.method.function(x.given(facts, measured), **self.params)
        own = x.given(_part(facts, "own"), _part(measured, "own"))
        return self.method.function(own, Inner(self, facts, measured), **self.params)

    def _own_measure(self, view: View) -> Any:
        return self.method.measure(view, **self.params) if self.method.measure else None

    def _is_seen(self, name: str, shape: Sequence[int]) -> bool:
        return self.method.sees is None or self.method.sees(name, shape, self.params)

    def _seen(self, view: View) -> View:
        return self._changed(view, self._own_measure(view)) if self.method.transform else view

    def _changed(self, view: View, measured: Any) -> View:
        return ChangedView(view, lambda x: self.transformed(x, measured), whole=self.method.sees is not None)

    def transformed(self, x: Slot, measured: Any) -> Slot:
        """The block as the inner method sees it."""
        if not self.method.transform:
            return x
        return self.method.transform(x.given(None, measured), **self.params)


class Inner:
    """The wrapped method, as its wrapper calls it."""

    def __init__(self, wrapper: Bound, facts: Any, measured: Any = None):
        self._wrapper, self._facts, self._measured = wrapper, facts, measured

    def __call__(self, x: Slot) -> Tensor:
        """The block as the inner method merges it."""
        seen = self._wrapper.transformed(x, _part(self._measured, "own"))
        return self._wrapper.inner(seen, _part(self._facts, "inner"), _part(self._measured, "inner"))

    def merged(self, view: View) -> Iterator[tuple[Slot, Tensor]]:
        """All blocks of a tensor and what the inner method makes of them."""
        inner = Inner(self._wrapper, self._facts, self._wrapper.measure(view, self._facts))
        for x in view.blocks(self._wrapper.unit(view.name, view.shape)):
            yield x, inner(x)


def _part(value: Any, name: str) -> Any:
    return None if value is None else value.get(name)


def method(
    *,
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
) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Add a function to the catalogue under its own name.

    paper, code: where it comes from (arXiv id or reference; repository@commit).
    reference: what task vectors are measured from.
    unit: the blocks it can be given (see `merging.slots`), or a function of the parameters; `matrix`: whole tensors
        where its `keys` say so (see `merging.keys`), any stretch of the others.
    prepass(inputs, **params): JSON values found in the whole model, as `x.facts`; prepass_if(params): whether needed.
    measure(view, **params): what it must know of a tensor before its blocks, as `x.measured`.
    transform(x, **params): for a wrapper, the slot that the inner method sees.
    sees(name, shape, params): for a wrapper that transforms whole tensors, also to other shapes: which of them.
    check(params, experts): what is wrong beyond types and ranges, as a sentence.
    warn(experts, params): a sentence for a legal but pointless use.
    base_if(params): whether parameters make a base necessary.
    statistics(params): the kinds of statistics it reads.
    inner_defaults: for a wrapper, defaults of the inner method that differ under it.
    spectral: it decomposes matrices.
    delta: without a base, it merges what bare factors of adapters add.
    beside(rows, columns, experts): float64 numbers that it holds of a matrix beyond what any does (`Entry.peak_bytes`).
    """

    def register(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        entry = Method(
            id=function.__name__,
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
