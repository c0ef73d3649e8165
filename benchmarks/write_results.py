"""Write RESULTS.md from results/*.json; NOTES.md, written by hand, is appended.

python write_results.py
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from measure import HERE, RESULTS, load, table

GB_IN_MIB = 1e9 / 2**20
LARGE = ["shape", "layers", "job", "workers", "gb_read", "mb_per_s", "cpu_s", "wall_s", "peak_mib", "failed"]
PLANS = ["shape", "job", "billions", "bytes_read", "bytes_written", "peak_bytes", "seconds"]
SEARCHES = [
    "grid",
    "best",
    "sampler",
    "race",
    "budget",
    "evaluations",
    "points",
    "median",
    "least",
    "found",
    "level",
    "dropped",
    "wrongly",
]
APPROXIMATE = (
    "side", "rows", "exact_s", "float32_ratio", "float32_error", "filtered_ratio", "filtered_error"
)  # fmt: skip
FLOOR_KEYS = ("job", "readings", "floor", "cpu_s", "ratio")
SEARCH_KEYS = [
    "points_of_grid",
    "best_of_grid",
    "sampler",
    "race",
    "budget",
    "evaluations",
    "points",
    "best_median",
    "best_least",
    "found",
    "level",
    "dropped",
    "dropped_wrongly",
]
DISK = ["disk", "job", "workers", "gb_read", "gb_written", "apart_s", "together_s", "wall_s", "cpu_s",
        "of_apart", "of_together", "free", "of_rate", "load"]  # fmt: skip
STORES = ["store", "params", "once", "expert", "checkpoint", "ratio", "accuracy", "kept"]


class Figures:
    """Costs by job, side and number of threads, from one results file."""

    def __init__(self, name: str) -> None:
        self.rows = load(name)

    def get(self, job: str, side: str, figure: str = "cpu_s", threads: Any = 1) -> float | None:
        for row in self.rows:
            if (row["job"], row["side"], row["threads"]) == (job, side, threads):
                return None if row.get("failed") else row[figure]
        return None

    def apart(self, job: str, *sides: str) -> bool:
        """Whether these sides were not measured in one session."""
        rows = [r for r in self.rows if r["job"] == job and r["side"] in sides and r["threads"] == 1]
        return len({row.get("session") for row in rows}) > 1

    def largest(
        self, side: str, figure: str, jobs: Sequence[str] | None = None, sweeps: bool = True
    ) -> float | None:
        """Over all jobs (or these), sides that begin so, and numbers of threads."""
        found = [
            row[figure]
            for row in self.rows
            if row["side"].startswith(side)
            and not row.get("failed")
            and (jobs is None or row["job"] in jobs)
            and (sweeps or "sweep" not in row["side"])
        ]
        return max(found, default=None)


@dataclass(frozen=True)
class Row:
    """A line of the table of targets: smaller is better in all of them. apart: not from one session."""

    job: str
    peer: float | None
    target: float
    ours: float | None
    unit: str = "CPU-s"
    apart: bool = False

    def cells(self) -> list[Any]:
        ratio = self.peer / self.ours if self.peer and self.ours else None
        reached = "not measured" if self.ours is None else "yes" if self.ours <= self.target else "**no**"
        limit = f"≤ {self.target:g} {self.unit}".strip()
        mark = " †" if self.apart else ""
        return [self.job, self.peer, limit, self.ours, ratio and f"{ratio:.3g}×{mark}", reached]


def targets() -> list[Row]:
    """The table of targets, in its order; one thread, whole processes."""
    mergekit, fusion, cart = Figures("mergekit"), Figures("fusion_bench"), Figures("cart")
    outputs = {row["job"]: row for row in load("mergekit_outputs")}

    def against_mergekit(job: str, target: float, label: str = "", side: str = "mergeline") -> Row:
        ours, apart = mergekit.get(job, side), mergekit.apart(job, "mergekit", side)
        return Row(label or job, mergekit.get(job, "mergekit"), target, ours, apart=apart)

    def against_fusion(job: str, target: float, label: str, side: str = "mergeline") -> Row:
        ours, apart = fusion.get(job, side), fusion.apart(job, "fusion_bench", side)
        return Row(label, fusion.get(job, "fusion_bench"), target, ours, apart=apart)

    def peak(
        name: Figures, peer: str, jobs: Sequence[str] | None = None
    ) -> tuple[float | None, float | None]:
        found = (
            name.largest(peer, "peak_mib", jobs),
            name.largest("mergeline", "peak_mib", jobs, sweeps=False),
        )
        return tuple(None if value is None else value / GB_IN_MIB for value in found)

    jobs_340m = sorted({row["job"] for row in mergekit.rows} - {"help"})
    rss_340m, rss_vit, rss_cart = (
        peak(mergekit, "mergekit", jobs_340m),
        peak(fusion, "fusion"),
        peak(cart, "naive"),
    )
    karcher = outputs.get("karcher", {})
    return [
        against_mergekit("help", 0.5, "`--help`"),
        against_mergekit("linear", 6),
        against_mergekit("task_arithmetic", 6),
        against_mergekit("ties", 25, "ties, as mergekit does it"),
        against_mergekit("ties", 25, "ties, official (global trim)", "mergeline default"),
        against_mergekit("breadcrumbs", 25),
        against_mergekit("sce", 25),
        against_mergekit("della", 40),
        against_mergekit("slerp", 7, "slerp, 2 × 340 M"),
        against_mergekit("karcher", 8),
        Row("karcher, relative error", karcher.get("error_mergekit"), 1.7e-3,
            karcher.get("error_mergeline"), ""),
        against_fusion("iso_c", 10, "iso_c, 8 × ViT-B/32"),
        against_fusion("tsv_merge", 60, "tsv_merge, same"),
        against_fusion("tsv_merge", 5, "tsv_merge, next scale, in a sweep", "mergeline sweep, each further point"),
        Row("cart, same", cart.get("cart", "naive"), 60, cart.get("cart", "mergeline"),
            apart=cart.apart("cart", "naive", "mergeline")),
        Row("cart, each next (rank, scale), in a sweep", cart.get("cart", "naive"), 5,
            cart.largest("mergeline sweep, each", "cpu_s")),
        Row("cart, the next merge with stored factors", cart.get("cart", "naive"), 5,
            cart.largest("mergeline next", "cpu_s")),
        Row("peak memory, 340 M jobs", rss_340m[0], 0.7, rss_340m[1], "GB"),
        Row("peak memory, iso_c and tsv_merge of 8 ViTs", rss_vit[0], 1, rss_vit[1], "GB"),
        Row("peak memory, cart of 8 ViTs", rss_cart[0], 1, rss_cart[1], "GB"),
    ]  # fmt: skip


def costs(name: str) -> str:
    """Every row of one results file."""
    header = ["job", "side", "threads", "CPU-s", "wall s", "peak MiB", "runs", "failed"]
    keys = ["job", "side", "threads", "cpu_s", "wall_s", "peak_mib", "runs", "failed"]
    rows = sorted(load(name), key=lambda row: (row["job"], str(row["threads"]), row["side"]))
    return table(header, [[row.get(key) for key in keys] for row in rows])


def side_by_side(name: str, peer: str, jobs: Sequence[str] = ()) -> str:
    """One thread: what each side needs, and how many times less Mergeline does; without jobs, all."""
    figures, lines = Figures(name), []
    for job in jobs or sorted({row["job"] for row in figures.rows}):
        cost = [figures.get(job, side) for side in (peer, "mergeline")]
        peak = [figures.get(job, side, "peak_mib") for side in (peer, "mergeline")]
        ratios = [f"{a / b:.3g}×" if a and b else None for a, b in (cost, peak)]
        lines.append([job, *cost, ratios[0], *peak, ratios[1]])
    return table(["job", f"{peer}, CPU-s", "Mergeline", "ratio", f"{peer}, MiB", "Mergeline", "ratio"], lines)


def outputs(peers: Mapping[str, str]) -> str:
    """How outputs differ from the peers': name -> results file."""
    header = ["job", "peer", "largest, ulps", "elements apart", "by more than 1 ulp", "relative",
              "relative to the update", "note"]  # fmt: skip
    keys = ["ulps", "apart", "beyond", "relative", "update", "note"]
    rows = [[row["job"], peer, *map(row.get, keys)] for peer, name in peers.items() for row in load(name)]
    return table(header, rows)


