"""Zero-shot classification with CLIP models: heads from the text tower, predictions from the image tower.

A base is a folder of open_clip: open_clip_config.json, and model.safetensors or shards with their index.
Its text tower makes the heads once; the models that are measured share them, and differ in the image tower.
https://github.com/mlfoundations/open_clip
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Mapping, Sequence

import numpy as np

from evaluation.datasets import SPLITS, Dataset
from evaluation.suite import Suite
from merging.checkpoint import open_checkpoint
from merging.errors import UserError, did_you_mean
from merging.files import read_object

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

CONFIG = "open_clip_config.json"


def load_config(folder: Path | str) -> dict[str, Any]:
    """{"model_cfg", "preprocess_cfg"} of open_clip_config.json; pixel mean and std default to OpenAI's.

    Raises:
        UserError: missing, not JSON, or not a model configuration of open_clip.
    """
    path = Path(folder) / CONFIG
    config = read_object(path)
    model = config.get("model_cfg")
    if not isinstance(model, dict) or not {"embed_dim", "vision_cfg", "text_cfg"} <= model.keys():
        raise UserError(f"{path}: 'model_cfg' must hold embed_dim, vision_cfg and text_cfg")
    return {"model_cfg": model, "preprocess_cfg": config.get("preprocess_cfg") or {}}


def load_state(path: Path | str) -> dict[str, Tensor]:
    """The tensors of a safetensors file, or of a folder with one or with shards and an index (raises UserError)."""
    checkpoint = open_checkpoint(path)
    return {name: checkpoint.read(name) for name in checkpoint.tensors}


def build_heads(
    base: Path | str, suite: Suite, classnames: Mapping[str, list[str] | None], device: str = "cpu"
) -> dict[str, Tensor]:
    """The zero-shot head (C, d) of every task, float32: a row is the unit vector of a class.

    The class name is put into every template of the task; the normalised text features are averaged and
    normalised again (Radford et al., 2021). `classnames` are the datasets' own, for where the suite has none.

    Raises:
        UserError: the base cannot be loaded, or a task's class names are known neither to suite nor dataset.
    """
    import open_clip
    import torch

    names = {task: spec.classnames or classnames.get(task) for task, spec in suite.tasks.items()}
    if unnamed := [task for task in names if not names[task]]:
        raise UserError(f"{unnamed[0]}: the dataset names no classes; add classnames to the suite")
    model = _build_model(Path(base)).to(device)
    tokenizer = open_clip.get_tokenizer(f"local-dir:{base}")
    heads = {}
    with torch.inference_mode():
        for task, spec in suite.tasks.items():
            columns = open_clip.build_zero_shot_classifier(
                model, tokenizer, names[task], spec.templates, device=device
            )
            heads[task] = columns.T.contiguous().cpu()
    return heads


class Evaluator:
    """Predicts with any number of image towers of one architecture, in float32; the model is built once.

    base: folder of the base model (its text tower may be missing). heads: (C, d) for each task. data: a
    prepared dataset for each task. batch_size: may change the last bits of features; with 100 small images,
    activations fit a core's cache.

    Raises:
        UserError: base, heads and data do not fit one another.
    """

    def __init__(
        self,
        base: Path | str,
        heads: Mapping[str, Tensor],
        data: Mapping[str, Dataset],
        device: str = "cpu",
        batch_size: int = 100,
    ):
        import torch
        from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD

        self.device, self.batch_size, self.data = torch.device(device), batch_size, data
        self._config = load_config(base)
        model = _build_model(Path(base), required="visual.")
        self._names = set(model.state_dict())
        self._visual: Module = model.visual.to(self.device)
        self._base = {name: value.clone() for name, value in self._visual.state_dict().items()}
        _skip_unused_tokens(self._visual)
        self._mean = self._channels("mean", OPENAI_DATASET_MEAN)
        self._std = self._channels("std", OPENAI_DATASET_STD)
        self._heads = {task: head.to(self.device, torch.float32) for task, head in heads.items()}
        for task in data:
            self._check(task)

    def predict(self, state: Mapping[str, Tensor], split: str, tasks: Sequence[str]) -> dict[str, np.ndarray]:
        """The predicted class, int32 (N), of every image of a split ("val" or "test") of each task.

        `state` holds tensors by the names of the base. Those of the image tower that it lacks stay the
        base's; those of the text tower are not used, for the heads are fixed.

        Raises:
            UserError: `state` holds a tensor that the base has not, or has in another shape.
        """
        import torch

        self._load(state)
        with torch.inference_mode():
            return {task: self._predict(task, self.data[task].split(split)[0]) for task in tasks}

    def _load(self, state: Mapping[str, Tensor]) -> None:
        import torch

        for name in state:
            if name not in self._names:
                raise UserError(f"the base has no tensor '{name}'{did_you_mean(name, self._names)}")
        with torch.no_grad():
            for name, target in self._visual.state_dict().items():
                value = state.get(f"visual.{name}", self._base[name])
                if value.shape != target.shape:
                    shapes = f"{tuple(value.shape)}, in the base {tuple(target.shape)}"
                    raise UserError(f"'visual.{name}' is {shapes}")
                target.copy_(value)

    def _predict(self, task: str, x: np.ndarray) -> np.ndarray:
        import torch
        from torch.nn.functional import normalize

        predictions = np.empty(len(x), np.int32)
        for start in range(0, len(x), self.batch_size):
            batch = np.array(x[start : start + self.batch_size])  # (B, H, W, 3) uint8, off the memory map
            pixels = torch.from_numpy(batch).to(self.device).permute(0, 3, 1, 2).float()
            features = self._visual(pixels.sub_(self._mean).div_(self._std))
            logits = normalize(features, dim=-1) @ self._heads[task].T
            predictions[start : start + len(batch)] = logits.argmax(1).cpu().numpy()
        return predictions

    def _channels(self, key: str, default: Sequence[float]) -> Tensor:
        """A setting for each channel (3, 1, 1), from the unit interval to the scale of bytes."""
        import torch

        value = self._config["preprocess_cfg"].get(key, default)
        return 255 * torch.tensor(value, dtype=torch.float32, device=self.device).view(-1, 1, 1)

    def _check(self, task: str) -> None:
        """Say at once what would otherwise fail, or silently mislead, in the middle of an evaluation."""
        if task not in self._heads:
            raise UserError(f"{task}: there is no head for this task; add it to the suite")
        (classes, width), model = self._heads[task].shape, self._config["model_cfg"]
        if width != model["embed_dim"]:
            raise UserError(f"{task}: the head has {width} dimensions, the model {model['embed_dim']}")
        size = model["vision_cfg"].get("image_size", 224)
        size = (size, size) if isinstance(size, int) else tuple(size)
        for split in SPLITS:
            x, y = self.data[task].split(split)
            if x.shape[1:3] != size:
                raise UserError(f"{task}: images are {x.shape[1:3]}, the model takes {size}; set image_size")
            if y.max() >= classes:
                raise UserError(f"{task}: label {y.max()} in {split}, but the suite names {classes} classes")


def _build_model(base: Path, required: str = "") -> Module:
    """The model of a folder, float32, for inference; only names that start with `required` must be there."""
    import open_clip

    config = dict(load_config(base)["model_cfg"])
    kind = open_clip.CustomTextCLIP if config.pop("custom_text", False) else open_clip.CLIP
    try:
        model = kind(**config)
    except (TypeError, ValueError, AttributeError, AssertionError, RuntimeError, OSError) as error:
        raise UserError(f"{base / CONFIG}: no model of open_clip: {' '.join(str(error).split())}") from None
    state, own = load_state(base), model.state_dict()
    for name in sorted(state.keys() | own.keys()):
        if name not in own:
            raise UserError(f"{base}: {CONFIG} has no tensor '{name}'{did_you_mean(name, own)}")
        if name not in state and name.startswith(required):
            raise UserError(f"{base}: tensor '{name}' is missing")
        if name in state and state[name].shape != own[name].shape:
            shapes = f"{tuple(state[name].shape)}, by {CONFIG} {tuple(own[name].shape)}"
            raise UserError(f"{base}: '{name}' is {shapes}")
    model.load_state_dict(state, strict=False)
    return model.eval().requires_grad_(False)


def _skip_unused_tokens(visual: Module) -> None:
    """In the last block of a ViT that is read out at its class token, compute that token alone.

    The result is the same but for rounding; a model of four layers becomes a quarter faster.
    """
    from open_clip.transformer import ResidualAttentionBlock, VisionTransformer

    if type(visual) is not VisionTransformer or visual.pool_type != "tok" or visual.attn_pool is not None:
        return
    last = visual.transformer.resblocks[-1]
    if type(last) is ResidualAttentionBlock and visual.transformer.batch_first and not visual.output_tokens:
        last.forward = partial(_class_token, last)


def _class_token(block: Any, x: Tensor, attn_mask: None = None) -> Tensor:
    """ResidualAttentionBlock.forward for the first of the tokens (B, tokens, d): (B, 1, d)."""
    tokens = block.ln_1(x)
    x = x[:, :1] + block.ls_1(block.attention(tokens[:, :1], tokens, tokens))
    return x + block.ls_2(block.mlp(block.ln_2(x)))
