"""The registry: the candidate becomes a model version by reference; if the gates pass, the champion.

A version holds the checkpoint's place in the workspace and its digest, not its bytes. Nothing written
before the last call, which moves the alias `champion`, matters to those who load the champion; each write
is found again by the digest, so a run after a crash completes what is missing.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from merging.errors import UserError
from merging.files import write_json
from tasks import tracking
from tasks.evaluate import which_are_right
from tasks.gates import Champion, Checks, Finding, Gates, Verdict, judge

if TYPE_CHECKING:
    import numpy as np
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel

CANDIDATE, CHAMPION = "candidate", "champion"
_URI_TAG, _MERGE_TAG = "uri", "merge.name"


@dataclass(frozen=True)
class Version:
    """A version of the registered model: which merge it is, where it lies in the workspace, its digest."""

    version: str
    merge: str
    uri: str
    digest: str
    run_id: str


@dataclass(frozen=True)
class Registration(Verdict):
    """The verdict on the candidate and the versions it concerns; a version is None where there is none."""

    candidate: str
    version: str | None
    champion_before: str | None
    champion_after: str | None


@dataclass(frozen=True)
class _Candidate:
    """What the workspace says of the best merge. `data` holds the tags that name the data of its tasks."""

    row: dict[str, Any]
    base: dict[str, Any]
    data: dict[str, str]
    language: bool
    experiment_id: str
    run_id: str

    @property
    def name(self) -> str:
        return self.row["name"]

    @property
    def digest(self) -> str:
        return self.row["digest"]

    @property
    def uri(self) -> str:
        return f"build/merges/{self.name}"

    @property
    def predictions(self) -> str:
        return f"build/evaluations/{self.name}/{tracking.PREDICTIONS}"

    def checks(self, reload_problem: str) -> Checks:
        """What the gates are told besides the candidate's row."""
        accuracy = {task: scores["accuracy"] for task, scores in self.base.get("tasks", {}).items()}
        perplexity = {task: found["value"] for task, found in self.base.get("perplexity", {}).items()}
        return Checks(reload_problem, accuracy, perplexity)


def register(
    workspace: Path, params: dict[str, Any], run: tracking.PublishedRun | None = None
) -> Registration:
    """Register the best merge, and make it champion if it passes the gates.

    `run` is what `tracking.publish` returned; without it the workspace is published first. The outcome is also left
    in `.mergeline/verdict.json`. A candidate whose files do not have the digest of its row in the leaderboard is not
    registered at all.

    Raises:
        UserError: a step's output is missing, the gates are malformed, or MLflow does not answer.
    """
    gates = _gates(params)
    candidate = _candidate(workspace, run or tracking.publish(workspace, params))
    with tracking.locked(workspace):
        client = tracking.connect(workspace)
        before = _version_by_alias(client, params["name"], CHAMPION)
        problem = _file_problem(workspace, candidate.uri, candidate.digest)
        if before and before.digest == candidate.digest:
            verdict, version = _already_champion(candidate, before, problem), before.version
        else:
            verdict = _judge(client, workspace, candidate, before, gates, problem)
            version = None if problem else _register(client, params["name"], candidate, verdict)
        old = before and before.version
        new = version if verdict.passed else old
        outcome = Registration(verdict.passed, verdict.findings, candidate.name, version, old, new)
        if not (old == new == version and _promoted(workspace) == version):
            write_json(workspace / tracking.STATE / "verdict.json", asdict(outcome))
    return outcome


def rollback(workspace: Path, params: dict[str, Any], version: str) -> Version:
    """Make an earlier version champion again.

    Raises:
        UserError: there is no such version, or its files do not have the digest it was registered with.
    """
    model = params["name"]
    with tracking.locked(workspace):
        client = tracking.connect(workspace)
        versions = {v.version: v for v in _versions(client, model)}
        target = versions.get(str(version))
        if target is None:
            known = ", ".join(sorted(versions, key=int)) or "none"
            raise UserError(f"{model}: has no version {version}; there are: {known}")
        if problem := _file_problem(workspace, target.uri, target.digest):
            mend = "Bring its files back with `git checkout` and `dvc checkout`."
            raise UserError(f"{model} version {version}: {problem} {mend}")
        client.set_registered_model_alias(model, CHAMPION, target.version)
    return target


def champion(workspace: Path, params: dict[str, Any]) -> Version | None:
    """The current champion, if there is one (raises UserError if MLflow does not answer)."""
    with tracking.locked(workspace):
        return _version_by_alias(tracking.connect(workspace), params["name"], CHAMPION)


def _promoted(workspace: Path) -> str | None:
    """The version that the last verdict here made champion: its findings say more than "is champion already"."""
    path = workspace / tracking.STATE / "verdict.json"
    last = json.loads(path.read_text()) if path.exists() else {}
    return last.get("champion_after") if last.get("passed") else None


def _gates(params: dict[str, Any]) -> Gates:
    try:
        return Gates.model_validate(params.get("gates") or {})
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"params.yaml: gates.{'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def _candidate(workspace: Path, run: tracking.PublishedRun) -> _Candidate:
    board = tracking.read_leaderboard(workspace)
    return _Candidate(
        row=tracking.candidate_row(board),
        base=next((row for row in board["rows"] if row["kind"] == "base"), {}),
        data=tracking.data_lineage(workspace, board),
        language="language" in board,
        experiment_id=run.experiment_id,
        run_id=run.merges[board["candidate"]],
    )


