"""The servers of a team, as deploy/services.py starts them: Postgres, S3, and Prefect and MLflow with passwords."""

from __future__ import annotations

import shlex
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator

import pytest
from places import REPOSITORY

_SCRIPT = REPOSITORY / "deploy/services.py"
_START_SECONDS = 400
_END_SECONDS = 60

needs_postgres = pytest.mark.skipif(
    not shutil.which("initdb") and not list(Path("/usr/lib/postgresql").glob("*/bin/initdb")),
    reason="Postgres is not installed",
)


@contextmanager
def started(folder: Path) -> Iterator[tuple[subprocess.Popen[bytes], dict[str, str]]]:
    """The process of the script during the block, and what clients of its services have in their environment."""
    file = folder / "services.env"
    with open(folder / "services.log", "wb") as log:
        script = subprocess.Popen([sys.executable, _SCRIPT, file], stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + _START_SECONDS
        while not file.exists():
            assert script.poll() is None and time.monotonic() < deadline, (
                folder / "services.log"
            ).read_text()
            time.sleep(0.2)
        lines = (line.removeprefix("export ").partition("=") for line in file.read_text().splitlines())
        yield script, {name: shlex.split(value)[0] for name, _, value in lines}
    finally:
        script.send_signal(signal.SIGTERM)
        script.wait(_END_SECONDS)
