"""MLflow as a published view of a workspace: one run for the pipeline, one below it for each merge.

The files are the record. Every run has the digest of what it shows as its tag `mergeline.run_key`:
publishing the same results again, from another process or after a crash, finds the runs and writes no
second ones.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Iterator, Sequence
from urllib.parse import urlsplit

from mergeline.evaluation.measures import Measures, measures_of
from mergeline.evaluation.pages.figures import at_use, ranked
from mergeline.merging.canonical import text_digest
from mergeline.merging.errors import UserError
from mergeline.merging.files import read_object, sync, sync_tree
from mergeline.tasks.credentials import scrubbed, without_credentials
from mergeline.tasks.digests import Digests
from mergeline.tasks.evaluate import PREDICTIONS, SCORES
from mergeline.tasks.leaderboard import (
    LEADERBOARD,
    numbers,
    present,
    read_leaderboard,
    read_output,
)
from mergeline.tasks.modalities import modality_named
from mergeline.tasks.modality import Modality
from mergeline.tasks.private import private_folder
from mergeline.tasks.seen import seen
from mergeline.tasks.turns import turn

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import DatasetInput, Metric

STATE = ".mergeline"
RUN_KEY = "mergeline.run_key"
MODEL_TAG = "lineage.model"
AT_USE_TAG = "task.at_use"  # of merges to which the task of an input is known, or found, when they are used

PARENT_TAG = "mlflow.parentRunId"
_SOURCE = {"mlflow.source.name": "mergeline", "mlflow.source.type": "LOCAL"}
_NOTE_TAG = "mlflow.note.content"  # shown as the description of a run
_LONGEST_NOTE = 5000  # characters; MLflow refuses longer tags
_KIND = {"mlflow.experimentKind": "custom_model_development"}  # MLflow's pages then open on the table of runs
_PUBLISHER = "mergeline.publisher"
_UNNAMEABLE = re.compile(r"[^\w. /-]", re.ASCII)  # what MLflow allows in no name of a metric
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
    """What MLflow is told of one merge.

    lineage, words: tags, of digests and for people. curve: of each point of its search the validation mean and the
    numbers among its settings. seconds: that its stages took, where they ran here.
    """

    name: str
    method: str
    params: dict[str, Any]
    metrics: dict[str, float]
    lineage: dict[str, str]
    words: dict[str, str]
    curve: list[dict[str, float]]
    seconds: float
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
        experiment_id = experiment(client, workspace, params["name"])
        common = {**_git_commit(workspace), **_SOURCE, _PUBLISHER: _publisher(workspace)}
        children = {
            merge.name: _publish_merge(client, experiment_id, merge, keys[merge.name], common)
            for merge in merges
        }

        best = next(merge for merge in merges if merge.name == board["candidate"])

        def fill(run_id: str) -> None:
            _log(client, run_id, {"candidate": best.name, **best.params}, best.metrics)
            client.log_artifact(run_id, workspace / LEADERBOARD)

        tags = {"mergeline.candidate": best.name, "merge.method": best.method, **best.words, **common}
        tags[_NOTE_TAG] = _as_markdown(board)
        name = f"{params['name']}: {best.name} {best.metrics['mean']:.3f}"
        seconds = _seconds(workspace, "*")
        run_id = _run(client, experiment_id, _pipeline_key(board, merges), name, tags, seconds, fill)
        for child in children.values():
            client.set_tag(child, PARENT_TAG, run_id)
        for figure in figures:
            client.log_artifact(run_id, figure, "figures")
        _sync_artifacts(client, run_id)
    return PublishedRun(experiment_id, run_id, children)


def attach(workspace: Path, run: PublishedRun, file: Path) -> None:
    """Upload a file of the workspace to the pipeline's run, in place of an older one of its name."""
    with locked(workspace):
        client = connect(workspace)
        client.log_artifact(run.run_id, workspace / file)
        _sync_artifacts(client, run.run_id)


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

    own, uri = _own_database(workspace), tracking_uri(workspace)
    try:
        if uri == f"sqlite:///{own}" and not own.exists():
            _make_database(own)
        client = MlflowClient(tracking_uri=uri)
        client.search_experiments(max_results=1)
    except (MlflowException, SQLAlchemyError) as error:
        raise _unanswered(uri, error) from None
    return client


