"""The command line. Exit codes: 0 done, 2 the input is wrong (one line says how to mend it), 1 our fault."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, NoReturn, Sequence

from merging.errors import UserError

if TYPE_CHECKING:
    from merging.recipe import Recipe

_LONGEST = 2000  # characters of metadata that are printed: a store describes every tensor in its
STEPS = {
    "fetch": "bring checkpoints into build/checkpoints",
    "data": "decode datasets into build/data",
    "heads": "make the zero-shot heads of all tasks",
    "extract": "describe the task vectors",
    "search": "choose settings on the validation split",
    "merge-all": "merge with the chosen settings",
    "evaluate": "score the merged checkpoints",
    "baselines": "score the base and the experts",
    "compare": "write the leaderboard",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; what bad input raises becomes one line on stderr and exit code 2."""
    try:
        args = _parser().parse_args(argv)
        args.run(args)
        sys.stdout.flush()
    except UserError as error:
        print(f"mergeline: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("mergeline: stopped; what was finished is kept, run again to go on", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def command() -> NoReturn:
    """What `mergeline` runs: `main`, and the end of the process."""
    code = main()
    if "torch" in sys.modules and not {"mlflow", "prefect"} & sys.modules.keys():
        # Taking torch down takes half a second and 120 MB; nothing but text is left to be written here.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="mergeline", description="Checkpoints in, one better checkpoint out, with proof.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=_Parser)

    def add(name: str, run: Any, help: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=help, description=help[0].upper() + help[1:] + ".")
        command.set_defaults(run=run)
        return command

    def add_pipeline(name: str, run: Any, help: str) -> argparse.ArgumentParser:
        command = add(name, run, help)
        command.add_argument("--params", default="params.yaml", metavar="FILE", help="default: params.yaml")
        return command

    add_pipeline("run", _run, "the whole pipeline of params.yaml, as a Prefect flow")
    init = add("init", _init, "make a workspace: a folder with params.yaml and dvc.yaml")
    init.add_argument("folder", type=Path)
    init.add_argument(
        "--params", type=Path, metavar="FILE", help="start from this file (default: the sample family)"
    )
    for step, help in STEPS.items():
        command = add_pipeline(step, _step, help)
        command.set_defaults(step=step)
        if step not in ("heads", "extract", "baselines", "compare"):
            command.add_argument("names", nargs="*", metavar="NAME", help="only these items (default: all)")
    add_pipeline(
        "publish", _publish, "write the outputs' metrics and lineage to MLflow, and register the best merge"
    )
    add_pipeline("register", _register, "register the best merge, and promote it if the gates pass")
    rollback = add_pipeline(
        "rollback", _rollback, "make an earlier version of the registry the champion again"
    )
    rollback.add_argument("version")
    add_pipeline("report", _report, "write the HTML report of the last run")
    serve = add_pipeline("serve", _serve, "run the pipeline on a schedule and on events, through Prefect")
    serve.add_argument("--cron", default="0 3 * * *", help="default: every night at three")
    add_pipeline("notify", _notify, "tell Prefect that a new checkpoint is there").add_argument(
        "name", metavar="NAME"
    )

    merge = add("merge", _merge, "merge checkpoints into one")
    _add_recipe(merge)
    merge.add_argument("--out", required=True, type=Path, help="x.safetensors for one file, else a folder")
    _add_engine(merge)
    sweep = add("sweep", _sweep, "merge with every combination of parameter values, from one reading")
    sweep.add_argument(
        "--params",
        metavar="FILE",
        help="search, score and rank every merge of a params.yaml instead; --out is the table, in Markdown",
    )
    _add_recipe(sweep)
    sweep.add_argument(
        "--grid",
        action="append",
        default=[],
        metavar="KEY=V1,V2,...",
        help="values of a parameter, or a JSON list; repeat for every parameter",
    )
    sweep.add_argument("--out", required=True, type=Path, metavar="DIR", help="a folder for each point")
    _add_engine(sweep)
    plan = add(
        "plan", _plan, "what a merge would read, write and need, and every problem, from headers alone"
    )
    _add_recipe(plan)
    plan.add_argument("--table", action="store_true", help="what becomes of every tensor")
    plan.add_argument("--json", action="store_true")
    methods = add("methods", _methods, "the catalogue of methods, or all that is known of one")
    methods.add_argument("id", nargs="?")
    form = methods.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true")
    form.add_argument("--markdown", action="store_true", help="the page docs/methods.md")
    inspect = add("inspect", _inspect, "what is in a checkpoint, or in the task vectors of a family")
    inspect.add_argument("checkpoint", type=Path, nargs="*")
    _add_family(inspect)
    inspect.add_argument("--rank", type=_numbers, metavar="R1,R2,...", help="fractions of full rank, of a family")
    inspect.add_argument("--html", type=Path, metavar="FILE", help="write a page with curves, of a family")
    inspect.add_argument("--memory", type=_bytes, metavar="SIZE", help="an upper bound, such as 2GiB")
    inspect.add_argument("--workers", type=int, metavar="N", help="default: one a core")
    inspect.add_argument("--json", action="store_true")
    diff = add("diff", _diff, "how two checkpoints differ")
    diff.add_argument("a", type=Path)
    diff.add_argument("b", type=Path)
    compress = add("compress", _compress, "keep many experts in the space of a few, by a method with a task")
    _add_recipe(compress)
    compress.add_argument(
        "--out", required=True, type=Path, metavar="STORE", help="x.safetensors for one file, else a folder"
    )
    _add_engine(compress)
    extract = add("extract-expert", _extract_expert, "give one expert of a store back as a checkpoint")
    extract.add_argument("store", type=Path, metavar="STORE")
    extract.add_argument("name", metavar="NAME")
    extract.add_argument("--base", metavar="P", help="the store's base (default: where it was)")
    extract.add_argument("--out", required=True, type=Path, help="x.safetensors for one file, else a folder")
    extract.add_argument("--shard-size", type=_bytes, metavar="SIZE", help="split the output, such as 5GiB")
    lora = add("extract-lora", _extract_lora, "what a merge, or one fine-tune, adds to its base, as a LoRA adapter")
    _add_recipe(lora)
    lora.add_argument(
        "--rank", type=_rank, metavar="R", help="directions of each matrix, or a share of them such as 0.04"
    )
    lora.add_argument(
        "--modules-to-save", action="append", default=[], metavar="PATTERN", help="keep such modules whole (repeat)"
    )
    lora.add_argument(
        "--out", required=True, type=Path, help="a folder for PEFT, or x.safetensors for bare factors"
    )
    _add_engine(lora)
    verify = add("verify", _verify, "re-derive a merge from its manifest and compare bit for bit")
    verify.add_argument("out", type=Path)
    return parser


def _add_recipe(command: argparse.ArgumentParser) -> None:
    command.add_argument("--recipe", type=Path, metavar="FILE", help="YAML, in place of the next three")
    command.add_argument("--method", metavar="ID", help="see `mergeline methods`")
    _add_family(command)
    command.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="a parameter of the method"
    )
    command.add_argument(
        "--include", action="append", metavar="PATTERN", help="merge only tensors of such names (repeat)"
    )
    command.add_argument(
        "--exclude", action="append", metavar="PATTERN", help="leave such tensors the base's (repeat)"
    )
    command.add_argument(
        "--statistics",
        action="append",
        metavar="KIND=P",
        help="what the method reads besides; repeat for every file, or every expert's",
    )
    command.add_argument("--dtype", choices=["float32", "bfloat16", "float16"])
    command.add_argument("--seed", type=int, help="default: 0")
    command.add_argument("--shard-size", type=_bytes, metavar="SIZE", help="split the output, such as 5GiB")
    command.add_argument(
        "--vocabulary",
        choices=["donor", "union"],
        help="the tokens of the merge, where they differ (default: donor)",
    )
    command.add_argument(
        "--donor", metavar="NAME", help="whose configuration and tokenizer are carried (default: base)"
    )
    command.add_argument(
        "--allow-pickle", action="store_true", help="convert pickle checkpoints of the sources"
    )
    command.add_argument(
        "--allow-locked", action="store_true", help="merge experts that are locked against it, as their owner permits"
    )


