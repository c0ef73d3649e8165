"""A workspace: the folder of a params.yaml, where steps read their inputs and leave their outputs."""

from __future__ import annotations

import json
import os
import resource
import shutil
import time
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Callable, Collection, Iterator

from mergeline.merging.errors import UserError, did_you_mean
from mergeline.merging.files import user_errors, write_json
from mergeline.merging.strict_yaml import YamlFile
from mergeline.tasks import progress, spread
from mergeline.tasks.digests import Digests
from mergeline.tasks.graph import needs, stages
from mergeline.tasks.modalities import modalities, modality_of
from mergeline.tasks.modality import Modality
from mergeline.tasks.params import checked_params, lookup
from mergeline.tasks.places import CODE_LINK, PACKAGE, SOURCES
from mergeline.tasks.private import private_folder
from mergeline.tasks.schema import Params
from mergeline.tasks.stage_there import run_there
from mergeline.tasks.step import Stage, Step
from mergeline.tasks.steps import steps


class Workspace:
    """params.yaml and everything beside it: `build/` holds outputs, `.mergeline/` registry and caches."""

    def __init__(self, params_file: str | Path = "params.yaml"):
        self.params_file = Path(params_file).absolute()
        self.root = self.params_file.parent
        self.state = self.root / ".mergeline"

    @cached_property
    def _yaml(self) -> YamlFile:
        return YamlFile(self.params_file)

    @cached_property
    def params(self) -> Params:
        return checked_params(self._yaml)

    @cached_property
    def modality(self) -> Modality:
        return modality_of(self.params)

    @cached_property
    def steps(self) -> dict[str, Step]:
        """The steps of this pipeline by name."""
        return {step.name: step for step in steps(self.modality)}

    @property
    def raw(self) -> dict[str, Any]:
        """params.yaml as plain data, the way DVC records it."""
        return self._yaml.data

    @cached_property
    def digests(self) -> Digests:
        return Digests(private_folder(self.state) / "digests.sqlite")

    @property
    def progress(self) -> Path:
        """Where stages that run tell how far they are."""
        return self.state / "progress"

    @property
    def has_dvc(self) -> bool:
        return (self.root / "dvc.yaml").exists()

    @cached_property
    def code(self) -> str:
        """Where Mergeline's sources lie, as dvc.yaml says it; "." in the repository itself. Where that is a link, which
        git does not carry, it is made.
        """
        if not self.has_dvc:
            return SOURCES.as_posix()
        for entry in (YamlFile(self.root / "dvc.yaml").data or {}).get("vars", []):
            if isinstance(entry, dict) and "code" in entry:
                if entry["code"] == CODE_LINK:
                    _link_code(self.root / CODE_LINK)
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
    def lock(self, wait: Callable[[], object] | None = None) -> Iterator[None]:
        """One run a workspace; the kernel frees the lock on death.

        wait: called once, before waiting for another process's run to end.

        Raises:
            UserError: another process holds it, and there is no `wait`.
        """
        from filelock import FileLock, Timeout

        lock = FileLock(private_folder(self.state) / "run.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if wait is None:
                raise UserError(
                    f"{self.root}: another run is using this workspace; wait until it ends"
                ) from None
            wait()
            lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def tidy(self) -> None:
        """Remove what is left over."""
        for entry in self.leftovers():
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()

    def leftovers(self) -> list[Path]:
        """Outputs of items that params.yaml no longer names, and what a killed run left half-written."""
        outs = {out for stage in self.stages for out in stage.outs}
        per_item = {f for modality in modalities().values() for step in steps(modality) for f in step.folders}
        entries = [(f, entry) for f in sorted(per_item) for entry in sorted(self.path(f).glob("*"))]
        return [entry for folder, entry in entries if f"{folder}/{entry.name}" not in outs]

    def record(self, stage: Stage, without: Collection[Path] = ()) -> dict[str, Any]:
        """What decides whether a stage is stale: parameters and digests of its dependencies.

        without: files and folders that are taken for gone.
        """
        return {
            "stage": stage.name,
            "params": {key: lookup(self.raw, key) for key in stage.params},
            "deps": {dep: self.digests.of(self.path(dep), without) for dep in stage.deps},
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
        with progress.told(self.progress, stage.name) as told:
            step = self.steps[stage.step]
            whole = step.on_device and not step.spreads
            if whole and (executor := spread.executor()):
                progress.said_of_stage(run_there(executor, self.params, stage))
            else:
                step.run(self.params, stage)
        cost = {
            "stage": stage.name,
            "seconds": round(time.perf_counter() - wall, 3),
            "cpu_seconds": round(time.thread_time() - cpu, 3),
            "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            **({"said": told.said} if told.said else {}),
        }
        write_json(self.state / "costs" / f"{stage.name}.json", cost)

    def costs(self) -> list[dict[str, Any]]:
        """The last cost of every stage, in order; stages that never ran here are left out."""
        files = [self.state / "costs" / f"{stage.name}.json" for stage in self.stages]
        return [json.loads(file.read_text()) for file in files if file.exists()]


def _link_code(link: Path) -> None:
    """Let a link lead to the package that runs, wherever a clone or another installation found it."""
    if link.resolve() == PACKAGE:
        return
    with user_errors(link):
        new = link.with_name(f"{link.name}.{os.getpid()}.partial")
        new.symlink_to(PACKAGE)
        new.rename(link)
