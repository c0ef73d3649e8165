"""The pipeline as a list of stages: the same graph that dvc.yaml states (a test compares the two)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Iterator

from tasks.params import Params


@dataclass(frozen=True)
class Stage:
    """One step on one item. `deps` and `outs` are paths in the workspace, `params` dotted keys of params.yaml."""

    name: str
    step: str
    item: str | None
    deps: tuple[str, ...]
    params: tuple[str, ...]
    outs: tuple[str, ...]

    @property
    def out(self) -> str:
        return self.outs[0]


_VISION = ("evaluation/vision.py", "evaluation/datasets.py", "tasks/evaluate.py")
_LANGUAGE = ("evaluation/language.py", "evaluation/metrics.py", "tasks/evaluate.py", "tasks/evaluate_language.py")
_HEADS = ("evaluation/vision.py", "evaluation/suite.py", "tasks/evaluate.py")


def stages(params: Params, code: str = ".") -> list[Stage]:
    """All stages in an order that respects their dependencies; `code` is where Mergeline's sources lie."""

    def source(*names: str) -> tuple[str, ...]:
        return tuple(f"{code}/{name}" for name in names)

    def fetches() -> Iterator[Stage]:
        for kind, sources in (("file", params.checkpoints.files), ("uri", params.checkpoints.uris)):
            for name, where in sources.items():
                yield Stage(
                    f"checkpoint-{kind}@{name}",
                    "fetch",
                    name,
                    (*((where,) if kind == "file" else ()), *source("tasks/fetch.py")),
                    (f"checkpoints.{kind}s.{name}", "checkpoints.layout"),
                    (f"build/checkpoints/{name}",),
                )

    def data() -> Iterator[Stage]:
        if params.language:
            return
        for kind, sources in (("file", params.datasets.files), ("uri", params.datasets.uris)):
            for name, where in sources.items():
                deps = (where,) if kind == "file" else ()
                yield Stage(
                    f"data-{kind}@{name}",
                    "data",
                    name,
                    (*deps, *source("evaluation/datasets.py")),
                    (f"datasets.{kind}s.{name}", "datasets.image_size"),
                    (f"build/data/{name}",),
                )

    def heads() -> Iterator[Stage]:
        if params.language:
            return
        yield Stage(
            "heads",
            "heads",
            None,
            (f"build/checkpoints/{params.base}", "build/data", params.suite, *source(*_HEADS)),
            ("base", "suite"),
            ("build/heads.safetensors",),
        )

    family = ("base", "experts")
    if params.language:  # what models are measured with
        measure, settings = (params.language.tasks, *source(*_LANGUAGE)), ("language",)
    else:
        measure, settings = ("build/data", "build/heads.safetensors", *source(*_VISION)), ()
    extract = Stage(
        "extract",
        "extract",
        None,
        ("build/checkpoints", *source("merging", "tasks/extract.py")),
        family,
        ("build/extract",),
    )
    baselines = Stage(
        "baselines",
        "baselines",
        None,
        ("build/checkpoints", *measure),
        (*family, *settings),
        ("build/evaluations/baselines",),
    )
    per_merge = []
    for name in params.merges:
        per_merge += [
            Stage(
                f"search@{name}",
                "search",
                name,
                ("build/checkpoints", *measure, *source("merging", "tasks/search.py")),
                (*family, "seed", f"merges.{name}", *settings),
                (f"build/search/{name}.json",),
            ),
            Stage(
                f"merge@{name}",
                "merge-all",
                name,
                ("build/checkpoints", f"build/search/{name}.json", *source("merging", "tasks/merge.py")),
                (*family, "seed", f"merges.{name}"),
                (f"build/merges/{name}",),
            ),
            Stage(
                f"evaluate@{name}",
                "evaluate",
                name,
                (f"build/merges/{name}", *measure),
                settings,
                (f"build/evaluations/{name}",),
            ),
        ]
    compare = Stage(
        "compare",
        "compare",
        None,
        (
            "build/checkpoints",
            *([] if params.language else ["build/data"]),
            "build/extract",
            "build/search",
            "build/merges",
            "build/evaluations",
            *source("evaluation/metrics.py", "tasks/compare.py"),
        ),
        ("name", *family, "merges", *settings),
        ("build/leaderboard",),
    )
    return [*fetches(), *data(), *heads(), extract, baselines, *per_merge, compare]


def needs(stage: Stage, all_stages: list[Stage]) -> list[Stage]:
    """The stages whose outputs `stage` reads."""

    def reads(out: str) -> bool:
        return any(dep == out or out.startswith(dep + "/") or dep.startswith(out + "/") for dep in stage.deps)

    return [other for other in all_stages if other is not stage and any(reads(out) for out in other.outs)]