def _add_family(command: argparse.ArgumentParser) -> None:
    command.add_argument("--base", metavar="P", help="a safetensors file, a folder, or a URI")
    command.add_argument("--expert", action="append", metavar="NAME=P", help="repeat for every expert")


def _add_engine(command: argparse.ArgumentParser) -> None:
    command.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    command.add_argument("--memory", type=_bytes, metavar="SIZE", help="an upper bound, such as 2GiB")
    command.add_argument("--workers", type=int, metavar="N", help="default: one a core")
    command.add_argument(
        "--factors", type=Path, metavar="DIR", help="keep spectral decompositions there for the next merge"
    )


# ---------------------------------------------------------------------------------------------- the pipeline


def _workspace(args: argparse.Namespace) -> Any:
    from tasks.workspace import Workspace

    workspace = Workspace(args.params)
    _ = workspace.params  # blame params.yaml before anything else happens
    os.chdir(workspace.root)
    return workspace


def _run(args: argparse.Namespace) -> None:
    from flows.launch import run_pipeline

    run_pipeline(_workspace(args))


def _init(args: argparse.Namespace) -> None:
    from tasks.versioning import init_workspace

    init_workspace(args.folder, args.params)
    print(
        f"made {args.folder}: edit params.yaml there, then `mergeline run --params {args.folder}/params.yaml`"
    )


