"""`mergeline run`: what it says before and instead of running anything; and what it hands on to the pipeline."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Iterator

import pytest
from places import REPOSITORY
from pretended_runs import ROW, VERDICT, pretend_all_ran, pretend_locked, pretend_published
from ruamel.yaml import YAML

from mergeline.flows import launch
from mergeline.tasks.progress import counting, told
from mergeline.tasks.workspace import Workspace

UNUSED = {"torch", "prefect", "mlflow", "dvc", "numpy", "transformers", "open_clip", "matplotlib"}


@pytest.fixture
def done(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    """A workspace in which everything has run, is recorded and published."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    ws = pretend_all_ran(workspace)
    pretend_published(ws)
    pretend_locked(ws)
    return Workspace(ws.params_file)


@pytest.fixture
def handed_on(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """In place of Prefect: what the pipeline was called with, each time; it says that merge@cart ran."""
    calls: list[dict[str, Any]] = []

    class Pipeline:
        @staticmethod
        def pipeline(params: str, **options: Any) -> list[str]:
            calls.append({"params": params, **options})
            return ["merge@cart"]

        @staticmethod
        def report_stop() -> None:
            raise AssertionError("nothing stops it")

    @contextmanager
    def no_server(*_: Any, **__: Any) -> Iterator[str]:
        yield ""

    monkeypatch.setitem(sys.modules, "mergeline.flows.pipeline", Pipeline)  # type: ignore[arg-type]
    monkeypatch.setattr(launch, "prefect_server", no_server)
    return calls


def edit(ws: Workspace, **values: Any) -> None:
    params = YAML(typ="safe").load(ws.params_file)
    YAML().dump({**params, **values}, ws.params_file)


# --------------------------------------------------------------------------------------- nothing to do


def test_a_run_with_nothing_to_do_says_so_and_starts_no_server(done, mergeline, handed_on):
    outcome = mergeline("run", "--params", done.params_file)
    assert outcome.code == 0 and outcome.err == "checking 19 stages ...\n" and handed_on == []
    count = len(done.stages)
    last = outcome.out.splitlines()[-1]
    assert last == f"0 of {count} stages ran: all that was asked for is up to date; report: build/report.html"
    assert "small: test accuracy" in outcome.out and "0.500" in outcome.out


def test_it_imports_nothing_that_is_heavy(done):
    code = [
        "import sys",
        "from mergeline.flows.cli import main",
        "assert main(['run', '--params', sys.argv[1]]) == 0",
        f"print(sorted({UNUSED} & sys.modules.keys()))",
    ]
    command = [sys.executable, "-c", "\n".join(code), done.params_file]
    ran = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines()[-1] == "[]" and "0 of " in ran.stdout


def test_commands_speak_before_they_import_what_is_heavy(workspace):
    code = [
        "import sys",
        "from mergeline.flows.cli import main, pipeline_commands",
        "class Spoken(BaseException): pass",
        "def stop(text): raise Spoken(text)",
        "pipeline_commands.note = stop",
        "for words in ('serve', 'notify digits', 'publish', 'register', 'rollback 1'):",
        "    try:",
        "        main([*words.split(), '--params', sys.argv[1]])",
        "    except Spoken as said:",
        "        print(words.split()[0], said)",
        f"print(sorted({UNUSED} & sys.modules.keys()))",
    ]
    command = [sys.executable, "-c", "\n".join(code), workspace / "params.yaml"]
    ran = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert ran.stdout.splitlines() == [
        "serve starting Prefect ...",
        "notify asking Prefect ...",
        *(f"{command} asking MLflow ..." for command in ("publish", "register", "rollback")),
        "[]",
    ], ran.stderr


@pytest.mark.parametrize(
    ("undo", "said"),
    [
        (lambda ws: (ws.root / "build/merges/cart").unlink(), "1 of 19 stages to run, 2 may follow"),
        (lambda ws: (ws.root / "dvc.lock").unlink(), "0 of 19 stages to run, then write dvc.lock"),
        (
            lambda ws: (ws.state / "published.json").unlink(),
            "0 of 19 stages to run, then publish the results",
        ),
        (
            lambda ws: edit(ws, gates={"minimum_mean": 0.9}),
            "0 of 19 stages to run, then publish the results",
        ),
    ],
)
def test_what_is_not_done_is_told_before_prefect_starts(undo, said, done, mergeline, handed_on):
    undo(done)
    outcome = mergeline("run", "--params", done.params_file)
    assert outcome.code == 0 and outcome.err.splitlines() == [
        "checking 19 stages ...",
        f"{said}; starting Prefect ...",
    ]
    assert handed_on == [{"params": str(done.params_file), "only": None, "force": None}]
    assert "1 of 19 stages ran; report: build/report.html" in outcome.out


def test_outputs_of_what_is_no_longer_named_are_removed_first(done, mergeline, handed_on):
    (done.root / "build/merges/gone").write_text("of a merge that was taken out")
    assert mergeline("run", "--params", done.params_file).code == 0
    assert not (done.root / "build/merges/gone").exists() and handed_on == []


# --------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("values", "part"),
    [
        ({"device": "gpu"}, "device 'gpu' is not known; choose cpu, cuda or cuda:N"),
        ({"suite": "gone.yaml"}, "gone.yaml (of heads) is missing; check the paths"),
        ({"merges": {"a": {"method": "crat"}}}, "did you mean 'cart'?"),
    ],
)
def test_bad_input_is_told_before_a_server_starts(values, part, done, mergeline, handed_on):
    edit(done, **values)
    outcome = mergeline("run", "--params", done.params_file)
    assert (outcome.code, outcome.out, handed_on) == (2, "", [])
    assert outcome.err.count("\n") == 1 and part in outcome.err


