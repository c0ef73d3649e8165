"""Merges on workers of Dask and of Ray: the same bytes, whoever is lost; and what is said where there are none."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from concurrent.futures import Executor
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Iterator

import pytest
import torch
from checkpoints import SHAPES, edit, file_hashes, refused, save_family
from places import MERGELINE

from mergeline.merging import merge
from mergeline.merging.algebra.slots import View
from mergeline.merging.engine import elsewhere, work
from mergeline.merging.engine.elsewhere import address_of, plan_at
from mergeline.merging.engine.planning import make_plan
from mergeline.merging.engine.sources import FileInputs
from mergeline.merging.errors import UserError
from mergeline.tasks import extras
from mergeline.tasks.executors import Place, opened, place_of

ENGINES = ("dask", "ray")
PACKAGES = {"dask": "distributed", "ray": "ray"}
SEVERAL_UNITS = {f"blocks.{i}.weight": (150, 160) for i in range(10)} | SHAPES
# Without a pre-pass, with one, with decompositions, and with draws.
METHODS: list[tuple[str, dict[str, Any]]] = [
    ("linear", {}),
    ("ties", {}),
    ("cart", {}),
    ("dare", {}),
    ("della", {}),
    ("della", {"variant": "mergekit"}),
]


def skip_without(engine: str) -> None:
    """Not by importing it: Ray reads its environment when it is imported."""
    if find_spec(PACKAGES[engine]) is None:
        pytest.skip(f"{engine} is not installed: pip install 'mergeline[{engine}]'")


@pytest.mark.parametrize(
    "text, place",
    [
        ("dask", Place("dask")),
        ("dask:4", Place("dask", 4)),
        ("ray:2", Place("ray", 2)),
        ("dask://machine-1.cluster:8786", Place("dask", None, "machine-1.cluster", 8786)),
        ("ray://[::1]:10001/", Place("ray", None, "[::1]", 10001)),
    ],
)
def test_places(text, place):
    assert place_of(text) == place
    assert place_of(place.text) == place


@pytest.mark.parametrize(
    "text",
    ["", "spark", "dask:", "dask:0", "dask:-1", "dask:many", "dask://", "dask://host", "ray://host:0", "ray://host:99999",
     "dask://host:1/x", "dask:// host:1", "Dask", "dask:4\n"],
)  # fmt: skip
def test_other_texts_are_refused(text):
    with refused("executor", "dask:4", "ray://HOST:PORT"):
        place_of(text)


@pytest.mark.parametrize(
    "text",
    [
        "dask://me:hunter2@host:8786",
        "ray://hunter2@host:10001",
        "ray://host:10001?token=a@hunter2",
        "me:hunter2@dask",
    ],
)
def test_no_password_is_shown(text):
    with pytest.raises(UserError, match="leave logins and options out") as found:
        place_of(text)
    assert "hunter2" not in str(found.value)
    words = ["merge", "--method", "average", "--expert", "a=a", "--out", "b", "--executor", text]
    ran = subprocess.run([*MERGELINE, *words], capture_output=True, text=True)
    assert ran.returncode == 2 and "hunter2" not in ran.stdout + ran.stderr
    assert "leave logins" in ran.stderr and "Traceback" not in ran.stderr


@pytest.mark.parametrize("engine", ENGINES)
def test_a_missing_package_is_named_with_its_extra(engine, monkeypatch):
    monkeypatch.setattr(extras, "find_spec", lambda _: None)
    with refused(f"pip install 'mergeline[{engine}]'"), opened(f"{engine}:2"):
        pass


def test_no_name_is_no_executor():
    with opened(None) as executor:
        assert executor is None


@pytest.mark.parametrize("engine", ENGINES)
def test_an_address_where_nobody_answers(engine):
    skip_without(engine)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        place = f"{engine}://127.0.0.1:{closed.getsockname()[1]}"
        with refused(place, "does not answer"), opened(place):
            pass


def test_a_worker_of_another_version_says_so(tmp_path):
    plan = make_plan(save_family(tmp_path))
    with FileInputs(plan) as source:
        address = address_of(plan, source)
    with refused("the worker on", "mergeline", "and here is 0.0.1", "install the same there"):
        plan_at(address._replace(versions={**address.versions, "mergeline": "0.0.1"}))


def test_a_worker_that_does_not_see_the_files_says_so(tmp_path):
    plan = make_plan(save_family(tmp_path / "in"))
    with FileInputs(plan) as source:
        address = address_of(plan, source)
    (tmp_path / "in").rename(tmp_path / "elsewhere")
    with refused("the worker on", str(tmp_path / "in"), "workers need the same files under the same paths"):
        plan_at(address)


def test_paths_are_sent_as_absolute_ones(tmp_path, monkeypatch):
    save_family(tmp_path / "in")
    monkeypatch.chdir(tmp_path / "in")
    plan = make_plan({"method": "average", "experts": {"a": "a.safetensors"}, "base": "base.safetensors"})
    with FileInputs(plan) as source:
        address = address_of(plan, source)
    monkeypatch.chdir(tmp_path)
    assert [entry.name for entry in plan_at(address).entries] == [entry.name for entry in plan.entries]


# ---------------------------------------------------------------------------------------------- two processes


@pytest.fixture(params=ENGINES, scope="module")
def engine(request: pytest.FixtureRequest) -> str:
    skip_without(request.param)
    return request.param


@pytest.fixture(scope="module")
def executor(engine: str) -> Iterator[Executor]:
    with opened(f"{engine}:2") as executor:
        assert executor is not None
        yield executor


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A family of several units of work."""
    monkeypatch.setattr(elsewhere, "_UNIT_BYTES", 1 << 20)
    return save_family(tmp_path / "in", shapes=SEVERAL_UNITS)


