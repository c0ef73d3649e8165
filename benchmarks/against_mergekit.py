"""Mergeline beside mergekit: the same configurations on a Llama-shaped family (bf16), in turns, whole processes.

    python against_mergekit.py --inputs DATA/llama --peer PEERS/mergekit
    python against_mergekit.py ... --methods ties slerp --threads 1 --repeats 3
    python against_mergekit.py --inputs FAMILY ... --results smollm2 --methods linear ties    # another family

A family is a folder with base and expert0, expert1, ... . Writes results/NAME.json (cost by job, side and threads) and
results/NAME_outputs.json (how outputs differ). The job `help` is what `--help` costs: the start of the program.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from compare import difference
from karcher_error import karcher_error
from measure import Cost, alternate, figures, find_mergeline, merge_command, run, save, table

WEIGHT = 0.3


@dataclass(frozen=True)
class Job:
    """One merge: a configuration of mergekit, which Mergeline runs as it is.

    peer: the parameters of every expert; whole: of the merge. own: Mergeline's own way of the method, measured as well.
    inputs: how many experts; base: as a reference, or (slerp) as the first of the inputs, or (None) not at
    all. random: outputs cannot be compared element by element.
    """

    method: str
    peer: dict[str, Any] = field(default_factory=dict)
    whole: dict[str, Any] = field(default_factory=dict)
    own: dict[str, Any] | None = None
    inputs: int = 4
    base: str | None = "reference"
    random: bool = False


JOBS = {
    "linear": Job("linear", {"weight": WEIGHT}, base=None),
    "task_arithmetic": Job("task_arithmetic", {"weight": WEIGHT}),
    "ties": Job("ties", {"weight": WEIGHT, "density": 0.2}, own={"density": 0.2}),
    "breadcrumbs": Job("breadcrumbs", {"weight": WEIGHT, "density": 0.85, "gamma": 0.01}),
    "sce": Job("sce", whole={"select_topk": 0.2}),
    "della": Job(
        "della", {"weight": WEIGHT, "density": 0.5, "epsilon": 0.1}, random=True,
        own={"density": 0.5, "epsilon": 0.1, "weights": [WEIGHT] * 4, "scale": 1.0},
    ),
    "dare": Job("dare_linear", {"weight": WEIGHT, "density": 0.5}, random=True),
    "slerp": Job("slerp", whole={"t": 0.4}, inputs=1, base="input"),
    "karcher": Job("karcher", base=None),
    "model_stock": Job("model_stock"),
    "dare_ties": Job("dare_ties", {"weight": WEIGHT, "density": 0.5}, random=True),
    "breadcrumbs_ties": Job("breadcrumbs_ties", {"weight": WEIGHT, "density": 0.85, "gamma": 0.01}),
    "nuslerp": Job("nuslerp", {"weight": 1.0}, inputs=2),
    "multislerp": Job("multislerp", {"weight": 1.0}, base=None),
    "nearswap": Job("nearswap", whole={"t": 3e-4}, inputs=1),
    "arcee_fusion": Job("arcee_fusion", inputs=1),
    "ram": Job("ram", whole={"epsilon": 5e-4}),
}  # fmt: skip


def experts_of(job: Job, family: Path) -> list[Path]:
    """The experts of a job: fewer, where the family has fewer."""
    return sorted(family.glob("expert*"))[: job.inputs]


def configuration(job: Job, family: Path, arithmetic: str) -> str:
    """mergekit's configuration (JSON, which is YAML); arithmetic: the dtype that mergekit computes in."""
    models: list[dict[str, Any]] = [{"model": str(family / "base")}] if job.base == "input" else []
    for expert in experts_of(job, family):
        models.append({"model": str(expert)} | ({"parameters": job.peer} if job.peer else {}))
    whole: dict[str, Any] = {"merge_method": job.method, "models": models, "dtype": arithmetic}
    if arithmetic != "bfloat16":
        whole["out_dtype"] = "bfloat16"
    if job.base:
        whole["base_model"] = str(family / "base")
    if job.whole:
        whole["parameters"] = job.whole
    return json.dumps(whole, indent=1)


def run_peer(a: argparse.Namespace, job: Job, out: Path, threads: int | None) -> Cost:
    return run([a.peer / "bin" / "mergekit-yaml", written(a, job, out), out], threads=threads)


def run_ours(a: argparse.Namespace, job: Job, out: Path, threads: int | None) -> Cost:
    workers = ["--workers", str(threads)] if threads else []
    recipe = written(a, job, out)
    return run([find_mergeline(), "merge", "--recipe", recipe, "--out", out, *workers], threads=threads)


def written(a: argparse.Namespace, job: Job, out: Path) -> Path:
    """The configuration's file, beside an output that is not there yet."""
    shutil.rmtree(out, ignore_errors=True)
    config = out.with_suffix(".yml")
    config.write_text(configuration(job, a.inputs, a.arithmetic))
    return config


