"""`mergeline serve` with its own Prefect server: events start runs, its pages are its owner's, and all ends with it."""

from __future__ import annotations

import json
import signal
import sqlite3
import subprocess
from contextlib import closing
from pathlib import Path
from typing import Any, Iterator, NamedTuple

import psutil
import pytest
import requests
from filelock import FileLock
from prefect_server import artifacts, automations, flow_runs, logs, task_runs, wait_for
from small_workspace import TIME_LIMIT, SmallWorkspace, make_workspace

pytestmark = pytest.mark.slow

ON_LEAP_DAYS = "0 0 29 2 *"  # only events start runs here
END_SECONDS = 30
A_FEW_SECONDS = 15  # generous: on a calm machine it is three
STATE = ".mergeline"
ADDRESS = f"{STATE}/prefect/server.json"
STOPPED = "mergeline: stopped; what was finished is kept, run again to go on\n"


class Served(NamedTuple):
    """A workspace, and the API URL of the server that `mergeline serve` started for it, with its password."""

    workspace: SmallWorkspace
    url: str

    def tell(self) -> None:
        """Tell of a new checkpoint."""
        assert self.workspace.check("mergeline", "notify", "digits").endswith(" of digits\n")

    def notify(self) -> dict[str, Any]:
        """Tell of a new checkpoint; the flow run that this starts, at its end."""
        before = len(self._ended())
        self.tell()
        return wait_for(lambda: self._ended()[before:], TIME_LIMIT)[0]

    def _ended(self) -> list[dict[str, Any]]:
        return flow_runs(self.url, "Completed", "Failed", "Crashed")


def url_of(workspace: SmallWorkspace) -> str:
    """The API URL of a workspace's server, with its password."""
    found = json.loads((workspace.root / ADDRESS).read_text())
    return found["url"].replace("//", f"//{found['login']}@")


def deployed(workspace: SmallWorkspace, owner: subprocess.Popen[str]) -> Served:
    """The workspace that a process serves, as soon as its server knows the deployment."""

    def announced() -> bool:
        assert owner.poll() is None, owner.communicate()
        return (workspace.root / ADDRESS).exists()

    wait_for(announced, TIME_LIMIT)
    url = url_of(workspace)
    wait_for(lambda: automations(url), TIME_LIMIT)
    return Served(workspace, url)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    workspace = make_workspace(tmp_path_factory.mktemp("clone"))
    with workspace.start("mergeline", "serve", "--cron", ON_LEAP_DAYS) as owner:
        yield deployed(workspace, owner)


def test_an_event_starts_a_run(served: Served) -> None:
    run = served.notify()
    assert (run["state_type"], run["created_by"]["type"]) == ("COMPLETED", "AUTOMATION")
    assert artifacts(served.url, run) == {"leaderboard": "table", "report": "markdown", "heatmap": "image"}
    assert {"checkpoint-file@digits", "extract", "merge@cart", "publish"} < set(task_runs(served.url, run))


def test_the_next_run_is_cached(served: Served) -> None:
    tasks = task_runs(served.url, served.notify())
    assert tasks.pop("publish") == "Completed"
    assert set(tasks.values()) == {"Cached"}


def test_bad_input_fails_in_one_line(served: Served) -> None:
    expert = served.workspace.root / "samples/experts/digits.safetensors"
    good = expert.read_bytes()
    expert.write_bytes(b"not a checkpoint")
    try:
        run = served.notify()
    finally:
        expert.write_bytes(good)
    message = run["state"]["message"]
    assert run["state_type"] == "FAILED"
    assert "UserError" in message and "digits.safetensors" in message and "\n" not in message
    tasks = task_runs(served.url, run)
    assert (tasks["checkpoint-file@digits"], tasks["compare"]) == ("Failed", "NotReady")


