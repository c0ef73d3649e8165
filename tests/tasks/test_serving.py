"""What is registered loads in MLflow, without pickles, and predicts what the pipeline measured."""

from __future__ import annotations

import base64
import io
import json
import os
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import classifier_workspace as made
import numpy as np
import pytest
import requests
import small_language_model
import small_text2text
import torch
from classifier_workspace import CLASSES, of_images, of_texts
from mlflow_server import mlflow_server
from PIL import Image
from safetensors.numpy import load_file
from small_embeddings import save_embedding_family
from toy_workspace import run_all

from mergeline.evaluation.clip.suite import load_suite
from mergeline.evaluation.datasets import load
from mergeline.evaluation.language.settings import Language
from mergeline.tasks import tracking
from mergeline.tasks.classifiers.modality import ImageClassifiers
from mergeline.tasks.embeddings import serving as of_embeddings
from mergeline.tasks.language import serving as of_language
from mergeline.tasks.modalities import modality_named
from mergeline.tasks.publish import serving_of
from mergeline.tasks.register import register
from mergeline.tasks.serving.contract import Served
from mergeline.tasks.serving.folder import write_folder
from mergeline.tasks.text2text import serving as of_text2text
from mergeline.tasks.workspace import Workspace

SERVER_SECONDS = 240


@pytest.fixture(autouse=True)
def own_database(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def published(root: Path, mlflow_database) -> list[str]:
    """Everything of a workspace runs and is registered; what was said."""
    mlflow_database(root)
    workspace = run_all(root)
    said: list[str] = []
    outcome = register(root, workspace.raw, say=said.append, serving=serving_of(workspace))
    assert outcome.champion_after == "1", outcome
    return said


def champion(root: Path) -> Any:
    """The champion as any client of MLflow loads it."""
    import mlflow

    mlflow.set_tracking_uri(f"sqlite:///{root / tracking.STATE / 'mlflow.db'}")
    return mlflow.pyfunc.load_model(f"models:/{Workspace(root / 'params.yaml').params.name}@champion")


def predictions(root: Path) -> dict[str, np.ndarray]:
    """What the candidate answered when it was measured."""
    board = json.loads((root / "build/leaderboard/leaderboard.json").read_text())
    return load_file(root / f"build/evaluations/{board['candidate']}/predictions.safetensors")


def encoded(pixels_HWC: np.ndarray) -> str:
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels_HWC)).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def of_folder(files: Path, modality: str, served: Served, place: Path) -> Any:
    """A folder of a model as MLflow loads it, without a registry."""
    import mlflow

    out, scratch = place / "out", place / "scratch"
    out.mkdir()
    assert write_folder(out, scratch, files, modality_named(modality), served)
    assert not [file for file in out.rglob("*") if file.suffix in (".pkl", ".pickle")]
    return mlflow.pyfunc.load_model(str(out))


# --------------------------------------------------------------------------------------- what is predicted


@pytest.mark.parametrize("build", [made.vit_of_transformers, made.vit_of_timm], ids=["transformers", "timm"])
def test_image_classifiers_answer_as_they_were_measured(build, tmp_path, monkeypatch, mlflow_database):
    root = of_images(tmp_path / "work", build)
    monkeypatch.chdir(root)
    published(root, mlflow_database)
    model = champion(root)
    answers = predictions(root)
    for task in CLASSES:
        x = np.load(root / f"build/data/{task}/test_x.npy")
        rows = [{"image": encoded(image), "task": task} for image in x[:6]]
        labels = [int(label) for label in model.predict(rows)["label"]]
        assert labels == answers[f"test/{task}"][:6].tolist()


def test_text_classifiers_answer_as_they_were_measured(tmp_path, monkeypatch, mlflow_database):
    root = of_texts(tmp_path / "work", made.bert)
    monkeypatch.chdir(root)
    published(root, mlflow_database)
    model = champion(root)
    from mergeline.evaluation.classifiers.texts import label_names
    from mergeline.evaluation.tables import load_table

    answers = predictions(root)
    columns = Workspace(root / "params.yaml").params.text_classification.columns
    for task, own in columns.items():
        folder = root / f"build/data/{task}"
        rows = [
            {"text": row[own.text], "task": task} | ({"pair": row[own.pair]} if own.pair else {})
            for row in load_table(folder).rows("test")[:5]
        ]
        names = label_names(folder)
        right = answers[f"test/{task}"][:5]
        said = model.predict(rows)["label"].tolist()
        if own.target == "number":
            assert [float(label) for label in said] == pytest.approx(right.tolist(), rel=1e-4)
        else:
            assert said == [names[i] if names else str(i) for i in right]


