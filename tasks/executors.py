"""Executors by name: `dask` and `ray` are processes of this machine, `dask://HOST:PORT` and `ray://HOST:PORT` clusters.

What is sent to them are functions of Mergeline with paths and numbers: schedulers and workers need the same versions,
and workers see the same files under the same paths. Both engines run a unit of work again whose worker was lost.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
import signal
import socket
import sys
import warnings
from concurrent.futures import Executor, Future
from contextlib import ExitStack, contextmanager
from functools import partial
from threading import Thread, current_thread, main_thread
from typing import TYPE_CHECKING, Any, Callable, Iterator, NamedTuple, TypeVar

from mergeline.merging.errors import UserError
from mergeline.tasks.extras import require

if TYPE_CHECKING:
    from distributed import Client
    from ray import ObjectRef

FORMS = "dask, dask:4 (processes of this machine), dask://HOST:PORT, ray, ray:4 or ray://HOST:PORT"

_LOCAL = re.compile(r"(dask|ray)(?::([1-9]\d{0,3}))?")
_CLUSTER = re.compile(r"(dask|ray)://(\[[0-9A-Fa-f:.]+\]|[\w.-]+):(\d{1,5})/?")
_MISSING = re.compile(
    r"No module named 'mergeline|module 'mergeline\S* has no attribute|get attribute .*mergeline"
)
# Says what a process has that knows nothing of Mergeline, or what it lacks.
_VERSIONS = "__import__('mergeline.merging.engine.elsewhere', fromlist=['versions']).versions()"
_SECONDS_TO_ANSWER = 10
_SECONDS_TO_SPEAK = 30  # as Dask does: another server may answer, and say nothing that Dask waits for
_SECONDS_FOR_WORKERS = 30
_STARTS = 3  # of Ray on this machine, which waits 30 seconds for itself, and longer where all cores are busy
_ATTEMPTS = 3  # of a unit of work whose worker is lost, besides the first


T = TypeVar("T")


class Place(NamedTuple):
    """Where units of work are run: by an engine, in `processes` of this machine (None: one a core) or a cluster."""

    engine: str
    processes: int | None = None
    host: str = ""
    port: int = 0

    @property
    def text(self) -> str:
        """As it is written."""
        if self.host:
            return f"{self.engine}://{self.host}:{self.port}"
        return self.engine if self.processes is None else f"{self.engine}:{self.processes}"


def place_of(text: str) -> Place:
    """What the name of an executor says (raises UserError for another text, of which no password is shown)."""
    if found := _LOCAL.fullmatch(text):
        return Place(found[1], int(found[2]) if found[2] else None)
    found = _CLUSTER.fullmatch(text)
    if found and 0 < int(found[3]) < 1 << 16:
        return Place(found[1], None, found[2], int(found[3]))
    if "@" in text or "?" in text:  # of which nothing is shown
        raise UserError(f"executor: leave logins and options out of the address; write {FORMS}")
    raise UserError(f"executor '{text}' is not known; write {FORMS}")


@contextmanager
def opened(text: str | None) -> Iterator[Executor | None]:
    """The executor of this name, until the block ends; None for no name.

    Raises:
        UserError: another text, a package that is missing, an address that does not answer, workers that lack Mergeline
            or were lost again and again at the same unit of work.
    """
    if text is None:
        yield None
        return
    place = place_of(text)
    require(place.engine)
    with _BY_ENGINE[place.engine](place) as executor:
        try:
            yield executor
        except Exception as error:
            if told := _told(error, place):
                raise told from error
            raise


def _told(error: Exception, place: Place) -> UserError | None:
    """What to tell of an error of the engine's own; None for others."""
    if isinstance(error, UserError):
        return None
    if any(_MISSING.search(str(cause)) for cause in _causes(error)):
        return UserError(
            f"{place.text}: has no mergeline, or another version; install the same on scheduler and workers"
        )
    name = type(error).__name__
    if name in ("KilledWorker", "WorkerCrashedError", "NodeDiedError", "OutOfMemoryError"):
        return UserError(
            f"{place.text}: workers were lost at the same unit of work {_ATTEMPTS + 1} times ({name}); they may lack "
            "memory for the largest tensor, which `mergeline plan` tells; what was finished is kept, run again to go on"
        )
    if type(error).__module__.startswith(("distributed.", "ray.")) or "task graph" in str(error):
        return UserError(
            f"{place.text}: {name}: {_first_line(error)}; what was finished is kept, run again to go on"
        )
    return None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error:
        yield error
        error = error.__cause__ or error.__context__


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _refuse_silent(place: Place) -> None:
    """Raises UserError unless something answers at the address of a cluster."""
    try:
        socket.create_connection((place.host.strip("[]"), place.port), _SECONDS_TO_ANSWER).close()
    except OSError as error:
        raise UserError(
            f"{place.text} does not answer ({error.strerror or error}); start the cluster, or mend the address"
        ) from None


# ---------------------------------------------------------------------------------------------- Dask