def test_a_run_waits_for_a_command_that_uses_the_workspace(served: Served) -> None:
    with FileLock(served.workspace.root / STATE / "run.lock"):
        served.tell()
        [run] = wait_for(lambda: flow_runs(served.url, "Running"), TIME_LIMIT)
        wait_for(
            lambda: any("waiting: another run is using" in line for line in logs(served.url, run)), TIME_LIMIT
        )
        refused = served.workspace.run("mergeline", "rollback", "1")
        assert (refused.returncode, "another run is using" in refused.stderr) == (2, True)
    wait_for(lambda: run["id"] in [ended["id"] for ended in flow_runs(served.url, "Completed")], TIME_LIMIT)


# --------------------------------------------------------------------------------------- who may ask


@pytest.mark.parametrize(
    "path", ["admin/version", "flow_runs/filter", "deployments/filter", "docs", "openapi.json"]
)
@pytest.mark.parametrize("login", [None, ("mergeline", "guessed"), ("mergeline", "")])
def test_the_api_asks_for_the_password(served: Served, path: str, login: tuple[str, str] | None) -> None:
    open_url = json.loads((served.workspace.root / ADDRESS).read_text())["url"]
    for method in ("GET", "POST"):
        assert (
            requests.request(method, f"{open_url}/{path}", json={}, auth=login, timeout=30).status_code == 401
        )


@pytest.mark.parametrize(
    "headers", [{"Host": "evil.example"}, {"Host": "evil.example:4200"}, {"Origin": "http://evil.example"}]
)
def test_foreign_names_and_pages_are_refused_with_the_password_too(
    served: Served, headers: dict[str, str]
) -> None:
    answer = requests.post(f"{served.url}/deployments/filter", json={}, headers=headers, timeout=30)
    assert answer.status_code == 403
    assert requests.post(f"{served.url}/deployments/filter", json={}, timeout=30).json()


def test_the_pages_ask_their_owner_for_the_password(served: Served) -> None:
    pages = served.url.removesuffix("/api")
    assert "<html" in requests.get(f"{pages}/", headers={"Accept": "text/html"}, timeout=30).text
    assert requests.get(f"{pages}/ui-settings", timeout=30).json()["auth"] == "BASIC"


def test_what_the_server_keeps_is_its_owners_alone(served: Served) -> None:
    root, login = served.workspace.root, json.loads((served.workspace.root / ADDRESS).read_text())["login"]
    for folder in (STATE, f"{STATE}/prefect"):
        assert (root / folder).stat().st_mode & 0o777 == 0o700, folder
    for file in (ADDRESS, f"{STATE}/prefect/server.log", f"{STATE}/prefect/prefect.db"):
        assert (root / file).stat().st_mode & 0o777 == 0o600, file
    secret = login.partition(":")[2]
    assert len(secret) > 30
    commands = [
        argument for process in psutil.process_iter(["cmdline"]) for argument in process.info["cmdline"] or []
    ]
    assert not any(secret in argument for argument in commands)
    kept = [path for path in (root / STATE).rglob("*") if path.is_file() and path != root / ADDRESS]
    assert not [path for path in kept if secret.encode() in path.read_bytes()]


# --------------------------------------------------------------------------------------- how it ends


@pytest.mark.parametrize(
    "command, sign_of_work",
    [("run", ".mergeline/last_run.json"), ("serve", ADDRESS)],
)
def test_the_server_ends_with_its_owner(command: str, sign_of_work: str, tmp_path: Path) -> None:
    workspace = make_workspace(tmp_path)
    with workspace.start("mergeline", command) as owner:
        wait_for((workspace.root / sign_of_work).exists, TIME_LIMIT)
        children = psutil.Process(owner.pid).children(recursive=True)
        owner.kill()
    _, alive = psutil.wait_procs(children, timeout=END_SECONDS)
    assert children and not alive
    told = workspace.run("mergeline", "notify", "digits")
    assert (told.returncode, "no server to tell" in told.stderr) == (2, True)
    assert not (workspace.root / ADDRESS).exists()


