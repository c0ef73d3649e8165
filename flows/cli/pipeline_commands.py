"""The commands that work in a workspace, a folder with params.yaml: the pipeline, its steps, and what it publishes."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Sequence

from mergeline.flows.cli.text import as_json, note
from mergeline.flows.cli.text import say as print  # what files hold never commands the terminal
from mergeline.merging.errors import UserError

if TYPE_CHECKING:
    from mergeline.tasks.workspace import Workspace

PARAMS = "params.yaml"  # where nothing else is named


def run(args: argparse.Namespace) -> None:
    from mergeline.flows import console, launch

    workspace = _workspace(args)
    if args.dry_run or args.status:
        work = launch.look(workspace, args.only, args.force)
        if args.json:
            found = launch.as_json(work)
            print(as_json(console.status(workspace, found) if args.status else found))
        elif args.status:
            console.print_status(workspace, work.states, work.then)
        else:
            console.print_plan(work.states, work.then)
        return
    ran = launch.run_pipeline(workspace, args.only, args.force)
    if args.json:
        print(as_json(launch.summary(workspace, ran, whole=not args.only)))
    else:
        console.print_outcome(workspace, ran, whole=not args.only)


def init(args: argparse.Namespace) -> None:
    from mergeline.tasks.extras import require
    from mergeline.tasks.new_workspace import init_workspace

    require("pipeline")
    print(*init_workspace(args.folder, args.params, args.example), sep="\n")
    params = args.folder / "params.yaml"
    print(f"next: edit {params}, then mergeline run --params {params}")


def step(args: argparse.Namespace) -> None:
    from mergeline.flows.console import watched
    from mergeline.tasks import spread
    from mergeline.tasks.status import refuse_missing

    if getattr(args, "recipe", None) or getattr(args, "out", None) or getattr(args, "examples", None):
        _fit_recipe(args)
        return
    workspace = _workspace(args, extras=())
    names = getattr(args, "names", None)
    if getattr(args, "dvc_stage", False):
        from mergeline.tasks.dvc_yaml import item_of_dvc_stage

        names = [item_of_dvc_stage()]
    with workspace.lock(), watched(workspace):
        workspace.tidy()
        stages = workspace.select(args.step, names)
        refuse_missing(workspace, stages)
        with spread.over(workspace.params.executor):
            for stage in stages:
                workspace.run(stage)


def _fit_recipe(args: argparse.Namespace) -> None:
    """Fit one recipe to the examples of a pipeline, into a folder of its own."""
    from mergeline.flows.cli import text
    from mergeline.merging.files import write_json
    from mergeline.merging.learning.contract import any_method
    from mergeline.merging.recipes.loading import load_recipe
    from mergeline.tasks.fetch import local_checkpoint
    from mergeline.tasks.fit import fit_recipe

    if not args.recipe or not args.out or args.names or args.dvc_stage:
        raise UserError("name --recipe and --out together, without the pipeline's merges; or neither of them")
    written = load_recipe(
        args.recipe.absolute(), lambda where: local_checkpoint(where).absolute(), any_method
    )
    out = args.out.absolute()
    workspace = _built(args)
    build, modality = workspace.root / "build", workspace.modality
    with workspace.lock():
        found = fit_recipe(
            modality,
            workspace.params,
            build,
            written,
            out,
            args.examples,
            progress=text.progress("fitting", "steps"),
        )
    write_json(out / "recipe.yaml", found.model_dump(mode="json"))
    assert found.fitted
    print(f"{out / 'recipe.yaml'}  {found.fitted.words}")


def sweep(args: argparse.Namespace) -> None:
    """Every merge of a params.yaml, without servers; only --workers, --executor and --out say more than the file."""
    from mergeline.flows.console import print_leaderboard, watched
    from mergeline.tasks.leaderboard import read_leaderboard
    from mergeline.tasks.sweep import refuse_table, run_stages, write_table

    if args.recipe or args.method or args.base or args.expert or args.grid or args.set:
        raise UserError(
            "--params says what is merged and searched; leave out the recipe's options and --grid"
        )
    out = args.out.absolute()
    workspace = _workspace(args, extras=())
    refuse_table(workspace, out, args.force)
    with workspace.lock(), watched(workspace):
        workspace.tidy()
        ran = run_stages(workspace, args.workers, args.executor or workspace.params.executor)
    write_table(workspace, out)
    if args.json:
        board = read_leaderboard(workspace.root)
        print(as_json({"table": str(out), "ran": ran, "leaderboard": board}))
        return
    print_leaderboard(workspace)
    print(out)


def publish(args: argparse.Namespace) -> None:
    workspace = _workspace(args)
    note("asking MLflow ...")
    from mergeline.tasks.alerts import tell_of_verdict
    from mergeline.tasks.publish import publish

    with workspace.lock():
        published = publish(workspace, note)
        tell_of_verdict(workspace, note)
    print(f"run {published.run_id}" + (f"  {published.url}" if published.url else ""))


def register(args: argparse.Namespace) -> None:
    workspace = _workspace(args)
    note("asking MLflow ...")
    from mergeline.tasks.publish import serving_of
    from mergeline.tasks.register import register

    with workspace.lock():
        outcome = register(workspace.root, workspace.raw, say=note, serving=serving_of(workspace))
    for finding in outcome.findings:
        print(f"{'yes' if finding.passed else 'NO '} {finding.sentence}")
    print(f"{outcome.candidate}: version {outcome.version}; champion: version {outcome.champion_after}")


def rollback(args: argparse.Namespace) -> None:
    workspace = _workspace(args)
    note("asking MLflow ...")
    from mergeline.tasks.rollback import rollback

    with workspace.lock():
        done = rollback(workspace.root, workspace.raw, args.version, note)
    print(f"version {args.version} is the champion; its files: {done.files}")
    if done.before:
        again = f"`mergeline rollback {done.before.version}`"
        print(f"version {done.before.version} was it: no run makes it champion again, {again} does")


def export_version(args: argparse.Namespace) -> None:
    to = args.to if "://" in args.to else str(Path(args.to).absolute())
    workspace = _workspace(args)
    note("asking MLflow ...")
    from mergeline.tasks.export_version import export_version

    options = {"license": args.license, "private": args.private, "force": args.force, "say": note}
    with workspace.lock():
        done = export_version(workspace.root, workspace.raw, args.what, to, **options)
    licence = f"licence {done.license}" if done.license else "no licence: say one with --license"
    print(f"{done.place}  version {done.version.version} ({done.version.merge}), {licence}")


def report(args: argparse.Namespace) -> None:
    from mergeline.tasks.publish import write_report

    print(write_report(_workspace(args), args.force))


def serve(args: argparse.Namespace) -> None:
    workspace = _workspace(args)
    note("starting Prefect ...")
    from mergeline.flows.deployments import serve

    serve(workspace, args.cron)


def pages(args: argparse.Namespace) -> None:
    from mergeline.flows.deployments import show_pages

    show_pages(_workspace(args))


def gc(args: argparse.Namespace) -> None:
    from mergeline.flows.retention import clean

    # Who merges by commands alone has no workspace, and a cache all the same.
    here = Path(args.params).exists() or args.params != PARAMS
    workspace = _workspace(args) if here else None
    said = list(clean(workspace, args.older_than, args.max_size, dry_run=args.dry_run))
    print(*said or ["nothing to remove"], sep="\n")


def notify(args: argparse.Namespace) -> None:
    workspace = _workspace(args)
    note("asking Prefect ...")
    from mergeline.flows.deployments import notify

    notify(workspace, args.name)


def line(args: argparse.Namespace) -> None:
    from mergeline.flows.cli import text, values
    from mergeline.tasks import line
    from mergeline.tasks.fetch import local_checkpoint

    a = local_checkpoint(args.a).absolute()
    others = {n: local_checkpoint(where).absolute() for n, where in values.experts(args.others).items()}
    page = args.html and args.html.absolute()
    workspace = _built(args)
    measure, usual = (
        (line.measured_plane, line.POINTS_OF_PLANE) if args.plane else (line.measured_line, line.POINTS)
    )
    found = measure(
        workspace.modality,
        workspace.params,
        workspace.root / "build",
        a,
        others,
        points=args.points or usual,
        split=args.split,
        page=page,
        force=args.force,
        progress=text.progress("measuring", "points"),
    )
    lines = text.plane if args.plane else text.line
    print(as_json(found) if args.json else "\n".join(lines(found)))


def pareto(args: argparse.Namespace) -> None:
    from mergeline.evaluation.pages.fronts import render_front
    from mergeline.evaluation.pages.page import is_page
    from mergeline.flows.cli import text, values
    from mergeline.merging.engine.places import refuse_file
    from mergeline.merging.files import write_json
    from mergeline.tasks.pareto import foretold_front, front_of, is_recipe, pick, recipe_of_point, shown

    at_least = values.amounts("--at-least", args.at_least, "TASK=SHARE")
    scores = values.amounts("--at-least-score", args.at_least_score, "TASK=SCORE")
    weights = values.amounts("--prefer", args.prefer, "TASK=WEIGHT")
    recipe, page = (path and path.absolute() for path in (args.recipe, args.html))
    params_file = Path(args.params).absolute()
    for path, is_own, what in ((recipe, is_recipe, "recipe"), (page, is_page, "page")):
        if path:
            refuse_file(path, [params_file], is_own, what, args.force)
    workspace = _workspace(args, extras=())
    workspace.select("search", [args.merge])
    found = front_of(workspace.modality, workspace.params, args.merge, workspace.root / "build")
    if args.foretold:
        found = foretold_front(workspace.params, args.merge, found)
    asked = bool(at_least or scores or weights or recipe)
    picked = found["points"].index(pick(found, at_least, scores, weights)) if asked else None
    found, picked = shown(found, picked)
    if recipe:
        assert picked is not None
        point = found["points"][picked]
        write_json(
            recipe,
            recipe_of_point(workspace.modality, workspace.params, args.merge, workspace.root, point),
        )
    if page:
        render_front(page, found, picked)
    if args.json:
        print(as_json({**found, "picked": picked}))
    else:
        print(*text.front(found, picked), sep="\n")
    for path in filter(None, (recipe, page)) if not args.json else ():
        print(path)


def layer_errors(args: argparse.Namespace) -> None:
    from mergeline.flows.cli import text
    from mergeline.tasks.fetch import local_checkpoint
    from mergeline.tasks.layer_errors import measured_errors

    merge = local_checkpoint(args.merge).absolute()
    page = args.html and args.html.absolute()
    workspace = _built(args)
    found = measured_errors(
        workspace.modality,
        workspace.params,
        workspace.root / "build",
        merge,
        first=args.examples,
        ensembled=args.ensembles,
        page=page,
        force=args.force,
        progress=text.progress("running", "examples"),
    )
    print(as_json(found) if args.json else "\n".join(text.layer_errors(found)))


def collect_activations(args: argparse.Namespace) -> None:
    from mergeline.flows.cli import text
    from mergeline.merging.learning.activation_matching import collect_activations
    from mergeline.tasks.fetch import local_checkpoint
    from mergeline.tasks.fit import examples_of

    reference, model = (local_checkpoint(where).absolute() for where in (args.reference, args.model))
    out = args.out.absolute()
    workspace = _built(args)
    modality, params, build = workspace.modality, workspace.params, workspace.root / "build"
    examples = examples_of(modality, params, build, args.examples)
    if modality.network is None:
        raise UserError(f"{modality.models} are not run on examples; align them by their weights")
    network = modality.network(params, build, reference)
    print(
        collect_activations(
            reference, model, network, examples, out, heads=args.attention_heads, force=args.force,
            progress=text.progress("running", "examples"),
        )
    )  # fmt: skip


def _built(args: argparse.Namespace) -> Workspace:
    """The workspace of --params, of which the data are there (raises UserError)."""
    workspace = _workspace(args, extras=())
    for name in (*workspace.modality.deps, f"build/checkpoints/{workspace.params.base}"):
        if name.startswith("build/") and not workspace.path(name).exists():
            raise UserError(f"{name} is missing; run `mergeline run --only baselines` first")
    return workspace


def _workspace(args: argparse.Namespace, extras: Sequence[str] = ("pipeline",)) -> Workspace:
    """The workspace of --params, which becomes the current folder: paths in params.yaml are seen from there.

    extras: what must be installed besides what its kind of models and its searches need.
    """
    from mergeline.tasks.extras import require
    from mergeline.tasks.workspace import Workspace

    workspace = Workspace(args.params)
    params = workspace.params  # blame params.yaml before anything else happens
    proposed = any(merge.within for merge in params.all_merges.values())
    require(*extras, workspace.modality.name, *(["search"] if proposed else []))
    os.chdir(workspace.root)
    return workspace
