"""A modality that only this file knows, with graded outcomes, goes through the whole pipeline."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import refused
from ruamel.yaml import YAML
from safetensors.numpy import load_file, save_file
from toy_workspace import FAMILY, TASKS, WIDTH, run_all, save_weights

from mergeline.evaluation.metrics import paired
from mergeline.evaluation.pages.page import Grid, Section
from mergeline.evaluation.state import load_state
from mergeline.merging.errors import UserError
from mergeline.merging.files import write_bytes
from mergeline.tasks import modalities
from mergeline.tasks.dvc_yaml import dvc_yaml
from mergeline.tasks.evaluate import read_outcomes
from mergeline.tasks.gates import Finding, Gates
from mergeline.tasks.modality import Evaluation, Json, Known, Modality, Model
from mergeline.tasks.publish import publish
from mergeline.tasks.register import register
from mergeline.tasks.schema import Params, Strict
from mergeline.tasks.step import Stage, StageTemplate, Step
from mergeline.tasks.steps import commands
from mergeline.tasks.workspace import Workspace

N = 30  # examples of each task and split


# --------------------------------------------------------------------------------------- the modality


class Targets(Strict):
    """The section `targets`: seeds of the points that a model's weight should be near to, by task."""

    seeds: dict[str, int]


class ProfitGates(Gates):
    """Outcomes are negative here."""

    minimum_mean: float | None = None  # type: ignore[assignment]
    largest_drop: float | None = None  # type: ignore[assignment]
    largest_weight: float | None = None


class ToyParams(Params):
    targets: Targets
    gates: ProfitGates = ProfitGates()

    @property
    def tasks(self) -> list[str]:
        return [*self.targets.seeds]


