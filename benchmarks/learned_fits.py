"""Fits on a prepared family: test accuracy, steps, seconds; the memory of a step by experts, and of closed forms.

    python benchmarks/learned_fits.py scores WORKSPACE OUT.json FIT...     of FITS, below; or all
    python benchmarks/learned_fits.py memory WORKSPACE OUT.json            2 to 16 experts, copies beyond the family's
    python benchmarks/learned_fits.py squares WORKSPACE OUT.json           least squares by images a task: memory, test
    python benchmarks/learned_fits.py gram WORKSPACE OUT.json              `collect gram` at once and by layers: memory

WORKSPACE has params.yaml of a CLIP family and its build/ . Fits see the split `fit`,
nothing is chosen, `test` is read once a row. Use it with OMP_NUM_THREADS=1: fits are of one thread.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from cost import peak_of

from mergeline.evaluation.clip.zero_shot import Evaluator
from mergeline.evaluation.datasets import load
from mergeline.merging import merge
from mergeline.merging.learning.collect import collect
from mergeline.merging.learning.contract import Job
from mergeline.merging.learning.descent import Descent, Schedule, pools_of
from mergeline.merging.learning.directions import Directions, Inputs
from mergeline.merging.learning.fitting import fit
from mergeline.merging.learning.gathering import Gathering
from mergeline.merging.learning.objectives import objective_of
from mergeline.merging.learning.spaces import Coefficients, Numbers, fitted_tensors
from mergeline.merging.recipes.recipe import Recipe
from mergeline.tasks.clip import places
from mergeline.tasks.data_step import dataset
from mergeline.tasks.modalities import modality_of
from mergeline.tasks.workspace import Workspace

START = {"inner": "cart_wudi", "power": 0.55, "damping": 0.1, "low_rank": 0.5, "scale": 1.5}
FITS: dict[str, tuple[str, dict[str, Any]]] = {
    "coefficients": ("coefficients", {}),
    "distill": ("distill", START),
    "least_squares": ("progressive_least_squares", {}),
    "least_squares_by_features": ("progressive_least_squares", {"errors": "features"}),
    "least_squares_by_classes": ("progressive_least_squares", {"errors": "classes"}),
    "adamerging": ("adamerging", {}),
    "adamerging_rate_3e-3": ("adamerging", {"rate": 3e-3, "iterations": 400, "batch": 8, "batches": 1}),
    "adarank": ("adarank", {"iterations": 260, "rate": 2e-3, "batch": 8}),
    "concrete": ("concrete", {"iterations": 100, "rate": 3e-2, "batch": 8}),
    "atlas": ("atlas", {}),
    "expert_merging": ("expert_merging", {}),
    "fw_merging": ("fw_merging", {}),
}
SIXTEEN = 16


def opened(workspace: Path) -> tuple[Any, Any, Any, dict[str, Any]]:
    os.chdir(workspace)
    params, build = Workspace(Path("params.yaml")).params, Path("build").resolve()
    modality = modality_of(params)
    network = modality.network(params, build, build / "checkpoints" / params.base)
    checkpoints = build / "checkpoints"
    recipe = {
        "method": "average",
        "base": checkpoints / params.base,
        "experts": {name: checkpoints / name for name in params.experts},
        "include": ["visual.*"],
    }
    return params, network, modality.examples(params, build), recipe


def scored(params: Any, merged: Path, split: str) -> dict[str, float]:
    from safetensors.torch import load_file

    build = Path("build")
    data = {task: load(dataset(build, task)) for task in params.tasks}
    evaluator = Evaluator(build / "checkpoints" / params.base, load_file(places.heads(build)), data)
    predicted = evaluator.predict(load_file(merged), split, list(data))
    return {task: float((predicted[task] == data[task].split(split)[1]).mean()) for task in data}


def scores(workspace: Path, out: Path, names: list[str]) -> None:
    params, network, examples, recipe = opened(workspace)
    for name in names or list(FITS):
        method, own = FITS[name]
        folder = out.parent / f"fit-{name}"
        shutil.rmtree(folder, ignore_errors=True)
        wall, cpu = time.monotonic(), time.process_time()
        result = fit({**recipe, "method": method, "params": own}, network, examples, folder)
        wall, cpu = time.monotonic() - wall, time.process_time() - cpu
        merge(result, folder / "merged.safetensors", force=True)
        found = scored(params, folder / "merged.safetensors", "test")
        curve = folder / "curve.json"  # of fits that take steps
        steps = json.loads(curve.read_text()) if curve.is_file() else []
        row = {
            "fit": name, "test": sum(found.values()) / len(found), "worst": min(found.values()),
            "steps": sum("loss" in step for step in steps), "seconds": round(wall, 1), "cpu_seconds": round(cpu, 1),
            "examples": {task: examples.count(task) for task in params.tasks}, "tasks": found,
        }  # fmt: skip
        rows = json.loads(out.read_text()) if out.is_file() else []
        out.write_text(json.dumps([*(r for r in rows if r["fit"] != name), row], indent=1) + "\n")
        print(
            json.dumps(
                {key: row[key] for key in ("fit", "test", "worst", "steps", "seconds", "cpu_seconds")}
            ),
            flush=True,
        )


def memory(workspace: Path, out: Path) -> None:
    """Bytes that torch allocates at the peak of a step, for 2 to 16 experts, beside the tower's."""
    params, network, examples, recipe = opened(workspace)
    tower = sum(t.numel() * t.element_size() for t in network.tensors().values())
    family, rows = list(recipe["experts"].items()), []
    copies = out.parent / "copies"
    shutil.rmtree(copies, ignore_errors=True)
    copies.mkdir()
    examples = replace(examples, first=32)
    experts = dict(family)
    for number in range(len(family), SIXTEEN):
        name, source = family[number % len(family)]
        (copies / f"copy{number}").mkdir()
        for file in Path(source).glob("*.safetensors"):
            shutil.copyfile(file, copies / f"copy{number}" / file.name)
        experts[f"copy{number}"] = copies / f"copy{number}"
    for count in (2, 4, 8, 16):
        chosen = {**recipe, "method": "adamerging", "experts": dict(list(experts.items())[:count])}
        given = Recipe.of(chosen)
        job = Job(given, network, examples, out.parent)
        schedule = Schedule(2, 16, 1e-3)
        with Inputs(given) as inputs:
            inputs.load(network, "base")
            fitted_tensors(network, inputs.names)
            directions = Directions(inputs, network, out.parent, {})
            form = Numbers(lambda piece, d: 0.3, squash="clamp")
            space = Coefficients(directions, network, form, given)
            tasks = pools_of(job, schedule)
            # Copies have no task of their own: one task is in memory at a time, whatever their number.
            descent = Descent(job, inputs, space, objective_of("entropy"), schedule, tasks, None)
            descent.loss(0)
            for tensor in network.tensors().values():
                tensor.grad = None
            _, peak = peak_of(partial(descent.loss, 1))
        rows.append({"experts": count, "peak_bytes": peak + tower, "towers": (peak + tower) / tower})
        print(json.dumps(rows[-1]), flush=True)
    out.write_text(json.dumps({"tower_bytes": tower, "rows": rows}, indent=1) + "\n")