def test_language_models_write_the_likeliest_tokens(tmp_path):
    model = small_language_model.save_model(tmp_path / "model", 0)
    served = of_language.served(Language(tasks="tasks", suites={"a": ["a"]}))
    loaded = of_folder(tmp_path / "model", "language", served, tmp_path)
    tokens = small_language_model.TOKENS
    ids = [tokens.index(word) for word in ("w1", "w2")]
    for _ in range(3):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    text = " ".join(tokens[i] for i in ids[2:] if not tokens[i].startswith("<"))
    assert loaded.predict([{"prompt": "w1 w2"}], {"max_new_tokens": 3})["text"].tolist() == [text]


def test_sequence_to_sequence_models_write_what_they_write_alone(tmp_path):
    from mergeline.evaluation.text2text.models import load_writer

    small_text2text.save(small_text2text.save_t5(tmp_path / "model", 0), tmp_path / "model")
    loaded = of_folder(tmp_path / "model", "text2text", of_text2text.served(4), tmp_path)
    sources = ["kind of sun?", "size two rivers"]
    right = load_writer(tmp_path / "model").write(sources, 5, 1).texts
    rows = [{"source": source} for source in sources]
    assert loaded.predict(rows, {"max_new_tokens": 5})["text"].tolist() == right


def test_embedding_models_give_unit_vectors_by_role(tmp_path):
    pytest.importorskip("sentence_transformers")
    from mergeline.evaluation.embeddings.models import load_model

    save_embedding_family(tmp_path / "in")
    loaded = of_folder(tmp_path / "in/base", "embeddings", of_embeddings.served(8), tmp_path)
    found = loaded.predict([{"text": "w1 w2"}, {"text": "w3", "role": "query"}])["vector"]
    model = load_model(tmp_path / "in/base")
    np.testing.assert_allclose(found[0], model.embed(["w1 w2"])[0], rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(found[1], model.embed(["w3"], "query")[0], rtol=1e-5, atol=1e-7)
    assert np.linalg.norm(found[0]) == pytest.approx(1)


def test_what_cannot_be_answered_is_one_line(tmp_path, monkeypatch, mlflow_database):
    from mlflow.exceptions import MlflowException

    root = of_images(tmp_path / "work", made.vit_of_timm)
    monkeypatch.chdir(root)
    published(root, mlflow_database)
    model, image = champion(root), encoded(np.zeros((8, 8, 3), np.uint8))
    for row, problem in [
        ({"image": image}, "name one in `task`: a, b, c"),
        ({"image": image, "task": "aa"}, "'aa' is no task"),
        ({"image": "no base64!", "task": "a"}, "is no base64"),
        ({"image": base64.b64encode(b"no image").decode(), "task": "a"}, "does not open"),
    ]:
        with pytest.raises(MlflowException, match=problem) as error:
            model.predict([row])
        assert "\n" not in str(error.value)


def test_a_merge_of_another_kind_is_named_and_not_loaded(tmp_path, monkeypatch, mlflow_database):
    root = of_images(tmp_path / "work", made.vit_of_timm)
    monkeypatch.chdir(root)
    monkeypatch.setattr(ImageClassifiers, "served", lambda *_: "nobody asks for it")
    said = published(root, mlflow_database)
    assert said[-1] == "MLflow can name version 1, and not load it: nobody asks for it"


# --------------------------------------------------------------------------------------- where the files are


def test_the_folder_of_the_champion_comes_by_hard_link(tmp_path, monkeypatch, mlflow_database):
    import mlflow

    root = of_images(tmp_path / "work", made.vit_of_timm)
    monkeypatch.chdir(root)
    said = published(root, mlflow_database)
    assert "MLflow loads models:/" in said[-1] and "hard links" in said[-1]
    mlflow.set_tracking_uri(f"sqlite:///{root / tracking.STATE / 'mlflow.db'}")
    name = Workspace(root / "params.yaml").params.name
    folder = Path(mlflow.artifacts.download_artifacts(f"models:/{name}@champion"))
    board = json.loads((root / "build/leaderboard/leaderboard.json").read_text())
    weights = root / "build/merges" / board["candidate"] / "model.safetensors"
    assert (folder / "artifacts/model/model.safetensors").samefile(weights)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")  # set_tracking_uri sets it
    again: list[str] = []
    workspace = Workspace(root / "params.yaml")
    register(root, workspace.raw, say=again.append, serving=serving_of(workspace))
    assert again == []  # it is there


@pytest.mark.slow
def test_a_server_is_given_the_champions_files_unless_they_are_too_large(tmp_path, monkeypatch):
    import mlflow

    (tmp_path / "server").mkdir()
    root = of_images(tmp_path / "work", made.vit_of_timm)
    monkeypatch.chdir(root)
    with mlflow_server(tmp_path / "server") as url:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", url)
        workspace = run_all(root)
        said: list[str] = []
        small = {**workspace.raw, "name": "small", "registry": {"upload_gigabytes": 0}}
        register(root, small, say=said.append, serving=serving_of(workspace))
        assert "GB are more than 0 (registry: upload_gigabytes in params.yaml)" in said[-1]
        register(root, workspace.raw, say=said.append, serving=serving_of(workspace))
        assert "MB are uploaded to mlflow-artifacts:/" in said[-1]
        mlflow.set_tracking_uri(url)
        name = workspace.params.name
        folder = Path(mlflow.artifacts.download_artifacts(f"models:/{name}@champion"))
        kept = next((root / ".mergeline/models").glob("*/*/model.safetensors"))
        assert (folder / "artifacts/model/model.safetensors").read_bytes() == kept.read_bytes()
        model = mlflow.pyfunc.load_model(f"models:/{name}@champion")
        x = np.load(root / "build/data/a/test_x.npy")
        rows = [{"image": encoded(image), "task": "a"} for image in x[:3]]
        assert [int(i) for i in model.predict(rows)["label"]] == predictions(root)["test/a"][:3].tolist()


@pytest.mark.slow
def test_the_champion_is_served_over_http(workspace, monkeypatch, mlflow_database):
    """CLIP: `mlflow models serve -m models:/NAME@champion`, whose answers are the classes that were measured."""
    monkeypatch.chdir(workspace)
    published(workspace, mlflow_database)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", "models:/small@champion"]
    command += ["--env-manager", "local", "--host", "127.0.0.1", "--port", str(port)]
    database = f"sqlite:///{workspace / tracking.STATE / 'mlflow.db'}"
    programs = (
        f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # MLflow starts uvicorn by its name
    )
    environment = os.environ | {"MLFLOW_TRACKING_URI": database, "PATH": programs}
    with open(workspace / "serve.log", "wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
    try:
        _wait_until_answering(server, f"http://127.0.0.1:{port}/ping", workspace / "serve.log")
        data = load(workspace / "build/data/digits")
        names = load_suite(Workspace(workspace / "params.yaml").params.suite).tasks["digits"].classnames
        rows = [{"image": encoded(image), "task": "digits"} for image in data.split("test")[0][:5]]
        url = f"http://127.0.0.1:{port}/invocations"
        answer = requests.post(url, json={"dataframe_records": rows}, timeout=60)
        assert answer.status_code == 200, answer.text
        right = predictions(workspace)["test/digits"][:5]
        assert [row["label"] for row in answer.json()["predictions"]] == [names[i] for i in right]
        assert all(0 < row["score"] <= 1 for row in answer.json()["predictions"])
        refused = requests.post(url, json={"dataframe_records": [rows[0] | {"task": "digit"}]}, timeout=60)
        assert refused.status_code == 400 and "did you mean 'digits'" in refused.text
    finally:
        with suppress(ProcessLookupError):  # it did not start
            os.killpg(server.pid, 15)
        server.wait(timeout=30)


def _wait_until_answering(server: subprocess.Popen, url: str, log: Path) -> None:
    deadline = time.monotonic() + SERVER_SECONDS
    while time.monotonic() < deadline and server.poll() is None:
        try:
            if requests.get(url, timeout=5).status_code == 200:
                return
        except requests.RequestException:
            pass
        time.sleep(0.5)
    raise RuntimeError(f"the model is not served:\n{log.read_text()[-2000:]}")
