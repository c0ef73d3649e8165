"""Image towers as learners see them, and the images that they learn from."""

from __future__ import annotations

from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from mergeline.evaluation.splits import FIT
from mergeline.merging.learning.network import Examples, Network, Pictures
from mergeline.tasks.clip import places
from mergeline.tasks.data_step import dataset

if TYPE_CHECKING:
    from torch import Tensor

    from mergeline.tasks.schema import Params


def network(params: Params, build: Path, like: Path) -> Network:
    """The image tower of `like`: its features are the images' (B, d), its logits scaled cosines with a task's head."""
    from safetensors.torch import load_file
    from torch.nn.functional import normalize

    from mergeline.evaluation.clip.zero_shot import TOWER, build_tower, load_config, pixels_of

    tower, scale = build_tower(like, params.device)
    heads = {task: head.to(params.device) for task, head in load_file(places.heads(build)).items()}

    def score(features: Tensor, task: str) -> Tensor:
        return scale * normalize(features, dim=-1) @ heads[task].T

    config = load_config(like)
    size = config["model_cfg"]["vision_cfg"].get("image_size", 224)
    pictures = Pictures(size, pixels_of(config, params.device)) if isinstance(size, int) else None
    return Network(tower, lambda module, batch: module(batch["images"]), score, TOWER, pictures=pictures)


def examples(params: Params, build: Path, split: str = FIT) -> Examples:
    """The images of a split of every task: of `fit`, or, where a dataset has none, every other one of `val`."""
    from mergeline.evaluation.clip import zero_shot
    from mergeline.evaluation.datasets import load

    base = build / "checkpoints" / params.base
    batches, counts, digests, labelled, fits_val = {}, {}, {}, True, False
    for task in params.tasks:
        data = load(dataset(build, task))
        x, y = data.split(split)
        fits_val = fits_val or (split == FIT and data.fits_val)
        labelled = labelled and bool((y >= 0).all())
        batches[task] = partial(zero_shot.batches, base, data, split, task, params.device)
        counts[task] = len(x)
        digests[task] = "sha256:" + sha256(x.tobytes()).hexdigest()
    return Examples(batches, counts, params.owners, digests, "half of val" if fits_val else split, labelled)
