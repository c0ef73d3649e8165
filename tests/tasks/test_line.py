"""The line between two models, measured on the tasks of a pipeline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import refused
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_new_modality import PARAMS, Toy
from torch import nn
from toy_workspace import TASKS, run_all, save_weights

from mergeline.flows.cli import main
from mergeline.merging.learning.network import Examples, Network
from mergeline.tasks import modalities
from mergeline.tasks.line import barrier


@given(st.lists(st.floats(-1, 1), min_size=3, max_size=12))
def test_a_barrier_is_never_negative_and_0_on_a_straight_line(means):
    shares = [i / (len(means) - 1) for i in range(len(means))]
    assert barrier(shares, means) >= 0
    straight = [means[0] + share * (means[-1] - means[0]) for share in shares]
    assert barrier(shares, straight) == pytest.approx(0, abs=1e-12)
    lower = [straight[0], *(mean - 0.5 for mean in straight[1:-1]), straight[-1]]
    assert barrier(shares, lower) == pytest.approx(0.5)


class Running(Toy):
    """A toy that runs small networks on points."""

    @property
    def network(self) -> Any:
        return lambda params, build, like: Network(chain(0), lambda module, batch: module(batch["points"]))

    @property
    def examples(self) -> Any:
        points = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))

        def examples(params: Any, build: Path, split: str = "fit") -> Examples:
            batches = {task: lambda: [{"points": points[:30]}, {"points": points[30:]}] for task in TASKS}
            digests = dict.fromkeys(TASKS, "sha256:0")
            return Examples(batches, dict.fromkeys(TASKS, 40), params.owners, digests, split)

        return examples


def chain(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)).requires_grad_(False).eval()


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(modalities, "_KNOWN", modalities.modalities())
    modalities.register(Running())
    monkeypatch.chdir(tmp_path)
    save_weights(tmp_path)
    (tmp_path / "params.yaml").write_text(
        json.dumps({**PARAMS, "gates": {}, "merges": {"average": {"method": "average"}}})
    )
    run_all(tmp_path)
    return tmp_path


def test_the_ends_of_a_line_are_the_models_and_the_page_says_so(root, capsys):
    ends = [f"build/checkpoints/{name}" for name in TASKS]
    capsys.readouterr()
    assert main(["line", *ends, f"again={ends[1]}", "--points", "5", "--json", "--html", "line.html"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["shares"] == [0, 0.25, 0.5, 0.75, 1] and list(found["lines"]) == [TASKS[1], "again"]
    one = found["lines"][TASKS[1]]
    assert one["points"][0][TASKS[0]] > one["points"][-1][TASKS[0]]
    assert one["points"][0][TASKS[1]] < one["points"][-1][TASKS[1]]
    assert one["barrier"] == barrier(found["shares"], one["means"]) and one["distance"] > 0
    assert one == found["lines"]["again"]
    page = Path("line.html").read_text()
    assert page.count("<polyline") == 2 * (1 + len(TASKS)) and "Barrier" in page
    assert main(["line", *ends, "--points", "3"]) == 0
    assert "barrier" in capsys.readouterr().out


def test_a_plane_has_its_models_at_their_distances_and_the_weights_of_each_point(root, capsys):
    weights = {name: load_file(f"in/{name}.safetensors")["w"] for name in ("base", "left", "right")}
    weights["aside"] = weights["right"] + torch.tensor([0.3, 0.0, 0.3, 0.1])
    save_file({"w": weights["aside"]}, "in/aside.safetensors")
    names = ["base", "left", "aside"]
    capsys.readouterr()
    asked = ["line", *(f"in/{name}.safetensors" for name in names), "--plane", "--points", "4"]
    assert main([*asked, "--json", "--html", "plane.html"]) == 0
    found = json.loads(capsys.readouterr().out)
    states = [weights[name].double() for name in names]
    corners = torch.tensor(list(found["corners"].values()), dtype=torch.float64)
    for i in range(3):
        for j in range(3):
            distance = float((states[i] - states[j]).norm())
            assert float((corners[i] - corners[j]).norm()) == pytest.approx(distance, rel=1e-6, abs=1e-9)
    for k, y in enumerate(found["ys"]):
        for i, x in enumerate(found["xs"]):
            own = torch.tensor(found["weights"][k][i], dtype=torch.float64)
            assert float(own.sum()) == pytest.approx(1) and (own @ corners).tolist() == pytest.approx(
                [x, y], abs=1e-9
            )
            assert found["means"][k][i] == pytest.approx(sum(found["points"][k][i].values()) / len(TASKS))
    k, i = found["best"]
    assert found["means"][k][i] == max(map(max, found["means"]))
    page = Path("plane.html").read_text()
    assert page.count("<rect") == 16 * (1 + len(TASKS)) and page.count("<circle") == 3 * (1 + len(TASKS))
    assert main(asked) == 0
    assert "the best has" in capsys.readouterr().out


def test_what_spans_no_plane_is_refused_in_one_line(root, capsys):
    base, left, right = (f"build/checkpoints/{name}" for name in ("base", *TASKS))
    for models, said in (
        ([base, left], "three models"),
        ([base, left, f"again={left}"], "lie on one line"),
        ([base, base, f"b={left}"], "lie on one line"),
    ):
        capsys.readouterr()
        assert main(["line", *models, "--plane"]) == 2
        assert said in capsys.readouterr().err


def test_activations_of_a_pipelines_examples_align_a_model(root, capsys):
    state = chain(1).state_dict()
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    moved = {**state, "0.weight": state["0.weight"][order], "0.bias": state["0.bias"][order]}
    moved["2.weight"] = state["2.weight"][:, order].contiguous()
    save_file(state, root / "a.safetensors")
    save_file(moved, root / "b.safetensors")
    assert main(["collect-activations", "a.safetensors", "b.safetensors", "--out", "seen.safetensors"]) == 0
    aligned = [
        "align",
        "a.safetensors",
        "b.safetensors",
        "--statistics",
        "seen.safetensors",
        "--out",
        "c.safetensors",
    ]
    assert main(aligned) == 0
    told = capsys.readouterr()
    assert "hidden: 5 of 6 units moved" in told.out and "going on" not in told.err
    found = load_file(root / "c.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())
    assert main(["collect-activations", "a.safetensors", "b.safetensors", "--out", "a.safetensors"]) == 2


def test_what_is_no_line_is_refused(root, capsys):
    ends = [f"build/checkpoints/{name}" for name in TASKS]
    assert main(["line", *ends, "--points", "2"]) == 2
    assert "3 or more" in capsys.readouterr().err
    Path("notes.html").write_text("mine")
    assert main(["line", *ends, "--html", "notes.html"]) == 2
    assert Path("notes.html").read_text() == "mine"
    with refused("--points"):
        from mergeline.flows.cli.grammar import parse

        parse(["line", *ends, "--points", "none"])
