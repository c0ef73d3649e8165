"""Cold merges beside their disk: `cat` of the same files, and `dd` of as many bytes as the output, conv=fsync.

    python make_inputs.py llama LLAMA   # 3.4 GB
    python disk.py LLAMA                # some minutes; all that is written lies in LLAMA, so on the disk of the inputs

Before each timing the inputs leave the page cache (looked at by mincore) and the last output is deleted. A merge is
timed within this process, which has imported what it needs and merged before: from the recipe to the fsync of what lies
under its final name. `apart` is `cat` and then `dd`; `together` both at once, the limit of what reads ahead and writes
behind. Ratios are of sides that followed each other in a turn; medians of turns.

On a shared machine threads stand in line for a core. `free` is the ratio to `apart` with those seconds taken from both
sides, as the kernel counts them: an estimate for a fast disk, as a disk goes on meanwhile, and who waits for a thread
that stands in line is not counted. `of_rate` is for a disk that is limited to --rate MB/s, of reads and of writes: what
the bytes that are read, and then those that are written, need at that rate, beside the merge. Writes results/disk.json.
"""

from __future__ import annotations

import argparse
import ctypes
import mmap
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import torch
from large import forget
from measure import SESSION, save, table

from mergeline.merging import merge

JOBS = {"linear": False, "task_arithmetic": True}  # whether it has a base
KEYS = ("disk", "job", "workers")
RATIOS = ("of_rate", "least", "most")
FIGURES = ("apart_s", "together_s", "wall_s", "cpu_s", "of_apart", "of_together", "free")
_POLL_S = 0.01


class Time(NamedTuple):
    """Seconds from begin to end, and those of them that were spent in line for a core."""

    wall: float
    line: float

    def __add__(self, other: tuple[float, ...]) -> Time:
        return Time(self.wall + other[0], self.line + other[1])

    @property
    def free(self) -> float:
        return self.wall - self.line


def in_line(task: Path) -> float:
    """Seconds for which a process or thread was ready and had no core, so far."""
    return int((task / "schedstat").read_text().split()[1]) / 1e9


def timed(*commands: Sequence[str | Path]) -> Time:
    """Commands that run at once, to the end of the last."""
    begin = time.perf_counter()
    children = [subprocess.Popen(command, stdout=subprocess.DEVNULL) for command in commands]
    lines = [0.0] * len(children)
    while any(child.poll() is None for child in children):
        for i, child in enumerate(children):
            if child.returncode is None:
                lines[i] = in_line(
                    Path(f"/proc/{child.pid}")
                )  # a child that ended is there until poll sees it
        time.sleep(_POLL_S)
    if any(child.returncode for child in children):
        sys.exit(f"{commands}: failed")
    return Time(time.perf_counter() - begin, max(lines))


def weights(folders: Sequence[Path]) -> list[Path]:
    return [file for folder in folders for file in sorted(folder.glob("*.safetensors"))]


def size(files: Sequence[Path]) -> int:
    return sum(file.stat().st_size for file in files)


