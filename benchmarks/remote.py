"""Plan a family of the shape of Llama-3-70B from remote headers, and merge a smaller one over the network.

    python remote.py                     # a loopback hub counts bytes and answers; two minutes
    python remote.py --latency 0.1       # seconds that the hub waits before each answer with bytes of weights

Prints a line for each command: what it is, seconds of wall, what came over the network, the peak of its memory.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "helpers"))

from hub_server import Hub, running_hub
from sparse_llama import llama_70b

EXPERTS = 4
LAYERS = 8  # of the smaller family, 32 MiB each
RUN = """
import re, sys
from mergeline.flows.cli import main
code = main(sys.argv[1:])
print("VmHWM", re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1], file=sys.stderr)
sys.exit(code)
"""


def timed(hub: Hub, what: str, cache: Path, arguments: list[str]) -> None:
    """Run a command beside the hub, and print what it took."""
    hub.seen.clear()
    environment = {**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0", "NO_PROXY": "*"}
    environment |= {"XDG_CACHE_HOME": str(cache)}
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", RUN, *arguments], env=environment, capture_output=True, text=True, check=True
    )
    seconds = time.monotonic() - start
    memory = re.search(r"VmHWM (\d+)", done.stderr)
    assert memory
    print(
        f"{what:28} {seconds:6.1f} s {hub.sent / 1024:10.0f} KiB in {len(hub.seen):4} answers, "
        f"peak {int(memory[1]) / 1024:.0f} MiB",
        flush=True,
    )


def family(method: str, prefix: str) -> list[str]:
    experts = [f"--expert=e{i}={prefix}m{i}" for i in range(1, EXPERTS + 1)]
    return [f"--method={method}", f"--base={prefix}m0", *experts]


def small(seed: int) -> dict[str, Any]:
    import torch
    from safetensors.torch import save

    made = torch.Generator().manual_seed(seed)
    state = {f"layers.{i}.weight": torch.randn(4096, 4096, generator=made).bfloat16() for i in range(LAYERS)}
    return {"model.safetensors": save(state), "config.json": b"{}"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--latency", type=float, default=0.0, metavar="SECONDS")
    latency = parser.parse_args().latency
    with tempfile.TemporaryDirectory() as folder, running_hub() as hub:
        work, hub.pause = Path(folder), latency
        for i in range(EXPERTS + 1):
            hub.repositories[f"org/m{i}"] = llama_70b() | {"generation_config.json": str(i).encode()}
        for what in ("plan of 70B, first", "plan of 70B, again"):
            timed(hub, what, work / "cache", ["plan", *family("ties", "hf://org/")])
        for i in range(EXPERTS + 1):
            hub.repositories[f"org/m{i}"] = small(i)
            (work / f"m{i}").mkdir()
            (work / f"m{i}" / "model.safetensors").write_bytes(
                hub.repositories[f"org/m{i}"]["model.safetensors"]
            )
        for method in ("average", "ties"):
            local = ["merge", *family(method, f"{work}/"), "--workers=2", f"--out={work}/local-{method}"]
            there = ["merge", *family(method, "hf://org/"), "--workers=2", f"--out={work}/there-{method}"]
            timed(hub, f"{method}, files here", work / "cache", local)
            timed(hub, f"{method}, --no-cache", work / "cache", [*there, "--no-cache"])


if __name__ == "__main__":
    main()
