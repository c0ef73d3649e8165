"""A sweep of a params.yaml: stages in their order, only those that are stale; and the table of its merges."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from merging.errors import UserError
from merging.files import write_bytes
from tasks import sweep as sweeps
from tasks import workspace as workspaces
from tasks.workspace import Workspace

SAMPLES = Path(__file__).parent.parent / "samples"


@pytest.fixture
def fake(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Steps that write their names where their outputs go, in threads; the list grows by each stage that runs."""
    ran: list[str] = []

    def step(ws: Workspace, stage: Any) -> None:
        for dep in stage.deps:
            assert ws.path(dep).exists(), f"{stage.name} came before {dep}"
        ran.append(stage.name)
        write_bytes(ws.path(stage.out), stage.name.encode())

    monkeypatch.chdir(workspace)
    monkeypatch.setattr(workspaces, "STEPS", dict.fromkeys(workspaces.STEPS, step))
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
        "search@cart",
        "merge@cart",
        "compare",
    ]  # the fake merge is the same as before
    (workspace / "build" / "evaluations" / "average").unlink()
    assert sweep(workspace) == ["evaluate@average"]
    (workspace / "build" / "merges" / "cart").write_text("another merge")
    assert sweep(workspace) == ["merge@cart"]


def test_a_stage_that_fails_leaves_the_others_done(workspace, fake, monkeypatch):
    step = workspaces.STEPS["search"]

    def refuse(ws: Workspace, stage: Any) -> None:
        if stage.item == "cart":
            raise UserError("cart: no")
        step(ws, stage)

    monkeypatch.setitem(workspaces.STEPS, "search", refuse)
    with pytest.raises(UserError, match="cart: no"):
        sweep(workspace)
    before = list(fake)
    monkeypatch.setitem(workspaces.STEPS, "search", step)
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
    board = {"pipeline": "small", "tasks": ["digits", "shapes"], "candidate": "cart", "rows": rows}
    write_bytes(workspace / "build" / "leaderboard" / "leaderboard.json", json.dumps(board).encode())
    sweeps.write_table(Workspace(workspace / "params.yaml"), workspace / "table.md")
    lines = (workspace / "table.md").read_text().splitlines()
    assert [line.split(" | ")[0] for line in lines if " to " in line] == ["| average", "| **cart**", "| base"]
    assert (
        "| **cart** | cart | 0.650 | 0.640 to 0.660 | 0.722 | 0.100 | 0.660 | rank 0.1, scale 2.0 | 4 |"
        in lines
    )
    assert any("among 5 points. Best on validation: cart." in line for line in lines)
    reasons = dict(
        line[2:-2].split(" | ") for line in lines if line.startswith("| ") and line.count("|") == 3
    )
    assert reasons["slerp"] == "slerp merges at most 2 expert(s), got 3"
    assert reasons["regmean"].startswith("regmean needs the statistics 'gram'")
    assert "gives back one" in reasons["emr"] and not {"cart", "average"} & reasons.keys()


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
