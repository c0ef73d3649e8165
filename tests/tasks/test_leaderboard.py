"""A sweep of a params.yaml: stages in their order, only those that are stale; and the table of its merges."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from places import SAMPLES
from ruamel.yaml import YAML

from mergeline.merging.errors import UserError
from mergeline.merging.files import write_bytes
from mergeline.tasks import sweep as sweeps
from mergeline.tasks import workspace as workspaces
from mergeline.tasks.modalities import modality_of
from mergeline.tasks.workspace import Workspace


@pytest.fixture
def fake(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Steps that write their names where their outputs go, in threads; the list grows by each stage that runs."""
    ran: list[str] = []

    def step(params: Any, stage: Any) -> None:
        for dep in stage.deps:
            assert Path(dep).exists(), f"{stage.name} came before {dep}"
        ran.append(stage.name)
        for out in stage.outs:
            write_bytes(Path(out), stage.name.encode())

    monkeypatch.chdir(workspace)
    real = workspaces.steps
    monkeypatch.setattr(workspaces, "steps", lambda modality: [s._replace(run=step) for s in real(modality)])
    monkeypatch.setattr(
        sweeps, "ProcessPoolExecutor", lambda workers, mp_context: ThreadPoolExecutor(workers)
    )
    return ran


def sweep(root: Path) -> list[str]:
    return sweeps.run_stages(Workspace(root / "params.yaml"), 2)


def edit(root: Path, change: Any) -> None:
    file = root / "params.yaml"
    params = YAML(typ="safe").load(file)
    change(params)
    YAML().dump(params, file)


def test_stages_run_once_after_what_they_need(workspace, fake):
    everything = [stage.name for stage in Workspace(workspace / "params.yaml").stages]
    assert sorted(sweep(workspace)) == sorted(fake) == sorted(everything)
    assert fake[-1] == "compare"
    assert sweep(workspace) == [] and len(fake) == len(everything)


def test_what_changed_runs_again_and_nothing_else(workspace, fake):
    sweep(workspace)
    edit(workspace, lambda params: params["merges"]["cart"]["search"].update(rank=[0.2]))
    assert sweep(workspace) == [
        "fit@cart",
        "search@cart",
        "merge@cart",
        "compare",
    ]  # the fake merge is the same as before
    (workspace / "build" / "evaluations" / "average").unlink()
    assert sweep(workspace) == ["evaluate@average"]
    (workspace / "build" / "merges" / "cart").write_text("another merge")
    assert sweep(workspace) == ["merge@cart"]


def test_a_stage_that_fails_leaves_the_others_done(workspace, fake, monkeypatch):
    steps = workspaces.steps

    def refuse(params: Any, stage: Any) -> None:
        if stage.name == "search@cart":
            raise UserError("cart: no")
        next(step for step in steps(modality_of(params)) if step.name == stage.step).run(params, stage)

    with monkeypatch.context() as patch, pytest.raises(UserError, match="cart: no"):
        patch.setattr(workspaces, "steps", lambda modality: [s._replace(run=refuse) for s in steps(modality)])
        sweep(workspace)
    before = list(fake)
    sweep(workspace)
    assert {"search@cart", "merge@cart", "compare"} <= set(fake[len(before) :])
    assert not {name for name in fake[len(before) :] if name.startswith(("checkpoint", "data", "heads"))}


def test_the_table_ranks_by_test_and_names_the_choice_of_validation(workspace):
    def row(name: str, kind: str, mean: float, val: float, **more: Any) -> dict[str, Any]:
        interval = {"lower": mean - 0.01, "upper": mean + 0.01, "normalised": mean / 0.9, "worst_task": 0.1}
        return {"name": name, "kind": kind, "mean": mean, "val_mean": val, **interval, **more}

    found = {"rank": 0.1, "scale": 2.0}
    rows = [
        row("base", "base", 0.4, 0.4),
        row("average", "merge", 0.7, 0.6, method="average", params={}, searched=0),
        row("cart", "merge", 0.65, 0.66, method="cart", params=found, searched=4),
    ]
    board = {
        "pipeline": "small",
        "modality": "clip",
        "measure": "accuracy",
        "tasks": ["digits", "shapes"],
        "candidate": "cart",
        "rows": rows,
    }
    write_bytes(workspace / "build" / "leaderboard" / "leaderboard.json", json.dumps(board).encode())
    sweeps.write_table(Workspace(workspace / "params.yaml"), workspace / "table.md")
    sweeps.refuse_table(Workspace(workspace / "params.yaml"), workspace / "table.md", False)
    lines = (workspace / "table.md").read_text().splitlines()
    assert [line.split(" | ")[0] for line in lines if " to " in line] == ["| average", "| **cart**", "| base"]
    assert (
        "| **cart** | cart | 0.650 | 0.640 to 0.660 | 0.722 | 0.100 | 0.660 | rank 0.1, scale 2.0 | 4 |"
        in lines
    )
    assert any("among 5 points. Best on validation: cart." in line for line in lines)
    # Of two merges it is no table of all methods.
    assert "| not here | why |" not in lines
    _, _, *left_out = sweeps._left_out(Workspace(workspace / "params.yaml").params)
    reasons = dict(line[2:-2].split(" | ") for line in left_out)
    assert reasons["slerp"] == "slerp merges at most 2 expert(s), got 3"
    assert reasons["regmean"].startswith("regmean needs the statistics 'gram'")
    assert "gives back one" in reasons["emr"] and not {"cart", "average"} & reasons.keys()


