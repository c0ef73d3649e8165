"""Two workers of Dask and of Ray beside one, and beside no executor: wall time after all have imported what they need.

    python make_inputs.py llama /tmp/bench/small --layers 4
    python executors.py --inputs /tmp/bench/small

Efficiency is the time of one worker over twice that of two, medians of runs taken in turns; the load of the machine is
written beside it, for only an idle one has two cores to give.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from measure import load, save, table

JOBS: dict[str, dict[str, Any]] = {"linear": {}, "ties": {"density": 0.2}, "cart": {"rank": 0.08}}
KEYS = ("method", "engine")


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

    experts = {f.name: f for f in sorted(a.inputs.glob("expert*"))}
    recipe = {"base": a.inputs / "base", "experts": experts}

    with tempfile.TemporaryDirectory(dir=a.inputs) as folder:
        out = Path(folder, "out")

        def seconds(method: str, **options: Any) -> float:
            begin = time.perf_counter()
            merge({**recipe, "method": method, "params": JOBS[method]}, out, **options)
            return time.perf_counter() - begin

        for engine in a.engines:
            times: dict[tuple[str, str], list[float]] = {}
            for run in range(a.repeats + 1):
                for workers in (1, 2):
                    # One after the other: both at once would share the cores.
                    with opened(f"{engine}:{workers}") as executor:
                        for method in [a.methods[0], *a.methods]:  # the first imports
                            took = seconds(method, executor=executor)
                            times.setdefault((method, str(workers)), []).append(took)
                        times[a.methods[0], str(workers)].pop(-2)
                for method in a.methods:
                    times.setdefault((method, "here"), []).append(seconds(method, workers=1))
                if run == 0:
                    times.clear()  # files come from the disk
            load_now = os.getloadavg()[0]
            for method in a.methods:
                here, one, two = (statistics.median(times[method, which]) for which in ("here", "1", "2"))
                row = {
                    "method": method,
                    "engine": engine,
                    "here_s": here,
                    "one_s": one,
                    "two_s": two,
                    "efficiency": one / 2 / two,
                    "runs": a.repeats,
                    "load": load_now,
                    "cores": os.cpu_count(),
                }
                save("executors", [row], KEYS)
    rows = [
        [r["method"], r["engine"], f"{r['here_s']:.1f}", f"{r['one_s']:.1f}", f"{r['two_s']:.1f}",
         f"{r['efficiency']:.2f}", f"{r['load']:.1f}"]
        for r in load("executors")
    ]  # fmt: skip
    print(
        table(["method", "engine", "here, s", "one worker, s", "two workers, s", "efficiency", "load"], rows)
    )


if __name__ == "__main__":
    main()
