"""The catalogue: every module of this package defines methods, each a plain function whose signature is its schema.

    @method(paper="...", reference="mean", minimum_experts=3)
    def cart(x: Slot, *, rank: Annotated[float, Gt(0), Le(1)] = 0.12, ...) -> Tensor: ...

A method maps one `Slot` (a tensor of every expert) to the merged tensor; keyword-only arguments are its parameters.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from dataclasses import dataclass
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any, Callable, Iterator, Mapping, Protocol, Sequence

from merging.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Slot:
    """One tensor of a merge, as its method sees it: float32 (float64 if an input is), shape X without 0-d.

    base: (X) or None; experts: (T, *X); facts: what the method's pre-pass found; factors: one
    (squared singular values, singular vectors) an expert, of the mean-centred task vectors, if they are stored.
    """

    name: str
    base: Tensor | None
    experts: Tensor
    facts: Any = None
    factors: Sequence[tuple[Tensor, Tensor]] | None = None

    @property
    def task_vectors(self) -> Tensor:
        """expert - base: (T, *X)."""
        assert self.base is not None
        return self.experts - self.base


class Inputs(Protocol):
    """What a pre-pass may read: all float tensors of a merge, one slot at a time, as often as it likes."""

    def slots(self) -> Iterator[Slot]: ...

    @property
    def elements(self) -> int: ...


@dataclass(frozen=True)
class Method:
    """A method with what it declares about itself."""

    id: str
    function: Callable[..., Tensor]
    paper: str
    code: str
    reference: str
    needs_base: bool
    minimum_experts: int
    prepass: Callable[..., Any] | None
    warn: Callable[[int, Mapping[str, Any]], str | None] | None
    base_if: Callable[[Mapping[str, Any]], bool] | None
    spectral: bool

    @property
    def summary(self) -> str:
        return (inspect.getdoc(self.function) or "").split("\n")[0]

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
        """All parameters, defaults filled in.

        Raises:
            UserError: an unknown name, a value of the wrong type or out of range.
        """
        from pydantic import ValidationError

        for name in params:
            if name not in self.parameters:
                raise UserError(f"{self.id}: unknown parameter '{name}'{did_you_mean(name, self.parameters)}")
        try:
            return self.schema.model_validate(dict(params)).model_dump()
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise UserError(f"{self.id}: {where} = {first['input']!r}: {first['msg']}") from None

    def misuses(self, params: Mapping[str, Any], experts: int, has_base: bool) -> Iterator[str]:
        """What is wrong with resolved parameters for so many experts, a sentence each."""
        if not has_base and (self.needs_base or self.base_if and self.base_if(params)):
            yield f"{self.id} measures from the base checkpoint: name it (--base, `base:`)"
        if experts < self.minimum_experts:
            yield f"{self.id} needs at least {self.minimum_experts} expert(s), got {experts}"
        weights = params.get("weights")
        if weights is not None and len(weights) != experts:
            yield f"{self.id}: {len(weights)} weights for {experts} experts; give one an expert, in order"
        if weights and params.get("normalize") and sum(weights) == 0:
            yield f"{self.id}: the weights sum to 0, so they cannot be normalised; set normalize to false"


def method(
    *,
    paper: str,
    reference: str,
    code: str = "",
    needs_base: bool = False,
    minimum_experts: int = 1,
    prepass: Callable[..., Any] | None = None,
    warn: Callable[[int, Mapping[str, Any]], str | None] | None = None,
    base_if: Callable[[Mapping[str, Any]], bool] | None = None,
    spectral: bool = False,
) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Add a function to the catalogue under its own name.

    paper, code: where it comes from (arXiv id; repository@commit). reference: what task vectors are measured from.
    prepass(inputs, **params): facts over the whole model, handed to every slot. warn(experts, params): a sentence
    for a legal but pointless use. base_if(params): whether parameters make a base necessary. spectral: it
    decomposes matrices (for the time estimate).
    """

    def register(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        entry = Method(
            id=function.__name__,
            function=function,
            paper=paper,
            code=code,
            reference=reference,
            needs_base=needs_base,
            minimum_experts=minimum_experts,
            prepass=prepass,
            warn=warn,
            base_if=base_if,
            spectral=spectral,
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
