"""What merges take beside the floor of this machine: imports, and what their bytes cost at measured rates.

    python make_inputs.py llama LLAMA
    python floors.py LLAMA              # about five minutes on one core

The floor of a merge: it starts, imports torch and the engine, and for each reading that the plan has of an input reads
it from the page cache and casts it to float32; hashes each input once, does one `y += a x` an expert, casts, writes and
hashes the output. What finds an order statistic, draws a number or compares is not in it. Rates are of the same run
(limits.py). CPU-seconds, medians; one thread. Writes results/floors.json.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from limits import cpu_seconds, hashes, memory, reading
from measure import run, save, table

from mergeline.merging.engine.planning import make_plan

# Method -> how many experts, whether it has a base.
JOBS = {
    "linear": (4, False),
    "task_arithmetic": (4, True),
    "slerp": (2, False),
    "karcher": (4, False),
    "ties": (4, True),
    "breadcrumbs": (4, True),
    "sce": (4, True),
    "dare": (4, True),
    "della": (4, True),
}
MERGELINE = [sys.executable, "-m", "mergeline.flows.cli"]
_PARAMETER = 2  # bytes, of bfloat16


def writing() -> float:
    """A new file written to the page cache, in GB a CPU-second."""
    block = os.urandom(8 << 20)

    def work() -> None:
        with tempfile.TemporaryFile() as file:
            for _ in range(64):
                file.write(block)

    return 64 * len(block) / 1e9 / cpu_seconds(work)


def rates() -> dict[str, float]:
    """GB a CPU-second."""
    found = {name.removesuffix(", GB/s"): rate for name, rate in (memory() | hashes() | reading()).items()}
    return found | {"write to page cache": writing()}


def floor(
    rate: dict[str, float], start: float, parameters: int, inputs: int, experts: int, readings: float
) -> float:
    """CPU-seconds. inputs: how many checkpoints; readings: of each."""
    gb = parameters * _PARAMETER / 1e9
    hashed = gb / rate["blake3" if "blake3" in rate else "sha256"]
    read = gb / rate["read from page cache"] + 3 * gb / rate["cast bf16 to fp32"]
    written = 3 * gb / rate["cast fp32 to bf16"] + gb / rate["write to page cache"]
    added = experts * 6 * gb / rate["y += a x fp32"]
    return start + inputs * (readings * read + hashed) + added + written + hashed


def recipe(family: Path, method: str) -> dict[str, Any]:
    experts, has_base = JOBS[method]
    named = {f"e{t}": str(family / f"expert{t}") for t in range(experts)}
    return {"method": method, "experts": named, **({"base": str(family / "base")} if has_base else {})}


def readings_of(recipe: dict[str, Any]) -> float:
    """How often a merge reads a byte of its inputs."""
    entries = [
        (entry.readings, sum(info.nbytes for info in entry.inputs)) for entry in make_plan(recipe).entries
    ]
    return sum(readings * size for readings, size in entries) / sum(size for _, size in entries)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("family", type=Path)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--jobs", nargs="+", default=list(JOBS), choices=JOBS)
    parser.add_argument("--out", type=Path, default=Path("/tmp/floors"))
    a = parser.parse_args()
    torch.set_num_threads(1)
    family = a.family.resolve()
    size = sum(file.stat().st_size for file in (family / "base").glob("*.safetensors"))
    code = "import torch, mergeline.merging.engine.work"
    start = statistics.median(run([sys.executable, "-c", code]).cpu_s for _ in range(5))
    rate = rates()
    file, rows = Path(tempfile.mkdtemp()) / "recipe.json", []
    for method in a.jobs:
        inputs = JOBS[method][0] + JOBS[method][1]
        readings = readings_of(recipe(family, method))
        costs = []
        for _ in range(a.runs):
            shutil.rmtree(a.out, ignore_errors=True)
            file.write_text(json.dumps(recipe(family, method)))
            cost = run([*MERGELINE, "merge", "--recipe", file, "--workers", "1", "--out", a.out])
            if cost.failed:
                sys.exit(f"{method}: {cost.failed}")
            costs.append(cost.cpu_s)
        least = floor(rate, start, size // _PARAMETER, inputs, JOBS[method][0], readings)
        took = statistics.median(costs)
        rows.append(
            {
                "job": method,
                "readings": round(readings, 2),
                "floor": least,
                "cpu_s": took,
                "ratio": took / least,
            }
        )
    shutil.rmtree(a.out, ignore_errors=True)
    shutil.rmtree(file.parent)
    rows += [
        {"job": f"rate: {name}", "value": value} for name, value in {**rate, "imports, s": start}.items()
    ]
    save("floors", rows, ("job",))
    jobs = [row for row in rows if "ratio" in row]
    print(table(["job", "readings", "floor, CPU-s", "CPU-s", "ratio"], [[*row.values()] for row in jobs]))


if __name__ == "__main__":
    main()
