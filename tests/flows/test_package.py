"""What is installed: one package, `mergeline`, from a wheel or editable; and what a checkout has besides."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from zipfile import ZipFile

import pytest
from checkpoints import save_family
from environments import Environment
from places import REPOSITORY
from small_workspace import MERGES, save_small_family

ROOMS = ("merging", "evaluation", "tasks", "flows")
PACKED = (*ROOMS, "examples")
FOLDERS = ("mergeline", *PACKED)
FILES = ("pyproject.toml", "README.md", "LICENSE")
USE = """
import mergeline
assert mergeline.merge.__module__ == "mergeline.merging.api"
from mergeline import merge_state_dicts
try:
    import merging
except ModuleNotFoundError:
    print(mergeline.__file__)
"""


def output(*command: object, cwd: Path) -> str:
    """What a command prints, that ended well and knew nothing of this checkout."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what the package is made of: to build it writes beside its sources."""
    copy = tmp_path_factory.mktemp("sources")
    for folder in FOLDERS:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(REPOSITORY / folder, copy / folder, symlinks=True, ignore=ignored)
    for file in FILES:
        shutil.copy(REPOSITORY / file, copy)
    return copy


def built(kind: str, sources: Path, folder: Path) -> Path:
    """A wheel, by the hooks that pip calls: `build_wheel`, or `build_editable`, which leads to `sources`."""
    code = f"from setuptools import build_meta; build_meta.build_{kind}({str(folder)!r})"
    output(sys.executable, "-c", code, cwd=sources)
    [wheel] = folder.glob("*.whl")
    return wheel


@pytest.mark.slow
def test_a_wheel_holds_one_package_with_all_files_of_its_rooms(sources, tmp_path):
    names = ZipFile(built("wheel", sources, tmp_path)).namelist()
    packed = {name for name in names if ".dist-info/" not in name}
    files = [path for room in PACKED for path in (sources / room).rglob("*") if path.is_file()]
    rooms = {f"mergeline/{path.relative_to(sources).as_posix()}" for path in files}
    assert packed == rooms | {"mergeline/__init__.py", "mergeline/py.typed"}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["wheel", "editable"])
def test_an_installed_package_works_in_any_folder(kind, sources, tmp_path):
    venv.create(tmp_path / "venv", with_pip=False)
    bin = tmp_path / "venv" / "bin"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", bin / "python"]
    output(*pip, "install", "--no-deps", built(kind, sources, tmp_path), cwd=tmp_path)
    # What it needs is there already, beside this interpreter; only now, so that pip finds no other mergeline there.
    [installed] = (tmp_path / "venv").glob("lib/*/site-packages")
    (installed / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    assert output(bin / "mergeline", "--version", cwd=tmp_path).startswith("mergeline 0.")
    assert "task_arithmetic" in output(bin / "mergeline", "methods", cwd=tmp_path)
    package = (installed if kind == "wheel" else sources) / "mergeline"
    assert output(bin / "python", "-c", USE, cwd=tmp_path) == f"{package / '__init__.py'}\n"


@pytest.fixture(scope="module")
def wheel(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built("wheel", sources, tmp_path_factory.mktemp("wheel"))


@pytest.mark.slow
def test_without_extras_all_that_merges_works_and_the_rest_names_its_extra(wheel, tmp_path):
    light = Environment(tmp_path / "venv", wheel)
    assert "No broken requirements" in light.pip("check")
    installed = {path.name for path in light.packages.iterdir()}
    assert installed.isdisjoint({"prefect", "dvc", "mlflow", "open_clip", "torchvision", "lm_eval", "pandas"})
    recipe = save_family(tmp_path)
    experts = [part for name, path in recipe["experts"].items() for part in ("--expert", f"{name}={path}")]
    family = ["--base", recipe["base"], *experts]
    light.check("mergeline", "plan", "--method", "cart", *family, cwd=tmp_path)
    light.check("mergeline", "merge", "--method", "cart", *family, "--out", "merged", cwd=tmp_path)
    assert "bit" in light.check("mergeline", "verify", "merged", cwd=tmp_path)
    grid = ["--grid", "scale=1,2", "--out", "sweep"]
    light.check("mergeline", "sweep", "--method", "ties", *family, *grid, cwd=tmp_path)
    light.check("mergeline", "inspect", *family, "--html", "family.html", cwd=tmp_path)
    assert "task_arithmetic" in light.check("mergeline", "methods", cwd=tmp_path)
    for command in (["init", "mine"], ["run", "--params", REPOSITORY / "params.yaml"]):
        refused = light.run("mergeline", *command, cwd=tmp_path)
        assert refused.returncode == 2 and refused.stdout == ""
        assert refused.stderr == "mergeline: prefect is not installed; pip install 'mergeline[pipeline]'\n"
    assert not (tmp_path / "mine").exists()


@pytest.mark.slow
def test_a_workspace_of_the_wheel_runs_by_either_way_to_the_same_bytes(wheel, tmp_path):
    """In an empty environment, in folders that know no checkout: one in a git repository, one in none."""
    full = Environment(tmp_path / "venv", wheel, "pipeline", "clip")
    assert "No broken requirements" in full.pip("check")
    save_small_family(tmp_path / "given")
    by_flow, by_dvc = tmp_path / "flow", tmp_path / "dvc"
    subprocess.run(["git", "init", "-q", by_dvc], check=True)
    for folder, git in ((by_flow, "without git"), (by_dvc, "in the git repository")):
        told = full.check("mergeline", "init", folder, "--params", "given/params.yaml", cwd=tmp_path)
        assert f"DVC: initialised {git}" in told and "not there yet" not in told
    told = full.check("mergeline", "run", cwd=by_flow)
    assert "passed every gate: version 1 became the first champion" in told
    assert "up to date" in full.check("-m dvc", "repro", cwd=by_flow)
    full.check("-m dvc", "repro", cwd=by_dvc)
    assert (by_flow / "dvc.lock").read_text() == (by_dvc / "dvc.lock").read_text()
    told = full.check("mergeline", "run", cwd=by_dvc)
    assert "\n0 of " in told and (by_dvc / "build/report.html").exists()
    columns = full.check("-m dvc", "metrics", "show", cwd=by_dvc).splitlines()[0].split()
    assert columns[0] == "Path" and len(columns) <= 1 + 4 + len(MERGES)


def test_a_checkout_has_merging_beside_mergeline():
    code = "import merging, mergeline; assert merging.merge is mergeline.merge; print(mergeline.__file__)"
    assert (
        output(sys.executable, "-c", code, cwd=REPOSITORY) == f"{REPOSITORY / 'mergeline' / '__init__.py'}\n"
    )
