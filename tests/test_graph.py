"""The two statements of the pipeline's graph, tasks/graph.py and dvc.yaml, are the same graph."""

from __future__ import annotations

from pathlib import Path

import pytest

from tasks.graph import Stage, needs, stages
from tasks.params import load_params, raw_params

REPOSITORY = Path(__file__).parent.parent


@pytest.fixture(params=["files", "uris", "language"])
def project(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A DVC project of params.yaml and dvc.yaml as they are, with some items by URI, or of samples/llm's."""
    from dvc.repo import Repo
    from ruamel.yaml import YAML

    source = REPOSITORY / "samples" / "llm" if request.param == "language" else REPOSITORY
    (tmp_path / "dvc.yaml").write_text((source / "dvc.yaml").read_text().replace("code: ../..", "code: ."))
    yaml = YAML()
    params = yaml.load(source / "params.yaml")
    if request.param == "uris":
        for section, scheme in (("checkpoints", "hf://org/"), ("datasets", "torchvision://")):
            for name in ("digits", "shapes"):
                del params[section]["files"][name]
                params[section]["uris"][name] = scheme + name
        del params["merges"]["ties"]
    yaml.dump(params, tmp_path / "params.yaml")
    Repo.init(tmp_path, no_scm=True).close()
    return tmp_path


def graph(project: Path) -> list[Stage]:
    return stages(load_params(project / "params.yaml"))


def test_dvc_sees_the_same_stages(project):
    from dvc.repo import Repo

    def path(name: str) -> str:
        return str((project / name).resolve())

    with Repo(project) as repo:
        seen = {
            stage.name: {
                "cmd": stage.cmd,
                "deps": {path(dep.fspath) for dep in stage.deps if not hasattr(dep, "params")},
                "params": {key for dep in stage.deps if hasattr(dep, "params") for key in dep.params},
                "outs": {path(out.fspath) for out in stage.outs},
            }
            for stage in repo.index.stages
        }
    stated = {
        stage.name: {
            "cmd": f"mergeline {stage.step}" + (f" {stage.item}" if stage.item else ""),
            "deps": {path(dep) for dep in stage.deps},
            "params": set(stage.params),
            "outs": {path(out) for out in stage.outs},
        }
        for stage in graph(project)
    }
    assert seen == stated


def test_no_output_lies_in_another(project):
    outs = [Path(out) for stage in graph(project) for out in stage.outs]
    assert len(set(outs)) == len(outs)
    assert not [(a, b) for a in outs for b in outs if a in b.parents]


def test_stages_come_after_what_they_need(project):
    found = graph(project)
    assert len({stage.name for stage in found}) == len(found)
    for i, stage in enumerate(found):
        assert {other.name for other in needs(stage, found)} <= {other.name for other in found[:i]}, (
            stage.name
        )


def test_needs_names_every_maker_of_a_dependency(project):
    found = graph(project)
    for stage in found:
        makers = {
            other.name
            for other in found
            for out in map(Path, other.outs)
            for dep in map(Path, stage.deps)
            if out == dep or dep in out.parents or out in dep.parents
        }
        assert {other.name for other in needs(stage, found)} == makers, stage.name
        assert all(makers or not dep.startswith("build/") for dep in stage.deps), stage.name


def test_needs_does_not_confuse_names_that_begin_alike():
    def stage(name: str, deps: tuple[str, ...], out: str) -> Stage:
        return Stage(name, "step", None, deps, (), (out,))

    found = [
        stage("a", (), "build/cart"),
        stage("b", (), "build/cart_wide"),
        stage("c", ("build/cart",), "build/c"),
    ]
    assert [s.name for s in needs(found[2], found)] == ["a"]


def test_everything_ends_in_the_leaderboard(project):
    found = graph(project)
    reached, todo = set(), [found[-1]]
    while todo:
        stage = todo.pop()
        if stage.name not in reached:
            reached.add(stage.name)
            todo += needs(stage, found)
    assert reached == {stage.name for stage in found}


def test_every_source_that_a_stage_depends_on_exists():
    for stage in stages(load_params(REPOSITORY / "params.yaml"), REPOSITORY.as_posix()):
        assert all(Path(dep).exists() for dep in stage.deps if dep.startswith(str(REPOSITORY))), stage.name


@pytest.mark.parametrize("file", ["params.yaml", "samples/llm/params.yaml"])
def test_every_parameter_is_watched_by_a_stage(file):
    """A key of params.yaml that no stage records could change without anything running again."""
    found = stages(load_params(REPOSITORY / file))
    watched = {key.split(".")[0] for stage in found for key in stage.params}
    # The device changes where, not what; gates are judged at registration.
    assert set(raw_params(REPOSITORY / file)) - watched == {"device", "gates"}
