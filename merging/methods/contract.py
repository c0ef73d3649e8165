"""What a method is: a plain function that returns an update, and what it declares about itself.

    @method(paper="...", reference="mean", scale=1.0, keys="block_linear", experts=(3, None))
    def cart(x: Slot, *, rank: Share = 0.12) -> Tensor: ...

A method maps one `Slot`, a block of one tensor of every expert, to what it adds: the update. The engine does the rest,
as declared: it makes the reference that task vectors are measured from, calls the function for the tensors that `keys`
name and treats the others as `other` says, and returns reference + scale * update. Keyword-only arguments are the
method's parameters; `scale`, `keys`, `other` and `convolutions` are added where they are declared.

A wrapper takes a second argument, the `Inner` method that it wraps, which may be a wrapper again; their parameters
stand side by side. A wrapper with a parameter `origin` shows its inner method another base: what the method of that
name makes of the experts.

The docstring of a method is its page in the catalogue: one line, notes, and the sections `SECTIONS`.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import importlib.util
import inspect
import pkgutil
import sys
from dataclasses import KW_ONLY, dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Iterator, Literal, Mapping, NamedTuple, Sequence, get_args

from mergeline.merging.algebra.slots import UNITS, Slot, Unit
from mergeline.merging.algebra.statistics import STATISTICS
from mergeline.merging.architecture import Keys
from mergeline.merging.errors import UserError, did_you_mean, plainly
from mergeline.merging.methods.parameters import AnExpert, OneAnExpert, Other, is_marked
from mergeline.merging.methods.stored import Store

if TYPE_CHECKING:
    from torch import Tensor

    Params = Mapping[str, Any]

# Of docstrings. Parameters: what those mean that do not mean the same in all methods, `NAME: meaning`. Needs: what the
# declaration does not say. Spectral work: of methods that decompose matrices. Trap: what users get wrong.
SECTIONS = ("Formula", "Parameters", "Needs", "Spectral work", "Trap")
# A parameter whose name is taken further out in a chain of wrappers gets the first prefix, as often as needed; those
# of the method that makes the reference get the second.
_OF_INNER, _OF_ORIGIN = "inner_", "origin_"
LONGEST_CHAIN = 16
_PLUGINS = "mergeline.methods"  # the group of entry points whose modules define methods


class Mean(NamedTuple):
    """A reference: the mean of the experts, by weights that are divided by their sum, or all alike."""

    weights: Sequence[float] | None = None


class Origin(NamedTuple):
    """A reference: what another method makes of the experts."""

    method: str
    params: Mapping[str, Any]


Reference = Literal["pretrained", "mean", "none"] | Mean | Origin
Over = Literal["model", "tensor"] | None


class Look(NamedTuple):
    """What a method must know before the first block is merged, as `x.found`.

    find(views, **parameters): of all tensors (`over` is model; JSON values) or of each for itself (tensor). It is given
    those parameters that it names, and after `views` the inner method of a wrapper if it names `merge`.
    over: of what, or a function of the parameters, which may say that nothing is needed (None).
    """

    find: Callable[..., Any]
    over: Over | Callable[[Params], Over] = "tensor"


class Factors(NamedTuple):
    """How a method says, of experts that are adapters, what it adds to a tensor of the base before `scale`, as factors.

    make(x, [merge,] **params): (M, K) and (K, N) float64, of no higher rank than all of theirs together.
    when(params): whether it can.
    """

    make: Callable[..., tuple[Tensor, Tensor]]
    when: Callable[[Params], bool] = lambda params: True


class Note(str):
    """What is legal but pointless, among what `check` yields."""


class Declared:
    """What a function with keyword-only parameters says of itself: by its name, its signature and its docstring."""

    function: Callable[..., Any]
    paper: str

    @property
    def id(self) -> str:
        return self.function.__name__

    @cached_property
    def file(self) -> Path:
        """Where it is defined."""
        return Path(inspect.getfile(self.function))

    @property
    def digest(self) -> str:
        """Of the file that defines it."""
        return "sha256:" + hashlib.sha256(self.file.read_bytes()).hexdigest()

    @property
    def is_outside(self) -> bool:
        """Whether it is none of Mergeline's own."""
        return not self.function.__module__.startswith("mergeline.")

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

    @cached_property
    def _own(self) -> list[inspect.Parameter]:
        """The parameters of the function itself."""
        found = inspect.signature(self.function).parameters.values()
        return [p for p in found if p.kind is p.KEYWORD_ONLY]

    @cached_property
    def annotations(self) -> dict[str, Any]:
        """The types of the function's own parameters."""
        module = inspect.getmodule(self.function)
        namespace = {**vars(module)} if module else {}
        return {
            p.name: eval(p.annotation, namespace) if isinstance(p.annotation, str) else p.annotation
            for p in self._own
        }

    @property
    def executed(self) -> dict[str, tuple[Any, Any]]:
        """Type and default of the parameters that are not the function's own."""
        return {}

    @cached_property
    def schema(self) -> Any:
        """A pydantic model of the parameters: names, types, ranges and defaults."""
        from pydantic import ConfigDict, create_model

        own = {p.name: (self.annotations[p.name], p.default) for p in self._own}
        fields: dict[str, Any] = own | self.executed
        config = ConfigDict(extra="forbid", allow_inf_nan=False)
        return create_model(self.id, __config__=config, **fields)

    @cached_property
    def parameters(self) -> dict[str, Any]:
        """Parameter names and their defaults."""
        return {p.name: p.default for p in self._own} | {k: value for k, (_, value) in self.executed.items()}

    def validated(self, params: Params) -> dict[str, Any]:
        """All parameters, defaults filled in (raises UserError for a value of the wrong type or out of range)."""
        from pydantic import ValidationError

        try:
            return dict(self.schema.model_validate(dict(params)).model_dump())
        except ValidationError as error:
            errors = error.errors()
            # Of a number or a list of them, what is wrong with the kind that was given.
            first = errors[-1 if isinstance(params.get(str(errors[0]["loc"][0])), list) else 0]
            where = ".".join(
                str(part) for i, part in enumerate(first["loc"]) if not i or isinstance(part, int)
            )
            raise UserError(f"{self.id}: {where} = {first['input']!r}: {plainly(first)}") from None


