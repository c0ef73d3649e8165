"""A workspace: the folder of a params.yaml, where steps read their inputs and leave their outputs."""

from __future__ import annotations

import json
import resource
import shutil
import time
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Callable, Iterator

from merging.errors import UserError, did_you_mean
from merging.files import write_json
from merging.strict_yaml import YamlFile
from tasks.digests import Digests
from tasks.graph import Stage, needs, stages
from tasks.params import Params, load_params, lookup, raw_params
from tasks.steps import STEPS

# Folders whose entries belong to one item of params.yaml each, and where the items stand.
_PER_ITEM: dict[str, Callable[[Params], set[str]]] = {
    "build/checkpoints": lambda p: set(p.sources),
    "build/data": lambda p: set() if p.language else set(p.tasks),
    "build/search": lambda p: {f"{name}.json" for name in p.merges},
    "build/merges": lambda p: set(p.merges),
    "build/evaluations": lambda p: {*p.merges, "baselines"},
}


class Workspace:
    """params.yaml and everything beside it: `build/` holds outputs, `.mergeline/` what may be deleted at any time."""

    def __init__(self, params_file: str | Path = "params.yaml"):
        self.params_file = Path(params_file).absolute()
        self.root = self.params_file.parent
        self.state = self.root / ".mergeline"

    @cached_property
    def params(self) -> Params:
        return load_params(self.params_file)

    @cached_property
    def raw(self) -> dict[str, Any]:
        return raw_params(self.params_file)

    @cached_property
    def digests(self) -> Digests:
        return Digests(self.state / "digests.sqlite")

    @property
    def has_dvc(self) -> bool:
        return (self.root / "dvc.yaml").exists()

    @cached_property
    def code(self) -> str:
        """Where Mergeline's sources lie, as dvc.yaml says it; "." in the repository itself."""
        if not self.has_dvc:
            return Path(__file__).parent.parent.as_posix()
        for entry in (YamlFile(self.root / "dvc.yaml").data or {}).get("vars", []):
            if isinstance(entry, dict) and "code" in entry:
                return entry["code"]
        return "."

    @cached_property
    def stages(self) -> list[Stage]:
        return stages(self.params, self.code)

    def needs(self, stage: Stage) -> list[Stage]:
        return needs(stage, self.stages)

    def path(self, name: str) -> Path:
        return self.root / name

    def select(self, step: str, names: list[str] | None) -> list[Stage]:
        """The stages of a step, all or those of the named items (raises UserError for an unknown name)."""
        found = {stage.item or step: stage for stage in self.stages if stage.step == step}
        for name in names or []:
            if name not in found:
                raise UserError(
                    f"{self.params_file.name} has no '{name}' to {step}{did_you_mean(name, found)}"
                )
        return [found[name] for name in names or found]

    @contextmanager
    def lock(self) -> Iterator[None]:
        """One run a workspace (raises UserError if another process holds it); the kernel frees it on death."""
        from filelock import FileLock, Timeout

        self.state.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(self.state / "run.lock", timeout=0):
                yield
        except Timeout:
            raise UserError(f"{self.root}: another run is using this workspace; wait until it ends") from None

    def tidy(self) -> None:
        """Remove outputs of items that params.yaml no longer names, and what a killed run left half-written."""
        for folder, items in _PER_ITEM.items():
            for entry in sorted(self.path(folder).glob("*")):
                if entry.name not in items(self.params):
                    shutil.rmtree(entry) if entry.is_dir() else entry.unlink()

    def record(self, stage: Stage) -> dict[str, Any]:
        """What decides whether a stage is stale: parameters and digests of its dependencies."""
        return {
            "stage": stage.name,
            "params": {key: lookup(self.raw, key) for key in stage.params},
            "deps": {dep: self.digests.of(self.path(dep)) for dep in stage.deps},
        }

    def outputs(self, stage: Stage) -> dict[str, str | None]:
        return {out: self.digests.of(self.path(out)) for out in stage.outs}

    def run(self, stage: Stage) -> None:
        """Run one stage and record what it cost.

        Raises:
            UserError: bad input.
        """
        for dep in stage.deps:
            if not self.path(dep).exists():
                makers = [s.name for s in self.needs(stage) if dep in s.outs or s.out.startswith(dep)]
                hint = f"run `mergeline run` or the stage {makers[0]} first" if makers else "check the path"
                raise UserError(f"{stage.name}: {dep} is missing; {hint}")
        wall, cpu = time.perf_counter(), time.thread_time()
        STEPS[stage.step](self, stage)
        cost = {
            "stage": stage.name,
            "seconds": round(time.perf_counter() - wall, 3),
            "cpu_seconds": round(time.thread_time() - cpu, 3),
            "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }
        write_json(self.state / "costs" / f"{stage.name}.json", cost)

    def costs(self) -> list[dict[str, Any]]:
        """The last cost of every stage, in order; stages that never ran here are left out."""
        files = [self.state / "costs" / f"{stage.name}.json" for stage in self.stages]
        return [json.loads(file.read_text()) for file in files if file.exists()]
