"""The limits of this machine in CPU time: what no merge on it can beat.

    python limits.py            # one thread, which is what holds on a shared machine

Writes results/limits.json.
"""

from __future__ import annotations

import hashlib
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable

import torch
from measure import run, save, table


def cpu_seconds(work: Callable[[], object], repeats: int = 5) -> float:
    """The least CPU time of a few runs, after one that warms up."""
    work()
    best = float("inf")
    for _ in range(repeats):
        start = time.process_time()
        work()
        best = min(best, time.process_time() - start)
    return best


def memory() -> dict[str, float]:
    """Copies and casts, in GB (read and written) a CPU-second."""
    x, y = torch.randn(32 << 20), torch.empty(32 << 20)
    half = x.bfloat16()
    casts = x.nbytes + half.nbytes
    return {
        "copy fp32, GB/s": 2 * x.nbytes / 1e9 / cpu_seconds(lambda: y.copy_(x)),
        "cast bf16 to fp32, GB/s": casts / 1e9 / cpu_seconds(lambda: y.copy_(half)),
        "cast fp32 to bf16, GB/s": casts / 1e9 / cpu_seconds(lambda: half.copy_(x)),
        "y += a x fp32, GB/s": 3 * x.nbytes / 1e9 / cpu_seconds(lambda: y.add_(x, alpha=0.3)),
    }


def hashes() -> dict[str, float]:
    """Digests, in GB a CPU-second."""
    data = os.urandom(1 << 20) * 128
    found = {"sha256, GB/s": len(data) / 1e9 / cpu_seconds(lambda: hashlib.sha256(data).digest())}
    try:
        from blake3 import blake3
    except ImportError:
        return found
    return found | {"blake3, GB/s": len(data) / 1e9 / cpu_seconds(lambda: blake3(data).digest())}


def reading() -> dict[str, float]:
    """A file that is in the page cache, read with preadv into one buffer, in GB a CPU-second."""
    with tempfile.NamedTemporaryFile() as file:
        size, step = 512 << 20, 8 << 20
        for _ in range(size // step):
            file.write(os.urandom(step))
        file.flush()
        buffer = bytearray(step)
        descriptor = file.fileno()

        def work() -> None:
            for offset in range(0, size, step):
                os.preadv(descriptor, [buffer], offset)

        return {"read from page cache, GB/s": size / 1e9 / cpu_seconds(work)}


def algebra() -> dict[str, float]:
    """Matrix products in GFLOP a CPU-second, decompositions in CPU-seconds."""
    found = {}
    n = 2048
    for dtype in (torch.float32, torch.float64):
        a, b = torch.randn(n, n, dtype=dtype), torch.randn(n, n, dtype=dtype)
        speed = 2 * n**3 / 1e9 / cpu_seconds(lambda a=a, b=b: a @ b, 3)
        found[f"GEMM {n} {dtype}, GFLOP/s".replace("torch.", "")] = speed
    q, m = torch.randn(768, 768), torch.randn(768, 3072)
    gram = m.double() @ m.double().T
    return found | {
        "svd 768x768 float32, s": cpu_seconds(lambda: torch.linalg.svd(q, full_matrices=False), 2),
        "svd 768x3072 float32, s": cpu_seconds(lambda: torch.linalg.svd(m, full_matrices=False), 2),
        "eigh 768 float32, s": cpu_seconds(lambda: torch.linalg.eigh(gram.float()), 2),
        "eigh 768 float64, s": cpu_seconds(lambda: torch.linalg.eigh(gram), 2),
    }


def start() -> dict[str, float]:
    """What a process pays before it does anything, in CPU-seconds."""

    def median(code: str) -> float:
        return statistics.median(run([sys.executable, "-c", code]).cpu_s for _ in range(5))

    return {"start Python, s": median("pass"), "import torch, s": median("import torch")}


def main() -> None:
    torch.set_num_threads(1)
    found: dict[str, float] = {}
    for part in (start, memory, hashes, reading, algebra):
        found |= part()
    save("limits", [{"limit": name, "value": round(value, 4)} for name, value in found.items()], ("limit",))
    print(table(["limit, of one CPU", "value"], list(found.items())))


if __name__ == "__main__":
    main()
