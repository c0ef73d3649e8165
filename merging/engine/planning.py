"""Planning: a recipe resolved against the headers of its checkpoints; no tensor data is read."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from fnmatch import fnmatchcase
from itertools import product
from math import prod
from pathlib import Path
from typing import Any, Iterable, Iterator, Mapping, Sequence

from mergeline.merging.algebra.slots import MatrixView
from mergeline.merging.algebra.statistics import STATISTICS
from mergeline.merging.architecture import RUNNING_STATISTICS, Model, Role, describe_all
from mergeline.merging.canonical import canonical_json, text_digest
from mergeline.merging.checkpoints.adapters import (
    ADAPTER_CONFIG,
    AdaptedTensor,
    adapt,
    adapt_pipeline,
    alone,
    compose,
    is_adapter,
    is_bare,
    is_lora_file,
    unties,
)
from mergeline.merging.checkpoints.carried import carried_files, left_out
from mergeline.merging.checkpoints.checkpoint import (
    DTYPES,
    Checkpoint,
    TensorInfo,
    open_checkpoint,
    open_statistics,
)
from mergeline.merging.checkpoints.companions import CONFIG, read_config
from mergeline.merging.checkpoints.components import component_folders
from mergeline.merging.checkpoints.dcp import is_training_shards
from mergeline.merging.checkpoints.layouts import one_layout
from mergeline.merging.checkpoints.modules import module_notes
from mergeline.merging.checkpoints.quantised.formats import dequantised
from mergeline.merging.checkpoints.quantised.rounding import is_plain_rounding
from mergeline.merging.checkpoints.quantised.tensor import QuantisedTensor
from mergeline.merging.checkpoints.remote import is_remote
from mergeline.merging.checkpoints.router import read_router
from mergeline.merging.checkpoints.task_adapters import read_task_adapter
from mergeline.merging.checkpoints.tied import TiedHead, tied_head, untied, without_tied_head
from mergeline.merging.checkpoints.vocabulary import GatheredTensor, RowOf, Rows, align
from mergeline.merging.checkpoints.writer import TensorSpec
from mergeline.merging.engine.inputs import Stamp, files_of, stamps
from mergeline.merging.engine.plan import Action, Entry, Plan
from mergeline.merging.engine.stack import Stacked, stack
from mergeline.merging.errors import UserError, did_you_mean
from mergeline.merging.methods.bound import Bound, bind
from mergeline.merging.methods.contract import get_method, load_methods
from mergeline.merging.recipes.recipe import Recipe
from mergeline.merging.recipes.rules import is_head, is_merged, parameters_for, parameters_in_part, values_of

_TORCH_TO_SAFETENSORS = {torch_name: name for name, (torch_name, _) in DTYPES.items()}
_FEW = 6  # names in a sentence
_PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
_MANY_RUNS = 1000  # of rows of an embedding


class Headers:
    """The headers that plans of one run read, each file's once."""

    def __init__(self) -> None:
        self._checkpoints: dict[Path, Checkpoint] = {}
        self._statistics: dict[tuple[str, Path], Checkpoint] = {}
        self._models: dict[str, Model] = {}
        self.stamps: dict[
            Path, dict[Path, Stamp]
        ] = {}  # of the files of each checkpoint, when its header was read

    def open(self, path: Path) -> Checkpoint:
        """As `open_checkpoint`."""
        if path not in self._checkpoints:
            self._checkpoints[path] = open_checkpoint(path)
            self._stamp(path, self._checkpoints[path])
        return self._checkpoints[path]

    def open_statistics(self, kind: str, path: Path) -> Checkpoint:
        """As `checkpoint.open_statistics`."""
        if (kind, path) not in self._statistics:
            self._statistics[kind, path] = open_statistics(kind, path)
            self._stamp(path, self._statistics[kind, path])
        return self._statistics[kind, path]

    def _stamp(self, path: Path, checkpoint: Checkpoint) -> None:
        self.stamps[path] = {**stamps(files_of(checkpoint)), **self.stamps.get(path, {})}

    def describe(
        self, shapes: Mapping[str, tuple[int, ...]], configs: Mapping[str, Mapping[str, Any]]
    ) -> Model:
        """As `architecture.describe_all`."""
        key = text_digest([sorted(shapes.items()), configs])
        if key not in self._models:
            self._models[key] = describe_all(shapes, configs)
        return self._models[key]


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
    _open(plan, headers)
    if not plan.problems:
        _find_donor(plan)
    if not plan.problems:
        _stack_layers(plan, headers) if recipe.stack else _match_tensors(plan, headers)
    if not plan.problems:
        _say_what_is_written(plan)
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
    has_base = plan.recipe.base is not None or _only_adapters(plan.recipe)
    plan.problems += plan.method.misuses(plan.params, count, has_base, plan.recipe.statistics)
    plan.warnings += plan.method.warnings(plan.params, count)