def _step(args: argparse.Namespace) -> None:
    workspace = _workspace(args)
    with workspace.lock():
        workspace.tidy()
        for stage in workspace.select(args.step, getattr(args, "names", None)):
            workspace.run(stage)


def _publish(args: argparse.Namespace) -> None:
    from tasks.publish import publish

    workspace = _workspace(args)
    with workspace.lock():
        published = publish(workspace)
    print(f"run {published.run_id}" + (f"  {published.url}" if published.url else ""))


def _register(args: argparse.Namespace) -> None:
    from tasks.register import register

    workspace = _workspace(args)
    with workspace.lock():
        outcome = register(workspace.root, workspace.raw)
    for finding in outcome.findings:
        print(f"{'yes' if finding.passed else 'NO '} {finding.sentence}")
    print(f"{outcome.candidate}: version {outcome.version}; champion: version {outcome.champion_after}")


def _rollback(args: argparse.Namespace) -> None:
    from tasks.register import rollback

    workspace = _workspace(args)
    with workspace.lock():
        rollback(workspace.root, workspace.raw, args.version)
    print(f"version {args.version} is the champion")


def _report(args: argparse.Namespace) -> None:
    from tasks.publish import write_report

    print(write_report(_workspace(args)))


def _serve(args: argparse.Namespace) -> None:
    from flows.deployments import serve

    serve(_workspace(args), args.cron)


def _notify(args: argparse.Namespace) -> None:
    from flows.deployments import notify

    notify(_workspace(args), args.name)


# ---------------------------------------------------------------------------------------------- one merge


