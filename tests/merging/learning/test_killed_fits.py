"""Fits by gradients that are killed again and again end as if they had not been."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
from pathlib import Path
from typing import Any, Callable

import pytest
import torch
from tiny_network import make_family

from mergeline.merging import files
from mergeline.merging.learning import blockwise, descent
from mergeline.merging.learning.fitting import fit

# Children are forked from a process that has imported what a fit needs, so that a kill costs little.
FORK = multiprocessing.get_context("forkserver")
FORK.set_forkserver_preload(["test_killed_fits", "torch", "scipy.linalg.blas", "blake3"])
PATIENCE = 1200  # seconds until a child that does nothing is a failure
KILLS = {"coefficients": 20}  # of others six

SCALED = {"inner": "task_arithmetic", "scale": 0.3, "shifts": 0}
FITS: dict[str, dict[str, Any]] = {
    "coefficients": {"method": "coefficients", "iterations": 100, "held_out": 0.25},
    "lbfgs": {"method": "coefficients", "over": "whole", "optimiser": "lbfgs", "iterations": 4},
    "distill": {"method": "distill", "iterations": 100, **SCALED},
    "concrete": {"method": "concrete_adamerging", "iterations": 15, "adaptation": 20},
    "soft": {"method": "fw_merging", "variant": "soft", "iterations": 3, "soft_iterations": 15, "examples": 24},
    "prodistill": {"method": "prodistill", "epochs": 1},
}  # fmt: skip


def _at_events(call: Callable[[], None]) -> None:
    """From here on, `call` after each loss and in the middle of each small file that is written, states among them."""
    write, begin = files._write, descent.Schedule.__init__

    def counted(loss: Any) -> Any:
        def after(self: Any, *args: Any, **kwargs: Any) -> Any:
            found = loss(self, *args, **kwargs)
            call()
            return found

        return after

    def halves(handle: int, data: bytes, *rest: Any) -> None:
        write(handle, data[: len(data) // 2])
        call()
        write(handle, data[len(data) // 2 :], *rest)

    def often(self: Any, *args: Any, **kwargs: Any) -> None:
        begin(self, *args, **{**kwargs, "keep": 0.0})

    descent.Descent.loss = counted(descent.Descent.loss)  # type: ignore[method-assign]
    blockwise._Fit._backward = counted(blockwise._Fit._backward)  # type: ignore[method-assign]
    files._write = halves
    descent.Schedule.__init__ = often  # type: ignore[method-assign]


def _fitted(folder: Path, out: Path, params: dict[str, Any]) -> None:
    family = make_family(folder, dtype=torch.float32)
    own = {name: value for name, value in params.items() if name != "method"}
    fit({**family.recipe, "method": params["method"], "params": own}, family.network, family.examples, out)


def _killed_at(event: int, *arguments: Any) -> None:
    left = event

    def call() -> None:
        nonlocal left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)

    _at_events(call)
    _fitted(*arguments)


@pytest.mark.slow
@pytest.mark.parametrize("name", FITS)
def test_a_fit_that_is_killed_many_times_ends_as_if_it_had_not_been(name, tmp_path):
    """Each time it comes a few steps further; one that is done begins anew."""
    family, out, chance = tmp_path / "family", tmp_path / "job", random.Random(name)
    _fitted(family, tmp_path / "whole", FITS[name])
    expected, killed, done = _results(tmp_path / "whole"), 0, 0
    while killed < KILLS.get(name, 6):
        child = FORK.Process(target=_killed_at, args=(chance.randrange(14), family, out, FITS[name]))
        child.start()
        child.join(PATIENCE)
        assert child.exitcode in (0, -signal.SIGKILL)
        if child.exitcode == 0:
            assert _results(out) == expected
            shutil.rmtree(out)
            done += 1
        else:
            killed += 1
    began = _begun(out)
    _fitted(family, out, FITS[name])
    assert _results(out) == expected
    # No run alone comes to the end.
    assert done or began, "it began anew every time"


def _begun(job: Path) -> bool:
    """Whether there is something to go on with: a state beyond the first step, or a part that is finished."""
    from safetensors import safe_open

    for state in job.rglob("fit.state"):
        with safe_open(state, framework="pt") as file:
            if dict(json.loads(file.metadata()["state"])["items"])["step"] > 0:
                return True
    return any(job.glob("*/*.safetensors"))


def _results(job: Path) -> dict[str, bytes]:
    """What lies there; the recipe, which names files, without the folder."""
    found = {file.name: file.read_bytes() for file in job.iterdir() if file.is_file()}
    return {name: data.replace(str(job).encode(), b"JOB") for name, data in found.items()}
