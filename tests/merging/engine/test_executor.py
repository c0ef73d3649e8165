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


def test_experts_keep_their_order(processes, recipe, tmp_path):
    reversed_experts = dict(sorted(recipe["experts"].items(), reverse=True))
    check_same_bytes({**recipe, "experts": reversed_experts}, tmp_path, partial(merge, executor=processes))


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
