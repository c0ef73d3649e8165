"""The text that commands print: sizes, tables, summaries and progress."""

from __future__ import annotations

import sys
import time
from typing import Any, Callable, Iterator, Mapping, Sequence, TextIO

from mergeline.merging.errors import printable

_LONGEST = 2000  # characters of metadata that are printed: a store describes every tensor in its


def say(
    *values: object, sep: str = " ", end: str = "\n", file: TextIO | None = None, flush: bool = False
) -> None:
    """As `print`, but what files hold is shown, whatever it is: only line feeds and tabs are obeyed.

    Of values that stand on lines of their own (`sep` is a line feed) each stays on its line.
    """
    obeyed = "\t" if sep == "\n" else "\n\t"
    print(*(printable(str(v), but=obeyed) for v in values), sep=sep, end=end, file=file, flush=flush)


def note(text: str) -> None:
    """A line on stderr, seen at once."""
    say(text, file=sys.stderr, flush=True)


def size(count: float) -> str:
    """Bytes in the largest unit of which there is one."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} TiB"


def as_json(value: Any, indent: int | None = 1) -> str:
    """A value in JSON, as `--json` prints it."""
    import json  # the help does without

    return json.dumps(value, indent=indent)


def requantised(manifest: Mapping[str, Any]) -> Iterator[str]:
    """What rounding to the base's quantised format changed, where it was."""
    if found := manifest.get("requantised"):
        yield (
            f"requantised {found['tensors']} tensors: relative error {found['mean']:.2%} in the mean, "
            f"{found['worst']:.2%} at most ({found['worst_tensor']})"
        )


def plan(summary: Mapping[str, Any]) -> Iterator[str]:
    """What a merge will do, of `merging.engine.plan.Plan.summary`."""
    tensors = summary["tensors"]
    yield f"method     {summary['method']} {as_json(summary['params'], indent=None)}"
    yield f"tensors    {tensors['merge']} merged, {tensors['copy']} copied"
    yield f"treatment  {', '.join(f'{word}: {count}' for word, count in summary['treatments'].items())}"
    yield f"read       {size(summary['bytes_read'])}, write {size(summary['bytes_written'])}"
    yield f"memory     {size(summary['peak_bytes'])} a worker at the largest tensor, besides the imports"
    yield f"time       about {summary['seconds']:g} s on one core"
    if store := summary.get("store"):
        kept = store["once"] + sum(store["experts"].values())
        own = ", ".join(f"{name} {size(count)}" for name, count in store["experts"].items())
        yield printable(
            f"store      {size(kept)} by `mergeline compress` ({size(store['once'])} once; {own}); a checkpoint takes "
            f"{size(store['checkpoint'])}"
        )
    for name, source in summary.get("sources", {}).items():
        yield printable(f"source     {name}: {source}")
    if network := summary.get("network"):
        yield f"network    {_traffic(network)} brought the headers"
        yield f"--no-cache about {size(summary['bytes_over_network'])} would come over the network"
    for kind in ("warnings", "problems"):
        for line in summary[kind]:
            yield printable(f"{kind[:-1]:10} {line}")


def plan_table(rows: Sequence[Mapping[str, Any]], params: Mapping[str, Any]) -> Iterator[str]:
    """A line for each tensor; of its parameters those that are not the recipe's."""
    lines: list[tuple[str, ...]] = []
    for row in rows:
        own = {k: v for k, v in row.get("params", {}).items() if k not in params or v != params[k]}
        settings = " ".join(f"{key}={as_json(value, indent=None)}" for key, value in own.items())
        lines.append(
            (
                printable(row["tensor"]),
                _shape(row),
                row["action"],
                row["treatment"],
                row.get("method", ""),
                settings,
            )
        )
    yield from _aligned(lines)


def _shape(row: Mapping[str, Any]) -> str:
    return "x".join(map(str, row["shape"])) or "scalar"


def _aligned(lines: Sequence[tuple[str, ...]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*lines)]
    for line in lines:
        yield "  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip()


def over_network(found: Mapping[str, Any]) -> Iterator[str]:
    """What came over the network, where something did."""
    if network := found.get("network"):
        yield f"network: {_traffic(network)}"


