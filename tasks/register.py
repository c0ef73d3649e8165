"""The registry: the candidate becomes a model version by reference; if the gates pass, the champion.

A version holds the checkpoint's place in the workspace and its digest, not its bytes. Nothing written
before the last call, which moves the alias `champion`, matters to those who load the champion; each write
is found again by the digest, so a run after a crash completes what is missing.
"""

from __future__ import annotations

import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from mergeline.evaluation.measures import Measures, measures_of
from mergeline.evaluation.pages.figures import at_use
from mergeline.merging.errors import UserError, plainly
from mergeline.merging.files import write_json
from mergeline.tasks import tracking
from mergeline.tasks.evaluate import PREDICTIONS, read_outcomes
from mergeline.tasks.gates import Champion, Checks, Finding, Gates, Verdict, judge, misplaced
from mergeline.tasks.leaderboard import candidate_row, read_leaderboard
from mergeline.tasks.modalities import modality_named
from mergeline.tasks.modality import Modality
from mergeline.tasks.publication import VERDICT, load_verdict

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
    at_use: str = ""  # as `tasks.leaderboard.at_use` says it


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
    modality: Modality
    measures: Measures
    experiment_id: str
    run_id: str

    @property
    def name(self) -> str:
        return self.row["name"]

    @property
    def digest(self) -> str:
        return self.row["digest"]

    @property
    def at_use(self) -> str:
        return at_use(self.row)

    @property
    def uri(self) -> str:
        return f"build/merges/{self.name}"

    def is_version(self, version: Version) -> bool:
        """Whether a version is this candidate: adapters beside the same weights make another model of them."""
        return version.digest == self.digest and version.at_use == self.at_use

    @property
    def predictions(self) -> str:
        return f"build/evaluations/{self.name}/{PREDICTIONS}"

    def checks(self, reload_problem: str) -> Checks:
        """What the gates know besides the candidate's row."""
        accuracy = {task: scores["accuracy"] for task, scores in self.base.get("tasks", {}).items()}
        return Checks(reload_problem, accuracy, self.measures)


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
    board = read_leaderboard(workspace)
    modality = modality_named(board["modality"])
    gates = _gates(params, modality.gates(), measures_of(board))
    candidate = _candidate(workspace, board, modality, run or tracking.publish(workspace, params))
    with tracking.locked(workspace):
        client = tracking.connect(workspace)
        before = _version_by_alias(client, params["name"], CHAMPION)
        problem = _file_problem(workspace, candidate.uri, candidate.digest)
        if before and candidate.is_version(before):
            verdict = _already_champion(candidate, before, problem)
            version: str | None = before.version
        else:
            verdict = _judge(client, workspace, candidate, before, gates, problem)
            version = None if problem else _register(client, params["name"], candidate, verdict)
        old = before.version if before else None
        new = version if verdict.passed else old
        outcome = Registration(verdict.passed, verdict.findings, candidate.name, version, old, new)
        if not (old == new == version and _promoted(workspace) == version):
            write_json(workspace / tracking.STATE / VERDICT, asdict(outcome))
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
    """The version that the last verdict here made champion: its findings say more than "was champion already"."""
    last = load_verdict(workspace / tracking.STATE) or {}
    return last.get("champion_after") if last.get("passed") else None


def _gates(params: dict[str, Any], kind: type[Gates], measures: Measures) -> Gates:
    try:
        gates = kind.model_validate(params.get("gates") or {})
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"params.yaml: gates.{'.'.join(map(str, first['loc']))}: {plainly(first)}") from None
    for gate, problem in misplaced(gates, measures):
        raise UserError(f"params.yaml: gates.{gate}: {problem}")
    return gates


def _candidate(
    workspace: Path, board: dict[str, Any], modality: Modality, run: tracking.PublishedRun
) -> _Candidate:
    return _Candidate(
        row=candidate_row(board),
        base=next((row for row in board["rows"] if row["kind"] == "base"), {}),
        data=tracking.data_lineage(workspace, board),
        modality=modality,
        measures=measures_of(board),
        experiment_id=run.experiment_id,
        run_id=run.merges[board["candidate"]],
    )


