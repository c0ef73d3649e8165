"""How each stage of the graph calls its step: from an item of params.yaml to plain paths and values.

Steps run in the workspace (the current folder), so that the paths they record are relative.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Callable

from tasks.graph import Stage

if TYPE_CHECKING:
    from tasks.workspace import Workspace

CHECKPOINTS = Path("build/checkpoints")
DATA = Path("build/data")
HEADS = Path("build/heads.safetensors")
FACTORS = Path(".mergeline/factors")
SCRATCH = Path(".mergeline/scratch")


def _fetch(ws: Workspace, stage: Stage) -> None:
    from tasks.fetch import fetch

    fetch(
        ws.params.sources[stage.item],
        Path(stage.out),
        cache=Path(".mergeline/downloads"),
        allow_pickle=ws.params.checkpoints.allow_pickle,
        layout=ws.params.checkpoints.layout,
    )


def _data(ws: Workspace, stage: Stage) -> None:
    from evaluation.datasets import prepare

    datasets = ws.params.datasets
    prepare({**datasets.files, **datasets.uris}[stage.item], Path(stage.out), datasets.image_size)


def _heads(ws: Workspace, stage: Stage) -> None:
    from tasks.evaluate import write_heads

    write_heads(
        CHECKPOINTS / ws.params.base, Path(ws.params.suite), _datasets(ws), Path(stage.out), ws.params.device
    )


def _extract(ws: Workspace, stage: Stage) -> None:
    from tasks.extract import extract

    extract(CHECKPOINTS / ws.params.base, _experts(ws), Path(stage.out))


def _search(ws: Workspace, stage: Stage) -> None:
    from tasks.search import search, search_language

    if ws.params.language:
        search_language(
            ws.params,
            stage.item,
            CHECKPOINTS / ws.params.base,
            _experts(ws, stage.item),
            Path(stage.out),
            factors=FACTORS,
            scratch=SCRATCH / stage.name,
        )
        return
    search(
        ws.params.merges[stage.item],
        CHECKPOINTS / ws.params.base,
        _experts(ws, stage.item),
        HEADS,
        _datasets(ws),
        Path(stage.out),
        factors=FACTORS,
        seed=ws.params.seed,
        device=ws.params.device,
    )


def _merge(ws: Workspace, stage: Stage) -> None:
    from tasks.merge import merge_chosen

    merge_chosen(
        Path("build/search") / f"{stage.item}.json",
        CHECKPOINTS / ws.params.base,
        _experts(ws, stage.item),
        Path(stage.out),
        factors=FACTORS,
        dtype=ws.params.merges[stage.item].dtype,
        seed=ws.params.seed,
        device=ws.params.device,
    )


def _evaluate(ws: Workspace, stage: Stage) -> None:
    from tasks import evaluate, evaluate_language

    merged = Path("build/merges") / stage.item
    if ws.params.language:
        evaluate_language.evaluate_merge(ws.params, merged, Path(stage.out))
        return
    evaluate.evaluate_merge(merged, HEADS, _datasets(ws), Path(stage.out), ws.params.device)


def _baselines(ws: Workspace, stage: Stage) -> None:
    from tasks import evaluate, evaluate_language

    base = CHECKPOINTS / ws.params.base
    if ws.params.language:
        evaluate_language.evaluate_baselines(
            ws.params, base, _experts(ws), Path(stage.out), scratch=SCRATCH / stage.name
        )
        return
    evaluate.evaluate_baselines(
        base, _experts(ws), HEADS, _datasets(ws), Path(stage.out), ws.params.device
    )


def _compare(ws: Workspace, stage: Stage) -> None:
    from tasks.compare import compare

    compare(ws.params, Path("build"), Path(stage.out))


def _experts(ws: Workspace, merge: str | None = None) -> dict[str, Path]:
    """All experts, or those of a merge."""
    names = ws.params.experts_of(merge) if merge else ws.params.experts
    return {name: CHECKPOINTS / name for name in names}


def _datasets(ws: Workspace) -> dict[str, Path]:
    return {task: DATA / task for task in ws.params.tasks}


# the command-line verb of each step
STEPS: dict[str, Callable[[Workspace, Stage], None]] = {
    "fetch": _fetch,
    "data": _data,
    "heads": _heads,
    "extract": _extract,
    "search": _search,
    "merge-all": _merge,
    "evaluate": _evaluate,
    "baselines": _baselines,
    "compare": _compare,
}