def _open(plan: Plan, headers: Headers) -> None:
    if "base" in plan.recipe.experts:
        plan.problems.append("an expert has the name 'base', which is the base checkpoint's; give it another")
        return
    seen: dict[Any, str] = {}
    for name, path in {
        **plan.recipe.experts,
        **({"base": plan.recipe.base} if plan.recipe.base else {}),
    }.items():
        try:
            opened = headers.open(path)
            checkpoint, notes = dequantised(opened)
            checkpoint = without_tied_head(checkpoint, _config_for(plan.recipe, path))
            notes = [*opened.notes, *notes]
            plan.stamps |= headers.stamps[path]
            plan.warnings += [f"{name}: {note}" for note in notes]
        except UserError as error:
            plan.problems.append(f"{name}: {error}")
            continue
        real = path.resolve()
        if real in seen:
            plan.problems.append(
                f"'{name}' and '{seen[real]}' are the same checkpoint, {path}; give each its own"
            )
        seen[real] = name
        if path is plan.recipe.base:
            plan.base = checkpoint
        else:
            plan.experts[name] = checkpoint
    for name, path in plan.recipe.onto.items():
        try:
            checkpoint, notes = dequantised(headers.open(path))
            plan.onto[name] = without_tied_head(checkpoint)
            plan.stamps |= headers.stamps[path]
            plan.warnings += [f"onto: {name}: {note}" for note in notes]
        except UserError as error:
            plan.problems.append(f"onto: {name}: {error}")
    _adapt(plan)
    if not plan.problems:
        _fit_components(plan)
        _convert(plan)
    for kind, paths in plan.recipe.statistics.items():
        files = paths if isinstance(paths, list) else [paths]
        try:
            plan.statistics[kind] = [headers.open_statistics(kind, file) for file in files]
            for file, opened in zip(files, plan.statistics[kind]):
                plan.stamps |= headers.stamps[file]
                plan.warnings += [
                    said
                    for note in opened.notes
                    if (said := f"statistics '{kind}': {note}") not in plan.warnings
                ]
        except UserError as error:
            plan.problems.append(f"statistics '{kind}': {error}")
    _open_companions(plan)


def _config_for(recipe: Recipe, path: Path) -> dict[str, Any] | None:
    """The configuration of the model for training shards that have none; None for any other checkpoint."""
    if not _has_no_config(path):
        return None
    folders = [recipe.experts.get(recipe.donor or ""), recipe.base, *recipe.experts.values()]
    return next((found for folder in folders if folder and (found := read_config(folder))), None)


def _has_no_config(path: Path) -> bool:
    return is_training_shards(path) and not (path / CONFIG).exists()


def _open_companions(plan: Plan) -> None:
    """Read the adapters of tasks, or the router, that will lie beside the weights."""
    recipe = plan.recipe
    try:
        for task, file in recipe.adapters.items():
            if not _PLAIN.fullmatch(task):
                raise UserError(f"adapters: '{task}' names a file; take letters, digits, '_' and '-'")
            plan.adapters[task] = read_task_adapter(file, task)
        if recipe.router is not None:
            plan.router = read_router(recipe.router, list(recipe.experts))
        plan.stamps |= stamps([*recipe.adapters.values(), *([recipe.router] if recipe.router else [])])
    except UserError as error:
        plan.problems.append(str(error))


