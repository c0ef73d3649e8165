"""Mergeline's CART beside the recipe written as a plain loop (naive_cart.py): eight CLIP ViT-B/32.

    python against_naive_cart.py --inputs DATA/clip

Then Mergeline merges at other (rank, scale) points with the factors that the first merge stored, and makes a whole grid
in one `mergeline sweep`, whose cost beyond a first merge is divided by the number of further points. Writes
results/cart.json.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

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

FIRST = (0.12, 1.0)  # rank, scale
NEXT = [(0.12, 2.0), (0.08, 1.5)]
GRID = {"rank": [0.04, 0.08, 0.12], "scale": [1.0, 2.0, 3.0]}


def run_naive(inputs: Path, out: Path, threads: int | None) -> Cost:
    script = Path(__file__).with_name("naive_cart.py").resolve()
    rank, scale = map(str, FIRST)
    return run([sys.executable, script, inputs, out, "--rank", rank, "--scale", scale], threads=threads)


def run_ours(inputs: Path, out: Path, threads: int | None, point: tuple[float, float]) -> Cost:
    rank, scale = point
    command = merge_command(
        "cart", sorted(inputs.glob("expert*")), out, threads=threads, rank=rank, scale=scale
    )
    return run([*command, "--factors", out.parent / "factors"], threads=threads)


def run_sweep(inputs: Path, work: Path, threads: int | None) -> Cost:
    """All points of the grid by `mergeline sweep`, without stored factors."""
    command = merge_command("cart", sorted(inputs.glob("expert*")), work / "sweep", threads=threads)
    return run(sweep_command(command, GRID), threads=threads)


def bench(a: argparse.Namespace, threads: int | None) -> None:
    with tempfile.TemporaryDirectory(dir=a.work) as folder:
        outputs: dict[str, Path] = {}

        def fresh(side: str) -> Path:
            outputs[side] = Path(tempfile.mkdtemp(dir=folder), "out.safetensors")
            return outputs[side]

        sides = {
            "naive": lambda: run_naive(a.inputs, fresh("naive"), threads),
            "mergeline": lambda: run_ours(a.inputs, fresh("mergeline"), threads, FIRST),
        }
        costs = alternate({side: job for side, job in sides.items() if side in a.sides}, a.repeats)
        if "mergeline" in costs and not costs["mergeline"].failed:
            for i, point in enumerate(NEXT):
                out = outputs["mergeline"].with_name(f"next{i}.safetensors")
                costs[f"mergeline next {point}"] = run_ours(a.inputs, out, threads, point)
            sweep = run_sweep(a.inputs, Path(tempfile.mkdtemp(dir=folder)), threads)
            costs["mergeline sweep"] = sweep
            costs["mergeline sweep, each further point"] = each_further_point(
                costs["mergeline"], sweep, len(GRID["rank"]) * len(GRID["scale"])
            )
        label = threads or "default"
        rows = [{"job": "cart", "side": s, "threads": label, **figures(c)} for s, c in costs.items()]
        save("cart", rows, ("job", "side", "threads"))
        header = ["side", "threads", "cpu_s", "wall_s", "peak_mib", "failed"]
        print(table(header, [[row.get(key) for key in header] for row in rows]), flush=True)
        if all(path.exists() for path in outputs.values()) and len(outputs) == 2:
            found = difference(outputs["naive"], outputs["mergeline"], a.inputs / "base")
            save("cart_outputs", [{"job": "cart", **asdict(found)}], ("job",))
            print(found)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--inputs", type=Path, required=True, help="a family that make_inputs.py clip wrote")
    parser.add_argument("--work", type=Path, help="where outputs go for a while (default: the system's)")
    parser.add_argument("--sides", nargs="+", default=["naive", "mergeline"])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 0], help="0: the library's default")
    parser.add_argument("--repeats", type=int, default=1)
    a = parser.parse_args()
    a.inputs = a.inputs.resolve()
    for threads in a.threads:
        bench(a, threads or None)


if __name__ == "__main__":
    main()