def _recipe(args: argparse.Namespace) -> Recipe:
    """The recipe of --recipe, or of --method, --base and --expert, changed by the other options."""
    from merging.recipe import Recipe, load_recipe
    from tasks.fetch import local_checkpoint

    def local(where: str) -> Path:
        return local_checkpoint(where, allow_pickle=args.allow_pickle)

    if args.recipe:
        if args.method or args.base or args.expert:
            raise UserError("--recipe says method, base and experts; leave out --method, --base and --expert")
        written = load_recipe(args.recipe, local).model_dump()
    elif args.method and args.expert:
        experts = {name: local(where) for name, where in _experts(args.expert).items()}
        written = {"method": args.method, "experts": experts, "base": args.base and local(args.base)}
    else:
        raise UserError("name --method and every --expert, or a --recipe")
    statistics: dict[str, list[Path]] = {}
    for text in args.statistics or ():
        kind, where = _pair("--statistics", text, "KIND=P")
        statistics.setdefault(kind, []).append(local(where))
    options = {
        "include": args.include,
        "exclude": args.exclude,
        "statistics": statistics or None,
        "dtype": args.dtype,
        "seed": args.seed,
        "shard_size": args.shard_size,
        "donor": args.donor,
        "vocabulary": args.vocabulary,
        "allow_locked": args.allow_locked or None,
    }
    given = {key: value for key, value in options.items() if value is not None}
    return Recipe.of({**written, **given, "params": {**written.get("params", {}), **_settings(args)}})


def _experts(texts: Sequence[str]) -> dict[str, str]:
    experts: dict[str, str] = {}
    for text in texts:
        name, named, where = text.partition("=")
        if not named:
            name, where = Path(text).stem, text
        if name in experts:
            raise UserError(f"two experts are named '{name}'; name them apart: --expert NAME=PATH")
        experts[name] = where
    return experts


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    pairs = (_pair("--set", text, "KEY=VALUE") for text in args.set)
    return {key: _value(text) for key, text in pairs}


def _grid(args: argparse.Namespace) -> dict[str, list[Any]]:
    grid: dict[str, list[Any]] = {}
    for text in args.grid:
        key, values = _pair("--grid", text, "KEY=V1,V2,...")
        if key in grid or key in _settings(args):
            raise UserError(f"'{key}' is given twice; list all its values in one --grid")
        listed = _value(values)
        if isinstance(listed, list):
            grid[key] = listed
        else:
            grid[key] = [_value(value) for value in values.split(",")] if values else []
    return grid


