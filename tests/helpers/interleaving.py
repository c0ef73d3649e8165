"""Threads that take turns at every call of MLflow's client, in an order that a seed draws."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import pytest

_PATIENCE_SECONDS = 0.1  # until those that wait go on without one that sleeps or computes


class Interleaving:
    """Of the threads that want to make a call one is drawn, once all that run want to."""

    def __init__(self, seed: int, threads: int):
        self._draw, self._running = random.Random(seed), threads
        self._waiting: list[int] = []
        self._next: int | None = None
        self._changed = threading.Condition()
        self.order: list[int] = []  # who made each call
        self._names: dict[int, int] = {}

    def turn(self) -> None:
        """Wait until this thread is drawn."""
        me = threading.get_ident()
        with self._changed:
            if me not in self._names:
                return
            self._waiting.append(me)
            while self._next != me:
                if self._next is None and len(self._waiting) >= self._running:
                    self._choose()
                elif not self._changed.wait(_PATIENCE_SECONDS) and self._next is None:
                    self._choose()
            self._next = None
            self._waiting.remove(me)
            self.order.append(self._names[me])
            self._changed.notify_all()

    def _choose(self) -> None:
        self._next = self._draw.choice(sorted(self._waiting, key=self._names.__getitem__))
        self._changed.notify_all()

    def run(self, work: list[Callable[[], Any]]) -> list[Any]:
        """What each gives, in threads of their own; what one raises is raised."""
        found: list[Any] = [None] * len(work)
        raised: list[BaseException] = []

        def body(i: int) -> None:
            with self._changed:
                self._names[threading.get_ident()] = i
            try:
                found[i] = work[i]()
            except BaseException as error:
                raised.append(error)
            finally:
                with self._changed:
                    del self._names[threading.get_ident()]
                    self._running -= 1
                    self._changed.notify_all()

        threads = [threading.Thread(target=body, args=(i,)) for i in range(len(work))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if raised:
            raise raised[0]
        return found


@contextmanager
def interleaved(seed: int, threads: int = 2) -> Iterator[Interleaving]:
    """During the block every call of a client of MLflow's waits for its turn."""
    from mlflow import MlflowClient

    order = Interleaving(seed, threads)

    def waiting(call: Any) -> Any:
        @wraps(call)
        def wait(*args: Any, **kwargs: Any) -> Any:
            order.turn()
            return call(*args, **kwargs)

        return wait

    with pytest.MonkeyPatch.context() as patch:
        for name, call in list(vars(MlflowClient).items()):
            if callable(call) and not name.startswith("_"):
                patch.setattr(MlflowClient, name, waiting(call))
        yield order
