"""New workspaces below the repository."""

from pathlib import Path

import pytest

from merging.errors import UserError
from tasks import versioning
from tasks.params import load_params
from tasks.workspace import Workspace

REPOSITORY = Path(__file__).parent.parent


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("params.yaml", "dvc.yaml"):
        (tmp_path / name).write_text((REPOSITORY / name).read_text())
    monkeypatch.setattr(versioning, "REPOSITORY", tmp_path)
    return tmp_path


def test_a_workspace_of_the_sample_family_points_at_the_samples(repository: Path) -> None:
    folder = repository / "runs" / "mine"
    versioning.init_workspace(folder, None)
    assert Workspace(folder / "params.yaml").code == "../.."
    assert load_params(folder / "params.yaml").sources["base"] == "../../samples/base"


def test_the_suite_comes_along(repository: Path) -> None:
    folder = repository / "runs" / "clip"
    versioning.init_workspace(folder, REPOSITORY / "examples/clip-vit-b32-8-tasks.yaml")
    assert (folder / load_params(folder / "params.yaml").suite).is_file()


def test_what_is_there_is_kept(repository: Path) -> None:
    folder = repository / "runs" / "mine"
    versioning.init_workspace(folder, None)
    with pytest.raises(UserError, match="choose an empty folder"):
        versioning.init_workspace(folder, None)


def test_a_workspace_lies_inside_the_repository(repository: Path) -> None:
    with pytest.raises(UserError, match="choose a folder inside"):
        versioning.init_workspace(repository.parent / "elsewhere", None)