def _pair(option: str, text: str, form: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals:
        raise UserError(f"{option} {text}: write {form}")
    return key, value


def _value(text: str) -> Any:
    """JSON, or the text itself."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _rank(text: str) -> int | float:
    value = _value(text)
    if type(value) not in (int, float):
        raise argparse.ArgumentTypeError(f"'{text}' is no rank; write 16, or a share such as 0.04")
    return value


def _numbers(text: str) -> list[float]:
    try:
        return [float(number) for number in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' are no numbers; write 0.04,0.08") from None


def _bytes(text: str) -> int:
    units = {
        "": 1,
        "B": 1,
        "KIB": 1 << 10,
        "MIB": 1 << 20,
        "GIB": 1 << 30,
        "KB": 10**3,
        "MB": 10**6,
        "GB": 10**9,
    }
    number = text.rstrip("BKMGIbkmgi ")
    unit = text[len(number) :].strip().upper()
    try:
        return int(float(number) * units[unit])
    except (ValueError, KeyError, OverflowError):
        raise argparse.ArgumentTypeError(f"'{text}' is no size; write 500MB or 2GiB") from None


def _merge(args: argparse.Namespace) -> None:
    from merging import merge

    recipe = _recipe(args)
    _print_notes(recipe)
    manifest = merge(recipe, args.out, **_engine(args))
    print(f"{args.out}  {manifest['output']['digest']}")


def _sweep(args: argparse.Namespace) -> None:
    if args.params:
        _sweep_params(args)
        return
    from merging.sweep import grid_points, sweep

    recipe, grid = _recipe(args), _grid(args)
    first = grid_points(recipe, grid)[0]
    _print_notes(recipe.model_copy(update={"params": {**recipe.params, **first}}))
    for point in sweep(recipe, grid, args.out, **_engine(args)):
        print(f"{args.out / point['folder']}  {point['digest']}")


def _sweep_params(args: argparse.Namespace) -> None:
    """Every merge of a params.yaml, without servers; only --workers and --out say more than the file."""
    from flows.console import print_leaderboard, watched
    from tasks.sweep import run_stages, write_table

    if args.recipe or args.method or args.base or args.expert or args.grid or args.set:
        raise UserError("--params says what is merged and searched; leave out the recipe's options and --grid")
    out = args.out.absolute()
    workspace = _workspace(args)
    with workspace.lock(), watched(workspace):
        workspace.tidy()
        run_stages(workspace, args.workers)
    write_table(workspace, out)
    print_leaderboard(workspace)
    print(out)


def _compress(args: argparse.Namespace) -> None:
    from merging.stores import compress

    recipe = _recipe(args)
    _print_notes(recipe)
    manifest = compress(recipe, args.out, **_engine(args))
    print(f"{args.out}  {manifest['output']['digest']}")
    kept = manifest["store"]
    whole, own = kept["checkpoint"], kept["experts"]
    rows = {"once": kept["once"], **own}
    width = max(map(len, rows))
    for name, count in rows.items():
        print(f"{name:{width}}  {_size(count):>10}  {count / max(whole, 1):6.1%} of a checkpoint, {_size(whole)}")
    total = sum(rows.values())
    print(f"{len(own)} experts in {_size(total)}, {total / max(len(own) * whole, 1):.1%} of their checkpoints")


def _extract_expert(args: argparse.Namespace) -> None:
    from merging.stores import extract_expert
    from tasks.fetch import local_checkpoint

    base = args.base and local_checkpoint(args.base)
    manifest = extract_expert(
        args.store, args.name, args.out, base=base, shard_size=args.shard_size, progress=_progress()
    )
    print(f"{args.out}  {manifest['output']['digest']}")


def _extract_lora(args: argparse.Namespace) -> None:
    from merging.lora import extract_lora

    if not (args.recipe or args.method) and len(args.expert or ()) == 1:
        args.method = "average"
    recipe = _recipe(args)
    _print_notes(recipe)
    chosen = {"rank": args.rank, "modules_to_save": args.modules_to_save}
    manifest = extract_lora(recipe, args.out, **chosen, **_engine(args))
    print(f"{args.out}  {manifest['output']['digest']}")
    made, left = manifest["adapter"], manifest["adapter"]["left_out"]
    ranks = sorted({matrix["rank"] for matrix in made["matrices"].values()})
    rank = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
    print(
        f"{len(made['matrices'])} matrices at rank {rank}, {_size(manifest['output']['bytes'])}: "
        f"{made['energy']:.2%} of the squared norm of what is added to the base"
    )
    if left["tensors"]:
        print(f"left out: {left['tensors']} tensors with {left['energy']:.2%} of it, most of it '{left['largest']}'")


def _engine(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "device": args.device,
        "memory": args.memory,
        "workers": args.workers,
        "factors": args.factors,
        "progress": _progress(),
    }


def _print_notes(recipe: Recipe) -> None:
    from merging.plan import make_plan

    for warning in make_plan(recipe).warnings:
        print(f"note: {warning}", file=sys.stderr)


def _progress(verb: str = "merging") -> Callable[[int, int], None]:
    """What is there already; and on a terminal, once two seconds have passed, a progress bar."""
    import time

    start, terminal, before = time.monotonic(), sys.stderr.isatty(), 0

    def show(done: int, total: int) -> None:
        nonlocal before
        if not before and done > 1:
            print(f"going on: {done - 1} of {total} tensors are there", file=sys.stderr)
        before = done
        if terminal and time.monotonic() - start > 2:
            end = "\n" if done == total else ""
            print(f"\r{verb} {done}/{total} tensors", end=end, file=sys.stderr, flush=True)

    return show


def _plan(args: argparse.Namespace) -> None:
    from merging.plan import make_plan

    plan = make_plan(_recipe(args))
    summary = plan.summary()
    table = list(plan.table()) if args.table else []
    if args.json:
        print(json.dumps(summary | ({"table": table} if args.table else {}), indent=1))
    else:
        _print_plan(summary)
        _print_table(table, plan.params)
    if summary["problems"]:
        raise UserError(f"{len(summary['problems'])} problem(s): see above")


def _print_plan(summary: dict[str, Any]) -> None:
    tensors = summary["tensors"]
    print(f"method     {summary['method']} {json.dumps(summary['params'])}")
    print(f"tensors    {tensors['merge']} merged, {tensors['copy']} copied")
    print(f"read       {_size(summary['bytes_read'])}, write {_size(summary['bytes_written'])}")
    print(f"memory     {_size(summary['peak_bytes'])} a worker at the largest tensor, besides the imports")
    print(f"time       about {summary['seconds']:g} s on one core")
    for kind in ("warnings", "problems"):
        for line in summary[kind]:
            print(f"{kind[:-1]:10} {line}")


def _print_table(table: list[dict[str, Any]], params: dict[str, Any]) -> None:
    """A line for each tensor; of its parameters those that are not the recipe's."""
    lines = []
    for row in table:
        own = {k: v for k, v in row.get("params", {}).items() if k not in params or v != params[k]}
        shape = "x".join(map(str, row["shape"])) or "scalar"
        settings = " ".join(f"{key}={json.dumps(value)}" for key, value in own.items())
        lines.append((row["tensor"], shape, row["action"], row.get("method", ""), settings))
    widths = [max(map(len, column)) for column in zip(*lines)]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip())


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} TiB"