def test_the_table_says_what_merges_have_seen_and_sets_those_apart_that_are_told_the_task(workspace):
    def row(name: str, mean: float, **more: Any) -> dict[str, Any]:
        found = {
            "kind": "merge",
            "method": name,
            "params": {},
            "searched": 0,
            "val_mean": mean,
            "worst_task": 0.1,
        }
        return {"name": name, "mean": mean, "lower": mean, "upper": mean, "normalised": mean, **found, **more}

    unlabelled = {"seen": {"data": "unlabelled", "words": "16 unlabelled a task of fit"}}
    rows = [
        row("cart", 0.7, seen={"data": "none", "words": "none"}),
        row("drawn", 0.6, seen={"data": "none", "words": "no data; procedural images"}),
        row("fitted", 0.8, **unlabelled),
        row("linear_adapter", 0.9, at_use={"task": "known"}, **unlabelled),
    ]
    board = {"pipeline": "small", "modality": "clip", "measure": "accuracy", "tasks": ["digits"], "candidate": "fitted",
             "rows": rows}  # fmt: skip
    write_bytes(workspace / "build" / "leaderboard" / "leaderboard.json", json.dumps(board).encode())
    sweeps.write_table(Workspace(workspace / "params.yaml"), workspace / "table.md")
    sweeps.refuse_table(Workspace(workspace / "params.yaml"), workspace / "table.md", False)
    lines = (workspace / "table.md").read_text().splitlines()
    assert [(line.split(" | ")[0], line.split(" | ")[-1]) for line in lines if "00 to " in line] == [
        ("| **fitted**", "16 unlabelled a task of fit |"),
        ("| cart", "none |"),
        ("| drawn", "no data; procedural images |"),
        ("| linear_adapter", "16 unlabelled a task of fit |"),
    ]
    apart = lines.index(
        next(line for line in lines if line.startswith("Where the task of an example is known"))
    )
    assert [line.endswith("| seen |") for line in lines if line.startswith("| merge |")] == [True, True]
    assert lines.index(next(line for line in lines if "| linear_adapter |" in line)) > apart


@pytest.mark.parametrize("name", ["params.yaml", "dvc.yaml", "notes.md", "suite"])
@pytest.mark.parametrize("force", [False, True])
def test_a_table_replaces_tables_alone(name, force, workspace, mergeline, monkeypatch):
    """Before anything runs; what the pipeline reads is not even replaced by force."""
    monkeypatch.setattr(sweeps, "run_stages", None)
    (workspace / "notes.md").write_text("| mine |")
    file = SAMPLES / "suite.yaml" if name == "suite" else workspace / name
    before = file.read_bytes()
    given = ["sweep", "--params", workspace / "params.yaml", "--out", file, *(["--force"] if force else [])]
    if force and name == "notes.md":
        sweeps.refuse_table(Workspace(workspace / "params.yaml"), file, force)
        return
    outcome = mergeline(*given)
    assert outcome.code == 2 and str(file) in outcome.err
    assert "no table of Mergeline's" in outcome.err if name == "notes.md" else "the input" in outcome.err
    assert file.read_bytes() == before


def test_recipe_options_beside_params_are_refused(workspace, mergeline):
    outcome = mergeline(
        "sweep", "--params", workspace / "params.yaml", "--method", "cart", "--out", workspace / "table.md"
    )
    assert outcome.code == 2 and "--params says what is merged" in outcome.err


@pytest.mark.slow
def test_the_command_makes_the_same_table_again(workspace, mergeline):
    options = ("sweep", "--params", workspace / "params.yaml", "--workers", 2, "--out")
    for name in ("first.md", "second.md"):
        assert mergeline(*options, workspace / name).code == 0
    first = (workspace / "first.md").read_text()
    assert first == (workspace / "second.md").read_text() and "| cart |" in first
    for name in ("search", "merges", "evaluations"):
        assert (workspace / "build" / name).exists()


def test_the_leaderboard_of_the_samples_names_every_method_that_needs_no_data():
    """Each is a merge, or has a reason not to be."""
    table = "\n".join(sweeps._left_out(Workspace(SAMPLES / "leaderboard" / "params.yaml").params))
    assert "not among the merges" not in table