def _unanswered(uri: str, error: Exception) -> UserError:
    reason, shown = scrubbed(str(error).splitlines()[0]), without_credentials(uri)
    return UserError(f"MLflow at {shown} does not answer ({reason}); see MLFLOW_TRACKING_URI")


def tracking_uri(workspace: Path) -> str:
    """MLFLOW_TRACKING_URI, or that of the workspace's own database."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{_own_database(workspace)}"


def _own_database(workspace: Path) -> Path:
    return (workspace / STATE).resolve() / "mlflow.db"


def registry_name(workspace: Path) -> str:
    """A name for the registry, as that of a folder: `own` is the workspace's own database."""
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    return text_digest(without_credentials(uri)).removeprefix("sha256:")[:12] if uri else "own"


def _make_database(path: Path) -> None:
    """MLflow makes its tables in many steps and cannot go on where a kill stopped it: the file appears whole."""
    from mlflow import MlflowClient

    partial = path.with_name(f".{path.name}.partial")
    for left in path.parent.glob(f"{partial.name}*"):
        left.unlink()
    MlflowClient(tracking_uri=f"sqlite:///{partial}").search_experiments(max_results=1)
    partial.chmod(0o600)
    partial.rename(path)
    sync(path.parent)


@contextmanager
def locked(workspace: Path) -> Iterator[None]:
    """One process (or thread) at a time publishes from this workspace; the kernel frees a dead one's lock.

    Raises:
        UserError: MLflow's server goes away in the block.
    """
    from filelock import FileLock
    from requests import RequestException

    with FileLock(private_folder(workspace / STATE) / "mlflow.lock"):
        try:
            yield
        except Exception as error:
            if not isinstance(error.__context__, RequestException):
                raise
            raise _unanswered(tracking_uri(workspace), error) from None


def digests(workspace: Path) -> Digests:
    """Of the files of a workspace, as DVC has them."""
    return Digests(private_folder(workspace / STATE) / "digests.sqlite")


def data_lineage(workspace: Path, board: dict[str, Any]) -> dict[str, str]:
    """The tags that say on which data a leaderboard's tasks were measured (raises UserError if data are missing)."""
    return modality_named(board["modality"]).lineage(workspace, board, digests(workspace))


def _read(workspace: Path) -> tuple[dict[str, Any], list[_Merge]]:
    board = read_leaderboard(workspace)
    data, modality = data_lineage(workspace, board), modality_named(board["modality"])
    rows = [row for row in board["rows"] if row["kind"] == "merge"]
    return board, [_read_merge(workspace, modality, board, data, row) for row in rows]


def _pipeline_key(board: dict[str, Any], merges: list[_Merge]) -> str:
    return text_digest([board, [[m.name, m.params, m.lineage, m.curve] for m in merges]])


def _merge_keys(board: dict[str, Any], merges: list[_Merge]) -> dict[str, str]:
    """A digest of each merge's parameters, metrics and lineage, and of the pipeline run it is shown below."""
    pipeline = _pipeline_key(board, merges)
    return {m.name: text_digest([pipeline, m.name, m.params, m.metrics, m.lineage]) for m in merges}


