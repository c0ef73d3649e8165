"""How language models are measured: by lm-eval, example by example right or wrong, and by what they forget."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Iterable, cast

from mergeline.tasks.modality import Evaluator, Json, Known, Modality

if TYPE_CHECKING:
    import numpy as np

    from mergeline.evaluation.measures import Measure
    from mergeline.evaluation.pages.page import Section
    from mergeline.merging.learning.network import Examples, Network
    from mergeline.tasks.digests import Digests
    from mergeline.tasks.gates import Finding, Gates
    from mergeline.tasks.language.params import LanguageParams
    from mergeline.tasks.schema import Params
    from mergeline.tasks.serving.contract import Predict, Served

_MEANS = ("gain_kept", "held_in", "held_out")


class LanguageModels(Modality):
    """Causal language models; an outcome is 1 where lm-eval counts an example as right, or what its metric gives it."""

    name = "language"
    hub_task = "text-generation"
    models = "language models with language"
    sections = ("language",)
    deps = (
        "${language.tasks}",
        "${code}/evaluation/language",
        "${code}/evaluation/pretrained.py",
        "${code}/evaluation/processes.py",
        "${code}/tasks/language",
    )
    params = ("language",)
    compare_deps = ("${code}/tasks/language",)

    def schema(self) -> type[Params]:
        from mergeline.tasks.language.params import LanguageParams

        return LanguageParams

    def evaluator(self, params: Params, build: Path, like: Path) -> Evaluator:
        from mergeline.tasks.language.evaluator import TaskEvaluator

        return TaskEvaluator(cast("LanguageParams", params), build.parent / ".mergeline" / "server.log")

    def check(self, base: Path) -> None:
        from mergeline.evaluation.language.models import refuse_other_kinds

        refuse_other_kinds(base)

    def outcomes(self, build: Path, split: str, task: str, answers: np.ndarray) -> np.ndarray:
        return answers.astype("float64")

    def measures(self, params: Params) -> dict[str, Measure]:
        """By the metric that params.yaml names; without one it is an accuracy."""
        from mergeline.evaluation.measures import ACCURACY, Measure

        language = cast("LanguageParams", params).language
        found = {}
        for task in params.tasks:
            metric = language.metrics.get(task, "").partition(",")[0]
            lower = task in language.lower
            counts = metric in ("", "acc", "exact_match") and not lower
            found[task] = (
                ACCURACY if counts else Measure(metric or "score", better="lower" if lower else "higher")
            )
        return found

    def lineage(self, workspace: Path, board: Json, digests: Digests) -> dict[str, str]:
        """A digest of the folder of task files and of the settings they are run with."""
        from mergeline.merging.canonical import text_digest
        from mergeline.tasks.leaderboard import present

        settings = board["language"]
        folder = digests.of(present(workspace / settings["tasks"]))
        return {f"lineage.data.{task}": text_digest([task, folder, settings]) for task in board["tasks"]}

    def settings(self, params: Params) -> Json:
        return {"language": cast("LanguageParams", params).language.model_dump(mode="json")}

    def paths(self, params: Params) -> dict[tuple[str, ...], str]:
        return {("language", "tasks"): cast("LanguageParams", params).language.tasks}

    def row(self, params: Params, name: str, known: Known) -> Json:
        """Gains kept, means held in and out, perplexity, lm-eval's own numbers.

        gain_kept: the mean over tasks of (accuracy - base) / (expert - base), of tasks that an expert learned. Experts
        are those that the merge is made of; tasks of the others are held out.
        """
        made_of = params.made_of(name) if name in params.all_merges else params.experts
        experts = {task: mean for task, mean in known.experts.items() if params.owners[task] in made_of}
        held = {
            "held_in": [mean for task, mean in known.means.items() if task in experts],
            "held_out": [mean for task, mean in known.means.items() if task not in experts],
        }
        found: Json = {key: sum(means) / len(means) for key, means in held.items() if means}
        gains = [
            (known.means[task] - known.base[task]) / (expert - known.base[task])
            for task, expert in experts.items()
            if task in known.means and expert > known.base[task]
        ]
        if gains and name in params.all_merges:
            found["gain_kept"] = sum(gains) / len(gains)
        if known.scores:
            found |= {"perplexity": known.scores["perplexity"], "lm_eval": known.scores["lm_eval"]["test"]}
        return found | ({"checks": known.scores["checks"]} if "checks" in known.scores else {})

    def metrics(self, row: Json) -> dict[str, float]:
        metrics: dict[str, float] = {name: row[name] for name in _MEANS if name in row}
        for task, found in row.get("perplexity", {}).items():
            metrics |= {
                f"perplexity.{task}": found["value"],
                f"bits_per_byte.{task}": found["bits_per_byte"],
            }
        for task, found in row.get("lm_eval", {}).items():
            # MLflow allows no commas in names.
            metrics |= {f"lm_eval.{task}.{key.replace(',', '.')}": value for key, (value, _) in found.items()}
        return metrics

    def show(self, params: Params, build: Path, split: str, task: str, index: int) -> str:
        """What lm-eval asks, without examples before it, and the answer that it wants."""
        from mergeline.evaluation.language.documents import document

        return document(cast("LanguageParams", params).language, params.seed, split, task, index)

    def gates(self) -> type[Gates]:
        from mergeline.tasks.language.gates import LanguageGates

        return LanguageGates

    def findings(self, row: Json, base: Json, gates: Any) -> Iterable[Finding]:
        from mergeline.tasks.language.gates import findings

        return findings(row, base, gates)

    def served(self, params: Params, build: Path, merge: Path) -> Served:
        from mergeline.tasks.language.serving import served

        return served(cast("LanguageParams", params).language)

    @property
    def predictor(self) -> Callable[[Path, Path, Json], Predict]:
        from mergeline.tasks.language.serving import predictor

        return predictor

    @property
    def network(self) -> Callable[[Params, Path, Path], Network]:
        from mergeline.tasks.language.learning import network

        return network

    @property
    def examples(self) -> Callable[..., Examples]:
        from mergeline.tasks.language.learning import examples

        return examples

    def report(self, board: Json) -> Section:
        from mergeline.evaluation.language.section import section

        return section(board)
