"""Units of work go to other processes as paths and names; what comes back is the same bytes."""

from __future__ import annotations

import os
from concurrent.futures import Executor, ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Callable, Iterator

import pytest
import torch
from checkpoints import SHAPES, edit, file_hashes, refused, save_family
from prefect_server import flow_runs, prefect_server, task_runs

from mergeline.merging import merge
from mergeline.merging.algebra.slots import View
from mergeline.merging.engine import elsewhere, work
from mergeline.merging.engine.planning import make_plan

SEVERAL_UNITS = {f"blocks.{i}.weight": (150, 160) for i in range(10)} | SHAPES


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A family of several units of work."""
    monkeypatch.setattr(elsewhere, "_UNIT_BYTES", 1 << 20)
    return save_family(tmp_path / "in", shapes=SEVERAL_UNITS)


@pytest.fixture(scope="module")
def processes() -> Iterator[Executor]:
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as executor:
        yield executor


def check_same_bytes(recipe: dict[str, Any], folder: Path, merge_there: Callable[..., Any]) -> None:
    """Methods with a pre-pass, with draws, and with decompositions."""
    for method in ("ties", "dare", "cart"):
        here, there = folder / "here" / method, folder / "there" / method
        merge({**recipe, "method": method}, here)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(work.MergeJob, "write", None)  # this process merges nothing
            patch.setattr(View, "read", None)  # nor looks at anything
            merge_there({**recipe, "method": method}, there)
        assert file_hashes(here) == file_hashes(there)
    assert sorted(p.name for p in (folder / "there").iterdir()) == ["cart", "dare", "ties"]


def test_units_of_work(recipe):
    sizes = [sum(info.nbytes for info in entry.inputs) for entry in make_plan(recipe).entries]
    units = list(elsewhere.in_units(sizes))
    assert [i for unit in units for i in unit] == [*range(len(sizes))]
    assert len(units) > 2


def test_two_processes(processes, recipe, tmp_path):
    check_same_bytes(recipe, tmp_path, partial(merge, executor=processes))


def test_two_processes_go_on(processes, recipe, tmp_path):
    merge(recipe, tmp_path / "expected" / "out")

    def stop(*_: int) -> None:
        raise KeyboardInterrupt

    out = tmp_path / "again" / "out"
    with pytest.raises(KeyboardInterrupt):
        merge(recipe, out, executor=processes, progress=stop)
    seen = []
    merge(recipe, out, executor=processes, progress=lambda *counts: seen.append(counts))
    last = len(SEVERAL_UNITS)
    assert 1 < seen[0][0] and seen == [(i, last) for i in range(seen[0][0], last + 1)]
    assert file_hashes(tmp_path / "expected") == file_hashes(tmp_path / "again")


def test_what_is_wrong_elsewhere_is_said_here(processes, recipe, tmp_path):
    edit(recipe["experts"]["b"], logit_scale=torch.tensor(float("nan")))
    with refused("'b'", "'logit_scale'", "NaN"):
        merge(recipe, tmp_path / "out", executor=processes)
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


def test_an_input_that_changes_while_others_read_it_is_noticed_here(processes, recipe, tmp_path):
    path = recipe["experts"]["c"]
    with refused(str(path), "was changed while it was read"):
        merge(recipe, tmp_path / "out", executor=processes, progress=lambda *_: os.utime(path))
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of a local Dask cluster of two processes."""
    from distributed import LocalCluster

    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
        yield cluster.scheduler_address


@pytest.mark.slow
def test_a_dask_cluster(cluster, recipe, tmp_path):
    from distributed import Client

    with Client(cluster) as client:
        check_same_bytes(recipe, tmp_path, partial(merge, executor=client.get_executor()))


@pytest.mark.slow
def test_the_dask_runner_of_a_flow(cluster, recipe, tmp_path):
    from prefect_dask import DaskTaskRunner

    check_runner(DaskTaskRunner(address=cluster), recipe, tmp_path)


@pytest.mark.slow
def test_the_ray_runner_of_a_flow(recipe, tmp_path):
    prefect_ray = pytest.importorskip(
        "prefect_ray", reason="Ray is not installed: pip install 'mergeline[ray]'"
    )
    local = {"num_cpus": 2, "include_dashboard": False}
    check_runner(prefect_ray.RayTaskRunner(init_kwargs=local), recipe, tmp_path)


def check_runner(runner: Any, recipe: dict[str, Any], tmp_path: Path) -> None:
    """A flow whose tasks are the units of work, by any runner of Prefect's."""
    from prefect import flow
    from prefect.logging.handlers import APILogWorker
    from prefect.settings import PREFECT_API_URL, temporary_settings

    from mergeline.flows.scale_out import FlowExecutor

    @flow(task_runner=runner)
    def merge_there(method: str, out: Path) -> None:
        merge({**recipe, "method": method}, out, executor=FlowExecutor())

    (tmp_path / "prefect").mkdir()
    with prefect_server(tmp_path / "prefect") as url, temporary_settings({PREFECT_API_URL: url}):
        check_same_bytes(recipe, tmp_path, lambda recipe, out: merge_there(recipe["method"], out))
        runs = flow_runs(url, "Completed")
        assert len(runs) == 3
        for run in runs:
            states = task_runs(url, run)
            assert len(states) == len(list(work._units(make_plan(recipe).entries)))
            assert set(states.values()) == {"Completed"}
        edit(recipe["experts"]["b"], logit_scale=torch.tensor(float("nan")))
        with refused("'b'", "'logit_scale'", "NaN"):
            merge_there("cart", tmp_path / "bad" / "out")
        # While the server is there: later its thread would write into the stderr that other tests read.
        APILogWorker.drain_all(timeout=5)
    assert list((tmp_path / "bad").iterdir()) == []
