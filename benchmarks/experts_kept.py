"""Perplexity against the share of experts that are kept, of a small mixture that was trained for real.

    python samples/make_moe.py MODEL
    python benchmarks/experts_kept.py MODEL           prints the table of docs/moe.md, in minutes on one core

Statistics are of files that the model was not trained on, perplexity of others again: bits a byte, 2 ^ bits.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from functools import partial
from math import exp
from pathlib import Path
from typing import Any, Iterator

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "samples"))
from make_moe import windows  # noqa: E402

from mergeline.merging.learning.collect import collect  # noqa: E402
from mergeline.merging.learning.gathering import Gathering  # noqa: E402
from mergeline.merging.learning.network import Examples, Network  # noqa: E402
from mergeline.merging.merge_experts import merge_experts  # noqa: E402

_BATCH, _FIT, _TEST = 32, 256, 512
_KEPT = (6, 4, 3, 2)
WAYS: dict[str, dict[str, Any]] = {
    "prune": {"method": "prune"},
    "mc_smoe": {"method": "mc_smoe"},
    "mc_smoe, router average": {"method": "mc_smoe", "router": "average"},
    "mc_smoe, not aligned": {"method": "mc_smoe", "align": False},
    "mc_smoe, router wide": {"method": "mc_smoe", "router": "wide"},
    "mc_smoe, compress 0.5": {"method": "mc_smoe", "compress": 0.5},
    "mc_smoe, compress 0.15": {"method": "mc_smoe", "compress": 0.15},
    "sub_moe": {"method": "sub_moe"},
    "sub_moe, router dominant": {"method": "sub_moe", "router": "dominant"},
    "sub_moe, rank 0.75": {"method": "sub_moe", "rank": 0.75},
}


def _batches(data: torch.Tensor) -> Iterator[dict[str, Any]]:
    for ids in data.split(_BATCH):
        yield {"task": "text", "input_ids": ids}


def perplexity(folder: Path, data: torch.Tensor) -> float:
    """exp of the mean cross-entropy of a byte."""
    from transformers import MixtralForCausalLM

    model, total = MixtralForCausalLM.from_pretrained(folder).eval(), 0.0
    with torch.no_grad():
        for ids in data.split(_BATCH):
            total += float(model(input_ids=ids, labels=ids).loss) * len(ids)
    return exp(total / len(data))


def statistics(folder: Path, out: Path) -> Path:
    from transformers import MixtralForCausalLM

    def run(module: Any, batch: Any) -> torch.Tensor:
        return module.base_model(input_ids=batch["input_ids"], use_cache=False)[0].flatten(0, 1)

    data = _spread(windows("fit"), _FIT)
    examples = Examples(
        {"text": partial(_batches, data)}, {"text": len(data)}, {"text": "moe"}, {"text": "fit"}, "fit"
    )
    network = Network(MixtralForCausalLM.from_pretrained(folder), run)
    return collect("experts", folder, network, examples, out, gathering=Gathering(outputs=True), expert="moe")


def _spread(data: torch.Tensor, count: int) -> torch.Tensor:
    return data[:: max(len(data) // count, 1)][:count]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    model, test = parser.parse_args().model, _spread(windows("test"), _TEST)
    whole = perplexity(model, test)
    print(f"all experts: {whole:.3f}")
    with tempfile.TemporaryDirectory() as place:
        held = statistics(model, Path(place) / "experts.safetensors")
        print("| experts kept of 8 | " + " | ".join(map(str, _KEPT)) + " |\n|---|" + "---|" * len(_KEPT))
        seconds, cut = [], {}
        for name, way in WAYS.items():
            row = []
            for kept in _KEPT:
                out = Path(place) / "out"
                start = time.perf_counter()
                made = merge_experts(model, out, experts=kept, statistics=held, force=True, **way)
                seconds.append(time.perf_counter() - start)
                if told := made["mixture"].get("compressed"):
                    cut[f"{name}, {kept} experts"] = told
                row.append(f"{perplexity(out, test):.3f}")
            print(f"| {name} | " + " | ".join(row) + " |", flush=True)
        for name, told in cut.items():
            print(f"{name}: {told['numbers']:.1%} of their numbers, relative error {told['error']:.1%}")
        print(f"a merge takes {sum(seconds) / len(seconds):.2f} s")


if __name__ == "__main__":
    main()