def _traffic(network: Mapping[str, int]) -> str:
    return f"{size(network['bytes'])} in {network['answers']} answers"


def store(kept: Mapping[str, Any]) -> Iterator[str]:
    """What a store keeps once and of each expert, of the part `store` of its manifest."""
    whole, own, errors = kept["checkpoint"], kept["experts"], kept["errors"]["experts"]
    rows = {"once": kept["once"], **own}
    width = max(map(len, rows))
    for name, count in rows.items():
        share = count / max(whole, 1)
        line = f"{name:{width}}  {size(count):>10}  {share:6.1%} of a checkpoint, {size(whole)}"
        if name in own and (error := errors.get(name)):
            worst = error["worst_tensor"]
            line += f"; error {error['all']:.2%}, at most {error['tensors'][worst]:.2%} ({worst})"
        yield printable(line)
    total = sum(rows.values())
    share = total / max(len(own) * whole, 1)
    yield f"{len(own)} experts in {size(total)}, {share:.1%} of their checkpoints"
    if errors:
        yield f"errors are relative to {kept['errors']['of']}, in the Frobenius norm"


def adapter(manifest: Mapping[str, Any]) -> Iterator[str]:
    """The rank of a LoRA adapter, and how much of what is added to the base is in it and is not."""
    made, left = manifest["adapter"], manifest["adapter"]["left_out"]
    ranks = sorted({matrix["rank"] for matrix in made["matrices"].values()})
    rank = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
    yield (
        f"{len(made['matrices'])} matrices at rank {rank}, {size(manifest['output']['bytes'])}: "
        f"{made['energy']:.2%} of the squared norm of what is added to the base"
    )
    if left["tensors"]:
        share = f"{left['energy']:.2%} of it, most of it '{left['largest']}'"
        yield f"left out: {left['tensors']} tensors with {share}"


def line(found: Mapping[str, Any]) -> Iterator[str]:
    """What lies on the lines from a model to others."""
    yield f"mean {found['measure']} on {found['split']}, from {found['a']} to:"
    for name, one in found["lines"].items():
        values = " ".join(f"{mean:.3f}" for mean in one["means"])
        yield f"{name}  barrier {one['barrier']:.3f}, distance {one['distance']:.4g}:  {values}"


def plane(found: Mapping[str, Any]) -> Iterator[str]:
    """The means over the plane through three models, as it lies, and the best of them."""
    y, x = found["best"]
    yield f"mean {found['measure']} on {found['split']}, over the plane through"
    for name, (right, up) in found["corners"].items():
        yield printable(f"  {name}, at {right:.4g}, {up:.4g}")
    rows = zip(reversed(found["ys"]), reversed(found["means"]))
    yield from _aligned(
        [(f"{up:.4g}", *(f"{mean:.3f}" for mean in means)) for up, means in rows]
        + [("", *(f"{right:.4g}" for right in found["xs"]))]
    )
    weights = ", ".join(f"{weight:.3f}" for weight in found["weights"][y][x])
    yield f"the best has {found['means'][y][x]:.3f}, with weights {weights}"


def front(found: Mapping[str, Any], picked: int | None) -> Iterator[str]:
    """A line for each point of a front, of `tasks.pareto.front_of`; where one was picked, it is marked."""
    points, tasks = found["points"], found["tasks"]
    what = f"{len(points)} of {len(found['all'])} points are on the front; scores on validation"
    if found["foretold"]:
        what = f"{len(points)} points of the front that quadratics foretell; scores that were not measured"
    yield f"{found['merge']}: {what}" + (", and shares of the experts'" if found["experts"] else "")
    several = len({point["method"] for point in points}) > 1
    lines = [("", "point", "mean", *tasks, "parameters")]
    for i, point in enumerate(points):
        cells = [
            f"{point['tasks'][task]:.3f}"
            + (f" {point['shares'][task]:4.0%}" if task in point["shares"] else "")
            for task in tasks
        ]
        settings = " ".join(f"{key}={as_json(value, indent=None)}" for key, value in point["params"].items())
        mark = "*" if i == picked else ""
        settings = f"{point['method']} {settings}" if several else settings
        number = "-" if point["index"] is None else str(point["index"])
        lines.append((mark, number, f"{point['mean']:.3f}", *cells, settings))
    yield from _aligned([tuple(map(printable, line)) for line in lines])
    if surrogate := found["surrogate"]:
        errors = [one["front_error"] for one in surrogate["tasks"].values()]
        yield (
            f"proposed by quadratics of {surrogate['sampled']} sampled points; at those that they proposed they are "
            f"off by {min(errors):.2g} to {max(errors):.2g}, by tasks"
        )


