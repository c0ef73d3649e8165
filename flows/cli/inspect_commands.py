"""The commands that only look: methods, inspect, diff."""

from __future__ import annotations

import argparse
import io
import sys

from mergeline.flows.cli import text, values
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
    if args.rank or args.html or args.force:
        raise UserError("--rank, --html and --force are for a family: name --base and every --expert")
    for path in args.checkpoint:
        found = describe(path)
        if args.json:
            print(text.as_json(found))
        else:
            print(*text.checkpoint(path, found), sep="\n")


def _inspect_family(args: argparse.Namespace) -> None:
    from mergeline.flows.family import lines
    from mergeline.tasks.fetch import local_checkpoint
    from mergeline.tasks.inspection import describe_family

    if args.checkpoint or not args.base or not args.expert:
        raise UserError("a family is --base and every --expert; inspect other checkpoints without them")
    experts = {name: local_checkpoint(where) for name, where in values.experts(args.expert).items()}
    found = describe_family(
        local_checkpoint(args.base),
        experts,
        args.html,
        force=args.force,
        ranks=args.rank,
        heads=args.heads or (),
        workers=args.workers,
        memory=args.memory,
        progress=text.progress("measured"),
    )
    print(text.as_json(found) if args.json else "\n".join(lines(found)))


def diff(args: argparse.Namespace) -> None:
    from mergeline.tasks.inspection import differences

    found = differences(args.a, args.b)
    rows = found["differences"]
    if args.sort == "norm":
        # First what cannot be measured, then what is NaN or infinite, then by size.
        rows.sort(key=lambda row: float("-inf") if row.get("relative") is None else -row["relative"])
    found["differences"] = rows[: args.limit]
    if args.json:
        print(text.as_json(found))
    else:
        print(*text.differences(found), sep="\n")
