"""The pipeline on language models, from `mergeline init` to the registry: by Prefect and by DVC, in one workspace."""

from __future__ import annotations

import json
import shutil
from typing import Any

import pytest
from mlflow import MlflowClient
from ruamel.yaml import YAML
from small_language_model import save_experts, save_model, save_tasks, skill
from small_workspace import REPOSITORY, SmallWorkspace, make_workspace

pytestmark = pytest.mark.slow

SKILLS = {"one": skill(0), "two": skill(14), "three": skill(27)}
PARAMS = {
    "name": "words",
    "seed": 0,
    "checkpoints": {"layout": "as_is", "files": {n: f"family/{n}" for n in ("base", *SKILLS)}, "uris": {}},
    "base": "base",
    "experts": [*SKILLS],
    "language": {"tasks": "tasks", "suites": {n: [n] for n in SKILLS}, "perplexity": ["prose"]},
    "merges": {
        "task_arithmetic": {"method": "task_arithmetic", "search": {"scale": [0.3, 0.6]}},
        "pair": {"method": "slerp", "experts": ["three", "one"], "search": {"t": [0.3, 0.5]}},
    },
    "gates": {"minimum_mean": 0.1, "largest_perplexity_ratio": 1000.0, "largest_norm_ratio": 10.0},
}
FILE = "runs/words/params.yaml"


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> SmallWorkspace:
    """A clone with a workspace of its own, made by `mergeline init`, in which nothing has run."""
    clone = make_workspace(tmp_path_factory.mktemp("clone"))
    (clone.root / "samples/llm").mkdir()
    for name in ("samples/llm/dvc.yaml", "samples/llm/params.yaml"):
        shutil.copy(REPOSITORY / name, clone.root / name)
    (clone.root / "given").mkdir()
    YAML().dump(PARAMS, clone.root / "given/words.yaml")
    clone.check("mergeline", "init", "runs/words", "--params", "given/words.yaml")
    folder = clone.root / "runs/words"
    save_experts(folder / "family", save_model(folder / "family/base", 0), SKILLS)
    save_tasks(folder / "tasks", SKILLS)
    return clone


@pytest.fixture(scope="module")
def ran(clone: SmallWorkspace) -> SmallWorkspace:
    """The workspace after `mergeline run`, every stage of which ran."""
    words = SmallWorkspace(clone.root / "runs/words")
    with words.stages_run() as stages:
        clone.check("mergeline", "run", "--params", FILE)
    assert {
        f"{step}@{merge}" for step in ("fit", "search", "merge", "evaluate") for merge in PARAMS["merges"]
    } < stages
    return words


def read(ran: SmallWorkspace, name: str) -> Any:
    return json.loads((ran.root / name).read_text())


def test_dvc_finds_it_up_to_date_and_a_second_run_runs_nothing(clone, ran):
    before = ran.outputs(), ran.lock()
    for command in ("repro", "status"):
        assert "up to date" in clone.check("dvc", command, "runs/words/dvc.yaml")
    with ran.stages_run() as stages:
        assert "\n0 of " in clone.check("mergeline", "run", "--params", FILE)
    assert not stages and (ran.outputs(), ran.lock()) == before


def test_the_leaderboard_measures_each_merge_by_its_own_experts(ran):
    rows = {row["name"]: row for row in read(ran, "build/leaderboard/leaderboard.json")["rows"]}
    assert rows["pair"]["experts"] == ["three", "one"] and "experts" not in rows["task_arithmetic"]
    for name, experts in (("pair", ["three", "one"]), ("task_arithmetic", [*SKILLS])):
        base, own, found = (
            {t: s["accuracy"] for t, s in rows[n]["tasks"].items()} for n in ("base", "experts", name)
        )
        kept = [(found[task] - base[task]) / (own[task] - base[task]) for task in experts]
        assert rows[name]["gain_kept"] == pytest.approx(sum(kept) / len(kept)) and sum(kept) > 0
        assert rows[name]["held_in"] == pytest.approx(sum(found[task] for task in experts) / len(experts))
        assert rows[name].get("held_out") == (found["two"] if name == "pair" else None)
        assert all(rows[name]["checks"].values())
        assert rows[name]["perplexity"]["prose"]["value"] > 0


def test_manifest_card_and_verify_know_the_merges_own_experts(clone, ran):
    assert list(read(ran, "build/merges/pair/manifest.json")["recipe"]["experts"]) == ["three", "one"]
    card = (ran.root / "build/merges/pair/README.md").read_text()
    assert "| three | expert |" in card and "| two |" not in card
    assert "bit-identical" in clone.check("mergeline", "verify", "runs/words/build/merges/pair")


def test_mlflow_has_the_inputs_of_each_merge_and_the_registry_a_champion(ran):
    client = MlflowClient(f"sqlite:///{ran.root / '.mergeline/mlflow.db'}")
    [experiment] = client.search_experiments(filter_string="name = 'words'")
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    for name, experts in (("pair", {"one", "three"}), ("task_arithmetic", {*SKILLS})):
        inputs = {(tag.value, i.dataset.name) for i in runs[name].inputs.dataset_inputs for tag in i.tags}
        assert {dataset for kind, dataset in inputs if kind == "expert"} == experts
        tags = {tag.rpartition(".")[2] for tag in runs[name].data.tags if tag.startswith("lineage.expert.")}
        assert tags == experts
    verdict = read(ran, ".mergeline/verdict.json")
    gates = {"reload", "finite", "works", "largest_norm_ratio", "minimum_mean", "largest_perplexity_ratio"}
    assert verdict["passed"] and {finding["gate"] for finding in verdict["findings"]} == gates
    version = client.get_model_version_by_alias("words", "champion")
    assert version.tags["merge.name"] == verdict["candidate"]


def test_the_report_has_its_section_of_language_models(ran):
    report = (ran.root / "build/report.html").read_text()
    assert '<section id="language">' in report and "of three, one" in report
    for words in ("Gain kept", "Perplexity", "passed every gate"):
        assert words in report
