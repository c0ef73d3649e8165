"""Two workers beside one, after all have imported what they need: own threads, processes, and those of Dask and Ray.

    python make_inputs.py llama SMALL --layers 4 --hidden 512 --inter 2048 --kv 512 --vocab 4096
    python executors.py --inputs SMALL

Times are CPU-seconds, which hold on a shared machine: of the process, or thread, that gives out the units, and of the
worker that worked longest. Their sum is what a merge takes at most where every process has a core. Efficiency is that
of one worker over twice that of two; medians. Threads wait for Python's lock, too, which CPU-seconds do not show: of
them `free` is the efficiency by wall time without what threads spent in line for a core. Where others use the cores, it
is too low: a thread that stands in line with the lock keeps the others. Writes results/executors.json.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from threading import get_native_id
from typing import Any

from measure import load, save, table

JOBS: dict[str, dict[str, Any]] = {
    "linear": {},
    "ties": {"density": 0.2},
    "cart": {"rank": 0.08},
    "tsv_merge": {},
}
KEYS = ("method", "engine", "millions")
_TICKS = os.sysconf("SC_CLK_TCK")
Merge = Callable[..., Any]


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


@contextmanager
def processes(engine: str, workers: int) -> Iterator[Executor]:
    """Processes of this machine; `processes` are those of the standard library."""
    from mergeline.tasks.executors import opened

    if engine == "processes":
        with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
            yield pool
        return
    with opened(f"{engine}:{workers}") as executor:
        assert executor is not None
        yield executor


def by_processes(merge: Merge, executor: Executor, found: Sequence[int]) -> dict[str, float]:
    """A merge by an executor with these processes, that of this program first."""
    before, begin = [*map(cpu_seconds, found)], time.perf_counter()
    merge(executor=executor)
    wall = time.perf_counter() - begin
    here, *there = (now - was for now, was in zip(map(cpu_seconds, found), before))
    return {"here": here, "worker": max(there), "wall": wall}


def by_threads(merge: Merge, workers: int) -> dict[str, float]:
    """A merge by its own workers."""
    own, ended = get_native_id(), dict[int, tuple[float, float]]()

    def progress(done: int, total: int) -> None:
        if done == total:  # the workers end after this
            ended.update({int(task.name): schedule(task) for task in tasks()})

    before, begin = {int(task.name): schedule(task) for task in tasks()}, time.perf_counter()
    merge(workers=workers, progress=progress)
    wall, after = time.perf_counter() - begin, schedule(Path(f"/proc/self/task/{own}"))
    here, line = (now - was for now, was in zip(after, before[own]))
    threads = [ended[task] for task in ended.keys() - before.keys()]
    line += sum(waited for _, waited in threads) / workers
    return {"here": here, "worker": max(cpu for cpu, _ in threads), "wall": wall, "free": wall - line}


def tasks() -> Iterator[Path]:
    return Path("/proc/self/task").iterdir()


def schedule(task: Path) -> tuple[float, float]:
    """Seconds of a thread on a core, and in line for one."""
    on, waited, _ = (task / "schedstat").read_text().split()
    return int(on) / 1e9, int(waited) / 1e9


def measured(engine: str, workers: int, merges: Sequence[Merge]) -> list[dict[str, float]]:
    """What each merge takes, in its turn."""
    if engine == "threads":
        return [by_threads(merge, workers) for merge in merges]
    with processes(engine, workers) as executor:
        found = [os.getpid(), *pids(executor, workers)]
        return [by_processes(merge, executor, found) for merge in merges]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--inputs", type=Path, required=True, help="a family that make_inputs.py wrote")
    parser.add_argument("--engines", nargs="+", default=["threads", "processes", "dask", "ray"])
    parser.add_argument("--methods", nargs="+", default=list(JOBS))
    parser.add_argument("--repeats", type=int, default=3)
    a = parser.parse_args()
    from mergeline.merging import merge

    recipe = {"base": a.inputs / "base", "experts": {f.name: f for f in sorted(a.inputs.glob("expert*"))}}
    size = sum(file.stat().st_size for file in (a.inputs / "base").glob("*.safetensors"))
    for engine in a.engines:
        times: dict[tuple[str, int], dict[str, float]] = {}
        for workers in (1, 2):
            with tempfile.TemporaryDirectory() as folder:
                merges = [
                    partial(merge, {**recipe, "method": method, "params": JOBS[method]}, Path(folder, "out"))
                    for method in a.methods
                    for _ in range(a.repeats + 1)
                ]
                found = measured(engine, workers, merges)
            for i, method in enumerate(a.methods):
                own = found[i * (a.repeats + 1) + 1 :][: a.repeats]  # the first imports
                times[method, workers] = {
                    name: statistics.median(cost[name] for cost in own) for name in own[0]
                }
        for method in a.methods:
            row: dict[str, Any] = {"method": method, "engine": engine, "millions": round(size / 2e6)}
            one, two = times[method, 1], times[method, 2]
            row |= {f"{name}_{n}": cost[name] for n, cost in ((1, one), (2, two)) for name in cost}
            row["efficiency"] = (one["here"] + one["worker"]) / 2 / (two["here"] + two["worker"])
            if "free" in one:
                row["free"] = one["free"] / 2 / two["free"]
            save("executors", [{**row, "load": os.getloadavg()[0]}], KEYS)
    numbers = ("here_1", "worker_1", "here_2", "worker_2", "efficiency", "free", "wall_1", "wall_2", "load")
    print(
        table([*KEYS, *numbers], [[row.get(key) for key in (*KEYS, *numbers)] for row in load("executors")])
    )


if __name__ == "__main__":
    main()
