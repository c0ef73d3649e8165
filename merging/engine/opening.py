"""What a plan reads: checkpoints by their headers, dequantised, adapted, in one layout, with one vocabulary."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any, Iterable, Iterator, Mapping

from mergeline.merging.architecture import Model, describe_all
from mergeline.merging.canonical import text_digest
from mergeline.merging.checkpoints.adapters import (
    ADAPTER_CONFIG,
    adapt,
    adapt_in_pipeline,
    adapt_pipeline,
    alone,
    compose,
    holds_adapters,
    is_adapter,
    is_bare,
    is_kept,
    is_lora_file,
    unties,
)
from mergeline.merging.checkpoints.carried import left_out
from mergeline.merging.checkpoints.checkpoint import Checkpoint, TensorInfo, open_checkpoint, open_statistics
from mergeline.merging.checkpoints.companions import CONFIG, read_config
from mergeline.merging.checkpoints.components import by_component, component_folders
from mergeline.merging.checkpoints.dcp import is_training_shards
from mergeline.merging.checkpoints.layouts import one_layout
from mergeline.merging.checkpoints.modules import module_notes
from mergeline.merging.checkpoints.quantised.formats import dequantised
from mergeline.merging.checkpoints.remote import is_remote
from mergeline.merging.checkpoints.router import read_router
from mergeline.merging.checkpoints.task_adapters import read_task_adapter
from mergeline.merging.checkpoints.tied import TiedHead, tied_head, untied, without_tied_head
from mergeline.merging.checkpoints.vocabulary import GatheredTensor, RowOf, Rows, align
from mergeline.merging.engine.inputs import Stamp, files_of, stamps
from mergeline.merging.engine.kept_adapters import keep_adapters
from mergeline.merging.engine.plan import Plan
from mergeline.merging.engine.prompts import read_prompts
from mergeline.merging.errors import UserError, did_you_mean
from mergeline.merging.recipes.recipe import Recipe

_FEW = 6  # names in a sentence
PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
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


def open_inputs(plan: Plan, headers: Headers) -> None:
    """Open base, experts, what adapters add to, and statistics; what is wrong with them becomes problems."""
    if "base" in plan.recipe.experts:
        plan.problems.append("an expert has the name 'base', which is the base checkpoint's; give it another")
        return
    said = len(plan.warnings)
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
        read_prompts(plan)
        _fit_components(plan)
        _convert(plan)
    plan.read_as = plan.warnings[said:]
    for kind, paths in plan.recipe.statistics.items():
        files = paths if isinstance(paths, list) else [paths]
        try:
            plan.statistics[kind] = [headers.open_statistics(kind, file) for file in files]
            for file, opened in zip(files, plan.statistics[kind]):
                plan.stamps |= headers.stamps[file]
                notes = [f"statistics '{kind}': {note}" for note in opened.notes]
                plan.warnings += [note for note in notes if note not in plan.warnings]
        except UserError as error:
            plan.problems.append(f"statistics '{kind}': {error}")
    _open_companions(plan)


def _open_companions(plan: Plan) -> None:
    """Read the adapters of tasks, or the router, that will lie beside the weights."""
    recipe = plan.recipe
    try:
        for task, file in recipe.adapters.items():
            if not PLAIN_NAME.fullmatch(task):
                raise UserError(f"adapters: '{task}' names a file; take letters, digits, '_' and '-'")
            plan.adapters[task] = read_task_adapter(file, task)
        if recipe.router is not None:
            plan.router = read_router(recipe.router, list(recipe.experts))
        plan.stamps |= stamps([*recipe.adapters.values(), *([recipe.router] if recipe.router else [])])
    except UserError as error:
        plan.problems.append(str(error))


def _adapt(plan: Plan) -> None:
    """Let adapters stand for what they add to as they change it: what `onto` says, or the base."""
    if keep_adapters(plan):
        return
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
    adapters = {
        n: c
        for n, c in plan.experts.items()
        if (is_adapter(c) or holds_adapters(c)) and n not in plan.recipe.onto
    }
    delta = plan.method is not None and plan.method.delta
    if (
        adapters
        and not plan.recipe.base
        and only_adapters(plan.recipe)
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
            in_pipeline = adapt_in_pipeline(plan.base, adapter, plan.recipe.packing)
            if in_pipeline is None and not is_adapter(adapter):
                raise UserError(
                    f"{adapter.path}: holds adapters of {', '.join(component_folders(adapter.path))}: name their "
                    "pipeline as base, or the folder of one as expert"
                )
            plan.experts[name], notes = in_pipeline or adapt(plan.base, adapter, tied, plan.recipe.packing)
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
    donor, of_base = plan.experts.get(plan.recipe.donor or ""), _components(plan.base)
    given = {f: t for f, t in _components(donor).items() if f not in of_base} if donor else {}
    if given:
        plan.base = plan.base.view(
            {**plan.base.tensors, **{n: info for t in given.values() for n, info in t.items()}}
        )
        plan.warnings.append(f"the base has no {', no '.join(given)}: it is as '{plan.recipe.donor}' there")
        of_base |= given
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
    return {
        prefix.rstrip("/"): {name: checkpoint.tensors[name] for name in names}
        for prefix, names in by_component(checkpoint.tensors, folders).items()
        if prefix
    }


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


def only_adapters(recipe: Recipe) -> bool:
    """Whether all experts are folders of adapters, of which some need a base, and there is none."""
    paths = [path if path.is_dir() else path.parent for path in recipe.experts.values()]
    adapters = bool(paths) and all((path / ADAPTER_CONFIG).is_file() for path in paths)
    return not recipe.base and adapters and not all(map(is_kept, paths))


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


def find_donor(plan: Plan) -> None:
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


def _config_for(recipe: Recipe, path: Path) -> dict[str, Any] | None:
    """The configuration of the model for training shards that have none; None for any other checkpoint."""
    if not _has_no_config(path):
        return None
    folders = [recipe.experts.get(recipe.donor or ""), recipe.base, *recipe.experts.values()]
    return next((found for folder in folders if folder and (found := read_config(folder))), None)


def _has_no_config(path: Path) -> bool:
    return is_training_shards(path) and not (path / CONFIG).exists()