def _adapt(plan: Plan) -> None:
    """Let adapters stand for what they add to as they change it: what `onto` says, or the base."""
    for name, model in plan.onto.items():
        adapter = plan.checkpoints.get(name)
        if adapter is None:
            continue
        try:
            if not is_adapter(adapter):
                raise UserError("is no PEFT adapter, so it adds to nothing; leave it out of onto")
            changed, notes = adapt(model, adapter, None, plan.recipe.packing)
            adapted = replace(changed, path=model.path)  # whose configuration and tokenizer it has
            plan.warnings += [f"'{name}': {note}" for note in notes]
        except UserError as error:
            plan.problems.append(f"{name}: {error}")
            continue
        if name == "base":
            plan.base = adapted
        else:
            plan.experts[name] = adapted
    adapters = {n: c for n, c in plan.experts.items() if is_adapter(c) and n not in plan.onto}
    delta = plan.method is not None and plan.method.delta
    if (
        adapters
        and not plan.recipe.base
        and _only_adapters(plan.recipe)
        and len(adapters) == len(plan.experts)
    ):
        _merge_alone(plan)
        return
    if adapters and not plan.recipe.base:
        plan.problems.append(f"'{next(iter(adapters))}' is an adapter: name the base that it adds to")
    tied = _untie(plan, adapters) if plan.base else None
    for name, adapter in adapters.items():
        if plan.base is None:
            continue
        try:
            plan.experts[name], notes = adapt(plan.base, adapter, tied, plan.recipe.packing)
            plan.warnings += [f"'{name}': {note}" for note in notes]
        except UserError as error:
            plan.problems.append(f"{name}: {error}")
    for name, file in plan.experts.items():
        if name in adapters or not is_lora_file(file):
            continue
        try:
            if plan.base is None:
                raise UserError(
                    f"{file.path}: is LoRA of a pipeline: name its folder, or the folder of one component, as base"
                )
            plan.experts[name], notes = adapt_pipeline(plan.base, file)
            plan.warnings += [f"'{name}': {note}" for note in notes]
        except UserError as error:
            plan.problems.append(f"{name}: {error}")
    for name, factors in plan.experts.items():
        if is_bare(factors.tensors) and (plan.base or delta):
            try:
                plan.experts[name] = compose(plan.base, factors)
            except UserError as error:
                plan.problems.append(f"{name}: {error}")


def _fit_components(plan: Plan) -> None:
    """Let each checkpoint stand for all components of the base: its own, and where it has none the base's.

    What the base has none of is the donor's there, if one is named that has it, and else left out.
    """
    if plan.base is None or plan.base.path.is_file():
        return
    donor = plan.experts.get(plan.recipe.donor or "")
    given = {f: t for f, t in _components(donor).items() if f not in _components(plan.base)} if donor else {}
    if given:
        plan.base = plan.base.view(
            {**plan.base.tensors, **{n: info for t in given.values() for n, info in t.items()}}
        )
        plan.warnings.append(f"the base has no {', no '.join(given)}: it is as '{plan.recipe.donor}' there")
    of_base = _components(plan.base)
    for name, expert in plan.experts.items():
        tensors = dict(expert.tensors)
        fitting = [f for f, own in of_base.items() if {f"{f}/{tensor}" for tensor in tensors} <= own.keys()]
        if len(fitting) == 1:
            tensors = {
                (full := f"{fitting[0]}/{own}"): replace(info, name=full) for own, info in tensors.items()
            }
            plan.warnings.append(f"'{name}' is the component {fitting[0]} of the base")
        own = _components(expert.view(tensors), of_base)
        if extra := sorted(own.keys() - of_base.keys()):
            tensors = {n: info for n, info in tensors.items() if n.partition("/")[0] not in extra}
            plan.warnings.append(f"'{name}': {', '.join(extra)} is left out, for the base has none")
        if lacking := sorted(of_base.keys() - own.keys()):
            tensors |= {n: info for folder in lacking for n, info in of_base[folder].items()}
            plan.warnings.append(f"'{name}' has no {', no '.join(lacking)}: it is as the base there")
        if tensors != expert.tensors:
            plan.experts[name] = expert.view(tensors)


def _components(checkpoint: Checkpoint, known: Iterable[str] = ()) -> dict[str, dict[str, TensorInfo]]:
    """The tensors of a folder's components, by the names of these; and of those that another one has."""
    folders = {*known, *(component_folders(checkpoint.path) if checkpoint.path.is_dir() else [])}
    found: dict[str, dict[str, TensorInfo]] = {}
    for name, info in checkpoint.tensors.items():
        folder, slash, _ = name.partition("/")
        if slash and (folder in folders or info.file.parent.name == folder):
            found.setdefault(folder, {})[name] = info
    return found


