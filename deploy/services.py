"""The services of compose.yaml without docker, to try them and for tests: Postgres, S3, Prefect and MLflow.

    python deploy/services.py [FILE]

They listen on free ports of loopback and have passwords that are new each time. FILE (default: services.env) then
holds what clients need, to be read by `. FILE`. They end together: by Ctrl-C, SIGTERM, kill -9 of this process, or
because one of them ended alone. So does what they have stored: Postgres has it in a temporary folder, and moto's S3
server, which believes any password, in memory. It takes Postgres (Debian: postgresql), and
`pip install 'mergeline[pipeline,s3,server]' 'moto[server]'`.
"""

from __future__ import annotations

import os
import pwd
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import mkdtemp
from threading import Event, Thread

from start import BUCKETS, USER

_HERE = Path(__file__).parent
_START_SECONDS = 300  # on a busy machine
_END_SECONDS = 15
_POLL_SECONDS = 0.2


class Ended(Exception):
    """A service ended, or is not to be waited for any more."""


def postgres_programs() -> Path | None:
    """The folder of Postgres's programs: on PATH, or where Debian has them; None where it is not installed."""
    if found := shutil.which("initdb"):
        return Path(found).resolve().parent
    installed = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda file: int(file.parts[4]))
    return installed[-1].parent if installed else None


def serve(stop: Event, file: Path) -> None:
    """All services, until `stop` is set; `file` holds what clients need as long as they run.

    Raises:
        Ended: a service ended alone, or did not start.
    """
    with ExitStack() as running:
        logs = running.enter_context(_folder())
        start = _Starter(running, logs, stop)
        postgres, postgres_password = _postgres(start)
        store = _s3(start)
        for_all = {"POSTGRES_SERVER": postgres, "POSTGRES_PASSWORD": postgres_password, **store}
        start.to_its_end([sys.executable, _HERE / "start.py", "buckets"], for_all)
        ports = {"prefect": _free_port(), "mlflow": _free_port()}
        prefect, mlflow = (f"127.0.0.1:{port}" for port in ports.values())
        passwords = {name: secrets.token_urlsafe(24) for name in ports}
        settings = {
            "PREFECT_PAGES": f"http://{prefect}",
            "PREFECT_PASSWORD": passwords["prefect"],
            "MLFLOW_HOSTS": mlflow,
            "MLFLOW_PASSWORD": passwords["mlflow"],
            "MLFLOW_SECRET_KEY": secrets.token_urlsafe(24),
            "MLFLOW_WORKERS": "1",
            "PREFECT_HOME": str(logs / "prefect"),
            "TMPDIR": str(logs),
        }
        for name, port in ports.items():
            command = [sys.executable, _HERE / "start.py", name]
            start(name, command, {**for_all, **settings, "PORT": str(port)})
        start.wait("prefect", lambda: _answers(f"http://{prefect}/api/health"))
        start.wait("mlflow", lambda: _answers(f"http://{mlflow}/health"))
        clients = {
            "PREFECT_API_URL": f"http://{prefect}/api",
            "PREFECT_API_AUTH_STRING": f"{USER}:{passwords['prefect']}",
            "MLFLOW_TRACKING_URI": f"http://{mlflow}",
            "MLFLOW_TRACKING_USERNAME": USER,
            "MLFLOW_TRACKING_PASSWORD": passwords["mlflow"],
            **store,
            "MERGELINE_POSTGRES": f"postgresql://{USER}:{postgres_password}@{postgres}",
        }
        running.enter_context(_written(file, clients))
        print(f"Prefect http://{prefect}, MLflow http://{mlflow}: user {USER}, passwords in {file}")
        print(f"S3 {store['AWS_ENDPOINT_URL']}, buckets {' and '.join(BUCKETS)}; Postgres {postgres}")
        print(f"in your shell: . {file}", flush=True)
        while not stop.wait(_POLL_SECONDS):
            start.check()


class _Starter:
    """Starts programs that end with `running`, last ones first; what they say goes to files in `logs`."""

    def __init__(self, running: ExitStack, logs: Path, stop: Event):
        self.running, self.logs, self.stop = running, logs, stop
        self._programs: dict[str, subprocess.Popen[bytes]] = {}

    def __call__(
        self,
        name: str,
        command: list[str | Path],
        more: dict[str, str],
        user: str | None = None,
        end: int = signal.SIGTERM,
    ) -> None:
        with open(self.logs / f"{name}.log", "wb") as log:
            program = subprocess.Popen(
                command,
                env={**os.environ, **more},
                cwd=self.logs if user is None else "/",
                user=user,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # it ends as one group
            )
        self._programs[name] = program
        self.running.callback(_end, program, end)

    def to_its_end(self, command: list[str | Path], more: dict[str, str], user: str | None = None) -> None:
        """Run what ends by itself."""
        done = subprocess.run(
            command, env={**os.environ, **more}, cwd="/", user=user, capture_output=True, text=True
        )
        if done.returncode:
            raise Ended(f"{Path(command[0]).name} failed: {(done.stderr or done.stdout).strip()[-1000:]}")

    def wait(self, name: str, ready: Callable[[], bool]) -> None:
        deadline = time.monotonic() + _START_SECONDS
        while not ready():
            self.check()
            if self.stop.wait(_POLL_SECONDS):
                raise Ended("stopped before all services had started")
            if time.monotonic() > deadline:
                raise Ended(f"{name} does not answer: {self._last_words(name)}")

    def check(self) -> None:
        for name, program in self._programs.items():
            if program.poll() is not None:
                raise Ended(f"{name} ended: {self._last_words(name)}")

    def _last_words(self, name: str) -> str:
        return (self.logs / f"{name}.log").read_text(errors="replace")[-2000:]