def make_targets(params: Params, stage: Stage) -> None:
    """Points (N, WIDTH) around the corner of a task."""
    assert isinstance(params, ToyParams) and stage.item
    rng = np.random.default_rng(params.targets.seeds[stage.item])
    corner = np.where(np.arange(WIDTH) < WIDTH // 2, 1, 0) ^ (stage.item == "right")
    points = {split: corner + rng.normal(size=(N, WIDTH)) / 4 for split in ("val", "test")}
    write_bytes(Path(stage.out), b"")
    save_file(points, stage.out)


class ToyEvaluator:
    def __init__(self, build: Path):
        self._build = build

    def evaluate(self, model: Model, splits: Sequence[str], tasks: Sequence[str]) -> Evaluation:
        weight = (load_state(model) if isinstance(model, Path) else model)["w"].numpy()
        points = {task: load_file(self._build / "targets" / f"{task}.safetensors") for task in tasks}
        found = {f"{s}/{t}": (weight - points[t][s]).astype(np.float32) for s in splits for t in tasks}
        return Evaluation(found, {"largest": float(np.abs(weight).max())})


class Toy(Modality):
    """A model is one weight; an outcome is minus its squared distance from a point."""

    name = "toy"
    models = "toys with targets"
    sections = ("targets",)
    measure = "profit"
    deps = ("build/targets",)
    params = ("targets",)
    in_memory = True
    steps = (
        Step(
            "targets",
            "draw targets",
            make_targets,
            (
                StageTemplate(
                    "targets",
                    deps=(),
                    params=("targets.seeds.${key}",),
                    outs=("build/targets/${key}.safetensors",),
                    foreach="targets.seeds",
                ),
            ),
        ),
    )

    def schema(self) -> type[Params]:
        return ToyParams

    def evaluator(self, params: Params, build: Path, like: Path) -> ToyEvaluator:
        return ToyEvaluator(build)

    def outcomes(self, build: Path, split: str, task: str, answers: np.ndarray) -> np.ndarray:
        return -np.square(answers, dtype=np.float64).sum(1)

    def lineage(self, workspace: Path, board: Json, digests: Any) -> dict[str, str]:
        targets = workspace / "build" / "targets"
        return {f"lineage.data.{t}": str(digests.of(targets / f"{t}.safetensors")) for t in board["tasks"]}

    def row(self, params: Params, name: str, known: Known) -> Json:
        return {"largest": known.scores["largest"]} if known.scores else {}

    def metrics(self, row: Json) -> dict[str, float]:
        return {"largest": row["largest"]} if "largest" in row else {}

    def gates(self) -> type[Gates]:
        return ProfitGates

    def findings(self, row: Json, base: Json, gates: ProfitGates) -> Iterator[Finding]:
        if gates.largest_weight is not None:
            sentence = f"The largest weight is {row['largest']:.2f}."
            yield Finding("largest_weight", row["largest"] <= gates.largest_weight, sentence)

    def report(self, board: Json) -> Section:
        rows = [(row["name"], [(f"{row['largest']:.2f}", "")]) for row in board["rows"] if "largest" in row]
        return Section("toys", "Toys", "Of toys.", [Grid("Weights", ["Model", "Largest weight"], rows)])


# --------------------------------------------------------------------------------------- the pipeline

PARAMS: dict[str, Any] = {
    **FAMILY,
    "name": "toys",
    "targets": {"seeds": {"left": 1, "right": 2}},
    "gates": {"minimum_mean": -5.0, "minimum_gain": 0.0, "largest_drop": 10.0, "largest_weight": 9.0},
}


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Toy:
    """Known during a test."""
    monkeypatch.setattr(modalities, "_KNOWN", modalities.modalities())
    modality = Toy()
    modalities.register(modality)
    return modality


@pytest.fixture
def root(toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A workspace in which nothing has run, as the current folder."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    save_weights(tmp_path)
    write(tmp_path)
    return tmp_path


def write(root: Path, **changes: Any) -> None:
    YAML().dump({**PARAMS, **changes}, root / "params.yaml")


def rows(root: Path) -> Mapping[str, Json]:
    board = json.loads((root / "build/leaderboard/leaderboard.json").read_text())
    assert (board["modality"], board["measure"]) == ("toy", "profit")
    return {row["name"]: row for row in board["rows"]}


def test_its_own_stages_are_part_of_the_graph_and_of_dvc_yaml(root, toy):
    workspace = Workspace(root / "params.yaml")
    found = {stage.name: stage for stage in workspace.stages}
    assert {"targets@left", "targets@right", "checkpoint-file@base", "compare"} < set(found)
    assert {s.name for s in workspace.needs(found["baselines"])} > {"targets@left", "targets@right"}
    assert "targets" in found["search@sum"].params
    text = dvc_yaml(toy, ".")
    assert (
        "cmd: mergeline targets --dvc-stage" in text
        and "foreach: ${targets.seeds}" in text
        and "heads" not in text
    )
    assert ("targets", "draw targets", True) in commands()


def test_graded_outcomes_reach_the_leaderboard(root, toy):
    workspace = run_all(root)
    found = rows(root)
    weights = {"left": load_file("in/left.safetensors")["w"], "right": load_file("in/right.safetensors")["w"]}
    merged = (weights["left"] + weights["right"]) / 2
    for task in TASKS:
        points = load_file(f"build/targets/{task}.safetensors")["test"]
        for name, weight in (("average", merged), ("experts", weights[task])):
            outcome_N = -np.square(weight - points).sum(1)
            score = found[name]["tasks"][task]
            assert score["accuracy"] == pytest.approx(outcome_N.mean(), rel=1e-5)
            spread = 1.96 * outcome_N.std() / np.sqrt(N)
            assert score["upper"] - score["lower"] == pytest.approx(2 * spread, rel=0.2)
            assert score["lower"] < score["accuracy"] < score["upper"] and score["normalised"] is None
    assert found["sum"]["largest"] > 0 and "largest" not in found["experts"]
    assert found["average"]["normalised"] is None and found["average"]["mean"] < 0
    search = json.loads(Path("build/search/sum.json").read_text())
    assert search["chosen"] == max(search["points"], key=lambda point: point["mean"])["params"]
    assert json.loads(Path("build/leaderboard/metrics.json").read_text())["candidate"]["largest"] > 0
    scores = json.loads(Path("build/evaluations/sum/scores.json").read_text())
    assert scores["splits"]["test"]["left"] == {"mean": found["sum"]["tasks"]["left"]["accuracy"], "n": N}
    [pair] = json.loads(Path("build/leaderboard/leaderboard.json").read_text())["pairs"]
    outcomes = [
        read_outcomes(
            toy, Path("build"), Path(f"build/evaluations/{name}/predictions.safetensors"), "test", TASKS
        )
        for name in ("average", "sum")
    ]
    assert (pair["difference"], pair["lower"], pair["upper"], pair["p"]) == paired(*outcomes)
    assert len(workspace.costs()) == len(workspace.stages)


def test_its_gates_judge_candidates_and_champions(root, mlflow_database):
    mlflow_database(root)
    workspace = run_all(root)
    first = publish(workspace)
    assert first.run_id
    verdict = json.loads((workspace.state / "verdict.json").read_text())
    assert verdict["passed"] and verdict["champion_after"] == "1"
    sentences = {finding["gate"]: finding["sentence"] for finding in verdict["findings"]}
    assert set(sentences) == {
        "reload", "finite", "largest_weight", "minimum_mean", "minimum_gain", "largest_drop",
    }  # fmt: skip
    assert sentences["minimum_mean"].startswith("The mean test profit is -")
    page = Path("build/report.html").read_text()
    assert '<section id="toys">' in page and "Mean test profit" in page and "accuracy" not in page

    write(root, merges={"sum": {"method": "task_arithmetic", "params": {"scale": 4.0}}})
    worse = register(root, run_all(root).raw)
    failed = {finding.gate: finding.sentence for finding in worse.findings if not finding.passed}
    assert "minimum_gain" in failed and "mean test profit changes by -" in failed["minimum_gain"]
    assert worse.champion_after == "1" and not (root / "build/merges/average").exists()


def test_an_outcome_that_is_no_number_is_refused(root, toy, monkeypatch):
    monkeypatch.setattr(
        Toy, "outcomes", lambda *_: np.array([1.0, float("nan")])
    )  # of a model that computes nothing
    with refused("the outcome of example 1 is nan"):
        run_all(root)


def test_mistakes_are_blamed_and_sections_belong_to_one_modality(root, toy):
    write(root, targets={"seed": {}})
    with refused("params.yaml:", "targets.seed: unknown key", "did you mean 'seeds'?"):
        Workspace(root / "params.yaml").params  # noqa: B018
    write(root, suite="suite.yaml")
    with refused("image models with datasets and suite, or", "toys with targets"):
        Workspace(root / "params.yaml").params  # noqa: B018
    write(root, gates={"largest_perplexity_ratio": 1.5})
    with refused("gates.largest_perplexity_ratio: unknown key"):
        Workspace(root / "params.yaml").params  # noqa: B018
    with pytest.raises(ValueError, match="the modality toy has 't"):
        modalities.register(Toy())
    with pytest.raises(UserError, match="'tyo' is no modality; did you mean 'toy'"):
        modalities.modality_named("tyo")


def test_optional_members_may_be_absent(toy):
    assert toy.network is None and toy.examples is None and toy.files is not None
