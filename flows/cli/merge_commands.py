"""The commands that read one recipe (merge, sweep, plan, compress, extract-lora), and what reads their outputs."""

from __future__ import annotations

import argparse
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Iterable, Iterator, Sequence

from mergeline.flows.cli import pipeline_commands, text, values
from mergeline.flows.cli.inputs import Inputs
from mergeline.flows.cli.text import say as print  # what files hold never commands the terminal
from mergeline.merging.errors import UserError, printable
from mergeline.tasks.executors import opened

if TYPE_CHECKING:
    from mergeline.merging.engine.plan import Plan
    from mergeline.merging.recipes.loading import Merge
    from mergeline.merging.recipes.recipe import Recipe

# Options that change one recipe.
_OF_ONE = (
    "method", "base", "expert", "set", "statistics", "include", "exclude", "heads", "keep", "dtype", "seed",
    "shard_size", "donor", "vocabulary", "layout", "packing", "requantise", "allow_locked", "table",
)  # fmt: skip
_FEW = 3  # notes on what is replaced


def merge(args: argparse.Namespace) -> None:
    from mergeline.merging.api import merge

    if _several(args):
        _merge_chain(args)
        return
    planned = _planned(args)
    with _replacing(args, [args.out]), opened(args.executor) as executor:
        manifest = merge(planned, args.out, executor=executor, **_engine(args))
    if args.json:
        print(text.as_json({"out": str(args.out), **manifest}))
    else:
        print(f"{args.out}  {manifest['output']['digest']}", *text.requantised(manifest), sep="\n")


def sweep(args: argparse.Namespace) -> None:
    if args.params:
        pipeline_commands.sweep(args)
        return
    from mergeline.merging.sweep import folders, grid_points, sweep

    def first(recipe: Recipe) -> Recipe:
        point = grid_points(recipe, _grid(args, recipe))[0]
        return recipe.model_copy(update={"params": {**recipe.params, **point}})

    recipe = _planned(args, first).recipe
    grid = _grid(args, recipe)
    outs = [args.out / name for name in folders(recipe, grid)]
    with _replacing(args, outs), opened(args.executor) as executor:
        points = sweep(recipe, grid, args.out, executor=executor, **_engine(args))
    if args.json:
        print(text.as_json({"out": str(args.out), "points": points}))
        return
    for point in points:
        print(f"{args.out / point['folder']}  {point['digest']}")


def _grid(args: argparse.Namespace, recipe: Recipe) -> dict[str, list[Any]]:
    return values.grid(args.grid, values.settings(args.set, list(recipe.experts)))


def plan(args: argparse.Namespace) -> None:
    from mergeline.merging.compress import store_sizes
    from mergeline.merging.engine.planning import make_plan

    if _several(args):
        _plan_chain(args)
        return
    inputs = Inputs(args.allow_pickle)
    with inputs.blamed():
        recipe = _recipe(args, inputs.headers)
    made = make_plan(recipe)
    summary = made.summary()
    if store := store_sizes(made):
        summary["store"] = store
    summary |= {kind: [*map(inputs.named, summary[kind])] for kind in ("warnings", "problems")}
    if inputs.are_remote:
        summary |= inputs.network(made)
    table = list(made.table()) if args.table else []
    if args.json:
        print(text.as_json(summary | ({"table": table} if args.table else {})))
    else:
        print(*text.plan(summary), *text.plan_table(table, made.params), sep="\n")
    if summary["problems"]:
        raise UserError(f"{len(summary['problems'])} problem(s): see above")


def compress(args: argparse.Namespace) -> None:
    from mergeline.merging.compress import compress

    planned = _planned(args)
    with _replacing(args, [args.out]):
        manifest = compress(planned, args.out, **_engine(args))
    print(f"{args.out}  {manifest['output']['digest']}")
    print(*text.store(manifest["store"]), sep="\n")


def extract_expert(args: argparse.Namespace) -> None:
    from mergeline.merging.compress import extract_expert
    from mergeline.tasks.fetch import local_checkpoint

    base = args.base and local_checkpoint(args.base)
    options = {"shard_size": args.shard_size, "progress": text.progress(), "force": args.force}
    with _replacing(args, [args.out]):
        manifest = extract_expert(args.store, args.name, args.out, base=base, **options)
    print(f"{args.out}  {manifest['output']['digest']}")


