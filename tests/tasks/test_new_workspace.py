"""`mergeline init`: workspaces anywhere, with or without git, inside the repository and outside of it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from places import REPOSITORY, SAMPLES

from mergeline.merging.errors import UserError
from mergeline.tasks import new_workspace
from mergeline.tasks.new_workspace import init_workspace
from mergeline.tasks.params import load_params
from mergeline.tasks.places import CODE_LINK, PACKAGE
from mergeline.tasks.workspace import Workspace

SUITED = [
    "clip", "clip-vit-b32-8-tasks", "clip-vit-b16-8-tasks", "clip-vit-l14-8-tasks", "clip-vit-b32-14-tasks",
    "clip-vit-b32-20-tasks",
]  # fmt: skip


@pytest.fixture
def dvc(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """What DVC is asked for in place of its doing it: it takes two seconds to start."""
    asked: list[tuple[str, ...]] = []

    def run_dvc(folder: Path, *arguments: str) -> None:
        asked.append(arguments)
        (folder / ".dvc").mkdir()

    monkeypatch.setattr(new_workspace, "run_dvc", run_dvc)
    return asked


def git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", folder, *arguments], check=True, capture_output=True, text=True)
    return done.stdout


@pytest.mark.parametrize(
    "name",
    [
        *SUITED,
        "language",
        "image_classification",
        "text2text",
        "policies",
        "dense_prediction",
        "vision_language",
        "gpt2-glue",
        "mergebench-gemma-2-2b",
        "optmerge-qwen2-vl-7b",
        "3h-mistral-7b",
        "box-bart-base",
    ],
)
def test_an_example_makes_a_workspace_that_says_what_it_lacks(name, tmp_path, dvc):
    folder = tmp_path / "deep" / "mine"
    said = init_workspace(folder, example=name)
    workspace = Workspace(folder / "params.yaml")
    assert (folder / "params.yaml").read_text() == (REPOSITORY / f"examples/{name}.yaml").read_text()
    assert workspace.code == CODE_LINK and (folder / CODE_LINK).resolve() == PACKAGE
    assert said[0] == f"made {folder / 'params.yaml'} from the example {name}"
    absent = [name for name in workspace.params.checkpoints.files]
    assert bool(absent) == said[-1].startswith("not there yet: checkpoints/")
    if name in SUITED:
        assert (folder / workspace.params.suite).is_file()


def test_all_examples_are_known(tmp_path, dvc):
    with pytest.raises(UserError) as refusal:
        init_workspace(tmp_path / "mine", example="languages")
    assert str(refusal.value) == "there is no example 'languages'; did you mean 'language'?"
    assert not (tmp_path / "mine").exists() and not dvc


def test_every_stage_finds_the_code_that_it_depends_on(tmp_path, dvc):
    init_workspace(tmp_path, example="clip")
    code = {dep for stage in Workspace(tmp_path / "params.yaml").stages for dep in stage.deps}
    found = [tmp_path / dep for dep in code if dep.startswith(CODE_LINK)]
    assert len(found) > 9 and all(path.exists() for path in found)


def test_without_git_dvc_is_initialised_without_it(tmp_path, dvc):
    said = init_workspace(tmp_path / "mine")
    assert dvc == [("init", "--quiet", "--no-scm")]
    assert "DVC: initialised without git, for there is no repository here" in said
    assert "no_scm = true" in (tmp_path / "mine/.dvc/config").read_text()


@pytest.mark.parametrize(("place", "how"), [(".", ()), ("below/mine", ("--subdir",))])
def test_in_a_git_repository_dvc_is_initialised_with_it(place, how, tmp_path, dvc):
    git(tmp_path, "init", "-q")
    said = init_workspace(tmp_path / place)
    assert dvc == [("init", "--quiet", *how)]
    assert f"DVC: initialised in the git repository {tmp_path}" in said
    assert "no_scm" not in (tmp_path / place / ".dvc/config").read_text()
    untracked = git(tmp_path, "status", "--porcelain", "--untracked-files=all")
    assert CODE_LINK not in untracked and "dvc.yaml" in untracked


def test_a_dvc_project_above_is_used(tmp_path, dvc):
    (tmp_path / ".dvc").mkdir()
    assert f"DVC: that of {tmp_path}" in init_workspace(tmp_path / "mine")
    assert not dvc


def test_inside_the_repository_the_code_is_the_repositorys(tmp_path, dvc, monkeypatch):
    (tmp_path / ".dvc").mkdir()
    monkeypatch.setattr(new_workspace, "SOURCES", tmp_path)
    init_workspace(tmp_path / "runs" / "mine")
    assert Workspace(tmp_path / "runs/mine/params.yaml").code == "../.."
    assert not (tmp_path / "runs/mine" / CODE_LINK).is_symlink()


def test_paths_of_another_file_still_lead_where_they_did(tmp_path, dvc):
    folder = tmp_path / "mine"
    said = init_workspace(folder, REPOSITORY / "params.yaml")
    assert f"samples/base as {os.path.relpath(SAMPLES / 'base', folder)}, " in said[1]
    params, original = load_params(folder / "params.yaml"), load_params(REPOSITORY / "params.yaml")
    for name, where in params.sources.items():
        assert (folder / where).resolve() == (REPOSITORY / original.sources[name]).resolve()
    assert (folder / params.datasets.all["digits"]).resolve() == SAMPLES / "data/digits.npz"
    assert params.suite == "suite.yaml" and (folder / "suite.yaml").is_file()
    assert params.merges == original.merges and params.gates == original.gates
    comments = [line.partition("#")[2] for line in (REPOSITORY / "params.yaml").read_text().splitlines()]
    assert all(comment in (folder / "params.yaml").read_text() for comment in comments)


def test_what_is_there_is_kept_and_what_is_missing_is_made(tmp_path, dvc):
    init_workspace(tmp_path)
    (tmp_path / "params.yaml").write_text((tmp_path / "params.yaml").read_text() + "# mine\n")
    (tmp_path / ".gitignore").write_text("secrets\nbuild/\n")
    (tmp_path / CODE_LINK).unlink()
    before = {name: (tmp_path / name).read_text() for name in ("params.yaml", "dvc.yaml")}
    init_workspace(tmp_path)
    assert before == {name: (tmp_path / name).read_text() for name in before}
    assert (tmp_path / CODE_LINK).resolve() == PACKAGE
    ignored = (tmp_path / ".gitignore").read_text().splitlines()
    assert ignored[:2] == ["secrets", "build/"] and len(ignored) == len(set(ignored)) == 4


@pytest.mark.parametrize("chosen", [{"params": REPOSITORY / "params.yaml"}, {"example": "clip"}])
def test_a_workspace_is_not_overwritten(chosen, tmp_path, dvc):
    init_workspace(tmp_path, example="language")
    before = (tmp_path / "params.yaml").read_text()
    with pytest.raises(UserError, match="exists; choose an empty folder, or leave out --params"):
        init_workspace(tmp_path, **chosen)
    assert (tmp_path / "params.yaml").read_text() == before


def test_another_pipeline_is_not_taken_over(tmp_path, dvc):
    (tmp_path / "dvc.yaml").write_text("stages: {}\n")
    with pytest.raises(UserError, match="dvc.yaml is of another pipeline"):
        init_workspace(tmp_path)
    assert os.listdir(tmp_path) == ["dvc.yaml"]


def test_another_suite_is_not_overwritten(tmp_path, dvc):
    (tmp_path / "clip.suite.yaml").write_text("tasks: {}  # mine\n")
    with pytest.raises(UserError, match="clip.suite.yaml exists; choose an empty folder"):
        init_workspace(tmp_path)
    assert os.listdir(tmp_path) == ["clip.suite.yaml"]
    (tmp_path / "clip.suite.yaml").write_bytes((REPOSITORY / "examples/clip.suite.yaml").read_bytes())
    init_workspace(tmp_path)


def test_a_link_to_other_code_is_led_back(tmp_path, dvc):
    init_workspace(tmp_path)
    (tmp_path / CODE_LINK).unlink()
    (tmp_path / CODE_LINK).symlink_to(tmp_path)
    assert Workspace(tmp_path / "params.yaml").code == CODE_LINK
    assert (tmp_path / CODE_LINK).resolve() == PACKAGE


@pytest.mark.slow
@pytest.mark.parametrize("with_git", [False, True])
def test_dvc_sees_the_digests_that_mergeline_records(with_git, tmp_path):
    """Byte code that Python leaves beside the sources is none of them."""
    from dvc.repo import Repo

    if with_git:
        git(tmp_path, "init", "-q")
    init_workspace(tmp_path)
    workspace = Workspace(tmp_path / "params.yaml")
    stage = next(stage for stage in workspace.stages if stage.name == "merge@cart")
    with Repo(tmp_path) as repo:
        (seen,) = [s for s in repo.index.stages if getattr(s, "name", "") == "merge@cart"]
        deps = {dep.def_path: dep.get_hash().value for dep in seen.deps if dep.def_path.startswith(CODE_LINK)}
    recorded = {dep: workspace.digests.of(tmp_path / dep) for dep in stage.deps if dep.startswith(CODE_LINK)}
    assert deps == recorded and f"{CODE_LINK}/merging" in deps