SIGNALS = pytest.mark.parametrize(("sent", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> SmallWorkspace:
    """A workspace whose runs are stopped."""
    return make_workspace(tmp_path_factory.mktemp("stopped"))


def until_searched(workspace: SmallWorkspace, owner: subprocess.Popen[str], before: set[str]) -> None:
    """Wait until a search has ended since; others, and merges, have not."""

    def searched() -> bool:
        assert owner.poll() is None, owner.communicate()
        return bool(searches(workspace) - before)

    wait_for(searched, TIME_LIMIT)


def searches(workspace: SmallWorkspace) -> set[str]:
    """The searches that ran, each with its time."""
    return {f"{path}{path.stat().st_mtime_ns}" for path in (workspace.root / STATE).glob("costs/search@*")}


def change(workspace: SmallWorkspace, code: int) -> None:
    """So that there is something to do."""
    workspace.edit(lambda params: params["merges"]["ties"]["params"].update(density=code / 1000))


@SIGNALS
def test_a_signal_ends_a_run_which_the_next_one_goes_on_with(
    sent: int, code: int, stopped: SmallWorkspace
) -> None:
    change(stopped, code)
    before = searches(stopped)
    with stopped.start("mergeline", "run") as owner:
        until_searched(stopped, owner, before)
        owner.send_signal(sent)
        _, err = owner.communicate(timeout=A_FEW_SECONDS)
    assert owner.returncode == code and err.endswith(STOPPED) and "Traceback" not in err
    with stopped.stages_run() as stages:
        stopped.check("mergeline", "run")
    assert "extract" not in stages and "compare" in stages


@SIGNALS
def test_a_signal_ends_serve_and_its_run(sent: int, code: int, stopped: SmallWorkspace) -> None:
    change(stopped, code + 100)
    before = searches(stopped)
    with stopped.start("mergeline", "serve", "--cron", ON_LEAP_DAYS) as owner:
        deployed(stopped, owner).tell()
        until_searched(stopped, owner, before)
        children = psutil.Process(owner.pid).children(recursive=True)
        owner.send_signal(sent)
        _, err = owner.communicate(timeout=A_FEW_SECONDS)
    assert owner.returncode == code and err.endswith(STOPPED) and "Traceback" not in err
    _, alive = psutil.wait_procs(children, timeout=END_SECONDS)
    assert len(children) > 1 and not alive
    stopped.check("mergeline", "run")


def rows(workspace: SmallWorkspace, table: str) -> int:
    with closing(sqlite3.connect(workspace.root / STATE / "prefect/prefect.db")) as database:
        return database.execute(f"select count(*) from {table}").fetchone()[0]


def test_gc_forgets_old_and_killed_runs_and_its_dry_run_says_the_same(
    stopped: SmallWorkspace,
) -> None:
    with closing(sqlite3.connect(stopped.root / STATE / "prefect/prefect.db")) as database, database:
        database.execute(
            "update flow_run set start_time = '2020-01-01 00:00:00.0', end_time = '2020-01-02 00:00:00.0'"
        )
        last = "(select max(id) from flow_run)"
        database.execute(f"update flow_run set state_type = 'RUNNING', end_time = null where id = {last}")
    runs = rows(stopped, "flow_run")
    # Too much together with the database as it is, and not with what is left of it.
    factors = stopped.root / STATE / "factors/ab/cd.factors"
    factors.parent.mkdir(parents=True, exist_ok=True)
    factors.write_bytes(bytes(100_000))
    files = [f for f in (stopped.root / STATE).glob("factors/*/*.factors")]
    files += (stopped.root / STATE).glob("prefect/prefect.db")
    files += (f for f in (stopped.root / STATE).glob("prefect/storage/**/*") if f.is_file())
    room = sum(file.stat().st_size for file in files) - 50_000
    dry = stopped.check("mergeline", "gc", "--dry-run", "--max-size", f"{room}B")
    assert rows(stopped, "flow_run") == runs > 0
    real = stopped.check("mergeline", "gc", "--max-size", f"{room}B")
    assert f"removed flow runs: {runs}, " in real and factors.exists()
    assert dry.replace("would remove", "removed") == real
    for table in ("flow_run", "task_run", "flow_run_state", "task_run_state", "log"):
        assert rows(stopped, table) == 0, table
