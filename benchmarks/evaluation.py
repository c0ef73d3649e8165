"""What measuring an image model costs in a search, beside open_clip's own module; where a search's time goes.

    python benchmarks/evaluation.py cost WORKSPACE                a point, on three sides in turns; its operations
    python benchmarks/evaluation.py search WORKSPACE [MERGE]      the parts of a whole search (cart_wide)
    python benchmarks/evaluation.py answers WORKSPACE [MERGE...]  whether any answer differs from float32's

WORKSPACE has the params.yaml of a CLIP family; its checkpoints, data and heads are made where they are missing. A point
is all validation examples, on one thread. Sides: open_clip's module as it is; the evaluator in float32, which runs the
last block on the class token alone; and with bfloat16 first (evaluation/clip/screening.py), on processors that have it.
CPU-seconds, medians. Writes results/evaluation.json.
"""

from __future__ import annotations

import argparse
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from limits import cpu_seconds
from measure import save, table
from torch import Tensor

from mergeline.evaluation.clip import screening, zero_shot
from mergeline.evaluation.clip.zero_shot import TOWER, Evaluator
from mergeline.merging.engine.machine import one_thread
from mergeline.tasks import search
from mergeline.tasks.clip.evaluator import open_evaluator
from mergeline.tasks.evaluations import Evaluations, afresh
from mergeline.tasks.workspace import Workspace

FACTORS, SCRATCH, BUILD = Path(".mergeline/factors"), Path(".mergeline/scratch"), Path("build")
POINTS = 8  # of which a cost is the median
# By the names of operations, as torch's profiler gives them; what is named by none is `else`.
KINDS = {
    "products": ("addmm", "::mm", "convolution"),
    "attention's small products": ("bmm", "flash_attention"),
    "softmax": ("_softmax",),
    "GELU": ("gelu",),
    "LayerNorm": ("layer_norm",),
}
MODULE, FLOAT32, SCREENED = "open_clip's module", "float32", "bfloat16 first"


def opened(workspace: Path) -> Workspace:
    os.chdir(workspace)
    work = Workspace("params.yaml")
    for stage in work.stages:
        if stage.step in ("fetch", "data", "heads") and not work.path(stage.out).exists():
            work.run(stage)
    return work


def merged(work: Workspace, name: str) -> Iterator[dict[str, Tensor]]:
    """The models of all points of a merge."""
    own = work.params.merges[name]
    merging = search.merging_of(work.modality, work.params, name, BUILD, FACTORS, SCRATCH)
    return (model for _, model in merging(own.method, [*own.points]))


class Sides:
    """Ways to measure a model on validation."""

    def __init__(self, work: Workspace):
        base = BUILD / "checkpoints" / work.params.base
        self.tasks, self.evaluator = work.params.tasks, open_evaluator(work.params, BUILD, base)
        self.screen = self.evaluator._screen
        self.module, _ = zero_shot.build_tower(base)

    def run(self, side: str, model: dict[str, Tensor]) -> dict[str, np.ndarray]:
        if side == MODULE:
            own = {name.removeprefix(TOWER): t for name, t in model.items() if name.startswith(TOWER)}
            self.module.load_state_dict(own, strict=False)
            with torch.inference_mode():
                return {t: self.evaluator._classes(self.features(self.module, t), t) for t in self.tasks}
        self.evaluator._screen = self.screen if side == SCREENED else None
        return self.evaluator.predict(model, "val", self.tasks)

    def features(self, tower: Any, task: str) -> Tensor:
        x, size = self.evaluator.data[task].split("val")[0], self.evaluator.batch_size
        return torch.cat([tower(self.evaluator._pixels(x[i : i + size])) for i in range(0, len(x), size)])

    def seconds(self, side: str, model: dict[str, Tensor]) -> float:
        start = time.process_time()
        self.run(side, model)
        return time.process_time() - start

    def operations(self, side: str, model: dict[str, Tensor]) -> dict[str, float]:
        """The share of each kind."""
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            self.run(side, model)
        found: Counter[str] = Counter()
        for event in profiled.key_averages():
            own = (kind for kind, names in KINDS.items() if any(name in event.key for name in names))
            found[next(own, "else")] += event.self_cpu_time_total
        return {kind: time / sum(found.values()) for kind, time in found.items()}


def products() -> dict[str, float]:
    """GFLOP a CPU-second of a map from 192 to 768 of the tokens of a hundred images."""
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        x, weight, bias = (torch.randn(*shape).to(dtype) for shape in ((1000, 192), (768, 192), (768,)))

        def work(x: Tensor = x, weight: Tensor = weight, bias: Tensor = bias) -> None:
            for _ in range(50):
                torch.nn.functional.linear(x, weight, bias)

        found[str(dtype).removeprefix("torch.")] = 50 * 2 * x.numel() * len(weight) / 1e9 / cpu_seconds(work)
    return found


