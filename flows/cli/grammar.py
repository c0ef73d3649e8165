"""The grammar of the command line: its commands in the order of the help, what each is given, and who runs it."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, Callable, NoReturn, Sequence

from mergeline.flows.cli import completion, inspect_commands, merge_commands, pipeline_commands, values
from mergeline.merging.errors import UserError, did_you_mean
from mergeline.tasks.steps import commands

STEPS = {step.name: step for step in commands()}
# What others call the dtypes that are written.
_ALSO_CALLED = {"fp32": "float32", "fp16": "float16", "half": "float16", "bf16": "bfloat16"}
_VERSIONS = ("mergeline", "torch", "safetensors")

_Handler = Callable[[argparse.Namespace], None]
_Options = Callable[[argparse.ArgumentParser], None]  # adds options to a command


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """What was asked; `run` of it takes it and does the work. Without a command, the help is printed.

    Raises:
        UserError: no such command or option, or a value that cannot be one.
        SystemExit: help was asked for, or nothing at all.
    """
    parser = _parser(argv)
    if not argv:
        parser.print_help(sys.stderr)
        sys.exit(2)
    return parser.parse_args(argv)


def _complete(args: argparse.Namespace) -> None:
    if args.shell == completion.NAMES:
        print(*completion.names(args.params), sep="\n")
    else:
        print(completion.script(_parser(None), args.shell))


def _parser(argv: Sequence[str] | None) -> argparse.ArgumentParser:
    """All commands; with their options those whose names are in `argv`, or all (None): adding them takes longest."""
    main = _Parser(prog="mergeline", description="Checkpoints in, one better checkpoint out, with proof.")
    main.add_argument(
        "--version", action=_Version, nargs=0, help="show the versions of mergeline, torch and safetensors"
    )
    commands = main.add_subparsers(metavar="COMMAND", required=True, parser_class=_Parser)

    def add(name: str, run: _Handler, help: str, *options: _Options, **defaults: str) -> None:
        wanted = argv is None or name in argv
        told = help[0].upper() + help[1:] + "."
        command = commands.add_parser(name, help=help, description=told, add_help=wanted)
        command.set_defaults(run=run, **defaults)
        for option in options if wanted else ():
            option(command)

    add("run", pipeline_commands.run, "the whole pipeline of params.yaml, as a Prefect flow", _params, _run)
    add("init", pipeline_commands.init, "make a workspace: a folder with params.yaml and dvc.yaml", _init)
    for step in STEPS.values():
        items = (_items,) if step.takes_names else ()
        own = _OWN.get(step.name, ())
        add(step.name, pipeline_commands.step, step.help, _params, *items, *own, step=step.name)
    add(
        "publish",
        pipeline_commands.publish,
        "write the outputs' metrics and lineage to MLflow, and register the best merge",
        _params,
    )
    add(
        "register",
        pipeline_commands.register,
        "register the best merge, and promote it if the gates pass",
        _params,
    )
    add(
        "rollback",
        pipeline_commands.rollback,
        "make an earlier version of the registry the champion again",
        _params,
        _version,
    )
    add("report", pipeline_commands.report, "write the HTML report of the last run", _params, _force)
    add(
        "serve",
        pipeline_commands.serve,
        "run the pipeline on a schedule and on events, through Prefect",
        _params,
        _cron,
    )
    add("notify", pipeline_commands.notify, "tell Prefect that a new checkpoint is there", _params, _name)
    add(
        "pages",
        pipeline_commands.pages,
        "show Prefect's pages of past runs, without running anything",
        _params,
    )
    add(
        "gc",
        pipeline_commands.gc,
        "remove what .mergeline and the user's cache keep and no longer need",
        _params,
        _retention,
    )
    add("merge", merge_commands.merge, "merge checkpoints into one", _recipe, _out, _engine, _executor, _json)
    add(
        "sweep",
        merge_commands.sweep,
        "merge with every combination of parameter values, from one reading",
        _sweep,
        _engine,
        _executor,
        _json,
    )
    add(
        "plan",
        merge_commands.plan,
        "what a merge would read, write and need, and every problem, from headers alone",
        _recipe,
        _plan,
    )
    add(
        "methods",
        inspect_commands.methods,
        "the catalogue of methods, or all that is known of one",
        _methods,
    )
    add(
        "inspect",
        inspect_commands.inspect,
        "what is in a checkpoint, or in the task vectors of a family",
        _inspect,
    )
    add(
        "line",
        pipeline_commands.line,
        "how well what lies between two models does on a pipeline's tasks, and the barrier",
        _params,
        _line,
    )
    add(
        "pareto",
        pipeline_commands.pareto,
        "the front of a search over tasks; which of its points does best what is asked, and its recipe",
        _params,
        _pareto,
    )
    add(
        "layer-errors",
        pipeline_commands.layer_errors,
        "where a merge's activations part from those of a pipeline's experts",
        _params,
        _layer_errors,
    )
    add(
        "collect-activations",
        pipeline_commands.collect_activations,
        "how alike the units of two models are on a pipeline's examples, for align",
        _params,
        _collect_activations,
    )
    add("diff", inspect_commands.diff, "how two checkpoints differ", _diff)
    add(
        "compress",
        merge_commands.compress,
        "keep many experts in the space of a few, by a method with a task",
        _recipe,
        _store,
        _engine,
    )
    add(
        "extract-expert",
        merge_commands.extract_expert,
        "give one expert of a store back as a checkpoint",
        _extract_expert,
    )
    add(
        "export",
        merge_commands.export,
        "a version of the registry, to a folder, a store or the Hub; or one task of a merge with heads",
        _params,
        _export,
    )
    add(
        "transplant",
        merge_commands.transplant,
        "a model with the vocabulary and tokenizer of another",
        _transplant,
    )
    add(
        "align",
        merge_commands.align,
        "models that were trained independently, in the order of one of them, so that they can be merged",
        _align,
    )
    add(
        "extract-lora",
        merge_commands.extract_lora,
        "what a merge, or one fine-tune, adds to its base, as a LoRA adapter",
        _recipe,
        _adapter,
        _engine,
    )
    add(
        "merge-experts",
        merge_commands.merge_experts,
        "make the experts of a mixture fewer: merge groups of them, or leave the least used out",
        _merge_experts,
    )
    add(
        "collect-experts",
        merge_commands.collect_experts,
        "statistics of a mixture's experts on texts, for merge-experts",
        _collect_experts,
    )
    add("moe", merge_commands.moe, "make dense models the experts of one mixture, as mergekit-moe", _moe)
    add(
        "verify",
        merge_commands.verify,
        "re-derive a merge from its manifest and compare bit for bit",
        _verify,
    )
    add("sign", merge_commands.sign, "sign a merge with a key of your own", _sign)
    add(
        "completion",
        _complete,
        "what a shell completes commands by: source <(mergeline completion bash)",
        _shell,
    )
    return main


class _Parser(argparse.ArgumentParser):
    """Blames in one line, with the nearest known name for a command, an option or a value that is none."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        # Before argparse counts what is missing: a misspelt option is why another is missing.
        for word in args or ():
            if word == "--" or not word.startswith("-") and self._commands():
                break  # what follows a command is for its own parser
            if word.startswith("--") and " " not in word:
                self._check_option(word.partition("=")[0])
        return super().parse_known_args(args, namespace)

    def _commands(self) -> bool:
        return any(isinstance(action, argparse._SubParsersAction) for action in self._actions)

    def _check_option(self, name: str) -> None:
        known = [option for option in self._option_string_actions if option.startswith("--")]
        if not any(option.startswith(name) for option in known):  # argparse takes beginnings for the whole
            self.error(f"there is no option {name}{did_you_mean(name, known)}")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is None or value in action.choices:
            return
        choices = list(map(str, action.choices))
        meant = _ALSO_CALLED.get(value)
        hint = f"; did you mean '{meant}'?" if meant in choices else did_you_mean(value, choices)
        if isinstance(action, argparse._SubParsersAction):
            self.error(f"there is no command '{value}'{hint}")
        raise argparse.ArgumentError(action, f"'{value}' is none of its values{hint}")


