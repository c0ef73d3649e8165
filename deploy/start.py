"""What each service of a team is started by: in the image (compose.yaml), without docker (services.py), or by systemd.

    python start.py prefect | mlflow | worker | buckets

`prefect` and `mlflow` are servers with a password on Postgres, MLflow's files go to S3, and `worker` runs pipelines:
each becomes the program that it starts. `buckets` makes what is missing in S3, and ends. All settings are environment
variables; those without a default here must be set. Secrets stand on no command line.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from tempfile import mkdtemp
from urllib.parse import quote

USER = "mergeline"  # of Postgres, Prefect and MLflow
DATABASES = ("prefect", "mlflow", "mlflow_auth")  # in Postgres, made by databases.sql
BUCKETS = ("mlflow", "dvc")  # in S3: artifacts, and DVC's remote
PORTS = {"prefect": 4200, "mlflow": 5000}

_QUIET = {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # evaluations by language models, which nobody here asks for
    "DVC_NO_ANALYTICS": "1",
}


def prefect() -> tuple[list[str], dict[str, str]]:
    """The server of schedules and runs; PREFECT_PAGES is its address as browsers see it."""
    pages = _setting("PREFECT_PAGES", f"http://127.0.0.1:{PORTS['prefect']}")
    settings = {
        "PREFECT_SERVER_DATABASE_CONNECTION_URL": _database("postgresql+asyncpg", "prefect"),
        "PREFECT_SERVER_API_AUTH_STRING": f"{USER}:{_setting('PREFECT_PASSWORD')}",
        "PREFECT_SERVER_UI_API_URL": f"{pages}/api",
        "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": pages,
    }
    return [*_module("prefect"), "server", "start", *_listening("prefect")], settings


def mlflow() -> tuple[list[str], dict[str, str]]:
    """The server of runs and models. MLFLOW_HOSTS: names that it answers to; the first is what browsers see."""
    hosts = _setting("MLFLOW_HOSTS", f"127.0.0.1:{PORTS['mlflow']},localhost:{PORTS['mlflow']}")
    config = Path(mkdtemp()) / "auth.ini"  # in a folder of its own, readable for its owner alone
    config.write_text(
        "[mlflow]\n"
        "default_permission = READ\n"
        f"database_uri = {_database('postgresql', 'mlflow_auth').replace('%', '%%')}\n"  # as configparser has it
    )
    settings = {
        "MLFLOW_BACKEND_STORE_URI": _database("postgresql", "mlflow"),
        "MLFLOW_AUTH_CONFIG_PATH": str(config),
        "MLFLOW_AUTH_ADMIN_USERNAME": USER,
        "MLFLOW_AUTH_ADMIN_PASSWORD": _setting("MLFLOW_PASSWORD"),
        "MLFLOW_FLASK_SERVER_SECRET_KEY": _setting("MLFLOW_SECRET_KEY"),
        "MLFLOW_SERVER_ALLOWED_HOSTS": hosts,
        "MLFLOW_SERVER_CORS_ALLOWED_ORIGINS": f"http://{hosts.partition(',')[0]}",
    }
    command = [*_module("mlflow"), "server", "--app-name", "basic-auth", *_listening("mlflow")]
    command += ["--workers", _setting("MLFLOW_WORKERS", "2")]
    return [*command, "--artifacts-destination", f"s3://{BUCKETS[0]}"], settings


def worker() -> tuple[list[str], dict[str, str]]:
    """What runs the deployments of a work pool of Prefect's, as processes of its own."""
    pool = ["--pool", _setting("WORK_POOL", "mergeline"), "--type", "process"]
    return [
        *_module("prefect"),
        "worker",
        "start",
        *pool,
        "--with-healthcheck",
        "--install-policy",
        "never",
    ], {}


def buckets() -> None:
    """Make the buckets that are missing."""
    import boto3

    store = boto3.client("s3")
    there = {bucket["Name"] for bucket in store.list_buckets()["Buckets"]}
    for name in BUCKETS:
        if name not in there:
            store.create_bucket(Bucket=name)


def _module(name: str) -> list[str]:
    return [sys.executable, "-P", "-m", name]  # -P: a file of the current folder is no module


def _listening(service: str) -> list[str]:
    return ["--host", _setting("HOST", "127.0.0.1"), "--port", _setting("PORT", str(PORTS[service]))]


def _database(driver: str, name: str) -> str:
    server = _setting("POSTGRES_SERVER", "127.0.0.1:5432")
    return f"{driver}://{USER}:{quote(_setting('POSTGRES_PASSWORD'), safe='')}@{server}/{name}"


def _setting(name: str, default: str = "") -> str:
    value = os.environ.get(name) or default
    if not value:
        sys.exit(f"start.py: set {name} in the environment")
    return value


def main(service: str) -> None:
    os.umask(0o077)
    if service == "buckets":
        buckets()
        return
    command, settings = {"prefect": prefect, "mlflow": mlflow, "worker": worker}[service]()
    os.execve(command[0], command, {**_QUIET, **os.environ, **settings})


if __name__ == "__main__":
    if sys.argv[1:] not in [["prefect"], ["mlflow"], ["worker"], ["buckets"]]:
        sys.exit(__doc__)
    main(sys.argv[1])
