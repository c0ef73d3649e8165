"""Runs a user's function or command in a process group that ends with its owner, whatever becomes of that.

    python -P -m mergeline.evaluation.custom.child OWNER function MODULE:FUNCTION --model DIR --split SPLIT ...
    python -P -m mergeline.evaluation.custom.child OWNER command PROGRAM ARGUMENT ... --model DIR --split SPLIT ...

OWNER is the process that started this one, as the leader of a new session. The current folder is where modules are
looked for. What a function yields is printed as JSON lines; what it prints goes to stderr.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

_SECONDS = 0.5  # between two looks at the owner


def main() -> None:
    """Run what the arguments say, and end as it does."""
    owner, kind, *rest = sys.argv[1:]
    threading.Thread(target=_watch, args=(int(owner),), daemon=True).start()
    if kind == "function":
        _call(rest)
    else:
        _run(rest)


def _watch(owner: int) -> None:
    while os.getppid() == owner:
        time.sleep(_SECONDS)
    os.killpg(0, signal.SIGKILL)


def _call(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("function")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--split", required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--tasks", nargs="+", required=True)
    a = parser.parse_args(argv)
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as lines:
        os.dup2(2, 1)
        module, _, name = a.function.partition(":")
        sys.path.insert(0, os.getcwd())
        function = getattr(importlib.import_module(module), name)
        for task, example, score in function(a.model, a.split, a.tasks, a.device):
            # Scores of numpy and torch, too.
            print(json.dumps({"task": task, "id": example, "score": float(score)}), file=lines)


def _run(argv: list[str]) -> None:
    try:
        code = subprocess.run(argv).returncode
    except OSError as error:
        sys.exit(f"{argv[0]} cannot be started: {error.strerror}")
    if code < 0:
        os.kill(os.getpid(), -code)
    sys.exit(code)


if __name__ == "__main__":
    main()