class _Version(argparse.Action):
    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> NoReturn:
        from importlib.metadata import version  # costs more than all the rest of the help

        for name in _VERSIONS:
            print(name, version(name))
        parser.exit()


# --------------------------------------------------------------------------------------- of the pipeline


def _params(command: argparse.ArgumentParser) -> None:
    default = pipeline_commands.PARAMS
    command.add_argument("--params", default=default, metavar="FILE", help=f"default: {default}")


def _run(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="NAME",
        help="run this merge, stage or step with all that it needs, and publish nothing (repeat)",
    )
    command.add_argument(
        "--force",
        action="append",
        default=[],
        metavar="NAME",
        help="run this merge, stage or step although it is up to date (repeat)",
    )
    instead = command.add_mutually_exclusive_group()
    instead.add_argument("--dry-run", action="store_true", help="say what would run, and why")
    instead.add_argument(
        "--status", action="store_true", help="say how every stage, the champion and the last run stand"
    )
    _json(command)


def _json(command: argparse.ArgumentParser) -> None:
    command.add_argument("--json", action="store_true", help="print one JSON object")


def _init(command: argparse.ArgumentParser) -> None:
    command.add_argument("folder", type=Path)
    start = command.add_mutually_exclusive_group()
    start.add_argument("--params", type=Path, metavar="FILE", help="start from this file")
    start.add_argument(
        "--example", metavar="NAME", help="start from clip (default), language, or another of examples/"
    )


