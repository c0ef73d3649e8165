"""A pipeline on the servers of a team: Postgres, S3, and Prefect, MLflow and a worker as processes of their own.

Checkpoints come from `s3://`, artifacts and DVC's files go to S3, and the worker carries out what Prefect starts.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Iterator

import psutil
import psycopg2
import pytest
import requests
from places import REPOSITORY
from prefect_server import artifacts, flow_runs, logs, task_runs, wait_for
from small_workspace import TASKS, TIME_LIMIT, SmallWorkspace, make_workspace
from team_services import needs_postgres, started

pytestmark = [pytest.mark.slow, needs_postgres]

NAME = "sample-clip"
END_SECONDS = 60


class Team(SmallWorkspace):
    """A workspace whose commands talk to the servers of a team."""

    def __init__(self, root: Path, servers: dict[str, str]):
        super().__init__(root)
        self.servers = servers

    def environment(self, **more: str) -> dict[str, str]:
        return super().environment(**self.servers, MERGELINE_WORKSPACE=str(self.root), **more)

    @property
    def prefect(self) -> str:
        """The URL of Prefect's API, with its password."""
        return self.servers["PREFECT_API_URL"].replace("//", f"//{self.servers['PREFECT_API_AUTH_STRING']}@")

    def store(self) -> Any:
        import boto3

        return boto3.client("s3", endpoint_url=self.servers["AWS_ENDPOINT_URL"])

    def objects(self, bucket: str) -> dict[str, int]:
        """Sizes of what is in a bucket."""
        pages = self.store().get_paginator("list_objects_v2").paginate(Bucket=bucket)
        return {found["Key"]: found["Size"] for page in pages for found in page.get("Contents", [])}

    def ask(self, database: str, question: str) -> list[tuple[Any, ...]]:
        """What Postgres answers to SQL."""
        connection = psycopg2.connect(f"{self.servers['MERGELINE_POSTGRES']}/{database}")
        try:
            with connection.cursor() as cursor:
                cursor.execute(question)
                return cursor.fetchall()
        finally:
            connection.close()

    def count(self, database: str, question: str) -> int:
        [(found,)] = self.ask(database, f"SELECT count(*) FROM {question}")
        return found

    def stored(self) -> dict[str, int]:
        """How much each server keeps of the pipeline; not what Prefect has of runs, of which every one adds some."""
        return {
            "MLflow's runs": self.count("mlflow", "runs WHERE lifecycle_stage = 'active'"),
            "MLflow's metrics": self.count("mlflow", "metrics"),
            "registered versions": self.count("mlflow", "model_versions"),
            "artifacts in S3": len(self.objects("mlflow")),
            "files of DVC's in S3": len(self.objects("dvc")),
        }

    @contextmanager
    def worker(self) -> Iterator[subprocess.Popen[bytes]]:
        """A worker of the work pool in prefect.yaml, started as the image starts it."""
        command = [sys.executable, REPOSITORY / "deploy/start.py", "worker"]
        more = {"PREFECT_WORKER_WEBSERVER_PORT": "0", "PREFECT_WORKER_QUERY_SECONDS": "1"}
        with open(self.root.parent / "worker.log", "wb") as log:
            worker = subprocess.Popen(
                command, cwd=self.root.parent, env=self.environment(**more), stdout=log, stderr=log
            )
        try:
            yield worker
        finally:
            worker.terminate()
            worker.wait(END_SECONDS)

    def run_deployment(self) -> dict[str, Any]:
        """A run that is asked for as people do, at its end."""
        before = len(self._ended())
        self.check("prefect", "deployment", "run", f"mergeline/{NAME}")
        return wait_for(lambda: self._ended()[before:], TIME_LIMIT)[0]

    def _ended(self) -> list[dict[str, Any]]:
        return flow_runs(self.prefect, "Completed", "Failed", "Crashed")


