"""One FusionBench merge of CLIP vision towers; runs in FusionBench's own environment.

PEERS/fusion_bench/bin/python peer_fusion_bench.py METHOD INPUTS OUT
"""

import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from fusion_bench import BaseModelPool
from fusion_bench.method import (
    ISO_C_Merge,
    ISO_CTS_Merge,
    MagMaxAlgorithm,
    SimpleAverageAlgorithm,
    TaskArithmeticAlgorithm,
    TaskSingularVectorMerging,
    TiesMergingAlgorithm,
)
from transformers import CLIPVisionModel

METHODS = {
    "iso_c": lambda: ISO_C_Merge(scaling_factor=1.0),
    "tsv_merge": lambda: TaskSingularVectorMerging(alpha=1.0),
    "iso_cts": lambda: ISO_CTS_Merge(scaling_factor=1.0, common_space_fraction=0.8),
    "average": lambda: SimpleAverageAlgorithm(),
    "task_arithmetic": lambda: TaskArithmeticAlgorithm(scaling_factor=0.3),
    "magmax": lambda: MagMaxAlgorithm(scaling_factor=0.5),
    "ties": lambda: TiesMergingAlgorithm(scaling_factor=0.3, threshold=20, remove_keys=[], merge_func="sum"),
}


def main() -> None:
    method, inputs, out = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    models = {"_pretrained_": CLIPVisionModel.from_pretrained(inputs / "base")}
    for folder in sorted(inputs.glob("expert*")):
        models[folder.name] = CLIPVisionModel.from_pretrained(folder)
    METHODS[method]().run(BaseModelPool(models)).save_pretrained(out)


if __name__ == "__main__":
    main()