def _already_champion(candidate: _Candidate, before: Version, problem: str) -> Verdict:
    sentence = f"The candidate {candidate.name} is the champion already (version {before.version})."
    findings = [
        Finding("champion", True, sentence),
        *([Finding("reload", False, problem)] if problem else []),
    ]
    return Verdict(not problem, findings)


def _judge(
    client: MlflowClient,
    workspace: Path,
    candidate: _Candidate,
    before: Version | None,
    gates: Gates,
    problem: str,
) -> Verdict:
    correct = _correct(workspace, workspace / candidate.predictions, candidate)
    rival = before and _rival(client, workspace, candidate, before)
    return judge(candidate.row, correct, rival, gates, candidate.checks(problem))


def _rival(client: MlflowClient, workspace: Path, candidate: _Candidate, before: Version) -> Champion:
    """The champion with its published predictions on the candidate's data, or why there are none."""
    query = f"tags.`{tracking.MODEL_TAG}` = '{before.digest}' and attributes.status = 'FINISHED'"
    for run in client.search_runs([candidate.experiment_id], query):
        if candidate.data.items() <= run.data.tags.items():
            with tempfile.TemporaryDirectory() as folder:
                file = client.download_artifacts(run.info.run_id, tracking.PREDICTIONS, folder)
                return Champion(before.version, _correct(workspace, Path(file), candidate))
    obstacle = (
        f"Champion version {before.version} ({before.merge}) cannot be compared: the test data changed since "
        "it was evaluated; evaluate it on them again, as one of the merges."
    )
    return Champion(before.version, obstacle=obstacle)


def _correct(workspace: Path, predictions: Path, candidate: _Candidate) -> dict[str, np.ndarray]:
    """For each task, which test examples a predictions file gets right (bool, N)."""
    from safetensors.numpy import load_file

    predicted = load_file(predictions)
    data = None if candidate.language else workspace / "build" / "data"
    return {
        task: which_are_right(predicted[f"test/{task}"], data and data / task / "test_y.npy")
        for task in candidate.row["tasks"]
    }


def _file_problem(workspace: Path, uri: str, digest: str) -> str:
    """Why the files at `uri` are not those of `digest`, or ""."""
    from merging.checkpoint import open_checkpoint

    try:
        found = open_checkpoint(workspace / uri).digest()
    except UserError as error:
        return f"The checkpoint does not open: {error}."
    return "" if found == digest else f"The files in {uri} have the digest {found}, not {digest}."


def _register(client: MlflowClient, model: str, candidate: _Candidate, verdict: Verdict) -> str:
    """Write what is missing of the candidate's version and aliases; returns the version's number."""
    if not client.search_registered_models(f"name = '{model}'"):
        client.create_registered_model(model)
    found = [v.version for v in _versions(client, model) if v.digest == candidate.digest]
    version = found[0] if found else _create_version(client, model, candidate)
    client.update_model_version(model, version, "\n".join(f"- {f.sentence}" for f in verdict.findings))
    client.set_registered_model_alias(model, CANDIDATE, version)
    if verdict.passed:
        client.set_registered_model_alias(model, CHAMPION, version)
    return version


def _create_version(client: MlflowClient, model: str, candidate: _Candidate) -> str:
    tags = {_URI_TAG: candidate.uri, _MERGE_TAG: candidate.name, tracking.MODEL_TAG: candidate.digest}
    logged = _logged_model(client, candidate, tags)
    # What `models:/ID` stands for: given that URI, MLflow's SQL store would look in its global tracking URI.
    source = logged.artifact_location
    version = client.create_model_version(
        model, source, candidate.run_id, tags, model_id=logged.model_id, await_creation_for=0
    )
    return str(version.version)


def _logged_model(client: MlflowClient, candidate: _Candidate, tags: dict[str, str]) -> LoggedModel:
    """MLflow's entity for a model whose files lie elsewhere, found by digest or made.

    As `mlflow.create_external_model`, which knows only the global tracking URI.
    """
    from mlflow.entities import LoggedModelOutput
    from mlflow.utils.mlflow_tags import MLFLOW_MODEL_IS_EXTERNAL

    query = f"tags.`{tracking.MODEL_TAG}` = '{candidate.digest}'"
    for found in client.search_logged_models([candidate.experiment_id], filter_string=query):
        if found.status == "READY":
            return found
        client.delete_logged_model(found.model_id)  # its maker was killed
    logged = client.create_logged_model(
        candidate.experiment_id, candidate.name, candidate.run_id, {**tags, MLFLOW_MODEL_IS_EXTERNAL: "true"}
    )
    client.log_outputs(candidate.run_id, [LoggedModelOutput(logged.model_id, step=0)])
    return client.finalize_logged_model(logged.model_id, "READY")


def _version_by_alias(client: MlflowClient, model: str, alias: str) -> Version | None:
    for registered in client.search_registered_models(f"name = '{model}'"):
        if alias in registered.aliases:
            return _as_version(client.get_model_version(model, str(registered.aliases[alias])))
    return None


def _versions(client: MlflowClient, model: str) -> list[Version]:
    return [_as_version(found) for found in client.search_model_versions(f"name = '{model}'")]


def _as_version(found: Any) -> Version:
    merge, uri, digest = (found.tags.get(tag, "") for tag in (_MERGE_TAG, _URI_TAG, tracking.MODEL_TAG))
    return Version(str(found.version), merge, uri, digest, found.run_id)
