"""Merges on an accelerator beside what the accelerator can do at best, and beside one SVD a matrix.

    python on_gpu.py --work DIR                              # all, on `cuda`; makes and deletes its own inputs
    python on_gpu.py --work DIR --families llama-7b --methods ties --layers 1 --device cpu --no-check    # a trial

Two families: eight ViT-L/14 vision towers in float32, and four fine-tunes of two blocks of a 7B Llama in bfloat16.
Writes results/gpu.json: wall and CPU seconds of whole processes; how the outputs differ from the same merge on the
CPU; the seconds that the bytes alone take over the copy engine; and those of `torch.linalg.svd` (float32) of every
matrix of every expert, measured on one matrix of each shape.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from math import prod
from pathlib import Path

import torch
from compare import difference
from make_inputs import Family, clip, llama, make
from measure import figures, merge_command, run, save, table

METHODS = {"cart": {"rank": 0.12}, "tsv_merge": {}, "ties": {"density": 0.2}}
HEADER = ["family", "side", "wall s", "CPU-s", "peak MiB", "relative to the CPU's", "failed"]


def families(layers: int | None) -> dict[str, tuple[Family, int]]:
    """The families and how many experts of each are merged."""
    tower = clip(layers=layers or 24, width=1024, inter=4096, patch=14, positions=257, heads=16)
    slice_7b = llama(layers=layers or 2, hidden=4096, inter=11008, kv=4096, vocab=2048, shard_mib=1 << 10)
    return {"vit-l-14": (tower, 8), "llama-7b": (slice_7b, 4)}


def seconds(device: str, work: Callable[[], object], repeats: int = 3) -> float:
    """The least wall time of a few runs, after one that warms up."""

    def wait() -> None:
        if device != "cpu":
            torch.cuda.synchronize(device)

    work()
    best = float("inf")
    for _ in range(repeats):
        wait()
        start = time.perf_counter()
        work()
        wait()
        best = min(best, time.perf_counter() - start)
    return best


def copying(device: str, size: int) -> float:
    """Seconds to bring so many bytes to the device from pinned memory, measured on a gigabyte at most."""
    part = min(size, 1 << 30)
    host = torch.empty(part, dtype=torch.uint8, pin_memory=device != "cpu")
    there = torch.empty(part, dtype=torch.uint8, device=device)
    return seconds(device, lambda: there.copy_(host, non_blocking=True)) * size / part


def svds(device: str, family: Family, experts: int) -> float:
    """Seconds of one float32 SVD of every matrix of every expert."""
    shapes = Counter(shape for name, shape in family.shapes.items() if len(shape) == 2 and "layers" in name)
    total = 0.0
    for shape, count in shapes.items():
        matrix = torch.randn(shape, device=device)
        total += seconds(device, lambda: torch.linalg.svd(matrix, full_matrices=False), 1) * count * experts  # noqa: B023
    return total


def bench(a: argparse.Namespace, name: str, family: Family, experts: int, folder: Path) -> None:
    """All merges of one family, and its limits."""
    inputs = folder / "inputs"
    make(family, inputs, experts)
    size = prod((family.parameters, family.dtype.itemsize, experts + 1))
    rows = [
        {"family": name, "side": "copy of the inputs", "wall_s": round(copying(a.device, size), 3)},
        {"family": name, "side": "torch.linalg.svd", "wall_s": round(svds(a.device, family, experts), 3)},
    ]
    for method in a.methods:
        base = inputs / "base" if method != "cart" else None
        given = [inputs / f"expert{i}" for i in range(experts)]
        out = {}
        for device in (a.device, *(["cpu"] if a.check else [])):
            out[device] = folder / f"{method}-{device.replace(':', '')}"
            command = merge_command(method, given, out[device], base=base, **METHODS[method])
            cost = run([*command, "--device", device], cwd=folder)
            rows.append({"family": name, "side": f"{method}, {device}", **figures(cost)})
        if a.check and all(path.exists() for path in out.values()):
            rows[-2] |= asdict(difference(out["cpu"], out[a.device], inputs / "base"))
        for path in out.values():
            shutil.rmtree(path, ignore_errors=True)
    machine = torch.cuda.get_device_name(a.device) if a.device != "cpu" else "cpu"
    save("gpu", [{**row, "device": machine} for row in rows], ("family", "side", "device"))
    keys = ["family", "side", "wall_s", "cpu_s", "peak_mib", "relative", "failed"]
    print(table(HEADER, [[row.get(key) for key in keys] for row in rows]), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="a folder with 20 GB free")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--layers", type=int, help="fewer, for a trial")
    parser.add_argument(
        "--families", nargs="+", choices=["vit-l-14", "llama-7b"], default=["vit-l-14", "llama-7b"]
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument(
        "--no-check", dest="check", action="store_false", help="do not merge on the CPU to compare"
    )
    a = parser.parse_args()
    for name in a.families:
        with tempfile.TemporaryDirectory(dir=a.work) as folder:
            bench(a, name, *families(a.layers)[name], Path(folder))


if __name__ == "__main__":
    main()
