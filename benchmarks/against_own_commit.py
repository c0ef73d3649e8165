"""Mergeline against an earlier commit of its own, in turns in one run: CPU-seconds and memory of whole processes.

    git worktree add /tmp/before COMMIT
    python against_own_commit.py /tmp/before "python -m flows.cli" --llama DIR --clip DIR --runs 3

The earlier commit runs in its own folder, with the command that starts its command line there; both use this
environment's Python. DIR are families that make_inputs.py wrote. Prints a row for each job: medians and ratios.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import statistics
import sys
from pathlib import Path

from measure import Cost, run

# Job: family, experts, parameters.
JOBS: dict[str, tuple[str, int, list[str]]] = {
    "linear": ("llama", 4, []),
    "task_arithmetic": ("llama", 4, []),
    "slerp": ("llama", 2, []),
    "karcher": ("llama", 4, []),
    "ties": ("llama", 4, []),
    "breadcrumbs": ("llama", 4, []),
    "sce": ("llama", 4, []),
    "della": ("llama", 4, []),
    "iso_c": ("clip", 8, []),
    "tsv_merge": ("clip", 8, []),
    "cart": ("clip", 8, []),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("before", type=Path)
    parser.add_argument("command")
    parser.add_argument("--llama", type=Path, required=True)
    parser.add_argument("--clip", type=Path, required=True)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("/tmp/against-own-commit"))
    parser.add_argument(
        "--jobs", nargs="+", default=[], metavar="JOB", help=f"of {', '.join(JOBS)} (default: all)"
    )
    a = parser.parse_args()
    families = {"llama": a.llama.resolve(), "clip": a.clip.resolve()}
    sides = {
        "before": (a.before, [sys.executable if w == "python" else w for w in shlex.split(a.command)]),
        "now": (Path(__file__).parents[1], [sys.executable, "-m", "mergeline.flows.cli"]),
    }
    print("| job | CPU-s before | now | ratio | MiB before | now | ratio |\n|---|---|---|---|---|---|---|")
    for job in a.jobs or ["help", *JOBS]:
        costs: dict[str, list[Cost]] = {side: [] for side in sides}
        for _ in range(a.runs):
            for side, (folder, command) in sides.items():
                shutil.rmtree(a.out, ignore_errors=True)
                cost = run([*command, *_arguments(job, families, a.out)], cwd=folder)
                if cost.failed:
                    sys.exit(f"{job}, {side}: {cost.failed}")
                costs[side].append(cost)
        cpu, mib = (
            {side: statistics.median(getattr(c, what) for c in found) for side, found in costs.items()}
            for what in ("cpu_s", "peak_mib")
        )
        cells = [f"{v['before']:.3g} | {v['now']:.3g} | {v['now'] / v['before']:.2f}" for v in (cpu, mib)]
        print(f"| {job} | {' | '.join(cells)} |", flush=True)
    shutil.rmtree(a.out, ignore_errors=True)


def _arguments(job: str, families: dict[str, Path], out: Path) -> list[str]:
    if job == "help":
        return ["--help"]
    family, count, params = JOBS[job]
    experts = sorted(p for p in families[family].iterdir() if p.name.startswith("expert"))[:count]
    named = [part for t, path in enumerate(experts) for part in ("--expert", f"e{t}={path}")]
    base = next(p for p in families[family].iterdir() if p.name.startswith("base"))
    own = ["--base", str(base)] if job not in ("linear", "slerp", "karcher") else []
    return ["merge", "--method", job, *own, *named, *params, "--workers", "1", "--out", str(out)]


if __name__ == "__main__":
    main()
