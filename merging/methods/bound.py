"""A method with its parameters, carried out: looks, references, updates, and what they sum to.

merged = reference + scale * update

What the looks found is handed along in two parts, `of_model` (JSON values, found once) and `of_tensor` (of one tensor,
before its blocks): for a wrapper each is a dict of what it found itself (`own`), of its `inner` method's and of its
`origin`'s.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any, Callable, Iterator, Mapping, Sequence

from mergeline.merging.algebra.combine import plain_update
from mergeline.merging.algebra.slots import UNITS, ChangedView, Slot, Unit, View, Views
from mergeline.merging.algebra.sums import mean, weighted_mean
from mergeline.merging.architecture import Matrix
from mergeline.merging.canonical import canonical_json
from mergeline.merging.errors import UserError
from mergeline.merging.lazy import torch
from mergeline.merging.methods.contract import Factors, Look, Mean, Method, Origin, Reference, get_method
from mergeline.merging.methods.stored import WHOLE, Encoded, Store, given_back

if TYPE_CHECKING:
    from torch import Tensor


def bind(method: Method, params: Mapping[str, Any]) -> Bound:
    """The method with resolved parameters, ready to merge."""
    inner: Bound | None = None
    origin: Bound | None = None
    for level in reversed(method.levels(params)):
        if level.is_origin:
            origin = Bound(level.method, level.own(params), level.names)
        else:
            inner, origin = Bound(level.method, level.own(params), level.names, inner, origin), None
    assert inner is not None
    return inner


@dataclass(frozen=True, eq=False)
class Bound:
    """A method with its parameters, the method that it wraps, and the one that makes the base which that sees."""

    method: Method
    params: Mapping[str, Any]
    names: Mapping[str, str] = field(default_factory=dict)  # of its parameters among those of the whole chain
    inner: Bound | None = None
    origin: Bound | None = None

    # ------------------------------------------------------------------------------------------ what it is

    @property
    def chain(self) -> Iterator[Bound]:
        """This and what it wraps, from the outside in."""
        bound: Bound | None = self
        while bound:
            yield bound
            bound = bound.inner

    @property
    def parts(self) -> Iterator[Bound]:
        """The chain, each after what makes its origin."""
        for bound in self.chain:
            yield from filter(None, (bound.origin, bound))

    @property
    def flat(self) -> dict[str, Any]:
        """All parameters in one mapping, as recipes have them."""
        parts = [part for bound in self.chain for part in (bound, bound.origin) if part]
        return {part.names.get(k, k): v for part in parts for k, v in part.params.items()}

    @cached_property
    def own(self) -> dict[str, Any]:
        """The parameters of the function itself."""
        return {k: v for k, v in self.params.items() if k not in self.method.executed}

    @property
    def scale(self) -> float:
        return self.params["scale"] if self.method.scale is not None else 1.0

    @cached_property
    def reference(self) -> Reference:
        return self.method.reference_of(self.params)

    @property
    def scales(self) -> set[str]:
        """The chain's names of parameters that only multiply an update: points that differ in them alone share it."""
        return {b.names.get("scale", "scale") for b in self.chain if b.method.scale is not None}

    @cached_property
    def setting(self) -> str:
        """Equal for points of a sweep that have the same update, before the method's own scale."""
        params = {k: v for k, v in self.params.items() if k != "scale" or self.method.scale is None}
        return canonical_json(
            [
                self.method.id,
                params,
                self.origin and self.origin._identity,
                self.inner and self.inner._identity,
            ]
        )

    @property
    def _identity(self) -> Any:
        return [self.setting, self.scale]

    @property
    def is_spectral(self) -> bool:
        """Whether matrices are decomposed."""
        return any(part.method.spectral for part in self.parts)

    @property
    def statistics(self) -> list[str]:
        """The kinds of statistics that the method itself reads."""
        return self.method.statistics_of(self.params)

    @property
    def lists_of_experts(self) -> list[str]:
        """The chain's names of parameters that may have one number an expert."""
        return [part.names.get(n, n) for part in self.parts for n in part.method.lists_of_experts]

    @property
    def copies(self) -> bool:
        """Whether it gives its one expert back as it is."""
        return self.method.id == "passthrough" and self.params["scale"] == 1.0

    @property
    def changes(self) -> bool:
        """Whether what is wrapped sees other experts, or another base, than there are."""
        return any(bound.origin or bound.method.transform for bound in self.chain)

    def beside(self, shape: Sequence[int], experts: int) -> int:
        """Float64 numbers that are held at once of a matrix, beyond what any method holds."""
        spectral = self.method.spectral
        own = spectral(shape[0], shape[1], experts) if callable(spectral) and len(shape) == 2 else 0
        return own + (self.inner.beside(shape, experts) if self.inner else 0)

    # ------------------------------------------------------------------------------------------ tensors

    def matrices(self, view: View) -> tuple[Matrix, ...]:
        """The matrices that the tensor consists of, to the method itself; none if it is no matrix to it."""
        if self.method.keys is None:
            return ()
        return view.matrices(self.params["keys"], self.params["convolutions"])

    def treats(self, view: View) -> bool:
        """Whether the function is called for the tensor; else it is merged as `other` says."""
        return self.method.keys is None or bool(self.matrices(view))

    def pieces(self, view: View) -> list[View]:
        """The tensor as the chain sees it: itself, or the matrices that it consists of to one of its methods.

        Packed experts are to every method the matrices that a layout with a tensor for each would have.
        """
        return view.pieces(next(filter(None, (part.matrices(view) for part in self.parts)), view.packed))

    def unit(self, view: View) -> Unit:
        """The smallest blocks of the tensor that the method, and what it wraps, can be given."""
        own = self._seen_unit(view)
        return max(own, self.inner.unit(view) if self.inner else own, key=UNITS.index)

    @property
    def own_unit(self) -> Unit | str:
        """What the method declares, with these parameters."""
        if self.method.keys is not None:
            return "matrix"
        return self.method.unit(self.params) if callable(self.method.unit) else self.method.unit

    def _seen_unit(self, view: View) -> Unit:
        """The smallest blocks from which it can tell what the inner method sees."""
        own: Any = self.own_unit
        if own == "matrix":
            own = "tensor" if self.treats(view) else "element"
        return max(own, self.origin.unit(view) if self.origin else own, key=UNITS.index)

    def _is_seen(self, view: View) -> bool:
        """Whether the inner method sees the tensor: not what a transform of matrices leaves out."""
        return self.method.transform is None or self.method.other == "inner" or self.treats(view)

    def treatment(self, view: View) -> str:
        """What happens to the tensor, in few words."""
        if self.method.keys is None:
            if self.inner:
                return self.inner.treatment(view)
            return "mean" if self.method.id == "average" else "merged"
        matrices = self.matrices(view)
        if matrices:
            return "matrix" if len(matrices) == 1 else f"{len(matrices)} matrices"
        other = self.params.get("other", self.method.other)
        if other == "inner" and self.inner:
            return self.inner.treatment(view)
        around_mean = self.reference == "mean" or isinstance(self.reference, Mean)
        if around_mean:
            return "mean"
        words = {"pretrained": "base", "mean": "mean", "sum": "sum", "task": "expert"}
        return words.get(other, "other") if isinstance(other, str) else "sum"

    # ------------------------------------------------------------------------------------------ looks

    @property
    def _own_look(self) -> Look | None:
        return self.method.look

    def _looks_over(self, what: str) -> bool:
        look = self._own_look
        if look is None:
            return False
        return (look.over(self.params) if callable(look.over) else look.over) == what

    @property
    def looks_at_model(self) -> bool:
        """Whether the whole model must be read before the first tensor is merged."""
        return any(part._looks_over("model") for part in self.parts)

    @property
    def looks_at_tensors(self) -> bool:
        """Whether a tensor is read before its blocks are merged."""
        return any(part._looks_over("tensor") for part in self.parts)

    @cached_property
    def _asked(self) -> list[str]:
        """The names of what the look is given besides views."""
        look = self._own_look
        return list(inspect.signature(look.find).parameters)[1:] if look else []

    @property
    def look_parameters(self) -> set[str]:
        """The chain's names of parameters that a look at the whole model depends on."""
        found: set[str] = set()
        for bound in reversed(list(self.chain)):
            if bound.inner and bound._looks_over("model") and "merge" in bound._asked:
                found.update(flat for part in bound.inner.parts for flat in part.names.values())
            if bound.inner and found:
                found.add(bound.names["inner"])
                if bound.origin or bound.method.transform:  # what is wrapped sees what they make
                    found.update(
                        flat for part in (bound, bound.origin) if part for flat in part.names.values()
                    )
            for part in filter(None, (bound, bound.origin)):
                if part._looks_over("model"):
                    found.update(part.names[name] for name in part._asked if name in part.names)
                    found.update(part.names[name] for name in part._deciding)
                    found.update(part.names[name] for name in ("keys", "convolutions") if name in part.names)
        return found

    @property
    def _deciding(self) -> set[str]:
        """The parameters that say over what the look is."""
        read: set[str] = set()

        class Watched(dict[str, Any]):
            def __getitem__(self, name: str) -> Any:
                read.add(name)
                return super().__getitem__(name)

        if self._own_look and callable(self._own_look.over):
            self._own_look.over(Watched(self.params))
        return read

    @property
    def look_setting(self) -> str:
        """Equal for points of a sweep that find the same in the same model."""
        flat = self.flat
        params = {name: flat[name] for name in sorted(self.look_parameters)}
        return canonical_json([[part.method.id for part in self.parts], params])

    def look_at_model(self, views: Views) -> Any:
        """What must be known of the whole model, as JSON values; None if nothing."""
        pieces = [piece for view in views.views for piece in self.pieces(view)]
        return self._look_at_model(views.of(pieces))

    def _look_at_model(self, views: Views) -> Any:
        if not views.views or not self.looks_at_model:
            return None
        if not self.inner:
            return self._find(views)
        found: dict[str, Any] = {}
        if self.origin and self.origin.looks_at_model:
            found["origin"] = self.origin._look_at_model(views)
        own, last = self._looks_over("model"), "merge" in self._asked
        if own and not last:
            found["own"] = self._find(views)
        if self.inner.looks_at_model:
            seen = views.only(self._is_seen)
            found["inner"] = self.inner._look_at_model(seen.changed(lambda view: self._seen(view, found)))
        if own and last:
            found["own"] = self._find(views, Inner(self, found))
        return found

    def _find(self, views: Views, *inner: Inner) -> Any:
        look, params = self._own_look, self.params
        assert look is not None
        for view in views.views:
            view.is_matrix = bool(self.matrices(view))
        return look.find(views, *inner, **{name: params[name] for name in self._asked if name != "merge"})

    def look_at_tensor(self, view: View, of_model: Any) -> Any:
        """What must be known of one tensor before its blocks are merged."""
        if not self.looks_at_tensors and not (self.changes and self.inner) or not view.elements:
            return None
        if not self.inner:
            return self._find(Views([view])) if self._looks_over("tensor") else None
        found = self._look_outside(view, of_model)
        if self._is_seen(view):
            seen = self._changed(view, of_model, lambda: found, keep=True)
            found["inner"] = self.inner.look_at_tensor(seen, _part(of_model, "inner"))
        return found

    def _look_outside(self, view: View, of_model: Any) -> dict[str, Any]:
        """What must be known of a tensor to tell what the inner method sees."""
        found: dict[str, Any] = {}
        if self._looks_over("tensor"):
            found["own"] = self._find(Views([view]))
        if self.origin:
            found["origin"] = self.origin.look_at_tensor(view, _part(of_model, "origin"))
        return found

    def _found(self, of_model: Any, of_tensor: Any) -> Any:
        """What its own look found."""
        found = of_model if self._looks_over("model") else of_tensor if self._looks_over("tensor") else None
        return _part(found, "own") if self.inner else found

    # ------------------------------------------------------------------------------------------ what is merged

    def weights(self, x: Slot, of_model: Any, of_tensor: Any) -> Tensor:
        """The merged block."""
        given = self._given(x, of_model, of_tensor)
        arguments = self._arguments(given, x, of_model, of_tensor)
        if not self.treats(x.view):
            return self._other(given, arguments)
        if self.reference == "none":
            found = self._called(given, arguments)
            assert found is not None, f"{self.method.id}: declares no reference, and returns nothing"
            return found
        return self._added(given, self._update(given, arguments))

    def update(self, x: Slot, of_model: Any, of_tensor: Any) -> Tensor:
        """What it adds to the base, in float64; without a base, what it makes."""
        if x.base is None:
            return self.weights(x, of_model, of_tensor).double()
        given = self._given(x, of_model, of_tensor)
        if self.reference != "pretrained" or not self.treats(x.view):
            return self.weights(x, of_model, of_tensor).double() - x.base.double()
        update = self._update(given, self._arguments(given, x, of_model, of_tensor))
        if update is None:
            return torch.zeros_like(x.base, dtype=torch.float64)
        return update.double() * self.scale

    def whole(self, x: Slot, of_model: Any, of_tensor: Any, kind: str = "weights") -> Tensor:
        """`weights`, or `update`, of a block that may be larger than the method's own unit."""
        make = getattr(self, kind)
        parts = [make(part, of_model, of_tensor) for part in x.blocks(self.unit(x.view))]
        whole = parts[0] if len(parts) == 1 else torch.cat([part.reshape(-1) for part in parts])
        return whole.reshape(x.shape)

    def encode(self, x: Slot, of_model: Any, of_tensor: Any, tasks: Sequence[int]) -> Encoded:
        """The parts of the block in a compressed store; see `Store`."""
        given = self._given(x, of_model, of_tensor)
        if not self.treats(x.view):
            return self.stored_as(x.view).encode(given, tasks, **self.own)
        arguments = self._arguments(given, x, of_model, of_tensor)
        return self.stored_as(x.view).encode(*arguments, tasks, **self.own)

    def stored_as(self, view: View) -> Store:
        """How a tensor is kept in a compressed store."""
        store = self.method.store
        assert store is not None, f"{self.method.id} is no method of stores"
        return store if self.treats(view) else store.other or WHOLE

    def decode(
        self,
        view: View,
        base_X: Tensor | None,
        once: Mapping[str, Any],
        own: Mapping[str, Any],
        shape: Sequence[int],
        dtype: torch.dtype,
    ) -> Tensor:
        """The block (X) of a tensor that the parts of a compressed store stand for."""
        found = self.stored_as(view).decode(once, own, shape, dtype, **self.own)
        if self.reference == "none" or not self.treats(view):
            return found
        assert base_X is not None, f"{self.method.id}: a store that is relative to a base needs it"
        wide = self.method.keys is not None
        return _sum(base_X.double() if wide else base_X, found, self.scale, wide)

    @property
    def gives_factors(self) -> bool:
        """Whether of adapters it can say what it adds to the base as factors."""
        factors = self.method.factors
        return factors is not None and factors.when(self.params)

    def as_factors(self, x: Slot, of_model: Any, of_tensor: Any) -> tuple[Tensor, Tensor]:
        """What it adds to a whole tensor of the base: the product of (M, K) and (K, N), float64."""
        factors: Factors | None = self.method.factors
        assert factors is not None
        given = self._given(x, of_model, of_tensor)
        if not self.treats(x.view):
            flat = given.reference.double().flatten(1)
            return flat[:, :0], flat[:0]
        left_MK, right_KN = factors.make(*self._arguments(given, x, of_model, of_tensor), **self.own)
        return left_MK * self.scale, right_KN

    def _given(self, x: Slot, of_model: Any, of_tensor: Any) -> Slot:
        """The block as the function sees it, with its reference."""
        given = x.given(self._found(of_model, of_tensor), self.setting)
        wide = self.method.keys is not None
        match self.reference:
            case "mean" | Mean(None):
                return given.from_mean()
            case Mean(weights) if weights is not None:
                dtype = torch.float64 if self.treats(x.view) else x.precision
                return given.measured_from(
                    lambda: weighted_mean(given.experts, weights, dtype), ["mean", list(weights)]
                )
            case Origin(id, params):
                method = get_method(id)
                origin = bind(method, method.resolve(params))
                make = lambda: origin.whole(x, None, None).double()  # noqa: E731
                key = ("origin", origin.setting, origin.scale)
                kept = (lambda: x.remember(key, make)) if x.view.shared else make
                return given.measured_from(kept, [id, dict(origin.params)])
        return given.from_base() if wide and x.has_base else given

    def _arguments(self, given: Slot, x: Slot, of_model: Any, of_tensor: Any) -> tuple[Any, ...]:
        """What the function is called with: the block, and what it wraps."""
        return (given, Inner(self, of_model, of_tensor, x)) if self.inner else (given,)

    def _update(self, given: Slot, arguments: tuple[Any, ...]) -> Tensor | None:
        """What the function returns; points of a sweep that differ in the scale alone share it."""
        if self.method.scale is None or not given.view.shared:
            return self._called(given, arguments)
        return given.remember(("update", self.setting), lambda: self._called(given, arguments))

    def _called(self, given: Slot, arguments: tuple[Any, ...]) -> Tensor | None:
        """What the function returns (raises UserError if it has another shape than the block)."""
        found = self.method.function(*arguments, **self.own)
        if found is not None and tuple(found.shape) != tuple(given.shape):
            raise UserError(
                f"{self.method.id}: returns {list(found.shape)} for a block of '{given.name}' of shape "
                f"{list(given.shape)}; return one number for each of its entries"
            )
        return found

    def _added(self, given: Slot, update: Tensor | None) -> Tensor:
        """reference + scale * update."""
        if self.reference == "pretrained" and not given.has_base:  # then it is the sum of what experts add
            return torch.zeros_like(given.experts[0]) if update is None else update * self.scale
        if update is None:
            return given.reference
        return _sum(given.reference, update, self.scale, self.method.keys is not None)

    def _other(self, given: Slot, arguments: tuple[Any, ...]) -> Tensor:
        """A tensor that is no matrix to the method."""
        other = self.params.get("other", self.method.other)
        if other == "inner":
            return arguments[1].weights()
        if other == "task":
            return given_back(self.stored_as(given.view), given, **self.own)
        if callable(other):
            return self._added(given, other(*arguments, **self.own))
        if self.reference in ("mean", Mean()) or other == "pretrained" and given.has_base:
            return given.reference  # around the mean, task vectors sum to zero
        if not given.has_base and self.reference == "pretrained":
            return mean(given.experts)
        return self._added(given, plain_update(given, other))

    # ------------------------------------------------------------------------------------------ what is wrapped

    def _seen(self, view: View, of_model: Any) -> View:
        # What it must know of the tensor is asked by who reads it, which need not be this process.
        return self._changed(view, of_model, cache(lambda: self._look_outside(view, of_model)))

    def _changed(self, view: View, of_model: Any, of_tensor: Callable[[], Any], keep: bool = False) -> View:
        """The tensor as the inner method sees it; `keep`: for one that is let go soon."""
        if not self.origin and not self.method.transform:
            return view
        reshapes = (
            self.method.transform is not None
            and self.method.keys is not None
            and self.method.other != "inner"
        )
        unit = "tensor" if reshapes else self._seen_unit(view)
        return ChangedView(view, lambda x: self.seen(x, of_model, of_tensor()), unit, keep, reshapes)

    def seen(self, x: Slot, of_model: Any, of_tensor: Any) -> Slot:
        """The block as the inner method sees it; points of a sweep share it."""
        if not self.origin and not self.method.transform:
            return x
        key = ("seen", self._transform_setting)
        make = lambda: self._make_seen(x, of_model, of_tensor)  # noqa: E731
        return x.remember(key, make) if x.view.shared else make()

    @cached_property
    def _transform_setting(self) -> str:
        inner = {"inner"} if "inner" in self.params else set()
        params = {k: v for k, v in self.params.items() if k not in inner}
        return canonical_json([self.method.id, params, self.origin and self.origin._identity])

    def _make_seen(self, x: Slot, of_model: Any, of_tensor: Any) -> Slot:
        if self.origin:
            origin, found = self.origin, (_part(of_model, "origin"), _part(of_tensor, "origin"))
            depends = origin._dependence(x, found[0])
            base_is = "mean" if depends and origin.method.id == "average" else depends
            return x.with_base(origin.whole(x, *found), base_is)
        assert self.method.transform is not None
        if not self.treats(x.view):
            return x
        given = self._given(x, of_model, of_tensor)
        seen = self.method.transform(given, **self.own)
        depends = self._dependence(x, _part(of_model, "own"))
        seen.changes = None if depends is None or x.changes is None else [*x.changes, depends]
        return seen

    def _dependence(self, x: Slot, of_model: Any) -> Any:
        """What its result depends on besides a tensor's bytes, as JSON values; None if that cannot be said."""
        if self.statistics or x.base_is is None:
            return None
        return [self.method.id, dict(self.params), of_model, x.base_is]


