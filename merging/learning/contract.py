"""What a learned method is: a function that looks at examples and returns a recipe, and what it declares about itself.

    @learned(paper="2310.02575", data="unlabelled", fits=coefficients)
    def adamerging(job: Job, *, rate: Positive = 1e-3) -> Recipe: ...

The recipe is of ordinary methods: what was learned stands in its parameters and rules, or in files of the job's folder
that it names as statistics, so that the engine merges it, resumes and verifies it like any other. Keyword-only
arguments are the method's parameters. One of them may be `inner: str`, the method that gives what the fit starts from;
its parameters stand beside, as those of a wrapper's inner method do.

The docstring is the method's page, with the sections of other methods.
"""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import KW_ONLY, dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Literal, Mapping

from mergeline.merging.errors import UserError, did_you_mean
from mergeline.merging.files import read_object, write_json
from mergeline.merging.learning.network import Examples, Network
from mergeline.merging.methods.contract import LEARNED, Declared, Method, catalogue, get_method
from mergeline.merging.recipes.recipe import Recipe

if TYPE_CHECKING:
    from mergeline.merging.engine.work import Progress

Data = Literal["unlabelled", "labelled", "none"]
Marked = Literal["", "reconstructed", "provisional"]  # where no official code was found

SAID = "said"  # among the notes of a job


@dataclass(frozen=True)
class Job:
    """What a learned method is given.

    recipe: the base and the experts, what is selected of them, the dtype and the seed; its method and params are the
    learned method's own. network: of the base's architecture. folder: where files that the result names are written,
    and where a fit that was killed goes on. progress: is told how many steps of how many are done. facts: what decides
    the result, so that what a killed fit left is only used for the same. notes: what a method says of its result beside
    the recipe, as JSON values, for fit.json.
    """

    recipe: Recipe
    network: Network
    examples: Examples
    folder: Path
    progress: Progress | None = None
    device: str = "cpu"
    facts: Mapping[str, Any] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)

    def say(self, line: str) -> None:
        """Have `fit` warn of what the user should know of the result."""
        self.notes.setdefault(SAID, []).append(f"{self.recipe.method}: {line}")


@dataclass(frozen=True, eq=False)
class LearnedMethod(Declared):
    """A learned method with what it declares about itself.

    data: what it looks at beside the weights. trains: whether the weights leave what merging experts can reach, so that
    it is training, and said to be. task_known: whether its result needs to know the task of an input. routed: whether
    the result is a compressed store with a router, for `merging.compress`. stand_in: what it runs the models on in
    place of data, or beside them where its `drawn` asks for some. chosen_on: where its defaults come from, if from data
    that others do not have. pool: whether experts without examples of a task of their own are of use to it.
    """

    function: Callable[..., Recipe]
    _: KW_ONLY
    paper: str
    code: str = ""
    data: Data = "unlabelled"
    marked: Marked = ""
    trains: bool = False
    task_known: bool = False
    routed: bool = False
    stand_in: str = ""
    chosen_on: str = ""
    pool: bool = False

    @property
    def family(self) -> str:
        return "outside" if self.is_outside else "learned"

    @property
    def wraps(self) -> bool:
        """Whether the fit starts from what another method gives."""
        return "inner" in self.parameters

    def resolve(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """All its parameters, defaults filled in; those of the inner method as they are given, but checked.

        Raises:
            UserError: an unknown name, a value of the wrong type or out of range.
        """
        own = {name: value for name, value in params.items() if name in self.parameters}
        others = {name: value for name, value in params.items() if name not in own}
        resolved = self.validated(own)
        if "inner" in resolved:
            inner = resolved["inner"]
            (learned_methods()[inner] if is_learned(inner) else get_method(inner)).resolve(others)
        elif others:
            name = next(iter(others))
            raise UserError(f"{self.id}: unknown parameter '{name}'{did_you_mean(name, self.parameters)}")
        return resolved | others

    def data_of(self, params: Mapping[str, Any]) -> Data:
        """What it looks at with these parameters: labels, if it has an `objective`, where that compares with them."""
        from mergeline.merging.learning.objectives import objective_of

        objective = params.get("objective")
        if not objective:
            return self.data
        if objective_of(objective).labels:
            return "labelled"
        return "unlabelled" if self.data == "labelled" else self.data

    def stand_in_of(self, params: Mapping[str, Any]) -> str:
        """What it runs the models on in place of data, or beside them, with these parameters of `resolve`."""
        if self.stand_in and params.get("drawn", True):
            return self.stand_in
        if not is_learned(params.get("inner", "")):
            return ""
        inner = learned_methods()[params["inner"]]
        return inner.stand_in_of(inner.resolve(self.inner_params(params)))

    def inner_params(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """The parameters of the inner method among those of `resolve`."""
        return {name: value for name, value in params.items() if name not in self.parameters}


def learned(**declared: Any) -> Callable[[Callable[..., Recipe]], Callable[..., Recipe]]:
    """Add a function to the learned methods under its own name; see `LearnedMethod` for what is declared."""

    def register(function: Callable[..., Recipe]) -> Callable[..., Recipe]:
        entry = LearnedMethod(function, **declared)
        if entry.id in LEARNED and LEARNED[entry.id].file != entry.file:
            raise UserError(f"'{entry.id}' is a learned method already, of {LEARNED[entry.id].file}")
        LEARNED[entry.id] = entry
        return function

    return register


def learned_methods() -> Mapping[str, LearnedMethod]:
    """All learned methods by id, sorted; those of files and packages that were imported, too."""
    _load_built_in()
    return dict(sorted(LEARNED.items()))


@cache
def _load_built_in() -> None:
    package = importlib.import_module("mergeline.merging.learning.methods")
    for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        importlib.import_module(found.name)


def is_learned(id: str) -> bool:
    """Whether a learned method has this id."""
    return id in learned_methods()


def inner_recipe(job: Job, inner: str, params: Mapping[str, Any]) -> Recipe:
    """The recipe of what a job starts from: of an ordinary method, or of a learned one, which is fitted first.

    Raises:
        UserError: the method does not give one merge, or as it does itself.
    """
    recipe = Recipe.of({**job.recipe.model_dump(), "method": inner, "params": dict(params)})
    if not is_learned(inner):
        return recipe
    method, folder = learned_methods()[inner], job.folder / "inner"
    if method.task_known or method.routed:
        raise UserError(
            f"inner: {inner} knows or finds the task by itself; take a method that gives one merge"
        )
    done = folder / "start.json"
    if not done.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        own = Job(recipe, job.network, job.examples, folder, job.progress, job.device)
        made = method.function(own, **method.resolve(params)).model_dump(mode="json")
        write_json(done, {"recipe": made, SAID: own.notes.get(SAID, [])})
    found = read_object(done)
    if found[SAID]:
        job.notes[SAID] = [*job.notes.get(SAID, []), *found[SAID]]
    return Recipe.of(found["recipe"])


def any_method(id: str) -> Method | LearnedMethod:
    """The method `id`, learned or not (raises UserError with the nearest name if there is none)."""
    try:
        return get_method(id)  # most are; the learned ones take as long to import again
    except UserError:
        known = learned_methods()
        if id in known:
            return known[id]
        raise UserError(f"unknown method '{id}'{did_you_mean(id, [*catalogue(), *known])}") from None


def engine_method(id: str) -> Method:
    """The method `id` of those that merge without examples (raises UserError, which says so of a learned one)."""
    found = any_method(id)
    if isinstance(found, LearnedMethod):
        raise UserError(
            f"{id} is fitted to examples first: name it in params.yaml, or see `mergeline fit --help`"
        )
    return found