def _methods(args: argparse.Namespace) -> None:
    from flows import catalogue_pages
    from flows.catalogue import described
    from merging.methods import catalogue, get_method

    chosen = [get_method(args.id)] if args.id else list(catalogue().values())
    if args.json:
        print(json.dumps([described(entry) for entry in chosen], indent=1))
    elif args.markdown:
        sys.stdout.reconfigure(encoding="utf-8")
        print(catalogue_pages.markdown(chosen), end="")
    else:
        sys.stdout.reconfigure(errors="replace")  # of terminals that cannot show a formula
        print(catalogue_pages.one(chosen[0]) if args.id else catalogue_pages.listed(chosen))


def _inspect(args: argparse.Namespace) -> None:
    from tasks.inspection import describe

    if args.base or args.expert:
        _inspect_family(args)
        return
    if not args.checkpoint:
        raise UserError("name a checkpoint, or --base and every --expert of a family")
    if args.rank or args.html:
        raise UserError("--rank and --html are for a family: name --base and every --expert")
    for path in args.checkpoint:
        found = describe(path)
        if args.json:
            print(json.dumps(found, indent=1))
            continue
        dtypes = ", ".join(f"{count} {dtype}" for dtype, count in found["dtypes"].items())
        print(
            f"{path}\n  {found['digest']}\n  {found['tensors']} tensors ({dtypes}), {_size(found['bytes'])}"
        )
        for name, value in found["metadata"].items():
            print(f"  {name}: {value if len(value) <= _LONGEST else value[:_LONGEST] + ' ...'}")


def _inspect_family(args: argparse.Namespace) -> None:
    from flows.family import lines
    from tasks.fetch import local_checkpoint
    from tasks.inspection import describe_family

    if args.checkpoint or not args.base or not args.expert:
        raise UserError("a family is --base and every --expert; inspect other checkpoints without them")
    experts = {name: local_checkpoint(where) for name, where in _experts(args.expert).items()}
    found = describe_family(
        local_checkpoint(args.base), experts, args.html, ranks=args.rank,
        workers=args.workers, memory=args.memory, progress=_progress("measured"),
    )  # fmt: skip
    print(json.dumps(found, indent=1) if args.json else "\n".join(lines(found)))


def _diff(args: argparse.Namespace) -> None:
    from tasks.inspection import differences

    rows = differences(args.a, args.b)
    for name, what in rows:
        print(f"{name}: {what}")
    print(f"{len(rows)} tensor(s) differ" if rows else "the same tensors, bit for bit")


def _verify(args: argparse.Namespace) -> None:
    from merging.verify import verify

    print(verify(args.out))


if __name__ == "__main__":
    command()