def learned() -> str:
    """Merges with examples beside FusionBench's: what they cost, and how alike they are."""
    sides = ("fusion_bench", "mergeline")
    costs, towers = [], []
    for row in load("learned_fusion_bench"):
        for label, key, size in (("whole", "cpu_s", "bytes"), ("a step", "step_cpu_s", "step_bytes")):
            cpu = [row[side][key] for side in sides]
            if all(cpu) and (label == "a step" or "experts" not in row["job"]):
                found = [row[side][size] / 2**20 for side in sides]
                process = [row[side]["process_mib"] for side in sides]
                cells = [*cpu, f"{cpu[0] / cpu[1]:.2g}×", *found, f"{found[0] / found[1]:.2g}×", *process]
                costs.append([f"{row['job']}, {label}", *cells])
            if label == "a step" and row["mergeline"][size] is not None:
                tower = row["mergeline"]["weights"]
                towers.append([row["job"], *((row[side][size] - row["images"]) / tower for side in sides)])
    header = ["job", "FusionBench, CPU-s", "Mergeline", "ratio", "FusionBench, MiB of tensors", "Mergeline", "ratio",
              "FusionBench, MiB of the process", "Mergeline"]  # fmt: skip
    alike = [
        [row["job"], *(row[f"{side} accuracy"] for side in sides), row["relative to the update"],
         row.get("coefficients"), row.get("coefficients apart")]
        for row in load("learned_fusion_bench")
        if "mergeline accuracy" in row
    ]  # fmt: skip
    names = [
        "job",
        "FusionBench, accuracy",
        "Mergeline",
        "relative to the update",
        "coefficients",
        "largest difference",
    ]
    grown = table(["a step without images, in towers of float32", "FusionBench", "Mergeline"], towers)
    return "\n\n".join([table(header, costs), grown, table(names, alike)])


