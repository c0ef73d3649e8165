"""Planning: a recipe resolved against the headers of its checkpoints; no tensor data is read."""

from __future__ import annotations

import json
from dataclasses import replace
from fnmatch import fnmatchcase
from itertools import product
from math import prod
from typing import Any, Iterator, Mapping

from mergeline.merging.algebra.slots import MatrixView
from mergeline.merging.algebra.statistics import STATISTICS
from mergeline.merging.architecture import RUNNING_STATISTICS, Role
from mergeline.merging.canonical import canonical_json
from mergeline.merging.checkpoints.carried import layer_keys
from mergeline.merging.checkpoints.checkpoint import TensorInfo
from mergeline.merging.checkpoints.companions import read_config
from mergeline.merging.engine.entries import make_entry
from mergeline.merging.engine.opening import PLAIN_NAME, Headers, find_donor, only_adapters, open_inputs
from mergeline.merging.engine.plan import Action, Entry, Plan
from mergeline.merging.engine.requantising import say_what_is_written
from mergeline.merging.engine.stack import Stacked, stack
from mergeline.merging.errors import UserError, did_you_mean
from mergeline.merging.methods.bound import Bound, bind
from mergeline.merging.methods.contract import get_method, load_methods
from mergeline.merging.recipes.recipe import Recipe
from mergeline.merging.recipes.rules import is_head, is_merged, parameters_for, parameters_in_part, values_of


def make_plan(recipe: Recipe | Mapping[str, Any], headers: Headers | None = None) -> Plan:
    """Resolve a recipe against the headers of its checkpoints; reads no tensor data and never raises for them.

    headers: what other plans of the same run have read.

    Raises:
        UserError: the recipe itself has unknown keys or values of the wrong type.
    """
    recipe = Recipe.of(recipe)
    for file in recipe.methods:
        load_methods(file)
    plan, headers = Plan(recipe), headers or Headers()
    _resolve_method(plan)
    open_inputs(plan, headers)
    if not plan.problems:
        find_donor(plan)
    if not plan.problems:
        _stack_layers(plan, headers) if recipe.stack else _match_tensors(plan, headers)
    if not plan.problems:
        say_what_is_written(plan)
    return plan


def _resolve_method(plan: Plan) -> None:
    plan.warnings += plan.recipe.notes
    try:
        plan.method = get_method(plan.recipe.method)
        plan.params = plan.method.resolve(plan.recipe.params)
    except UserError as error:
        plan.problems.append(str(error))
        return
    if plan.recipe.stack:
        return  # each part has experts of its own
    count = len(plan.recipe.experts)
    # of adapters alone, what they add is merged, and no more is needed
    has_base = plan.recipe.base is not None or only_adapters(plan.recipe)
    plan.problems += plan.method.misuses(plan.params, count, has_base, plan.recipe.statistics)
    plan.warnings += plan.method.warnings(plan.params, count)


