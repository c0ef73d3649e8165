"""What a compressed store keeps of eight experts: bytes an expert beside accuracy, on the sample family.

    make demo                                  # in the repository's root: data, heads, experts
    python stores.py --workspace ..

Every expert is taken out of its store again and scored on the test split of its own task. Writes results/stores.json
and plots/stores.png.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from measure import HERE, load, save, table

# What trades bytes for accuracy in each store.
STORES: dict[str, list[dict[str, Any]]] = {
    "cart_indexing": [{"rank": rank} for rank in (0.02, 0.04, 0.08, 0.16, 0.32)],
    "tsv_compress": [{"rank": rank} for rank in (0.02, 0.04, 0.08, 0.16, 0.32)],
    "twin": [{"rank": rank} for rank in (0.02, 0.04, 0.08, 0.16, 0.32)],
    "rmm": [{"rank": 0.16, "components": components} for components in (0, 2, 4, 6)],
    "tall_mask": [{"threshold": threshold} for threshold in (0.2, 0.4, 0.6)],
    "emr": [{}],
}
KEYS = ["store", "params", "checkpoint", "once", "expert", "ratio", "accuracy", "kept"]


def accuracy(workspace: Path, experts: dict[str, Path], out: Path) -> float:
    """The mean, over experts, of test accuracy on the task of the expert's name."""
    from mergeline.tasks.evaluate import evaluate_baselines
    from mergeline.tasks.modalities import modality_of
    from mergeline.tasks.params import load_params

    params, build = load_params(workspace / "params.yaml"), workspace / "build"
    base = build / "checkpoints" / params.base
    evaluate_baselines(modality_of(params), params, build, base, experts, out, out.with_name("scratch"))
    models = json.loads((out / "scores.json").read_text())["models"]
    scores = [models[name]["splits"]["test"][name] for name in experts]
    return sum(score["correct"] / score["n"] for score in scores) / len(scores)


def measured(workspace: Path, method: str, params: dict[str, Any], whole: float) -> dict[str, Any]:
    """The row of one store.

    ratio: its bytes over those of all checkpoints; kept: its accuracy over the experts'.
    """
    from mergeline.merging.compress import compress, extract_expert
    from mergeline.merging.engine.manifest import manifest_path

    experts = experts_of(workspace)
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder, "store.safetensors")
        base = workspace / "build" / "checkpoints" / "base"
        compress({"method": method, "params": params, "base": base, "experts": experts}, store)
        for name in experts:
            extract_expert(store, name, Path(folder, name))
        size = json.loads(manifest_path(store).read_text())["store"]
        found = accuracy(workspace, {name: Path(folder, name) for name in experts}, Path(folder, "scores"))
    own = sum(size["experts"].values())
    return {
        "store": method, "params": json.dumps(params), "checkpoint": size["checkpoint"], "once": size["once"],
        "expert": own // len(experts), "ratio": (size["once"] + own) / size["checkpoint"] / len(experts),
        "accuracy": found, "kept": found / whole,
    }  # fmt: skip


def experts_of(workspace: Path) -> dict[str, Path]:
    from mergeline.tasks.params import load_params

    return {
        name: workspace / "build" / "checkpoints" / name
        for name in load_params(workspace / "params.yaml").experts
    }


def plot(whole: float) -> None:
    """Accuracy against the share of the checkpoints' bytes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for method in STORES:
        points = sorted((row["ratio"], row["accuracy"]) for row in load("stores") if row["store"] == method)
        axes.plot(*zip(*points), marker="o", label=method)
    axes.axhline(whole, color="0.5", linestyle=":", label="the experts")
    axes.set(
        xlabel="bytes of the store / bytes of 8 checkpoints", ylabel="mean test accuracy", xlim=(0, None)
    )
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(HERE / "plots" / "stores.png", dpi=120, metadata={"Software": None})
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--workspace", type=Path, required=True, help="a folder in which `mergeline run` has run"
    )
    parser.add_argument("--stores", nargs="+", choices=STORES, default=list(STORES))
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        whole = accuracy(a.workspace, experts_of(a.workspace), Path(folder, "scores"))
    key = ("store", "params")
    save("stores", [{"store": "experts", "params": "{}", "ratio": 1.0, "accuracy": whole, "kept": 1.0}], key)
    for method in a.stores:
        rows = [measured(a.workspace, method, params, whole) for params in STORES[method]]
        save("stores", rows, key)
        print(table(KEYS, [[row[key] for key in KEYS] for row in rows]), flush=True)
    plot(whole)


if __name__ == "__main__":
    main()