def test_a_gpu_that_is_not_there_is_told_before_a_server_starts(done, mergeline, handed_on, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    edit(done, device="cuda")
    assert mergeline("run", "--params", done.params_file).code == 0  # nothing computes
    (done.root / "build/merges/cart").unlink()
    outcome = mergeline("run", "--params", done.params_file)
    assert outcome.code == 2 and "device 'cuda' is not in this machine" in outcome.err


# --------------------------------------------------------------------------------------- some of it


def test_only_and_force_are_handed_on(done, mergeline, handed_on):
    outcome = mergeline("run", "--params", done.params_file, "--only", "average", "--force", "merge@average")
    assert outcome.code == 0 and outcome.out == "1 of 19 stages ran\n"
    assert handed_on == [{"params": str(done.params_file), "only": ["average"], "force": ["merge@average"]}]


def test_only_what_is_up_to_date_starts_no_server(done, mergeline, handed_on):
    (done.state / "published.json").unlink()  # some stages alone are not published
    outcome = mergeline("run", "--params", done.params_file, "--only", "average")
    assert outcome.code == 0 and handed_on == []
    assert outcome.out == "0 of 19 stages ran: all that was asked for is up to date\n"


def test_a_name_that_is_none_is_refused(done, mergeline, handed_on):
    outcome = mergeline("run", "--params", done.params_file, "--only", "avrage")
    assert outcome.code == 2 and "did you mean 'average'?" in outcome.err and handed_on == []


# --------------------------------------------------------------------------------------- dry runs and status


def test_a_dry_run_says_what_would_run_and_why_and_writes_nothing(done, mergeline, handed_on):
    edit(done, seed=1)
    before = sorted(done.root.rglob("*"))
    outcome = mergeline("run", "--params", done.params_file, "--dry-run")
    assert outcome.code == 0 and handed_on == []
    lines = [" ".join(line.split()) for line in outcome.out.splitlines()]
    assert "merge@cart runs: parameter seed: 0 -> 1" in lines
    assert "evaluate@cart may follow: after merge@cart" in lines
    assert lines[-3:] == [
        "then write dvc.lock",
        "then publish the results",
        "9 of 19 stages would run",
    ]
    assert sorted(done.root.rglob("*")) == before
    found = json.loads(mergeline("run", "--params", done.params_file, "--dry-run", "--json").out)
    actions = {stage["stage"]: stage["action"] for stage in found["stages"]}
    assert actions["search@average"] == "run" and actions["heads"] == "none" and len(actions) == 19
    only = mergeline("run", "--params", done.params_file, "--dry-run", "--only", "heads").out
    assert only == "all 5 stages are up to date\n"


def test_the_status_tells_of_stages_what_runs_now_the_champion_and_the_last_run(done, mergeline):
    shutil.rmtree(done.root / "build/extract") if (done.root / "build/extract").is_dir() else (
        done.root / "build/extract"
    ).unlink()
    arguments = "run", "--params", done.params_file, "--status"
    with told(done.progress, "merge@cart"), counting("tensors") as count:
        count(1, 4)
        lines = [" ".join(line.split()) for line in mergeline(*arguments).out.splitlines()]
        assert any(line.startswith("merge@cart is running: ") for line in lines)
    assert "heads up to date" in lines
    assert any(
        line.startswith("extract comes from DVC's cache, or runs; output build/extract") for line in lines
    )
    assert "champion version 3, when results were last published here" in lines
    assert lines[-1] == "last run none here"
    found = json.loads(mergeline(*arguments, "--json").out)
    assert found["verdict"] == VERDICT and found["last_run"] is None and len(found["stages"]) == 19


# --------------------------------------------------------------------------------------- JSON


def test_a_run_prints_one_json_object(done, mergeline, handed_on):
    found = json.loads(mergeline("run", "--params", done.params_file, "--json").out)
    assert found["ran"] == [] and found["stages"] == 19 and found["leaderboard"]["rows"] == [ROW]
    assert found["verdict"] == VERDICT and found["report"] == str(done.root / "build/report.html")
    outcome = mergeline("run", "--params", done.params_file, "--json", "--force", "cart")
    assert json.loads(outcome.out)["ran"] == ["merge@cart"] and "starting Prefect" in outcome.err
