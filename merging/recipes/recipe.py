"""A recipe: what to merge, how, into which dtype. It travels inside the merged checkpoint."""

from __future__ import annotations

import re
from math import prod
from pathlib import Path
from typing import Annotated, Any, Callable, Iterable, Literal, Mapping, Sequence

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_serializer,
    model_validator,
)

from mergeline.merging.errors import UserError, did_you_mean, plainly
from mergeline.merging.methods.contract import LONGEST_CHAIN

MOST_POINTS = 10_000
_SAID = ("stand_in", "chosen_on")  # where there is something to say


def _list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Patterns = Annotated[list[str], BeforeValidator(_list)]
Span = tuple[int, int]  # the first and the last layer


def unfolded(method: str, params: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """A chain such as `lines(dare(ties))` as its outermost method and the parameters inner: dare, inner_inner: ties.

    Raises:
        ValueError: parentheses that do not match, or params that name other methods.
    """
    ids = [part.strip() for part in method.rstrip(") ").split("(")]
    if len(ids) == 1 and ")" not in method:
        return method, dict(params)
    if re.sub(r"[^()]", "", method) != "(" * (len(ids) - 1) + ")" * (len(ids) - 1) or not all(ids):
        raise ValueError(f"'{method}' is no chain of methods; write one such as lines(dare(ties))")
    if len(ids) > LONGEST_CHAIN:
        raise ValueError(
            f"'{ids[0]}(...)' is a chain of {len(ids)} methods; write one of {LONGEST_CHAIN} at most"
        )
    named = {"inner_" * i + "inner": id for i, id in enumerate(ids[1:])}
    for key, id in named.items():
        if params.get(key, id) != id:
            raise ValueError(f"'{method}' names {id}, {key} names {params[key]}; leave one out")
    return ids[0], {**params, **named}


def unfolded_recipe(data: Any) -> Any:
    """What is written of a recipe, its `method` unfolded (raises ValueError as `unfolded`)."""
    if not isinstance(data, dict) or not isinstance(data.get("method"), str):
        return data
    params = data.get("params", {})
    if not isinstance(params, dict):
        return data
    method, params = unfolded(data["method"], params)
    return {**data, "method": method, "params": params}


def too_many_points(grid: Mapping[str, Sequence[Any]]) -> str | None:
    """What is wrong with a grid of parameter values that has more points than anyone can merge."""
    count = prod(map(len, grid.values()))
    return (
        f"the grid has {count} points, {MOST_POINTS} at most; list fewer values"
        if count > MOST_POINTS
        else None
    )


class Rule(BaseModel):
    """Other parameters for some tensors: later rules win over earlier ones.

    match: shell patterns of tensor names (`*.attn.*`), any of which is enough. layers: first and last block, counted
    from 0, negative ones from the end. gradient: a parameter's values over the depth, interpolated linearly from the
    first to the last block (of `layers`); tensors outside numbered blocks have no depth and are left alone.
    expert: the values are this expert's entries in parameters that are lists of one an expert.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    match: Patterns = ["*"]
    layers: Span | None = None
    params: dict[str, Any] = {}
    gradient: dict[str, Annotated[list[float], Field(min_length=1)]] = {}
    expert: str | None = None

    @model_serializer(mode="wrap")
    def _brief(self, dump: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        return {key: value for key, value in dump(self).items() if key != "expert" or value is not None}


class Part(BaseModel):
    """A run of layers of a stack, merged by the recipe's method with parameters of its own.

    layers: model -> its first and last layer, counted from 0, negative ones from the end; equally many of each. Models
    are the recipe's experts, and `base`. base: which of them task vectors are measured from; `base` if it is among
    them. The others are merged in this order. `expert: NAME` and `layers: [FIRST, LAST]` take one as it is, whatever
    the method; passthrough's `scale` alone changes it.

    params, rules: over those of the recipe. Lists of one number an expert are of the part's experts, in its order, and
    layers of rules are counted from the part's first. Embeddings belong to the first part of a stack, what comes after
    all layers to the last.

    match: of which tensors the part is, in models of several towers: each has parts of its own, which match the same
    names. A tensor belongs to the last parts that match it, and stays the base's if none does.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    expert: str | None = None
    layers: Span | dict[str, Span]
    base: str | None = None
    match: Patterns = ["*"]
    params: dict[str, Any] = {}
    rules: list[Rule] = []

    @model_validator(mode="after")
    def _one_way(self) -> Part:
        if isinstance(self.layers, dict) == (self.expert is not None):
            raise ValueError("write `layers: {NAME: [FIRST, LAST], ...}`, or `expert` and one pair of layers")
        if not self.spans:
            raise ValueError("layers: name a model and its first and last layer")
        if self.base is not None and self.base not in self.spans:
            raise ValueError(
                f"base '{self.base}' is not among the part's layers{did_you_mean(self.base, self.spans)}"
            )
        if self.origin != "base" and "base" in self.spans:
            raise ValueError(
                "'base' is the part's base where it is among its layers; name it as an expert, too"
            )
        _refuse_unlisted(self.rules, self.experts, self.params)
        return self

    @model_serializer(mode="wrap")
    def _brief(self, dump: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        dumped = {key: value for key, value in dump(self).items() if key == "layers" or value}
        return {key: value for key, value in dumped.items() if key != "match" or value != ["*"]}

    @property
    def spans(self) -> dict[str, Span]:
        """The layers of each model."""
        if isinstance(self.layers, dict):
            return self.layers
        return {self.expert: self.layers} if self.expert is not None else {}

    @property
    def origin(self) -> str | None:
        """The model that task vectors are measured from."""
        return self.base or ("base" if "base" in self.spans else None)

    @property
    def experts(self) -> list[str]:
        """The models that are merged."""
        return [name for name in self.spans if name != self.origin]


def _refuse_unlisted(rules: Sequence[Rule], experts: Sequence[str], params: Mapping[str, Any]) -> None:
    """Raises ValueError for a rule of one expert that is none of these, or that changes no list of theirs."""
    for rule in rules:
        if rule.expert is None:
            continue
        if rule.expert not in experts:
            raise ValueError(f"rules: no expert is named '{rule.expert}'{did_you_mean(rule.expert, experts)}")
        for key in (*rule.params, *rule.gradient):
            listed = params.get(key)
            if not isinstance(listed, list) or len(listed) != len(experts):
                raise ValueError(
                    f"rules: list '{key}' of every expert in params, of which a rule changes one"
                )


class TokenRow(BaseModel):
    """Whose row a token gets: of an expert, or `base`, that of the token, another `token`, or an `id`; or zeros.

    force: in all checkpoints; else in those that lack the token.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    expert: str | None = None
    token: str | None = None
    id: Annotated[int, Field(ge=0)] | None = None
    zero: bool = False
    force: bool = False

    @model_validator(mode="after")
    def _one_source(self) -> TokenRow:
        if self.zero == (self.expert is not None):
            raise ValueError("name the expert, or base, whose row the token gets; or set zero")
        if (
            self.token is not None
            and self.id is not None
            or self.zero
            and (self.token or self.id is not None)
        ):
            raise ValueError("give one of token, id and zero")
        return self


class Fitted(BaseModel):
    """What a recipe was fitted to, and so what its merge has seen.

    method, params: the learned method and its parameters. data: what it looked at. split: which part of the data; of
    `test` the test score of the merge is no measure. examples: task -> how many. digests: task -> of their content.
    trains: whether the weights were trained beyond what merging reaches. task_known: whether the task of an input must
    be known where the merge is used. stand_in: what the models were run on in place of data, or beside them. chosen_on:
    where the method's defaults come from, if from data that others do not have.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: str
    params: dict[str, Any]
    data: Literal["none", "unlabelled", "labelled"]
    split: str
    examples: dict[str, int]
    digests: dict[str, str]
    trains: bool = False
    task_known: bool = False
    stand_in: str = ""
    chosen_on: str = ""

    @model_serializer(mode="wrap")
    def _brief(self, dump: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        return {key: value for key, value in dump(self).items() if key not in _SAID or value}

    @property
    def words(self) -> str:
        """In words, such as `250 to 400 unlabelled a task of fit`."""
        if self.data == "none":
            return f"no data; {self.stand_in}" if self.stand_in else "none"
        least, most = (min(self.examples.values()), max(self.examples.values())) if self.examples else (0, 0)
        count = f"{least} to {most}" if least < most else str(most)
        drawn = f" and {self.stand_in}" if self.stand_in else ""
        return f"{count} {self.data} a task of {self.split}{drawn}" + (", trained" if self.trains else "")


class Recipe(BaseModel):
    """Paths are local safetensors files or folders; `experts` is in the order of all per-expert lists.

    `method: lines(dare(ties))` is short for `method: lines` with `params: {inner: dare, inner_inner: ties}`.

    Tensors that are not among `include`, or are among `exclude`, are not merged, nor compared: they become the base's
    (or the `average` of the experts, as `excluded` says), and are left out where it has none. `keep` takes tensors of
    some names from one expert, or `base`, as they are: PATTERN: EXPERT.

    `heads` are tensors that belong to a task, as classifiers do: each expert's own are written beside the merge,
    whatever their shapes (`merging.checkpoints.heads`); the merge itself has the base's, if that has any.

    `running_statistics` says whether the means and variances of BatchNorm are averaged, or merged as other tensors.

    `layout` says how experts of a mixture lie in the merge: each in tensors of its own, packed, or as in the base
    (`merging.checkpoints.layouts`).

    `methods` are Python files that define methods, and are run.

    `stack` makes a model of runs of layers, one after the other, each of the same or other experts: in another order,
    again, or without some. What an embedding or the last norm is merged of, its first and last part say.

    `onto` says what an adapter adds to, where that is not the base: the checkpoint of an expert that is an adapter, or
    of `base` if that is one: NAME: PATH.

    `tokens` says where the rows of some tokens come from, and adds those that nobody has. With `pad_to_multiple_of` the
    embeddings have as many rows as tokens, rounded up; else padding stays. `missing_tokens` says what stands in for a
    token that a checkpoint lacks: the row of the `first` that has it, the base's before others'; the `mean` of those
    that have it; or the row of a checkpoint by its name, or the mean. `chat_template` replaces the tokenizer's own.

    `notes` are what a reader of another format has to say; they change nothing.

    `fitted` says what a recipe that a fit gave was fitted to; it changes no weight, but travels with them.
    `adapters` lie beside the merge, and correct it where the task of an input is known: TASK: FILE
    (`merging.checkpoints.task_adapters`); `router` lies beside a compressed store, and finds the expert of an input
    (`merging.checkpoints.router`). Both are made by learned methods.

    `packing` says how LoRA's factors of packed experts lie in adapters, which their files do not say
    (`merging.checkpoints.adapters.packed`).

    `prompt_rows` says whether rows of soft prompts that have no order are matched to those of the base, or of the first
    expert, or merged by the places where they lie (`merging.engine.prompts`).

    `allow_locked` merges experts that are locked against it (`merging.engine.mergelock`), as their owner must permit.

    `requantise` writes what is quantised in the base in the base's own format, where that is a plain rounding.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: str
    params: dict[str, Any] = {}
    experts: dict[str, Path]
    base: Path | None = None
    onto: dict[str, Path] = {}
    statistics: dict[str, Path | list[Path]] = {}
    include: Patterns = ["*"]
    exclude: Patterns = []
    excluded: Literal["base", "average"] = "base"
    keep: dict[str, str] = {}
    heads: Patterns = []
    running_statistics: Literal["average", "merge"] = "average"
    layout: Literal["as_base", "packed", "per_expert"] = "as_base"
    rules: list[Rule] = []
    stack: list[Part] = []
    # None: each tensor keeps that of the base, or the first expert; widest: what holds those of all
    dtype: Literal["float32", "float16", "bfloat16", "float64", "widest"] | None = None
    seed: Seed = 0
    shard_size: Annotated[int, Field(gt=0)] | None = None  # bytes a file; None writes one file
    # Whose configuration and tokenizer are carried over; None: the base's, or the first expert's without a base.
    donor: str | None = None
    vocabulary: Literal["donor", "union"] = "donor"  # whose tokens the merge has, where vocabularies differ
    packing: Literal["peft", "unsloth"] = "peft"  # how LoRA's factors of packed experts lie
    prompt_rows: Literal["matched", "as_stored"] = "matched"  # of soft prompts without order
    tokens: dict[str, TokenRow] = {}
    pad_to_multiple_of: Annotated[int, Field(ge=1, le=1 << 20)] | None = None
    missing_tokens: str = "first"
    chat_template: str | None = None
    allow_locked: bool = False
    requantise: bool = False
    methods: list[Path] = []
    fitted: Fitted | None = None
    adapters: dict[str, Path] = {}
    router: Path | None = None
    notes: list[str] = []

    @model_serializer(mode="wrap")
    def _brief(self, dump: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        late = {
            "packing": "peft",
            "prompt_rows": "matched",
            "allow_locked": False,
            "requantise": False,
            "keep": {},
            "heads": [],
            "running_statistics": "average",
            "layout": "as_base",
            "methods": [],
            "fitted": None,
            "adapters": {},
            "router": None,
            "onto": {},
            "tokens": {},
            "pad_to_multiple_of": None,
            "missing_tokens": "first",
            "chat_template": None,
            "notes": [],
        }
        return {key: value for key, value in dump(self).items() if key not in late or value != late[key]}

    @model_validator(mode="before")
    @classmethod
    def _unfold(cls, data: Any) -> Any:
        return unfolded_recipe(data)

    @model_validator(mode="after")
    def _lists(self) -> Recipe:
        selected = self.include != ["*"] or self.exclude or self.keep or self.heads
        if self.stack and (selected or self.rules or self.statistics):
            raise ValueError(
                "stack: is of whole models, without statistics, include, exclude, keep and heads; "
                "rules stand in its parts"
            )
        _refuse_unlisted(self.rules, list(self.experts), self.params)
        for name in self.onto:
            if name not in self.experts and not (name == "base" and self.base):
                raise ValueError(
                    f"onto: '{name}' is neither the base nor an expert{did_you_mean(name, self.experts)}"
                )
        return self

    def refuse_set_by_parts(self, names: Iterable[str]) -> None:
        """Raises UserError for a parameter that a part of the stack sets: another value would change nothing."""
        for name in names:
            for i, part in enumerate(self.stack):
                if any(name in values for values in (part.params, *(r.params for r in part.rules))):
                    raise UserError(
                        f"'{name}' is set by part {i + 1} of the stack, whose own counts; change it there"
                    )

    @classmethod
    def of(cls, value: Recipe | Mapping[str, Any]) -> Recipe:
        """A recipe from a recipe or a mapping (raises UserError if a key or value is wrong)."""
        if isinstance(value, Recipe):
            return value
        try:
            return cls.model_validate(dict(value))
        except ValidationError as error:
            first = error.errors()[0]
            raise UserError(f"recipe: {'.'.join(map(str, first['loc']))}: {plainly(first)}") from None

    @property
    def settings(self) -> dict[str, Any]:
        """What decides the result besides the checkpoints, as JSON values."""
        named = (
            "include",
            "exclude",
            "excluded",
            "keep",
            "heads",
            "running_statistics",
            "layout",
            "rules",
            "stack",
            "dtype",
            "seed",
            "shard_size",
            "donor",
            "vocabulary",
            "packing",
            "prompt_rows",
            "tokens",
            "pad_to_multiple_of",
            "missing_tokens",
            "chat_template",
            "allow_locked",
            "requantise",
            "fitted",
        )
        return self.model_dump(mode="json", include=set(named))
