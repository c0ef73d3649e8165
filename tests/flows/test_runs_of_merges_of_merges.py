"""Merges of merges by `mergeline run` and `dvc repro`: both know the same of them, and of what makes them stale."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from small_workspace import SmallWorkspace, make_workspace

pytestmark = pytest.mark.slow

CHAINED = {
    "fit-of-merges@outer",
    "search-of-merges@outer",
    "merge-of-merges@outer",
    "evaluate-of-merges@outer",
}


def shrunk(params: dict[str, Any]) -> None:
    params["merges"] = {
        "inner": {"method": "task_arithmetic", "search": {"scale": [0.3, 0.6]}},
        "other": {"method": "average"},
    }
    params["merges_of_merges"] = {
        "outer": {"method": "slerp", "experts": ["merge:inner", "digits"], "search": {"t": [0.2, 0.5]}}
    }


def digests(workspace: SmallWorkspace) -> dict[str, str]:
    return {name: digest for name, digest in workspace.outputs().items() if not name.endswith("report.html")}


def test_the_flow_and_dvc_make_the_same_and_run_again_what_is_stale(tmp_path: Path) -> None:
    by_flow = make_workspace(tmp_path / "flow")
    by_flow.edit(shrunk)
    by_flow.check("mergeline", "run")
    assert "up to date" in by_flow.check("dvc", "status", "dvc.yaml")
    manifest = json.loads((by_flow.root / "build/merges/outer/manifest.json").read_text())
    assert list(manifest["recipe"]["experts"]) == ["inner", "digits"]

    def other(params: dict[str, Any]) -> None:
        params["merges"]["other"]["dtype"] = "bfloat16"

    def inner(params: dict[str, Any]) -> None:
        params["merges"]["inner"]["search"]["scale"] = [0.4]

    by_dvc = by_flow.copy(tmp_path / "dvc")
    for change, ran in ((other, {"fit-of-merges@outer"}), (inner, CHAINED)):
        for workspace, command in (
            (by_flow, ("mergeline", "run")),
            (by_dvc, ("dvc", "repro", "dvc.yaml")),
        ):
            workspace.edit(change)
            assert "@outer" in workspace.check("mergeline", "run", "--status")
            with workspace.stages_run() as found:
                workspace.check(*command)
            assert {name for name in found if name.endswith("@outer")} == ran
        assert by_flow.lock() == by_dvc.lock()
        assert digests(by_flow) == digests(by_dvc)
    assert "up to date" in by_dvc.check("dvc", "status", "dvc.yaml")
