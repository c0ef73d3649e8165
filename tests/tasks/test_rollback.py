"""A registered version keeps its files: rolling back to it needs neither git nor the merge's own place."""

from __future__ import annotations

import json
import os
import shutil
from hashlib import md5
from pathlib import Path

import pytest
from judged_workspace import PARAMS, JudgedWorkspace

from mergeline.merging.checkpoints.checkpoint import open_checkpoint
from mergeline.merging.errors import UserError
from mergeline.tasks import tracking
from mergeline.tasks.kept import KEPT
from mergeline.tasks.register import champion, register
from mergeline.tasks.registry import versions
from mergeline.tasks.rollback import rollback
from mergeline.tasks.versioning import run_dvc

GOOD, BETTER, WORSE = ({"digits": n, "shapes": n} for n in (200, 260, 120))
STRICT = {**PARAMS, "gates": {"minimum_gain": 0.0}}
WEIGHTS = "model.safetensors"


@pytest.fixture
def workspace(tmp_path, monkeypatch, mlflow_database):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    mlflow_database(tmp_path / "place")
    return JudgedWorkspace(tmp_path / "place")


@pytest.fixture
def two_versions(workspace):
    """Version 1, whose merge was made again, and version 2, the champion, in its place."""
    workspace.add("cart", GOOD)
    register(workspace.root, STRICT)
    workspace.add("cart", BETTER)
    assert register(workspace.root, STRICT).champion_after == "2"
    return workspace


def weights(workspace, version):
    """Digest of the weights that a version was registered with."""
    found = {v.version: v.digest for v in versions(tracking.connect(workspace.root), "sample")}
    return found[version]


def files(workspace):
    return sorted((workspace.root / KEPT).glob(f"*/*/{WEIGHTS}"))


def with_dvc(root: Path, remote: Path | None = None) -> None:
    """DVC without git, as `mergeline init` makes it outside of a repository."""
    run_dvc(root, "init", "--quiet", "--no-scm")
    if remote:
        run_dvc(root, "remote", "add", "--default", "shared", str(remote))


def forget(workspace) -> None:
    """What is kept of versions here, and what the merges left."""
    shutil.rmtree(workspace.root / KEPT)
    shutil.rmtree(workspace.root / "build" / "merges")


def test_a_merge_that_was_made_again_rolls_back(two_versions):
    said: list[str] = []
    done = rollback(two_versions.root, STRICT, "1", said.append)
    assert (done.champion.version, done.before.version, said) == ("1", "2", [])
    assert champion(two_versions.root, STRICT).version == "1"
    found = open_checkpoint(two_versions.root / done.files).digest()
    assert found == weights(two_versions, "1") != weights(two_versions, "2")


def test_a_losing_candidate_leaves_the_champions_files_alone(two_versions):
    kept = two_versions.root / champion(two_versions.root, STRICT).uri / WEIGHTS
    before = kept.read_bytes()
    two_versions.add("cart", WORSE)
    assert register(two_versions.root, STRICT).champion_after == "2"
    assert kept.read_bytes() == before and len(files(two_versions)) == 3


def test_what_is_kept_takes_no_disk(workspace):
    workspace.add("cart", GOOD)
    said: list[str] = []
    register(workspace.root, STRICT, say=said.append)
    [kept] = files(workspace)
    assert kept.samefile(workspace.root / "build/merges/cart" / WEIGHTS)
    assert not kept.stat().st_mode & 0o222  # nobody writes into it by mistake
    assert said == [
        f"kept the files of cart by hard link: 0.0 MB in {kept.parent.relative_to(workspace.root)}"
    ]


def test_where_nothing_can_be_linked_files_are_copied(workspace, monkeypatch):
    def other_disk(*_: object, **__: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    workspace.add("cart", GOOD)
    said: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(os, "link", other_disk)
        register(workspace.root, STRICT, say=said.append)
    assert "as a copy, for they cannot be linked there" in said[0]
    [kept] = files(workspace)
    assert not kept.samefile(workspace.root / "build/merges/cart" / WEIGHTS)


# --------------------------------------------------------------------------------------- from DVC


def test_files_come_back_from_dvcs_cache(workspace):
    with_dvc(workspace.root)
    workspace.add("cart", GOOD)
    run_dvc(workspace.root, "add", "--quiet", "build/merges/cart")
    register(workspace.root, STRICT)
    forget(workspace)
    said: list[str] = []
    done = rollback(workspace.root, STRICT, "1", said.append)
    assert said == [f"brought the files back from DVC's cache: 0.0 MB in {done.files}"]
    assert open_checkpoint(workspace.root / done.files).digest() == weights(workspace, "1")


def test_another_checkout_needs_the_remote_alone(workspace, tmp_path, monkeypatch):
    remote, other = tmp_path / "remote", tmp_path / "other"
    with_dvc(workspace.root, remote)
    for hits in (GOOD, BETTER):
        workspace.add("cart", hits)
        said: list[str] = []
        register(workspace.root, STRICT, say=said.append)
        assert said[-1] == "DVC's remote 'shared' has them, too"
    wanted = weights(workspace, "1")
    database = workspace.root / tracking.STATE / "mlflow.db"
    shutil.copy(database, tmp_path / "server.db")  # the team's
    shutil.rmtree(workspace.root)

    other.mkdir()
    with_dvc(other, remote)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'server.db'}")
    said = []
    done = rollback(other, STRICT, "1", said.append)
    assert said[0].startswith("brought the files back from DVC's remote 'shared'")
    assert open_checkpoint(other / done.files).digest() == wanted
    assert rollback(other, STRICT, "2").before.version == "1"


