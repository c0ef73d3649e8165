"""Run a command as a child and say what it cost: CPU-seconds, wall seconds and peak memory.

CPU-seconds (user + system, of the child and of every child it waited for) hold on shared machines; wall time
is noise there. Peak memory is the largest resident set of the child or of any process it waited for, as the
kernel counts it.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS = HERE / "results"
SESSION = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime())  # figures of one program run are from one session
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass(frozen=True)
class Cost:
    """What one run, or the median of several, cost."""

    cpu_s: float
    wall_s: float
    peak_mib: float
    runs: int = 1
    failed: str = ""


def environment(threads: int | None) -> dict[str, str]:
    """The environment of a child: so many BLAS threads, or the library's own default (None).

    Bytecode is kept between runs, as an installed package's is.
    """
    dropped = (*THREAD_VARIABLES, "PYTHONDONTWRITEBYTECODE")
    env = {name: value for name, value in os.environ.items() if name not in dropped}
    env["HF_HUB_OFFLINE"] = "1"
    if threads is not None:
        env["OMP_NUM_THREADS"] = str(threads)
    return env


def run(
    command: Sequence[str | Path],
    *,
    threads: int | None = 1,
    memory_gib: float = 0,
    timeout_s: int = 3600,
    cwd: Path | None = None,
) -> Cost:
    """Run a command to its end. A command that fails has its last line of output in `failed`.

    `memory_gib` limits its address space (0: no limit), `timeout_s` its wall time.
    """
    with tempfile.TemporaryDirectory() as folder:
        report, log = Path(folder, "report"), Path(folder, "log")
        with log.open("wb") as output:
            subprocess.run(
                [sys.executable, "-I", __file__, report, str(memory_gib), str(timeout_s), *map(str, command)],
                stdout=output, stderr=subprocess.STDOUT, cwd=cwd, env=environment(threads), check=True,
            )  # fmt: skip
        found = json.loads(report.read_text())
        code = found.pop("code")
        if code:
            lines = log.read_text(errors="replace").strip().splitlines()
            found["failed"] = f"exit {code}: {lines[-1][:200] if lines else 'no output'}"
    return Cost(**found)


def launch(report: Path, memory_gib: float, timeout_s: int, command: list[str]) -> None:
    """Run a command from this small process and write its cost to `report`.

    A process of its own, because Linux counts what the parent of an exec held as the child's first peak.
    """
    if memory_gib:
        resource.setrlimit(resource.RLIMIT_AS, (int(memory_gib * 2**30),) * 2)
    start = time.perf_counter()
    child = subprocess.Popen(command, start_new_session=True)
    signal.signal(signal.SIGALRM, lambda *_: os.killpg(child.pid, signal.SIGKILL))
    signal.alarm(timeout_s)
    _, status, usage = os.wait4(child.pid, 0)
    signal.alarm(0)
    child.returncode = os.waitstatus_to_exitcode(status)
    found = {"code": child.returncode, "cpu_s": usage.ru_utime + usage.ru_stime,
             "wall_s": time.perf_counter() - start, "peak_mib": usage.ru_maxrss / 1024}  # fmt: skip
    report.write_text(json.dumps(found))


def median(costs: Sequence[Cost]) -> Cost:
    """The median of each figure over the runs that went well; the first failure if none did."""
    good = [cost for cost in costs if not cost.failed]
    if not good:
        return costs[0]
    return Cost(
        statistics.median(c.cpu_s for c in good),
        statistics.median(c.wall_s for c in good),
        statistics.median(c.peak_mib for c in good),
        len(good),
    )


def alternate(jobs: Mapping[str, Callable[[], Cost]], repeats: int) -> dict[str, Cost]:
    """Run the jobs in turns (a b a b ...), so that a drifting machine is fair to all; medians by name."""
    costs: dict[str, list[Cost]] = {name: [] for name in jobs}
    for _ in range(repeats):
        for name, job in jobs.items():
            costs[name].append(job())
    return {name: median(found) for name, found in costs.items()}


def machine() -> dict[str, Any]:
    """What the figures were taken on."""
    model = next(
        (line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.processor(),
    )
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
    }


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def save(name: str, rows: Sequence[Mapping[str, Any]], key: Sequence[str]) -> None:
    """Write rows into results/NAME.json; a row replaces the earlier one with the same values under `key`."""
    path = RESULTS / f"{name}.json"
    RESULTS.mkdir(exist_ok=True)
    kept = {tuple(row.get(k) for k in key): row for row in load(name)}
    kept |= {tuple(row.get(k) for k in key): dict(row) for row in rows}
    path.write_text(json.dumps({"machine": machine(), "rows": list(kept.values())}, indent=1) + "\n")


def load(name: str) -> list[dict[str, Any]]:
    """The rows of results/NAME.json; none if there is no such file."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text())["rows"] if path.exists() else []


def figures(cost: Cost) -> dict[str, Any]:
    """A cost as it is written into results, with the session it was measured in."""
    found = {k: round(v, 3) if isinstance(v, float) else v for k, v in asdict(cost).items() if v != ""}
    return found | {"session": SESSION}


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table; floats get three significant digits, None a dash."""

    def cell(value: Any) -> str:
        if isinstance(value, float):
            return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
        return "-" if value is None else str(value)

    lines = [list(header), ["---"] * len(header), *([cell(v) for v in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def find_mergeline() -> str:
    """The command `mergeline`: MERGELINE if set, else beside this Python."""
    return os.environ.get("MERGELINE") or str(Path(sys.executable).parent / "mergeline")


def merge_command(
    method: str,
    experts: Sequence[Path],
    out: Path,
    *,
    base: Path | None = None,
    threads: int | None = None,
    **parameters: Any,
) -> list[str]:
    """`mergeline merge` with these checkpoints, on as many workers as threads; experts are named a0, a1, ..."""
    command = [find_mergeline(), "merge", "--method", method, "--out", str(out)]
    if threads is not None:
        command += ["--workers", str(threads)]
    if base is not None:
        command += ["--base", str(base)]
    for i, expert in enumerate(experts):
        command += ["--expert", f"a{i}={expert}"]
    for name, value in parameters.items():
        command += ["--set", f"{name}={value if isinstance(value, str) else json.dumps(value)}"]
    return command


def sweep_command(command: Sequence[str], grid: Mapping[str, Sequence[Any]]) -> list[str]:
    """The `mergeline sweep` of a grid, from the `mergeline merge` of one point."""
    options = [
        part for name, values in grid.items() for part in ("--grid", f"{name}={json.dumps(list(values))}")
    ]
    return [command[0], "sweep", *command[2:], *options]


def each_further_point(first: Cost, sweep: Cost, points: int) -> Cost:
    """What a point of a sweep costs beside the first."""
    further = points - 1
    return replace(
        sweep, cpu_s=(sweep.cpu_s - first.cpu_s) / further, wall_s=(sweep.wall_s - first.wall_s) / further
    )


if __name__ == "__main__":
    launch(Path(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