def _items(command: argparse.ArgumentParser) -> None:
    command.add_argument("names", nargs="*", metavar="NAME", help="only these items (default: all)")
    command.add_argument("--dvc-stage", action="store_true", help="only the item of the stage that DVC runs")


def _fit(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--recipe",
        type=Path,
        metavar="FILE",
        help="fit this recipe of a learned method instead, to the pipeline's examples",
    )
    command.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="with --recipe: gets recipe.yaml, for `mergeline merge --recipe`",
    )
    command.add_argument(
        "--examples",
        type=values.count,
        metavar="N",
        help="with --recipe: so many of each task (default: all)",
    )


_OWN: dict[str, tuple[_Options, ...]] = {"fit": (_fit,)}  # options that one step alone has


def _version(command: argparse.ArgumentParser) -> None:
    command.add_argument("version")


def _cron(command: argparse.ArgumentParser) -> None:
    command.add_argument("--cron", default="0 3 * * *", help="default: every night at three")


def _retention(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--dry-run", action="store_true", help="say what would be removed, and remove nothing"
    )
    command.add_argument(
        "--older-than",
        type=values.age,
        metavar="AGE",
        help="what was not used for so long, such as 12h or 30d (default: retention.days of params.yaml, or 30)",
    )
    command.add_argument(
        "--max-size",
        type=values.size,
        metavar="SIZE",
        help="and what was not used for longest, until so much is left of all that may go, counted together: factors, "
        "downloads, results and Prefect's database in .mergeline, and checkpoints and downloads in ~/.cache/mergeline "
        "(default: retention.gigabytes, or 20)",
    )


def _name(command: argparse.ArgumentParser) -> None:
    command.add_argument("name", metavar="NAME")


# --------------------------------------------------------------------------------------- of merges


def _family(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--base", metavar="P", help="a safetensors file, a folder, a URI, or org/name of the Hub"
    )
    command.add_argument("--expert", action="append", metavar="NAME=P", help="repeat for every expert")


