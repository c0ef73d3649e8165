"""`mergeline layer-errors`: of a merge of a pipeline's experts, as text, JSON and a page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from html_pages import LOADS, Page
from test_new_modality import PARAMS, Toy
from torch import Tensor, nn
from toy_workspace import TASKS, WIDTH, run_all, save_weights

from mergeline.flows.cli import main
from mergeline.merging.learning.network import Examples, Network
from mergeline.tasks import modalities


class Scaled(nn.Module):
    """The toy's one weight, by which points are multiplied."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.w


class Running(Toy):
    """A toy that is run on points."""

    @property
    def network(self) -> Any:
        return lambda params, build, like: Network(
            Scaled().eval(), lambda module, batch: module(batch["points"])
        )

    @property
    def examples(self) -> Any:
        points = torch.randn(40, WIDTH, generator=torch.Generator().manual_seed(0))

        def examples(params: Any, build: Path, split: str = "fit") -> Examples:
            batches = {task: lambda: [{"points": points[:30]}, {"points": points[30:]}] for task in TASKS}
            digests = dict.fromkeys(TASKS, "sha256:0")
            return Examples(batches, dict.fromkeys(TASKS, 40), params.owners, digests, split)

        return examples


def workspace(root: Path, monkeypatch: pytest.MonkeyPatch, modality: Toy) -> None:
    monkeypatch.setattr(modalities, "_KNOWN", modalities.modalities())
    modalities.register(modality)
    monkeypatch.chdir(root)
    save_weights(root)
    merges = {"average": {"method": "average"}}
    (root / "params.yaml").write_text(json.dumps({**PARAMS, "gates": {}, "merges": merges}))
    run_all(root)


def test_a_merge_is_held_against_the_experts_of_a_pipeline(tmp_path, monkeypatch, capsys):
    workspace(tmp_path, monkeypatch, Running())
    capsys.readouterr()
    assert main(["layer-errors", "build/checkpoints/left", "--json", "--html", "errors.html"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["tasks"]["left"]["merge"] == [0.0] and found["tasks"]["right"]["merge"][0] > 0
    assert found["tasks"]["left"]["base"][0] > 0 and found["advice"] == []
    page = Page(Path("errors.html").read_text())
    assert "Errors by layer" in page.text and "What to do" in page.text
    assert all(v.startswith("#") for _, attrs in page.tags for key, v in attrs.items() if key in LOADS)
    assert main(["layer-errors", "build/checkpoints/left", "--examples", "5"]) == 0
    told = capsys.readouterr()
    assert "right, beside expert 'right'" in told.out and "going on" not in told.err


def test_what_cannot_be_measured_is_refused(tmp_path, monkeypatch, capsys):
    workspace(tmp_path, monkeypatch, Toy())
    assert main(["layer-errors", "build/checkpoints/left"]) == 2
    assert "are not run on examples" in capsys.readouterr().err


def test_ensembles_of_what_has_no_classes_are_refused(tmp_path, monkeypatch, capsys):
    workspace(tmp_path, monkeypatch, Running())
    assert main(["layer-errors", "build/checkpoints/left", "--ensembles"]) == 2
    assert "predict no classes" in capsys.readouterr().err


def test_a_page_replaces_no_file_of_somebodys(tmp_path, monkeypatch, capsys):
    workspace(tmp_path, monkeypatch, Running())
    Path("notes.html").write_text("mine")
    assert main(["layer-errors", "build/checkpoints/left", "--html", "notes.html"]) == 2
    assert "notes.html" in capsys.readouterr().err and Path("notes.html").read_text() == "mine"
