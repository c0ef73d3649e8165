"""The pipeline on a schedule and on events: `mergeline serve`, and `mergeline notify` for a checkpoint that arrived."""

from __future__ import annotations

import asyncio
import signal
import sys
from concurrent.futures import Future
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Coroutine
from uuid import UUID, uuid4

from mergeline.flows.ending import in_thread, own_children, terminable
from mergeline.flows.server import address_file, announce, prefect_server
from mergeline.merging.errors import UserError, did_you_mean
from mergeline.tasks.alerts import tell_of_failure
from mergeline.tasks.credentials import scrubbed, without_credentials

if TYPE_CHECKING:
    from prefect.deployments.runner import RunnerDeployment

    from mergeline.tasks.workspace import Workspace

EVENT = "mergeline.checkpoint.pushed"

_STOP_SECONDS = 6  # for the runner to end its run and to pause the schedule


def serve(workspace: Workspace, cron: str) -> None:
    """Serve the deployment of a workspace until interrupted; its runs start by `cron` and by `EVENT`.

    Raises:
        UserError: a malformed cron expression, or this workspace is served already.
        ServerDied: the embedded server did; the run that was going ends, and the next one goes on with it.
        KeyboardInterrupt: a signal came.
    """
    keep = workspace.params.retention.age
    with terminable(), prefect_server(workspace.state, alone=True, keep=keep) as server:
        from prefect.runner import Runner

        made = deployment(workspace, cron)
        own_children()
        runner = Runner(pause_on_shutdown=True)
        served = runner.add_deployment(made)
        assert not isinstance(served, Coroutine)  # it is one where an event loop runs
        if server.login:  # it is ours, and so were all runs
            _end_dead_runs(served, workspace)
        announce(workspace.state, server)  # whoever finds it is heard: the deployment's triggers are there
        print(f"serving '{workspace.params.name}' by cron '{cron}' and on {EVENT}", flush=True)
        print(_pages(server.url, workspace), flush=True)
        ended = in_thread(lambda: asyncio.run(runner.start()))
        try:
            ended.result()
        except KeyboardInterrupt:
            if runner.started:
                runner.execute_in_background(runner.astop)
                _wait_for_the_end(ended)
            raise


def _end_dead_runs(served: UUID, workspace: Workspace) -> None:
    """Runs whose `mergeline serve` was killed would hold the deployment's one place for ever, and nobody was told."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas import filters
    from prefect.client.schemas.objects import State, StateType
    from prefect.states import Crashed

    active = [StateType.PENDING, StateType.RUNNING, StateType.CANCELLING]
    dead = filters.FlowRunFilter(
        deployment_id=filters.FlowRunFilterDeploymentId(any_=[served]),
        state=filters.FlowRunFilterState(type=filters.FlowRunFilterStateType(any_=active)),
    )
    with get_client(sync_client=True) as client:
        for run in client.read_flow_runs(flow_run_filter=dead):
            state: State[object] = Crashed(message="`mergeline serve` was killed while it ran.")
            client.set_flow_run_state(run.id, state, force=True)
            tell_of_failure(workspace.params.name, workspace.params.alerts, state.message or "", _said)


def _said(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)


def _wait_for_the_end(ended: Future[None]) -> None:
    """The runner ends its run and pauses its schedule; its processes end with this one in any case."""
    try:
        ended.result(_STOP_SECONDS)
    except TimeoutError:
        print("the schedule was not paused: the runner did not end in time", file=sys.stderr)


def show_pages(workspace: Workspace) -> None:
    """Show Prefect's pages of a workspace until interrupted, without running anything.

    Raises:
        UserError: a server of this workspace shows them already.
        KeyboardInterrupt: a signal came.
    """
    keep = workspace.params.retention.age
    with terminable(), prefect_server(workspace.state, alone=True, keep=keep) as server:
        announce(workspace.state, server)
        print(_pages(server.url, workspace), flush=True)
        while True:
            signal.pause()


def _pages(url: str, workspace: Workspace) -> str:
    """Where Prefect's pages are, and what they ask for."""
    pages = f"pages: {without_credentials(url).removesuffix('/api')}"
    file = address_file(workspace.state)
    return f"{pages}; they ask for the login in {file}" if file.exists() else pages


def deployment(workspace: Workspace, cron: str) -> RunnerDeployment:
    """One run at a time; what comes meanwhile waits."""
    from prefect.client.schemas.objects import ConcurrencyLimitConfig, ConcurrencyLimitStrategy
    from prefect.events import DeploymentEventTrigger
    from prefect.types.entrypoint import EntrypointType

    from mergeline.flows.pipeline import pipeline

    name = workspace.params.name
    trigger = DeploymentEventTrigger(
        name=f"{name}: new checkpoint",
        expect={EVENT},
        match={"prefect.resource.id": f"{_resource(workspace)}.*"},
    )
    try:
        made = pipeline.to_deployment(
            name=name,
            cron=cron,
            triggers=[trigger],
            parameters={"params": str(workspace.params_file)},
            concurrency_limit=ConcurrencyLimitConfig(
                limit=1, collision_strategy=ConcurrencyLimitStrategy.ENQUEUE
            ),
            entrypoint_type=EntrypointType.MODULE_PATH,
            description="Fetch, extract, merge, evaluate and register, as params.yaml says.",
        )
    except ValueError as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--cron '{cron}': {reason}; write five fields, such as '0 3 * * *'") from None
    assert not isinstance(made, Coroutine)  # it is one where an event loop runs
    return made


def notify(workspace: Workspace, name: str) -> None:
    """Tell the served deployment that the checkpoint `name` has new content.

    Raises:
        UserError: params.yaml has no such checkpoint, or nobody listens.
    """
    if name not in workspace.params.sources:
        raise UserError(
            f"params.yaml has no checkpoint '{name}'{did_you_mean(name, workspace.params.sources)}"
        )
    event = {
        "id": str(uuid4()),
        "occurred": datetime.now(timezone.utc).isoformat(),
        "event": EVENT,
        "resource": {"prefect.resource.id": f"{_resource(workspace)}.{name}"},
    }
    with prefect_server(workspace.state, start=False) as server:
        from prefect.client.orchestration import get_client
        from prefect.exceptions import ObjectNotFound

        from mergeline.flows.pipeline import pipeline

        told = without_credentials(server.url)
        try:
            with get_client(sync_client=True) as client:
                client.read_deployment_by_name(f"{pipeline.name}/{workspace.params.name}")
                client.request("POST", "/events", json=[event])
        except ObjectNotFound:
            raise UserError(
                f"{told} serves no pipeline '{workspace.params.name}': start `mergeline serve` in this workspace"
            ) from None
        except Exception as error:
            reason = f"{type(error).__name__}: {' '.join(scrubbed(str(error)).split())}"
            raise UserError(f"{told} did not take the event ({reason})") from None
        print(f"told {told} of {name}")


def _resource(workspace: Workspace) -> str:
    return f"mergeline.checkpoint.{workspace.params.name}"
