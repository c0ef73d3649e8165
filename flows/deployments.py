"""The pipeline on a schedule and on events: `mergeline serve`, and `mergeline notify` for a checkpoint that arrived."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from flows.server import announced_server, prefect_server
from merging.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from prefect.deployments.runner import RunnerDeployment

    from tasks.workspace import Workspace

EVENT = "mergeline.checkpoint.pushed"


def serve(workspace: Workspace, cron: str) -> None:
    """Serve the deployment of a workspace until interrupted; its runs start by `cron` and by `EVENT`.

    Raises:
        UserError: a malformed cron expression.
    """
    with prefect_server(workspace.state, announce=True) as url:
        import prefect

        print(
            f"serving '{workspace.params.name}' by cron '{cron}' and on {EVENT}; pages: {url.removesuffix('/api')}"
        )
        prefect.serve(deployment(workspace, cron))


def deployment(workspace: Workspace, cron: str) -> RunnerDeployment:
    """One run at a time; what comes meanwhile waits."""
    from prefect.client.schemas.objects import ConcurrencyLimitConfig, ConcurrencyLimitStrategy
    from prefect.deployments.runner import EntrypointType
    from prefect.events import DeploymentEventTrigger

    from flows.pipeline import pipeline

    name = workspace.params.name
    trigger = DeploymentEventTrigger(
        name=f"{name}: new checkpoint",
        expect={EVENT},
        match={"prefect.resource.id": f"{_resource(workspace)}.*"},
    )
    try:
        return pipeline.to_deployment(
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


def notify(workspace: Workspace, name: str) -> None:
    """Tell the served deployment that the checkpoint `name` has new content.

    Raises:
        UserError: params.yaml has no such checkpoint, or nobody listens.
    """
    if name not in workspace.params.sources:
        raise UserError(
            f"params.yaml has no checkpoint '{name}'{did_you_mean(name, workspace.params.sources)}"
        )
    if not (os.environ.get("PREFECT_API_URL") or announced_server(workspace.state)):
        raise UserError(
            "no server to tell: start `mergeline serve` in this workspace, or set PREFECT_API_URL"
        )
    with prefect_server(workspace.state) as url:
        from prefect.events import emit_event

        emit_event(EVENT, resource={"prefect.resource.id": f"{_resource(workspace)}.{name}"})
        print(f"told {url} of {name}")


def _resource(workspace: Workspace) -> str:
    return f"mergeline.checkpoint.{workspace.params.name}"