@dataclass(frozen=True, eq=False)
class Method(Declared):
    """A method with what it declares about itself.

    paper, code: where it comes from (arXiv id or reference; repository@commit).
    reference: what task vectors are measured from, and the update is added to; or a function of the parameters. With
        `none` the function returns weights, not an update.
    scale: the default of the parameter `scale`, by which the engine multiplies the update.
    keys: the default of the parameter `keys`: the function is given whole matrices, and only what these are.
    other: what tensors that are no matrices to it get: nothing (pretrained), the mean or the sum of the task vectors
        (of methods around the base a parameter), what the inner method of a wrapper makes of them (inner), the expert
        of the parameter `task` (task), or the update that a function like the method's own returns.
    unit: without `keys`, the blocks it can be given (see `merging.algebra.slots`), or a function of the parameters.
    experts: the least and the largest number of experts.
    needs: `base`, or `delta` (a base, or experts that are bare factors of adapters), and kinds of statistics; or a
        function of the parameters.
    measure: what it must know before its blocks: a `Look`, or the function of one over each tensor.
    transform(x, **params): for a wrapper, the slot that the inner method sees; a new one.
    check(params, experts): what is wrong with parameters beyond types and ranges, a sentence each; or `Note`s.
    inner_defaults: for a wrapper, defaults of the inner method that differ under it.
    spectral: whether it decomposes matrices; a function says how many float64 numbers it holds beyond what any method
        does, of a matrix: (rows, columns, experts).
    store: how it is kept for all experts, if it gives the expert of its parameter `task` back.
    factors: how it merges adapters as factors.
    """

    function: Callable[..., Tensor | None]
    _: KW_ONLY
    paper: str
    code: str = ""
    reference: Reference | Callable[[Params], Reference] = "pretrained"
    scale: float | None = None
    keys: Keys | None = None
    other: Other | Literal["inner", "task"] | Callable[..., Tensor | None] = "pretrained"
    unit: Unit | Callable[[Params], Unit] = "element"
    experts: tuple[int, int | None] = (1, None)
    needs: Sequence[str] | Callable[[Params], Sequence[str]] = ()
    measure: Look | Callable[..., Any] | None = None
    transform: Callable[..., Slot] | None = None
    check: Callable[[Params, int], Iterator[str]] | None = None
    inner_defaults: Mapping[str, Any] = field(default_factory=dict)
    spectral: bool | Callable[[int, int, int], int] = False
    store: Store | None = None
    factors: Factors | None = None

    def __post_init__(self) -> None:
        for problem in self._mistakes():
            raise UserError(f"{self.file}: method '{self.id}': {problem}")

    def _mistakes(self) -> Iterator[str]:
        """What is wrong with the declaration, a sentence each."""
        arguments = list(inspect.signature(self.function).parameters.values())
        if len(arguments) - len(self._own) > 2:
            yield "parameters stand after `*`, for they are named: `def f(x: Slot, *, rate: float = 0.1)`"
        for parameter in self._own:
            if parameter.default is parameter.empty or parameter.annotation is parameter.empty:
                yield f"parameter '{parameter.name}' needs a type and a default: `{parameter.name}: float = 0.1`"
            if parameter.name in self.executed:
                yield f"'{parameter.name}' is declared, so that the engine executes it; leave it out of the function"
        if self.wraps and "inner" not in {parameter.name for parameter in self._own}:
            yield 'a wrapper has a parameter `inner: str = "task_arithmetic"`, the method that it wraps'
        words: dict[str, tuple[Any, Sequence[Any]]] = {
            "reference": (self.reference, ("pretrained", "mean", "none")),
            "keys": (self.keys, (None, *get_args(Keys))),
            "other": (self.other, (*get_args(Other), "inner", "task")),
            "unit": (self.unit, UNITS),
        }
        for name, (value, known) in words.items():
            if not callable(value) and not isinstance(value, Mean | Origin) and value not in known:
                yield f"{name} is {value!r}{did_you_mean(str(value), filter(None, known))}"
        if self.reference == "none" and self.scale is not None:
            yield "with reference none the function returns weights, which no scale multiplies; leave scale out"
        if isinstance(self.needs, str):
            yield f'needs is a tuple: `needs=("{self.needs}",)`'
        elif not callable(self.needs):
            for need in self.needs:
                if need not in ("base", "delta", *STATISTICS):
                    yield f"needs '{need}'{did_you_mean(need, ('base', 'delta', *STATISTICS))}"
        look = self.look
        for asked in list(inspect.signature(look.find).parameters.values())[1:] if look else ():
            if asked.name != "merge" and asked.name not in self.parameters:
                yield f"its look names '{asked.name}'{did_you_mean(asked.name, self.parameters)}"

    # ------------------------------------------------------------------------------------------ what it says of itself

    @property
    def family(self) -> str:
        """The folder of this package that it lies in, or `outside`."""
        return "outside" if self.is_outside else self.file.parent.name

    @cached_property
    def wraps(self) -> bool:
        """Whether it is a wrapper: its second argument is the inner method."""
        arguments = inspect.signature(self.function).parameters.values()
        return sum(p.kind is not p.KEYWORD_ONLY for p in arguments) > 1

    @property
    def look(self) -> Look | None:
        if self.measure is None or isinstance(self.measure, Look):
            return self.measure
        return Look(self.measure)

    # ------------------------------------------------------------------------------------------ parameters

    @cached_property
    def executed(self) -> dict[str, tuple[Any, Any]]:
        """Type and default of the parameters that the engine executes."""
        found: dict[str, tuple[Any, Any]] = {}
        if self.scale is not None:
            found["scale"] = (float, self.scale)
        if self.keys is not None:
            found["keys"] = (Keys, self.keys)
            if self.reference == "pretrained" and self.other in ("pretrained", "mean", "sum"):
                found["other"] = (Other, self.other)
            found["convolutions"] = (bool, True)
        return found

    def needs_of(self, params: Params) -> Sequence[str]:
        """What it needs, with these parameters."""
        return self.needs(params) if callable(self.needs) else self.needs

    def statistics_of(self, params: Params) -> list[str]:
        """The kinds of statistics that it reads, with these parameters."""
        return [need for need in self.needs_of(params) if need not in ("base", "delta")]

    def kinds(self, params: Params) -> list[str]:
        """The kinds of statistics that it, and what it wraps, reads with these parameters, which are resolved."""
        levels = self.levels(params)
        return sorted({kind for level in levels for kind in level.method.statistics_of(level.own(params))})

    @property
    def delta(self) -> bool:
        """Whether, without a base, it merges what bare factors of adapters add."""
        return not callable(self.needs) and "delta" in self.needs

    def reference_of(self, params: Params) -> Reference:
        """What its update is added to, with these parameters."""
        return self.reference(params) if callable(self.reference) else self.reference

    # ------------------------------------------------------------------------------------------ chains

    def levels(self, params: Params) -> list[Level]:
        """The method and what it wraps, from the outside in, each followed by what makes its origin.

        Raises:
            UserError: a name that is no method's, or that of a wrapper as an origin.
        """
        found: list[Level] = []
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
            found.append(Level(entry, names, given, bool(prefix)))
            return names

        entry = self
        while True:
            if len(found) > LONGEST_CHAIN:
                raise UserError(
                    f"{self.id}: a chain of more than {LONGEST_CHAIN} methods; write a shorter one"
                )
            names = add(entry)
            if not entry.wraps:
                return found
            defaults |= entry.inner_defaults
            if "origin" in names:
                add(entry._named(params, "origin", names), _OF_ORIGIN)
            entry = entry._named(params, "inner", names)

    def _named(self, params: Params, which: str, names: Mapping[str, str]) -> Method:
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

    def resolve(self, params: Params) -> dict[str, Any]:
        """All parameters, defaults filled in; a wrapper's with those of what it wraps.

        Raises:
            UserError: an unknown name, a value of the wrong type or out of range.
        """
        levels = self.levels(params)
        known = [flat for level in levels for flat in level.names.values()]
        for name in params:
            if name not in known:
                raise UserError(f"{self.id}: unknown parameter '{name}'{did_you_mean(name, known)}")
        return {name: value for level in levels for name, value in level.resolve(params).items()}

    def misuses(
        self, params: Params, experts: int, has_base: bool, statistics: Mapping[str, Any] | None = None
    ) -> Iterator[str]:
        """What is wrong with resolved parameters for so many experts, a sentence each."""
        wanted: list[str] = []
        for level in self.levels(params):
            own = level.own(params)
            yield from level.method._misuses(own, experts, has_base)
            wanted += level.method.statistics_of(own)
            has_base = has_base or level.is_origin or level.method.delta  # what is wrapped sees one
        given = statistics or {}
        yield from (
            f"{self.id} needs the statistics '{k}': name their file" for k in wanted if k not in given
        )
        yield from (f"{self.id} takes no statistics '{k}'" for k in given if k not in wanted)

    @cached_property
    def lists_of_experts(self) -> list[str]:
        """The parameters that may be lists of one number an expert."""
        return [name for name, annotation in self.annotations.items() if is_marked(annotation, OneAnExpert)]

    @cached_property
    def _numbers_of_experts(self) -> list[str]:
        return [name for name, annotation in self.annotations.items() if is_marked(annotation, AnExpert)]

    def _misuses(self, params: Params, experts: int, has_base: bool) -> Iterator[str]:
        least, most = self.experts
        if not has_base and "base" in self.needs_of(params):
            yield f"{self.id} measures from the base checkpoint: name it (--base, `base:`)"
        if experts < least:
            yield f"{self.id} needs at least {least} expert(s), got {experts}"
        if most and experts > most:
            yield f"{self.id} merges at most {most} expert(s), got {experts}"
        for name in self.lists_of_experts:
            value = params[name]
            if isinstance(value, list) and len(value) != experts:
                what = name if name in ("weights", "values") else f"numbers in {name}"
                yield f"{self.id}: {len(value)} {what} for {experts} experts; give one an expert, in order"
        for name in self._numbers_of_experts:
            if (value := params[name]) >= experts:
                yield f"{self.id}: {name} {value} is none of {experts} experts, counted from 0"
        weights = params.get("weights")
        if weights and params.get("normalize") and sum(weights) == 0:
            yield f"{self.id}: the weights sum to 0, so they cannot be normalised; set normalize to false"
        for sentence in self.check(params, experts) if self.check else ():
            if not isinstance(sentence, Note):
                yield f"{self.id}: {sentence}"

    def warnings(self, params: Params, experts: int) -> Iterator[str]:
        """What is legal but pointless with resolved parameters for so many experts, a sentence each."""
        for level in self.levels(params):
            check = level.method.check
            if check and not level.is_origin:
                yield from (s for s in check(level.own(params), experts) if isinstance(s, Note))


