"""The commands that only look: methods, inspect, diff."""

from __future__ import annotations

import argparse
import io
import sys
from pathlib import Path
from typing import Callable

from mergeline.flows.cli import text, values
from mergeline.flows.cli.inputs import Inputs
from mergeline.flows.cli.text import say as print  # what files hold never commands the terminal
from mergeline.merging.errors import UserError


def methods(args: argparse.Namespace) -> None:
    from mergeline.flows import catalogue_pages
    from mergeline.flows.catalogue import Entry
    from mergeline.merging.learning.contract import any_method, learned_methods
    from mergeline.merging.methods import catalogue, load_methods

    for file in args.methods:
        load_methods(file)
    known: list[Entry] = [*catalogue().values(), *learned_methods().values()]
    chosen: list[Entry] = [any_method(args.id)] if args.id else known
    if args.json:
        print(text.as_json([catalogue_pages.all_of(entry) for entry in chosen]))
    elif args.markdown:
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(encoding="utf-8")
        print(catalogue_pages.markdown(chosen), end="")
    else:
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="replace")  # of terminals that cannot show a formula
        print(catalogue_pages.one(chosen[0]) if args.id else catalogue_pages.listed(chosen))


def inspect(args: argparse.Namespace) -> None:
    from mergeline.tasks.inspection import describe

    if args.base or args.expert:
        _inspect_family(args)
        return
    if not args.checkpoint:
        raise UserError("name a checkpoint, or --base and every --expert of a family")
    if args.rank or args.html or args.force or args.composition:
        raise UserError(
            "--rank, --composition, --html and --force are for a family: name --base and every --expert"
        )
    inputs = Inputs(args.allow_pickle, stream=args.no_cache)
    for where in args.checkpoint:
        with inputs.blamed():
            path = inputs.opened(where)
            is_remote = path in inputs.sources
            found = describe(path, values=args.no_cache or not is_remote, beside=inputs.beside.get(path))
        if is_remote:
            found["network"] = inputs.traffic()
        table = found.pop("table")
        if args.json:
            print(text.as_json(found | ({"table": table} if args.table else {})))
        else:
            print(*text.checkpoint(found), *text.tensors(table if args.table else []), sep="\n")


def _inspect_family(args: argparse.Namespace) -> None:
    from mergeline.flows.family import lines
    from mergeline.merging.describe import family_plan
    from mergeline.tasks.inspection import describe_family

    if args.checkpoint or not args.base or not args.expert:
        raise UserError("a family is --base and every --expert; inspect other checkpoints without them")
    if args.table:
        raise UserError("--table is for a checkpoint; of a family, --json has what was found of every tensor")

    def family(bring: Callable[[str], Path]) -> tuple[Path, dict[str, Path]]:
        experts = {name: bring(where) for name, where in values.experts(args.expert).items()}
        return bring(args.base), experts

    heads = args.heads or ()
    inputs = Inputs(args.allow_pickle, stream=args.no_cache, whole=not args.no_cache)
    with inputs.blamed():
        base, experts = family(inputs.opened)
        if inputs.are_remote and not args.no_cache:  # what is wrong is told before data is brought
            family_plan(base, experts, heads)
            base, experts = family(inputs.data)
        found = describe_family(
            base,
            experts,
            args.html,
            force=args.force,
            ranks=args.rank,
            heads=heads,
            composition=args.composition,
            workers=args.workers,
            memory=args.memory,
            progress=text.progress("measured"),
        )
    if inputs.sources:
        found["network"] = inputs.traffic()
    print(text.as_json(found) if args.json else "\n".join([*lines(found), *text.over_network(found)]))


def diff(args: argparse.Namespace) -> None:
    from mergeline.tasks.inspection import differences

    inputs = Inputs(args.allow_pickle, stream=args.no_cache)
    with inputs.blamed():
        a, b = inputs.opened(args.a), inputs.opened(args.b)
        found = differences(a, b, values=args.no_cache or not inputs.are_remote)
    rows = found["differences"]
    if args.sort == "norm":
        # First what cannot be measured, then what is NaN or infinite, then by size.
        rows.sort(key=lambda row: float("-inf") if row.get("relative") is None else -row["relative"])
    found["differences"] = rows[: args.limit]
    if inputs.are_remote:
        found["network"] = inputs.traffic()
    if args.json:
        print(text.as_json(found))
    else:
        print(*text.differences(found), sep="\n")