def cost(work: Workspace) -> list[dict[str, Any]]:
    sides = Sides(work)
    models = [*merged(work, "cart_wide")]
    models = models[:: len(models) // POINTS][:POINTS]
    names = [MODULE, FLOAT32, SCREENED][: 3 if sides.screen else 2]
    took: dict[str, list[float]] = {side: [] for side in names}
    for side in names:
        sides.run(side, models[0])
    for model in models:
        for side in names:
            took[side].append(sides.seconds(side, model))
    rows: list[dict[str, Any]] = [
        {"part": "a point", "side": side, "cpu_s": median(took[side]),
         "ratio": median(a / b for a, b in zip(took[MODULE], took[side]))}
        for side in names
    ]  # fmt: skip
    for side in names[1:]:
        shares = sides.operations(side, models[0])
        rows += [
            {"part": f"operations, {kind}", "side": side, "share": shares[kind]} for kind in (*KINDS, "else")
        ]
    return [
        *rows,
        *({"part": "products, GFLOP/s", "side": kind, "value": v} for kind, v in products().items()),
    ]


def parts(work: Workspace, name: str) -> list[dict[str, Any]]:
    """CPU-seconds of the parts of a search, each without those inside it."""
    took: Counter[str] = Counter()
    inside: list[float] = []

    def timed(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def called(*args: Any, **kwargs: Any) -> Any:
            start = time.process_time()
            inside.append(0)
            try:
                return function(*args, **kwargs)
            finally:
                whole = time.process_time() - start
                took[part] += whole - inside.pop()
                if inside:
                    inside[-1] += whole

        return called

    def watched(self: Evaluator, *args: Any, **kwargs: Any) -> None:
        """The evaluator is made in the middle of a search."""
        made(self, *args, **kwargs)
        self._visual.forward = timed("passes in float32", self._visual.forward)
        pixels = self._pixels = timed("pixels", self._pixels)  # type: ignore[assignment]
        if self._screen:
            self._screen._rough.forward = timed("passes in bfloat16", self._screen._rough.forward)
            self._screen._pixels = pixels

    made = Evaluator.__init__
    Evaluator.__init__ = timed("opening models and data", watched)  # type: ignore[method-assign]
    Evaluator._load = timed("loading tensors", Evaluator._load)  # type: ignore[method-assign]
    Evaluator._classes = timed("cosines and boundaries", Evaluator._classes)  # type: ignore[method-assign]
    screening.to_boundary = timed("cosines and boundaries", screening.to_boundary)
    Evaluations._known = timed("digests and kept answers", Evaluations._known)  # type: ignore[method-assign]
    Evaluator.predict = timed("else, of evaluations", Evaluator.predict)  # type: ignore[method-assign]
    search.merge_state_dicts_points = timed("merging", search.merge_state_dicts_points)
    run, out = timed("else", search.search), Path(".mergeline/evaluation.json")
    with afresh():
        run(work.modality, work.params, name, BUILD, out, factors=FACTORS, scratch=SCRATCH)
    out.unlink()
    return [
        {"part": f"search: {part}", "side": name, "cpu_s": seconds, "share": seconds / sum(took.values())}
        for part, seconds in took.most_common()
    ]


def answers(work: Workspace, name: str) -> dict[str, Any]:
    """Of all points of a merge. furthest: of an image of which bfloat16 alone finds another class, the distance from
    the boundary to it, over how far images of the model were moved in the mean; those nearer than 1 are run again."""
    sides = Sides(work)
    assert sides.screen, "this processor has no products of bfloat16"
    evaluator, screen, points, images = sides.evaluator, sides.screen, 0, 0
    differing = rough_differing = 0
    furthest = 0.0
    for model in merged(work, name):
        screened, points = sides.run(SCREENED, model), points + 1
        with torch.inference_mode():
            moved, distances = [], []
            for task in sides.tasks:
                x = evaluator.data[task].split("val")[0]
                exact = torch.nn.functional.normalize(sides.features(evaluator._visual, task), dim=-1)
                rough = torch.cat(
                    [screen._roughly(x[i : i + 200], lambda n: None) for i in range(0, len(x), 200)]
                )
                classes, images = evaluator._classes(exact, task), images + len(x)
                differing += int((classes != screened[task]).sum())
                wrong = torch.from_numpy(classes != evaluator._classes(rough, task))
                rough_differing += int(wrong.sum())
                distances.append(screening.to_boundary(rough, evaluator._heads[task])[wrong])
                moved.append((exact - rough).norm(dim=1))
        if (distance := torch.cat(distances)).numel():
            furthest = max(furthest, float(distance.max() / torch.cat(moved).mean()))
    return {
        "part": "answers", "side": name, "points": points, "images": images, "again": screen._again / images,
        "bfloat16_differs": rough_differing, "furthest": furthest, "differ": differing,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["cost", "search", "answers"])
    parser.add_argument("workspace", type=Path)
    parser.add_argument("merges", nargs="*")
    a = parser.parse_args()
    work = opened(a.workspace)
    with one_thread():
        if a.what == "cost":
            rows = cost(work)
        elif a.what == "search":
            rows = [row for name in a.merges or ["cart_wide"] for row in parts(work, name)]
        else:
            known = [name for name, merge in work.params.merges.items() if len([*merge.points]) > 1]
            rows = [answers(work, name) for name in a.merges or known]
    save("evaluation", rows, ("part", "side"))
    keys = [*dict.fromkeys(key for row in rows for key in row)]
    print(table(keys, [[row.get(key) for key in keys] for row in rows]))


if __name__ == "__main__":
    main()