@pytest.fixture(scope="module")
def team(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Team]:
    folder = tmp_path_factory.mktemp("team")
    with started(folder) as (_, servers), pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION"):
            patch.setenv(name, servers[name])
        made = Team(make_workspace(folder / "clone").root, servers)
        _bring_checkpoints(made)
        made.check("dvc", "remote", "add", "-d", "store", "s3://dvc/files")
        made.check("prefect", "work-pool", "create", "mergeline", "--type", "process")
        made.check("prefect", "--no-prompt", "deploy", "--all")
        yield made


def _bring_checkpoints(team: Team) -> None:
    """Put the family's checkpoints into a bucket of their own, and name them in params.yaml."""
    store = team.store()
    store.create_bucket(Bucket="checkpoints")
    for file in (team.root / "samples/base").iterdir():
        store.upload_file(str(file), "checkpoints", f"base/{file.name}")
    for task in TASKS:
        store.upload_file(
            str(team.root / f"samples/experts/{task}.safetensors"), "checkpoints", f"{task}.safetensors"
        )

    def from_s3(params: dict[str, Any]) -> None:
        uris = {task: f"s3://checkpoints/{task}.safetensors" for task in TASKS}
        params["checkpoints"] |= {"files": {}, "uris": {"base": "s3://checkpoints/base", **uris}}

    team.edit(from_s3)


def test_a_worker_runs_the_pipeline_and_the_second_run_does_nothing(team: Team) -> None:
    with team.worker():
        first = team.run_deployment()
        assert first["state_type"] == "COMPLETED", logs(team.prefect, first)
        tasks = task_runs(team.prefect, first)
        assert {"checkpoint-uri@base", "extract", "merge@cart", "publish"} < set(tasks)
        assert set(tasks.values()) == {"Completed"}
        team.check("dvc", "push", "--run-cache")
        stored, outputs, lock = team.stored(), team.outputs(), team.lock()
        print(stored)
        second = team.run_deployment()
        # Before the worker ends, and with it the process that may not have sent all of its logs.
        wait_for(
            lambda: any("nothing to publish" in line for line in logs(team.prefect, second)), END_SECONDS
        )
    tasks = task_runs(team.prefect, second)
    assert tasks.pop("publish") == "Completed" and set(tasks.values()) == {"Cached"}
    assert (team.stored(), team.outputs(), team.lock()) == (stored, outputs, lock)

    # What each server has stored.
    runs = dict(team.ask("prefect", "SELECT state_type, count(*) FROM flow_run GROUP BY 1"))
    assert runs.pop("COMPLETED") == 2 and set(runs) == {"SCHEDULED"}  # those of prefect.yaml's cron
    shown = {"leaderboard": "table", "report": "markdown", "heatmap": "image", "mlflow": "markdown"}
    assert artifacts(team.prefect, first) == shown
    assert stored["MLflow's runs"] == 3  # the pipeline, and its two merges
    assert stored["registered versions"] == 1
    assert team.ask("mlflow", "SELECT alias, version FROM registered_model_aliases ORDER BY 1") == [
        ("candidate", 1),
        ("champion", 1),
    ]
    names = [key.rpartition("/")[2] for key in team.objects("mlflow")]
    assert {
        "MLmodel",
        "model.safetensors",
        "report.html",
        "leaderboard.json",
        "predictions.safetensors",
    } <= set(names)
    weights = [file.read_bytes() for file in team.root.glob("build/merges/*/model.safetensors")]
    keys = [hashlib.md5(data).hexdigest() for data in weights]
    assert all(f"files/files/md5/{key[:2]}/{key[2:]}" in team.objects("dvc") for key in keys)