def _convert(plan: Plan) -> None:
    """Give all checkpoints the layout of the base, of the first expert where there is none, or the one asked for."""
    known = plan.checkpoints
    reference = next(iter(known))
    try:
        folder = next((c.path for c in known.values() if c.path.is_dir()), None)
        config = read_config(folder) if folder else {}
        found = one_layout(known, reference, plan.recipe.layout, config)
    except UserError as error:
        plan.problems.append(str(error))
        return
    plan.base = found.checkpoints.get("base")
    plan.experts = {name: found.checkpoints[name] for name in plan.experts}
    plan.warnings += found.notes


def _only_adapters(recipe: Recipe) -> bool:
    """Whether all experts are folders of adapters, and there is no base."""
    paths = [path if path.is_dir() else path.parent for path in recipe.experts.values()]
    return not recipe.base and bool(paths) and all((path / ADAPTER_CONFIG).is_file() for path in paths)


def _merge_alone(plan: Plan) -> None:
    """Let adapters without a base stand for what they add, which can become an adapter alone."""
    plan.adapter_only = True
    if plan.method is not None and not plan.bound.gives_factors:
        plan.problems.append(
            f"{plan.method.id} of adapters without a base: name the base that they add to (weighted sums, core_space "
            "and knots need none)"
        )
        return
    try:
        plan.experts = alone(plan.experts)
        plan.warnings.append(
            "adapters without a base become one adapter, by `mergeline extract-lora`; or name the base"
        )
    except UserError as error:
        plan.problems.append(str(error))


def _untie(plan: Plan, adapters: Mapping[str, Checkpoint]) -> TiedHead | None:
    """What is tied in the base; where an adapter unties it, every checkpoint gets an output matrix of its own."""
    assert plan.base is not None
    try:
        tied = tied_head(plan.base) if adapters else None
    except UserError as error:
        plan.problems.append(f"base: {error}")
        return None
    untying = []
    for name, adapter in adapters.items():
        try:
            untying += [name] if tied and unties(adapter, tied) else []
        except UserError:
            continue  # `adapt` says what is wrong
    if tied and untying:
        plan.base = untied(plan.base, tied)
        others = {name: c for name, c in plan.experts.items() if name not in adapters}
        plan.experts |= {name: untied(c, tied) for name, c in others.items()}
        plan.untied = tied.head
        plan.warnings.append(
            f"'{untying[0]}' gives the embedding or the output matrix values of its own, which are one in the base: "
            f"the merge has '{tied.head}' beside '{tied.embedding}', and tie_word_embeddings: false"
        )
    return tied


def _find_donor(plan: Plan) -> None:
    """The named donor; or else the base, or the first expert where there is no base, if it is a folder.

    Training shards have no configuration: who has one comes before them.
    """
    known = plan.checkpoints
    name = plan.recipe.donor
    if name is not None and name not in known:
        plan.problems.append(f"donor '{name}' is neither the base nor an expert{did_you_mean(name, known)}")
        return
    donor = name or next((n for n, c in known.items() if not _has_no_config(c.path)), next(iter(known)))
    path = known[donor].path
    if path.is_dir():
        plan.donor = path
        if _has_no_config(path):
            plan.warnings.append(
                "training shards have no config.json: the merge will have none, nor a tokenizer; name as base the "
                "folder that the training began with"
            )
    elif name is not None:
        plan.problems.append(
            f"donor '{name}': {path} is one file, with no configuration of its own; name a folder"
        )
    try:
        plan.problems += _other_architectures(known)
        read_config(path)
        if plan.donor:
            carried_files(path)
            others = {n: c.path for n, c in known.items() if c.path.is_dir() and c.path != path}
            plan.warnings += module_notes(path, others)
            plan.warnings += _left_out(path)
    except UserError as error:
        plan.problems.append(f"{donor}: {error}")
        return
    if not plan.adapter_only:
        _align(plan, known, donor)


def _left_out(donor: Path) -> Iterator[str]:
    if names := left_out(donor):
        more = f" and {len(names) - _FEW} more" if len(names) > _FEW else ""
        yield f"not carried from '{donor.name}': {', '.join(names[:_FEW])}{more}"