def layer_errors(found: Mapping[str, Any]) -> Iterator[str]:
    """How far a merge's activations are from the experts', by task and stage; what to do first."""
    for advice in found["advice"]:
        yield printable(advice["sentence"])
    if not found["advice"]:
        yield "after every layer the merge is nearer to the experts than the base is"
    if ensembles := found.get("ensembles"):
        yield from (printable(advice["sentence"]) for advice in ensembles["advice"])
        yield "agreement with the task's expert of the merge, of the mean of logits, of features:"
        lines = {**ensembles["tasks"], "mean": ensembles["mean"]}
        ways = ("merge", "logits", "features")
        yield from _aligned(
            [(printable(task), *(f"{own[way]:.3f}" for way in ways)) for task, own in lines.items()]
        )
    for task, own in found["tasks"].items():
        beside = f"{task}, beside expert '{own['expert']}'"
        yield printable(f"{beside}: errors of the merge, of the layer itself, of the base")
        width = max(map(len, own["stages"]))
        for stage, *errors in zip(own["stages"], own["merge"], own["own"], own["base"]):
            yield printable(f"  {stage.ljust(width)}  {'  '.join(f'{error:.3f}' for error in errors)}")


def mixture(manifest: Mapping[str, Any]) -> Iterator[str]:
    """How many experts of a mixture are left, in how many layers, and which are in no group."""
    made = manifest["mixture"]
    counts = [len(groups) for groups in made["merged"].values()]
    stay = str(counts[0]) if len(set(counts)) == 1 else f"{min(counts)} to {max(counts)}"
    alone = sum(len(group) == 1 for groups in made["merged"].values() for group in groups)
    yield (
        f"{len(counts)} layers of {made['of']} experts: {stay} are left, {alone} of {sum(counts)} as they were, "
        f"{size(manifest['output']['bytes'])}"
    )
    if left := sum(map(len, made["left_out"].values())):
        yield f"left out: {left} experts"
    if cut := made.get("compressed"):
        yield (
            f"cut to low rank and sparse rows: {cut['numbers']:.1%} of the experts' numbers, a relative error of "
            f"{cut['error']:.2%}; written dense, and no smaller (a store of `losparse` is)"
        )


def moe(manifest: Mapping[str, Any]) -> Iterator[str]:
    """What a mixture of dense models is, and what of its router is to be known."""
    made = manifest["moe"]
    shared = " and a shared one" if made["shared"] else ""
    yield (
        f"{made['kind']}: {len(made['experts'])} experts{shared}, a token sent to {made['experts_per_token']}, "
        f"{size(manifest['output']['bytes'])}"
    )
    if made["routers"] != "file":
        yield "its router is drawn at random: train it"
    if layers := made["unbalanced"]:
        yield f"rows of the router are nearly alike in {len(layers)} layers, first {layers[0]}: take other prompts"


