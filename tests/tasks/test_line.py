"""The line between two models, measured on the tasks of a pipeline."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from checkpoints import refused
from hypothesis import given
from hypothesis import strategies as st
from test_new_modality import PARAMS, Toy
from toy_workspace import TASKS, run_all, save_weights

from mergeline.flows.cli import main
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


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(modalities, "_KNOWN", modalities.modalities())
    modalities.register(Toy())
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
