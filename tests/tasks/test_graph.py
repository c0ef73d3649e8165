"""The stages that steps declare, and dvc.yaml, which is written from the same declarations: one graph."""

from __future__ import annotations

from pathlib import Path

import pytest
from places import REPOSITORY

from mergeline.tasks.dvc_yaml import FILES, dvc_yaml
from mergeline.tasks.graph import Stage, needs, stages
from mergeline.tasks.modalities import modality_named
from mergeline.tasks.params import load_params, raw_params
from mergeline.tasks.places import CODE_LINK


@pytest.fixture(params=["files", "uris", "language", "embeddings", "merges_of_merges"])
def project(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A DVC project of params.yaml and dvc.yaml as they are, with some items by URI, or of a folder of samples."""
    from dvc.repo import Repo
    from ruamel.yaml import YAML

    folder = {"language": "samples/llm", "embeddings": "samples/embeddings"}.get(request.param, ".")
    source = REPOSITORY / folder
    (tmp_path / "dvc.yaml").write_text(
        (source / "dvc.yaml").read_text().replace(f"code: {CODE_LINK}", "code: .")
    )
    yaml = YAML()
    params = yaml.load(source / "params.yaml")
    if request.param == "uris":
        for section, scheme in (("checkpoints", "hf://org/"), ("datasets", "torchvision://")):
            for name in ("digits", "shapes"):
                del params[section]["files"][name]
                params[section]["uris"][name] = scheme + name
        del params["merges"]["ties"]
    if request.param == "merges_of_merges":
        params["merges_of_merges"] = {"outer": {"method": "slerp", "experts": ["merge:ties", "digits"]}}
    yaml.dump(params, tmp_path / "params.yaml")
    Repo.init(tmp_path, no_scm=True).close()
    return tmp_path


def graph(project: Path) -> list[Stage]:
    return stages(load_params(project / "params.yaml"))


@pytest.mark.parametrize("file", FILES)
def test_dvc_yaml_is_what_the_steps_say(file):
    """If not: `python -m mergeline.tasks.dvc_yaml`."""
    modality, code = FILES[file]
    assert (REPOSITORY / file).read_text() == dvc_yaml(modality_named(modality), code)


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
            "cmd": f"mergeline {stage.step}" + (" --dvc-stage" if stage.item else ""),
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


@pytest.mark.parametrize("file", ["params.yaml", "samples/llm/params.yaml", "samples/embeddings/params.yaml"])
def test_every_source_that_a_stage_depends_on_exists(file):
    for stage in stages(load_params(REPOSITORY / file), REPOSITORY.as_posix()):
        assert all(Path(dep).exists() for dep in stage.deps if dep.startswith(str(REPOSITORY))), stage.name


@pytest.mark.parametrize("file", ["params.yaml", "samples/llm/params.yaml", "samples/embeddings/params.yaml"])
def test_every_parameter_is_watched_by_a_stage(file):
    """A key of params.yaml that no stage records could change without anything running again."""
    found = stages(load_params(REPOSITORY / file))
    watched = {key.split(".")[0] for stage in found for key in stage.params}
    # The device changes where, not what; gates are judged at registration.
    assert set(raw_params(REPOSITORY / file)) - watched == {"device", "gates"}


def test_the_repository_is_a_dvc_project_of_the_demo_alone():
    """Metrics, parameters and stages of other families do not mix with the demo's."""
    from dvc.repo import Repo

    with Repo(REPOSITORY) as repo:
        files = {Path(stage.path).relative_to(REPOSITORY).as_posix() for stage in repo.index.stages}
        assert files == {"dvc.yaml"}
    for name in FILES:
        with Repo((REPOSITORY / name).parent) as repo:
            assert Path(repo.root_dir) == (REPOSITORY / name).parent