@dataclass(frozen=True)
class Level:
    """One method of a chain of wrappers, and where its parameters stand among those of the chain."""

    method: Method
    names: Mapping[str, str]  # its own name of a parameter -> the chain's
    defaults: Params  # that the wrappers around it change
    is_origin: bool  # of the level before it

    def own(self, params: Params) -> dict[str, Any]:
        """Its parameters among those of the chain, by its own names."""
        return {name: params[flat] for name, flat in self.names.items() if flat in params}

    def resolve(self, params: Params) -> dict[str, Any]:
        """Its parameters by the chain's names (raises UserError for a value of the wrong type or out of range)."""
        resolved = self.method.validated({**self.defaults, **self.own(params)})
        return {self.names[name]: value for name, value in resolved.items()}


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


# ---------------------------------------------------------------------------------------------- the catalogue


_METHODS: dict[str, Method] = {}
LEARNED: dict[str, Any] = {}  # those that are fitted to examples; the room `learning` says what they are


def method(**declared: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Add a function to the catalogue under its own name; see `Method` for what is declared.

    Raises:
        UserError: another method has the name.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        entry = Method(function, **declared)
        before = _METHODS.get(entry.id)
        if before and before.file != entry.file:
            raise UserError(f"{entry.file}: defines '{entry.id}', which is there already; rename it")
        _METHODS[entry.id] = entry
        return function

    return register


def catalogue() -> dict[str, Method]:
    """All methods by id, sorted."""
    _load_built_in()
    _load_plugins()
    return dict(sorted(_METHODS.items()))


def get_method(id: str) -> Method:
    """The method `id` (raises UserError with the nearest name if there is none)."""
    _load_built_in()
    if id in _METHODS:
        return _METHODS[id]
    methods = catalogue()
    if id not in methods:
        raise UserError(f"unknown method '{id}'{did_you_mean(id, methods)}")
    return methods[id]


@cache
def _load_built_in() -> None:
    package = importlib.import_module("mergeline.merging.methods")
    for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        importlib.import_module(found.name)


@cache
def _load_plugins() -> None:
    """Import what installed packages name in the entry point group `mergeline.methods`."""
    for point in importlib.metadata.entry_points(group=_PLUGINS):
        try:
            point.load()
        except ImportError as error:
            raise UserError(
                f"the methods of '{point.name}' cannot be imported ({error}); reinstall it"
            ) from None


def load_methods(path: Path) -> None:
    """Run a Python file that defines methods, once; they are in the catalogue afterwards.

    Raises:
        UserError: no such file, one that is no Python, fails when it is run, or defines no method.
    """
    path = path.resolve()
    _load_built_in()  # so that a name that is there already is this file's mistake
    if any(entry.file == path for entry in (*_METHODS.values(), *LEARNED.values())):
        return
    if not path.is_file() or path.suffix != ".py":
        raise UserError(f"{path}: no such Python file; --methods takes a file that defines methods")
    name = f"mergeline_methods_{path.stem}_{len(_METHODS)}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where annotations are looked up
    before, learned = set(_METHODS), set(LEARNED)
    try:
        spec.loader.exec_module(module)
    except UserError:
        raise
    except Exception as error:
        for id in set(_METHODS) - before:
            del _METHODS[id]
        for id in set(LEARNED) - learned:
            del LEARNED[id]
        raise UserError(f"{path}: fails when it is run ({type(error).__name__}: {error})") from None
    if set(_METHODS) == before and set(LEARNED) == learned:
        raise UserError(f"{path}: defines no method; decorate a function with @method(...)")
