"""Fixtures that several test files share."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any, Callable, Iterator, NamedTuple

import pytest
from hypothesis import HealthCheck, settings

from mergeline.tasks.private import private_folder

REPOSITORY = Path(__file__).parent.parent

# Few examples of a property, for a default set that ends in minutes; EXAMPLES=200 asks for more.
settings.register_profile(
    "any machine",
    deadline=None,
    max_examples=int(os.environ.get("EXAMPLES", "25")),
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("any machine")

# A shell that runs the tests in the background has them ignore Ctrl-C, and so would the processes that they start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


class Outcome(NamedTuple):
    """What a command left: exit code, stdout, stderr."""

    code: int
    out: str
    err: str


@pytest.fixture
def mergeline(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Outcome]:
    """The command line, in this process; the current folder is put back after the test."""
    monkeypatch.chdir(Path.cwd())

    def run(*arguments: Any) -> Outcome:
        from mergeline.flows.cli import main

        capsys.readouterr()
        try:
            code = main([str(a) for a in arguments])
        except SystemExit as exit:  # --help
            code = exit.code or 0
        return Outcome(code, *capsys.readouterr())

    return run


@pytest.fixture(params=["cpu", pytest.param("accelerator", marks=pytest.mark.slow)])
def anywhere(request: pytest.FixtureRequest) -> Iterator[None]:
    """On the CPU, and once more on a device that refuses its tensors, which is that of pipelines that name none."""
    if request.param == "cpu":
        yield
        return
    from accelerator import accelerator, default_device

    with accelerator() as name, default_device(name):
        yield


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    """A workspace of three sample experts, with the dvc.yaml of this repository; nothing has run in it."""
    from ruamel.yaml import YAML

    tasks = ("digits", "shapes", "textures")
    samples = REPOSITORY / "samples"
    params = {
        "name": "small",
        "checkpoints": {
            "layout": "as_is",
            "files": {
                "base": str(samples / "base"),
                **{t: str(samples / "experts" / f"{t}.safetensors") for t in tasks},
            },
            "uris": {},
        },
        "seed": 0,
        "base": "base",
        "experts": list(tasks),
        "datasets": {
            "image_size": 36,
            "files": {t: str(samples / "data" / f"{t}.npz") for t in tasks},
            "uris": {},
        },
        "suite": str(samples / "suite.yaml"),
        "merges": {
            "average": {"method": "average"},
            "cart": {"method": "cart", "search": {"rank": [0.1, 0.5], "scale": [1.0, 2.0]}},
        },
    }
    root = tmp_path / "workspace"
    root.mkdir()
    YAML().dump(params, root / "params.yaml")
    graph = (REPOSITORY / "dvc.yaml").read_text()
    (root / "dvc.yaml").write_text(graph.replace("- code: .", f"- code: {REPOSITORY}", 1))
    return root


@pytest.fixture(scope="session")
def mlflow_database(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], None]:
    """Puts an empty MLflow database into a workspace; to make one costs more than to copy it."""
    from mergeline.tasks import tracking

    empty = tmp_path_factory.mktemp("mlflow")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        tracking.connect(empty)

    def put(root: Path) -> None:
        private_folder(root / tracking.STATE)
        shutil.copy(empty / tracking.STATE / "mlflow.db", root / tracking.STATE)

    return put


@pytest.fixture
def tmpfs(tmp_path: Path) -> Callable[..., Path]:
    """Mounts of a small memory file system, `tmpfs("size=1m")`; skips where mounting is not permitted."""
    mounted: list[Path] = []

    def mount(options: str) -> Path:
        folder = tmp_path / f"mount{len(mounted)}"
        folder.mkdir()
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True, text=True
        )
        if done.returncode:
            pytest.skip(f"mounting is not permitted here: {done.stderr.strip()}")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", folder], check=True)
