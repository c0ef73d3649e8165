"""What deploy/ and prefect.yaml say: no default passwords, ports on loopback, the commands that start.py knows."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from typing import Any

import pytest
from places import REPOSITORY
from ruamel.yaml import YAML

from mergeline.flows.deployments import EVENT
from mergeline.tasks.params import load_params

DEPLOY = REPOSITORY / "deploy"
COMPOSE: dict[str, Any] = YAML(typ="safe").load(DEPLOY / "compose.yaml")
EXAMPLE = dict(
    line.split("=") for line in (DEPLOY / ".env.example").read_text().splitlines() if re.match("[A-Z]", line)
)
START = runpy.run_path(str(DEPLOY / "start.py"))
SECRETS = ("POSTGRES_PASSWORD", "PREFECT_PASSWORD", "MLFLOW_PASSWORD", "MLFLOW_SECRET_KEY")


def test_the_variables_of_compose_are_those_of_the_example_and_secrets_have_no_default():
    text = (DEPLOY / "compose.yaml").read_text()
    used = dict(re.findall(r"\$\{(\w+)(:[-?])", text))
    assert used.keys() == EXAMPLE.keys()
    required = {name for name, how in used.items() if how == ":?"}
    assert required == {name for name, value in EXAMPLE.items() if not value} - {"TORCH_INDEX"}
    assert {*SECRETS, "S3_ACCESS_KEY", "S3_SECRET_KEY", "WORKSPACE"} == required
    assert not re.search(r"PASSWORD\w*: (?!.*\$\{\w+:\?)", text)


def test_ports_are_published_on_loopback_and_all_that_stays_is_looked_after():
    for name, service in COMPOSE["services"].items():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ())), name
        if service["restart"] == "unless-stopped":
            assert service["healthcheck"]["test"], name
        for needed in service.get("depends_on", ()):
            assert needed in COMPOSE["services"]
    assert not any(image.endswith(":latest") for image in re.findall("image: (.*)", str(COMPOSE)))


def test_the_image_is_started_by_what_the_script_starts():
    ours = [service for service in COMPOSE["services"].values() if "build" in service]
    assert sorted(command for service in ours for command in service["command"]) == [
        "buckets",
        "mlflow",
        "prefect",
        "worker",
    ]
    script = (DEPLOY / "services.py").read_text()
    assert all(f'"{name}"' in script for name in ("buckets", "mlflow", "prefect"))
    for name in re.findall("^!(.*)$", (DEPLOY / "Dockerfile.dockerignore").read_text(), re.MULTILINE):
        assert (REPOSITORY / name).exists(), name


def test_no_secret_stands_on_a_command_line(monkeypatch):
    for name in SECRETS:
        monkeypatch.setenv(name, f"{name}/@:% ")
    for service in ("prefect", "mlflow", "worker"):
        command, settings = START[service]()
        assert not any(name in " ".join(command) for name in SECRETS)
    _, settings = START["prefect"]()
    url = settings["PREFECT_SERVER_DATABASE_CONNECTION_URL"]
    assert url == "postgresql+asyncpg://mergeline:POSTGRES_PASSWORD%2F%40%3A%25%20@127.0.0.1:5432/prefect"


def test_what_is_not_set_is_said_in_one_line():
    command = [sys.executable, DEPLOY / "start.py", "prefect"]
    done = subprocess.run(command, env={}, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr == "start.py: set POSTGRES_PASSWORD in the environment\n"


def test_deployments_of_prefect_yaml_can_be_deployed_also_those_in_comments():
    pytest.importorskip("prefect")
    from prefect.cli.deploy._models import PrefectYamlModel

    from mergeline.flows.pipeline import pipeline

    text = (REPOSITORY / "prefect.yaml").read_text()
    found = [YAML(typ="safe").load(text)]
    inside = re.findall(r"^  # (- name:.*\n(?:  #   .*\n)*)", text, re.MULTILINE)
    for block in inside:
        found.append({"deployments": YAML(typ="safe").load(re.sub("^  # ", "", block, flags=re.MULTILINE))})
    assert len(inside) == 3
    for entry in found:
        [deployment] = PrefectYamlModel.model_validate(entry).deployments
        assert deployment.name == load_params(REPOSITORY / "params.yaml").name
        assert deployment.entrypoint == f"{pipeline.fn.__module__}.{pipeline.fn.__name__}"
        assert deployment.concurrency_limit.limit == 1
        assert deployment.work_pool.name
    [trigger] = found[0]["deployments"][0]["triggers"]
    assert trigger["expect"] == [EVENT]
    assert trigger["match"] == {"prefect.resource.id": "mergeline.checkpoint.sample-clip.*"}


def test_automations_are_prefects_and_outlast_what_is_expected_between_two_heartbeats():
    pytest.importorskip("prefect")
    from prefect.client.schemas.objects import StateType
    from prefect.events.schemas.automations import AutomationCore

    [entry] = YAML(typ="safe").load(DEPLOY / "automations.yaml")["automations"]
    automation = AutomationCore.model_validate(entry)
    every = 180  # seconds, unless deploy/start.py started the worker
    assert automation.trigger.within.total_seconds() > 2 * every
    assert automation.trigger.expect >= {"prefect.flow-run.heartbeat", "prefect.flow-run.Completed"}
    [action] = automation.actions
    assert action.type == "change-flow-run-state" and action.state == StateType.CRASHED