def run_own(job: Job, family: Path, out: Path, threads: int | None) -> Cost:
    """Run Mergeline's own way of the method."""
    shutil.rmtree(out, ignore_errors=True)
    command = merge_command(
        job.method, experts_of(job, family), out, base=family / "base", threads=threads, **job.own
    )
    return run([*command, "--dtype", "bfloat16"], threads=threads)


def compare(name: str, job: Job, family: Path, folder: Path) -> dict[str, Any]:
    """How the two outputs of a job differ."""
    theirs, ours = folder / "mergekit", folder / "mergeline"
    row: dict[str, Any] = {"job": name}  # stays alone where there is nothing to say
    if job.random:
        row["note"] = "random masks: not comparable element by element"
    elif theirs.exists() and ours.exists():
        try:
            row |= asdict(difference(theirs, ours, family / "base"))
        except ValueError as error:  # not the same tensors, or not in the same dtype
            row["note"] = str(error)
    if name == "karcher":
        errors = {
            out.name: karcher_error(experts_of(job, family), out) for out in (theirs, ours) if out.exists()
        }
        row |= {f"error_{side}": error for side, error in errors.items()}
    return row


def bench(a: argparse.Namespace, name: str) -> None:
    """Measure one job with each number of threads, then compare what came out."""
    job = JOBS[name]
    with tempfile.TemporaryDirectory(dir=a.work) as work:
        folder = Path(work)
        for threads in a.threads:
            sides = {}
            if "mergekit" in a.sides:
                sides["mergekit"] = partial(run_peer, a, job, folder / "mergekit", threads)
            if "mergeline" in a.sides:
                sides["mergeline"] = partial(run_ours, a, job, folder / "mergeline", threads)
                if job.own is not None:
                    sides["mergeline default"] = partial(run_own, job, a.inputs, folder / "default", threads)
            costs = alternate(sides, a.repeats)
            label = threads or "default"
            rows = [{"job": name, "side": s, "threads": label, **figures(c)} for s, c in costs.items()]
            save(a.results, rows, ("job", "side", "threads"))
            for side, cost in costs.items():
                print(table_row(name, side, label, cost), flush=True)
        if any(cost.failed for cost in costs.values()):
            return
        found = compare(name, job, a.inputs, folder)
        if len(found) > 1:
            save(f"{a.results}_outputs", [found], ("job",))
            print(f"  {found}", flush=True)


def bench_help(a: argparse.Namespace) -> None:
    """What `--help` costs on each side."""
    commands = {
        "mergekit": [a.peer / "bin" / "mergekit-yaml", "--help"],
        "mergeline": [find_mergeline(), "--help"],
    }
    costs = alternate({side: partial(run, commands[side]) for side in a.sides}, max(3, a.repeats))
    rows = [{"job": "help", "side": side, "threads": 1, **figures(cost)} for side, cost in costs.items()]
    save(a.results, rows, ("job", "side", "threads"))
    for side, cost in costs.items():
        print(table_row("help", side, 1, cost), flush=True)


def table_row(job: str, side: str, threads: int | str, cost: Cost) -> str:
    row = [job, side, threads, cost.cpu_s, cost.wall_s, cost.peak_mib, cost.failed]
    return table(HEADER, [row]).splitlines()[-1]


HEADER = ["job", "side", "threads", "CPU-s", "wall s", "peak MiB", "failed"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--inputs", type=Path, required=True, help="a family that make_inputs.py llama wrote")
    parser.add_argument("--peer", type=Path, required=True, help="mergekit's virtual environment")
    parser.add_argument("--work", type=Path, help="where outputs go for a while (default: the system's)")
    parser.add_argument(
        "--methods", nargs="+", choices=["help", *JOBS], default=["help", *JOBS], metavar="METHOD"
    )
    parser.add_argument(
        "--sides", nargs="+", choices=["mergekit", "mergeline"], default=["mergekit", "mergeline"]
    )
    parser.add_argument(
        "--threads", nargs="+", type=int, default=[1, 0], help="OMP_NUM_THREADS; 0: the library's default"
    )
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument(
        "--arithmetic", choices=["bfloat16", "float32"], default="bfloat16",
        help="what mergekit computes in; Mergeline computes in float32 or float64 and rounds once",
    )  # fmt: skip
    parser.add_argument("--results", default="mergekit", help="the name of the results' files")
    a = parser.parse_args()
    a.threads = [threads or None for threads in a.threads]
    a.inputs, a.peer = a.inputs.resolve(), a.peer.absolute()
    print(table(HEADER, []))
    for name in a.methods:
        if name == "help":
            bench_help(a)
        else:
            bench(a, name)


if __name__ == "__main__":
    main()