def checkpoint(found: Mapping[str, Any]) -> Iterator[str]:
    """What is in a checkpoint, of `tasks.inspection.describe`."""
    dtypes = ", ".join(f"{count} {dtype}" for dtype, count in found["dtypes"].items())
    yield found["path"]
    if found["digest"]:
        yield f"  {found['digest']}"
    yield f"  {found['tensors']} tensors ({dtypes}), {size(found['bytes'])}"
    for name, part in found["components"].items():
        yield printable(f"    {name}: {part['tensors']} tensors, {size(part['bytes'])}")
    towers = (f"{count} in {tower}" if tower else str(count) for tower, count in found["layers"].items())
    layers = f", layers: {', '.join(towers)}" if found["layers"] else ""
    yield printable(f"  architecture: {found['architecture']}{layers}")
    for name, value in found["metadata"].items():
        yield printable(f"  {name}: {value if len(value) <= _LONGEST else value[:_LONGEST] + ' ...'}")
    if found["companions"]:
        yield printable(f"  beside the weights: {', '.join(found['companions'])}")
    for line in found["notes"]:
        yield printable(f"  note: {line}")
    if not found["digest"]:
        others = "".join(f", {name}" for name in found["unread"])
        yield printable(f"  not read: values{others}; --no-cache reads them over the network, for the digest")
    yield from (f"  {line}" for line in over_network(found))


def tensors(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """A line for each tensor, of the table of `tasks.inspection.describe`."""
    yield from _aligned(
        [(printable(row["tensor"]), row["dtype"], _shape(row), row["role"] or "") for row in rows]
    )


_SIZES = {"relative": "relative norm", "norm": "norm", "largest": "largest"}


def differences(found: Mapping[str, Any]) -> Iterator[str]:
    """How two checkpoints differ, of `tasks.inspection.differences`."""
    rows, count, unread = found["differences"], found["differing"], found["unread"]
    if not count:
        yield "the same names, dtypes and shapes" if unread else "the same tensors, bit for bit"
    width = max((len(row["tensor"]) for row in rows), default=0)
    for row in rows:
        words = [row["words"]] if "words" in row else []
        if "norm" in row:
            words += [f"{word} {number(row[key])}" for key, word in _SIZES.items()]
        yield f"{row['tensor']:{width}}  {', '.join(words)}"
    if len(rows) < count:
        yield f"and {count - len(rows)} more"
    in_all = f"in all, relative norm {number(found['relative_norm'])}, norm {number(found['norm'])}"
    if count:
        yield f"{count} of {found['tensors']} tensors differ" + ("" if unread else f"; {in_all}")
    if unread:
        yield (
            f"not read: values of {unread} tensors, which may differ; --no-cache reads them over the network "
            f"({size(found['unread_bytes'])} of each checkpoint)"
        )
    yield from over_network(found)


def number(value: float | None) -> str:
    """Four digits of a number; None is one that is not finite."""
    return "not finite" if value is None else f"{value:.4g}"


def progress(verb: str = "merging", unit: str = "tensors") -> Callable[[int, int], None]:
    """Shows on stderr what was there already; and on a terminal, once two seconds have passed, how far it is.

    unit: what is counted. Counts that know their bytes (`merging.engine.work.Count`) are shown with these and a rate.
    """
    start, terminal = time.monotonic(), sys.stderr.isatty()
    first: tuple[float, int] | None = None  # when one was finished first, and the bytes done by then

    def show(done: int, total: int) -> None:
        nonlocal first
        now, bytes_done = time.monotonic(), getattr(done, "bytes", 0)
        if first is None:
            first = now, bytes_done
            if done > 1:
                print(f"going on: {done - 1} of {total} {unit} are there", file=sys.stderr)
        if terminal and now - start > 2:
            words = f"{verb} {done}/{total} {unit}"
            if bytes_total := getattr(total, "bytes", 0):
                words += f", {size(bytes_done)} of {size(bytes_total)}"
                since, before = first
                words += time_left(bytes_done - before, bytes_total - before, now - since, size)
            end = "\n" if done == total else ""
            print(f"\r{words}\033[K", end=end, file=sys.stderr, flush=True)

    return show


def time_left(
    done: int, total: int, seconds: float, amount: Callable[[float], str] = lambda count: f"{count:.3g}"
) -> str:
    """The end of a line on what took so many seconds by now: its rate, and the time that is left."""
    if done <= 0 or seconds <= 0 or done >= total:
        return ""
    left = round(seconds / done * (total - done))
    hours, minutes = divmod(left // 60, 60)
    clock = f"{hours}:{minutes:02}:{left % 60:02}" if hours else f"{minutes}:{left % 60:02}"
    return f", {amount(done / seconds)}/s, {clock} left"
