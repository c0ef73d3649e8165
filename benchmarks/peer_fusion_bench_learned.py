"""Learned merges by FusionBench's own classes; runs in FusionBench's own environment.

    PEERS/fusion_bench/bin/python peer_fusion_bench_learned.py FAMILY OUT METHOD... [--steps N] [--experts N]

FAMILY is what `learned_against_fusion_bench.py prepare` wrote: transformers' CLIPVisionModelWithProjection, images and
heads. FusionBench's classes for CLIP fetch processors, class names and data sets from the hub; the methods that do are
replaced here by the family's files, and the logits are of the model's own projection. All else is FusionBench's. Writes
OUT/METHOD/merged, what was fitted, and cost.json: see cost.py.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from cost import Clock, measured
from fusion_bench import BaseModelPool
from fusion_bench.method import (
    FisherMergingForCLIPVisionModel,
    RegMeanAlgorithmForCLIP,
    RegMeanAlgorithmForCLIPPlusPlus,
    RegMeanAlgorithmPlusPlus,
)
from fusion_bench.method.adamerging.layer_wise_adamerging import LayerWiseAdaMergingAlgorithm
from lightning import Fabric
from omegaconf import DictConfig
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from transformers import CLIPVisionModelWithProjection

IMAGES = 128  # of each task, for statistics


class OfFamily:
    """What FusionBench's classes for CLIP take from the hub."""

    family: Path
    _clip_processor: Any = staticmethod(lambda image: image)

    def setup_zero_shot_classification_head(self, *_: Any, **__: Any) -> None:
        self.heads = load_file(self.family / "heads.safetensors")

    def logits(self, module: nn.Module, images: Tensor, task: str) -> Tensor:
        features = module(images).image_embeds
        return self.heads["scale"] * nn.functional.normalize(features, dim=-1) @ self.heads[task].T


class AdaMerging(OfFamily, LayerWiseAdaMergingAlgorithm):
    """Layer-wise; batches are those that the family names."""

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """There is no logger to write to."""

    def on_test_time_adaptation_start(self) -> None:
        self.setup_zero_shot_classification_head()
        self.images = load_file(self.family / "images.safetensors")
        self.draws = {k: iter(v) for k, v in json.loads((self.family / "draws.json").read_text()).items()}

    def get_shuffled_test_loader_iter(self, task: str) -> Any:
        if task == self.modelpool.model_names[0]:
            self.clock.step()
        return iter([(self.images[task][next(self.draws[task])],)])

    def compute_logits(self, module: nn.Module, images: Tensor, task: str) -> Tensor:
        return self.logits(module, images, task)

    def test_time_adaptation(self, module: Any) -> Any:
        found = super().test_time_adaptation(module)
        names = [name for name, _ in found.pretrained_model.named_parameters()]
        save_file(
            {name: found.merge_weight[:, i].detach().contiguous() for i, name in enumerate(names)}, self.saved
        )
        return found


class Batches(OfFamily):
    """compute_logits of a batch, as statistics ask for it."""

    def compute_logits(self, module: nn.Module, batch: Any, task: str) -> Tensor:
        return self.logits(module, batch[0], task)


class RegMean(Batches, RegMeanAlgorithmForCLIP):
    pass


class Fisher(Batches, FisherMergingForCLIPVisionModel):
    pass


class RegMeanPlusPlus(Batches, RegMeanAlgorithmForCLIPPlusPlus):
    _config_mapping = RegMeanAlgorithmPlusPlus._config_mapping  # its own is a dict, which has no `inverse`

    def layer_batches_forward(self, layer: nn.Module, batches_input: list[Tensor]) -> list[Tensor]:
        """FusionBench takes the first of a tuple, which a layer of transformers 5 does not give any more."""
        found = (layer(batch, attention_mask=None) for batch in batches_input)
        return [(out[0] if isinstance(out, tuple) else out).detach() for out in found]


def algorithm(method: str, family: Path, out: Path, steps: int, clock: Clock) -> Any:
    """With FusionBench's defaults for CLIP; of AdaMerging clamped, as its official code is."""
    statistics = {
        "exclude_param_names_regex": [],
        "dataloader_kwargs": DictConfig({"batch_size": 32, "num_workers": 0}),
    }
    regmean = {"num_regmean_examples": IMAGES, "reduce_non_diagonal_ratio": 0.95, "weight_transpose": True}
    config = {
        "name": "layer_wise_adamerging", "weights": None, "optimizer": "adam", "lr": 1e-3, "init_values": 0.3,
        "clamp_weights": True, "tie_weights": True, "strict": False, "max_steps": steps,
    }  # fmt: skip
    fisher = {"normalize_fisher_weight": True, "minimal_fisher_weight": 1e-6, "num_fisher_examples": IMAGES}
    makers = {
        "adamerging": lambda: AdaMerging(DictConfig(config)),
        "fisher": lambda: Fisher(**fisher, **statistics),
        "regmean": lambda: RegMean(**regmean, **statistics),
        "regmean_pp": lambda: RegMeanPlusPlus(**regmean, **statistics),
    }
    found = makers[method]()
    found.family, found.saved, found.clock = family, out / "coefficients.safetensors", clock
    found.fabric = Fabric(accelerator="cpu", devices=1)
    return found


class Pool(BaseModelPool):
    """Models that are loaded, and images that need no instantiation."""

    images: dict[str, Tensor]

    def load_train_dataset(self, dataset_name: str, *_: Any, **__: Any) -> TensorDataset:
        return TensorDataset(self.images[dataset_name], torch.zeros(IMAGES))


def pool_of(family: Path, count: int | None) -> Pool:
    images = load_file(family / "images.safetensors")
    experts = [path.name for path in sorted((family / "experts").iterdir())][:count]
    models = {"_pretrained_": family / "base", **{name: family / "experts" / name for name in experts}}
    pool = Pool(
        {name: CLIPVisionModelWithProjection.from_pretrained(path).eval() for name, path in models.items()}
    )
    pool.images = {name: images[name][:IMAGES] for name in experts}
    return pool


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("family", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("methods", nargs="+")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--experts", type=int, help="the first so many")
    a = parser.parse_args()
    for method in a.methods:
        out = a.out / method
        out.mkdir(parents=True, exist_ok=True)

        def load() -> tuple[BaseModelPool, list[nn.Module]]:
            pool = pool_of(a.family, a.experts)
            return pool, [pool.load_model(name) for name in pool.all_model_names]

        def run(pool: BaseModelPool, steps: int, clock: Clock, method: str = method, out: Path = out) -> None:
            merged = algorithm(method, a.family, out, steps, clock).run(pool)
            merged.save_pretrained(out / "merged")

        measured(load, run, out, a.steps)


if __name__ == "__main__":
    main()
