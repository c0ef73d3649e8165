"""MLflow as a published view of a workspace: one run for the pipeline, one below it for each merge.

The files are the record. Every run has the digest of what it shows as its tag `mergeline.run_key`:
publishing the same results again, from another process or after a crash, finds the runs and writes no
second ones.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Iterator, Sequence

from merging.errors import UserError
from merging.files import read_object
from merging.recipe import text_digest
from tasks.digests import Digests

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import DatasetInput, Metric

STATE = ".mergeline"
RUN_KEY = "mergeline.run_key"
MODEL_TAG = "lineage.model"
PREDICTIONS = "predictions.safetensors"
LEADERBOARD = "build/leaderboard/leaderboard.json"

_PARENT_TAG = "mlflow.parentRunId"
_ROW_METRICS = (
    "mean", "lower", "upper", "normalised", "worst_task", "val_mean", "norm_ratio",
    "gain_kept", "held_in", "held_out",
)  # fmt: skip
_PARAMS_PER_CALL, _METRICS_PER_CALL = 100, 1000  # limits of MLflow's REST API
_DIGEST_LENGTH = 36  # of an MLflow dataset

_PRIVACY = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "1",
    "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
}
_DEFAULTS = {
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",  # MLflow's own 7 take minutes to find that a server is absent
}


@dataclass(frozen=True)
class PublishedRun:
    """Where MLflow shows a workspace; `merges` maps the name of a merge to its run."""

    experiment_id: str
    run_id: str
    merges: dict[str, str]


@dataclass(frozen=True)
class _Merge:
    """What MLflow is told of one merge. `lineage` holds tags, `curve` the validation means of its search."""

    name: str
    method: str
    params: dict[str, Any]
    metrics: dict[str, float]
    lineage: dict[str, str]
    curve: list[float]
    files: list[Path]


def publish(workspace: Path, params: dict[str, Any], figures: Sequence[Path] = ()) -> PublishedRun:
    """Show the results of a workspace in MLflow. Runs that are there are kept; figures are uploaded anew.

    Raises:
        UserError: a step's output is missing, or MLflow does not answer.
    """
    board, merges = _read(workspace)
    keys = _merge_keys(board, merges)
    with locked(workspace):
        client = connect(workspace)
        experiment_id = _experiment(client, workspace, params["name"])
        commit = _git_commit(workspace)
        tags = {"mergeline.candidate": board["candidate"], **commit}
        with _run(client, experiment_id, _pipeline_key(board, merges), params["name"], tags) as (
            run_id,
            fresh,
        ):
            if fresh:
                _log(client, run_id, {}, _row_metrics(candidate_row(board)))
                client.log_artifact(run_id, workspace / LEADERBOARD)
            children = {
                merge.name: _publish_merge(client, experiment_id, run_id, merge, keys[merge.name], commit)
                for merge in merges
            }
            for figure in figures:
                client.log_artifact(run_id, figure, "figures")
    return PublishedRun(experiment_id, run_id, children)


def attach(workspace: Path, run: PublishedRun, file: Path) -> None:
    """Upload a file of the workspace to the pipeline's run, in place of an older one of its name."""
    with locked(workspace):
        connect(workspace).log_artifact(run.run_id, workspace / file)


def run_keys(workspace: Path) -> dict[str, str]:
    """The `mergeline.run_key` of every merge; needs the files only, not MLflow."""
    return _merge_keys(*_read(workspace))


def connect(workspace: Path) -> MlflowClient:
    """A client of the server named by MLFLOW_TRACKING_URI, or of the workspace's own database.

    Raises:
        UserError: MLflow does not answer, or cannot read its database.
    """
    os.environ.update(_DEFAULTS | os.environ | _PRIVACY)  # before MLflow is imported
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    own = (workspace / STATE).resolve() / "mlflow.db"
    uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{own}"
    try:
        if uri == f"sqlite:///{own}" and not own.exists():
            _make_database(own)
        client = MlflowClient(tracking_uri=uri)
        client.search_experiments(max_results=1)
    except (MlflowException, SQLAlchemyError) as error:
        reason = f"MLflow at {uri} does not answer ({str(error).splitlines()[0]}); see MLFLOW_TRACKING_URI"
        without_password = re.sub(r"//[^/@\s]+@", "//", reason)
        raise UserError(without_password) from None
    return client


