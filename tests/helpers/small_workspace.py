"""A clone of the repository with a family small enough to run the whole pipeline in seconds."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable, Iterator

import numpy as np
from places import REPOSITORY
from ruamel.yaml import YAML

TASKS = ("digits", "shapes")
MERGES = {
    "ties": {"method": "ties", "params": {"density": 0.2, "scale": 1.0}},
    "cart": {"method": "cart", "search": {"rank": [0.1, 0.5], "scale": [1.0, 2.0]}},
}
GATES = {"minimum_mean": 0.2, "largest_drop": 1.0, "largest_norm_ratio": 100.0}
IMAGES = {"fit": 20, "val": 40, "test": 60}
TIME_LIMIT = 600

_BIN = Path(sys.executable).parent
_AUTHOR = ["-c", "user.name=test", "-c", "user.email=test@localhost"]


class SmallWorkspace:
    """A clone's root folder, and the commands a user would run in it, on the clone's own code."""

    def __init__(self, root: Path):
        self.root = root

    def environment(self, **more: str) -> dict[str, str]:
        """What commands see: no Prefect or MLflow settings of the caller, one thread a process, and `more`."""
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "MLFLOW_", "DVC_"))}
        return inherited | {
            "PATH": f"{_BIN}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(self.root),
            "HOME": str(self.root.parent),
            "XDG_CACHE_HOME": str(self.root.parent / ".cache"),
            "OMP_NUM_THREADS": "1",
            **more,
        }

    @contextmanager
    def start(self, command: str, *arguments: str, **more: str) -> Iterator[subprocess.Popen[str]]:
        """A command that runs during the block, `more` in its environment; its output is piped."""
        process = subprocess.Popen(
            [_BIN / command, *arguments],
            cwd=self.root,
            env=self.environment(**more),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            yield process
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=TIME_LIMIT)
        finally:
            process.kill()
            process.wait()

    def run(self, command: str, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
        """A command to its end, whatever its exit code."""
        return subprocess.run(
            [_BIN / command, *arguments],
            cwd=self.root,
            env=self.environment(**more),
            capture_output=True,
            text=True,
            timeout=TIME_LIMIT,
        )

    def check(self, command: str, *arguments: str, **more: str) -> str:
        """A command that must succeed; its stdout."""
        done = self.run(command, *arguments, **more)
        assert done.returncode == 0, f"{command} {arguments}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def outputs(self) -> dict[str, str]:
        """Digests of the files under build/ by path; not the report, which tells times and memory."""
        files = (f for f in sorted(self.root.glob("build/**/*")) if f.is_file() and f.name != ".gitignore")
        digests = {str(f.relative_to(self.root)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}
        digests.pop("build/report.html", None)
        return digests

    def lock(self) -> str:
        return (self.root / "dvc.lock").read_text()

    def edit(self, change: Callable[[dict[str, Any]], None]) -> None:
        """Let `change` modify params.yaml, given as a dict."""
        file = self.root / "params.yaml"
        params = YAML(typ="safe").load(file)
        change(params)
        YAML().dump(params, file)

    def copy(self, root: Path) -> SmallWorkspace:
        """The same workspace in another place."""
        shutil.copytree(self.root, root, symlinks=True)
        return SmallWorkspace(root)

    @contextmanager
    def stages_run(self) -> Iterator[set[str]]:
        """The names of the stages that ran in the block, known at its end."""
        before, ran = self._cost_times(), set()
        yield ran
        ran.update(name for name, time in self._cost_times().items() if before.get(name) != time)

    def _cost_times(self) -> dict[str, int]:
        return {file.stem: file.stat().st_mtime_ns for file in self.root.glob(".mergeline/costs/*.json")}


def make_workspace(root: Path) -> SmallWorkspace:
    """A clone in `root`: the files git knows and those it would add, two experts, a few images a task."""
    for name in _files():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPOSITORY / name, root / name, follow_symlinks=False)
    for task in TASKS:
        _reduce(REPOSITORY / f"samples/data/{task}.npz", root / f"samples/data/{task}.npz")
    workspace = SmallWorkspace(root)
    workspace.edit(_shrink)
    for command in (["init", "-q"], ["add", "-A"], [*_AUTHOR, "commit", "-qm", "small family"]):
        subprocess.run(["git", *command], cwd=root, check=True)
    return workspace


def save_small_family(folder: Path) -> None:
    """The same family as files of a user's, in a folder with its params.yaml."""
    (folder / "samples").mkdir(parents=True)
    shutil.copytree(REPOSITORY / "samples/base", folder / "samples/base")
    (folder / "samples/experts").mkdir()
    for task in TASKS:
        shutil.copy(REPOSITORY / f"samples/experts/{task}.safetensors", folder / "samples/experts")
        _reduce(REPOSITORY / f"samples/data/{task}.npz", folder / f"samples/data/{task}.npz")
    for name in ("params.yaml", "samples/suite.yaml"):
        shutil.copy(REPOSITORY / name, folder / name)
    SmallWorkspace(folder).edit(_shrink)


def _files() -> list[str]:
    """The files of a clone: of the samples only the family's, no tests, and no results."""
    command = ["git", "ls-files", "-co", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=REPOSITORY, capture_output=True, check=True, text=True).stdout
    family = {"samples/suite.yaml", *(f"samples/experts/{task}.safetensors" for task in TASKS)}
    return [
        name
        for name in listed.split("\0")
        if name.startswith("samples/base/")
        or name in family
        or (name not in ("", "dvc.lock") and not name.startswith(("tests/", "samples/")))
    ]


def _reduce(source: Path, target: Path) -> None:
    """The first images of each split, as many as IMAGES says."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with np.load(source) as arrays:
        np.savez(target, **{name: arrays[name][: IMAGES[name.split("_")[0]]] for name in arrays.files})


def _shrink(params: dict[str, Any]) -> None:
    params["experts"] = list(TASKS)
    for part, kept in (("checkpoints", {"base", *TASKS}), ("datasets", set(TASKS))):
        files = params[part]["files"]
        params[part]["files"] = {name: where for name, where in files.items() if name in kept}
    params["merges"] = MERGES
    params["gates"] |= GATES
