"""Registering: the candidate becomes a model version, whose files are kept; if the gates pass, the champion.

Nothing written before the last call, which moves the alias `champion`, matters to those who load the champion; each
write is found again by the digest, so a run after a crash completes what is missing. Where another publisher moves the
alias meanwhile, the candidate is judged anew.
"""

from __future__ import annotations

import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Iterator

from pydantic import ValidationError

from mergeline.evaluation.measures import Measures, measures_of
from mergeline.evaluation.pages.figures import at_use
from mergeline.merging.errors import UserError, plainly
from mergeline.merging.files import write_json
from mergeline.tasks import tracking
from mergeline.tasks.evaluate import PREDICTIONS, read_outcomes
from mergeline.tasks.gates import Champion, Checks, Finding, Gates, Verdict, judge, misplaced
from mergeline.tasks.kept import Say, file_problem, keep, place_of, silent
from mergeline.tasks.leaderboard import candidate_row, read_leaderboard
from mergeline.tasks.modalities import modality_named
from mergeline.tasks.modality import Modality
from mergeline.tasks.publication import VERDICT, load_verdict
from mergeline.tasks.registry import (
    CANDIDATE,
    CHAMPION,
    MD5_TAG,
    MERGE_TAG,
    URI_TAG,
    Version,
    as_it_is,
    as_version,
    promote,
    version_by_alias,
    versions,
)
from mergeline.tasks.schema import Registering
from mergeline.tasks.serving.store import is_loadable, is_seen, make_loadable
from mergeline.tasks.turns import turn

if TYPE_CHECKING:
    import numpy as np
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel

    from mergeline.tasks.serving.contract import Served


SCORE_TAG = "score"  # of a version: the mean of its tasks on the test split, and its interval
_MODEL = (
    "The best merges of a pipeline: `candidate` is that of its last run, `champion` passed the gates. What they found "
    "stands in the description of each version."
)

Serving = Callable[[dict[str, Any]], "Served | str"]


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
    def files(self) -> Path:
        """Where they lie, seen from the workspace."""
        return Path("build/merges") / self.name

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
    workspace: Path,
    params: dict[str, Any],
    run: tracking.PublishedRun | None = None,
    say: Say = silent,
    serving: Serving | None = None,
) -> Registration:
    """Register the best merge, and make it champion if it passes the gates.

    `run` is what `tracking.publish` returned; without it the workspace is published first. The outcome is also left
    in `.mergeline/verdict.json`. A candidate whose files do not have the digest of its row in the leaderboard is not
    registered at all. say: is told what is done with its files. serving: of a row of the leaderboard, how that merge is
    served or why it is not; without it MLflow can name the version, and not load it.

    Raises:
        UserError: a step's output is missing, the gates are malformed, or MLflow, or DVC's remote, does not answer.
    """
    board, model = read_leaderboard(workspace), params["name"]
    modality = modality_named(board["modality"])
    gates = _gates(params, modality.gates(), measures_of(board))
    settings = Registering.model_validate(params.get("registry") or {})
    candidate = _candidate(workspace, board, modality, run or tracking.publish(workspace, params))
    with tracking.locked(workspace):
        client = tracking.connect(workspace)
        problem = file_problem(workspace, candidate.files, candidate.digest)
        version, place = None, candidate.files
        if not problem:
            version, place = _register(client, workspace, model, candidate, settings, say)

        def loadable(version: Version) -> None:
            if serving and not is_loadable(client, version):
                how = serving(candidate.row)
                if isinstance(how, str):
                    say(f"MLflow can name version {version.version}, and not load it: {how}")
                else:
                    limit = settings.most_bytes
                    files = workspace / place
                    make_loadable(client, workspace, version, files, candidate.modality, how, limit, say)

        if version and is_seen(version):  # it costs nothing
            loadable(version)
        while True:
            before = version_by_alias(client, model, CHAMPION)
            is_champion = before is not None and candidate.is_version(before)
            if before and is_champion:
                verdict = _already_champion(candidate, before, problem)
                version = version or before
                break
            verdict = _judge(client, workspace, candidate, version, before, gates, problem)
            if version:
                findings = "\n".join(f"- {f.sentence}" for f in verdict.findings)
                client.update_model_version(model, version.version, findings)
            if not (verdict.passed and version):
                break
            loadable(version)
            if promote(client, candidate.experiment_id, before, version):
                break
            say("the champion changed meanwhile: the candidate is judged anew")
        number = version.version if version else None
        old = before.version if before else None
        new = number if verdict.passed else old
        outcome = Registration(verdict.passed, verdict.findings, candidate.name, number, old, new)
        if not (old == new == number and _promoted(workspace) == number):
            write_json(workspace / tracking.STATE / VERDICT, asdict(outcome))
    return outcome


