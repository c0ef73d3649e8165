"""The champion leaves the workspace with its card, manifest and report: to a folder, a store, the Hub."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from classifier_workspace import CLASSES, of_images, vit_of_timm
from hub_server import Fault, running_hub
from judged_workspace import PARAMS, JudgedWorkspace
from ruamel.yaml import YAML
from s3_server import running_s3
from toy_workspace import run_all

from mergeline.merging.checkpoints.checkpoint import open_checkpoint
from mergeline.merging.errors import UserError
from mergeline.merging.verify import verify
from mergeline.tasks import tracking
from mergeline.tasks.export_version import export_version
from mergeline.tasks.publish import publish
from mergeline.tasks.register import register

GOOD, BETTER = ({"digits": n, "shapes": n} for n in (200, 260))
TOKEN = "hf_SecretSecretSecretSecretSecret"


@pytest.fixture
def root(tmp_path, monkeypatch, mlflow_database) -> Path:
    """A workspace with two versions, of which the second is the champion, and its report."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    root = tmp_path / "place"
    mlflow_database(root)
    workspace = JudgedWorkspace(root)
    workspace.write_params()
    for hits in (GOOD, BETTER):
        workspace.add("cart", hits)
        merge = root / "build/merges/cart"
        (merge / "README.md").write_text(
            "---\nbase_model:\n- org/base\ntags:\n- merge\n---\n\n# Merged by ties\n"
        )
        run = tracking.publish(root, PARAMS)
        (root / "build/report.html").write_text("<html>whole</html>")
        tracking.attach(root, run, Path("build/report.html"))
        register(root, PARAMS, run)
    return root


def card(folder: Path) -> tuple[dict, str]:
    _, front, text = (folder / "README.md").read_text().split("---\n", 2)
    return YAML(typ="safe").load(front), text


def licensed(root: Path, **licences: str) -> None:
    """Cards beside the parts of the merge."""
    for name, licence in licences.items():
        folder = root / "build/checkpoints" / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "README.md").write_text(f"---\nlicense: {licence}\n---\n")


def test_a_folder_has_weights_card_manifest_and_report(root, tmp_path):
    licensed(root, base="mit", digits="mit", shapes="mit")
    said: list[str] = []
    done = export_version(root, PARAMS, "sample", str(tmp_path / "out"), say=said.append)
    assert (done.version.version, done.license, done.place) == ("2", "mit", str(tmp_path / "out"))
    assert said[-1].startswith("sample version 2 (cart): 4 files, 0.0 MB, go to ")
    assert open_checkpoint(tmp_path / "out").digest() == done.version.digest
    assert (tmp_path / "out/report.html").read_text() == "<html>whole</html>"
    data, text = card(tmp_path / "out")
    assert data["license"] == "mit" and data["base_model"] == ["org/base"] and data["tags"] == ["merge"]
    assert data["pipeline_tag"] == "zero-shot-image-classification"
    [model] = data["model-index"]
    scores = {result["dataset"]["name"]: result["metrics"][0]["value"] for result in model["results"]}
    assert scores == {"digits": 0.65, "shapes": 0.65, "mean of 2 tasks": 0.65}
    assert "# Merged by ties" in text and "| digits | accuracy | 0.6500 |" in text
    weights = tmp_path / "out/model.safetensors"
    assert weights.stat().st_nlink == 1 and weights.stat().st_mode & 0o200  # a copy of the user's own


def test_any_version_or_alias_is_exported_also_after_its_merge_was_made_again(root, tmp_path):
    done = export_version(root, PARAMS, "sample@1", str(tmp_path / "out"), license="mit")
    assert done.version.version == "1"
    assert card(tmp_path / "out")[0]["model-index"][0]["results"][0]["metrics"][0]["value"] == 0.5
    assert export_version(root, PARAMS, "sample@candidate", str(tmp_path / "b")).version.version == "2"


def test_licences_are_those_of_the_parts_or_asked_for(root, tmp_path):
    assert export_version(root, PARAMS, "sample", str(tmp_path / "a")).license == ""
    assert "license" not in card(tmp_path / "a")[0]
    licensed(root, base="mit", digits="apache-2.0", shapes="mit")
    with pytest.raises(UserError, match="different licences .*digits: apache-2.0.*--license ID"):
        export_version(root, PARAMS, "sample", str(tmp_path / "b"))
    assert not (tmp_path / "b").exists()
    assert export_version(root, PARAMS, "sample", str(tmp_path / "b"), license="other").license == "other"


def test_a_store_of_fsspecs_gets_the_same_files(root, tmp_path):
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.store.clear()
    export_version(root, PARAMS, "sample", "memory://models/champion")
    export_version(root, PARAMS, "sample", str(tmp_path / "out"))
    for file in (tmp_path / "out").iterdir():
        if file.name not in ("README.md", "manifest.json"):  # whose model-index has the name of the place
            assert memory.cat_file(f"/models/champion/{file.name}") == file.read_bytes()
    memory.pipe_file("/others/notes.txt", b"mine")
    with pytest.raises(UserError, match="memory://others: is no earlier export"):
        export_version(root, PARAMS, "sample", "memory://others")


