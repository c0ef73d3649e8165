"""The machine that a merge runs on: threads, memory, devices."""

from __future__ import annotations

import ctypes
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import cache, partial
from typing import Any, Iterator

from mergeline.merging.errors import UserError
from mergeline.merging.lazy import torch

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # options of mallopt(3)


@contextmanager
def one_thread(lapack: bool = False) -> Iterator[None]:
    """One BLAS thread: results that do not depend on the machine's load, and no spinning; `lapack`: SciPy's too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with _one_scipy_thread() if lapack else nullcontext():
            yield
    finally:
        torch.set_num_threads(before)


def workers_of_one_thread(count: int) -> ThreadPoolExecutor:
    """So many workers, whose products take one thread each."""
    return ThreadPoolExecutor(count, initializer=partial(torch.set_num_threads, 1))


def _one_scipy_thread() -> Any:
    import scipy.linalg.blas  # noqa: F401  only what is loaded can be limited
    from threadpoolctl import threadpool_limits

    return threadpool_limits(1)


@cache
def keep_freed_memory() -> None:
    """Let the C library keep what is freed for the next block, instead of faulting every block in anew."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # not the GNU C library
        return
    for option, value in ((_MMAP_THRESHOLD, 32 << 20), (_TRIM_THRESHOLD, 64 << 20)):
        mallopt(option, value)


def own_stream(device: str) -> None:
    """A stream for each worker: one worker's copies overlap another's computation."""
    if device != "cpu":
        torch.cuda.set_stream(torch.cuda.Stream(device))


def check_device_name(device: str) -> None:
    """Raises UserError unless it is `cpu`, `cuda` or `cuda:N`, of whatever machine."""
    kind, _, index = device.partition(":")
    if device != "cpu" and (kind != "cuda" or not (index or "0").isdecimal()):
        raise UserError(f"device '{device}' is not known; choose cpu, cuda or cuda:N")


def check_device(device: str) -> None:
    """Raises UserError unless it is `cpu`, or a `cuda` or `cuda:N` of this machine."""
    check_device_name(device)
    index = device.partition(":")[2]
    if device != "cpu" and int(index or 0) >= torch.cuda.device_count():
        raise UserError(f"device '{device}' is not in this machine; choose cpu")


def worker_count(need: int, workers: int | None, memory: int | None) -> int:
    """How many workers: as many as asked for (None: one a core), but no more than fit, at `need` bytes each."""
    workers = workers if workers is not None else os.cpu_count() or 1
    if workers < 1:
        raise UserError(f"{workers} workers: give one or more")
    if memory is None:
        return workers
    if need > memory:
        raise UserError(f"the largest tensor needs {need} bytes of memory, allowed are {memory}; allow more")
    return max(1, min(workers, memory // max(need, 1)))
