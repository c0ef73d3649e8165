"""Signals end a process whose threads are busy, and a process that was started does not outlive its owner."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
from places import REPOSITORY

BUSY = """
import time
from mergeline.flows.cli import command
from mergeline.flows.ending import in_thread, terminable
from concurrent.futures import ThreadPoolExecutor
import mergeline.flows.cli as cli

def run(args):
    pool = ThreadPoolExecutor()  # whose threads Python waits for at its end
    pool.submit(time.sleep, 60)
    with terminable():
        print("busy", flush=True)
        in_thread(lambda: time.sleep(60)).result()

class Parsed:
    run = staticmethod(run)

cli.parse = lambda argv: Parsed()
command()
"""

CHILD = "from mergeline.flows.ending import end_with_owner; end_with_owner(); import time; time.sleep(60)"

OWNER = f"""
import subprocess, sys, time
from mergeline.flows.ending import own_children
own_children()
print(subprocess.Popen([sys.executable, "-c", {CHILD!r}]).pid, flush=True)
time.sleep(60)
"""

HASTY = """
import time
from concurrent.futures import ThreadPoolExecutor
from mergeline.flows.ending import Terminated, hasty
with ThreadPoolExecutor() as pool:
    pool.submit(time.sleep, 60)
    with hasty():
        raise {raised}
"""


def python(code: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


SPAWNED = """
import multiprocessing, os, sys, time
from mergeline.flows.ending import own_children

def wait():
    import mergeline.flows.pipeline
    print(os.getpid(), flush=True)
    time.sleep(60)

if __name__ == "__main__":
    own_children()
    multiprocessing.get_context("spawn").Process(target=wait).start()
    time.sleep(60)
"""


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_a_command_whose_threads_are_busy(sent, code):
    process = python(BUSY)
    assert process.stdout.readline() == "busy\n"
    process.send_signal(sent)
    _, err = process.communicate(timeout=10)
    assert process.returncode == code
    assert err == "mergeline: stopped; what was finished is kept, run again to go on\n"


def test_a_process_ends_with_its_owner_even_by_kill_9():
    owner = python(OWNER)
    child = psutil.Process(int(owner.stdout.readline()))
    time.sleep(0.5)
    assert child.is_running() and child.status() != psutil.STATUS_ZOMBIE
    owner.kill()
    owner.communicate()
    _, alive = psutil.wait_procs([child], timeout=10)
    assert not alive


def test_a_run_that_waits_for_its_server_ends_with_its_owner_too(tmp_path):
    """As Prefect starts it: a spawned process that imports the flow, and then asks a server that is gone."""
    script = tmp_path / "owner.py"
    script.write_text(SPAWNED)
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    with subprocess.Popen(
        [sys.executable, script], env=environment, stdout=subprocess.PIPE, text=True
    ) as owner:
        child = psutil.Process(int(owner.stdout.readline()))
        assert child.ppid() == owner.pid
        owner.kill()
    _, alive = psutil.wait_procs([child], timeout=10)
    assert not alive


def test_a_process_without_an_owner_stays():
    code = CHILD.replace("time.sleep(60)", "time.sleep(1.5); print('there')")
    environment = {name: value for name, value in os.environ.items() if name != "MERGELINE_SERVED_BY"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout == "there\n"


def test_after_a_signal_threads_are_not_waited_for():
    process = python(HASTY.format(raised="Terminated"))
    process.communicate(timeout=20)
    assert process.returncode == 143
