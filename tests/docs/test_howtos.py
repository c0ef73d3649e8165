"""Pages to learn from: their commands and programs run as they stand, on tiny models under the names that they use."""

from __future__ import annotations

import json
import shlex
from itertools import combinations
from pathlib import Path
from typing import Any

import classifier_workspace
import pytest
import torch
from page_blocks import Block, blocks, run_block
from places import REPOSITORY
from prefect_server import wait_for
from safetensors.torch import load_file
from small_language_model import save_experts, save_model, skill
from small_workspace import TIME_LIMIT, SmallWorkspace

pytestmark = pytest.mark.slow

CLASSIFIERS = dict(zip(("sentiment", "topics", "spam"), classifier_workspace.CLASSES))


class Reader(SmallWorkspace):
    """Someone with an empty folder, who types what a page says; the code is that of this repository."""

    def environment(self, **more: str) -> dict[str, str]:
        return super().environment(PYTHONPATH=str(REPOSITORY), **more)

    def run_block(self, block: Block) -> str:
        return run_block(block, self.root, self.environment())


@pytest.fixture
def reader(tmp_path: Path) -> Reader:
    (tmp_path / "mine").mkdir()
    return Reader(tmp_path / "mine")


def save_classifiers(root: Path) -> None:
    """A base, an expert of each task of the pages, and its tables."""
    classifier_workspace.save_texts(root / "data")
    classifier_workspace.bert(root / "checkpoints/base", None, 0)
    for seed, (name, task) in enumerate(CLASSIFIERS.items(), 1):
        (root / "data" / task).rename(root / "data" / name)
        classifier_workspace.bert(root / "checkpoints" / name, classifier_workspace.CLASSES[task], seed)


def shorten(params: dict[str, Any]) -> None:
    """Two merges are enough to see a pipeline run."""
    params["merges"] = {name: params["merges"][name] for name in ("average", "task_arithmetic")}


def test_two_language_models_are_merged(reader):
    """Also as README shows it first."""
    base = save_model(reader.root / "models/base", 0)
    save_experts(reader.root / "models", base, {"maths": skill(0), "stories": skill(20)})
    for block in [*blocks("README.md", "sh"), *blocks("docs/language.md")]:
        reader.run_block(block)
    merges = ("merged", "between", "from-mergekit", "with-adapter", "sweep/scale-0.5", "sweep/scale-1.0")
    whole = [load_file(reader.root / name / "model.safetensors") for name in ("models/base", *merges)]
    name = "model.layers.0.mlp.up_proj.weight"
    assert all(not torch.equal(a[name], b[name]) for a, b in combinations(whole, 2))
    assert json.loads((reader.root / "from-mergekit/config.json").read_text())["dtype"] == "bfloat16"
    assert (reader.root / "maths-lora/adapter_model.safetensors").is_file()


def test_methods_are_compared_on_a_family(reader):
    save_classifiers(reader.root)
    for block in blocks("docs/compare-methods.md"):
        reader.run_block(block)
    table = (reader.root / "leaderboard.md").read_text()
    rows = [line.split(" | ") for line in table.splitlines() if line.startswith("| ")]
    assert {row[0].strip("|* ") for row in rows} >= {"base", "experts", "cart", "wudi", "least_squares"}
    assert (reader.root / "family.html").is_file() and (reader.root / "build/report.html").is_file()


def test_the_library_does_what_its_page_says(reader):
    program = Block("python", "\n".join(block.text for block in blocks("docs/library.md", "python")))
    assert "average" in reader.run_block(program)
    assert (reader.root / "merged-with-data/manifest.json").is_file()


def test_a_pipeline_is_served_until_it_is_stopped(reader):
    save_classifiers(reader.root)
    for block in blocks("docs/compare-methods.md", "yaml"):
        reader.run_block(block)
    reader.edit(shorten)
    prepare, serve, notify, status = blocks("docs/serving.md")
    assert "would run" in reader.run_block(prepare)
    with reader.start(*shlex.split(serve.text)) as server:
        line = server.stdout.readline()
        assert line.startswith("serving 'mine' by cron '0 3 * * *'"), line
        reader.run_block(notify)
        reader.run_block(status)
        wait_for((reader.root / ".mergeline/verdict.json").is_file, TIME_LIMIT)  # the run is about to end
        wait_for(lambda: "completed" in reader.run_block(status), TIME_LIMIT)
    assert server.returncode == 130
    assert (reader.root / "build/report.html").is_file()
