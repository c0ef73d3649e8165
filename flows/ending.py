"""How processes end: by a signal, within seconds, whatever their threads are doing; and never after their owner."""

from __future__ import annotations

import os
import time
from contextlib import contextmanager
from functools import cache
from types import FrameType
from typing import TYPE_CHECKING, Callable, Iterator, NoReturn, TypeVar

if TYPE_CHECKING:
    import subprocess
    from concurrent.futures import Future

_OWNER = "MERGELINE_SERVED_BY"  # the process that started this one to run a flow
_POLL_SECONDS = 0.5
_HASTE_SECONDS = 2
SERVER_DIED = 1  # exit codes; of signals: 128, and the signal's number
ENDED_BY_SIGINT, ENDED_BY_SIGTERM = 130, 143

T = TypeVar("T")


class Terminated(KeyboardInterrupt):
    """SIGTERM. As after Ctrl-C, what was finished is kept."""


class ServerDied(Exception):
    """The server that this process started ended alone. Without it nothing goes on: whoever supervises starts anew."""


@contextmanager
def dying_with(child: subprocess.Popen, problem: str) -> Iterator[None]:
    """A block in the main thread that ends within moments, with ServerDied, if a child process ends meanwhile."""
    import signal

    def raise_if_dead(number: int, frame: FrameType | None) -> None:
        if callable(before):
            before(number, frame)
        if child.poll() is not None:
            raise ServerDied(problem)

    before = signal.signal(signal.SIGCHLD, raise_if_dead)
    try:
        raise_if_dead(signal.SIGCHLD, None)
        yield
    except Exception:  # of those who talk to it and get no answer, too
        if child.poll() is None:
            raise
        raise ServerDied(problem) from None
    finally:
        signal.signal(signal.SIGCHLD, before)


@contextmanager
def terminable() -> Iterator[None]:
    """During the block, SIGTERM raises Terminated in the main thread."""

    import signal

    def terminate(_signal: int, _frame: FrameType | None) -> NoReturn:
        raise Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def in_thread(work: Callable[[], T]) -> Future[T]:
    """`work()` in a thread that does not keep the process alive. Its `result` is waited for until a signal comes,
    whereas Prefect in the main thread waits for all of its own threads first.
    """
    from concurrent.futures import Future
    from threading import Thread

    outcome: Future[T] = Future()

    def run() -> None:
        try:
            outcome.set_result(work())
        except BaseException as error:
            outcome.set_exception(error)

    Thread(target=run, daemon=True).start()
    return outcome


@contextmanager
def hasty() -> Iterator[None]:
    """A block that ends the process soon after a signal has ended it, for its threads may go on for minutes."""
    from threading import Timer

    try:
        yield
    except Exception:
        raise
    except BaseException:  # Prefect's for SIGTERM is none of the usual exceptions
        end = Timer(_HASTE_SECONDS, os._exit, [ENDED_BY_SIGTERM])
        end.daemon = True
        end.start()
        raise


def own_children() -> None:
    """Make this process the owner of those that it will start: see `end_with_owner`."""
    os.environ[_OWNER] = str(os.getpid())


def is_owned() -> bool:
    """Whether this process was spawned by the one that has said that it is its owner."""
    from multiprocessing import parent_process

    parent = parent_process()
    return parent is not None and os.environ.get(_OWNER) == str(parent.pid)


@cache
def end_with_owner() -> None:
    """From now on this process does not outlive the one that started it, where that has said that it is its owner."""
    from threading import Thread

    owner = os.environ.get(_OWNER)
    if owner is None:
        return

    def watch() -> None:
        while os.getppid() == int(owner):
            time.sleep(_POLL_SECONDS)
        os._exit(1)

    Thread(target=watch, daemon=True).start()