def _other_architectures(checkpoints: Mapping[str, Checkpoint]) -> Iterator[str]:
    """A sentence for each checkpoint whose configuration names another kind of model than the first's."""
    kinds: dict[str, str] = {}
    for name, checkpoint in checkpoints.items():
        kind = read_config(checkpoint.folder).get("model_type") if checkpoint.path.is_dir() else None
        if isinstance(kind, str):
            kinds[name] = kind
    first = next(iter(kinds), "")
    for name, kind in kinds.items():
        if kind != kinds[first]:
            yield f"'{name}' is a {kind} model, '{first}' a {kinds[first]}: only one architecture can be merged"


def _align(plan: Plan, checkpoints: dict[str, Checkpoint], donor: str) -> None:
    """Give embeddings of different vocabularies the same rows."""
    try:
        plan.alignment = align(checkpoints, donor, _rows(plan.recipe, checkpoints))
    except UserError as error:
        plan.problems.append(str(error))
    if plan.alignment:
        plan.base = plan.alignment.checkpoints.get("base")
        plan.experts = {name: plan.alignment.checkpoints[name] for name in plan.experts}
        plan.warnings += plan.alignment.notes
        plan.warnings += _scattered(plan)


def _scattered(plan: Plan) -> Iterator[str]:
    """A sentence for each checkpoint elsewhere of which rows would be asked for in many pieces."""
    for name, checkpoint in plan.checkpoints.items():
        for info in checkpoint.tensors.values():
            if isinstance(info, GatheredTensor) and is_remote(checkpoint.folder) and info.runs > _MANY_RUNS:
                yield (
                    f"'{name}': '{info.name}' lies in {info.runs} pieces, for its tokens have other ids: over the "
                    "network each is a question of its own; merge a copy here (without --no-cache)"
                )


def _say_what_is_written(plan: Plan) -> None:
    """Have what is quantised in the base rounded to its format again, if the recipe says so; sentences on either."""
    if plan.recipe.requantise:
        plan.problems += _requantise(plan)
    elif any(
        isinstance(info, QuantisedTensor) for c in plan.checkpoints.values() for info in c.tensors.values()
    ):
        beside = (
            "its config.json has no quantization_config"
            if plan.donor
            else "no config.json lies beside it, for which a folder must be the base or the donor"
        )
        plan.warnings.append(f"what is written is not quantised: {beside}")


def _requantise(plan: Plan) -> Iterator[str]:
    """Marks what is written in the base's own format; a sentence if that cannot be done."""
    forms = {
        n: t for n, t in (plan.base.tensors if plan.base else {}).items() if isinstance(t, QuantisedTensor)
    }
    if not forms or plan.base is None:
        yield "requantise: the base is not quantised, so that it has no format to write; leave requantise out"
        return
    other = next((name for name, form in forms.items() if not is_plain_rounding(form)), None)
    if other:
        yield (
            f"requantise: '{other}' of the base is in a format that is no plain rounding; FP8, MXFP8 and MXFP4 can be "
            "written: leave requantise out, and quantise the merge with what quantised the base"
        )
        return
    moved = next((name for name, form in forms.items() if form.name != name), None)
    if moved or plan.alignment or plan.stack:
        yield "requantise: the merge has other names, rows or layers than its base; leave requantise out"
        return
    if plan.recipe.heads:
        yield "requantise: heads go onto merges that are not quantised; leave one of the two out"
        return
    if plan.donor != plan.base.path:
        yield "requantise: config.json must be that of the base, to say its format; name a folder as base, and donor"
        return
    scales = plan.base.stored.tensors.keys() - plan.base.tensors.keys() - {
        part.name for form in forms.values() for part in form.parts
    }  # fmt: skip
    if scales:
        yield (
            f"requantise: the base has scales of quantised activations ('{min(scales)}'), which are another's in a "
            "merge; leave requantise out"
        )
        return
    entries: list[Entry] = []
    for entry in plan.entries:
        form = forms.get(entry.name)
        if form is not None and entry.action == "copy" and not entry.sources:  # the base's own codes
            entries += [_entry(plan, "copy", part.name, {}, part) for part in form.parts]
        else:
            entries.append(replace(entry, form=form))
    plan.entries = sorted(entries, key=lambda entry: entry.name)
    plan.warnings.append(
        f"requantise: {sum(entry.form is not None for entry in entries)} tensors are rounded to the base's format as "
        "they are written, with new scales; the card has the error"
    )


