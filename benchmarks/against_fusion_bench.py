"""Mergeline beside FusionBench: the same merges of eight CLIP ViT-B/32 vision towers (fp32), in turns.

    python against_fusion_bench.py --inputs DATA/clip --peer PEERS/fusion_bench
    python against_fusion_bench.py ... --methods ties      # FusionBench's is stopped at --memory (14 GiB)

After tsv_merge, Mergeline sweeps over three scales, whose cost beyond the first merge is divided by two. Writes
results/fusion_bench.json and results/fusion_bench_outputs.json.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from compare import difference
from measure import (
    Cost,
    alternate,
    each_further_point,
    figures,
    merge_command,
    run,
    save,
    sweep_command,
    table,
)

JOBS: dict[str, dict[str, Any]] = {
    "iso_c": {"scale": 1.0},
    "tsv_merge": {"scale": 1.0},
    "iso_cts": {"scale": 1.0, "common_fraction": 0.8},
    "average": {},
    "task_arithmetic": {"scale": 0.3},
    "magmax": {"scale": 0.5},
    "ties": {"scale": 0.3, "density": 0.2, "reduce": "sum"},
}
SWEEPS = {"tsv_merge": {"scale": [1.0, 0.7, 1.3]}}


def run_peer(method: str, inputs: Path, peer: Path, work: Path, threads: int | None, memory: float) -> Cost:
    driver = Path(__file__).with_name("peer_fusion_bench.py").resolve()
    command = [peer / "bin" / "python", driver, method, inputs, work / "fusion_bench"]
    return run(command, threads=threads, memory_gib=memory)


def run_ours(
    method: str, inputs: Path, work: Path, out: str, threads: int | None, parameters: dict[str, Any]
) -> Cost:
    return run(our_command(method, inputs, work / out, threads, parameters), threads=threads)


def our_command(
    method: str, inputs: Path, out: Path, threads: int | None, parameters: dict[str, Any]
) -> list[str]:
    experts = sorted(inputs.glob("expert*"))
    return merge_command(method, experts, out, base=inputs / "base", threads=threads, **parameters)


def bench(a: argparse.Namespace, method: str, threads: int | None) -> None:
    """Measure one method, every run in a fresh folder (nothing stored before helps), then compare outputs."""
    with tempfile.TemporaryDirectory(dir=a.work) as folder:
        latest: dict[str, Path] = {}

        def fresh(side: str) -> Path:
            latest[side] = Path(tempfile.mkdtemp(dir=folder))
            return latest[side]

        memory = a.memory if method == "ties" else 0
        sides = {
            "fusion_bench": lambda: run_peer(method, a.inputs, a.peer, fresh("peer"), threads, memory),
            "mergeline": lambda: run_ours(method, a.inputs, fresh("ours"), "merged", threads, JOBS[method]),
        }
        costs = alternate({side: job for side, job in sides.items() if side in a.sides}, a.repeats)
        if method in SWEEPS and "mergeline" in costs:
            grid, out = SWEEPS[method], Path(tempfile.mkdtemp(dir=folder), "sweep")
            sweep = run(sweep_command(our_command(method, a.inputs, out, threads, {}), grid), threads=threads)
            costs["mergeline sweep"] = sweep
            costs["mergeline sweep, each further point"] = each_further_point(
                costs["mergeline"], sweep, len(grid["scale"])
            )
        rows = [
            {"job": method, "side": s, "threads": threads or "default", **figures(c)}
            for s, c in costs.items()
        ]
        save("fusion_bench", rows, ("job", "side", "threads"))
        for row in rows:
            print(table(HEADER, [[row.get(k) for k in KEYS]]).splitlines()[-1], flush=True)
        if len(latest) == 2 and not any(cost.failed for cost in costs.values()):
            found = difference(latest["peer"] / "fusion_bench", latest["ours"] / "merged", a.inputs / "base")
            save("fusion_bench_outputs", [{"job": method, **asdict(found)}], ("job",))
            print(found, flush=True)


HEADER = ["job", "side", "threads", "CPU-s", "wall s", "peak MiB", "failed"]
KEYS = ["job", "side", "threads", "cpu_s", "wall_s", "peak_mib", "failed"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--inputs", type=Path, required=True, help="a family that make_inputs.py clip wrote")
    parser.add_argument("--peer", type=Path, required=True, help="FusionBench's virtual environment")
    parser.add_argument("--work", type=Path, help="where outputs go for a while (default: the system's)")
    parser.add_argument(
        "--methods", nargs="+", choices=JOBS, default=[job for job in JOBS if job != "ties"], metavar="METHOD"
    )
    parser.add_argument("--sides", nargs="+", default=["fusion_bench", "mergeline"])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 0], help="0: the library's default")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument(
        "--memory", type=float, default=14.0, help="GiB of address space for FusionBench's ties"
    )
    a = parser.parse_args()
    a.inputs, a.peer = a.inputs.resolve(), a.peer.absolute()
    print(table(HEADER, []))
    for method in a.methods:
        for threads in a.threads:
            bench(a, method, threads or None)


if __name__ == "__main__":
    main()
