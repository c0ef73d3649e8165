"""What lies beside a params.yaml is data: neither the pipeline nor the processes that it starts run any of it."""

from __future__ import annotations

import shutil

import pytest
from prefect_server import flow_runs, wait_for
from small_workspace import TIME_LIMIT, SmallWorkspace, make_workspace
from test_prefect import ON_LEAP_DAYS, deployed

pytestmark = pytest.mark.slow

MODULES = ("uvicorn", "dvc", "prefect", "json", "random", "starlette", "sitecustomize", "mergeline", "torch")


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> SmallWorkspace:
    """A workspace beside the code, with files of the names of modules and settings; `executed` lists what was run."""
    clone = make_workspace(tmp_path_factory.mktemp("clone")).root
    root = clone / "workspace"
    root.mkdir()
    for name in ("params.yaml", "samples"):
        shutil.move(clone / name, root / name)
    graph = (clone / "dvc.yaml").read_text()
    (root / "dvc.yaml").write_text(graph.replace("- code: .", "- code: ..", 1))
    (clone / "dvc.yaml").unlink()
    executed = root / "executed"
    for name in MODULES:
        (root / f"{name}.py").write_text(
            f"open({str(executed)!r}, 'a').write('{name} ')\nraise SystemExit('{name}')\n"
        )
    (root / "logging.yml").write_text(f'version: 1\nfilters: {{x: {{"()": os.mkdir, path: {executed}}}}}\n')
    (root / ".env").write_text(f"PREFECT_LOGGING_SETTINGS_PATH={root / 'logging.yml'}\n")
    (root / "prefect.toml").write_text(f'[logging]\nconfig_path = "{root / "logging.yml"}"\n')
    return SmallWorkspace(root)


def test_a_run_executes_nothing_of_its_workspace(hostile: SmallWorkspace) -> None:
    done = hostile.run("mergeline", "run", PYTHONPATH=str(hostile.root.parent))
    executed = hostile.root / "executed"
    assert not executed.exists(), executed.is_file() and executed.read_text()
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_sweep_executes_nothing_of_its_workspace(hostile: SmallWorkspace) -> None:
    out = hostile.root / "table.md"
    done = hostile.run(
        "mergeline", "sweep", "--params", "params.yaml", "--workers", "2", "--out", str(out),
        PYTHONPATH=str(hostile.root.parent),
    )  # fmt: skip
    assert not (hostile.root / "executed").exists()
    assert done.returncode == 0 and out.exists(), done.stdout + done.stderr


def test_serve_and_its_runs_execute_nothing_of_their_workspace(hostile: SmallWorkspace) -> None:
    code = str(hostile.root.parent)
    with hostile.start("mergeline", "serve", "--cron", ON_LEAP_DAYS, PYTHONPATH=code) as owner:
        url = deployed(hostile, owner).url
        told = hostile.run("mergeline", "notify", "digits", PYTHONPATH=code)
        assert told.returncode == 0, told.stderr
        [run] = wait_for(lambda: flow_runs(url, "Completed", "Failed", "Crashed"), TIME_LIMIT)
    assert not (hostile.root / "executed").exists()
    assert run["state_type"] == "COMPLETED", run["state"]["message"]