def _rows(recipe: Recipe, checkpoints: Mapping[str, Checkpoint]) -> Rows:
    """What the recipe says of embeddings (raises UserError for a name of no checkpoint)."""
    asked = (
        {"missing_tokens": recipe.missing_tokens} if recipe.missing_tokens not in ("first", "mean") else {}
    )
    asked |= {f"tokens: {token!r}": row.expert for token, row in recipe.tokens.items() if row.expert}
    for what, name in asked.items():
        if name not in checkpoints:
            raise UserError(
                f"{what}: '{name}' is neither the base nor an expert{did_you_mean(name, checkpoints)}"
            )
    tokens = {token: RowOf(row.expert, row.token, row.id, row.force) for token, row in recipe.tokens.items()}
    return Rows(recipe.vocabulary == "union", tokens, recipe.pad_to_multiple_of, recipe.missing_tokens)


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
    plan.base, plan.experts = made.checkpoints.get("base"), {n: made.checkpoints[n] for n in plan.experts}
    shapes = {name: next(iter(tensor.sources.values())).shape for name, tensor in made.tensors.items()}
    plan.model = headers.describe(shapes, read_config(plan.donor) if plan.donor else {})
    bounds = _Bounds(plan, list(made.tensors))
    for name, tensor in sorted(made.tensors.items()):
        base = {name: tensor.base} if tensor.base else {}
        bound = bounds.in_part(name, tensor)
        if problem := _mismatch(name, tensor.sources, base):
            plan.problems.append(f"stack: {problem}")
        elif tensor.base and not parts[tensor.part].experts:
            plan.entries.append(_entry(plan, "copy", name, {}, tensor.base))
        elif not next(iter(tensor.sources.values())).is_float or bound.copies:
            plan.entries.append(
                _entry(plan, "copy", name, tensor.sources, None if bound.copies else tensor.base)
            )
        else:
            plan.entries.append(_entry(plan, "merge", name, tensor.sources, tensor.base, bound))
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
            plan.entries.append(_entry(plan, "merge", name, sources, base.get(name), bounds.of(name)))
        else:
            action: Action = "largest" if plan.model.tensors[name].role is Role.COUNTER else "copy"
            plan.entries.append(_entry(plan, action, name, sources, base.get(name)))
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
            plan.entries += [_entry(plan, "copy", name, {}, base[name])] if name in base else []
        elif who and (origin is None or name not in origin.tensors):
            plan.problems.append(f"keep: '{who}' has no tensor '{name}'")
        elif who == "base":
            plan.entries.append(_entry(plan, "copy", name, {}, base[name]))
        elif who:
            plan.entries.append(_entry(plan, "copy", name, {who: sources[who]}, None))
        elif plan.recipe.excluded == "average" and sources and not is_merged(plan.recipe, name):
            _average(plan, name, sources, base, bounds)
        elif name in base and not sources and plan.recipe.heads:
            base_only.append(name)
        elif name in base:
            plan.entries.append(_entry(plan, "copy", name, {}, base[name]))
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
        if not _PLAIN.fullmatch(expert):
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
        plan.entries.append(_entry(plan, "merge", name, sources, base.get(name), bounds.average))
    else:
        plan.entries.append(_entry(plan, "copy", name, sources, base.get(name)))


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


def _widest(infos: Sequence[TensorInfo]) -> str:
    """The smallest dtype that holds all of these; an adapted tensor counts as what it adds to."""
    found = {(info.base or info).dtype if isinstance(info, AdaptedTensor) else info.dtype for info in infos}
    return found.pop() if len(found) == 1 else "F64" if "F64" in found else "F32"


def _entry(
    plan: Plan,
    action: Action,
    name: str,
    sources: dict[str, TensorInfo],
    base: TensorInfo | None,
    bound: Bound | None = None,
) -> Entry:
    origin = base or next(iter(sources.values()), None) or next(iter(plan.experts.values())).tensors[name]
    dtype = origin.dtype
    if plan.recipe.dtype == "widest" and origin.is_float:
        dtype = _widest([*sources.values(), *([base] if base else [])] or [origin])
    elif plan.recipe.dtype and origin.is_float:
        dtype = _TORCH_TO_SAFETENSORS[plan.recipe.dtype]
    spec = TensorSpec(name, dtype, origin.shape, prod(origin.shape) * DTYPES[dtype][1])
    return Entry(action, spec, sources, base, bound, plan.model)
