"""Turns: of all who publish one pipeline to one MLflow server, on whatever machines, one at a time does a few things.

MLflow moves an alias to a version whatever it stood for before. In a turn it can be read and moved as one step.
"""

from __future__ import annotations

import os
import platform
import random
import time
from contextlib import contextmanager, suppress
from functools import cache
from typing import TYPE_CHECKING, Iterator
from uuid import uuid4

from mergeline.merging.canonical import text_digest

if TYPE_CHECKING:
    from mlflow import MlflowClient

_CLAIM = "mergeline.turn."
_LONGEST_SECONDS = 60  # a turn is some requests; whose claim stands for longer was killed
_PAUSE_SECONDS = (0.02, 0.2)


@contextmanager
def turn(client: MlflowClient, experiment_id: str) -> Iterator[None]:
    """A block of a few requests that no other process is in for the same experiment.

    A claim is a tag. Each writes its own before it reads the others', so that of two one at least sees the other's, and
    steps back (Dekker's rule). A process that stops in its turn for longer than `_LONGEST_SECONDS` loses it unawares;
    one of this machine that was killed in it loses it at once.
    """
    since: dict[str, float] = {}
    claim = _claim(client, experiment_id)
    while others := _claims(client, experiment_id) - {claim}:
        _withdraw(client, experiment_id, claim)
        now = time.monotonic()
        since = {other: since.get(other, now) for other in others}
        for other, first in since.items():
            if now - first > _LONGEST_SECONDS or _has_ended(other):
                _withdraw(client, experiment_id, other)
        time.sleep(random.uniform(*_PAUSE_SECONDS))
        claim = _claim(client, experiment_id)
    try:
        yield
    finally:
        _withdraw(client, experiment_id, claim)


def _claim(client: MlflowClient, experiment_id: str) -> str:
    """A new one each time: one that stands for long is nobody's who still tries."""
    claim = f"{_CLAIM}{_machine()}.{os.getpid()}.{uuid4().hex}"
    client.set_experiment_tag(experiment_id, claim, "claimed")
    return claim


@cache
def _machine() -> str:
    """A name for where processes have numbers of their own: this machine, or a container on it."""
    with suppress(OSError):
        return text_digest([platform.node(), os.readlink("/proc/self/ns/pid")]).removeprefix("sha256:")[:12]
    return uuid4().hex  # nothing is said of other processes


def _has_ended(claim: str) -> bool:
    """Whether a claim is of a process of this machine that is no more."""
    machine, _, rest = claim.removeprefix(_CLAIM).partition(".")
    if machine != _machine():
        return False
    try:
        os.kill(int(rest.partition(".")[0]), 0)
    except ProcessLookupError:
        return True
    except OSError:  # it is another user's
        pass
    return False


def _claims(client: MlflowClient, experiment_id: str) -> set[str]:
    tags = client.get_experiment(experiment_id).tags
    return {tag for tag in tags if tag.startswith(_CLAIM)}


def _withdraw(client: MlflowClient, experiment_id: str, claim: str) -> None:
    from mlflow.exceptions import MlflowException

    with suppress(MlflowException):  # another has removed it, or will when it has stood for long
        client.delete_experiment_tag(experiment_id, claim)