def _already_champion(candidate: _Candidate, before: Version, problem: str) -> Verdict:
    sentence = f"The candidate {candidate.name} was the champion already (version {before.version})."
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
    outcomes = _outcomes(workspace, workspace / candidate.predictions, candidate)
    rival = _rival(client, workspace, candidate, before) if before else None
    own = candidate.modality.findings(candidate.row, candidate.base, gates)
    return judge(candidate.row, outcomes, rival, gates, candidate.checks(problem), own)


def _rival(client: MlflowClient, workspace: Path, candidate: _Candidate, before: Version) -> Champion:
    """The champion with its published predictions on the candidate's data, or why there are none."""
    if before.at_use != candidate.at_use:
        was, now = (how or "unknown" for how in (before.at_use, candidate.at_use))
        obstacle = (
            f"Champion version {before.version} ({before.merge}) cannot be compared: the task of an input is {was} to "
            f"it at use, and {now} to {candidate.name}; keep such merges in a pipeline of another `name`."
        )
        return Champion(before.version, obstacle=obstacle)
    query = f"tags.`{tracking.MODEL_TAG}` = '{before.digest}' and attributes.status = 'FINISHED'"
    for run in client.search_runs([candidate.experiment_id], query):
        same_class = run.data.tags.get(tracking.AT_USE_TAG, "") == candidate.at_use
        if same_class and candidate.data.items() <= run.data.tags.items():
            with tempfile.TemporaryDirectory() as folder:
                file = client.download_artifacts(run.info.run_id, PREDICTIONS, folder)
                return Champion(before.version, _outcomes(workspace, Path(file), candidate))
    obstacle = (
        f"Champion version {before.version} ({before.merge}) cannot be compared: the test data changed since "
        "it was evaluated; evaluate it on them again, as one of the merges."
    )
    return Champion(before.version, obstacle=obstacle)


def _outcomes(workspace: Path, predictions: Path, candidate: _Candidate) -> dict[str, np.ndarray]:
    """For each task, the outcomes on the test examples (N) that a predictions file comes to."""
    return read_outcomes(
        candidate.modality, workspace / "build", predictions, "test", list(candidate.row["tasks"])
    )


def _file_problem(workspace: Path, uri: str, digest: str) -> str:
    """Why the files at `uri` are not those of `digest`, or ""."""
    from mergeline.merging.checkpoints.checkpoint import open_checkpoint

    try:
        found = open_checkpoint(workspace / uri).digest()
    except UserError as error:
        return f"The checkpoint does not open: {error}."
    return "" if found == digest else f"The files in {uri} have the digest {found}, not {digest}."


def _register(client: MlflowClient, model: str, candidate: _Candidate, verdict: Verdict) -> str:
    """Write what is missing of the candidate's version and aliases; returns the version's number."""
    if not client.search_registered_models(f"name = '{model}'"):
        client.create_registered_model(model)
    found = [v.version for v in _versions(client, model) if candidate.is_version(v)]
    version = found[0] if found else _create_version(client, model, candidate)
    client.update_model_version(model, version, "\n".join(f"- {f.sentence}" for f in verdict.findings))
    client.set_registered_model_alias(model, CANDIDATE, version)
    if verdict.passed:
        client.set_registered_model_alias(model, CHAMPION, version)
    return version


def _create_version(client: MlflowClient, model: str, candidate: _Candidate) -> str:
    tags = {_URI_TAG: candidate.uri, _MERGE_TAG: candidate.name, tracking.MODEL_TAG: candidate.digest}
    if candidate.at_use:
        tags[tracking.AT_USE_TAG] = candidate.at_use
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
        if found.tags.get(tracking.AT_USE_TAG, "") != candidate.at_use:
            continue
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
    return Version(
        str(found.version), merge, uri, digest, found.run_id, found.tags.get(tracking.AT_USE_TAG, "")
    )
