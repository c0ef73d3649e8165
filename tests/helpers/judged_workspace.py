"""A workspace as the compare step leaves it, with tiny checkpoints and made-up predictions."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
from ruamel.yaml import YAML
from safetensors.numpy import save_file

from mergeline.merging.checkpoints.checkpoint import open_checkpoint

TASKS = ("digits", "shapes")
N = 400  # test examples of each task
PARAMS = {"name": "sample", "gates": {}}


class JudgedWorkspace:
    """Merges are added by the number of test examples of each task that they get right."""

    def __init__(self, root: Path):
        self.root = root
        self._rows = [self._row("base", "base", {task: N // 10 for task in TASKS})]
        for task in TASKS:
            folder = root / "build" / "data" / task
            folder.mkdir(parents=True, exist_ok=True)
            np.save(folder / "test_x.npy", np.zeros((N, 1)))
            np.save(folder / "test_y.npy", np.arange(N) % 10)

    def add(self, name: str, hits: dict[str, int], *, seed: int = 0, points: int = 3, **row: object) -> None:
        """A merge (in place of an older one of that name) that has the first `hits[task]` examples right."""
        merge = self.root / "build" / "merges" / name
        shutil.rmtree(
            merge, ignore_errors=True
        )  # as the merge step: new files, whatever links to the old ones
        merge.mkdir(parents=True)
        weights = np.random.default_rng([seed, *hits.values()]).normal(size=(4, 3)).astype(np.float32)
        save_file({"weight": weights}, merge / "model.safetensors")
        digest = open_checkpoint(merge).digest()
        origins = {task: {"path": f"../{task}", "digest": f"sha256:{task}"} for task in TASKS}
        recipe = {
            "method": "ties",
            "params": {"density": 0.2, "scale": {"all": 0.3}},
            "dtype": None,
            "seed": 0,
        }
        recipe |= {"base": {"path": "../base", "digest": "sha256:base"}, "experts": origins}
        _write(merge / "manifest.json", {"recipe": recipe, "output": {"digest": digest}})
        scores = {task: {"correct": count, "n": N} for task, count in hits.items()}
        evaluation = self.root / "build" / "evaluations" / name
        _write(evaluation / "scores.json", {"model": name, "splits": {"test": scores}})
        labels = np.arange(N, dtype=np.int32) % 10
        wrong = {
            task: np.where(np.arange(N) < hits[task], labels, labels + 1).astype(np.int32) for task in TASKS
        }
        save_file(
            {f"test/{task}": predicted for task, predicted in wrong.items()},
            evaluation / "predictions.safetensors",
        )
        curve = [{"params": {"density": i / 10}, "mean": i / 10} for i in range(points)]
        _write(self.root / "build" / "search" / f"{name}.json", {"method": "ties", "points": curve})
        self._rows = [r for r in self._rows if r["name"] != name]
        self._rows.append(self._row(name, "merge", hits) | {"digest": digest} | row)
        self.compare()

    def write_params(self, **more: object) -> None:
        """A params.yaml of which commands believe that it made all this."""
        params = {
            "name": "sample",
            "checkpoints": {
                "layout": "as_is",
                "files": {n: f"in/{n}" for n in ("base", *TASKS)},
                "uris": {},
            },
            "base": "base",
            "experts": list(TASKS),
            "datasets": {"image_size": 32, "files": {t: f"in/{t}.npz" for t in TASKS}, "uris": {}},
            "suite": "suite.yaml",
            "merges": {"ties": {"method": "ties"}},
            "seed": 0,
        }
        YAML().dump(params | more, self.root / "params.yaml")

    def remove(self, name: str) -> None:
        """Take a merge out of the leaderboard; its files stay."""
        self._rows = [r for r in self._rows if r["name"] != name]
        self.compare()

    def change_data(self) -> None:
        """Replace the images of a task by others."""
        file = self.root / "build" / "data" / "digits" / "test_x.npy"
        np.save(file, np.load(file) + 1)

    def compare(self) -> None:
        """Write the leaderboard; the candidate is the merge with the best mean."""
        merges = [r for r in self._rows if r["kind"] == "merge"]
        board = {
            "pipeline": "sample",
            "modality": "clip",
            "measure": "accuracy",
            "tasks": list(TASKS),
            "candidate": max(merges, key=lambda r: r["val_mean"])["name"],
            "rows": self._rows,
            "lineage": {
                "base": {"name": "base", "digest": "sha256:base"},
                "experts": {task: {"digest": f"sha256:{task}"} for task in TASKS},
            },
        }
        _write(self.root / "build" / "leaderboard" / "leaderboard.json", board)

    @staticmethod
    def _row(name: str, kind: str, hits: dict[str, int]) -> dict[str, object]:
        mean = sum(hits.values()) / N / len(hits)
        row = {"name": name, "kind": kind, "mean": mean, "lower": mean, "upper": mean, "val_mean": mean}
        row |= {"normalised": mean, "worst_task": min(hits.values()) / N, "norm_ratio": 1.0, "finite": True}
        return row | {"tasks": {task: {"accuracy": count / N} for task, count in hits.items()}}


def _write(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))