def _read_merge(
    workspace: Path, modality: Modality, board: dict[str, Any], data: dict[str, str], row: dict[str, Any]
) -> _Merge:
    measures = measures_of(board)
    name, build = row["name"], workspace / "build"
    recipe = read_output(build / "merges" / name / "manifest.json")["recipe"]
    evaluation, search = build / "evaluations" / name, build / "search" / f"{name}.json"
    lineage = {MODEL_TAG: row["digest"]}
    if recipe["base"]:
        lineage["lineage.base"] = recipe["base"]["digest"]
    lineage |= {f"lineage.expert.{expert}": origin["digest"] for expert, origin in recipe["experts"].items()}
    lineage |= data
    found = seen(read_output(build / "merges" / name / "manifest.json"))
    if at_use(row):
        lineage[AT_USE_TAG] = at_use(row)
    told = ("method", "seed", "dtype", "layout", "requantise")
    scalars = {key: recipe[key] for key in told if recipe.get(key) is not None}
    words = {
        "merge.data": found["data"],
        "merge.seen": found["words"],
        "merge.base": board["lineage"]["base"]["name"],
        "merge.experts": ", ".join(row.get("experts") or board["lineage"]["experts"]),
        "merge.settings": ", ".join(f"{key} {value}" for key, value in row.get("params", {}).items()),
    }
    return _Merge(
        name=name,
        method=found.get("method", recipe["method"]),
        words={tag: text for tag, text in words.items() if text},
        params=scalars | _flat(recipe["params"]),
        metrics=_row_metrics(modality, measures, row) | _gain(board, measures, row),
        lineage=lineage,
        curve=[_point(point) for point in read_output(search)["points"]],
        seconds=_seconds(workspace, f"*@{name}"),
        files=[present(evaluation / SCORES), present(evaluation / PREDICTIONS), search],
    )


def _as_markdown(board: dict[str, Any]) -> str:
    """The leaderboard as a table, best first; as many rows as MLflow takes."""
    title = measures_of(board).mean.title
    lines = [f"| model | mean {title} | interval | worst task |", "|---|---|---|---|"]
    for row in ranked(board):
        name = f"**{row['name']}**" if row["name"] == board["candidate"] else row["name"]
        worst = "" if row["worst_task"] is None else f"{row['worst_task']:.3f}"
        lines.append(f"| {name} | {row['mean']:.3f} | {row['lower']:.3f} - {row['upper']:.3f} | {worst} |")
    while len("\n".join(lines)) > _LONGEST_NOTE:
        lines.pop()
    return "\n".join(lines)