def _stack_layers(plan: Plan, headers: Headers) -> None:
    """Entries of a stack: each tensor is merged of its part's experts, or copied where that is the same."""
    assert plan.method is not None
    parts = plan.recipe.stack
    try:
        made = plan.stack = stack(plan.checkpoints, parts)
    except UserError as error:
        plan.problems.append(str(error))
        return
    if plan.bound.looks_at_model and len({(part.origin, *part.experts) for part in parts}) > 1:
        plan.problems.append(
            f"{plan.method.id} measures the whole model with these parameters, and the parts of the stack are of "
            "different models; choose others, or another method"
        )
        return
    config = read_config(plan.donor) if plan.donor else {}
    for tower in filter(None, made.layers):
        if config and not layer_keys(config, tower)[1]:
            plan.problems.append(
                f"stack: {plan.donor}/config.json does not say how many layers '{tower}' has, so that it cannot be "
                "made true of others"
            )
    plan.base, plan.experts = made.checkpoints.get("base"), {n: made.checkpoints[n] for n in plan.experts}
    shapes = {name: next(iter(tensor.sources.values())).shape for name, tensor in made.tensors.items()}
    shapes |= {name: info.shape for name, info in made.rest.items()}
    plan.model = headers.describe(shapes, config)
    bounds = _Bounds(plan, list(made.tensors))
    for name, tensor in sorted(made.tensors.items()):
        base = {name: tensor.base} if tensor.base else {}
        bound = bounds.in_part(name, tensor)
        if problem := _mismatch(name, tensor.sources, base):
            plan.problems.append(f"stack: {problem}")
        elif tensor.base and not parts[tensor.part].experts:
            plan.entries.append(make_entry(plan, "copy", name, {}, tensor.base))
        elif not next(iter(tensor.sources.values())).is_float or bound.copies:
            plan.entries.append(
                make_entry(plan, "copy", name, tensor.sources, None if bound.copies else tensor.base)
            )
        else:
            plan.entries.append(make_entry(plan, "merge", name, tensor.sources, tensor.base, bound))
    for name, info in made.rest.items():
        plan.entries.append(make_entry(plan, "copy", name, {}, info))
    if made.rest:
        plan.warnings.append(
            f"stack: {len(made.rest)} tensors are of no part, '{min(made.rest)}' first, and stay the base's"
        )
    plan.entries.sort(key=lambda entry: entry.name)
    plan.warnings += bounds.warnings
    unused = [name for name in plan.checkpoints if not any(name in part.spans for part in parts)]
    plan.warnings += [f"stack: no part takes layers of '{name}'" for name in unused]
    plan.warnings += _untreated(plan)


def _match_tensors(plan: Plan, headers: Headers) -> None:
    _map_prefix(plan)
    base = plan.base.tensors if plan.base else {}
    in_experts = sorted({name for c in plan.experts.values() for name in c.tensors})
    plan.problems += _unmatched_patterns(plan, sorted({*in_experts, *base}))
    merged = [name for name in in_experts if is_merged(plan.recipe, name) and not _kept_from(plan, name)]
    plan.problems += _missing(plan, merged, base)
    if plan.problems:
        return
    shapes = {name: info.shape for c in plan.experts.values() for name, info in c.tensors.items()}
    plan.model = headers.describe(shapes | {name: info.shape for name, info in base.items()}, plan.parts)
    bounds = _Bounds(plan, merged)
    for name in merged:
        sources = {e: c.tensors[name] for e, c in plan.experts.items()}
        problem = _mismatch(name, sources, base)
        if problem:
            plan.problems.append(problem)
        elif next(iter(sources.values())).is_float:
            plan.entries.append(make_entry(plan, "merge", name, sources, base.get(name), bounds.of(name)))
        else:
            action: Action = "largest" if plan.model.tensors[name].role is Role.COUNTER else "copy"
            plan.entries.append(make_entry(plan, action, name, sources, base.get(name)))
    _select(plan, sorted({*in_experts, *base} - set(merged)), base, bounds)
    _keep_heads(plan)
    plan.entries.sort(key=lambda e: e.name)
    plan.problems += _statistics_mismatches(plan)
    if not plan.problems:
        plan.warnings += _partial_statistics(plan)
    plan.warnings += _untreated(plan)
    plan.warnings += _running_statistics(plan)