def _make_database(path: Path) -> None:
    """MLflow makes its tables in many steps and cannot go on where a kill stopped it: the file appears whole."""
    from mlflow import MlflowClient

    partial = path.with_name(f".{path.name}.partial")
    for left in path.parent.glob(f"{partial.name}*"):
        left.unlink()
    MlflowClient(tracking_uri=f"sqlite:///{partial}").search_experiments(max_results=1)
    partial.rename(path)


@contextmanager
def locked(workspace: Path) -> Iterator[None]:
    """One process (or thread) at a time publishes from this workspace; the kernel frees a dead one's lock."""
    from filelock import FileLock

    folder = workspace / STATE
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "mlflow.lock"):
        yield


def read_leaderboard(workspace: Path) -> dict[str, Any]:
    """What the compare step found (raises UserError if it has not run)."""
    return _output(workspace / LEADERBOARD)


def candidate_row(board: dict[str, Any]) -> dict[str, Any]:
    """The leaderboard's row of the best merge."""
    return next(row for row in board["rows"] if row["name"] == board["candidate"])


def data_lineage(workspace: Path, board: dict[str, Any]) -> dict[str, str]:
    """The tags that say on which data a leaderboard's tasks were measured: DVC's digests of their folders.

    Of language tasks, a digest of the folder of task files and of the settings they are run with.
    """
    digests = Digests(workspace / STATE / "digests.sqlite")
    language = board.get("language")
    if language:
        folder = digests.of(_present(workspace / language["tasks"]))
        return {f"lineage.data.{task}": text_digest([task, folder, language]) for task in board["tasks"]}
    data = workspace / "build" / "data"
    return {f"lineage.data.{task}": str(digests.of(_present(data / task))) for task in board["tasks"]}


def _output(path: Path) -> dict[str, Any]:
    return read_object(_present(path), mend="delete it and run the pipeline again")


def _present(path: Path) -> Path:
    if not path.exists():
        raise UserError(f"{path}: is missing; run `mergeline run` or `dvc repro` first")
    return path


def _read(workspace: Path) -> tuple[dict[str, Any], list[_Merge]]:
    board = read_leaderboard(workspace)
    data = data_lineage(workspace, board)
    return board, [_read_merge(workspace, data, row) for row in board["rows"] if row["kind"] == "merge"]


def _pipeline_key(board: dict[str, Any], merges: list[_Merge]) -> str:
    return text_digest([board, [[m.name, m.params, m.lineage, m.curve] for m in merges]])


def _merge_keys(board: dict[str, Any], merges: list[_Merge]) -> dict[str, str]:
    """A digest of each merge's parameters, metrics and lineage, and of the pipeline run it is shown below."""
    pipeline = _pipeline_key(board, merges)
    return {m.name: text_digest([pipeline, m.name, m.params, m.metrics, m.lineage]) for m in merges}


def _read_merge(workspace: Path, data: dict[str, str], row: dict[str, Any]) -> _Merge:
    name, build = row["name"], workspace / "build"
    recipe = _output(build / "merges" / name / "manifest.json")["recipe"]
    evaluation, search = build / "evaluations" / name, build / "search" / f"{name}.json"
    lineage = {MODEL_TAG: row["digest"]}
    if recipe["base"]:
        lineage["lineage.base"] = recipe["base"]["digest"]
    lineage |= {f"lineage.expert.{expert}": origin["digest"] for expert, origin in recipe["experts"].items()}
    lineage |= data
    scalars = {key: recipe[key] for key in ("method", "seed", "dtype") if recipe[key] is not None}
    return _Merge(
        name=name,
        method=recipe["method"],
        params=scalars | _flat(recipe["params"]),
        metrics=_row_metrics(row),
        lineage=lineage,
        curve=[point["mean"] for point in _output(search)["points"]],
        files=[_present(evaluation / "scores.json"), _present(evaluation / PREDICTIONS), search],
    )


def _row_metrics(row: dict[str, Any]) -> dict[str, float]:
    metrics = {name: row[name] for name in _ROW_METRICS if row.get(name) is not None}
    for task, found in row.get("perplexity", {}).items():
        metrics |= {f"perplexity.{task}": found["value"], f"bits_per_byte.{task}": found["bits_per_byte"]}
    for task, found in row.get("lm_eval", {}).items():
        # MLflow allows no commas in names.
        metrics |= {f"lm_eval.{task}.{key.replace(',', '.')}": value for key, (value, _) in found.items()}
    return metrics | {f"accuracy.{task}": scores["accuracy"] for task, scores in row["tasks"].items()}


