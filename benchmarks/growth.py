"""How cost grows: CPU-seconds against the bytes of a model, and memory against the number of experts.

    python growth.py --work SCRATCH       # makes its inputs there (at most 7 GB at once) and deletes them
    python growth.py --plot               # only draw what results/growth.json holds

Writes results/growth.json, plots/cost_by_size.png and plots/memory_by_experts.png.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from make_inputs import Family, llama, make
from measure import HERE, figures, load, merge_command, run, save, table

PLOTS = HERE / "plots"
SIZES = {
    "110 M": {"layers": 8, "hidden": 768, "inter": 3072, "kv": 768, "vocab": 22528},
    "340 M": {},
    "1.1 B": {"layers": 22, "hidden": 2048, "inter": 5632, "kv": 256, "vocab": 32000},
}
BY_SIZE = {"task_arithmetic": {"scale": 0.3}, "ties": {"density": 0.2}}
BY_EXPERTS = {"ties": {"density": 0.2}, "cart": {"rank": 0.12}}
EXPERTS = (2, 4, 8, 16)
NEEDS_BASE = {"task_arithmetic", "ties"}


def measure(
    study: str, size: str, family: Family, inputs: Path, method: str, experts: int
) -> dict[str, object]:
    """Merge so many experts; the row of the results."""
    parameters = (BY_SIZE | BY_EXPERTS)[method]
    with tempfile.TemporaryDirectory(dir=inputs) as work:
        command = merge_command(
            method, [inputs / f"expert{i}" for i in range(experts)], Path(work, "out"),
            base=inputs / "base" if method in NEEDS_BASE else None, **parameters,
        )  # fmt: skip
        cost = run(command, cwd=Path(work))
    checkpoint = family.parameters * family.dtype.itemsize
    gb_read = checkpoint * (experts + (method in NEEDS_BASE)) / 1e9
    row = {"study": study, "size": size, "method": method, "experts": experts, "gb_read": round(gb_read, 3)}
    return row | figures(cost)


def study(work: Path, sizes: list[str], experts: list[int]) -> None:
    key = ("study", "size", "method", "experts")
    for size in sizes:
        family = llama(**SIZES[size])
        with tempfile.TemporaryDirectory(dir=work) as folder:
            make(family, Path(folder), 2)
            rows = [measure("size", size, family, Path(folder), method, 2) for method in BY_SIZE]
            save("growth", rows, key)
    with tempfile.TemporaryDirectory(dir=work) as folder:
        family = llama(**SIZES["110 M"])
        make(family, Path(folder), max(experts, default=0))
        for count in experts:
            rows = [measure("experts", "110 M", family, Path(folder), m, count) for m in BY_EXPERTS]
            save("growth", rows, key)


def plot() -> None:
    """Draw both pictures from the results."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    PLOTS.mkdir(exist_ok=True)
    good = [row for row in load("growth") if not row.get("failed")]
    pictures = {
        "cost_by_size": ("size", "gb_read", "cpu_s", "GB read", "CPU-seconds"),
        "memory_by_experts": ("experts", "experts", "peak_mib", "experts of 110 M parameters", "peak MiB"),
    }
    for name, (study, x, y, x_label, y_label) in pictures.items():
        figure, axes = plt.subplots(figsize=(5, 3.2), layout="constrained")
        for method in sorted({row["method"] for row in good if row["study"] == study}):
            points = sorted((r[x], r[y]) for r in good if r["study"] == study and r["method"] == method)
            axes.plot(*zip(*points), marker="o", label=method)
        axes.set(xlabel=x_label, ylabel=y_label, ylim=(0, None), xlim=(0, None))
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(frameon=False)
        figure.savefig(PLOTS / f"{name}.png", dpi=120, metadata={"Software": None})
        plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, help="scratch space (default: the system's)")
    parser.add_argument("--sizes", nargs="*", choices=SIZES, default=list(SIZES))
    parser.add_argument("--experts", nargs="*", type=int, default=list(EXPERTS))
    parser.add_argument("--plot", action="store_true", help="draw only")
    a = parser.parse_args()
    if not a.plot:
        study(a.work, a.sizes, a.experts)
    header = ["study", "size", "method", "experts", "gb_read", "cpu_s", "peak_mib", "failed"]
    print(table(header, [[row.get(key) for key in header] for row in load("growth")]))
    plot()


if __name__ == "__main__":
    main()