class Inner:
    """The wrapped method, as its wrapper calls it; of a block `x`, or of other ones."""

    def __init__(self, wrapper: Bound, of_model: Any, of_tensor: Any = None, x: Slot | None = None):
        self._wrapper, self._of_model, self._of_tensor, self._x = wrapper, of_model, of_tensor, x

    def weights(self) -> Tensor:
        """The block as the inner method merges it: (X)."""
        return self._made("weights")

    def update(self) -> Tensor:
        """What the inner method adds to the base that it sees, in float64: (X)."""
        return self._made("update")

    def _made(self, kind: str) -> Tensor:
        bound = self._wrapper
        assert bound.inner is not None and self._x is not None
        seen = bound.seen(self._x, self._of_model, self._of_tensor)
        return bound.inner.whole(seen, _part(self._of_model, "inner"), _part(self._of_tensor, "inner"), kind)

    def updates(self, view: View) -> Iterator[tuple[Slot, Tensor]]:
        """All blocks of a tensor and what the inner method adds to the base in each."""
        bound = self._wrapper
        of_tensor = bound.look_at_tensor(view, self._of_model)
        for x in view.blocks(bound.unit(view)):
            yield x, Inner(bound, self._of_model, of_tensor, x).update()


def _part(value: Any, name: str) -> Any:
    return None if value is None else value.get(name)


def _sum(reference_X: Tensor, update_X: Tensor, scale: float, wide: bool) -> Tensor:
    """reference + scale * update: of matrices in float64, else in the dtypes that both have."""
    if wide:
        return torch.add(reference_X, update_X, alpha=scale)
    return update_X + reference_X if scale == 1 else (update_X * scale).add_(reference_X)
