"""Models of sentence-transformers through the whole pipeline: pairs, queries, searches, fits, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import refused
from ruamel.yaml import YAML
from safetensors.numpy import load_file
from small_embeddings import EXPERTS, TASKS, save_embedding_family, write_tables
from toy_workspace import run_all

from mergeline.evaluation.embeddings.models import load_model
from mergeline.evaluation.embeddings.scores import answers, outcomes
from mergeline.tasks.dvc_yaml import dvc_yaml
from mergeline.tasks.modalities import modality_named
from mergeline.tasks.workspace import Workspace

pytest.importorskip("sentence_transformers")

PARAMS: dict[str, Any] = {
    "name": "texts",
    "seed": 0,
    "checkpoints": {"layout": "as_is", "files": {n: f"in/{n}" for n in ("base", *EXPERTS)}, "uris": {}},
    "base": "base",
    "experts": [*EXPERTS],
    "embeddings": {
        "data": {"files": {task: f"tables/{task}" for task in TASKS}, "uris": {}},
        "tasks": TASKS,
        "suites": {"near": ["near"], "find": ["find"]},
        "prompts": {"find": {"query": "w1 ", "document": "w2 "}},
        "batch_size": 8,
    },
    "merges": {
        "average": {"method": "average"},
        "sum": {"method": "task_arithmetic", "search": {"scale": [0.5, 1.0]}},
    },
    "gates": {"minimum_mean": 0.0, "minimum_gain": -1.0, "largest_drop": 1.0},
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("family")
    save_embedding_family(root / "in")
    write_tables(root / "tables")
    return root


@pytest.fixture
def root(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A workspace in which nothing has run, as the current folder."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    for name in ("in", "tables"):
        (tmp_path / name).symlink_to(made / name)
    write(tmp_path)
    return tmp_path


def write(root: Path, **changes: Any) -> None:
    YAML().dump({**PARAMS, **changes}, root / "params.yaml")


def with_embeddings(**changes: Any) -> dict[str, Any]:
    return {"embeddings": {**PARAMS["embeddings"], **changes}}


@pytest.mark.usefixtures("anywhere")
def test_the_whole_pipeline_measures_models_as_by_hand(root):
    workspace = run_all(root)
    board = json.loads((root / "build/leaderboard/leaderboard.json").read_text())
    rows = {row["name"]: row for row in board["rows"]}
    assert (board["modality"], board["measure"]) == ("embeddings", "score")
    settings = workspace.params.embeddings
    for name, folder in (("base", "in/base"), ("average", "build/merges/average")):
        for task, kind in settings.tasks.items():
            prompts = settings.prompts.get(task, {})
            found = answers(
                load_model(Path(folder)),
                root / "build/data" / task,
                kind,
                ("test",),
                prompts,
                8,
                lambda n: None,
            )
            wanted = outcomes(found["test"]).mean()
            assert rows[name]["tasks"][task]["accuracy"] == pytest.approx(wanted, abs=1e-5), (name, task)
    search = json.loads((root / "build/search/sum.json").read_text())
    assert search["chosen"] == max(search["points"], key=lambda point: point["mean"])["params"]
    # A point in memory scores as the folder that is written.
    chosen = next(point for point in search["points"] if point["params"] == search["chosen"])
    written = json.loads((root / "build/evaluations/sum/scores.json").read_text())
    for task, mean in chosen["tasks"].items():
        assert mean == pytest.approx(written["splits"]["val"][task]["mean"], abs=1e-5)


@pytest.mark.usefixtures("anywhere")
def test_statistics_and_fits_run_on_texts(root):
    merges = {
        "regmean": {"method": "regmean"},
        "positioned": {
            "method": "self_positioning",
            "params": {"objective": "cosine", "iterations": 4, "batch": 4},
        },
        "distilled": {"method": "distill", "params": {"iterations": 2, "batch": 4, "shifts": 0}},
    }
    write(root, experts=["near", "find"], statistics={"gram": {"examples": 8}}, merges=merges)
    workspace = run_all(root)
    board = json.loads((root / "build/leaderboard/leaderboard.json").read_text())
    assert {row["name"] for row in board["rows"]} >= set(merges)
    base = load_file(root / "in/base/model.safetensors")
    for name in merges:
        merged = load_file(root / f"build/merges/{name}/model.safetensors")
        assert any(np.abs(merged[key] - base[key]).max() > 1e-4 for key in base), name
    modality = modality_named("embeddings")
    found = modality.examples(workspace.params, root / "build")
    assert not found.labelled and found.split == "half of val"  # near has no fit of its own
    assert found.counts == {"near": 24, "find": 24} and modality.choosing(root / "build", "find") == slice(
        None
    )


def test_features_are_the_embeddings_of_the_texts(root):
    workspace, modality = Workspace(root / "params.yaml"), modality_named("embeddings")
    for stage in workspace.stages:
        if stage.step in ("fetch", "data"):
            workspace.run(stage)
    network = modality.network(workspace.params, root / "build", root / "in/near")
    batch = next(iter(modality.examples(workspace.params, root / "build").batches["near"]()))
    rows = [json.loads(line) for line in (root / "tables/near/val.jsonl").read_text().splitlines()]
    texts = [text for row in rows[::2] for text in (row["sentence1"], row["sentence2"])]
    wanted = load_model(root / "in/near").model.encode(texts[:16])
    assert np.allclose(network.features(batch).numpy(), wanted, atol=1e-6)


def test_where_all_tasks_are_of_one_kind_the_measure_has_its_name(root):
    modality = modality_named("embeddings")
    for task, name in (("near", "Spearman correlation"), ("find", "nDCG@10")):
        files = {"files": {task: f"tables/{task}"}, "uris": {}}
        write(root, **with_embeddings(data=files, tasks={task: TASKS[task]}, suites={}, prompts={}))
        params = Workspace(root / "params.yaml").params
        assert modality.measures(params)[task].name == name
        assert params.owners == {task: task}


def test_models_are_measured_again_where_a_table_or_setting_changes(root):
    found = {stage.name: stage for stage in Workspace(root / "params.yaml").stages}
    assert "tables/near" in found["data-file@near"].deps
    assert "embeddings.tasks.near" in found["data-file@near"].params
    for name in ("baselines", "search@sum", "evaluate@sum"):
        assert "build/data" in found[name].deps and "embeddings" in found[name].params
    assert "build/data" not in found["merge@sum"].deps
    assert "foreach: ${embeddings.data.files}" in dvc_yaml(modality_named("embeddings"), ".")


def test_a_base_of_another_kind_is_refused_before_anything_is_merged(root, mergeline):
    write(root, checkpoints={"layout": "as_is", "files": {**PARAMS["checkpoints"]["files"], "base": "in/base-plain"},
                             "uris": {}})  # fmt: skip
    with refused("base: has no modules.json, so it is no model of sentence-transformers"):
        run_all(root)
    assert not (root / "build/merges").exists()


@pytest.mark.parametrize(
    ("changes", "wrong"),
    [
        ({"data": {"files": {"near": "tables/near"}, "uris": {}}}, "'find' has no table"),
        ({"tasks": {"near": TASKS["near"]}, "suites": {}, "prompts": {}}, "'find' is no task"),
        ({"tasks": {**TASKS, "find": {"kind": "ranking"}}}, "embeddings.tasks.find"),
        ({"tasks": {**TASKS, "find": {"kind": "retrieval", "first": "x"}}}, "embeddings.tasks.find"),
        ({"suites": {"near": ["nearly"]}}, "'nearly' is not among the tasks; did you mean 'near'?"),
        ({"prompts": {"near": {"query": "w1"}}}, "texts of 'near' are first and second, not 'query'"),
        ({"prompts": {"nearly": {"first": "w1"}}}, "'nearly' is not among the tasks"),
        ({"batch_size": 0}, "embeddings.batch_size"),
    ],
)
def test_mistakes_in_params_yaml_are_blamed(root, changes, wrong):
    write(root, **with_embeddings(**changes))
    with refused("params.yaml:", wrong):
        Workspace(root / "params.yaml").params  # noqa: B018


def test_the_example_is_a_pipeline_of_the_modality(root):
    from places import REPOSITORY

    from mergeline.tasks.params import load_params

    params = load_params(REPOSITORY / "examples/embeddings.yaml")
    assert modality_named("embeddings").schema() is type(params)
    assert params.owners == {"statutes": "legal", "abstracts": "medical", "sts": "similar"}
