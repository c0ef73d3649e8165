"""What a block costs whatever its size, which own workers cannot share: the upper bound of what their threads gain.

    python make_inputs.py llama LLAMA
    python per_block.py LLAMA           # about two minutes

`linear` of four experts by one worker with blocks of the usual size and of an eighth of it, in turns, CPU-seconds: the
difference over the number of blocks is nearly all Python, which holds its lock. `share` is that of all blocks of the
usual size in the merge, without imports; threads gain no more than its reciprocal, processes do. Least of the runs.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch
from measure import table

import mergeline.merging.algebra.slots as slots
from mergeline.merging import merge

RUNS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("family", type=Path)
    a = parser.parse_args()
    torch.set_num_threads(1)
    experts = {folder.name: folder for folder in sorted(a.family.glob("expert*"))}
    elements = sum(file.stat().st_size for file in (a.family / "base").glob("*.safetensors")) / 2
    usual = slots._BLOCK
    costs: dict[int, list[float]] = {usual: [], usual // 8: []}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(RUNS + 1):
            for block, found in costs.items():
                slots._BLOCK = block
                begin = time.process_time()
                merge({"method": "linear", "experts": experts}, Path(folder, "out"), workers=1)
                found.append(time.process_time() - begin)
    least = {block: min(found[1:]) for block, found in costs.items()}  # the first imports
    blocks = {block: elements / (block / len(experts)) for block in costs}
    each = (least[usual // 8] - least[usual]) / (blocks[usual // 8] - blocks[usual])
    header = ["CPU-s", "with an eighth", "a block, us", "share"]
    print(table(header, [[least[usual], least[usual // 8], 1e6 * each, each * blocks[usual] / least[usual]]]))


if __name__ == "__main__":
    main()