def export(args: argparse.Namespace) -> None:
    """One task of a merge with heads; or, as the pipeline's command, a version of the registry."""
    if args.to and not (args.task or args.out or args.shard_size):
        return pipeline_commands.export_version(args)
    if args.to or not (args.task and args.out) or args.license or args.private:
        raise UserError(
            "name where a version of the registry goes (a folder, s3://..., hf://org/name); or, of a merge's folder, "
            "--task and --out"
        )
    from mergeline.merging.export import export_task

    options = {"shard_size": args.shard_size, "progress": text.progress(), "force": args.force}
    with _replacing(args, [args.out]):
        manifest = export_task(args.what, args.task, args.out, **options)
    print(f"{args.out}  {manifest['output']['digest']}")


def transplant(args: argparse.Namespace) -> None:
    from mergeline.merging.transplant import transplant
    from mergeline.tasks.fetch import local_checkpoint

    options = {key: getattr(args, key) for key in ("neighbours", "shard_size", "workers", "memory", "force")}
    model, donor = local_checkpoint(args.model), local_checkpoint(args.donor)
    with _replacing(args, [args.out]):
        manifest = transplant(model, donor, args.out, progress=text.progress(), **options)
    tokens = manifest["transplanted"]["tokens"]
    print(f"{args.out}  {manifest['output']['digest']}")
    print(f"{tokens['same']} tokens keep their rows, {tokens['new']} new ones are approximated")


def align(args: argparse.Namespace) -> None:
    from mergeline.merging.align import align, summary
    from mergeline.tasks.fetch import local_checkpoint

    options = {
        key: getattr(args, key)
        for key in ("seed", "restarts", "leave", "singular_vectors", "shard_size", "memory", "force")
    }
    models = {name: local_checkpoint(where) for name, where in values.experts(args.models).items()}
    targets = [args.out] if len(models) == 1 else [args.out / name for name in models]
    with _replacing(args, targets):
        made = align(
            local_checkpoint(args.reference),
            models,
            args.out,
            statistics=args.statistics and local_checkpoint(args.statistics),
            heads=args.attention_heads,
            progress=text.progress("aligning", "sweeps"),
            **options,
        )
    if args.json:
        print(text.as_json({"models": [{"out": str(t), **m} for t, m in zip(targets, made.values())]}))
        return
    for target, manifest in zip(targets, made.values()):
        print(f"{target}  {manifest['output']['digest']}")
        print(*summary(manifest), sep="\n")


def extract_lora(args: argparse.Namespace) -> None:
    from mergeline.merging.extract_lora import extract_lora

    if not (args.recipe or args.method) and len(args.expert or ()) == 1:
        args.method = "average"
    planned = _planned(args)
    chosen = {"rank": args.rank, "modules_to_save": args.modules_to_save}
    with _replacing(args, [args.out]):
        manifest = extract_lora(planned, args.out, **chosen, **_engine(args))
    print(f"{args.out}  {manifest['output']['digest']}")
    print(*text.adapter(manifest), sep="\n")


def merge_experts(args: argparse.Namespace) -> None:
    from mergeline.merging.merge_experts import merge_experts
    from mergeline.merging.reading import open_regular, parsed_json
    from mergeline.tasks.fetch import local_checkpoint

    options = {"dtype": args.dtype, "layout": args.layout, "shard_size": args.shard_size}
    recipe = {
        "method": "passthrough",
        "experts": {"model": local_checkpoint(args.model)},
        **{key: value for key, value in options.items() if value is not None},
    }
    groups = None
    if args.groups:
        try:
            with open_regular(args.groups) as file:
                groups = parsed_json(file.read().decode())
        except OSError as error:
            raise UserError(f"{args.groups}: cannot be read ({error.strerror})") from None
        except ValueError as error:
            raise UserError(f"{args.groups}: is no JSON ({error})") from None
    with _replacing(args, [args.out]):
        manifest = merge_experts(
            recipe, args.out, method=args.method, experts=args.experts, statistics=args.statistics, groups=groups,
            router=args.router, align=not args.no_align, rank=args.rank, compress=args.compress, sparse=args.sparse,
            device=args.device, memory=args.memory, workers=args.workers, progress=text.progress(), force=args.force,
        )  # fmt: skip
    if args.json:
        print(text.as_json({"out": str(args.out), **manifest}))
    else:
        print(f"{args.out}  {manifest['output']['digest']}", *text.mixture(manifest), sep="\n")