def _point(point: dict[str, Any]) -> dict[str, float]:
    numbers = {
        _UNNAMEABLE.sub("_", key): float(value)
        for key, value in point["params"].items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
    return numbers | {"val_mean": point["mean"]}


def _gain(board: dict[str, Any], measures: Measures, row: dict[str, Any]) -> dict[str, float]:
    """By how much the mean is better than the base's; larger is better, whatever is measured."""
    base = next((found for found in board["rows"] if found["kind"] == "base"), None)
    if base is None:
        return {}
    return {"gain_over_base": measures.mean.turned(row["mean"]) - measures.mean.turned(base["mean"])}


def _seconds(workspace: Path, stages: str) -> float:
    """That stages, by a pattern of their names, took when they last ran here."""
    costs = (workspace / STATE / "costs").glob(f"{stages}.json")
    return sum(float(read_object(file).get("seconds", 0)) for file in costs)


def _row_metrics(modality: Modality, measures: Measures, row: dict[str, Any]) -> dict[str, float]:
    """The numbers of a row by names; those of tasks by what they measure and the task, such as `accuracy.digits`."""
    scores = {
        f"{_UNNAMEABLE.sub('_', measures.of(task).name)}.{task}": found["accuracy"]
        for task, found in row["tasks"].items()
    }
    return numbers(row) | modality.metrics(row) | scores


def _flat(params: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested parameters as `outer.inner` names."""
    flat: dict[str, Any] = {}
    for key, value in params.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def experiment(client: MlflowClient, workspace: Path, name: str) -> str:
    """The id of the experiment `name`, which is created, or restored if it was deleted."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        on_server = client.tracking_uri.startswith(("http:", "https:"))  # with its own place for artifacts
        artifacts = None if on_server else (workspace / STATE / "mlartifacts").resolve().as_uri()
        try:
            return client.create_experiment(name, artifact_location=artifacts, tags=dict(_KIND))
        except MlflowException as error:
            found = client.get_experiment_by_name(name)
            if found is None or error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise  # else another publisher was quicker
    if found.lifecycle_stage == "deleted":
        client.restore_experiment(found.experiment_id)
    return found.experiment_id


def _run(
    client: MlflowClient,
    experiment_id: str,
    key: str,
    name: str,
    tags: dict[str, str],
    seconds: float,
    fill: Callable[[str], None],
) -> str:
    """The finished run of `key`: the one that is there, or a new one, whatever `fill` puts into it.

    Of publishers that fill one at the same time the first to finish is believed. Runs that a crash of this workspace
    left unfinished are deleted.
    """
    if found := _finished(client, experiment_id, key):
        return found
    for left in client.search_runs([experiment_id], f"tags.`{RUN_KEY}` = '{key}'"):
        if left.data.tags.get(_PUBLISHER) == tags[_PUBLISHER]:
            client.delete_run(left.info.run_id)
    started = int(
        (time.time() - seconds) * 1000
    )  # so that what it shows as its duration is that of the stages
    run_id = client.create_run(experiment_id, started, {**tags, RUN_KEY: key}, name).info.run_id
    try:
        fill(run_id)
        _sync_artifacts(client, run_id)
    except BaseException:
        client.set_terminated(run_id, "FAILED")
        raise
    with turn(client, experiment_id):
        first = _finished(client, experiment_id, key)
        if first is None:
            client.set_terminated(run_id, "FINISHED")
            return run_id
    client.delete_run(run_id)
    return first


def _finished(client: MlflowClient, experiment_id: str, key: str) -> str | None:
    query = f"tags.`{RUN_KEY}` = '{key}' and attributes.status = 'FINISHED'"
    return next((run.info.run_id for run in client.search_runs([experiment_id], query)), None)


def _publisher(workspace: Path) -> str:
    """A digest of who publishes: this workspace on this machine. It is no part of any key."""
    return text_digest([platform.node(), str(workspace.resolve())])


def _publish_merge(
    client: MlflowClient, experiment_id: str, merge: _Merge, key: str, common: dict[str, str]
) -> str:
    def fill(run_id: str) -> None:
        _log(client, run_id, merge.params, merge.metrics, merge.curve)
        with turn(client, experiment_id):  # MLflow fails where two write the same data set for the first time
            client.log_inputs(run_id, _inputs(merge.lineage))
        for file in merge.files:
            client.log_artifact(run_id, file)

    tags = {"merge.method": merge.method, **merge.words, **common, **merge.lineage}  # names before digests
    return _run(client, experiment_id, key, merge.name, tags, merge.seconds, fill)


def _sync_artifacts(client: MlflowClient, run_id: str) -> None:
    """Put a run's files on the disk if MLflow keeps them on this machine, as its database puts the run there."""
    from mlflow.utils.file_utils import local_file_uri_to_path

    uri = client.get_run(run_id).info.artifact_uri
    if urlsplit(uri).scheme not in ("", "file"):
        return
    folder = Path(local_file_uri_to_path(uri))
    if folder.is_dir():
        sync_tree(folder)
        for above in list(folder.parents)[:3]:  # the run, all runs, and where they lie
            sync(above)


def _log(
    client: MlflowClient,
    run_id: str,
    params: dict[str, Any],
    metrics: dict[str, float],
    curve: Sequence[dict[str, float]] = (),
) -> None:
    from mlflow.entities import Metric, Param

    now = int(time.time() * 1000)
    pairs = [Param(key, str(value)) for key, value in params.items()]
    values: list[Metric] = [Metric(key, value, now, 0) for key, value in metrics.items()]
    for step, point in enumerate(curve):
        values += [Metric(f"search.{key}", value, now, step) for key, value in point.items()]
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
