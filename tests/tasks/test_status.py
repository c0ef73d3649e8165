"""What a run would do with every stage, and why; and which stages a name stands for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from threading import Timer
from typing import Any, Callable

import pytest
from checkpoints import refused
from pretended_runs import pretend_all_ran, pretend_locked, pretend_ran
from ruamel.yaml import YAML

from mergeline.tasks import versioning
from mergeline.tasks.records import last_pipeline_run, noted_run
from mergeline.tasks.status import State, chosen_stages, refuse_missing, select, states
from mergeline.tasks.workspace import Workspace


def edit(root: Path, change: Callable[[dict[str, Any]], Any]) -> Workspace:
    file = root / "params.yaml"
    params = YAML(typ="safe").load(file)
    change(params)
    YAML().dump(params, file)
    return Workspace(file)


def found(workspace: Workspace, *force: str) -> dict[str, State]:
    return {state.stage.name: state for state in states(workspace, workspace.stages, force)}


def busy(workspace: Workspace, *force: str) -> dict[str, tuple[str, list[str]]]:
    return {n: (s.action, s.why) for n, s in found(workspace, *force).items() if s.action != "none"}


# --------------------------------------------------------------------------------------- why


def test_in_a_new_workspace_everything_runs(workspace):
    fresh = Workspace(workspace / "params.yaml")
    assert busy(fresh) == {stage.name: ("run", ["never ran here"]) for stage in fresh.stages}


@pytest.mark.parametrize("text", ["<<<<<<< HEAD\nstages:\n=======\n", "[" * 3000, "stages: 3\n", "7\n", ""])
def test_a_lock_that_is_none_is_told_in_one_line(text, workspace, monkeypatch):
    monkeypatch.setattr(versioning, "_READ_AGAIN_AFTER", ())
    (workspace / "dvc.lock").write_text(text)
    with refused("dvc.lock: is no lock of DVC's", "bring it back from git, or remove it"):
        busy(Workspace(workspace / "params.yaml"))


def test_a_lock_that_a_run_is_writing_is_read_when_it_is_whole(workspace):
    ran = pretend_all_ran(workspace)
    pretend_locked(ran)
    shutil.rmtree(ran.state / "records")
    whole = (workspace / "dvc.lock").read_text()
    (workspace / "dvc.lock").write_text("")
    written = Timer(0.2, (workspace / "dvc.lock").write_text, [whole])
    written.start()
    assert busy(Workspace(ran.params_file)) == {}
    written.join()


@pytest.mark.parametrize("by", ["records", "dvc.lock"])
def test_what_ran_is_up_to_date(by, workspace):
    ran = pretend_all_ran(workspace)
    if by == "dvc.lock":
        pretend_locked(ran)
        shutil.rmtree(ran.state / "records")
    assert busy(Workspace(ran.params_file)) == {}


def test_a_parameter_that_changed_is_named_with_both_values_and_what_may_follow(workspace):
    pretend_all_ran(workspace)
    changed = edit(workspace, lambda params: params["merges"]["cart"]["search"].update(rank=[0.2]))
    parameter = "parameter merges.cart.search.rank: [0.1,0.5] -> [0.2]"
    assert busy(changed) == {
        "fit@cart": ("run", [parameter]),
        "search@cart": ("run", [parameter]),
        "merge@cart": ("run", [parameter]),
        "evaluate@cart": ("follow", ["after merge@cart"]),
        "compare": ("run", [parameter]),
    }


def test_a_file_that_changed_and_code_that_changed_are_named(workspace):
    ran = pretend_all_ran(workspace)
    own = workspace / "digits.safetensors"
    shutil.copy(ran.params.sources["digits"], own)
    changed = edit(workspace, lambda params: params["checkpoints"]["files"].update(digits=str(own)))
    pretend_ran(changed, next(s for s in changed.stages if s.name == "checkpoint-file@digits"))
    own.write_bytes(b"another")
    assert busy(Workspace(changed.params_file))["checkpoint-file@digits"] == (
        "run", [f"dependency {own} changed"]
    )  # fmt: skip
    assert busy(Workspace(changed.params_file))["extract"] == ("follow", ["after checkpoint-file@digits"])
    record = ran.state / "records" / "merge@average.json"
    known = json.loads(record.read_text())
    [merging] = [path for path in known["deps"] if path.endswith("/merging")]
    known["deps"][merging] = "before"
    record.write_text(json.dumps(known))
    [action, why] = busy(Workspace(changed.params_file))["merge@average"]
    assert action == "run" and f"code {merging} changed" in why


def test_outputs_that_are_lost_are_made_again_or_come_from_the_cache(workspace):
    ran = pretend_all_ran(workspace)
    (workspace / "build/merges/cart").unlink()
    why = ["output build/merges/cart is missing"]
    assert busy(Workspace(ran.params_file))["merge@cart"] == ("run", why)
    pretend_ran(ran, next(s for s in ran.stages if s.name == "merge@cart"))
    pretend_locked(ran)
    (workspace / "build/merges/cart").write_text("damaged")
    assert busy(Workspace(ran.params_file))["merge@cart"] == ("restore", ["output build/merges/cart changed"])


def test_many_stages_of_a_step_are_counted(workspace):
    ran = pretend_all_ran(workspace)
    for name in ran.params.sources:
        (workspace / "build/checkpoints" / name).unlink()
    assert busy(Workspace(ran.params_file))["extract"] == ("follow", ["after 4 of fetch"])


def test_what_is_forced_runs(workspace):
    ran = pretend_all_ran(workspace)
    assert busy(ran, "merge@cart") == {
        "merge@cart": ("run", ["forced"]),
        "evaluate@cart": ("follow", ["after merge@cart"]),
        "compare": ("follow", ["after evaluate@cart"]),
    }


# --------------------------------------------------------------------------------------- names


def names(stages: list[Any]) -> list[str]:
    return [stage.name for stage in stages]


def test_a_name_is_a_merge_a_stage_a_step_or_another_item(workspace):
    ws = Workspace(workspace / "params.yaml")
    assert names(select(ws, ["cart"])) == ["fit@cart", "search@cart", "merge@cart", "evaluate@cart"]
    assert names(select(ws, ["merge@cart", "heads"])) == ["heads", "merge@cart"]
    assert names(select(ws, ["merge-all"])) == ["merge@average", "merge@cart"]
    assert names(select(ws, ["digits"])) == ["checkpoint-file@digits", "data-file@digits"]
    with refused("params.yaml has no merge, stage or step 'crat'; did you mean 'cart'?"):
        select(ws, ["cart", "crat"])


def test_a_merge_with_the_name_of_an_expert_is_the_merge(workspace):
    changed = edit(workspace, lambda params: params["merges"].update(digits={"method": "average"}))
    assert names(select(changed, ["digits"])) == [
        "fit@digits",
        "search@digits",
        "merge@digits",
        "evaluate@digits",
    ]


def test_only_takes_along_what_it_needs(workspace):
    ws = Workspace(workspace / "params.yaml")
    chosen, forced = chosen_stages(ws, ["merge@average"], ["search@average"])
    assert "compare" not in names(chosen) and "merge@cart" not in names(chosen) and "heads" in names(chosen)
    assert names(chosen)[-2:] == ["search@average", "merge@average"] and forced == {"search@average"}
    for stage in chosen:
        assert set(names(ws.needs(stage))) <= set(names(chosen))
    assert chosen_stages(ws, [], [])[0] == ws.stages
    with refused("--force evaluate@cart: it is not among what --only runs"):
        chosen_stages(ws, ["search@cart"], ["evaluate@cart"])


def test_all_missing_files_are_named_at_once(workspace):
    def lose(params: dict[str, Any]) -> None:
        params["checkpoints"]["files"].update(base="in/base", digits="in/digits")
        params["suite"] = "suite.yaml"

    ws = edit(workspace, lose)
    with refused(
        "params.yaml: in/base (of checkpoint-file@base), in/digits (of checkpoint-file@digits), "
        "suite.yaml (of heads) are missing; check the paths"
    ):
        refuse_missing(ws, ws.stages)
    refuse_missing(ws, [stage for stage in ws.stages if stage.step == "data"])


# --------------------------------------------------------------------------------------- the last run


def test_how_the_last_run_went_is_kept(workspace):
    ws = Workspace(workspace / "params.yaml")
    assert last_pipeline_run(ws) is None
    with noted_run(ws) as ran:
        assert last_pipeline_run(ws)["outcome"].startswith("did not end")
        ran.append("heads")
    last = last_pipeline_run(ws)
    assert last["outcome"] == "completed" and last["ran"] == ["heads"] and last["seconds"] >= 0
    with pytest.raises(KeyboardInterrupt), noted_run(ws):
        raise KeyboardInterrupt
    assert last_pipeline_run(ws)["outcome"] == "failed: KeyboardInterrupt"