def cached(files: Sequence[Path]) -> float:
    """The share of the files' pages that is in the page cache."""
    mincore, pages, found = ctypes.CDLL(None, use_errno=True).mincore, 0, 0
    for file in files:
        data = numpy.memmap(file, mode="r")
        resident = numpy.zeros(-(-len(data) // mmap.PAGESIZE), dtype=numpy.uint8)
        address = ctypes.c_void_p(data.ctypes.data)
        if mincore(address, ctypes.c_size_t(len(data)), ctypes.c_void_p(resident.ctypes.data)):
            raise OSError(ctypes.get_errno(), f"mincore of {file}")
        pages, found = pages + len(resident), found + int((resident & 1).sum())
    return found / pages


class Job:
    """A merge of a family, and what its bytes take by `cat` and `dd`."""

    def __init__(self, family: Path, method: str):
        self.family, self.out, self.copy = family, family / "merged", family / "copy"
        experts, base = sorted(family.glob("expert*")), [family / "base"] if JOBS[method] else []
        self.recipe: dict[str, Any] = {"method": method, "experts": {e.name: str(e) for e in experts}}
        if base:
            self.recipe["base"] = str(base[0])
        self.inputs = weights([*experts, *base])
        self.source = family / "source"  # of `dd`; in the page cache, as it was just written
        with self.source.open("wb") as file:
            for part in weights([family / "base"]):
                file.write(part.read_bytes())
            os.fsync(file.fileno())

    def cold(self) -> None:
        shutil.rmtree(self.out, ignore_errors=True)
        self.copy.unlink(missing_ok=True)
        forget(self.family)
        if (share := cached(self.inputs)) > 0.01:
            sys.exit(f"{share:.0%} of the inputs stayed in the page cache; is another process reading them?")

    def limits(self) -> tuple[Time, Time]:
        """Apart and together."""
        read: list[str | Path] = ["cat", *self.inputs]
        write = ["dd", f"if={self.source}", f"of={self.copy}", "bs=8M", "conv=fsync", "status=none"]
        sides = []
        for commands in ([read], [write], [read, write]):
            self.cold()
            sides.append(timed(*commands))
        return sides[0] + sides[1], sides[2]

    def merged(self, workers: int) -> tuple[Time, float]:
        """With the CPU-seconds."""
        self.cold()
        lines: list[float] = []

        def progress(done: int, total: int) -> None:
            if done == total:  # the threads of workers end after this
                lines.extend(in_line(task) for task in Path("/proc/self/task").iterdir())

        before = sum(in_line(task) for task in Path("/proc/self/task").iterdir())
        cpu, begin = time.process_time(), time.perf_counter()
        merge(self.recipe, self.out, workers=workers, progress=progress)
        wall = time.perf_counter() - begin
        return Time(wall, (sum(lines) - before) / workers), time.process_time() - cpu

    def turn(self, workers: Sequence[int]) -> list[dict[str, float]]:
        apart, together = self.limits()
        rows = []
        for count in workers:
            took, cpu = self.merged(count)
            of = apart.wall / took.wall, together.wall / took.wall, apart.free / took.free
            rows.append(dict(zip(FIGURES, (apart.wall, together.wall, took.wall, cpu, *of))))
        return rows

    def clean(self) -> None:
        self.cold()
        self.source.unlink()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("family", type=Path)
    parser.add_argument("--rate", type=float, help="MB/s that the disk is limited to")
    parser.add_argument("--methods", nargs="+", default=list(JOBS), choices=JOBS)
    parser.add_argument("--workers", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--turns", type=int, default=5)
    a = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for method in a.methods:
        job = Job(a.family.resolve(), method)
        job.merged(1)  # imports, and memory that the machine gives for the first time
        turns = [job.turn(a.workers) for _ in range(a.turns)]
        for i, workers in enumerate(a.workers):
            row: dict[str, Any] = {
                "disk": f"{a.rate:g} MB/s" if a.rate else "as it is",
                "job": method,
                "workers": workers,
            }
            row |= {"gb_read": size(job.inputs) / 1e9, "gb_written": size([job.source]) / 1e9}
            row |= {name: statistics.median(turn[i][name] for turn in turns) for name in FIGURES}
            ratios = [turn[i]["of_apart"] for turn in turns]
            nominal = 1000 * (row["gb_read"] + row["gb_written"]) / a.rate if a.rate else None
            row["of_rate"] = nominal and nominal / row["wall_s"]
            row |= {"least": min(ratios), "most": max(ratios), "turns": a.turns}
            rows.append(row | {"session": SESSION, "load": os.getloadavg()[0]})
        job.clean()
    save("disk", rows, KEYS)
    header = [*KEYS, *FIGURES, *RATIOS, "load"]
    print(table(header, [[row[key] for key in header] for row in rows]))


if __name__ == "__main__":
    main()