class _Peak:
    """In this block, by how much the process grew at most; `bytes` at its end. Linux alone tells it."""

    def __enter__(self) -> _Peak:
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM is what is resident now
        self._before = self._status("VmRSS")
        return self

    def __exit__(self, *_: Any) -> None:
        self.bytes = self._status("VmHWM") - self._before

    def _status(self, key: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(key))


def _in_a_process(work: Any, *given: Any) -> dict[str, Any]:
    """What `work` returns in a process of its own: what one leaves allocated is not there for the next."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(work, *given).result()


def _squares(workspace: Path, folder: Path, images: int) -> dict[str, Any]:
    params, network, examples, recipe = opened(workspace)
    chosen = {**recipe, "method": "progressive_least_squares", "params": {}}
    shutil.rmtree(folder, ignore_errors=True)
    network.features(next(iter(replace(examples, first=2).of(params.tasks[0]))))
    wall, cpu = time.monotonic(), time.process_time()
    with _Peak() as peak:
        result = fit(chosen, network, replace(examples, first=images), folder)
    wall, cpu = time.monotonic() - wall, time.process_time() - cpu
    merge(result, folder / "merged.safetensors", force=True)
    found = scored(params, folder / "merged.safetensors", "test")
    return {
        "images": images, "peak_bytes": peak.bytes, "seconds": round(wall, 1), "cpu_seconds": round(cpu, 1),
        "test": sum(found.values()) / len(found), "worst": min(found.values()),
    }  # fmt: skip


def _gram(workspace: Path, folder: Path, at_once: bool) -> dict[str, Any]:
    params, network, examples, recipe = opened(workspace)
    name, checkpoint = next(iter(recipe["experts"].items()))
    gathering = Gathering(examples=None, memory=None if at_once else "layer")
    out = folder / "gram.safetensors"
    out.unlink(missing_ok=True)
    network.features(next(iter(replace(examples, first=2).of(params.tasks[0]))))
    with _Peak() as peak:
        collect(
            "gram", checkpoint, network, examples, out, gathering=gathering, expert=name, base=recipe["base"]
        )
    return {
        "memory": "all at once" if at_once else "by layers",
        "peak_bytes": peak.bytes,
        "file_bytes": out.stat().st_size,
    }


def closed_forms(workspace: Path, out: Path, work: Any, points: list[Any]) -> None:
    """Rows of what `work` measures at each point."""
    rows = []
    for point in points:
        rows.append(_in_a_process(work, workspace, out.parent / "closed", point))
        print(json.dumps(rows[-1]), flush=True)
        out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    command, workspace, out, *names = sys.argv[1:]
    if command == "scores":
        scores(Path(workspace), Path(out).resolve(), names)
    elif command == "memory":
        memory(Path(workspace), Path(out).resolve())
    elif command == "squares":
        closed_forms(Path(workspace).resolve(), Path(out).resolve(), _squares, [4, 16, 64, 128, 400])
    elif command == "gram":
        closed_forms(Path(workspace).resolve(), Path(out).resolve(), _gram, [True, False])
    else:
        sys.exit(__doc__)
