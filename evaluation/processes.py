"""Programs of the user's that measure models: each in a process group that ends with whoever started it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Iterator, Sequence

_CHILD = [sys.executable, "-P", "-m", "mergeline.evaluation.custom.child"]
_SHOWN = 200  # characters of what a process printed, in an error


@contextmanager
def running(argv: Sequence[str], **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """In this block a process runs; it and all that it started end with the block, or with this process.

    argv: as evaluation/custom/child.py takes them after its OWNER. options: of subprocess.Popen.

    Raises:
        OSError: it cannot be started.
    """
    process = subprocess.Popen(
        [*_CHILD, str(os.getpid()), *argv], stdin=subprocess.DEVNULL, start_new_session=True, **options
    )
    try:
        yield process
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.wait()


def last_words(said: bytes, log: Path) -> str:
    """The last line that a process wrote, and where all of it is."""
    last = said.decode(errors="replace").strip().rpartition("\n")[2][:_SHOWN]
    return f"{last or 'it said nothing'} (all that it said: {log})"