def _map_prefix(plan: Plan) -> None:
    """Let a base whose names have, or lack, one prefix that the experts' lack, or have, stand under their names."""
    if not plan.base:
        return
    base = plan.base.tensors
    experts = {name for c in plan.experts.values() for name in c.tensors if is_merged(plan.recipe, name)}
    if not base or not experts or experts & set(base):
        return
    ordered = sorted(experts)
    for like, name in product((ordered[0], ordered[len(ordered) // 2]), base):
        longer, shorter = (name, like) if len(name) > len(like) else (like, name)
        prefix = longer.removesuffix(shorter)
        if prefix == longer or not prefix.endswith("."):
            continue
        renamed = {n.removeprefix(prefix) if longer is name else prefix + n: info for n, info in base.items()}
        if 2 * len(experts & renamed.keys()) > len(experts):  # the others will be named as missing
            plan.base = plan.base.view(renamed)
            verb = "has" if longer is name else "lacks"
            plan.warnings.append(
                f"the base {verb} the prefix '{prefix}' in all names, unlike the experts: mapped to theirs"
            )
            return


def _kept_from(plan: Plan, name: str) -> str | None:
    """Whose tensor is kept as it is, as the recipe's `keep` says."""
    return next((who for pattern, who in plan.recipe.keep.items() if fnmatchcase(name, pattern)), None)


def _unmatched_patterns(plan: Plan, names: list[str]) -> Iterator[str]:
    """A sentence for each pattern that no tensor matches."""
    recipe = plan.recipe
    options = {
        "include": recipe.include,
        "exclude": recipe.exclude,
        "keep": recipe.keep,
        "heads": recipe.heads,
    }
    for option, patterns in options.items():
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in names):
                yield f"{option}: no tensor matches '{pattern}'{did_you_mean(pattern, names)}"
    for pattern, who in recipe.keep.items():
        if who != "base" and who not in plan.experts:
            yield f"keep: '{pattern}' is to be kept from '{who}', which is no expert{did_you_mean(who, plan.experts)}"


def _select(plan: Plan, names: list[str], base: dict[str, TensorInfo], bounds: _Bounds) -> None:
    """What is not merged: kept from whom the recipe says, averaged, the base's, or left out where that lacks it."""
    carried, left_out, base_only = [], [], []
    for name in names:
        who = _kept_from(plan, name)
        origin = plan.base if who == "base" else plan.experts.get(who or "")
        sources = {e: c.tensors[name] for e, c in plan.experts.items() if name in c.tensors}
        if is_head(plan.recipe, name) and not who:
            plan.entries += [make_entry(plan, "copy", name, {}, base[name])] if name in base else []
        elif who and (origin is None or name not in origin.tensors):
            plan.problems.append(f"keep: '{who}' has no tensor '{name}'")
        elif who == "base":
            plan.entries.append(make_entry(plan, "copy", name, {}, base[name]))
        elif who:
            plan.entries.append(make_entry(plan, "copy", name, {who: sources[who]}, None))
        elif plan.recipe.excluded == "average" and sources and not is_merged(plan.recipe, name):
            _average(plan, name, sources, base, bounds)
        elif name in base and not sources and plan.recipe.heads:
            base_only.append(name)
        elif name in base:
            plan.entries.append(make_entry(plan, "copy", name, {}, base[name]))
            carried += [] if sources else [name]
        else:
            left_out.append(name)
    if carried:
        plan.warnings.append(
            f"{len(carried)} tensors that only the base has are copied from it, {carried[0]!r} first"
        )
    if base_only:
        plan.warnings.append(
            f"{len(base_only)} tensors that only the base has are left out, {base_only[0]!r} first: heads go onto what "
            "the experts have"
        )
    if left_out and plan.base is None:
        plan.problems.append(
            "excluded tensors become the base's: name a base, say whose they are with `keep`, or set "
            "`excluded: average`"
        )
    elif left_out:
        plan.warnings.append(
            f"{len(left_out)} tensors that are excluded and that the base lacks are left out, {left_out[0]!r} first; "
            "`keep` takes them from an expert"
        )


def _keep_heads(plan: Plan) -> None:
    """What lies beside the merge of every expert."""
    if not plan.recipe.heads:
        return
    for expert, checkpoint in plan.experts.items():
        plan.heads[expert] = [name for name in checkpoint.tensors if is_head(plan.recipe, name)]
        if not plan.heads[expert]:
            plan.problems.append(f"heads: expert '{expert}' has no tensor of these names")
        if not PLAIN_NAME.fullmatch(expert):
            plan.problems.append(f"heads: '{expert}' names a file; take letters, digits, '_' and '-'")
    names = sorted({name for own in plan.heads.values() for name in own})
    beside = "of each expert lie beside the merge" + ("" if plan.base else ", which has none itself")
    plan.warnings.append(f"heads: {', '.join(names[:4])}{' ...' if len(names) > 4 else ''} {beside}")


def _average(
    plan: Plan, name: str, sources: dict[str, TensorInfo], base: dict[str, TensorInfo], bounds: _Bounds
) -> None:
    missing = [expert for expert in plan.experts if expert not in sources]
    problem = f"expert '{missing[0]}' lacks '{name}'" if missing else _mismatch(name, sources, base)
    if problem:
        plan.problems.append(problem)
    elif next(iter(sources.values())).is_float:
        plan.entries.append(make_entry(plan, "merge", name, sources, base.get(name), bounds.average))
    else:
        plan.entries.append(make_entry(plan, "copy", name, sources, base.get(name)))


def _untreated(plan: Plan) -> Iterator[str]:
    """A sentence if a method of matrices finds none, or if it is not known what a tensor of packed experts holds."""
    levels = [part for part in plan.bound.chain if part.method.keys]
    for level in levels:
        if plan.merged and not any(level.treats(entry.header) for entry in plan.merged):
            words = ", ".join(sorted({level.treatment(entry.header) for entry in plan.merged}))
            yield (
                f"{level.method.id} finds no matrix among {len(plan.merged)} tensors (keys: {level.params['keys']}): "
                f"it gives {words}; set keys, or choose another method"
            )
    unsplit = [e for e in plan.merged if levels and plan.model and plan.model.tensors[e.name].unsplit]
    if unsplit and plan.model:
        yield (
            f"{len(unsplit)} tensors of packed experts are no matrices to {levels[0].method.id}, first "
            f"'{unsplit[0].name}': {plan.model.tensors[unsplit[0].name].unsplit}"
        )


def _running_statistics(plan: Plan) -> Iterator[str]:
    """A sentence on BatchNorm's statistics, and on counters."""
    if plan.model is None:
        return
    running = [e for e in plan.entries if e.bound and plan.model.tensors[e.name].role in RUNNING_STATISTICS]
    if running and plan.recipe.running_statistics == "average":
        yield (
            f"{len(running)} running means and variances of BatchNorm are averaged, whatever the method; they belong "
            "to the unmerged weights: recompute them on data (the learned method reset_batch_norm)"
        )
    counters = [e for e in plan.entries if e.action == "largest"]
    if counters:
        yield f"{len(counters)} integer counters need not agree: the largest is taken, {counters[0].name!r} first"


def _statistics_mismatches(plan: Plan) -> Iterator[str]:
    """A sentence for each kind of statistics with too few or many files, or with a tensor of another shape or none."""
    views = {entry.name: entry.header for entry in plan.entries}
    read = {kind: {n for e in plan.merged if _reads(e, kind) for n in _names(e)} for kind in plan.statistics}
    merged = []
    for entry in plan.merged:
        pieces = entry.bound.pieces(entry.header) if entry.bound and prod(entry.spec.shape) else []
        views |= {piece.name: piece for piece in pieces}
        merged += [(piece.name, entry.name) for piece in pieces]
    for kind, files in plan.statistics.items():
        if len(files) not in (1, len(plan.experts)):
            yield f"statistics '{kind}': {len(files)} files for {len(plan.experts)} experts; one an expert, in order"
        for file in files:
            for key, info in file.tensors.items():
                if STATISTICS[kind].free:
                    continue
                view = views.get(key, views.get(key.partition("/")[2]))
                shape = info.shape
                if view is not None and (not STATISTICS[kind].squared_side or view.name in read[kind]):
                    shape = STATISTICS[kind].shape(view.shape if view.stored_shape else (), view.inputs)
                if isinstance(view, MatrixView) and view.is_whole and STATISTICS[kind].by_entry:
                    # They lie as the weights do; of a convolution they may be unfolded, which moves nothing.
                    folded = info.shape == shape and not view.matrix.transposed
                    shape = info.shape if folded else view.stored_shape
                if info.shape != shape:
                    yield (
                        f"statistics '{kind}': '{key}' of {file.path} has shape {list(info.shape)}, "
                        f"the tensor {list(shape)}"
                    )
                    break
        if len(files) in (1, len(plan.experts)) and not STATISTICS[kind].partial:
            yield from _missing_statistics(plan, kind, merged)


def _reads(entry: Entry, kind: str) -> bool:
    """Whether a method that reads this kind of statistics treats the tensor."""
    parts = entry.bound.parts if entry.bound else ()
    return any(kind in part.statistics and part.treats(entry.header) for part in parts)


def _names(entry: Entry) -> list[str]:
    """The names of the matrices that a tensor consists of to its method, or its own."""
    assert entry.bound is not None
    return [piece.name for piece in entry.bound.pieces(entry.header)] if prod(entry.spec.shape) else []


def _partial_statistics(plan: Plan) -> Iterator[str]:
    """Marks matrices of which there are no Gram matrices; a sentence on these, and on those that are not read.

    Adds a problem where some experts have one of a matrix, and others not.
    """
    for kind in (kind for kind in plan.statistics if STATISTICS[kind].squared_side):
        without: list[str] = []
        unread: list[str] = []
        matrices = 0
        for i, entry in enumerate(plan.entries):
            if entry.bound is None or entry.bound.method is not plan.method:
                continue
            for name in _names(entry):
                found = [_has(plan, kind, f"{t}/{name}") for t in range(len(plan.experts))]
                if not _reads(entry, kind):
                    unread += [name] if any(found) else []
                    continue
                matrices += 1
                if any(found) and not all(found):
                    lacking = list(plan.experts)[found.index(False)]
                    plan.problems.append(
                        f"statistics '{kind}' of expert '{lacking}' lack the tensor '{name}'"
                    )
                elif not any(found):
                    without.append(name)
                    plan.entries[i] = replace(plan.entries[i], lacks=(kind,))
        if without:
            yield (
                f"statistics '{kind}': {len(without)} of {matrices} matrices have none, first '{without[0]}': "
                "they are merged without"
            )
        if unread:
            yield (
                f"statistics '{kind}': those of {len(unread)} tensors are not read, first '{unread[0]}', which is no "
                f"matrix to {plan.recipe.method}; set keys to have it merged by them"
            )


def _has(plan: Plan, kind: str, key: str) -> bool:
    checkpoint, key = plan.statistics_of(kind, key)
    return key in checkpoint.tensors


def _missing_statistics(plan: Plan, kind: str, names: list[tuple[str, str]]) -> Iterator[str]:
    """A sentence if a tensor that is merged has no statistics. names: of pieces, and of the tensors they lie in."""

    def is_there(t: int, name: str) -> bool:
        checkpoint, key = plan.statistics_of(kind, f"{t}/{name}")
        return key in checkpoint.tensors or len(plan.statistics[kind]) == 1 and name in checkpoint.tensors

    for t, expert in enumerate(plan.experts):
        for name, whole in names:
            if not is_there(t, name) and not (STATISTICS[kind].by_entry and is_there(t, whole)):
                yield f"statistics '{kind}' of expert '{expert}' lack the tensor '{name}'"
                return


class _Bounds:
    """The method of each tensor with the parameters that the rules give it; mistakes in them become problems, once."""

    def __init__(self, plan: Plan, names: list[str]):
        assert plan.model is not None and plan.method is not None
        self.plan, self.model, self.method = plan, plan.model, plan.method
        self.average = bind(get_method("average"), {})
        self.alone = bind(get_method("passthrough"), get_method("passthrough").resolve({}))
        self._known: dict[str, Bound] = {}
        self.warnings: list[str] = []  # of the parts of a stack
        for rule in plan.recipe.rules:
            if not any(values_of(rule, name, self.model) for name in names):
                plan.warnings.append(
                    f"a rule changes nothing: match {json.dumps(rule.match)}, layers {rule.layers}"
                )

    def of(self, name: str) -> Bound:
        recipe = self.plan.recipe
        if self.model.tensors[name].role in RUNNING_STATISTICS and recipe.running_statistics == "average":
            return self.average
        params = parameters_for(recipe, name, self.model)
        key = canonical_json(params)
        if key not in self._known:
            self._known[key] = self._bind(name, params)
        return self._known[key]

    def in_part(self, name: str, tensor: Stacked) -> Bound:
        """The method of a tensor of a stack, for the experts and the base of its part."""
        recipe, part = self.plan.recipe, self.plan.recipe.stack[tensor.part]
        if part.expert is not None and self.method.id != "passthrough":
            problem = (
                f"stack: part {tensor.part + 1} is '{part.expert}' as it is, and takes no params and rules"
            )
            if (part.params or part.rules) and problem not in self.plan.problems:
                self.plan.problems.append(problem)
            return self.alone
        listed = self.plan.bound.lists_of_experts
        params = parameters_in_part(recipe, part, listed, name, tensor.layer, tensor.count)
        key = canonical_json([part.experts, part.origin, params])
        if key not in self._known:
            known = len(self.plan.problems)
            bound = self._known[key] = self._bind(name, params)
            if part.experts and known == len(self.plan.problems):
                count, found = len(part.experts), self.method.resolve(params)
                misuses = self.method.misuses(found, count, part.origin is not None)
                self.plan.problems += [f"stack: part {tensor.part + 1}: {problem}" for problem in misuses]
                self.warnings += [w for w in self.method.warnings(found, count) if w not in self.warnings]
                return bound
        return self._known[key]

    def _bind(self, name: str, params: dict[str, Any]) -> Bound:
        plan, method = self.plan, self.method
        try:
            resolved = method.resolve(params)
        except UserError as error:
            plan.problems.append(f"tensor '{name}': {error}")
            return plan.bound
        if resolved == plan.params:
            return plan.bound
        if not plan.recipe.stack:
            misuses = method.misuses(
                resolved, len(plan.experts), plan.base is not None, plan.recipe.statistics
            )
            plan.problems += [f"tensor '{name}': {problem}" for problem in misuses]
        bound = bind(method, resolved)
        for key in sorted(plan.bound.look_parameters | bound.look_parameters):
            if resolved.get(key) != plan.params.get(key):
                plan.problems.append(
                    f"tensor '{name}': {method.id} measures the whole model with '{key}', which a rule cannot change"
                )
        return bound


def _missing(plan: Plan, names: list[str], base: dict[str, TensorInfo]) -> list[str]:
    problems = []
    expected = [name for name in names if not base or name in base]
    for expert, checkpoint in plan.experts.items():
        lacking = [name for name in expected if name not in checkpoint.tensors]
        if lacking:
            near = did_you_mean(lacking[0], sorted(set(checkpoint.tensors) - set(base))) if base else ""
            problems.append(
                f"expert '{expert}' lacks {len(lacking)} tensor(s) that others have, first '{lacking[0]}'{near}"
            )
        extra = [name for name in names if base and name in checkpoint.tensors and name not in base]
        if extra:
            problems.append(
                f"the base lacks {len(extra)} tensor(s) of '{expert}', first '{extra[0]}': is it its base? "
                f"leave them out with {_exclude(extra[0])}"
            )
    return problems


def _exclude(name: str) -> str:
    """The options that leave a tensor's module out, or every expert its own."""
    pattern = f"{module}.*" if (module := name.rpartition(".")[0]) else name
    return f"--exclude '{pattern}', or keep every expert's own with --heads '{pattern}'"


def _mismatch(name: str, sources: dict[str, TensorInfo], base: dict[str, TensorInfo]) -> str | None:
    reference_name, reference = ("base", base[name]) if name in base else next(iter(sources.items()))
    for expert, info in sources.items():
        if info.shape != reference.shape:
            return (
                f"tensor '{name}': shape {list(info.shape)} in expert '{expert}', "
                f"{list(reference.shape)} in '{reference_name}'; leave it out with {_exclude(name)}"
            )
        if info.is_float != reference.is_float or (not info.is_float and info.dtype != reference.dtype):
            return (
                f"tensor '{name}': {info.dtype} in expert '{expert}', {reference.dtype} in '{reference_name}'"
            )
    return None