def _recipe(command: argparse.ArgumentParser) -> None:
    command.add_argument("--recipe", type=Path, metavar="FILE", help="YAML, in place of the next three")
    command.add_argument("--method", metavar="ID", help="see `mergeline methods`")
    _family(command)
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
        "--keep",
        action="append",
        metavar="PATTERN=NAME",
        help="take such tensors from one expert, or base (repeat)",
    )
    _heads(command, "lay them beside the merge")
    _outside(command)
    command.add_argument(
        "--statistics",
        action="append",
        metavar="KIND=P",
        help="what the method reads besides; repeat for every file, or every expert's",
    )
    command.add_argument("--dtype", choices=["float32", "bfloat16", "float16"])
    command.add_argument("--seed", type=int, help="default: 0")
    _shard_size(command)
    command.add_argument(
        "--vocabulary",
        choices=["donor", "union"],
        help="the tokens of the merge, where they differ (default: donor)",
    )
    command.add_argument(
        "--layout",
        choices=["as_base", "packed", "per_expert"],
        help="how experts of a mixture lie in the merge (default: as_base)",
    )
    command.add_argument(
        "--packing",
        choices=["peft", "unsloth"],
        help="how LoRA of packed experts lies in its file (default: peft)",
    )
    command.add_argument(
        "--prompt-rows",
        choices=["matched", "as_stored"],
        help="how rows of soft prompts that have no order are put beside one another (default: matched)",
    )
    command.add_argument(
        "--donor", metavar="NAME", help="whose configuration and tokenizer are carried (default: base)"
    )
    _allow_pickle(command)
    command.add_argument(
        "--allow-locked",
        action="store_true",
        help="merge experts that are locked against it, as their owner permits",
    )
    command.add_argument(
        "--requantise",
        action="store_true",
        help="write what is quantised in the base (FP8, MXFP8, MXFP4) in its own format, with new scales",
    )


def _allow_pickle(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--allow-pickle",
        action="store_true",
        help="convert pickle checkpoints; only their tensors are read",
    )


def _outside(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--methods",
        action="append",
        default=[],
        type=Path,
        metavar="FILE",
        help="run a Python file that defines methods (repeat)",
    )


def _engine(command: argparse.ArgumentParser) -> None:
    command.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    _resources(command)
    _no_cache(command)
    command.add_argument(
        "--factors", type=Path, metavar="DIR", help="keep spectral decompositions there for the next merge"
    )


def _executor(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--executor",
        type=values.executor,
        metavar="WHERE",
        help="run units of work in other processes, for the same bytes: dask, dask:4, dask://HOST:PORT, or ray so",
    )


def _no_cache(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--no-cache",
        action="store_true",
        help="read the data of remote checkpoints over the network, without a copy here",
    )


def _resources(command: argparse.ArgumentParser) -> None:
    command.add_argument("--memory", type=values.size, metavar="SIZE", help="an upper bound, such as 2GiB")
    command.add_argument("--workers", type=int, metavar="N", help="default: one a core")


def _shard_size(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--shard-size", type=values.size, metavar="SIZE", help="split the output, such as 5GiB"
    )


def _out(command: argparse.ArgumentParser, metavar: str = "OUT") -> None:
    command.add_argument(
        "--out",
        required=True,
        type=Path,
        metavar=metavar,
        help="x.safetensors for one file, else a folder",
    )
    _force(command)


def _force(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--force", action="store_true", help="replace what is there and no earlier output; never an input"
    )


def _store(command: argparse.ArgumentParser) -> None:
    _out(command, "STORE")


def _sweep(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--params",
        metavar="FILE",
        help="search, score and rank every merge of a params.yaml instead; --out is the table, in Markdown",
    )
    _recipe(command)
    command.add_argument(
        "--grid",
        action="append",
        default=[],
        metavar="KEY=V1,V2,...",
        help="values of a parameter, or a JSON list; repeat for every parameter",
    )
    command.add_argument("--out", required=True, type=Path, metavar="DIR", help="a folder for each point")
    _force(command)