def test_a_bucket_gets_the_same_files_and_the_manifest_last(root, tmp_path, monkeypatch):
    pytest.importorskip("s3fs")
    with running_s3("models") as bucket:
        monkeypatch.setenv("AWS_ENDPOINT_URL", bucket.endpoint)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "S3CR3T")
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        bucket.objects["notes.txt"] = b"mine"
        done = export_version(root, PARAMS, "sample", "s3://models/sample/champion")
        assert done.place == "s3://models/sample/champion"
        own = [name for name in bucket.objects if name.startswith("sample/champion/")]
        assert own[-1] == "sample/champion/manifest.json" and len(own) == 4
        export_version(root, PARAMS, "sample", str(tmp_path / "champion"))
        for name in own:
            file = tmp_path / "champion" / name.rpartition("/")[2]
            assert bucket.objects[name] == file.read_bytes()


@pytest.mark.parametrize(
    ("name", "to", "problem"),
    [
        ("other", "out", "other: the registry has no 'champion'"),
        ("sample@9", "out", "sample: has no version 9; there are: 1, 2"),
        ("sample@best", "out", "the registry has no 'best'"),
        ("../sample", "out", "write NAME, NAME@ALIAS or NAME@VERSION"),
        ("sample", "hf://sample", "write hf://org/name"),
        ("sample", "hf://org/name", "say no licence; say which holds"),
        ("sample", "nowhere://x", "nowhere://x: cannot be written"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(root, tmp_path, monkeypatch, name, to, problem):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=problem) as error:
        export_version(root, PARAMS, name, to)
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_what_is_no_export_is_not_replaced(root, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("mine")
    with pytest.raises(UserError, match="is no earlier merge"):
        export_version(root, PARAMS, "sample", str(tmp_path / "mine"))
    assert (tmp_path / "mine/notes.txt").read_text() == "mine"


def test_an_export_is_verified_and_replaced_by_the_next(tmp_path, monkeypatch, mlflow_database):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    root = of_images(tmp_path / "work", vit_of_timm)
    monkeypatch.chdir(root)
    mlflow_database(root)
    workspace = run_all(root)
    publish(workspace)
    name, out = workspace.params.name, tmp_path / "out"
    for _ in range(2):
        export_version(root, workspace.raw, name, str(out), license="mit")
    assert (out / "report.html").read_bytes() == (root / "build/report.html").read_bytes()
    assert {path.name for path in (out / "heads").glob("*.safetensors")} == {
        f"{t}.safetensors" for t in CLASSES
    }
    assert verify(out, again=False)
    (out / "README.md").write_text("another")
    with pytest.raises(UserError, match="README.md"):
        verify(out, again=False)


# --------------------------------------------------------------------------------------- the Hub


@pytest.fixture
def hub(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with running_hub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        yield hub


def test_the_hub_gets_a_commit_with_all_of_it(root, hub, tmp_path, mergeline):
    done = mergeline(
        "export",
        "sample",
        "hf://org/model",
        "--license",
        "mit",
        "--private",
        "--params",
        root / "params.yaml",
    )
    assert done.code == 0, done.err
    files = hub.repositories["org/model"]
    assert hub.made == {"org/model": True}
    assert done.out == f"hf://org/model@{hub.commit('org/model')}  version 2 (cart), licence mit\n"
    assert {"README.md", "manifest.json", "model.safetensors", "report.html"} <= files.keys()
    folder = tmp_path / "there"
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(bytes(data[:]))
    assert card(folder)[0]["model-index"][0]["name"] == "model"
    assert open_checkpoint(folder).digest() == open_checkpoint(root / "build/merges/cart").digest()
    assert f"Bearer {TOKEN}" in {seen.authorization for seen in hub.seen}
    assert TOKEN not in done.out + done.err


@pytest.mark.parametrize("path", ["/api/repos/create", "/commit/main"])
def test_what_the_hub_refuses_is_one_line_without_the_token(root, hub, mergeline, path):
    hub.faults.append(Fault(path, status=403))
    done = mergeline(
        "export", "sample", "hf://org/model", "--license", "mit", "--params", root / "params.yaml"
    )
    assert done.code == 2 and TOKEN not in done.out + done.err
    assert "mergeline: hf://org/model: cannot be written" in done.err.splitlines()[-1]


def test_without_a_token_nothing_is_asked(root, hub, monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(UserError, match="there is no token; set HF_TOKEN"):
        export_version(root, PARAMS, "sample", "hf://org/model", license="mit")
    assert not hub.seen


def test_another_checkout_exports_what_it_can_bring_back(root, tmp_path, monkeypatch):
    """Its leaderboard and report come from MLflow, its files from the registry's own place here."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{root / tracking.STATE / 'mlflow.db'}")
    other = tmp_path / "other"
    other.mkdir()
    with pytest.raises(UserError, match="its files .* are neither in"):
        export_version(other, PARAMS, "sample", str(tmp_path / "out"))
    shutil.copytree(root / "build/merges", other / "build/merges")
    assert export_version(other, PARAMS, "sample", str(tmp_path / "out")).version.version == "2"
