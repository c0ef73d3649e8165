"""The pipeline as a Prefect flow: one task run a stage, cached by the digests that DVC records."""

from __future__ import annotations

import json
import os
import threading
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, Callable, Collection, Iterator, Sequence
from uuid import UUID

from prefect import Flow, flow, get_client, get_run_logger, task
from prefect.cache_policies import CachePolicy
from prefect.client.schemas.objects import FlowRun, State, TaskRun
from prefect.context import FlowRunContext, TaskRunContext
from prefect.futures import PrefectFuture
from prefect.logging.loggers import flow_run_logger
from prefect.runtime import flow_run
from prefect.settings import PREFECT_LOCAL_STORAGE_PATH
from prefect.states import Completed, Crashed
from prefect.task_runners import TaskRunner, ThreadPoolTaskRunner
from prefect.tasks import Task, exponential_backoff
from pydantic import ValidationError

from mergeline.flows.cli import text
from mergeline.flows.ending import end_with_owner, hasty, in_thread, is_owned
from mergeline.flows.retention import removable, remove
from mergeline.merging.canonical import text_digest
from mergeline.merging.errors import UserError
from mergeline.tasks import alerts, spread, versioning
from mergeline.tasks.evaluations import afresh
from mergeline.tasks.params import raw_params
from mergeline.tasks.publication import is_published
from mergeline.tasks.records import noted_run, remember
from mergeline.tasks.schema import Alerts
from mergeline.tasks.status import chosen_stages, refuse_missing, vouched
from mergeline.tasks.step import Stage
from mergeline.tasks.workspace import Workspace

# A task that waits for another holds a thread of the runner, so threads are many and cores are counted here.
_THREADS = 64
_CORES = threading.BoundedSemaphore(os.cpu_count() or 1)
_RETRIES_OF_DOWNLOADS = 4
_REPORT_SECONDS = 3
_DID_NOT_RUN = ("Cached", "Restored")  # names of task states: known to Prefect's cache, or to DVC's

if is_owned():  # before Prefect asks its server for the run: where that is gone, it asks for minutes
    end_with_owner()


@cache
def _workspace(params_file: str, _modified: int) -> Workspace:
    return Workspace(params_file)


def open_workspace(params_file: str) -> Workspace:
    """The workspace of a params.yaml; the same object for all tasks of a run."""
    return _workspace(params_file, Path(params_file).stat().st_mtime_ns)


class ByContent(CachePolicy):
    """The key is the digest of parameters, dependencies and code; a record counts only while its outputs are there."""

    def compute_key(
        self, task_ctx: TaskRunContext, inputs: dict[str, Any], flow_parameters: dict[str, Any], **_: Any
    ) -> str | None:
        workspace = open_workspace(inputs["params"])
        stage = _stage(workspace, inputs["name"])
        key = text_digest(workspace.record(stage)).removeprefix("sha256:")
        stored = Path(PREFECT_LOCAL_STORAGE_PATH.value()) / key
        if stored.exists() and workspace.outputs(stage) != _recorded_outputs(stored):
            stored.unlink()
        return key


def _recorded_outputs(stored: Path) -> dict[str, str] | None:
    try:
        return json.loads(json.loads(stored.read_text())["result"])["outs"]
    except (ValueError, KeyError, TypeError):  # a record that a kill cut short
        return None


def _stage(workspace: Workspace, name: str) -> Stage:
    return next(stage for stage in workspace.stages if stage.name == name)


def _may_retry(_task: Task, _run: TaskRun, state: State) -> bool:
    """The user's mistakes do not go away by trying again."""
    error = state.result(raise_on_failure=False)
    return not isinstance(error, UserError)


@task(
    task_run_name="{name}",
    cache_policy=ByContent(),
    persist_result=True,
    result_serializer="json",
    retry_delay_seconds=exponential_backoff(backoff_factor=2),
    retry_jitter_factor=0.5,
    retry_condition_fn=_may_retry,
)
def run_stage(params: str, name: str, force: bool = False) -> State[dict[str, Any]]:
    """Run one stage unless dvc.lock or its last run here vouches for its outputs, or in any case (`force`).

    The result is its record with its outputs' digests.
    """
    workspace = open_workspace(params)
    stage = _stage(workspace, name)
    record = workspace.record(stage)
    restored = not force and (
        vouched(workspace, stage, record) or versioning.restore(workspace, stage, record)
    )
    if not restored:
        with _CORES, afresh(force):
            workspace.run(stage)
    whole = {**record, "outs": workspace.outputs(stage)}
    remember(workspace, stage, whole)
    return Completed(name="Restored" if restored else None, data=whole)


@task(task_run_name="publish", retries=2, retry_delay_seconds=5, retry_condition_fn=_may_retry)
def publish_run(params: str) -> dict[str, Any]:
    """Publish to MLflow, register the candidate, and show the results in Prefect's pages; nothing if all is there.

    A champion that was rolled back stays what it is until there is something new to judge.
    """
    workspace, log = open_workspace(params), get_run_logger().info
    if is_published(workspace):
        log("nothing to publish: it is what was published last")
        run_id = None
    else:
        from mergeline.flows.artifacts import show
        from mergeline.tasks.publish import publish

        published = publish(workspace, log)
        show(workspace, published)
        run_id = published.run_id
    alerts.tell_of_verdict(workspace, _said(log))
    return {"run_id": run_id}


def _said(log: Callable[[str], object]) -> Callable[[str], None]:
    """Says a sentence on Prefect's pages and on the terminal."""

    def say(sentence: str) -> None:
        log(sentence)
        text.note(sentence)

    return say


