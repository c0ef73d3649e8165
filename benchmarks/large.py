"""Merge a family that is larger than memory under a bound, beside what `cat` needs for the same files.

    python large.py --work SCRATCH                         # 3 B parameters, bf16, base and 4 experts: 37 GB of disk
    python large.py --work SCRATCH --layers 4 --methods cart
    python large.py --plans                                # what `mergeline plan` says of 7 B and 70 B: no disk at all

Files are put out of the page cache before every run, as far as the kernel does it, so both sides read the disk.
Writes results/large.json and results/large_plans.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from make_inputs import Family, llama, make, shards
from measure import figures, find_mergeline, load, merge_command, run, save, table

EXPERTS = 4
MEMORY = "4GiB"
SHAPES = {
    "3 B": {"layers": 36, "hidden": 2048, "inter": 11008, "kv": 256, "vocab": 32768},  # as Qwen2.5-3B
    "7 B": {"layers": 32, "hidden": 4096, "inter": 11008, "kv": 4096, "vocab": 32000},
    "70 B": {"layers": 80, "hidden": 8192, "inter": 28672, "kv": 1024, "vocab": 32000},
}
METHODS: dict[str, dict[str, Any]] = {"ties": {"density": 0.2}, "cart": {"rank": 0.08, "scale": 2.0}}


@dataclass(frozen=True)
class Job:
    """One merge of a family on so many workers."""

    method: str
    inputs: Path
    workers: int

    def command(self, out: Path) -> list[str]:
        experts = [self.inputs / f"expert{i}" for i in range(EXPERTS)]
        base = self.inputs / "base"
        command = merge_command(
            self.method, experts, out, base=base, threads=self.workers, **METHODS[self.method]
        )
        return [*command, "--memory", MEMORY]

    def plan(self) -> dict[str, Any]:
        """What `mergeline plan` says, from headers alone."""
        with tempfile.TemporaryDirectory() as folder:
            recipe = Path(folder, "recipe.json")
            experts = {f"a{i}": str(self.inputs / f"expert{i}") for i in range(EXPERTS)}
            settings = {"method": self.method, "params": METHODS[self.method], "experts": experts}
            recipe.write_text(json.dumps(settings | {"base": str(self.inputs / "base")}))
            command = [find_mergeline(), "plan", "--recipe", recipe, "--json"]
            return json.loads(subprocess.run(command, check=True, capture_output=True).stdout)


def forget(folder: Path) -> None:
    """Ask the kernel to keep nothing of these files in memory."""
    for file in folder.rglob("*.safetensors"):
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(shape: str, family: Family, inputs: Path, methods: list[str], workers: int) -> None:
    """`cat` of all files, then every method."""
    read_gb = family.parameters * family.dtype.itemsize * (EXPERTS + 1) / 1e9
    files = sorted(map(str, inputs.rglob("*.safetensors")))
    sides = {"cat": lambda out: ["sh", "-c", 'exec cat "$@" > /dev/null', "cat", *files]}
    sides |= {method: Job(method, inputs, workers).command for method in methods}
    for side, command in sides.items():
        forget(inputs)
        with tempfile.TemporaryDirectory(dir=inputs) as work:
            cost = run(command(Path(work, "out")), cwd=Path(work), timeout_s=3 * 3600, threads=1)
        row = {"shape": shape, "layers": len_layers(family), "job": side, "workers": 1 if side == "cat" else workers,
               "gb_read": round(read_gb, 2), "mb_per_s": round(1000 * read_gb / cost.wall_s, 1)}  # fmt: skip
        save("large", [row | figures(cost)], ("shape", "layers", "job"))
        print(row | figures(cost), flush=True)


def len_layers(family: Family) -> int:
    return int(family.config["num_hidden_layers"])


def write_headers(family: Family, folder: Path) -> None:
    """A checkpoint of holes: true headers and sizes, no data on the disk."""
    folder.mkdir(parents=True)
    parts = list(shards(family))
    index: dict[str, str] = {}
    for i, names in enumerate(parts, 1):
        file, header, end = f"model-{i:05d}-of-{len(parts):05d}.safetensors", {}, 0
        for name in names:
            start, end = end, end + family.dtype.itemsize * prod(family.shapes[name])
            header[name] = {"dtype": "BF16", "shape": list(family.shapes[name]), "data_offsets": [start, end]}
        text = json.dumps(header).encode()
        with (folder / file).open("wb") as opened:
            opened.write(len(text).to_bytes(8, "little") + text)
            opened.truncate(8 + len(text) + end)
        index |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (folder / "config.json").write_text(json.dumps(family.config))


def plans() -> None:
    """What `mergeline plan` says of every shape and method."""
    for shape, settings in SHAPES.items():
        family = llama(**settings, shard_mib=4096)
        with tempfile.TemporaryDirectory() as work:
            for name in ("base", *(f"expert{i}" for i in range(EXPERTS))):
                write_headers(family, Path(work, name))
            for method in METHODS:
                plan = Job(method, Path(work), 1).plan()
                keys = ("bytes_read", "bytes_written", "peak_bytes", "seconds", "problems")
                row = {"shape": shape, "job": method, "billions": round(family.parameters / 1e9, 2)}
                save("large_plans", [row | {key: plan[key] for key in keys}], ("shape", "job"))
                print(row | {key: plan[key] for key in keys}, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, help="scratch space (default: the system's)")
    parser.add_argument("--shape", choices=SHAPES, default="3 B")
    parser.add_argument("--layers", type=int, help="default: all; costs grow in proportion to them")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--plans", action="store_true", help="only plan, from headers")
    a = parser.parse_args()
    if a.plans:
        plans()
        return
    family = llama(**SHAPES[a.shape] | ({"layers": a.layers} if a.layers else {}), shard_mib=1024)
    with tempfile.TemporaryDirectory(dir=a.work) as folder:
        make(family, Path(folder), EXPERTS)
        measure(a.shape, family, Path(folder), a.methods, a.workers)
    header = [
        "shape",
        "layers",
        "job",
        "workers",
        "gb_read",
        "mb_per_s",
        "cpu_s",
        "wall_s",
        "peak_mib",
        "failed",
    ]
    print(table(header, [[row.get(key) for key in header] for row in load("large")]))


if __name__ == "__main__":
    main()
