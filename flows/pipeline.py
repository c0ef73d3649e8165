"""The pipeline as a Prefect flow: one task run a stage, cached by the digests that DVC records."""

from __future__ import annotations

import json
import os
import threading
from functools import cache
from pathlib import Path
from typing import Any

from prefect import flow, get_run_logger, task
from prefect.cache_policies import CachePolicy
from prefect.client.schemas.objects import State, TaskRun
from prefect.context import TaskRunContext
from prefect.futures import PrefectFuture
from prefect.runtime import flow_run
from prefect.settings import PREFECT_LOCAL_STORAGE_PATH
from prefect.states import Completed
from prefect.task_runners import ThreadPoolTaskRunner
from prefect.tasks import Task, exponential_backoff

from merging.errors import UserError
from merging.recipe import text_digest
from tasks import versioning
from tasks.graph import Stage
from tasks.params import raw_params
from tasks.workspace import Workspace

_DOWNLOADS = ("fetch", "data")
# A task that waits for another holds a thread of the runner, so threads are many and cores are counted here.
_THREADS = 64
_CORES = threading.BoundedSemaphore(os.cpu_count() or 1)
_DID_NOT_RUN = ("Cached", "Restored")  # names of task states: known to Prefect's cache, or to DVC's
_ON_DEVICE = ("search", "merge-all", "evaluate", "baselines")


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
def run_stage(params: str, name: str) -> State[dict[str, Any]]:
    """Run one stage unless dvc.lock vouches for its outputs; the result is its record with its outputs' digests."""
    workspace = open_workspace(params)
    stage = _stage(workspace, name)
    record = workspace.record(stage)
    restored = versioning.restore(workspace, stage, record)
    if not restored:
        with _CORES:
            workspace.run(stage)
    return Completed(name="Restored" if restored else None, data={**record, "outs": workspace.outputs(stage)})


@task(task_run_name="publish", retries=2, retry_delay_seconds=5, retry_condition_fn=_may_retry)
def publish_run(params: str) -> dict[str, Any]:
    """Publish to MLflow, register the candidate, and show the results in Prefect's pages."""
    from flows.artifacts import show
    from tasks.publish import publish

    workspace = open_workspace(params)
    published = publish(workspace)
    show(workspace, published)
    return {"run_id": published.run_id}


def _run_name() -> str:
    """The name in params.yaml, or that of its folder where params.yaml is at fault."""
    file = Path(flow_run.parameters["params"]).absolute()
    try:
        return str(raw_params(file)["name"])
    except (UserError, KeyError, TypeError):
        return file.parent.name


@flow(name="mergeline", flow_run_name=_run_name, task_runner=ThreadPoolTaskRunner(max_workers=_THREADS))
def pipeline(params: str = "params.yaml", publish: bool = True) -> list[str]:
    """Run every stage of `params` that is stale, record the run in dvc.lock, publish it; returns the stages that ran.

    Raises:
        UserError: bad input, or another run in this workspace.
    """
    params = str(Path(params).absolute())
    workspace = open_workspace(params)
    os.chdir(workspace.root)
    one_thread_a_worker()
    with workspace.lock():
        workspace.tidy()
        records, ran = _run_stages(workspace, params)
        versioning.commit(workspace, records, ran)
        if publish:
            publish_run(params)
    get_run_logger().info("%d of %d stages ran", len(ran), len(records))
    return ran


def one_thread_a_worker() -> None:
    """Two tasks run side by side; each computes on one thread."""
    import torch

    torch.set_num_threads(1)


def _run_stages(workspace: Workspace, params: str) -> tuple[dict[str, Any], list[str]]:
    futures: dict[str, PrefectFuture] = {}
    for stage in workspace.stages:
        upstream = [futures[needed.name] for needed in workspace.needs(stage)]
        futures[stage.name] = _task_for(workspace, stage).submit(params, stage.name, wait_for=upstream)
    for future in futures.values():
        future.wait()
    for future in futures.values():
        if future.state.is_failed() or future.state.is_crashed():
            future.result()
    records = {name: future.result() for name, future in futures.items()}
    return records, [name for name, future in futures.items() if future.state.name not in _DID_NOT_RUN]


def _task_for(workspace: Workspace, stage: Stage) -> Task:
    gpu = stage.step in _ON_DEVICE and workspace.params.device != "cpu"
    return run_stage.with_options(
        retries=4 if stage.step in _DOWNLOADS else 1,
        tags=[stage.step, *(["gpu"] if gpu else [])],
    )