def champion(workspace: Path, params: dict[str, Any]) -> Version | None:
    """The current champion, if there is one (raises UserError if MLflow does not answer)."""
    with tracking.locked(workspace):
        return version_by_alias(tracking.connect(workspace), params["name"], CHAMPION)


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
    version: Version | None,
    before: Version | None,
    gates: Gates,
    problem: str,
) -> Verdict:
    outcomes = _outcomes(workspace, workspace / candidate.predictions, candidate)
    rival = _rival(client, workspace, candidate, before) if before else None
    own = [*_taken_down(client, version), *candidate.modality.findings(candidate.row, candidate.base, gates)]
    return judge(candidate.row, outcomes, rival, gates, candidate.checks(problem), own)


def _taken_down(client: MlflowClient, version: Version | None) -> Iterator[Finding]:
    """Whether the candidate was champion and is not to be, as the registry says by now."""
    if version and (down := as_it_is(client, version).taken_down):
        sentence = (
            f"Version {version.version} was rolled back to version {down}: `mergeline rollback {version.version}` "
            "alone makes it champion again."
        )
        yield Finding("rolled_back", False, sentence)


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


def _register(
    client: MlflowClient,
    workspace: Path,
    model: str,
    candidate: _Candidate,
    settings: Registering,
    say: Say,
) -> tuple[Version, Path]:
    """Keep the candidate's files, and write what is missing of its version and of the alias `candidate`.

    The version, and where the files are kept here, seen from the workspace.
    """
    name = tracking.registry_name(workspace)
    digests = tracking.digests(workspace)
    md5 = keep(workspace, workspace / candidate.files, name, digests, settings.push, say)
    place = place_of(name, md5)
    with turn(client, candidate.experiment_id):
        if not client.search_registered_models(f"name = '{model}'"):
            client.create_registered_model(model, description=_MODEL)
        found = [v for v in versions(client, model) if candidate.is_version(v)]
        version = found[0] if found else _create_version(client, model, candidate, md5, place)
        client.set_registered_model_alias(model, CANDIDATE, version.version)
    return version, place


def _create_version(
    client: MlflowClient, model: str, candidate: _Candidate, md5: str, files: Path
) -> Version:
    row = candidate.row
    tags = {
        MERGE_TAG: candidate.name,
        SCORE_TAG: f"{row['mean']:.3f} ({row['lower']:.3f} - {row['upper']:.3f})",
        URI_TAG: files.as_posix(),
        tracking.MODEL_TAG: candidate.digest,
        MD5_TAG: md5,
    }
    if candidate.at_use:
        tags[tracking.AT_USE_TAG] = candidate.at_use
    logged = _logged_model(client, candidate, tags)
    # What `models:/ID` stands for: given that URI, MLflow's SQL store would look in its global tracking URI.
    source = logged.artifact_location
    version = client.create_model_version(
        model, source, candidate.run_id, tags, model_id=logged.model_id, await_creation_for=0
    )
    return as_version(version)


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
