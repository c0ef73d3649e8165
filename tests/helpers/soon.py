"""What must end soon, whatever it is given."""

from __future__ import annotations

import signal
import time
from contextlib import contextmanager
from typing import Any, Iterator

_WORK = 10.0  # seconds of computing, beside other work


@contextmanager
def soon(patience: float = 60) -> Iterator[None]:
    """The block must neither wait for ever nor compute for long.

    patience: seconds of waiting, on a machine with other work, until it hangs.
    """

    def late(*_: Any) -> None:
        raise TimeoutError(f"still there after {patience} s")

    previous = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, patience)
    start = time.process_time()
    try:
        yield
        assert time.process_time() - start < _WORK
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