def _run_name() -> str:
    """The name in params.yaml, or that of its folder where params.yaml is at fault."""
    file = Path(flow_run.parameters["params"]).absolute()
    try:
        return str(raw_params(file)["name"])
    except (UserError, KeyError, TypeError):
        return file.parent.name


def _tell_of_failure(flow: Flow[..., Any], flow_run: FlowRun, state: State) -> None:
    """Called by Prefect, by these names, when a run has failed, and by who runs it when its process was killed."""
    file = _opened.get(flow_run.id) or Path(flow_run.parameters["params"])
    say = _said(flow_run_logger(flow_run, flow).info)
    try:
        raw = raw_params(file)
        to = Alerts.model_validate(raw.get("alerts") or {})  # the rest of the file may be what is wrong
    except (UserError, ValidationError, AttributeError) as error:
        say(f"no alerts of this failure: {str(error).splitlines()[0]}")
        return
    name = str(raw.get("name", file.parent.name))
    alerts.tell_of_failure(name, to, state.message or state.name or "", say)


_opened: dict[UUID, Path] = {}  # the params.yaml of flow runs of this process
_started: list[UUID] = []  # the flow run of this process


def report_stop() -> None:
    """Tell Prefect, as far as there is time, that this process ends its flow run, which would run on in its records."""

    def tell() -> None:
        with get_client(sync_client=True) as client:
            for run in _started:
                client.set_flow_run_state(run, Crashed(message="It was stopped by a signal."), force=True)

    with suppress(Exception):  # the process ends because it was told to, whatever the server says
        in_thread(tell).result(_REPORT_SECONDS)


_THREAD_POOL: TaskRunner[Any] = ThreadPoolTaskRunner(max_workers=_THREADS)


@flow(
    name="mergeline",
    flow_run_name=_run_name,
    task_runner=_THREAD_POOL,
    on_failure=[_tell_of_failure],
    on_crashed=[_tell_of_failure],
)
def pipeline(
    params: str = "params.yaml",
    publish: bool = True,
    only: list[str] | None = None,
    force: list[str] | None = None,
) -> list[str]:
    """Run every stage of `params` that is stale, record the run in dvc.lock, publish it; returns the stages that ran.

    only: merges, stages or steps to run, with what they need, and without publishing. force: those that run although
    they are up to date.

    Raises:
        UserError: bad input, or another run in this workspace.
    """
    params = str(Path(params).absolute())
    if run_id := flow_run.id:
        _opened[UUID(run_id)] = Path(params)
    workspace = open_workspace(params)
    if unset := alerts.without_address(workspace.params.alerts):
        _said(get_run_logger().warning)(f"nobody is told by {', '.join(unset)}: not set in the environment")
    os.chdir(workspace.root)
    chosen, forced = chosen_stages(workspace, only or [], force or [])
    one_thread_a_worker()
    with _alone(workspace), noted_run(workspace) as ran:
        workspace.tidy()
        refuse_missing(workspace, chosen)
        with spread.over(workspace.params.executor):
            records = _run_stages(workspace, params, chosen, forced, ran)
        versioning.commit(workspace, records, ran)
        if publish and not only:
            publish_run(params)
        _forget_the_old(workspace)
    get_run_logger().info("%d of %d stages ran", len(ran), len(records))
    return ran


def _forget_the_old(workspace: Workspace) -> None:
    keep = workspace.params.retention
    gone = removable(workspace, keep.age, keep.bytes)
    remove(gone)
    if gone:
        size = text.size(sum(entry.bytes for entry in gone))
        get_run_logger().info("removed %d old files and leftovers, %s", len(gone), size)


@contextmanager
def _alone(workspace: Workspace) -> Iterator[None]:
    """With the workspace's lock. A run of a deployment waits for it, and ends soon after a signal or its runner."""
    context = FlowRunContext.get()
    run = context and context.flow_run
    if run:
        _started.append(run.id)
    if not (run and run.deployment_id):
        with workspace.lock():
            yield
        return
    end_with_owner()
    log = get_run_logger()
    with hasty(), workspace.lock(wait=lambda: log.info("waiting: another run is using %s", workspace.root)):
        yield


def one_thread_a_worker() -> None:
    """Two tasks run side by side; each computes on one thread."""
    import torch

    torch.set_num_threads(1)


def _run_stages(
    workspace: Workspace, params: str, chosen: Sequence[Stage], forced: Collection[str], ran: list[str]
) -> dict[str, Any]:
    """The records of the chosen stages after they ran; the names of those that really did go into `ran`."""
    futures: dict[str, PrefectFuture] = {}
    for stage in chosen:
        upstream = [futures[needed.name] for needed in workspace.needs(stage)]
        force = stage.name in forced
        task = _task_for(workspace, stage).with_options(refresh_cache=force)
        futures[stage.name] = task.submit(params, stage.name, force, wait_for=upstream)
    for future in futures.values():
        future.wait()
    ran += [
        name
        for name, future in futures.items()
        if future.state.is_completed() and future.state.name not in _DID_NOT_RUN
    ]
    for future in futures.values():
        if future.state.is_failed() or future.state.is_crashed():
            future.result()
    records = {name: future.result() for name, future in futures.items()}
    for stage in chosen:  # those that Prefect's cache knew, too
        remember(workspace, stage, records[stage.name])
    return records


def _task_for(workspace: Workspace, stage: Stage) -> Task:
    step = workspace.steps[stage.step]
    gpu = step.on_device and workspace.params.device != "cpu"
    return run_stage.with_options(
        retries=_RETRIES_OF_DOWNLOADS if step.downloads else 1,
        tags=[step.name, *(["gpu"] if gpu else [])],
    )