def test_the_champion_comes_from_s3(team: Team) -> None:
    """For who has the address and the password of MLflow's server, and no access to S3."""
    program = "import mlflow, sys; mlflow.artifacts.download_artifacts(sys.argv[1], dst_path=sys.argv[2])"
    environment = {name: value for name, value in team.environment().items() if not name.startswith("AWS_")}
    folder = team.root.parent / "downloaded"
    subprocess.run(
        [sys.executable, "-c", program, f"models:/{NAME}@champion", folder], env=environment, check=True
    )
    [found] = folder.rglob("model.safetensors")
    kept = next(team.root.glob(".mergeline/models/*/*/model.safetensors"))
    assert found.read_bytes() == kept.read_bytes()


def test_versions_are_registered_where_clients_write_to_s3_themselves(team: Team) -> None:
    """An experiment whose artifacts are not passed through MLflow's server."""
    program = "import mlflow; mlflow.create_experiment('direct', artifact_location='s3://mlflow/direct')"
    subprocess.run([sys.executable, "-c", program], env=team.environment(), check=True)
    team.edit(lambda params: params.update(name="direct"))
    try:
        said = team.run("mergeline", "publish")
    finally:
        team.edit(lambda params: params.update(name=NAME))
    assert said.returncode == 0, said.stderr
    assert "are uploaded to s3://mlflow/direct/" in said.stderr
    direct = [key for key in team.objects("mlflow") if key.startswith("direct/")]
    assert {"MLmodel", "model.safetensors"} <= {key.rpartition("/")[2] for key in direct}


@pytest.mark.parametrize("login", [None, ("mergeline", "guessed"), ("admin", "password1234")])
def test_servers_ask_for_their_passwords(team: Team, login: tuple[str, str] | None) -> None:
    for url in (
        f"{team.servers['PREFECT_API_URL']}/flow_runs/filter",
        f"{team.servers['MLFLOW_TRACKING_URI']}/api/2.0/mlflow/experiments/search",
    ):
        assert requests.post(url, json={}, auth=login, timeout=60).status_code == 401
    with pytest.raises(psycopg2.OperationalError, match="password"):
        server = team.servers["MERGELINE_POSTGRES"].rpartition("@")[2]
        psycopg2.connect(f"postgresql://mergeline:guessed@{server}/mlflow")


def test_no_password_is_said_or_stands_on_a_command_line(team: Team) -> None:
    secrets = [
        team.servers["MLFLOW_TRACKING_PASSWORD"],
        team.servers["PREFECT_API_AUTH_STRING"].partition(":")[2],
    ]
    secrets += [
        team.servers["AWS_SECRET_ACCESS_KEY"],
        team.servers["MERGELINE_POSTGRES"].split(":")[2].partition("@")[0],
    ]
    lines = [" ".join(process.info["cmdline"] or ()) for process in psutil.process_iter(["cmdline"])]
    said = [file.read_text() for file in team.root.parent.glob("*.log")]
    files = [
        file.read_text(errors="ignore")
        for file in team.root.rglob("*")
        if file.suffix in (".yaml", ".json", ".lock")
    ]
    for secret in secrets:
        assert not any(secret in text for text in (*lines, *said, *files))


@pytest.mark.parametrize("end", ["terminate", "kill"])
def test_the_script_ends_all_that_it_has_started(tmp_path: Path, end: str) -> None:
    with started(tmp_path) as (script, servers):
        children = psutil.Process(script.pid).children(recursive=True)
        words = [word for child in children for word in (child.cwd(), *child.cmdline())]
        folders = {Path(*Path(word).parts[:3]) for word in words if word.startswith("/tmp/mergeline-")}
        assert len(children) > 10 and len(folders) == 2
        getattr(script, end)()
        script.wait(END_SECONDS)
        _, alive = psutil.wait_procs(children, timeout=END_SECONDS)
        assert not alive
    wait_for(lambda: not any(folder.exists() for folder in folders), END_SECONDS)
    assert not (tmp_path / "services.env").exists()
    with pytest.raises(requests.ConnectionError):
        requests.get(servers["MLFLOW_TRACKING_URI"], timeout=5)