def _flat(params: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested parameters as `outer.inner` names."""
    flat: dict[str, Any] = {}
    for key, value in params.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _experiment(client: MlflowClient, workspace: Path, name: str) -> str:
    """The id of the experiment `name`, which is created, or restored if it was deleted."""
    found = client.get_experiment_by_name(name)
    if found is None:
        on_server = client.tracking_uri.startswith(("http:", "https:"))  # with its own place for artifacts
        artifacts = None if on_server else (workspace / STATE / "mlartifacts").resolve().as_uri()
        return client.create_experiment(name, artifact_location=artifacts)
    if found.lifecycle_stage == "deleted":
        client.restore_experiment(found.experiment_id)
    return found.experiment_id


@contextmanager
def _run(
    client: MlflowClient, experiment_id: str, key: str, name: str, tags: dict[str, str]
) -> Iterator[tuple[str, bool]]:
    """The run of `key` and whether it is new; a new one is finished on leaving the block.

    Runs of that key that a crash left unfinished are deleted.
    """
    for found in client.search_runs([experiment_id], f"tags.`{RUN_KEY}` = '{key}'"):
        if found.info.status == "FINISHED":
            yield found.info.run_id, False
            return
        client.delete_run(found.info.run_id)
    run_id = client.create_run(experiment_id, run_name=name, tags={RUN_KEY: key, **tags}).info.run_id
    try:
        yield run_id, True
    except BaseException:
        client.set_terminated(run_id, "FAILED")
        raise
    client.set_terminated(run_id, "FINISHED")


def _publish_merge(
    client: MlflowClient, experiment_id: str, parent_id: str, merge: _Merge, key: str, commit: dict[str, str]
) -> str:
    tags = {"merge.method": merge.method, **merge.lineage, **commit}
    with _run(client, experiment_id, key, merge.name, tags) as (run_id, fresh):
        # Also where the run is older: it may be the child of a pipeline run that was killed and deleted.
        client.set_tag(run_id, _PARENT_TAG, parent_id)
        if fresh:
            _log(client, run_id, merge.params, merge.metrics, merge.curve)
            client.log_inputs(run_id, _inputs(merge.lineage))
            for file in merge.files:
                client.log_artifact(run_id, file)
    return run_id


def _log(
    client: MlflowClient,
    run_id: str,
    params: dict[str, Any],
    metrics: dict[str, float],
    curve: Sequence[float] = (),
) -> None:
    from mlflow.entities import Metric, Param

    now = int(time.time() * 1000)
    pairs = [Param(key, str(value)) for key, value in params.items()]
    values: list[Metric] = [Metric(key, value, now, 0) for key, value in metrics.items()]
    values += [Metric("search.val_mean", mean, now, step) for step, mean in enumerate(curve)]
    for start in range(0, len(pairs), _PARAMS_PER_CALL):
        client.log_batch(run_id, params=pairs[start : start + _PARAMS_PER_CALL])
    for start in range(0, len(values), _METRICS_PER_CALL):
        client.log_batch(run_id, metrics=values[start : start + _METRICS_PER_CALL])


def _inputs(lineage: dict[str, str]) -> list[DatasetInput]:
    """The checkpoints and datasets a merge was made and judged from, as MLflow shows inputs."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    inputs = []
    for tag, digest in lineage.items():
        kind, _, name = tag.removeprefix("lineage.").partition(".")
        if tag != MODEL_TAG:
            short = digest.removeprefix("sha256:")[:_DIGEST_LENGTH]
            dataset = Dataset(
                name or kind, short, source_type="digest", source=json.dumps({"digest": digest})
            )
            inputs.append(DatasetInput(dataset, [InputTag("mlflow.data.context", kind)]))
    return inputs


def _git_commit(workspace: Path) -> dict[str, str]:
    """The tag `git.commit`, where the workspace is in a repository; no part of any key."""
    try:
        command = ["git", "-C", str(workspace), "rev-parse", "HEAD"]
        found = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:  # no git on this machine
        return {}
    return {"git.commit": found.stdout.strip()} if found.returncode == 0 else {}
