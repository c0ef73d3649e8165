"""`dvc repro` starts a shell for every stage: names of params.yaml never reach it, whatever they are."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from places import REPOSITORY
from ruamel.yaml import YAML

from mergeline.merging.errors import UserError
from mergeline.tasks.dvc_yaml import item_of_dvc_stage

PWNED = "pwned"
NAMES = [
    f"x; touch {PWNED}; #",
    f"$(touch {PWNED})",
    f"`touch {PWNED}`",
    f"a'b; touch {PWNED}; '",
    f"a' ; touch {PWNED} #",
    f'a" ; touch {PWNED} #',
    f"x\ntouch {PWNED}",
    f"x && touch {PWNED}",
    f"--help; touch {PWNED}",
    "a'b",
]


@pytest.fixture
def dvc_workspace(workspace: Path) -> Path:
    """A workspace that `dvc repro` can run in, where `mergeline` is this checkout's."""
    from dvc.repo import Repo

    Repo.init(workspace, no_scm=True).close()
    bin = workspace.parent / "bin"
    bin.mkdir()
    mergeline = bin / "mergeline"
    mergeline.write_text(f'#!/bin/sh\nexec "{sys.executable}" -P -m mergeline.flows.cli "$@"\n')
    mergeline.chmod(0o755)
    return workspace


def repro(workspace: Path, *targets: str) -> subprocess.CompletedProcess[str]:
    path = f"{workspace.parent / 'bin'}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        [sys.executable, "-P", "-m", "dvc", "repro", *targets],
        cwd=workspace,
        env=os.environ | {"PATH": path, "PYTHONPATH": str(REPOSITORY), "DVC_NO_ANALYTICS": "1"},
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("section", "stages"),
    [("checkpoints", "checkpoint-file"), ("datasets", "data-file"), ("merges", "fit")],
)
def test_no_name_of_params_yaml_is_a_command(section, stages, dvc_workspace):
    file = dvc_workspace / "params.yaml"
    params = YAML(typ="safe").load(file)
    items = params[section] if section == "merges" else params[section]["files"]
    item = next(iter(items.values()))
    items.clear()
    items |= dict.fromkeys(NAMES, item)
    YAML().dump(params, file)
    for dependency in ("build/checkpoints", "build/statistics", "build/data", "build/heads.safetensors"):
        (dvc_workspace / dependency).mkdir(parents=True)
        (dvc_workspace / dependency / "file").touch()
    done = repro(dvc_workspace, "--single-item", "--keep-going", stages)
    assert done.returncode
    for name in NAMES:
        assert f"Running stage '{stages}@{name}'" in done.stdout
    assert done.stderr.count("must be letters, digits, '_' and '-'") == len(NAMES)
    assert not list(dvc_workspace.rglob(f"*{PWNED}*"))


@pytest.mark.slow
def test_dvc_runs_the_item_of_its_stage(dvc_workspace):
    done = repro(dvc_workspace, "--single-item", "checkpoint-file@digits")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [path.name for path in (dvc_workspace / "build/checkpoints").glob("[a-z]*")] == ["digits"]


@pytest.mark.parametrize("stage", ["checkpoint-file@digits", "samples/llm/dvc.yaml:checkpoint-file@digits"])
def test_the_item_is_that_of_dvcs_stage(stage, monkeypatch):
    monkeypatch.setenv("DVC_STAGE", stage)
    assert item_of_dvc_stage() == "digits"


@pytest.mark.parametrize("stage", [None, "", "compare"])
def test_without_dvc_there_is_no_item(stage, monkeypatch):
    monkeypatch.delenv("DVC_STAGE", raising=False)
    if stage is not None:
        monkeypatch.setenv("DVC_STAGE", stage)
    with pytest.raises(UserError, match="name the item instead"):
        item_of_dvc_stage()