def _postgres(start: _Starter) -> tuple[str, str]:
    """Postgres with its databases; its address, and the password of USER. It refuses to run as root."""
    programs = postgres_programs()
    if programs is None:
        raise Ended("Postgres is not installed (Debian: apt-get install postgresql)")
    user = _other_user() if os.geteuid() == 0 else None
    password, port = secrets.token_urlsafe(24), _free_port()
    folder = start.running.enter_context(_folder())
    (folder / "password").write_text(password)
    if user:
        for path in (folder, folder / "password"):
            shutil.chown(path, user)
    data = folder / "data"
    make = [programs / "initdb", "--no-sync", "--encoding=UTF8", "--locale=C", f"--username={USER}"]
    make += ["--auth=scram-sha-256", f"--pwfile={folder / 'password'}", f"--pgdata={data}"]
    start.to_its_end(make, {}, user)
    settings = ["listen_addresses=127.0.0.1", f"port={port}", "unix_socket_directories=", "fsync=off"]
    options = [part for setting in settings for part in ("-c", setting)]
    # SIGINT: it ends without waiting for its clients to leave.
    start("postgres", [programs / "postgres", "-D", data, *options], {}, user, end=signal.SIGINT)
    ready = [programs / "pg_isready", "--quiet", "--host=127.0.0.1", f"--port={port}"]
    start.wait("postgres", lambda: subprocess.run(ready).returncode == 0)
    make_databases = [
        programs / "psql",
        "--quiet",
        "--host=127.0.0.1",
        f"--port={port}",
        f"--username={USER}",
    ]
    make_databases += ["--dbname=postgres", "--set=ON_ERROR_STOP=1", f"--file={_HERE / 'databases.sql'}"]
    start.to_its_end(make_databases, {"PGPASSWORD": password})
    return f"127.0.0.1:{port}", password


def _other_user() -> str:
    """Who Postgres runs as where we are root."""
    try:
        return pwd.getpwnam("postgres").pw_name
    except KeyError:
        return "nobody"


def _s3(start: _Starter) -> dict[str, str]:
    """moto's S3; what its clients have in their environment."""
    port = _free_port()
    command: list[str | Path] = [
        sys.executable,
        "-P",
        "-m",
        "moto.server",
        "-H",
        "127.0.0.1",
        "-p",
        str(port),
    ]
    start("s3", command, {})
    url = f"http://127.0.0.1:{port}"
    start.wait("s3", lambda: _answers(f"{url}/moto-api/data.json"))
    return {
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": USER,
        "AWS_SECRET_ACCESS_KEY": secrets.token_urlsafe(24),
        "AWS_DEFAULT_REGION": "us-east-1",
    }


@contextmanager
def _folder() -> Iterator[Path]:
    folder = Path(mkdtemp(prefix="mergeline-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _written(file: Path, settings: dict[str, str]) -> Iterator[None]:
    """A file for shells, which appears whole, for its owner alone."""
    partial = file.with_name(f".{file.name}.partial")
    partial.write_text("".join(f"export {name}={shlex.quote(value)}\n" for name, value in settings.items()))
    partial.rename(file)
    try:
        yield
    finally:
        file.unlink(missing_ok=True)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _answers(url: str) -> bool:
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(url, timeout=5) as answer:
            return answer.status == 200
    except (OSError, urllib.error.URLError):
        return False


def _end(program: subprocess.Popen[bytes], how: int) -> None:
    """End a program with what it has started; by force if it takes long."""
    for sent in (how, signal.SIGKILL):
        try:
            os.killpg(program.pid, sent)
        except ProcessLookupError:
            pass
        try:
            program.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            continue
        if sent != signal.SIGKILL and _group_lives(program.pid):
            time.sleep(1)  # children of a child that has ended already
        else:
            return


def _group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def _serve_for(owner: int, file: Path) -> int:
    """Serve as long as the process lives that holds the other end of `owner`, even if it is killed."""
    os.setsid()  # Ctrl-C is for the owner
    stop = Event()

    def watch() -> None:
        os.read(owner, 1)
        stop.set()

    Thread(target=watch, daemon=True).start()
    try:
        serve(stop, file)
    except Ended as ended:
        print(f"services.py: {ended}", file=sys.stderr)
        return 1
    return 0


def main(file: Path) -> int:
    os.umask(0o077)
    watched, held = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(held)
        os._exit(_serve_for(watched, file))
    os.close(watched)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        _, status = os.waitpid(child, 0)
    except KeyboardInterrupt:
        os.close(held)
        _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


if __name__ == "__main__":
    if len(sys.argv) > 2 or sys.argv[1:2] in (["-h"], ["--help"]):
        sys.exit(__doc__)
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) == 2 else "services.env").absolute()))
