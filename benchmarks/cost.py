"""What a merge costs within a process that has imported all it needs: CPU-seconds, and bytes that torch allocates.

Needs nothing of Mergeline's, so that a peer's environment runs it, too.
"""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path
from typing import Any, Callable, Iterable

import torch

_MARK = "mergeline step"  # among the profiler's events


class Clock:
    """CPU-seconds of all threads of this process when each step began."""

    def __init__(self) -> None:
        self._steps: list[float] = []

    def step(self) -> None:
        self._steps.append(time.process_time())
        with torch.profiler.record_function(_MARK):
            pass

    @property
    def a_step(self) -> float | None:
        """The median of all steps but the first, if there are any."""
        taken = [after - before for before, after in zip(self._steps[1:], self._steps[2:])]
        return statistics.median(taken) if taken else None


def measured(
    load: Callable[[], tuple[Any, Iterable[torch.nn.Module]]],
    run: Callable[[Any, int, Clock], Any],
    out: Path,
    steps: int,
) -> None:
    """Run a merge of two steps for its bytes, then of `steps` for its time, and write cost.json; of 0, bytes alone.

    load: what `run` is given, and the models whose weights stay in memory; their bytes count, reading them does not.
    """
    given, models = load()
    weights = sum(t.numel() * t.element_size() for model in models for t in model.state_dict().values())
    _, whole, a_step = peaks_of(lambda: run(given, 2, Clock()))
    clock, taken = Clock(), None
    if steps:
        given, _ = load()
        begun = time.process_time()
        run(given, steps, clock)
        taken = time.process_time() - begun
    found = {
        "cpu_s": taken,
        "step_cpu_s": clock.a_step,
        "weights": weights,
        "step_bytes": None if a_step is None else weights + a_step,
        "bytes": weights + whole,
    }
    (out / "cost.json").write_text(json.dumps(found))


def peak_of(what: Callable[[], Any]) -> tuple[Any, int]:
    """What it returns, and how many bytes torch has allocated at the peak beside what was there before."""
    return peaks_of(what)[:2]


def peaks_of(what: Callable[[], Any]) -> tuple[Any, int, int | None]:
    """The same, and the peak between the last two steps of a clock, of what was allocated before, too."""
    with torch.profiler.profile(profile_memory=True) as profiler:
        found = what()
    used, peaks = 0, [0]
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            used += event.nbytes()
            peaks[-1] = max(peaks[-1], used)
        elif event.name() == _MARK:
            peaks.append(used)
    return found, max(peaks), peaks[-2] if len(peaks) > 2 else None