def accelerator() -> str:
    """Merges on an accelerator beside its limits."""
    rows = load("gpu")
    if not rows:
        return "Not measured: no accelerator could be had. `on_gpu.py` measures it."
    keys = ["device", "family", "side", "wall_s", "cpu_s", "peak_mib", "relative", "failed"]
    return table(keys, [[row.get(key) for key in keys] for row in rows])


def evaluation() -> str:
    """What measuring an image model costs, where a search's time goes, and whether answers differ."""
    rows = load("evaluation")
    points, products, answers = (
        [row for row in rows if row["part"] == part] for part in ("a point", "products, GFLOP/s", "answers")
    )
    shares: dict[str, dict[str, float]] = {}
    for row in rows:
        if row["part"].startswith("operations, "):
            shares.setdefault(row["part"], {})[row["side"]] = row["share"]
    sides = [*dict.fromkeys(side for own in shares.values() for side in own)]
    keys = ["side", "points", "images", "again", "bfloat16_differs", "furthest", "differ"]
    header = ["merge", "points", "images", "run again", "other classes by bfloat16 alone", "the furthest of them",
              "other classes"]  # fmt: skip
    searches = [row for row in rows if row["part"].startswith("search: ")]
    tables = [
        (["a point by", "CPU-s", "times less"], [[row["side"], row["cpu_s"], row["ratio"]] for row in points]),
        (["products of", "GFLOP/s"], [[row["side"], row["value"]] for row in products]),
        (["share of", *sides], [[kind, *map(own.get, sides)] for kind, own in shares.items()]),
        (["part", "of", "CPU-s", "share"],
         [[row["part"], row["side"], row["cpu_s"], row["share"]] for row in searches]),
        (header, [[row[key] for key in keys] for row in answers]),
    ]  # fmt: skip
    return "\n\n".join(table(*own) for own in tables)


