"""Two workers of Dask and of Ray beside one, after all have imported what they need.

    python make_inputs.py llama SMALL --layers 4 --hidden 512 --inter 2048 --kv 512 --vocab 4096
    python executors.py --inputs SMALL

Times are CPU-seconds, which hold on a shared machine: of the process that gives out the units, and of the worker that
worked longest. Their sum is what a merge takes at most where every process has a core. Efficiency is that of one worker
over twice that of two; medians. Writes results/executors.json.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

from measure import load, save, table

JOBS: dict[str, dict[str, Any]] = {"linear": {}, "ties": {"density": 0.2}, "cart": {"rank": 0.08}}
KEYS = ("method", "engine")
_TICKS = os.sysconf("SC_CLK_TCK")


def own_pid(seconds: float) -> int:
    time.sleep(seconds)
    return os.getpid()


def pids(executor: Executor, workers: int) -> list[int]:
    """The processes of the workers."""
    found: set[int] = set()
    while len(found) < workers:
        found |= {future.result() for future in [executor.submit(own_pid, 0.2) for _ in range(2 * workers)]}
    return sorted(found)


def cpu_seconds(pid: int) -> float:
    """User and system time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--inputs", type=Path, required=True, help="a family that make_inputs.py wrote")
    parser.add_argument("--engines", nargs="+", default=["dask", "ray"])
    parser.add_argument("--methods", nargs="+", default=list(JOBS))
    parser.add_argument("--repeats", type=int, default=3)
    a = parser.parse_args()
    from mergeline.merging import merge
    from mergeline.tasks.executors import opened

    recipe = {"base": a.inputs / "base", "experts": {f.name: f for f in sorted(a.inputs.glob("expert*"))}}
    for engine in a.engines:
        times: dict[tuple[str, int], list[tuple[float, float, float]]] = {}
        for workers in (1, 2):
            with opened(f"{engine}:{workers}") as executor, tempfile.TemporaryDirectory() as folder:
                assert executor is not None
                processes = [os.getpid(), *pids(executor, workers)]
                for method in [m for m in a.methods for _ in range(a.repeats + 1)]:
                    before, begin = [*map(cpu_seconds, processes)], time.perf_counter()
                    made = {**recipe, "method": method, "params": JOBS[method]}
                    merge(made, Path(folder, "out"), executor=executor)
                    wall = time.perf_counter() - begin
                    here, *there = (now - was for now, was in zip(map(cpu_seconds, processes), before))
                    times.setdefault((method, workers), []).append((here, max(there), wall))
        for method in a.methods:
            row: dict[str, Any] = {"method": method, "engine": engine}
            for workers in (1, 2):
                here, there, wall = map(
                    statistics.median, zip(*times[method, workers][1:])
                )  # the first imports
                row |= {f"here_{workers}": here, f"worker_{workers}": there, f"wall_{workers}": wall}
            sums = [row[f"here_{n}"] + row[f"worker_{n}"] for n in (1, 2)]
            save(
                "executors", [{**row, "efficiency": sums[0] / 2 / sums[1], "load": os.getloadavg()[0]}], KEYS
            )
    numbers = ("here_1", "worker_1", "here_2", "worker_2", "efficiency", "wall_1", "wall_2", "load")
    rows = [[r["method"], r["engine"], *(f"{r[n]:.2f}" for n in numbers)] for r in load("executors")]
    print(table(["method", "engine", *numbers], rows))


if __name__ == "__main__":
    main()