def collect_experts(args: argparse.Namespace) -> None:
    from mergeline.tasks.fetch import local_checkpoint
    from mergeline.tasks.language.expert_statistics import collect_experts

    model = local_checkpoint(args.model)
    print(
        collect_experts(
            model, args.texts, args.out, outputs=args.outputs, length=args.length, examples=args.examples,
            seed=args.seed, device=args.device, force=args.force, progress=text.progress("collecting", "examples"),
        )
    )  # fmt: skip


def moe(args: argparse.Namespace) -> None:
    from mergeline.tasks.fetch import local_checkpoint
    from mergeline.tasks.language.moe import make_moe_of

    with _replacing(args, [args.out]):
        manifest = make_moe_of(
            args.config, args.out, local_checkpoint, routers=args.routers, seed=args.seed, shard_size=args.shard_size,
            device=args.device, memory=args.memory, workers=args.workers, progress=text.progress(), force=args.force,
        )  # fmt: skip
    if args.json:
        print(text.as_json({"out": str(args.out), **manifest}))
    else:
        print(f"{args.out}  {manifest['output']['digest']}", *text.moe(manifest), sep="\n")


def verify(args: argparse.Namespace) -> None:
    from mergeline.merging.verify import verify
    from mergeline.tasks.remote import streamed

    _load(args.methods)
    outcome = {"out": str(args.out)}
    try:
        said = verify(args.out, args.public_key, again=not args.no_merge, bring=streamed)
    except UserError as error:
        if args.json:
            print(text.as_json({**outcome, "verified": False, "problem": str(error)}))
        raise
    print(text.as_json({**outcome, "verified": True, "said": said}) if args.json else said)


def sign(args: argparse.Namespace) -> None:
    from mergeline.merging.signature import write_signature
    from mergeline.merging.verify import verify

    verify(args.out, again=False)
    print(write_signature(args.out, args.key))


def _several(args: argparse.Namespace) -> bool:
    """Whether the recipe's file holds several merges."""
    from mergeline.merging.strict_yaml import documents

    named = args.method or args.base or args.expert  # refused beside a recipe
    return bool(args.recipe) and not named and len(documents(args.recipe)) > 1


def _chain(args: argparse.Namespace, place: Path) -> list[Merge]:
    """The merges of a file of several (raises UserError for options that would be of one)."""
    from mergeline.merging.learning.contract import engine_method
    from mergeline.merging.recipes.loading import load_merges

    given = [
        f"--{name.replace('_', '-')}"
        for name in _OF_ONE
        if getattr(args, name, None) not in (None, [], False)
    ]
    if given:
        raise UserError(
            f"{args.recipe} holds several merges, each of which says all itself; leave out {given[0]}"
        )
    _load(args.methods)
    return load_merges(args.recipe, place, Inputs(args.allow_pickle).data, engine_method)


def _merge_chain(args: argparse.Namespace) -> None:
    from mergeline.merging.chain import merge_chain, place_of

    place = place_of(args.out)
    merges = _chain(args, place)
    if all(one.name for one in merges):  # there is no last one: all are what was asked for
        place = args.out
        merges = _chain(args, place)

    def tell(name: str | None, out: Path, plan: Plan) -> None:
        print(f"note: {name or 'the last merge'} -> {out}", file=sys.stderr)
        for warning in plan.warnings:
            print(f"note: {printable(warning)}", file=sys.stderr)

    targets = [args.out if one.name is None else place / one.name for one in merges]
    with _replacing(args, targets), opened(args.executor) as executor:
        made = merge_chain(merges, args.out, place, tell, executor=executor, **_engine(args))
    if args.json:
        print(text.as_json({"merges": [{"out": str(out), **manifest} for out, manifest in made]}))
        return
    for out, manifest in made:
        print(f"{out}  {manifest['output']['digest']}")


def _plan_chain(args: argparse.Namespace) -> None:
    from mergeline.merging.chain import place_of, plans

    place = place_of(args.recipe.with_suffix(""))
    found = list(plans(_chain(args, place), place))
    shown: list[dict[str, Any]] = []
    for name, made in found:
        summary = made.summary() if made else {"problems": [], "waits": True}
        shown.append({"name": name, **summary})
        if args.json:
            continue
        print(f"merge      {name or '(the last)'}")
        if made:
            print(*text.plan(made.summary()), sep="\n")
        else:
            print("           is made of merges that are not there yet, and is planned once they are")
    if args.json:
        print(text.as_json({"merges": shown}))
    if problems := sum(len(one["problems"]) for one in shown):
        raise UserError(f"{problems} problem(s): see above")