@pytest.mark.slow
def test_the_same_bytes(executor, recipe, tmp_path):
    for i, (method, params) in enumerate(METHODS):
        given = {**recipe, "method": method, "params": params, "seed": 5}
        here, there = tmp_path / f"here{i}" / "out", tmp_path / f"there{i}" / "out"
        merge(given, here)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(work.MergeJob, "write", None)  # this process merges nothing
            patch.setattr(View, "read", None)  # nor looks at anything
            merge(given, there, executor=executor)
        assert file_hashes(here) == file_hashes(there)


@pytest.mark.slow
def test_a_worker_that_is_killed_costs_its_unit_alone(executor, recipe, tmp_path):
    merge({**recipe, "method": "ties"}, tmp_path / "here" / "out")
    seen: list[int] = []

    def kill(done: int, _all: int) -> None:
        if not seen:
            os.kill(executor.submit(os.getpid).result(), signal.SIGKILL)
        seen.append(done)

    merge({**recipe, "method": "ties"}, tmp_path / "there" / "out", executor=executor, progress=kill)
    assert seen == [*range(1, len(SEVERAL_UNITS) + 1)]  # each tensor was finished once
    assert file_hashes(tmp_path / "here") == file_hashes(tmp_path / "there")


@pytest.mark.slow
def test_what_is_wrong_elsewhere_is_said_here_and_stops_all(executor, recipe, tmp_path):
    edit(recipe["experts"]["b"], logit_scale=torch.tensor(float("nan")))
    for method in ("linear", "ties"):
        with refused("'b'", "'logit_scale'", "NaN"):
            merge({**recipe, "method": method}, tmp_path / "out", executor=executor)
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


@pytest.mark.slow
def test_workers_that_are_lost_again_and_again(engine):
    """In a process of its own, where no other executor of the engine is open."""
    code = f"""
import os
from mergeline.merging.errors import UserError
from mergeline.tasks.executors import opened
if __name__ == "__main__":
    try:
        with opened("{engine}:1") as executor:
            executor.submit(os._exit, 1).result()
    except UserError as error:
        print(error)
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.stdout.startswith(f"{engine}:1: workers were lost"), ran.stdout + ran.stderr
    assert "4 times" in ran.stdout and ran.stdout.count("\n") == 1


@pytest.mark.slow
def test_a_pipeline_opens_it_in_the_thread_that_asks_first(engine):
    """In a process of its own, as above."""
    code = f"""
from concurrent.futures import ThreadPoolExecutor
from mergeline.tasks import spread
if __name__ == "__main__":
    with spread.over("{engine}:2"), ThreadPoolExecutor(2) as threads:
        print(list(threads.map(lambda i: spread.executor().submit(pow, i, 2).result(), range(5))))
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (ran.returncode, ran.stdout) == (0, "[0, 1, 4, 9, 16]\n"), ran.stderr


@pytest.mark.slow
def test_the_command_line(engine, tmp_path):
    """From another folder, with relative paths; nothing but the result is told, and nobody is left running."""
    save_family(tmp_path / "in", shapes=SEVERAL_UNITS)
    words = ["merge", "--method", "ties", "--base", "in/base.safetensors", "--expert", "a=in/a.safetensors",
             "--expert", "b=in/b.safetensors"]  # fmt: skip
    run = partial(subprocess.run, cwd=tmp_path, capture_output=True, text=True)
    here = run([*MERGELINE, *words, "--out", "here/out"])
    there = run([*MERGELINE, *words, "--out", "there/out", "--executor", f"{engine}:2"])
    assert (here.returncode, there.returncode) == (0, 0), there.stderr
    assert there.stdout == here.stdout.replace("here/", "there/")
    assert there.stderr == here.stderr
    assert file_hashes(tmp_path / "here") == file_hashes(tmp_path / "there")