def _plan(command: argparse.ArgumentParser) -> None:
    command.add_argument("--table", action="store_true", help="what becomes of every tensor")
    _json(command)


def _extract_expert(command: argparse.ArgumentParser) -> None:
    command.add_argument("store", type=Path, metavar="STORE")
    command.add_argument("name", metavar="NAME")
    command.add_argument("--base", metavar="P", help="the store's base (default: where it was)")
    _out(command)
    _shard_size(command)


def _export(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "what",
        metavar="WHAT",
        help="NAME of the registry (its champion), NAME@ALIAS or NAME@VERSION; with --task a merge's folder",
    )
    command.add_argument(
        "to", nargs="?", metavar="TO", help="a folder, s3://... (what fsspec knows), or hf://org/name"
    )
    command.add_argument(
        "--license", metavar="ID", help="the Hub's id of the licence, where the cards of the parts say none"
    )
    command.add_argument("--private", action="store_true", help="a repository that is made is private")
    command.add_argument("--task", metavar="NAME", help="whose head: an expert's name")
    command.add_argument("--out", type=Path, metavar="OUT", help="a folder, with --task")
    _force(command)
    _shard_size(command)


def _transplant(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", metavar="MODEL", help="a folder, hf://org/name, or any other URI")
    command.add_argument("donor", metavar="DONOR", help="whose vocabulary and tokenizer it gets")
    command.add_argument(
        "--neighbours", type=int, default=64, metavar="N", help="rows that a new one is the sum of (64)"
    )
    _out(command)
    _shard_size(command)
    _resources(command)


def _align(command: argparse.ArgumentParser) -> None:
    command.add_argument("reference", metavar="REFERENCE", help="whose order the others get")
    command.add_argument(
        "models", nargs="+", metavar="[NAME=]MODEL", help="several are matched to one another, by MergeMany"
    )
    command.add_argument(
        "--statistics",
        metavar="P",
        help="match by these activations, of `mergeline collect-activations`, in place of the weights",
    )
    command.add_argument(
        "--restarts", type=values.count, default=1, metavar="N", help="descents, of which the best counts (1)"
    )
    command.add_argument("--seed", type=int, default=0, help="of the order of the descents (default: 0)")
    command.add_argument(
        "--attention-heads",
        type=values.count,
        metavar="N",
        help="where no configuration says how many there are",
    )
    command.add_argument(
        "--leave",
        action="append",
        default=[],
        metavar="KIND",
        help="groups that stay as they are: hidden, heads, residual, conv1 (repeat)",
    )
    command.add_argument(
        "--singular-vectors", action="store_true", help="say how far the leading ones point the same way"
    )
    command.add_argument("--memory", type=values.size, metavar="SIZE", help="an upper bound, such as 2GiB")
    _shard_size(command)
    _out(command)
    _json(command)


def _adapter(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--rank",
        type=values.rank,
        metavar="R",
        help="directions of each matrix, or a share of them such as 0.04; cat: the factors of adapters as they are",
    )
    command.add_argument(
        "--modules-to-save",
        action="append",
        default=[],
        metavar="PATTERN",
        help="keep such modules whole (repeat)",
    )
    command.add_argument(
        "--out", required=True, type=Path, help="a folder for PEFT, or x.safetensors for bare factors"
    )
    _force(command)


def _merge_experts(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", metavar="MODEL", help="a folder, a URI, or org/name of the Hub")
    command.add_argument(
        "--method",
        choices=["mc_smoe", "sub_moe", "prune"],
        default="mc_smoe",
        help="how groups are found and merged (default: mc_smoe)",
    )
    command.add_argument("--experts", type=values.count, metavar="N", help="how many stay in each layer")
    command.add_argument(
        "--groups",
        type=Path,
        metavar="FILE",
        help="JSON in place of --experts: lists of experts that become one",
    )
    command.add_argument(
        "--statistics", type=Path, metavar="P", help="what `mergeline collect-experts` wrote of the model"
    )
    command.add_argument(
        "--router",
        choices=["average", "dominant", "wide"],
        help="its row of a group; wide: all rows stay, and the group's expert stands in every member's place",
    )
    command.add_argument(
        "--no-align",
        action="store_true",
        help="of mc_smoe: average hidden units as they lie, as Mixtral's own code",
    )
    command.add_argument(
        "--rank",
        type=values.rank,
        metavar="R",
        help="of sub_moe: directions that are kept, or a share of them",
    )
    command.add_argument(
        "--compress",
        type=float,
        metavar="SHARE",
        help="of mc_smoe: cut experts to low rank, to this share of their numbers, and a few rows; written dense",
    )
    command.add_argument(
        "--sparse",
        type=float,
        metavar="SHARE",
        help="of --compress: rows of what the cut leaves that are kept (default: 0.1)",
    )
    command.add_argument("--dtype", choices=["float32", "bfloat16", "float16"])
    command.add_argument(
        "--layout", choices=["as_base", "packed", "per_expert"], help="default: as the model's"
    )
    _shard_size(command)
    command.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    _resources(command)
    _out(command)
    _json(command)


def _collect_experts(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", metavar="MODEL", help="a folder, a URI, or org/name of the Hub")
    command.add_argument("--texts", type=Path, required=True, metavar="FILE", help="UTF-8, a text a line")
    command.add_argument(
        "--outputs", action="store_true", help="run all experts on every token, too: sub_moe needs it"
    )
    command.add_argument(
        "--length", type=values.count, default=512, metavar="N", help="tokens of a text (512)"
    )
    command.add_argument(
        "--examples", type=values.count, metavar="N", help="take so many texts, drawn by the seed"
    )
    command.add_argument("--seed", type=int, default=0, help="default: 0")
    command.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    command.add_argument("--out", type=Path, required=True, metavar="P", help="a safetensors file")
    _force(command)


def _moe(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "config", type=Path, metavar="CONFIG", help="YAML, as of mergekit-moe (see docs/moe.md)"
    )
    command.add_argument(
        "--routers", type=Path, metavar="P", help="rows of the routers, safetensors, in place of gate_mode"
    )
    command.add_argument("--seed", type=int, default=0, help="of what is drawn at random (default: 0)")
    _shard_size(command)
    command.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    _resources(command)
    _out(command)
    _json(command)


def _sign(command: argparse.ArgumentParser) -> None:
    command.add_argument("out", type=Path)
    command.add_argument("--key", type=Path, required=True, metavar="FILE", help="a private key, in PEM")


def _verify(command: argparse.ArgumentParser) -> None:
    command.add_argument("out", type=Path)
    command.add_argument(
        "--public-key", type=Path, metavar="FILE", help="whose signature it must have (see `mergeline sign`)"
    )
    command.add_argument("--no-merge", action="store_true", help="check the files alone, without the inputs")
    _outside(command)
    _json(command)


# --------------------------------------------------------------------------------------- of looking


def _shell(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "shell",
        choices=[*completion.SHELLS, completion.NAMES],
        help=f"or {completion.NAMES}: what --only and --force of run may name",
    )
    _params(command)


def _methods(command: argparse.ArgumentParser) -> None:
    command.add_argument("id", nargs="?")
    _outside(command)
    form = command.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true")
    form.add_argument("--markdown", action="store_true", help="the page docs/methods.md")


def _heads(command: argparse.ArgumentParser, what: str) -> None:
    told = f"such tensors are each expert's own, as classifiers are: {what} (repeat)"
    command.add_argument("--heads", action="append", metavar="PATTERN", help=told)


def _inspect(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "checkpoint", nargs="*", help="a safetensors file, a folder, a URI, or org/name of the Hub"
    )
    command.add_argument("--table", action="store_true", help="every tensor of a checkpoint")
    _family(command)
    _heads(command, "leave them out")
    command.add_argument(
        "--rank", type=values.numbers, metavar="R1,R2,...", help="fractions of full rank, of a family"
    )
    command.add_argument(
        "--composition",
        action="store_true",
        help="what attention heads pass on to one another, of a family",
    )
    command.add_argument("--html", type=Path, metavar="FILE", help="write a page with curves, of a family")
    _force(command)
    _remote(command)
    _resources(command)
    _json(command)


def _remote(command: argparse.ArgumentParser) -> None:
    _allow_pickle(command)
    _no_cache(command)


def _line(command: argparse.ArgumentParser) -> None:
    command.add_argument("a", metavar="A", help="where the lines begin")
    command.add_argument(
        "others", nargs="+", metavar="[NAME=]B", help="where they end (several for one picture)"
    )
    command.add_argument("--plane", action="store_true", help="measure the plane through A and two others")
    command.add_argument(
        "--points",
        type=values.count,
        metavar="N",
        help="on each line (11), or along each axis of a plane (9)",
    )
    command.add_argument("--split", choices=["val", "test"], default="val", help="default: val")
    command.add_argument("--html", type=Path, metavar="FILE", help="write a page with the picture")
    _force(command)
    _json(command)


def _pareto(command: argparse.ArgumentParser) -> None:
    command.add_argument("merge", metavar="NAME", help="a merge whose search has ended")
    command.add_argument(
        "--at-least",
        action="append",
        default=[],
        metavar="TASK=SHARE",
        help="pick a point with this share of the task's expert's score, such as 0.95 (repeat); the best of the rest",
    )
    command.add_argument(
        "--at-least-score",
        action="append",
        default=[],
        metavar="TASK=SCORE",
        help="pick a point with this score or a better one (repeat)",
    )
    command.add_argument(
        "--prefer",
        action="append",
        default=[],
        metavar="TASK=WEIGHT",
        help="pick the best weighted mean (repeat); tasks that are not named count 0",
    )
    command.add_argument(
        "--foretold",
        action="store_true",
        help="points of the front that the quadratics of a search by map foretell, which were not measured",
    )
    command.add_argument(
        "--recipe",
        type=Path,
        metavar="FILE",
        help="write the picked point, or the best mean, as a recipe for `mergeline merge --recipe`",
    )
    command.add_argument("--html", type=Path, metavar="FILE", help="write a page with the picture")
    _force(command)
    _json(command)


def _layer_errors(command: argparse.ArgumentParser) -> None:
    command.add_argument("merge", metavar="MERGE", help="a merge of the pipeline's experts")
    command.add_argument(
        "--examples", type=values.count, metavar="N", help="of each task (default: as fits take)"
    )
    command.add_argument(
        "--ensembles",
        action="store_true",
        help="also beside the mean of all experts' logits, and of their features",
    )
    command.add_argument("--html", type=Path, metavar="FILE", help="write a page with curves")
    _force(command)
    _json(command)


def _collect_activations(command: argparse.ArgumentParser) -> None:
    command.add_argument("reference", metavar="REFERENCE", help="whose order the other gets")
    command.add_argument("model", metavar="MODEL")
    command.add_argument(
        "--examples", type=values.count, metavar="N", help="of each task (default: as fits take)"
    )
    command.add_argument(
        "--attention-heads",
        type=values.count,
        metavar="N",
        help="where no configuration says how many there are",
    )
    command.add_argument(
        "--out", type=Path, required=True, metavar="P", help="a safetensors file, for align --statistics"
    )
    _force(command)


def _diff(command: argparse.ArgumentParser) -> None:
    command.add_argument("a", metavar="A", help="a safetensors file, a folder, a URI, or org/name of the Hub")
    command.add_argument("b", metavar="B", help="the same")
    command.add_argument(
        "--sort",
        choices=["norm", "name"],
        default="norm",
        help="of tensors: the largest relative norm first (default), or names",
    )
    command.add_argument(
        "--limit", type=values.count, metavar="N", help="show so many tensors (default: all)"
    )
    _remote(command)
    _json(command)