def test_a_pipeline_may_keep_its_files_from_the_remote(workspace, tmp_path):
    with_dvc(workspace.root, tmp_path / "remote")
    workspace.add("cart", GOOD)
    register(workspace.root, {**STRICT, "registry": {"push": False}})
    assert not list((tmp_path / "remote").rglob("*"))


def test_a_remote_that_cannot_be_written_is_one_line_and_nothing_is_registered(workspace, tmp_path):
    (tmp_path / "remote").write_text("a file")
    with_dvc(workspace.root, tmp_path / "remote")
    workspace.add("cart", GOOD)
    with pytest.raises(UserError, match="DVC's remote 'shared' cannot be used") as error:
        register(workspace.root, STRICT)
    assert "\n" not in str(error.value) and champion(workspace.root, STRICT) is None


def test_a_list_that_names_files_elsewhere_is_refused(workspace, tmp_path):
    remote = tmp_path / "remote"
    with_dvc(workspace.root, remote)
    listing = json.dumps([{"md5": "0" * 32, "relpath": "../../../evil"}]).encode()
    digest = md5(listing).hexdigest()
    place = remote / "files" / "md5" / digest[:2] / f"{digest[2:]}.dir"
    place.parent.mkdir(parents=True)
    place.write_bytes(listing)
    workspace.add("cart", GOOD)
    register(workspace.root, STRICT)
    tracking.connect(workspace.root).set_model_version_tag("sample", "1", "dvc.md5", f"{digest}.dir")
    with pytest.raises(UserError, match="names the file '../../../evil', which lies outside"):
        rollback(workspace.root, STRICT, "1")
    place.write_bytes(b"[]")
    with pytest.raises(UserError, match="is damaged; remove it there"):
        rollback(workspace.root, STRICT, "1")


def test_a_digest_that_is_a_path_is_refused(two_versions):
    client = tracking.connect(two_versions.root)
    client.set_model_version_tag("sample", "1", "dvc.md5", "../../../build/merges/cart.dir")
    with pytest.raises(UserError, match="is no digest of DVC's of a folder"):
        rollback(two_versions.root, STRICT, "1")


def test_files_that_are_nowhere_are_one_line(two_versions):
    forget(two_versions)
    with pytest.raises(
        UserError, match="sample version 1: its files .* are neither in .*run this where"
    ) as error:
        rollback(two_versions.root, STRICT, "1")
    assert "\n" not in str(error.value) and champion(two_versions.root, STRICT).version == "2"


def test_files_that_were_damaged_are_made_anew_or_refused(two_versions):
    kept = two_versions.root / champion(two_versions.root, STRICT).uri / WEIGHTS
    content = kept.read_bytes()
    kept.unlink()
    kept.write_bytes(content[:-1] + b"x")
    said: list[str] = []
    rollback(two_versions.root, STRICT, "2", said.append)  # the merge still has them
    assert said[0].endswith("was changed, and is made anew") and kept.read_bytes() == content
    kept.write_bytes(content[:-1] + b"x")  # through the link, the merge as well
    with pytest.raises(UserError, match="are neither in"):
        rollback(two_versions.root, STRICT, "2")


# --------------------------------------------------------------------------------------- who was taken down


def test_what_was_rolled_back_is_not_promoted_again_unless_asked(two_versions):
    root = two_versions.root
    rollback(root, STRICT, "1")
    outcome = register(root, STRICT)
    assert (outcome.passed, outcome.version, outcome.champion_after) == (False, "2", "1")
    [finding] = [found for found in outcome.findings if not found.passed]
    assert finding.sentence == (
        "Version 2 was rolled back to version 1: `mergeline rollback 2` alone makes it champion again."
    )
    two_versions.add("cart", {"digits": 300, "shapes": 300})  # another one may
    assert register(root, STRICT).champion_after == "3"
    two_versions.add("cart", BETTER)
    rollback(root, STRICT, "2")
    assert register(root, STRICT).champion_after == "2"


def test_the_command_says_where_the_files_are_and_what_does_not_come_back(two_versions, mergeline):
    two_versions.write_params()
    done = mergeline("rollback", "1", "--params", two_versions.root / "params.yaml")
    assert done.code == 0, done.err
    assert "version 1 is the champion; its files: .mergeline/models/own/" in done.out
    assert "version 2 was it: no run makes it champion again, `mergeline rollback 2` does" in done.out


# --------------------------------------------------------------------------------------- gc


def gc(mergeline, workspace, *options: str) -> str:
    done = mergeline("gc", "--params", workspace.root / "params.yaml", *options)
    assert done.code == 0, done.err
    return done.out


def test_gc_keeps_what_a_version_names_whatever_it_is_asked_for(
    two_versions, mergeline, monkeypatch, tmp_path
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    two_versions.write_params()
    said = gc(mergeline, two_versions, "--max-size", "0B", "--older-than", "1h")
    assert len(files(two_versions)) == 2
    one = sum(f.stat().st_size for f in files(two_versions)[0].parent.iterdir())
    whole = sum(f.stat().st_size for kept in files(two_versions) for f in kept.parent.iterdir())
    assert f"left the files of registered versions: 2, {whole} B, of which {one} B lie nowhere else" in said

    tracking.connect(two_versions.root).delete_model_version("sample", "1")
    assert "would remove files of deleted versions: 1" in gc(mergeline, two_versions, "--dry-run")
    assert len(files(two_versions)) == 2
    assert "removed files of deleted versions: 1" in gc(mergeline, two_versions)
    [left] = files(two_versions)
    assert left.parent == two_versions.root / champion(two_versions.root, STRICT).uri


def test_gc_leaves_what_another_registry_may_name(two_versions, mergeline, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    two_versions.write_params()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # which is not asked
    assert "left the files of registered versions: 2" in gc(mergeline, two_versions)
    assert len(files(two_versions)) == 2