def machines() -> str:
    """What each results file was measured on."""
    lines = []
    for path in sorted(RESULTS.glob("*.json")):
        found = json.loads(path.read_text()).get("machine")  # counts and losses are the same on all
        if not found:
            continue
        lines.append([path.stem, found["cpu"], found["cores"], found["load"], found["python"]])
    return table(["results", "CPU", "cores", "load when written", "Python"], lines)


def document() -> str:
    growth = ["study", "size", "method", "experts", "gb_read", "cpu_s", "peak_mib", "failed"]
    notes = HERE / "NOTES.md"
    parts = [
        "# Results of the benchmarks",
        "Written by `write_results.py` from `results/`; how to measure them again: [README.md](README.md).\n"
        "Figures are CPU-seconds (user + system) and peak memory of whole processes, medians of the runs,\n"
        "sides in turns. Peak memory counts file pages that are mapped, as the kernel does.",
        "## Targets",
        "One thread. The ratio says how many times less than the peer Mergeline needs; † marks figures\n"
        "that were not measured in one session, so that the machine's mood may be in the ratio. Peak memory is\n"
        "the largest of single merges, with one thread and with the default; of sweeps see below.",
        table(["job", "peer", "target", "Mergeline", "ratio", "reached"], [row.cells() for row in targets()]),
        "## Against mergekit 0.1.5",
        "Llama of 340 M parameters, bf16, base and four experts.",
        side_by_side("mergekit", "mergekit"),
        "## Against FusionBench 0.2.33",
        "Eight CLIP ViT-B/32 vision towers, fp32.",
        side_by_side("fusion_bench", "fusion_bench"),
        "## Merges with examples, against FusionBench 0.2.33",
        "The sample family as transformers has it, eight experts of 1.9 M parameters in fp32, one thread: the same\n"
        "images, settings and, of AdaMerging, batches (`learned_against_fusion_bench.py`). CPU-seconds of the merge,\n"
        "without imports; bytes of tensors at the peak, with the weights that stay in memory and, of AdaMerging, the\n"
        "images (48 MiB, 15 of the larger family), which both hold; of the others they are in Mergeline's alone.\n"
        "Accuracies are means over tasks, on test; differences are those of the merges and of AdaMerging's\n"
        "coefficients. The larger family is random: its bytes alone were measured.",
        learned(),
        "## Against the plain loop of CART",
        costs("cart"),
        "## How outputs differ from the peers'",
        "In representable numbers of the output's dtype (bf16 for mergekit, fp32 for the others), and\n"
        "relative in the Frobenius norm. A small number next to 0 is many ulps from it, so read `relative` first.",
        outputs(
            {
                "mergekit": "mergekit_outputs",
                "FusionBench": "fusion_bench_outputs",
                "plain loop": "cart_outputs",
            }
        ),
        "## Parity on SmolLM2-135M",
        "The base and three full fine-tunes of `samples/make_llm.py`, in bf16. mergekit computes in the dtype of its\n"
        "configuration, bfloat16 here and float32 with `out_dtype: bfloat16` below; Mergeline rounds once either way.",
        outputs(
            {"mergekit in bfloat16": "smollm2_outputs", "mergekit in float32": "smollm2_float32_outputs"}
        ),
        "## How cost grows",
        "![CPU-seconds by bytes read](plots/cost_by_size.png)\n"
        "![Memory by experts](plots/memory_by_experts.png)",
        table(growth, [[row.get(key) for key in growth] for row in load("growth")]),
        "## Larger than memory",
        "Base and four experts, bf16, shards of 1 GiB, under `--memory 4GiB`, files out of the page cache before each\n"
        "run. `cat` reads the same files; a merge also writes a fifth of that.",
        table(LARGE, [[row.get(key) for key in LARGE] for row in load("large")]),
        "What `mergeline plan` says of larger ones, for one core: [docs/scale.md](../docs/scale.md) reads it.",
        table(PLANS, [[row.get(key) for key in PLANS] for row in load("large_plans")]),
        "## Beside the disk",
        "Cold merges of the Llama of 340 M parameters, imports apart. `apart`: `cat` of the inputs, then `dd` of the\n"
        "output with conv=fsync; `together`: both at once. Ratios are theirs to the merge, so that 1 is the disk's\n"
        "speed. `free`: to `apart`, without the seconds in line for a core; `of_rate`: to what the bytes need at the\n"
        "rate that the disk was limited to (`disk.py`).",
        table(DISK, [[row.get(key) for key in DISK] for row in load("disk")]),
        "## Compressed stores",
        "The eight experts of the sample family in one file; each is taken out again and scored on its own task.\n"
        "`ratio`: bytes of the store over those of eight checkpoints; `kept`: of the experts' accuracy.",
        "![Accuracy by bytes of the stores](plots/stores.png)",
        table(STORES, [[row.get(key) for key in STORES] for row in load("stores")]),
        "## Searches within a budget",
        "The sample family: the best of a grid by validation, and what searches of ten seeds find with a share of\n"
        "its evaluations (`search.py`). Evaluations, points and `median` are medians over seeds, `least` is the worst\n"
        "seed's. `found`: seeds with the grid's best; `level`: seeds whose choice is no worse than it, by the 95 %\n"
        "interval of the paired difference. `wrongly`: of the points that races dropped, those as good on all\n"
        "examples as the best was then.",
        table(SEARCHES, [[row[key] for key in SEARCH_KEYS] for row in load("search")]),
        "## Measuring image models",
        "A point of the demo's search: 3050 validation images of eight tasks, on one thread (`evaluation.py`).\n"
        "Images near a boundary between classes are run again in float32; `furthest` of images that bfloat16 alone\n"
        "gives another class is in units of how far it moves features in the mean: what is nearer than 1 is run again.",
        evaluation(),
        "## Floors",
        "The Llama of 340 M parameters. A floor is imports, and what a merge's bytes cost at rates of the same\n"
        "run: for each reading of an input a copy from the page cache and a cast, one hash, one `y += a x` an\n"
        "expert, the output's cast, copy and hash. It has nothing of order statistics, draws or comparisons\n"
        "(`floors.py`).",
        table(
            ["job", "readings", "floor, CPU-s", "CPU-s", "ratio"],
            [[row[key] for key in FLOOR_KEYS] for row in load("floors") if "ratio" in row],
        ),
        "## Near directions instead of exact ones",
        "The leading 8 % of one matrix, on one thread. `float32`: all eigenvectors of a Gram matrix in float32,\n"
        "and the error of the projection. `filtered`: blocks filtered by Chebyshev polynomials in float32, until\n"
        "the *true* error is 1e-3, which no certificate knows so early (`approximate.py`). Ratios below 1 are dearer\n"
        "than the exact way.",
        table(
            ["side", "rows", "exact, CPU-s", "float32, ratio", "error", "filtered, ratio", "error"],
            [[row[key] for key in APPROXIMATE] for row in load("approximate")],
        ),
        "## On an accelerator",
        accelerator(),
        "## Limits of the machine",
        table(["limit, of one CPU", "value"], [[row["limit"], row["value"]] for row in load("limits")]),
        "## Every run",
        costs("mergekit"),
        costs("fusion_bench"),
        "## Machine",
        machines(),
    ]
    if notes.exists():
        parts.append(notes.read_text().strip())
    return "\n\n".join(parts) + "\n"


def main() -> None:
    (HERE / "RESULTS.md").write_text(document())


if __name__ == "__main__":
    main()