def _recipe(args: argparse.Namespace, bring: Callable[[str], Path]) -> Recipe:
    """The recipe of --recipe, or of --method, --base and --expert, changed by the other options.

    bring: makes a path or a URI that of a checkpoint on this machine.
    """
    from mergeline.merging.learning.contract import engine_method
    from mergeline.merging.recipes.loading import load_recipe
    from mergeline.merging.recipes.recipe import Recipe

    _load(args.methods)
    if args.recipe:
        if args.method or args.base or args.expert:
            raise UserError("--recipe says method, base and experts; leave out --method, --base and --expert")
        written = load_recipe(args.recipe, bring, engine_method).model_dump()
    elif args.method and args.expert:
        experts = {name: bring(where) for name, where in values.experts(args.expert).items()}
        engine_method(args.method.partition("(")[0].strip())
        written = {"method": args.method, "experts": experts, "base": args.base and bring(args.base)}
    else:
        raise UserError("name --method and every --expert, or a --recipe")
    statistics: dict[str, list[Path]] = {}
    for given in args.statistics or ():
        kind, where = values.pair("--statistics", given, "KIND=P")
        statistics.setdefault(kind, []).append(bring(where))
    options = {
        "include": args.include,
        "exclude": args.exclude,
        "heads": args.heads,
        "keep": dict(values.pair("--keep", given, "PATTERN=NAME") for given in args.keep or ()) or None,
        "statistics": statistics or None,
        "dtype": args.dtype,
        "seed": args.seed,
        "shard_size": args.shard_size,
        "donor": args.donor,
        "vocabulary": args.vocabulary,
        "layout": args.layout,
        "packing": args.packing,
        "prompt_rows": args.prompt_rows,
        "allow_locked": args.allow_locked or None,
        "requantise": args.requantise or None,
        "methods": [*written.get("methods", []), *args.methods] if args.methods else None,
    }
    chosen = {key: value for key, value in options.items() if value is not None}
    changed = values.settings(args.set, list(written["experts"]))
    recipe = Recipe.of({**written, **chosen, "params": {**written.get("params", {}), **changed}})
    recipe.refuse_set_by_parts(changed)
    return recipe


def _load(files: Sequence[Path]) -> None:
    """Run the files that define methods (--methods)."""
    from mergeline.merging.methods import load_methods

    for file in files:
        load_methods(file)


def _engine(args: argparse.Namespace) -> dict[str, Any]:
    """What every merge can be told besides its recipe."""
    return {
        "device": args.device,
        "memory": args.memory,
        "workers": args.workers,
        "factors": args.factors,
        "progress": text.progress(),
        "force": args.force,
    }


@contextmanager
def _replacing(args: argparse.Namespace, outs: Sequence[Path]) -> Iterator[None]:
    """The block writes `outs`; what it replaced is said at its end. The file of the recipe stays (raises UserError)."""
    from mergeline.merging.engine.places import refuse_always, replaced

    for out in outs if getattr(args, "recipe", None) else ():
        refuse_always(out, [args.recipe])
    found = {out: what for out in outs if (what := replaced(out))}
    yield
    for out, what in list(found.items())[:_FEW]:
        print(f"note: {printable(f'{out} replaced {what}')}", file=sys.stderr)
    if len(found) > _FEW:
        print(f"note: and {len(found) - _FEW} more were replaced", file=sys.stderr)


def _planned(args: argparse.Namespace, point: Callable[[Recipe], Recipe] = lambda recipe: recipe) -> Plan:
    """The plan of a recipe, or of a point of it, after its notes are printed.

    Where inputs are remote, it is first made of their headers, so that every problem is told before data is brought.
    """
    from mergeline.merging.engine.planning import make_plan

    inputs = Inputs(args.allow_pickle, stream=args.no_cache, whole=not args.no_cache)
    with inputs.blamed():
        recipe = _recipe(args, inputs.headers)
    plan = make_plan(point(recipe))
    if inputs.are_remote:
        if plan.problems:
            raise UserError(_all(map(inputs.named, plan.problems)))
        if not args.no_cache:
            plan = make_plan(point(_recipe(args, inputs.data)))
    for warning in plan.warnings:
        print(f"note: {printable(inputs.named(warning))}", file=sys.stderr)
    return plan


def _all(problems: Iterable[str]) -> str:
    """One problem, or the last line of what is printed of several."""
    lines = list(problems)
    for line in lines if len(lines) > 1 else ():
        print(f"problem: {printable(line)}", file=sys.stderr)
    return lines[0] if len(lines) == 1 else f"{len(lines)} problems: see above; nothing was brought"
