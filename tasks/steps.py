"""The steps of a pipeline, each of which says all of itself here: see tasks/step.py. A modality adds its own.

From this one statement come the stages (tasks/graph.py), dvc.yaml (tasks/dvc_yaml.py), the verbs of the command line,
what Prefect tries again and where it runs it, and which outputs are of items that are no longer named.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from mergeline.tasks.modalities import modalities, modality_of
from mergeline.tasks.step import Stage, StageTemplate, Step

if TYPE_CHECKING:
    from mergeline.tasks.modality import Modality
    from mergeline.tasks.schema import Params

_BUILD = Path("build")
_CHECKPOINTS = _BUILD / "checkpoints"
_FACTORS = Path(".mergeline/factors")
_SCRATCH = Path(".mergeline/scratch")
_DIGESTS = "build/digests"
_FAMILY = ("base", "experts")


class Command(NamedTuple):
    """A verb of the command line. takes_names: whether it can be run for some of its items alone."""

    name: str
    help: str
    takes_names: bool


def steps(modality: Modality) -> list[Step]:
    """The steps of a pipeline, in their order."""
    measuring = (
        *modality.deps,
        "${code}/evaluation/metrics.py",
        "${code}/evaluation/state.py",
        "${code}/tasks/evaluate.py",
    )
    fit = StageTemplate(
        "fit",
        deps=(
            "build/checkpoints",
            "build/statistics",
            *modality.deps,
            "${code}/merging",
            "${code}/tasks/fit.py",
        ),
        params=(*_FAMILY, "seed", "merges.${key}", *modality.params),
        outs=("build/fits/${key}",),
        foreach="merges",
        goes_on=True,
    )
    search = StageTemplate(
        "search",
        deps=(
            "build/checkpoints",
            "build/fits/${key}",
            *measuring,
            "${code}/evaluation/racing.py",
            "${code}/merging",
            "${code}/tasks/budget_search.py",
            "${code}/tasks/fit.py",
            "${code}/tasks/search.py",
            "${code}/tasks/search_space.py",
            "${code}/tasks/study.py",
        ),
        params=(*_FAMILY, "seed", "merges.${key}", *modality.params),
        outs=("build/search/${key}.json",),
        foreach="merges",
    )
    merge = StageTemplate(
        "merge",
        deps=(
            "build/checkpoints",
            "build/fits/${key}",
            "build/search/${key}.json",
            "${code}/merging",
            "${code}/tasks/fit.py",
            "${code}/tasks/merge.py",
        ),
        params=(*_FAMILY, "seed", "merges.${key}", *modality.merge_params),
        outs=("build/merges/${key}", f"{_DIGESTS}/${{key}}.json"),
        foreach="merges",
    )
    evaluate = StageTemplate(
        "evaluate",
        deps=("build/merges/${key}", *measuring),
        params=modality.params,
        outs=("build/evaluations/${key}",),
        foreach="merges",
    )
    return [
        Step(
            "fetch",
            "bring checkpoints into build/checkpoints",
            _fetch,
            (
                StageTemplate(
                    "checkpoint-file",
                    deps=("${item}", "${code}/tasks/fetch.py"),
                    params=("checkpoints.files.${key}", "checkpoints.layout"),
                    outs=("build/checkpoints/${key}", "build/statistics/${key}.json"),
                    foreach="checkpoints.files",
                ),
                StageTemplate(
                    "checkpoint-uri",
                    deps=("${code}/tasks/fetch.py",),
                    params=("checkpoints.uris.${key}", "checkpoints.layout"),
                    outs=("build/checkpoints/${key}", "build/statistics/${key}.json"),
                    foreach="checkpoints.uris",
                ),
            ),
            downloads=True,
        ),
        *modality.steps,
        Step(
            "collect",
            "collect statistics of the experts on examples",
            _collect,
            (
                StageTemplate(
                    "statistics",
                    deps=(
                        "build/checkpoints",
                        *modality.deps,
                        "${code}/merging",
                        "${code}/tasks/collect.py",
                    ),
                    params=(*_FAMILY, "seed", "statistics.${key}", *modality.params),
                    outs=("build/statistics/${key}",),
                    foreach="statistics",
                ),
            ),
            on_device=True,
        ),
        Step(
            "extract",
            "describe the task vectors",
            _extract,
            (
                StageTemplate(
                    "extract",
                    deps=("build/checkpoints", "${code}/merging", "${code}/tasks/extract.py"),
                    params=(*_FAMILY, *modality.merge_params),
                    outs=("build/extract",),
                ),
            ),
        ),
        Step(
            "baselines",
            "score the base and the experts",
            _baselines,
            (
                StageTemplate(
                    "baselines",
                    deps=("build/checkpoints", *measuring),
                    params=(*_FAMILY, *modality.params),
                    outs=("build/evaluations/baselines",),
                ),
            ),
            on_device=True,
        ),
        Step(
            "fit",
            "fit merges of learned methods to examples",
            _fit,
            (fit, _for_merges_of_merges(fit, _DIGESTS)),
            on_device=True,
            merges=True,
        ),
        Step(
            "search",
            "choose settings on the validation split",
            _search,
            (search, _for_merges_of_merges(search)),
            on_device=True,
            merges=True,
            spreads=True,
        ),
        Step(
            "merge-all",
            "merge with the chosen settings",
            _merge,
            (merge, _for_merges_of_merges(merge)),
            on_device=True,
            merges=True,
            spreads=True,
        ),
        Step(
            "evaluate",
            "score the merged checkpoints",
            _evaluate,
            (evaluate, _for_merges_of_merges(evaluate)),
            on_device=True,
        ),
        Step(
            "compare",
            "write the leaderboard",
            _compare,
            (
                StageTemplate(
                    "compare",
                    deps=(
                        "build/checkpoints",
                        *modality.compare_deps,
                        "build/extract",
                        "build/search",
                        "build/merges",
                        "build/evaluations",
                        "${code}/evaluation/metrics.py",
                        "${code}/tasks/evaluate.py",
                        "${code}/tasks/compare.py",
                    ),
                    params=("name", *_FAMILY, "merges", *modality.params),
                    outs=("build/leaderboard",),
                    turn=2,
                ),
            ),
        ),
    ]


def _for_merges_of_merges(template: StageTemplate, *deps: str) -> StageTemplate:
    """The same for merges that take the results of others, which are there by then; `deps` are added."""
    return template._replace(
        name=f"{template.name}-of-merges",
        deps=(*deps, *template.deps),
        params=tuple("merges_of_merges.${key}" if p == "merges.${key}" else p for p in template.params),
        outs=tuple(out for out in template.outs if not out.startswith(_DIGESTS)),
        foreach="merges_of_merges",
        turn=1,
    )


def commands() -> list[Command]:
    """The verbs of all steps of all modalities, each once."""
    found = {step.name: step for modality in modalities().values() for step in steps(modality)}
    return [Command(step.name, step.help, step.takes_names) for step in found.values()]


# ---------------------------------------------------------------------------------------------- what each one calls


def _fetch(params: Params, stage: Stage) -> None:
    from mergeline.tasks.collect import note_size
    from mergeline.tasks.fetch import fetch

    assert stage.item
    fetch(
        params.sources[stage.item],
        Path(stage.out),
        cache=Path(".mergeline/downloads"),
        allow_pickle=params.checkpoints.allow_pickle,
        layout=params.checkpoints.layout,
    )
    note_size(Path(stage.out), Path(stage.outs[1]))


def _collect(params: Params, stage: Stage) -> None:
    from mergeline.tasks.collect import collect_all

    assert stage.item
    collect_all(modality_of(params), params, stage.item, _BUILD, Path(stage.out))


def _extract(params: Params, stage: Stage) -> None:
    from mergeline.tasks.extract import extract

    heads = modality_of(params).heads(params, _BUILD)
    extract(_CHECKPOINTS / params.base, _experts(params), Path(stage.out), heads)


def _baselines(params: Params, stage: Stage) -> None:
    from mergeline.tasks.evaluate import evaluate_baselines

    base, scratch = _CHECKPOINTS / params.base, _SCRATCH / stage.name
    evaluate_baselines(
        modality_of(params), params, _BUILD, base, _experts(params), Path(stage.out), scratch=scratch
    )


def _fit(params: Params, stage: Stage) -> None:
    from mergeline.tasks.fit import fit_merge

    assert stage.item
    fit_merge(modality_of(params), params, stage.item, _BUILD, Path(stage.out))


def _search(params: Params, stage: Stage) -> None:
    from mergeline.tasks.search import search

    assert stage.item
    search(
        modality_of(params),
        params,
        stage.item,
        _BUILD,
        Path(stage.out),
        factors=_FACTORS,
        scratch=_SCRATCH / stage.name,
    )


def _merge(params: Params, stage: Stage) -> None:
    from mergeline.tasks.merge import merge_chosen, note_digest

    assert stage.item
    heads = modality_of(params).heads(params, _BUILD)
    merge_chosen(params, stage.item, _BUILD, Path(stage.out), factors=_FACTORS, heads=heads)
    for out in stage.outs[1:]:
        note_digest(Path(stage.out), Path(out))


def _evaluate(params: Params, stage: Stage) -> None:
    from mergeline.tasks.evaluate import evaluate_merge

    assert stage.item
    evaluate_merge(modality_of(params), params, _BUILD, _BUILD / "merges" / stage.item, Path(stage.out))


def _compare(params: Params, stage: Stage) -> None:
    from mergeline.tasks.compare import compare

    compare(modality_of(params), params, _BUILD, Path(stage.out))


def _experts(params: Params) -> dict[str, Path]:
    return {name: _CHECKPOINTS / name for name in params.experts}