@contextmanager
def _dask(place: Place) -> Iterator[Executor]:
    import dask
    from distributed import Client, LocalCluster

    with ExitStack() as stack:
        stack.enter_context(_quiet("distributed"))
        if place.host:
            _refuse_silent(place)
            certified = dask.config.get("distributed.comm.tls.client.cert", None)
            address = f"{'tls' if certified else 'tcp'}://{place.host}:{place.port}"
            try:
                connect = partial(Client, address, timeout=_SECONDS_TO_ANSWER)
                client = _within(_SECONDS_TO_SPEAK, connect)
            except (OSError, ValueError, TypeError) as error:  # a TimeoutError is an OSError
                raise UserError(
                    f"{place.text} is no Dask scheduler, or another version ({_first_line(error)})"
                ) from None
            stack.callback(client.close)  # a client's own block must end in the thread that began it
            try:
                client.wait_for_workers(1, timeout=_SECONDS_FOR_WORKERS)
            except TimeoutError:
                raise UserError(
                    f"{place.text} has no workers; start some: dask worker {place.host}:{place.port}"
                ) from None
            _refuse_other_code(client, place)
        else:
            # Pages that any local user could read.
            pages: dict[str, list[str]] = {
                f"distributed.{who}.http.routes": [] for who in ("scheduler", "worker", "nanny")
            }
            stack.enter_context(
                dask.config.set({**pages, "distributed.scheduler.allowed-failures": _ATTEMPTS})
            )
            cluster = stack.enter_context(
                LocalCluster(
                    n_workers=place.processes or os.cpu_count() or 1,
                    threads_per_worker=1,
                    memory_limit=0,
                    dashboard_address="127.0.0.1:0",
                    scheduler_kwargs={"dashboard": False},
                    security=True,  # certificates that are made for it: any local user could send code otherwise
                    silence_logs=logging.CRITICAL,
                )
            )
            client = Client(cluster)
            stack.callback(client.close)
        yield client.get_executor(pure=False)


def _within(seconds: float, make: Callable[[], T]) -> T:
    """What `make` gives; the thread that it is asked in is left alone if it takes longer (raises TimeoutError)."""
    made: Future[T] = Future()

    def run() -> None:
        try:
            made.set_result(make())
        except BaseException as error:
            made.set_exception(error)

    Thread(target=run, daemon=True).start()
    return made.result(seconds)


def _refuse_other_code(client: Client, place: Place) -> None:
    """Raises UserError unless scheduler and workers have the code that is sent: workers that lack it would end."""
    from mergeline.merging.engine.manifest import versions

    found: dict[str, Any] = client.run(eval, _VERSIONS, on_error="return")
    try:
        found["the scheduler"] = client.run_on_scheduler(eval, _VERSIONS)
    except Exception as error:
        found["the scheduler"] = error
    for where, has in found.items():
        if has != versions():
            what = _first_line(has) if isinstance(has, BaseException) else has
            raise UserError(
                f"{place.text}: {where} has other code ({what}), and here is {versions()}; install the same there"
            )


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Of a library's messages only critical ones are shown: errors are raised, and told by who catches them."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)


# ---------------------------------------------------------------------------------------------- Ray


@contextmanager
def _ray(place: Place) -> Iterator[Executor]:
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "configure_logging": False}
    if place.host:
        _refuse_silent(place)
        options["address"] = place.text
    else:
        options |= {"address": "local", "num_cpus": place.processes, "include_dashboard": False}
    # Ray writes of workers that were lost to stdout, where results are.
    with _environment({"RAY_DEDUP_LOGS_SKIP_REGEX": ".", **({} if place.host else _alone())}):
        import ray

        if ray.is_initialized():
            raise UserError(f"{place.text}: this process is connected to Ray already; disconnect first")
        try:
            for left in reversed(range(1 if place.host else _STARTS)):
                try:
                    with warnings.catch_warnings(action="ignore"), _own_sigterm():
                        ray.init(**options)
                    break
                except Exception as error:  # some of Ray's have no class of their own
                    ray.shutdown()
                    if not left:
                        raise UserError(f"{place.text}: Ray cannot be had ({_first_line(error)})") from None
            yield RayExecutor()
        finally:
            ray.shutdown()


@contextmanager
def _own_sigterm() -> Iterator[None]:
    """What SIGTERM does stays as it is, whatever the block sets."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if current_thread() is main_thread() and before is not None:
            signal.signal(signal.SIGTERM, before)


_own: dict[str, str] = {}  # of this process, in which Ray reads its environment once, when it is imported


def _alone() -> dict[str, str]:
    """What lets Ray listen to this machine, and to who knows a token, and tell nobody of its use: its environment.

    A process that imported Ray for itself is left with the settings that it chose.
    """
    if not _own and "ray" not in sys.modules:
        _own.update(
            RAY_AUTH_MODE="token",
            RAY_AUTH_TOKEN=secrets.token_hex(32),
            RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0",  # "no cluster", whatever the system: on loopback
            RAY_USAGE_STATS_ENABLED="0",
        )
    return _own


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


class RayExecutor(Executor):
    """Runs functions as tasks of Ray, to which the process is connected."""

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        import ray

        task = ray.remote(num_cpus=1, max_retries=_ATTEMPTS)(_call)
        return _RayFuture(task.remote(function, *args, **kwargs))


def _call(function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """Ray's tasks are functions in Python alone."""
    return function(*args, **kwargs)


class _RayFuture(Future[Any]):
    """A task of Ray, with its own errors in place of Ray's, whose text is a traceback."""

    def __init__(self, reference: ObjectRef[Any]):
        super().__init__()
        self._reference = reference
        reference.future().add_done_callback(self._finish)

    def _finish(self, done: Future[Any]) -> None:
        if not self.set_running_or_notify_cancel():
            return
        error = done.exception()
        if error is None:
            self.set_result(done.result())
        else:
            self.set_exception(getattr(error, "cause", None) or error)

    def cancel(self) -> bool:
        import ray

        if not self.done():
            ray.cancel(self._reference)
        return super().cancel()


_BY_ENGINE: dict[str, Callable[[Place], Any]] = {"dask": _dask, "ray": _ray}
